"""Image-to-video through all stages, from folders on disk; images and the files that name them."""

import hashlib
import importlib
import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise
from PIL import Image, ImageOps
from pixels import read_video
from processes import run_script
from safetensors import safe_open
from safetensors.torch import load_file

import evaluate
import model
import sample
from artifacts import videos
from common import prompts
from common.config import Shared, load_config
from common.files import append_log, read_log, write_json
from common.names import fingerprint
from common.names import official_names
from common.prompts import read_prompts
from common.ranks import generator
from common.video import centre_crop, read_image, write_image
from common.weights import save_tensors
from frozen.load import load_conditioner
from frozen.vae import WanVAE
from model import PRESETS

TEXTS = ["a red disc moves left", "a blue ring moves up", "a green cross moves right"]


def picture(path: Path, height: int, width: int, *key: int | str) -> Path:
    """A smooth random image."""
    coarse = torch.rand(1, 3, 3, 4, generator=generator("picture", *key)) * 2 - 1
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    write_image(path, image)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_weights):
    """Random weights of preset tiny-i2v, three images in different shapes, and a config."""
    root = tmp_path_factory.mktemp("i2v")
    make_weights(root / "weights", sizes=PRESETS["tiny-i2v"])
    lines = []
    for i, (text, (height, width)) in enumerate(zip(TEXTS, ((32, 48), (90, 60), (40, 40)),
                                                    strict=True)):
        picture(root / f"images/{i}.png", height, width, i)
        lines.append(json.dumps({"prompt": text, "image": f"images/{i}.png"}))
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    values = {"family": "wan", "preset": "tiny-i2v", "weights": str(root / "weights"),
              "run": str(root / "run"), "height": 32, "width": 48, "frames": 13, "n": 6,
              "shift": 3.0, "key": [0, 2, 4, 6], "device": "cpu", "cfg_scale": 3.0,
              "negative_prompt": "a ring",
              "synvid": {"prompts": str(root / "prompts.jsonl"), "count": 6, "batch": 2,
                         "videos": 1},
              "distill": {"iterations": 4, "batch": 2, "micro_batch": 2, "held_out": 2,
                          "lr": 1e-3, "head_dim": 8, "eval_every": 4, "export_dtype": "fp32"},
              "evaluate": {"prompts": str(root / "prompts.jsonl"), "count": 3, "directions": 8,
                           "c2st_steps": 2}}
    path = root / "i2v.yaml"
    path.write_text(json.dumps(values))  # YAML holds JSON
    return path, root


@pytest.fixture(scope="module")
def distilled(world, run_stage):
    path, root = world
    run_stage("synvid", path)
    run_stage("distill", path)
    return path, root


def test_trajectories_hold_the_image_s_conditioning_and_follow_the_guided_teacher(distilled):
    _, root = distilled
    cfg = Shared(preset="tiny-i2v", weights=str(root / "weights"), frames=13)
    conditioner = load_conditioner(cfg, torch.device("cpu"), torch.float32, crop=True)
    dit, times = model.load_dit(cfg.weights, "tiny-i2v"), model.time_grid("wan", 6, 3.0).tolist()
    for i in (1, 5):
        stored = load_file(root / f"run/synvid/000/{i:06d}.safetensors")
        prompt = read_prompts(root / "prompts.jsonl", images=True)[i % 3]
        conds = conditioner.encode_each([prompt], 32, 48)
        with safe_open(root / f"run/synvid/000/{i:06d}.safetensors", "pt") as f:
            header = json.loads(f.metadata()["synvid"])["trajectory"]
        assert header["image"] == hashlib.sha256(prompt.image.read_bytes()).hexdigest()
        assert stored.keys() == {"x", "cond.text", "cond.image", "cond.frames"}
        assert stored["cond.image"].shape == (37, 32) and stored["cond.frames"].shape == (
            20, 4, 4, 6)
        for name in ("text", "image", "frames"):
            assert torch.allclose(stored[f"cond.{name}"].float(), conds[0][name], atol=1e-4)
        unconds = conditioner.with_text("a ring", conds)
        assert torch.equal(unconds[0]["frames"], conds[0]["frames"])
        assert not torch.equal(unconds[0]["text"], conds[0]["text"])
        x = torch.randn(16, 4, 4, 6, generator=generator("synvid", 0, i, prompt.text))
        latents = list(model.sample_euler(dit, x[None], times, model.collate(conds),
                                 model.collate(unconds), 3.0))
        for row, step in zip(stored["x"], (2, 4, 6), strict=True):
            error = (row.float() - latents[step - 1][0]).abs().max() / latents[step - 1].abs().max()
            assert error < 2e-3  # fp16 on disk


def test_both_losses_train_the_image_s_keys_and_values_too(distilled):
    _, root = distilled
    lines = [json.loads(x) for x in (root / "run/distill/log.jsonl").read_text().splitlines()]
    assert [x["k"] for x in lines] == [2, 1, 0, 2] and all(x["loss_traj"] > 0 for x in lines)
    student = load_file(root / "run/student.safetensors")
    teacher = load_file(root / "weights/diffusion_pytorch_model.safetensors")
    assert student.keys() == teacher.keys()
    still = [name for name in teacher if torch.equal(student[name], teacher[name])]
    assert not [name for name in still if "img" in name and name.endswith("weight")]
    assert len(still) < 0.1 * len(teacher)


def test_a_student_is_evaluated_only_with_the_negative_prompt_of_its_trajectories(distilled):
    path, _ = distilled
    argv = [str(path), "negative_prompt=a cross"]
    with pytest.raises(ValueError, match="negative_prompt: expected the config's 'a cross', got "
                                         "'a ring': evaluate it with the config that"):
        evaluate.read_students(load_config(evaluate.Config, "evaluate", argv))
    [(_, [student])] = evaluate.read_students(load_config(evaluate.Config, "evaluate", argv[:1]))
    assert student["label"] == "student@3"


def test_sample_makes_a_video_in_each_image_s_shape_near_the_config_s_area(distilled, run_stage):
    path, root = distilled
    sampled = run_stage("sample", path, "--prompt_file", root / "prompts.jsonl", "--batch", "2")
    _, *videos = read_log(root / "run/samples/student3.jsonl")  # the first line has the settings
    assert [(v["height"], v["width"]) for v in videos] == [(32, 48), (48, 32), (32, 32)]
    for made in videos:
        shape = read_video(root / "run/samples" / made["file"]).shape
        assert shape == (3, 13, made["height"], made["width"])
    assert all(re.search(rf"process: .*\b{phase} \d.* s", sampled.stdout)
               for phase in ("text", "image", "steps"))
    done = run_stage("sample", path, "--teacher", "--prompt", TEXTS[1], "--image",
                     root / "images/1.png", "--out", root / "one")
    _, one = read_log(root / "one/teacher6.jsonl")
    assert one["evaluations"] == 12 and one["file"] in done.stdout


def test_evaluate_reports_how_near_the_first_frames_are_to_their_images(distilled, run_stage):
    path, root = distilled
    run_stage("evaluate", path)
    rows = json.loads((root / "run/evaluate/table.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["teacher@6", "teacher@3", "student@3"]
    assert all(0 < row["first"][0] < 40 for row in rows)
    assert "first frame, dB" in (root / "run/evaluate/table.md").read_text()


def test_every_stage_runs_in_bf16_as_it_does_on_a_gpu(world, tmp_path):
    path, root = world
    done = run_script(
        Path(__file__).with_name("bf16_stage.py"), path, tmp_path, "synvid", "--count", 4, "then",
        "distill", "--iterations", 2, "then", "sample", "--prompt", TEXTS[0], "--image",
        root / "images/0.png")
    assert done.returncode == 0, done.stderr[-3000:]
    stored = load_file(tmp_path / "synvid/000/000000.safetensors")
    assert stored["cond.text"].dtype == torch.bfloat16  # its encoder ran in bf16
    assert stored["cond.image"].dtype == stored["cond.frames"].dtype == torch.float32
    student = load_file(tmp_path / "student.safetensors")
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in student.values())
    video = read_video(next((tmp_path / "samples/student3").glob("*.mp4")))
    assert video.shape == (3, 13, 32, 48) and video.std() > 0


@pytest.mark.parametrize("stage", ["synvid", "distill", "sample", "evaluate"])
def test_a_teacher_that_is_still_to_be_trained_is_named_with_its_command(stage, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/teacher/weights: .*`python -m "
                       "small_world.teacher configs/tiny-i2v.yaml`"):
        load_config(importlib.import_module(stage).Config, stage,
                    ["configs/tiny-i2v.yaml", f"run={tmp_path}",
                     f"weights={tmp_path}/teacher/weights"])


def test_official_and_diffusers_folders_give_equal_conditioning_and_velocity(world, tmp_path):
    _, root = world
    official, theirs = tmp_path / "official", tmp_path / "diffusers"
    shutil.copytree(root / "weights", official)
    vae = {"dim": 4, "num_res_blocks": 2}  # diffusers has no other number
    save_tensors(official / "Wan2.1_VAE.safetensors", randomise(WanVAE(**vae), "vae"),
                       {"config": json.dumps(vae)})
    for subfolder, pattern, component in (
            ("transformer", "diffusion_*", "transformer"), ("vae", "Wan2.1_VAE*", "vae"),
            ("text_encoder", "models_t5*", "text_encoder")):
        (file,) = official.glob(pattern)
        save_tensors(theirs / subfolder / "diffusion_pytorch_model.safetensors",
                           official_names(load_file(file), component, reverse=True), {})
    (clip,) = official.glob("models_clip*")
    state = load_file(clip)
    with safe_open(clip, "pt") as file:
        tower = json.loads(file.metadata()["config"])
    save_tensors(theirs / "image_encoder/model.safetensors", transformers_names(state), {})
    write_configs(theirs, official, tower)
    made = []
    for folder in (official, theirs):
        cfg = Shared(preset="tiny-i2v", weights=str(folder), frames=5)
        conditioner = load_conditioner(cfg, torch.device("cpu"), torch.float32, crop=False)
        prompt = read_prompts(root / "prompts.jsonl", images=True)[0]
        cond = model.collate(conditioner.encode_each([prompt], 32, 48))
        dit = model.load_dit(folder, "tiny-i2v").requires_grad_(False)
        x = torch.randn(1, 16, 2, 4, 6, generator=generator("x"))
        made.append({**cond, "v": dit(x, torch.tensor([0.6], dtype=torch.float64), cond)})
    for name, value in made[0].items():
        assert torch.allclose(value, made[1][name], atol=1e-6), name
    assert fingerprint(official) == fingerprint(theirs)


def transformers_names(state: dict) -> dict:
    """An image tower as transformers names it."""
    out, names = {}, {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj":
                      "self_attn.out_proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    for name, p in state.items():
        name = name.removeprefix("visual.")
        if name.startswith("transformer."):
            _, layer, part, kind = *name.split(".")[:2], *name.split(".", 2)[2].rsplit(".", 1)
            prefix = f"vision_model.encoder.layers.{layer}"
            if part == "attn.to_qkv":
                for letter, third in zip("qkv", p.chunk(3), strict=True):
                    out[f"{prefix}.self_attn.{letter}_proj.{kind}"] = third.clone()
            else:
                out[f"{prefix}.{names[part]}.{kind}"] = p
        elif name == "cls_embedding":
            out["vision_model.embeddings.class_embedding"] = p.flatten()
        elif name == "pos_embedding":
            out["vision_model.embeddings.position_embedding.weight"] = p[0]
        else:
            out["vision_model." + name.replace("patch_embedding", "embeddings.patch_embedding")
                .replace("pre_norm", "pre_layrnorm")] = p
    return out


def write_configs(folder: Path, official: Path, tower: dict) -> None:
    """config.json of a diffusers folder's components, and its tokenizer."""
    sizes = PRESETS["tiny-i2v"]
    write_json(folder / "transformer/config.json", {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": sizes.num_heads,
        "attention_head_dim": sizes.dim // sizes.num_heads, "in_channels": 36, "out_channels": 16,
        "text_dim": sizes.text_dim, "ffn_dim": sizes.ffn_dim, "num_layers": sizes.num_layers,
        "image_dim": sizes.image_dim, "added_kv_proj_dim": sizes.dim, "freq_dim": 256})
    write_json(folder / "vae/config.json", {"base_dim": 4})
    write_json(folder / "text_encoder/config.json", {
        "model_type": "umt5", "vocab_size": load_file(next(official.glob("models_t5*")))[
            "token_embedding.weight"].shape[0], "d_model": 64, "d_kv": 16, "d_ff": 64,
        "num_heads": 2, "num_layers": 2})
    write_json(folder / "image_encoder/config.json", {
        "model_type": "clip_vision_model", "hidden_act": "gelu", "hidden_size": tower["dim"],
        "intermediate_size": tower["dim_ffn"], "patch_size": tower["patch"],
        "num_hidden_layers": tower["num_layers"], "num_attention_heads": tower["num_heads"],
        "image_size": tower["size"]})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/spiece.model").write_bytes(
        (official / "google/umt5-xxl/spiece.model").read_bytes())


# ------------------------------------------------------------------------------------ images

def test_png_and_jpeg_come_out_as_they_were_saved(tmp_path):
    pixels = (np.arange(8 * 12 * 3).reshape(8, 12, 3) * 3 % 256).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png")
    assert got.shape == (3, 8, 12)
    assert torch.allclose(got, torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    smooth = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    want = torch.tensor([200.0, 100.0, 50.0]).view(3, 1, 1) / 127.5 - 1
    assert (read_image(tmp_path / "a.jpg") - want).abs().max() < 0.03


@pytest.mark.parametrize("orientation,turn", [
    (1, lambda x: x), (2, lambda x: x.flip(2)), (3, lambda x: x.flip(1, 2)),
    (4, lambda x: x.flip(1)), (5, lambda x: x.transpose(1, 2)),
    (6, lambda x: x.flip(1).transpose(1, 2)), (7, lambda x: x.transpose(1, 2).flip(1, 2)),
    (8, lambda x: x.transpose(1, 2).flip(1))])
def test_a_photograph_is_turned_as_its_exif_says(tmp_path, orientation, turn):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255                                     # a white corner, top left as stored
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    want = turn(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    got = read_image(tmp_path / "a.jpg")
    assert got.shape == want.shape and (got - want).abs().max() < 0.2


def test_grey_palette_and_transparent_images_look_as_a_viewer_shows_them(tmp_path):
    ramp = np.linspace(0, 255, 16, dtype=np.uint8).reshape(1, 16).repeat(4, 0)
    want = (torch.from_numpy(ramp) / 127.5 - 1).expand(3, 4, 16)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp).convert("P").save(tmp_path / "palette.png")
    for name in ("grey", "palette"):
        assert torch.allclose(read_image(tmp_path / f"{name}.png"), want, atol=0.01), name
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (255, 0, 0, 255)
    clear[2] = (255, 0, 0, 51)                               # a fifth of red on white
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    got = ((read_image(tmp_path / "clear.png") + 1) * 127.5).round()
    assert got[:, 0, 0].tolist() == [255, 0, 0] and got[:, 3, 0].tolist() == [255, 255, 255]
    assert got[:, 2, 0].tolist() == pytest.approx([255, 204, 204], abs=1)


def test_a_missing_broken_or_cut_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png: no such image"):
        read_image(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("not an image")
    whole = picture(tmp_path / "whole.png", 64, 64, "whole").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    for name in ("text", "cut"):
        with pytest.raises(ValueError, match=f"{name}.png cannot be read as an image .* save it"):
            read_image(tmp_path / f"{name}.png")


def test_a_broken_exif_tag_is_no_reason_to_refuse_a_photograph(tmp_path):
    width = struct.pack("<HHI4s", 0x0100, 2, 4, b"wid")                        # a text
    turn = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + width + turn + struct.pack("<I", 0)
    Image.new("RGB", (32, 16), "red").save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert read_image(tmp_path / "a.jpg").shape == (3, 32, 16)


def test_paths_and_pixels_that_no_image_has_are_named(tmp_path):
    with pytest.raises(OSError, match="name too long"):
        read_image(tmp_path / ("x" * 300))
    for name, grey in (("a.tiff", np.float32(0.5)), ("b.png", np.uint16(9000)),
                       ("c.tiff", np.int32(9))):
        Image.fromarray(np.full((4, 4), grey)).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} cannot be read .*convert it to 8 bits"):
            read_image(tmp_path / name)


def test_a_crop_keeps_the_middle_in_the_wanted_shape():
    image = torch.arange(3 * 40 * 100).view(3, 40, 100).float()
    assert torch.equal(centre_crop(image, 480, 480), image[:, :, 30:70])
    assert torch.equal(centre_crop(image, 480, 2400), image[:, 10:30])
    assert torch.equal(centre_crop(image, 40, 100), image)


# ------------------------------------------------------------------------------ prompt files

def test_stages_refuse_a_bad_image_before_they_touch_the_disk(world, tmp_path, run_stage):
    path, _ = world
    table = tmp_path / "prompts.jsonl"
    table.write_text('{"prompt": "a", "image": "gone.png"}\n')
    done = run_stage("synvid", path, f"prompts={table}", f"run={tmp_path}/run", check=False)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stderr.startswith(f"error: {table}: {tmp_path}/gone.png: no such image")
    assert len(done.stderr.splitlines()) == 1
    done = run_stage("synvid", path, f"prompts={table}", f"run={tmp_path}/run", check=False,
                     ranks=2)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1


def test_images_for_text_models_and_prompts_without_one_for_image_models_are_errors():
    for cfg, fault in (
            (sample.Config(prompt="a", image="b.png"), "it is not read: preset tiny takes none"),
            (sample.Config(prompt="a", preset="tiny-i2v"), "got none; preset tiny-i2v starts"),
            (sample.Config(image="b.png", preset="tiny-i2v"), "it needs --prompt")):
        with pytest.raises(ValueError, match=f"image: .*{fault}"):
            videos.collect_prompts(cfg)


def test_a_named_video_has_the_shape_of_its_image_too(tmp_path):
    picture(tmp_path / "a.png", 32, 8)
    (tmp_path / "v.jsonl").write_text(
        '{"prompt": "a", "image": "a.png", "seed": 3, "file": "a-0.mp4"}\n')
    cfg = sample.Config(preset="tiny-i2v", prompt_file=str(tmp_path / "v.jsonl"))
    [video] = videos.list_videos(cfg, "student5", "x")
    assert (video.height, video.width) == videos.fit_size(32, 8, cfg.height * cfg.width)
    assert (video.seed, video.file) == (3, "student5/a-0.mp4")


def test_a_named_video_whose_image_has_changed_is_not_taken_for_finished(tmp_path):
    picture(tmp_path / "a.png", 32, 8)
    table, record = tmp_path / "v.jsonl", tmp_path / "student5.jsonl"
    table.write_text('{"prompt": "a", "image": "a.png", "seed": 3, "file": "a-0.mp4"}\n')
    cfg = sample.Config(preset="tiny-i2v", prompt_file=str(table))
    [video] = videos.list_videos(cfg, "student5", "x")
    (tmp_path / "student5").mkdir()
    (tmp_path / video.file).write_bytes(b"video")
    append_log(record, {**video._asdict(), "prompt": "a", "bytes": 5, "settings": "x"})
    assert videos.finished_videos(record, [video], {}) == {video.file}
    picture(tmp_path / "a.png", 16, 16)
    with pytest.raises(ValueError, match="was made with image_checksum .*another --out"):
        videos.finished_videos(record, videos.list_videos(cfg, "student5", "x"), {})


def test_an_image_that_many_lines_name_is_decoded_once(world, tmp_path, monkeypatch):
    path, calls, real = picture(tmp_path / "a.png", 16, 16), [], prompts.decode_image
    table = tmp_path / "prompts.jsonl"
    table.write_text('{"prompt": "a", "image": "a.png"}\n{"prompt": "b", "image": "a.png"}\n' * 4)
    monkeypatch.setattr(prompts, "decode_image", lambda path: (calls.append(path), real(path))[1])
    assert len(read_prompts(table, images=True)) == 8 and calls == [path]
    cfg = sample.Config(preset="tiny-i2v", prompt_file=str(table), count=3)
    assert len(videos.list_videos(cfg, "student5", "x")) == 24 and len(calls) == 2  # one check
    monkeypatch.setenv("RANK", "1")
    assert len(read_prompts(table, images=True)) == 8 and len(calls) == 2
