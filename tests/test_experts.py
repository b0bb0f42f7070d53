"""Two experts as one DiT: Wan 2.2's official numbers, its layouts on disk, and all stages on a
small world of two experts."""

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_script
from safetensors.torch import load_file
from test_export import LIGHTX2V
from test_forms import fp8_of
from test_model import FIXTURES, fixture_file, fixture_weights, near, wan_config
from torch import Tensor

import distill
import model
import sample
import synvid
from artifacts import student as student_file
from artifacts.instructions import comfyui_workflow, student_page
from artifacts.trajectories import SynVid, trajectory_path
from artifacts.videos import fit_size
from common.config import load_config
from common.files import ROOT
from common.names import EXPERTS, dit_tensors, fingerprint, official_names
from common.prompts import Prompt, read_prompts
from common.ranks import Ranks, generator
from common.weights import load_module, save_tensors
from experts import by_expert, crossing_note
from frozen.image import image_cond
from frozen.load import load_conditioner
from frozen.unipc import sample_unipc, unipc_grid
from frozen.vae import WanVAE
from model import PRESETS, WanConfig, build_dit, load_dit
from training.data import Loader, trained_steps
from training.monitor import held_out_errors

# --------------------------------------------------------------------- the official numbers

TENSOR, CONFIG, NOTES = fixture_file("wan22_a14b_pipeline")
CASES = {case["name"]: case for case in NOTES["cases"]}
WEIGHTS = fixture_weights("wan22_a14b_pipeline")


def of_kind(kind: str) -> dict:
    """The official weights of one model, by names without its own."""
    return {name.removeprefix(f"{kind}."): t for name, t in WEIGHTS.items()
            if name.startswith(f"{kind}.")}


def official_experts(kind: str, boundary: float) -> torch.nn.Module:
    """The two experts of the fixture with the official weights."""
    sizes = replace(wan_config(CONFIG[kind]), boundary=boundary, image_len=0)
    return load_module(build_dit(sizes), of_kind(kind), "fixture").requires_grad_(False)


def conditions(case: dict) -> list[dict]:
    """cond and uncond; an image's by our own VAE and resizing."""
    image = {}
    if case["kind"] == "i2v":
        c = CONFIG["vae"]
        vae = WanVAE(dim=c["dim"], z_dim=c["z_dim"], dim_mult=tuple(c["dim_mult"]),
                     num_res_blocks=c["num_res_blocks"],
                     temporal_down=tuple(c["temperal_downsample"]))
        load_module(vae, of_kind("vae"), "fixture")
        pixels = TENSOR(f"in.{case['name']}.image").permute(2, 0, 1) / 127.5 - 1
        size = fit_size(*case["image_hw"], case["max_area"])
        image = image_cond(pixels, vae, None, case["frames"], *size)
        near(image["frames"], TENSOR(f"out.{case['name']}.y"), 2e-5)
    return [model.collate([{"text": TENSOR(name), **image}])
            for name in ("in.context", "in.context_null")]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_experts_with_two_scales_equal_the_official_pipelines(case):
    dit, name, calls = official_experts(case["kind"], case["boundary"]), case["name"], []
    for number, expert in ((1, dit.high_noise_model), (0, dit.low_noise_model)):
        expert.register_forward_pre_hook(
            lambda _, args, number=number: calls.append((number, args[1][0].item() * 1000)))
    low, high = case["guide"]
    if case["solver"] == "unipc":
        times, solver = unipc_grid(case["steps"], case["shift"]).tolist(), sample_unipc
    else:
        times, solver = model.time_grid("wan", case["steps"], case["shift"]).tolist(), (
            model.sample_euler)
        if case["solver"] == "euler_once":
            even = torch.linspace(1, 0, case["steps"] + 1, dtype=torch.float64)
            times = model.shift_time(even, case["shift"]).tolist()
    steps = list(solver(dit, TENSOR(f"in.{name}.noise")[None], times, *conditions(case),
                        [high, low]))
    for x, expected in zip(steps, TENSOR(f"out.{name}.x"), strict=True):
        near(x[0], expected, 2e-5)
    if low == 1:  # officially two evaluations whose difference counts once
        calls = [call for call in calls for _ in range(2)]
    experts, model_t = zip(*calls, strict=True)
    assert list(experts) == TENSOR(f"out.{name}.expert").int().tolist()
    assert model_t == pytest.approx(TENSOR(f"out.{name}.model_t").tolist(), rel=1e-6)


@pytest.mark.parametrize("kind, channels", [("t2v", 16), ("i2v", 36)])
def test_full_size_names_and_shapes_equal_the_published_checkpoints(kind, channels):
    """Each expert has those of Wan 2.1's 14B for text, but more channels with an image."""
    official, diffusers = (
        json.loads((FIXTURES / f"keys/wan_t2v_14b{s}.json").read_text())["keys"] |
        {"patch_embedding.weight": [5120, channels, 1, 2, 2]} for s in ("", "_diffusers"))
    with torch.device("meta"):
        dit = build_dit(f"wan22-{kind}-a14b")
    for name in EXPERTS:
        state = dit.get_submodule(name).state_dict()
        assert {name: list(p.shape) for name, p in state.items()} == official
    assert official_names(diffusers, "transformer") == official
    assert official_names(official, "transformer", reverse=True) == diffusers


# -------------------------------------------------------------- which expert computes, and when

def two_experts(sizes: WanConfig = PRESETS["tiny-experts"]) -> torch.nn.Module:
    """Two experts with different random weights."""
    dit = build_dit(sizes)
    with torch.no_grad():
        for name, expert in dit.named_children():
            expert.init_weights(generator("experts", name))
            expert.head.head.weight.normal_(std=0.1, generator=generator("head"))
    return dit.requires_grad_(False)


def cond_of(batch: int = 1) -> dict[str, Tensor]:
    return {"text": torch.randn(batch, 6, 64, generator=generator("text"))}


def test_the_boundary_itself_belongs_to_the_expert_for_high_noise():
    dit, x = two_experts(), torch.randn(2, 16, 2, 2, 4, generator=generator("x"))
    for t, name in ((1.0, 0), (0.5, 0), (0.49999, 1), (0.0, 1)):
        times, expert = torch.full((2,), t), dit.get_submodule(EXPERTS[name])
        assert dit.at(t) is expert
        v = expert(x, times, cond_of(2))
        assert torch.equal(dit(x, times, cond_of(2)), v)
        assert torch.equal(model.velocity(dit, x, t, cond_of(2)), v)
    with pytest.raises(ValueError, match="t: expected times on one side of 0.5, got"):
        dit(x, torch.tensor([0.6, 0.4]), cond_of(2))


def test_a_time_is_not_rounded_before_it_meets_the_boundary():
    """Wan 2.2 I2V's grid of 40 steps has 0.89998, which its boundary of 0.9 makes low noise."""
    grid = model.time_grid("wan", 40, 5.0)
    assert round(1000 * grid[14].item()) == 900 and grid[14] < PRESETS["wan22-i2v-a14b"].boundary


def test_two_experts_have_the_interface_of_one_dit():
    dit, one = build_dit("tiny-experts"), build_dit("tiny")
    assert len(dit.blocks) == 2 * len(one.blocks) and dit.cfg.num_layers == len(one.blocks)
    assert dit.token_grid(3, 4, 6) == one.token_grid(3, 4, 6) and dit.flops(9) == one.flops(9)
    names = list(one.state_dict())
    assert list(dit.state_dict()) == [f"{e}.{name}" for e in EXPERTS for name in names]


N, KEY = 8, [0, 2, 4, 6, 8]                 # shift 1: indices 0 to 3 are for high noise
ALIGNED = [0, 3, 4, 7, 8]
TINY_I2V = replace(PRESETS["tiny-experts"], in_dim=36, model_type="i2v", image_len=0)
TABLE = json.loads((FIXTURES / "wan22_key_timesteps.json").read_text())


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r['model']}-{r['n']}-{r['m']}-{r['kind']}")
def test_no_step_of_aligned_key_timesteps_crosses_the_boundary(row):
    grid, key, boundary = (model.time_grid("wan", row["n"], row["shift"]).tolist(), row["key"],
                           row["boundary"])
    t_key = [grid[j] for j in key][::-1]
    assert [round(1000 * t, 2) for t in t_key[::-1]] == row["t"]
    note = crossing_note(grid, key, boundary)
    assert bool(note) == (row["first_low_index"] not in key)
    assert not note or f"with {row['first_low_index']} as a key timestep none does" in note
    assert not crossing_note(grid, key, None)
    assert next(j for j, t in enumerate(grid) if t < boundary) == row["first_low_index"]
    preset = {0.875: "wan22-t2v-a14b", 0.9: "wan22-i2v-a14b"}[boundary]
    high, low, both = (trained_steps(distill.Config(preset=preset, experts=experts), t_key)
                       for experts in ("high", "low", "both"))
    assert high + low == both
    assert "H" * len(high) + "L" * len(low) == row["start"]
    assert row["features"] == "".join("HL"[t < boundary] for t in t_key[-2::-1])


@pytest.mark.parametrize("config, low", [("wan22-t2v-a14b-480p", 25), ("wan22-t2v-a14b-720p", 25),
                                         ("wan22-i2v-a14b-480p", 10)])
def test_shipped_configs_have_aligned_key_timesteps(config, low):
    cfg = load_config(sample.Config, "sample", [f"configs/{config}.yaml", "weights=assets/tiny"])
    grid = model.time_grid("wan", cfg.n, cfg.shift).tolist()
    assert low in cfg.key and not crossing_note(grid, cfg.key, PRESETS[cfg.preset].boundary)
    assert grid[low] < PRESETS[cfg.preset].boundary <= grid[low - 1]


def test_an_image_needs_no_image_encoder_in_wan_2_2(make_weights, monkeypatch, tmp_path):
    from PIL import Image
    monkeypatch.setitem(PRESETS, "tiny-experts", TINY_I2V)
    weights = make_weights(tmp_path / "weights", sizes=TINY_I2V)
    assert not list(weights.glob("models_clip*"))
    Image.new("RGB", (40, 30), "green").save(tmp_path / "a.png")
    cfg = sample.Config(preset="tiny-experts", weights=str(weights), frames=5)
    conditioner = load_conditioner(cfg, "cpu", torch.float32, crop=True)
    [cond] = conditioner.encode_each([Prompt("a red disc", tmp_path / "a.png")], 16, 32)
    assert cond.keys() == {"text", "frames"} and cond["frames"].shape == (20, 2, 2, 4)
    dit = load_dit(weights, "tiny-experts")
    x = torch.randn(1, 16, 2, 2, 4, generator=generator("x"))
    with torch.no_grad():
        assert model.velocity(dit, x, 0.7, model.collate([cond])).shape == x.shape
        with pytest.raises(ValueError, match="cond: expected text, image and frames .*, got text"):
            model.velocity(dit, x, 0.7, model.collate([{"text": cond["text"]}]))


# ------------------------------------------- the shipped small world, its grid split between two

SHIPPED, FILE = ROOT / "assets/tiny", "diffusion_pytorch_model.safetensors"
COUNT = 12                                  # trajectories
KEY_OF_2, KEY_OF_3 = [0, 7, 10], [0, 4, 7, 10]  # only the last step is for low noise, at .366


def split_shipped(folder: Path, change: float) -> Path:
    """A weight folder whose two experts are the shipped DiT.

    Args: change, of the expert for low noise: the deviation of the noise on its matrices, in units
    of theirs.
    """
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns(FILE, "config.json", "*.png"))
    state = load_file(SHIPPED / FILE)
    changed = {name: p if p.ndim != 2 else p + change * p.float().std() * torch.randn(
        p.shape, generator=generator("perturb", name)) for name, p in state.items()}
    for expert, tensors in zip(EXPERTS, (state, changed), strict=True):
        tensors = {name: p.to(state[name].dtype) for name, p in tensors.items()}
        save_tensors(folder / expert / FILE, tensors, {})
        shutil.copy(SHIPPED / "config.json", folder / expert)
    return folder


@pytest.fixture
def make_world(tmp_path, monkeypatch, ranks):
    """make_world(change, **settings) makes the trajectories of a teacher, the shipped DiT (None) or
    two experts as in split_shipped, and returns the settings to distill it."""
    for name, boundary in (("tiny", None), ("tiny-experts", 0.5)):  # other tests have fewer blocks
        monkeypatch.setitem(PRESETS, name, WanConfig(**model.TINY, boundary=boundary))

    def make(change: float | None, **settings) -> distill.Config:
        one, run = change is None, tmp_path / f"run_{change}"
        values = {"preset": "tiny" if one else "tiny-experts", "run": str(run), "n": 10,
                  "weights": str(SHIPPED if one else split_shipped(tmp_path / f"{change}", change)),
                  "shift": 2.0, "height": 64, "width": 64, "frames": 9, "device": "cpu"}
        cfg = synvid.Config(**values, key=KEY_OF_2, keep="all", batch=COUNT, videos=0)
        manifest = synvid.open_manifest(run / "synvid", cfg)
        prompts = read_prompts(SHIPPED / "prompts.txt", False)
        synvid.generate(cfg, prompts, run / "synvid", manifest, range(COUNT), list(range(COUNT)),
                        ranks)
        return distill.Config(**values, **settings, batch=3, micro_batch=3, held_out=4, lr=5e-4,
                              head_dim=8, checkpointing=False, iterations=16)
    return make


def start_training(cfg: distill.Config, data: SynVid, ranks: Ranks):
    """The state of a run, and functions that train it for an iteration and measure its student."""
    loader = Loader(cfg, data, ranks)
    state = distill.build(cfg, data.t_key, ranks)
    steps = distill.algorithm_1(cfg, state, loader)

    def losses() -> dict[str, float]:
        line = next(steps)[2].gather()
        return {name: value for name, value in line.items() if not name.startswith("s_")}

    return state, losses, lambda: held_out_errors(cfg, state.student, loader, ranks)


def test_two_equal_experts_are_one_dit_until_a_step_for_low_noise_is_trained(make_world, ranks):
    """Then the one DiT has learned the steps for high noise, and the expert for low noise nothing
    yet; from there on the two students differ, as each expert has its own part of the steps."""
    runs = {}
    for name, change in (("one", None), ("equal", 0.0)):
        cfg = make_world(change, key=KEY_OF_3)
        data = SynVid(Path(cfg.run) / "synvid", cfg)
        state, losses, errors = start_training(cfg, data, ranks)
        runs[name] = [data.read(i)[:2] for i in range(COUNT)], state.student, losses, errors
    (ours, one, *of_one), (theirs, two, *of_two) = runs.values()
    for (x, cond), (x_one, cond_one) in zip(theirs, ours, strict=True):
        assert torch.equal(x, x_one) and torch.equal(cond["text"], cond_one["text"])
    start = of_two[1]()
    assert start == of_one[1]()
    assert [of_two[0]() for _ in range(2)] == [of_one[0]() for _ in range(2)]
    for name, p in one.named_parameters():
        high, low = (two.get_parameter(f"{expert}.{name}").full_tensor() for expert in EXPERTS)
        assert torch.equal(high, p.full_tensor())
        assert torch.equal(low, load_file(SHIPPED / FILE)[name].float())
    now, of_one_now = of_two[1](), of_one[1]()
    assert now["velocity"][1:] == of_one_now["velocity"][1:] != start["velocity"][1:]
    assert now["velocity"][0] == start["velocity"][0] != of_one_now["velocity"][0]
    assert of_two[0]()["loss_traj"] != of_one[0]()["loss_traj"]


def test_each_expert_s_student_follows_its_own_teacher(make_world, ranks):
    """A single DiT, which learns the same trajectories for as many iterations, is farther from what
    the other expert does for low noise."""
    two = make_world(0.1, key=KEY_OF_2, adv=False)
    one = replace(two, preset="tiny", weights=str(SHIPPED))
    data, found = SynVid(Path(two.run) / "synvid", two), {}
    for name, cfg in (("two", two), ("one", one)):
        _, losses, errors = start_training(cfg, data, ranks)
        found[name] = [errors()]
        for _ in range(cfg.iterations):
            losses()
        found[name].append(errors())
    (before, after), (_, single) = found["two"], found["one"]
    assert after["endpoint"] < 0.9 * before["endpoint"]
    assert after["velocity"][1] < 0.9 * before["velocity"][1]
    assert after["velocity"][0] < 0.7 * single["velocity"][0]


# ------------------------------------------------------- a student of two experts and its files

@pytest.fixture
def make_student(tmp_path, ranks):
    """make_student(sizes, **settings) exports a random student in fp32: its first file and DiT."""
    def make(sizes: WanConfig = PRESETS["tiny-experts"], key: list[int] = KEY, step: int = 0,
             **settings):
        monkey = pytest.MonkeyPatch()
        monkey.setitem(PRESETS, "tiny-experts", sizes)
        teacher = {name: p for name, p in two_experts(sizes).state_dict().items()}
        for level, part in by_expert(teacher).items():
            save_tensors(tmp_path / f"teacher_{level}_noise.safetensors", part, {})
        cfg = distill.Config(
            preset="tiny-experts", n=N, shift=1.0, key=key, device="cpu", run=str(tmp_path / "run"),
            weights=str(tmp_path / "teacher_high_noise.safetensors"), export_dtype="fp32",
            **settings)
        t_key = model.key_times("wan", N, 1.0, key)[::-1]
        state = distill.build(cfg, t_key, ranks)
        with torch.no_grad():
            for name, p in state.student.named_parameters():
                if p.requires_grad:  # B of a LoRA is zero at first
                    p.to_local().mul_(1.01).add_(0.01 * name.endswith("lora_B"))
        state.step, meta = step, {"teacher": fingerprint(cfg.weights)}
        file = student_file.export_student(cfg, state, ranks, meta)
        monkey.undo()
        return file, state.student
    return make


def random_noise() -> Tensor:
    return torch.randn(1, 16, 2, 4, 6, generator=generator("noise"))


def end_of(student: torch.nn.Module, key: list[int], cond: dict) -> Tensor:
    """Our student's latents from that noise."""
    *_, x = model.sample_euler(student, random_noise(), model.key_times("wan", N, 1.0, key), cond)
    return x


def diffusers_parts(image: bool) -> dict:
    """The parts of a pipeline that are the teacher's: small and random."""
    import diffusers
    import transformers
    from tokenizers import Tokenizer, models
    parts = {"vae": diffusers.AutoencoderKLWan(base_dim=4),
             "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(
                 vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
             "tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(
                 models.WordLevel({"a": 0, "?": 1}, unk_token="?")))}
    return parts | ({"image_encoder": None, "image_processor": None} if image else {})


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_the_exported_folder_runs_in_diffusers_with_equal_latents(make_student, image):
    import diffusers
    from PIL import Image
    sizes = TINY_I2V if image else PRESETS["tiny-experts"]
    file, student = make_student(sizes, export="diffusers")
    pipeline = diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline
    pipe = pipeline.from_pretrained(file.with_name("student_diffusers"), **diffusers_parts(image))
    assert pipe.config.boundary_ratio == 0.5
    text = torch.randn(1, 16, 64, generator=generator("text"))
    settings = {"prompt_embeds": text, "latents": random_noise(), "height": 32, "width": 48,
                "num_frames": 5, "output_type": "latent", "num_inference_steps": 4,
                "guidance_scale": 1.0}
    cond, picture = {"text": text}, Image.new("RGB", (48, 32), "red")
    if image:
        pixels = pipe.video_processor.preprocess(picture, height=32, width=48).float()
        _, cond["frames"] = pipe.prepare_latents(pixels, 1, 16, 32, 48, 5, torch.float32, "cpu",
                                                 None, random_noise())
    latents = pipe(*((picture,) if image else ()), **settings).frames
    near(latents, end_of(student, KEY, cond), 1e-5)


@pytest.mark.parametrize("form", ["folder", "files", "loras"])
def test_the_page_s_code_samples_at_uneven_times_in_diffusers(make_student, monkeypatch, form):
    import diffusers
    lora = form == "loras"
    file, student = make_student(key=ALIGNED, export="diffusers", lora=4 if lora else None)
    config = student_file.transformer_config(PRESETS["tiny-experts"])
    config.pop("_class_name")
    dits, teacher = {}, by_expert(two_experts().state_dict())
    for name, level in (("transformer", "high"), ("transformer_2", "low")):
        dits[name] = diffusers.WanTransformer3DModel(**config)
        dits[name].load_state_dict(official_names(teacher[level], "transformer", reverse=True))
    diffusers.WanPipeline(
        **dits, **diffusers_parts(False), boundary_ratio=0.875,
        scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0)
    ).save_pretrained(file.parent / "teacher-diffusers")
    monkeypatch.chdir(file.parent)
    page = (file.parent / f"student{'_lora' * lora}.md").read_text()
    names, blocks = {}, re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert 'pipe.to("cuda")' in blocks.pop()
    if not lora:
        del blocks[1 if form == "folder" else 2]
    for block in blocks:
        exec(block.replace("bfloat16", "float32"), names)
    text = torch.randn(1, 16, 64, generator=generator("text"))
    inputs = {"prompt_embeds": text, "height": 32, "width": 48, "num_frames": 5,
              "output_type": "latent", **names["settings"]}
    latents = names["pipe"](latents=random_noise(), **inputs).frames
    want = end_of(student, ALIGNED, {"text": text})
    near(latents, want, 2e-3 if lora else 1e-5)  # a LoRA's factors are fp16
    if lora:
        unchanged = end_of(two_experts(), ALIGNED, {"text": text})
        assert (unchanged - want).abs().max() > 10 * (latents - want).abs().max()
        page = (ROOT / "docs/own_teacher.md").read_text()
        exec(re.search(r"`(pipe.fuse_lora\(components=.*?\))`", page)[1], names)
        names["pipe"].unload_lora_weights()
        near(names["pipe"](latents=random_noise(), **inputs).frames, latents, 1e-5)


def test_two_files_are_one_student_and_exchanged_or_mixed_ones_are_refused(make_student, tmp_path):
    file, student = make_student(key=ALIGNED)
    low = file.with_name("student_low_noise.safetensors")
    assert file.name == "student_high_noise.safetensors" and low.exists()
    cfg = sample.Config(preset="tiny-experts")
    for path in (file, low):
        facts = student_file.student_facts(path, cfg)
        assert facts["t_key"] == model.key_times("wan", N, 1.0, ALIGNED)
        assert facts["boundary"] == 0.5
        ours = student_file.load_student(cfg, path, torch.device("cpu"))
        assert all(torch.equal(a, b.full_tensor()) for a, b in
                   zip(ours.parameters(), student.parameters(), strict=True))
        assert student_file.how_to_use(path) == (file.parent / "student.md").read_text()
    with pytest.raises(ValueError, match="expected 1 DiT.* by preset 'tiny', got 2"):
        student_file.student_facts(file, sample.Config())
    moved = tmp_path / "moved"
    moved.mkdir()
    for a, b in ((file, low), (low, file)):
        (moved / b.name).write_bytes(a.read_bytes())
    with pytest.raises(ValueError, match="expected the expert for high noise, got that for 'low'"):
        student_file.student_facts(moved / file.name, cfg)
    (moved / low.name).write_bytes(low.read_bytes())
    make_student(key=ALIGNED, step=7)  # as an export whose second file could not be written
    (moved / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="pair is 0, in the other file 7: give two files of"):
        student_file.student_facts(moved / file.name, cfg)
    make_student(key=KEY)
    (moved / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="t_key is .*: give two files of one export"):
        student_file.student_facts(moved / file.name, cfg)
    low.unlink()
    with pytest.raises(FileNotFoundError, match="student_low_noise.safetensors: is missing"):
        student_file.student_facts(file, cfg)


def test_two_loras_are_the_student(make_student, tmp_path):
    file, _ = make_student(key=ALIGNED, lora=4)
    loras = [file.with_name(f"student_lora_{level}_noise.safetensors") for level in ("high", "low")]
    cfg = sample.Config(preset="tiny-experts",
                        weights=str(tmp_path / "teacher_high_noise.safetensors"))
    assert student_file.student_facts(loras[1], cfg)["preset"] == "tiny-experts"
    merged = student_file.load_student(cfg, loras[0], torch.device("cpu"))
    whole = student_file.load_student(cfg, file, torch.device("cpu"))
    for (name, a), b in zip(merged.named_parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name
    teacher = dit_tensors(cfg.weights)
    assert not all(torch.allclose(p, teacher[name].read(), atol=1e-3)
                   for name, p in whole.named_parameters())
    one = file.with_name("lora.safetensors")
    one.write_bytes(loras[0].read_bytes())
    with pytest.raises(ValueError, match="lora.safetensors: expected a name with high_noise or"):
        student_file.load_student(cfg, one, torch.device("cpu"))


def test_the_low_noise_run_starts_where_the_frozen_student_for_high_noise_ends(make_student):
    with pytest.raises(FileNotFoundError, match="high_student: .*distill it first with --experts"):
        make_student(key=ALIGNED, experts="low")
    file, high = make_student(key=ALIGNED, experts="high")
    assert not file.with_name("student_low_noise.safetensors").exists()
    low, both = make_student(key=ALIGNED, experts="low")
    assert low.name == "student_low_noise.safetensors" and file.exists()
    assert [name for name, p in both.named_parameters() if p.requires_grad] == [
        name for name, _ in both.named_parameters() if name.startswith("low_noise_model.")]
    t_key = model.key_times("wan", N, 1.0, ALIGNED)[::-1]
    cfg = distill.Config(preset="tiny-experts", experts="low")
    assert trained_steps(cfg, t_key) == [1, 0]
    *_, want = model.sample_euler(high, random_noise(), t_key[2:][::-1], cond_of())
    assert torch.equal(distill.first_latent(both, random_noise(), t_key, 1, cond_of()), want)
    assert torch.equal(distill.first_latent(both, random_noise(), t_key, 3, cond_of()),
                       random_noise())
    with pytest.raises(ValueError, match="high_student: .*t_key: expected .*--experts high"):
        make_student(key=KEY, experts="low")


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_page_says_where_every_program_switches(kind, lora):
    cfg = load_config(sample.Config, "sample", [f"configs/wan22-{kind}-a14b-480p.yaml",
                                                "weights=assets/tiny"])
    facts = {**vars(cfg), "dtype": "bf16",
             "t_key": model.key_times("wan", cfg.n, cfg.shift, cfg.key)}
    switch = 6 if kind == "t2v" else 3
    text = student_page(facts, "student_lora.safetensors" if lora else "student.safetensors", lora)
    settings = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert settings["boundary_step_index"] == switch and len(settings["denoising_step_list"]) == 10
    assert LIGHTX2V <= settings.keys() and settings["use_image_encoder"] is False
    assert ("lora_configs" in settings) == lora == ("load_into_transformer_2=True" in text)
    assert '"guidance_scale_2": 1.0' in text and f"step {switch} of 10 on" in text
    assert '--save_result_path video.mp4`' in text and settings["fps"] == 16
    assert ("--image_path photo.jpg" in text) == ("ImageOps.fit(" in text) == (kind == "i2v")
    assert "do_center_crop" not in text  # Wan 2.2 has no image encoder
    # CustomSigmas of KJNodes ends every list in 0: it takes all times, not those of an expert.
    assert f"interpolate_to_steps 10, and divide it with SplitSigmas at step {switch}." in text
    assert "$" not in text and " \n" not in text and "\n\n\n" not in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "student.md", "exec")
    graph = comfyui_workflow(facts, "student.safetensors")
    nodes = {number: node["class_type"] for number, node in graph.items()}
    samplers = [graph[n]["inputs"] for n, name in nodes.items() if name == "SamplerCustom"]
    files = []
    for inputs, sigmas in zip(samplers, (facts["t_key"][:switch + 1], facts["t_key"][switch:]),
                              strict=True):
        text = graph[inputs["sigmas"][0]]["inputs"]["sigmas"]
        assert [float(t) for t in text.split(",")] == pytest.approx(sigmas, abs=1e-6)
        dit = graph[graph[inputs["model"][0]]["inputs"]["model"][0]]["inputs"]
        files.append(dit["unet_name"])
    assert files == ["student_high_noise.safetensors", "student_low_noise.safetensors"]
    assert [inputs["add_noise"] for inputs in samplers] == [True, False]
    assert nodes[samplers[1]["latent_image"][0]] == "SamplerCustom"
    assert all(value[0] in graph for node in graph.values() for value in node["inputs"].values()
               if isinstance(value, list))


# ------------------------------------------------------------- all stages, on two random experts

OTHERS = ("vae: Wan2.1_VAE.safetensors\ntext_encoder: models_t5_umt5-random.safetensors\n"
          "tokenizer: google/umt5-xxl\n")  # in a list of files
KILLED = Path(__file__).parent / "killed_stage.py"
QUICK = {"iterations": 5, "batch": 2, "micro_batch": 1, "held_out": 2, "eval_every": 5, "lr": 1e-3,
         "save_every": 1, "head_dim": 8, "checkpointing": False, "export_dtype": "fp32", "keep": 9}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_weights, run_stage):
    """A folder with an official weight folder, a config, and <folder>/run with all of a run."""
    folder = tmp_path_factory.mktemp("experts")
    weights = make_weights(folder / "weights", sizes=PRESETS["tiny-experts"])
    config = {"preset": "tiny-experts", "weights": str(weights), "run": str(folder / "run"),
              "height": 16, "width": 16, "frames": 5, "n": 6, "shift": 1.0, "key": [0, 2, 3, 4, 6],
              "cfg_scale": 3.0, "cfg_scale_low": 2.0, "device": "cpu", "distill": QUICK,
              "synvid": {"prompts": str(weights / "prompts.txt"), "count": 6, "videos": 0,
                         "batch": 2}}
    (folder / "config.yaml").write_text(json.dumps(config))
    run_stage("synvid", folder / "config.yaml")
    run_stage("distill", folder / "config.yaml")
    return folder


def students(run: Path) -> dict[str, Tensor]:
    """All parameters in the files of a run's student."""
    files = {level: run / f"student_{level}_noise.safetensors" for level in ("high", "low")}
    return {f"{level}.{name}": p for level, file in files.items() if file.exists()
            for name, p in load_file(file).items()}


def test_trajectories_are_the_same_bytes_from_every_layout_and_follow_both_scales(
        finished, run_stage, tmp_path):
    weights = finished / "weights"
    layouts = {"diffusers": ("transformer", "transformer_2"), "files": ("high", "low")}
    for name, places in layouts.items():
        folder = tmp_path / name
        shutil.copytree(weights, folder, ignore=shutil.ignore_patterns(*EXPERTS))
        for expert, place in zip(EXPERTS, places, strict=True):
            state = load_file(weights / expert / FILE)
            if name == "diffusers":
                state = official_names(state, "transformer", reverse=True)
            save_tensors(folder / place / FILE, state, {})
        (folder / "files.yaml").write_text("dit_high: high\ndit_low: low\n" + OTHERS)
        run_stage("synvid", finished / "config.yaml", "--run", tmp_path / f"run_{name}",
                  "--weights", folder / "files.yaml" if name == "files" else folder)
        for i in range(6):
            ours, theirs = (trajectory_path(run / "synvid", i).read_bytes()
                            for run in (finished / "run", tmp_path / f"run_{name}"))
            assert ours == theirs
    manifest = json.loads((finished / "run/synvid/manifest.json").read_text())
    assert manifest["cfg_scale"] == [3.0, 2.0] and manifest["boundary"] == 0.5


def test_two_scaled_fp8_files_make_the_trajectories_of_their_values(finished, run_stage, tmp_path):
    folder, marker = tmp_path / "weights", torch.zeros(0, dtype=torch.float8_e4m3fn)
    shutil.copytree(finished / "weights", folder, ignore=shutil.ignore_patterns(*EXPERTS))
    forms = {"fp8": "wan2.2_t2v_{}_14B_fp8_scaled.safetensors", "values": "{}.safetensors"}
    values = {}
    for expert in EXPERTS:
        state = load_file(finished / "weights" / expert / FILE)
        stored, scales = fp8_of(state, ".scale_weight", ())
        own = {name: p.float() * scales.get(name.replace(".weight", ".scale_weight"), 1)
               for name, p in stored.items()}
        values |= {f"{expert}.{name}": p for name, p in own.items()}
        level = expert.removesuffix("_model")
        save_tensors(folder / forms["fp8"].format(level),
                     {**stored, **scales, "scaled_fp8": marker}, {})
        save_tensors(folder / forms["values"].format(level), own, {})
    for form, name in forms.items():
        high, low = (name.format(f"{level}_noise") for level in ("high", "low"))
        found = dit_tensors(folder / high)
        assert found.keys() == values.keys()
        assert all(torch.equal(t.read(), values[name]) for name, t in found.items())
        (folder / f"{form}.yaml").write_text(f"dit_high: {high}\ndit_low: {low}\n" + OTHERS)
        run_stage("synvid", finished / "config.yaml", "--run", tmp_path / form,
                  "--weights", folder / f"{form}.yaml", "--count", 2)
    for i in range(2):
        ours, theirs = (trajectory_path(tmp_path / form / "synvid", i).read_bytes()
                        for form in forms)
        assert ours == theirs


def test_killed_and_resumed_between_two_experts_it_ends_with_the_same_bits(finished, run_stage,
                                                                           tmp_path):
    want, lines = students(finished / "run"), (finished / "run/distill/log.jsonl").read_text()
    lines = [json.loads(line) for line in lines.splitlines()]
    assert [line["k"] for line in lines] == [3, 2, 1, 0, 3] and len(want) == 2 * len(
        build_dit("tiny").state_dict())
    run = tmp_path / "run"
    run.mkdir()
    (run / "synvid").symlink_to(finished / "run/synvid")
    killed = run_script(KILLED, tmp_path / "mark", 0, "iteration", 4, 1, "distill",
                        finished / "config.yaml", "--run", run)
    assert killed.returncode == -signal.SIGKILL and (tmp_path / "mark").exists(), killed.stderr
    # Q_2 of step 2 holds what the expert for high noise hands to the other.
    shutil.rmtree(run / "distill/step_000003", ignore_errors=True)  # maybe written in time
    assert (run / "distill/step_000002").exists() and not list(run.glob("student*"))
    done = run_stage("distill", finished / "config.yaml", "--run", run)
    assert "resuming from" in done.stdout and "step_000002" in done.stdout
    got = students(run)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def test_one_expert_after_the_other_makes_the_same_two_files(finished, run_stage, tmp_path):
    run = tmp_path / "run"
    (run / "synvid").parent.mkdir()
    (run / "synvid").symlink_to(finished / "run/synvid")
    for experts, ks in (("high", [3, 2, 3, 2, 3]), ("low", [1, 0, 1, 0, 1])):
        run_stage("distill", finished / "config.yaml", "--run", run, "--experts", experts)
        lines = [json.loads(line) for line in
                 (run / f"distill_{experts}/log.jsonl").read_text().splitlines()]
        assert [line["k"] for line in lines] == ks
        assert [v is None for v in lines[-1]["velocity"]] == [k not in ks for k in range(4)]
    got, teacher = students(run), dit_tensors(finished / "weights")
    assert got.keys() == students(finished / "run").keys()
    changed = [name for name, p in got.items() if not torch.equal(
        p, teacher[name.replace(".", "_noise_model.", 1)].read())]
    assert {name.partition(".")[0] for name in changed} == {"high", "low"}


def test_a_student_of_two_experts_and_its_loras_are_sampled_and_evaluated(finished, run_stage):
    config, run = finished / "config.yaml", finished / "run"
    run_stage("tools/extract_lora", config, "--rank", 8)
    for level in ("high", "low"):
        assert (run / f"student_lora_rank8_{level}_noise.safetensors").exists()
    run_stage("sample", config, "--prompt", "a red disc", "--lora",
              run / "student_lora_rank8_low_noise.safetensors")
    run_stage("evaluate", config, "--prompts", finished / "weights/prompts.txt", "--count", 3,
              "--pictures", "false")
    rows = json.loads((run / "evaluate/table.json").read_text())["rows"]
    assert [row["label"] for row in rows][:3] == ["teacher@6", "teacher@4", "student@4"]
