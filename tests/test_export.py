"""A student in other programs: its file, its diffusers folder, the code in student.md."""

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import distill
import model
import sample
from artifacts import student as student_file
from artifacts.instructions import comfyui_workflow, stock_scheduler, student_page
from common import weights
from common.files import write_text
from common.names import official_names
from common.ranks import AgreedError, generator
from common.weights import save_tensors
from frozen.image import CLIPVision
from model import PRESETS

# What LightX2V reads from its JSON without a default, besides weights and text_len.
LIGHTX2V = {"infer_steps", "target_video_length", "target_height", "target_width", "sample_shift",
            "sample_guide_scale", "denoising_step_list", "self_attn_1_type", "cross_attn_1_type",
            "cross_attn_2_type"}
GRIDS = {"wan": (7.0, [0, 2, 4, 5, 7]), "hunyuan": (7.0, [0, 1, 4, 7])}   # uneven: no stock one
EVEN = {"wan": (5.0, [0, 2, 4, 6, 7]), "hunyuan": (7.0, [0, 2, 4, 6])}


@pytest.fixture
def make_student(tmp_path, ranks):
    """make_student(preset, n, shift, key, **settings) exports a random student: file and DiT."""
    def make(preset: str, n: int, shift: float, key: list[int], scale: float = 1.0,
             **settings) -> tuple[Path, torch.nn.Module]:
        dit, draw = model.build_dit(preset), generator("export")
        with torch.no_grad():
            for name, p in dit.named_parameters():
                p.copy_(torch.randn(p.shape, generator=draw) * 0.5 * p.shape[-1] ** -0.5)
                if "norm" in name and name.endswith("weight"):
                    p.add_(1)
            next(dit.parameters()).mul_(scale)
        save_tensors(tmp_path / "teacher.safetensors", dit.state_dict(), {})
        cfg = distill.Config(
            family=PRESETS[preset].family, preset=preset, n=n, shift=shift, key=key, device="cpu",
            weights=str(tmp_path / "teacher.safetensors"), run=str(tmp_path / "run"), **settings)
        state = distill.build(cfg, model.key_times(cfg.family, n, shift, key)[::-1], ranks)
        return student_file.export_student(cfg, state, ranks, {"teacher": "abc"}), state.student
    return make


def blocks_of(file: Path) -> list[str]:
    """The Python code in a student.md, block by block."""
    return re.findall(r"```python\n(.*?)```", file.with_suffix(".md").read_text(), re.DOTALL)


def pasted(file: Path, monkeypatch, folder: bool) -> dict:
    """The names that student.md's code defines up to its last block, which makes a video on a GPU;
    a pipeline is next to it. folder: load the network from the folder, not the file."""
    monkeypatch.chdir(file.parent)
    names, blocks = {}, blocks_of(file)
    for block in (blocks[0], blocks[2 if folder else 1], blocks[3]):
        exec(block, names)
    assert 'pipe.to("cuda")' in blocks[4]
    return names


def save_pipeline(folder: Path, pipeline: type, preset: str, **parts) -> None:
    """A pipeline as diffusers saves it, with another DiT, small text encoders and the scheduler of
    the teacher."""
    import diffusers
    import transformers
    from tokenizers import Tokenizer, models
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    small = {"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8,
             "intermediate_size": 8}
    if PRESETS[preset].family == "wan":
        text = transformers.UMT5EncoderModel(transformers.UMT5Config(
            vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    else:
        text = transformers.LlamaModel(transformers.LlamaConfig(**small))
        parts |= {"tokenizer_2": tokenizer, "text_encoder_2": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**small))}
    config = student_file.transformer_config(PRESETS[preset])
    network = getattr(diffusers, config.pop("_class_name"))
    pipeline(transformer=network(**config), tokenizer=tokenizer, text_encoder=text,
             **parts).save_pretrained(folder)


def sampled(student: torch.nn.Module, noise: torch.Tensor, times: list[float],
            cond: dict) -> torch.Tensor:
    """Our latents at the end of the times."""
    return list(model.sample_euler(student, noise, times, cond))[-1]


def t_key_of(file: Path) -> list[float]:
    with safe_open(file, "pt") as f:
        return json.loads(f.metadata()["accvideo"])["t_key"]


def near(a: torch.Tensor, b: torch.Tensor, most: float) -> None:
    error = ((a - b).abs().max() / b.abs().max()).item()
    print(f"largest difference {error:.1e}")
    assert error < most


# -------------------------------------------------------------- what student.md's code samples

@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("even", [True, False])
def test_wan_in_diffusers_by_student_md_ends_where_ours_does(make_student, monkeypatch, folder,
                                                            even):
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    shift, key = (EVEN if even else GRIDS)["wan"]
    file, student = make_student("tiny", key[-1], shift, key, export="diffusers",
                                 export_dtype="fp32")
    save_pipeline(file.parent / "teacher-diffusers", WanPipeline, "tiny",
                  vae=AutoencoderKLWan(base_dim=4),
                  scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0))
    names, draw = pasted(file, monkeypatch, folder), generator("noise")
    assert (stock_scheduler("wan", t_key_of(file)) is not None) == even
    text = torch.randn(1, 16, 64, generator=draw)
    noise = torch.randn(1, 16, 2, 4, 6, generator=draw)
    latents = names["pipe"](
        prompt_embeds=text, latents=noise, height=32, width=48, num_frames=5,
        output_type="latent", **names["settings"]).frames
    near(latents, sampled(student, noise, t_key_of(file), {"text": text}), 1e-5)


@pytest.mark.parametrize("folder", [True, False])
def test_wan_i2v_in_diffusers_by_student_md_ends_where_ours_does(make_student, monkeypatch,
                                                                folder):
    from diffusers import (
        AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline)
    from transformers import CLIPImageProcessorPil
    sizes = replace(PRESETS["tiny-i2v"], text_len=512)  # diffusers tells image rows apart by 512
    monkeypatch.setitem(PRESETS, "tiny-i2v", sizes)
    shift, key = EVEN["wan"]
    file, student = make_student("tiny-i2v", key[-1], shift, key, export="diffusers",
                                 export_dtype="fp32")
    save_pipeline(file.parent / "teacher-diffusers", WanImageToVideoPipeline, "tiny-i2v",
                  vae=AutoencoderKLWan(base_dim=4), image_processor=CLIPImageProcessorPil(),
                  scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0))
    names, draw = pasted(file, monkeypatch, folder), generator("noise")
    text, image = (torch.randn(1, n, c, generator=draw) for n, c in ((512, 64), (37, 32)))
    noise, picture = torch.randn(1, 16, 2, 4, 6, generator=draw), Image.new("RGB", (48, 32), "red")
    pipe = names["pipe"]
    # the pipeline takes the picture itself; the features of its image encoder are given here
    monkeypatch.setattr(pipe, "encode_image", lambda *_: image)
    latents = pipe(picture, prompt_embeds=text, latents=noise, height=32, width=48, num_frames=5,
                   output_type="latent", **names["settings"]).frames
    pixels = pipe.video_processor.preprocess(picture, height=32, width=48).float()
    _, frames = pipe.prepare_latents(pixels, 1, 16, 32, 48, 5, torch.float32, "cpu", None, noise)
    cond = {"text": text, "image": image, "frames": frames}
    near(latents, sampled(student, noise, t_key_of(file), cond), 1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_the_page_crops_a_photograph_and_shows_the_image_encoder_all_of_it(tmp_path, monkeypatch,
                                                                          lora):
    """diffusers would stretch it to the video's shape, and show the encoder its middle square."""
    from transformers import CLIPImageProcessorPil
    page, draw = page_of("wan-i2v-14b-480p", lora=lora), np.random.default_rng(0)
    pixels = draw.integers(0, 256, (80, 40, 3), np.uint8)
    Image.fromarray(pixels).resize((800, 1600)).save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    names = {"pipe": SimpleNamespace(image_processor=CLIPImageProcessorPil())}
    for line in re.findall("^(?:from .*load_image|from PIL|pipe.image_processor).*", page, re.M):
        exec(line, names)
    picture = eval(re.search(r"image=(.*?\)\)),", page)[1], names)
    assert picture.size == (832, 480)
    middle = Image.open("photo.jpg").crop((0, 569, 800, 1031)).resize(picture.size)
    assert np.abs(np.subtract(picture, middle, dtype=float)).mean() < 3
    got = names["pipe"].image_processor(images=picture, return_tensors="pt").pixel_values
    video = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    want = CLIPVision(8, 8, 1, 1).pixels(video)
    assert (got - want).abs().mean() < 0.05 < want.abs().mean()


@pytest.mark.parametrize("even", [True, False])
def test_hunyuan_in_diffusers_by_student_md_ends_where_ours_does(make_student, monkeypatch, even):
    from diffusers import (
        AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline)
    shift, key = (EVEN if even else GRIDS)["hunyuan"]
    file, student = make_student("hunyuan-tiny", key[-1], shift, key, export="diffusers",
                                 export_dtype="fp32")
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(4, 4, 4, 4), norm_num_groups=2,
                                    layers_per_block=1)
    save_pipeline(file.parent / "teacher-diffusers", HunyuanVideoPipeline, "hunyuan-tiny",
                  vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))
    # from_single_file takes every HunyuanVideo to be 3072 wide: only the folder is small
    names, draw = pasted(file, monkeypatch, folder=True), generator("noise")
    assert (stock_scheduler("hunyuan", t_key_of(file)) is not None) == even
    text, pooled = torch.randn(1, 24, 32, generator=draw), torch.randn(1, 24, generator=draw)
    noise = torch.randn(1, 16, 2, 4, 6, generator=draw)
    latents = names["pipe"](
        prompt_embeds=text, pooled_prompt_embeds=pooled, latents=noise, height=32, width=48,
        prompt_attention_mask=torch.ones(1, 24, dtype=torch.long), num_frames=5,
        output_type="latent", **names["settings"]).frames
    cond = {"text": text, "pooled": pooled, "guidance": torch.tensor([6.016])}
    near(latents, sampled(student, noise, t_key_of(file), cond), 1e-5)


@pytest.mark.parametrize("config", [
    "tiny", "tiny-i2v", "wan-t2v-14b-480p", "wan-t2v-1.3b-480p", "wan-i2v-14b-480p",
    "hunyuan-t2v-544p", "hunyuan-t2v-720p"])
def test_the_exported_scheduler_has_the_key_timesteps_of_every_shipped_config(config, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler
    cfg = distill.load_config(distill.Config, "distill", [f"configs/{config}.yaml",
                                                          "weights=assets/tiny"])
    t_key = model.key_times(cfg.family, cfg.n, cfg.shift, cfg.key)
    about = student_file.scheduler_config(PRESETS[cfg.preset], t_key)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(about))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    m = len(t_key) - 1
    own = {"sigmas": [1 - k / m for k in range(m)]} if cfg.family == "hunyuan" else {}
    scheduler.set_timesteps(m, device="cpu", **own)  # as the two pipelines call it
    assert scheduler.sigmas.tolist() == pytest.approx(t_key, abs=2e-7)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in t_key[:-1]], abs=2e-4)


@pytest.mark.parametrize("config,steps", [
    ("wan-t2v-14b-480p", [1000, 978, 952, 919, 880, 829, 762, 671, 536, 321]),
    ("wan-i2v-14b-480p", [1000, 963, 921, 871, 813, 741, 654, 544, 400, 206]),
    ("wan-t2v-1.3b-480p", [1000, 986, 969, 948, 922, 886, 838, 767, 653, 438])])
def test_lightx2v_s_step_list_is_the_known_one(config, steps):
    text = page_of(config)
    image = " --image_path photo.jpg" * ("i2v" in config)  # it writes nothing without the last one
    assert f'--prompt "…"{image} --save_result_path video.mp4`' in text
    settings = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert settings == {
        "infer_steps": 10, "denoising_step_list": steps, "sample_shift": 1, "enable_cfg": False,
        "sample_guide_scale": 1, "model_cls": "wan2.1_distill", "text_len": 512,
        "dit_original_ckpt": "student.safetensors", "target_video_length": 81, "fps": 16,
        "target_height": 480, "target_width": 832, "self_attn_1_type": "torch_sdpa",
        "cross_attn_1_type": "torch_sdpa", "cross_attn_2_type": "torch_sdpa"}


def facts_of(config: str, key: list[int] | None = None) -> dict:
    """What a student of a shipped config, or one with other key timesteps up to n - 1, says."""
    cfg = distill.load_config(distill.Config, "distill", [f"configs/{config}.yaml",
                                                          "weights=assets/tiny"])
    facts = {name: getattr(cfg, name) for name in (
        "family", "preset", "n", "shift", "cfg_scale", "embedded_guidance", "height", "width",
        "frames", "fps")}
    facts |= {"key": cfg.key if key is None else [*key, cfg.n], "dtype": "bf16"}
    facts["t_key"] = model.key_times(cfg.family, cfg.n, cfg.shift, facts["key"])
    return facts


def page_of(config: str, key: list[int] | None = None, lora: bool = False) -> str:
    return student_page(facts_of(config, key), f"student{'_lora' * lora}.safetensors", lora)


@pytest.mark.parametrize("config", [
    "tiny", "tiny-i2v", "wan-t2v-14b-480p", "wan-i2v-14b-480p", "hunyuan-t2v-544p"])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_a_page_is_complete_for_every_family_and_key_timesteps(config, even, lora):
    text = page_of(config, None if even else [0, 1, 20], lora)
    wan = not config.startswith("hunyuan")
    assert re.findall(r"^## .*", text, re.MULTILINE) == [
        "## diffusers", "## ComfyUI", *["## LightX2V"] * wan,
        *["## The official code"] * (not lora), "## This project"]
    assert ("load_lora_weights" in text) == ("LoraLoaderModelOnly" in text) == lora
    assert ("from_single_file" in text) == ("--student student.saf" in text) == (not lora)
    assert "$" not in text and " \n" not in text and "\n\n\n" not in text
    # Pipelines, Wan's prompts and the video's file need what diffusers does not install.
    packages = re.search("pip install (.*?)`", text)[1].split()
    assert {"transformers", "ftfy", "imageio", "imageio-ffmpeg"} <= set(packages)
    assert ("peft" in packages) == lora and ("enable_tiling()" in text) != wan
    assert "Tried with diffusers 0." in text and "frames per second" in text
    points = re.findall(r"interpolate_to_steps (\d+)", text)
    assert points == [str(len(facts_of(config, None if even else [0, 1, 20])["t_key"]) - 1)
                      for _ in points]
    assert ("load_image" in text) == ("i2v" in config)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "student.md", "exec")
    assert (("sigmas=[" if wan else '"sigmas": [') in text) == (not even)
    assert ("ManualSigmas" in text) == (wan or not even)
    for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL):
        assert LIGHTX2V <= json.loads(block).keys()


# ------------------------------------------------------------------------------- files, dtypes

def test_a_student_is_bf16_under_official_names_half_the_size_and_says_its_dtype(make_student):
    file, student = make_student("tiny", 6, 5.0, [0, 2, 4, 6])
    half, rounded = file.stat().st_size, load_file(file)
    exact = dict(student.named_parameters())
    assert rounded.keys() == exact.keys()
    assert all(p.dtype == torch.bfloat16 for p in rounded.values())
    assert all(torch.equal(p, exact[name].full_tensor().bfloat16())
               for name, p in rounded.items())
    with safe_open(file, "pt") as f:
        facts = json.loads(f.metadata()["accvideo"])
    assert facts["dtype"] == "bf16" and facts["teacher"] == "abc" and facts["key"] == [0, 2, 4, 6]
    full, _ = make_student("tiny", 6, 5.0, [0, 2, 4, 6], export_dtype="fp32")
    assert half / full.stat().st_size == pytest.approx(0.5, abs=0.01)
    assert all(torch.equal(p, exact[name].full_tensor()) for name, p in load_file(full).items())
    assert not list(file.parent.glob("*diffusers*"))


def test_a_student_that_was_damaged_on_its_way_is_not_sampled(make_student):
    file, _ = make_student("tiny", 6, 5.0, [0, 2, 4, 6])
    cfg = sample.Config()
    assert student_file.student_facts(file, cfg)["teacher"] == "abc"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file.name}: is damaged: .*copy it again, or export"):
        student_file.student_facts(file, cfg)


def test_a_weight_that_fp16_cannot_hold_is_named_and_nothing_is_written(make_student):
    file, _ = make_student("tiny", 6, 5.0, [0, 2, 4, 6], export_dtype="fp16")
    assert {p.dtype for p in load_file(file).values()} == {torch.float16}
    file.unlink()
    message = "fp16; patch_embedding.weight contains .*--export_dtype bf"
    with pytest.raises(AgreedError, match=message):
        make_student("tiny", 6, 5.0, [0, 2, 4, 6], scale=1e6, export_dtype="fp16")
    assert not file.exists()
    make_student("tiny", 6, 5.0, [0, 2, 4, 6], scale=1e6)
    assert torch.isfinite(load_file(file)["patch_embedding.weight"]).all()


@pytest.mark.parametrize("preset", ["tiny", "tiny-i2v", "hunyuan-tiny"])
def test_a_diffusers_folder_holds_the_student_and_loads_in_both_programs(make_student, preset):
    import diffusers
    file, student = make_student(preset, 6, 5.0, [0, 2, 4, 6], export="diffusers")
    folder = file.with_name("student_diffusers")
    kept = [folder / name for name in ("model_index.json", "vae/config.json", "transformer/NOTE")]
    for path in kept:
        write_text(path, '{"of": "a person"}')
    stale = [folder / f"transformer/diffusion_pytorch_model{end}" for end in
             ("-00001-of-00099.safetensors", ".safetensors.index.json")]
    for path in stale:
        write_text(path, "{}")
    make_student(preset, 6, 5.0, [0, 2, 4, 6], export="diffusers")  # once more, over it
    assert [path.read_text() for path in kept] == ['{"of": "a person"}'] * 3
    assert not any(path.exists() for path in stale)
    (folder / "vae/config.json").unlink()
    network = getattr(diffusers, student_file.transformer_config(PRESETS[preset])["_class_name"])
    theirs, info = network.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16,
                                           output_loading_info=True)
    assert not any(info.values())
    want = official_names(load_file(file), "transformer", reverse=True)
    got = dict(theirs.named_parameters())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name].bfloat16(), p) for name, p in want.items())
    cfg = sample.Config(family=PRESETS[preset].family, preset=preset)
    inside = folder / "transformer/diffusion_pytorch_model.safetensors"
    ours, single = (student_file.load_student(cfg, p, torch.device("cpu")) for p in (inside, file))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), single.parameters(),
                                                 strict=True))
    for path in (inside, folder):
        assert student_file.student_facts(path, cfg)["t_key"] == t_key_of(file)
    assert student_file.how_to_use(folder) == student_file.how_to_use(file)
    assert [p.name for p in file.parent.iterdir() if p.name.startswith(".")] == []


def test_two_ranks_write_one_student_and_a_finished_run_is_exported_in_another_form(
        make_config, run_stage, tmp_path):
    config = make_config(synvid={"count": 4}, distill={
        "iterations": 2, "batch": 2, "micro_batch": 1, "held_out": 2, "head_dim": 8})
    run_stage("synvid", config)
    run_stage("distill", config, "export=diffusers", ranks=2)
    file, folder = tmp_path / "run/student.safetensors", tmp_path / "run/student_diffusers"
    before = load_file(file)
    theirs = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    want = official_names(before, "transformer", reverse=True)
    assert theirs.keys() == want.keys() and all(torch.equal(theirs[n], want[n]) for n in want)
    run_stage("distill", config, "--export_dtype", "fp32")
    assert all(torch.equal(p.bfloat16(), before[name]) for name, p in load_file(file).items())
    assert "official names, fp32" in file.with_suffix(".md").read_text()


@pytest.mark.parametrize("preset", ["tiny", "tiny-i2v", "hunyuan-tiny"])
def test_how_prints_student_md_and_needs_no_weights(make_student, capsys, monkeypatch, preset):
    file, _ = make_student(preset, 6, 5.0, [0, 2, 4, 6])
    (file.parents[1] / "teacher.safetensors").unlink()
    capsys.readouterr()
    sample.main(["--how", str(file)])
    text = file.with_suffix(".md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert "Size: 48 × 48, 9 frames, 8 frames per second" in text
    workflow = json.loads(file.with_name("student_comfyui.json").read_text())
    assert workflow == comfyui_workflow(student_file.facts_in(file), file.name)
    assert all(f"{t:.7f}" in text for t in t_key_of(file)[1:-1])
    assert ("LightX2V" in text) == (preset != "hunyuan-tiny")
    monkeypatch.setattr(weights, "read_part", lambda *_: 1 / 0)  # only the header is read
    sample.main(["--how", str(file)])
    assert capsys.readouterr().out == text + "\n"


def test_how_on_a_missing_file_or_another_file_is_a_one_line_error(
        tmp_path, run_stage, tiny_weights):
    gguf = tmp_path / "student.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    for path, fault in ((tmp_path / "none.safetensors", "no such weight file"),
                        (tiny_weights / "diffusion_pytorch_model.safetensors", "has no key family"),
                        (gguf, "is a GGUF file")):
        done = run_stage("sample", "--how", path, check=False)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert f"error: {path}: " in done.stderr and fault in done.stderr


# The kind of each input that is another node's output, by that node's kind and output.
OUTPUTS = {"UNETLoader": ["model"], "CLIPLoader": ["clip"], "DualCLIPLoader": ["clip"],
           "VAELoader": ["vae"], "CLIPTextEncode": ["cond"], "FluxGuidance": ["cond"],
           "ModelSamplingSD3": ["model"], "KSamplerSelect": ["sampler"], "ManualSigmas": ["sigmas"],
           "BasicScheduler": ["sigmas"], "LoadImage": ["image"],
           "CLIPVisionLoader": ["clip_vision"], "CLIPVisionEncode": ["features"],
           "WanImageToVideo": ["cond", "cond", "latent"],
           "EmptyHunyuanLatentVideo": ["latent"], "SamplerCustom": ["latent"],
           "VAEDecode": ["image"], "CreateVideo": ["video"], "SaveVideo": []}
KINDS = {"positive": "cond", "negative": "cond", "conditioning": "cond", "latent_image": "latent",
         "samples": "latent", "images": "image", "start_image": "image",
         "clip_vision_output": "features"}


@pytest.mark.parametrize("config", ["wan-t2v-14b-480p", "wan-i2v-14b-480p", "hunyuan-t2v-544p"])
@pytest.mark.parametrize("even", [True, False])
def test_comfyui_s_workflow_is_one_graph_with_the_student_s_facts(config, even):
    facts = facts_of(config, None if even else [0, 1, 20])
    graph = comfyui_workflow(facts, "student.safetensors")
    assert all(node.keys() == {"class_type", "inputs"} for node in graph.values())
    nodes = {node["class_type"]: node["inputs"] for node in graph.values()}
    links = [(key, *value) for node in graph.values() for key, value in node["inputs"].items()
             if isinstance(value, list)]
    for key, number, output in links:
        assert OUTPUTS[graph[number]["class_type"]][output] == KINDS.get(key, key)
    assert {number for _, number, _ in links} == {  # every node but the last is used
        number for number, node in graph.items() if node["class_type"] != "SaveVideo"}
    if "BasicScheduler" in nodes:  # simple: every 1000 / steps of 1000 shifted times
        steps, shift = nodes["BasicScheduler"]["steps"], nodes["ModelSamplingSD3"]["shift"]
        times = [1 - i / steps for i in range(steps)]
        times = [*(shift * t / (1 + (shift - 1) * t) for t in times), 0.0]
    else:
        times = list(map(float, nodes["ManualSigmas"]["sigmas"].split(",")))
        assert nodes["ModelSamplingSD3"]["shift"] == 1
    assert ("BasicScheduler" in nodes) == (even and config.startswith("hunyuan"))
    assert times == pytest.approx(facts["t_key"], abs=1e-6)
    size = nodes["WanImageToVideo" if "i2v" in config else "EmptyHunyuanLatentVideo"]
    assert [size[name] for name in ("width", "height", "length")] == [
        facts["width"], facts["height"], facts["frames"]]
    assert nodes["CreateVideo"]["fps"] == facts["fps"] and nodes["SamplerCustom"]["cfg"] == 1
    assert nodes["UNETLoader"]["unet_name"] == "student.safetensors"


def test_the_page_has_each_official_script_s_own_option_names():
    text = page_of("hunyuan-t2v-544p")
    assert ("sample_t2v.py`: `--num_inference_steps 5 --flow_shift 7 --flow-reverse "
            "--guidance_scale 1 --embedded_cfg_scale 6.016`") in text
    assert "`--infer-steps 5 --flow-shift 7 --flow-reverse --cfg-scale 1 --embedded-cfg" in text


def test_the_page_knows_the_official_code_s_own_key_timesteps():
    text = page_of("wan-i2v-14b-480p")
    assert "`--sample_solver euler --sample_steps 40 --sample_shift 3`" in text
    text = page_of("wan-i2v-14b-480p", key=[0, 8, 16, 24, 32])
    assert "No official script" in text


@pytest.mark.parametrize("metadata, refused", [
    ({}, True), ({"format": "pt"}, True), ({"accvideo": '{"n": 50}'}, False), (None, False)])
def test_a_student_replaces_only_a_student(metadata, refused, tmp_path):
    path = tmp_path / "student.safetensors"
    student_file.check_replaceable(path)
    save_tensors(path, {"a": torch.ones(2)}, metadata or {})
    if metadata is None:  # damaged: made again
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="exists, and is not a student") if refused else (
            contextlib.nullcontext()):
        student_file.check_replaceable(path)
