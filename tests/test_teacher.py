"""Stage 0: clips, oracle, optimiser, tokenizer, and a training that survives interruption."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import model
from common import config, files
from common.prompts import read_prompts
from common.ranks import generator
from common.video import read_image
from frozen.load import load_text, load_vae
from small_world import clips as world
from small_world import fit, oracle, teacher

TINY = {"height": 32, "width": 32, "frames": 5, "n": 4, "key": "0,2,4", "text_iters": 3,
        "vae_iters": 3, "vae_batch": 1, "vae_dim": 8, "dit_iters": 3, "dit_batch": 4, "dit_pool": 6,
        "gate_clips": 2, "eval_every": 2, "save_every": 0.0, "compile": False}


@pytest.fixture(scope="module")
def clips():
    return world.make_clips(0, 0, 48)


def test_a_clip_depends_on_its_seed_and_index_alone(clips):
    video, captions, attributes = clips
    again, same, _ = world.make_clips(0, 40, 3)
    assert torch.equal(again, video[40:43]) and same == captions[40:43]
    assert world.make_captions(0, 0, 48) == captions
    assert not torch.equal(world.make_clips(1, 0, 3)[0], video[:3])
    assert video.shape == (48, 3, 9, 64, 64) and float(video.abs().max()) <= 1


def test_held_out_captions_never_occur_in_training():
    held_out = world.make_captions(0, 0, 144, held_out=True)
    trained = set(world.make_captions(0, 0, 4000))
    assert len(set(held_out)) == len(world.COMBINATIONS) == 72
    assert not trained & set(held_out)
    seen = {tuple(oracle.caption_attributes(text).values()) for text in trained}
    assert seen == {tuple(oracle.caption_attributes(text).values()) for text in held_out}


def test_captions_name_the_attributes_of_their_clips(clips):
    _, captions, attributes = clips
    for name in world.ATTRIBUTES:
        named = [oracle.caption_attributes(text)[name] for text in captions]
        assert named == attributes[name].tolist()
    assert oracle.caption_attributes("") == {"colour": -1, "shape": -1, "direction": -1}


INSIDE = {  # whether points [..., 3], relative to the base's centre, are inside a solid of size 1
    "ball": lambda p: p.square().sum(-1) - 2 * p[..., 2] < 0,
    "cube": lambda p: torch.cat([p[..., :2].abs(), (p[..., 2:] - 0.8).abs()], -1).amax(-1) < 0.8,
    "cone": lambda p: (p[..., 2] > 0) & (p[..., :2].norm(dim=-1) < 1.1 - p[..., 2] / 2)}


@pytest.mark.parametrize("shape", world.SHAPES)
def test_rays_hit_solids_where_points_along_them_first_are_inside(shape):
    g, steps = generator("rays"), torch.linspace(0, 8, 4001)
    eye = torch.tensor((0.3, -4.0, 3.0))
    aim = torch.rand(200, 3, generator=g) * torch.tensor((3.0, 3.0, 2.4)) - torch.tensor(
        (1.5, 1.5, 0.2))
    rays = torch.nn.functional.normalize(aim - eye, dim=1)
    s, normal = world.hit(world.SHAPES.index(shape), tuple(eye), rays.unbind(1), 1.0, 0.0)
    inside = INSIDE[shape](eye + steps[:, None, None] * rays)                     # steps rays
    first = torch.where(inside.any(0), steps[inside.int().argmax(0)], torch.inf)
    agree = (s - first).abs() <= 0.0021
    grazed = s.isfinite() & (inside.sum(0) < 4) | ~s.isfinite() & (inside.sum(0) < 4)
    assert bool((agree | (s == first) | grazed).all()) and 20 < int(s.isfinite().sum()) < 190
    hit = s.isfinite() & ~grazed
    n = torch.nn.functional.normalize(torch.stack(normal, 1)[hit], dim=1)
    surface = eye + s[hit, None] * rays[hit]
    assert not INSIDE[shape](surface + 0.003 * n).any()                           # outward
    assert INSIDE[shape](surface - 0.003 * n).float().mean() > 0.97


def test_a_turned_cube_is_a_cube_seen_from_elsewhere():
    eye, rays = (torch.tensor(0.5), torch.tensor(-4.0), torch.tensor(3.0)), world.view_rays(24)
    turned, _ = world.hit(1, eye, rays, 0.6, 0.7)
    seen, _ = world.hit(1, world.turn(eye, -0.7), world.turn(rays, -0.7), 0.6, 0.0)
    assert torch.equal(turned, seen) and turned.isfinite().any()


@pytest.mark.parametrize("size, frames", [(48, 5), (64, 9)])
def test_oracle_reads_every_rendered_clip(size, frames):
    video, captions, attributes = world.make_clips(3, 0, 72, size, frames, held_out=True)
    seen = oracle.read_clip(video)
    for name, values in attributes.items():
        assert torch.equal(seen[name], values), name
    assert float(seen["worst_iou"].min()) > 0.9
    assert oracle.agreement(video, captions)["all"] == 1


def test_oracle_rejects_other_captions_and_what_shows_no_solid(clips):
    video, captions, _ = clips
    assert oracle.agreement(video[:24].flip(2), captions[:24])["direction"] == 0
    still = video[:24, :, :1].expand(-1, -1, 9, -1, -1)
    assert set(oracle.read_clip(still)["direction"].tolist()) == {-1}
    noise = torch.rand(8, 3, 9, 64, 64, generator=generator(0)) * 2 - 1
    for nothing in (noise, torch.zeros(2, 3, 9, 64, 64)):
        assert set(oracle.read_clip(nothing)["shape"].tolist()) == {-1}


def test_a_torn_frame_is_seen(clips):
    video = clips[0][:24].clone()
    whole = oracle.read_clip(video)["worst_iou"]
    mask = oracle.coverage(video[:, :, 4:5] / 2 + 0.5)
    upper = mask.cumsum(-2) < mask.sum(-2, keepdim=True) / 2
    torn = torch.where((mask > 0.5) & upper, 0.0, 1.0)[:, None]
    video[:, :, 4:5] *= torn  # the upper half of each column of the solid turns grey
    assert bool((oracle.read_clip(video)["worst_iou"] < whole - 0.1).all())


def test_floor_detail_is_lost_by_a_blur_and_does_not_see_the_solid(clips):
    video = clips[0][:12]
    frames = video.transpose(1, 2).flatten(0, 1)
    blurred = torch.nn.functional.avg_pool2d(frames, 5, 1, 2, count_include_pad=False)
    blurred = blurred.unflatten(0, (12, 9)).transpose(1, 2)
    detail = oracle.floor_detail(video)
    assert bool((oracle.floor_detail(blurred) < 0.35 * detail).all())
    solid = oracle.coverage(video / 2 + 0.5)[:, None] > 0.5
    recoloured = torch.where(solid, world.PALETTE[0].view(1, 3, 1, 1, 1) * 2 - 1, video)
    assert torch.allclose(oracle.floor_detail(recoloured), detail, rtol=0.05)


def test_psnr_and_high_frequency_have_their_definitions(clips):
    video = clips[0][:2] * 0.5
    assert torch.allclose(oracle.psnr(video + 0.02, video), torch.full((2,), 40.0), atol=1e-2)
    noise = torch.randn(2, 3, 9, 48, 48, generator=generator(1))
    assert abs(oracle.high_frequency(noise) - 1) < 0.02  # white noise has unit power everywhere
    assert oracle.high_frequency(torch.ones(1, 3, 1, 48, 48)) < 1e-9


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 24, 96), (2, 96, 24)])
def test_muon_makes_momentum_nearly_orthogonal(shape):
    matrices = torch.randn(shape, generator=generator(2))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    update = fit.orthogonalise(matrices)
    values = torch.linalg.svdvals(update)
    assert 0.5 < float(values.median()) and float(values.max()) < 1.3
    cosine = torch.nn.functional.cosine_similarity(update.flatten(1), (u @ vh).flatten(1))
    assert float(cosine.min()) > 0.9


def run(folder, **changes):
    values = TINY | {"run": str(folder), "out": str(folder / "out")} | changes
    teacher.main([f"--{name}={value}" for name, value in values.items()])
    written = sorted((folder / "out").rglob("*.safetensors"))
    return {f"{f.name}:{name}": value for f in written for name, value in load_file(f).items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of an undisturbed training and its tensors; tests must not change them."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder)


def test_an_interrupted_training_ends_with_the_bits_of_an_undisturbed_one(trained, tmp_path,
                                                                          monkeypatch):
    folder, expected = trained
    monkeypatch.setattr(fit, "NOTE_EVERY", 1)
    for stage, iteration in (("text", 2), ("vae", 2), ("vae", 3), ("dit", 2)):
        def stop(cfg, at=(stage, iteration), **entry):
            if (entry["stage"], entry["iteration"]) == at:
                raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(fit, "note", stop)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "parts")
    parts = run(tmp_path / "parts")
    assert expected.keys() == parts.keys()
    assert all(torch.equal(expected[name], parts[name]) for name in parts)
    # What was written is the official layout, and other stages can read it.
    out = folder / "out"
    assert {"vae_psnr", "vae_oracle", "teacher_oracle", "teacher_floor"} < set(
        json.loads((out / "training.json").read_text())["gates"])
    dit, vae = model.load_dit(out, "tiny"), load_vae(out)
    text = load_text(out, dtype=torch.float32, text_len=16)
    for caption in world.make_captions(0, 0, 72, held_out=True):
        assert text.tokenizer([caption])[0].shape[1] <= 15
    cond = model.collate(text.encode_each([""]))
    v = dit(torch.zeros(1, 16, 2, 4, 4), torch.ones(1), cond)
    assert vae.decode(v).shape == (1, 3, 5, 32, 32)
    with pytest.raises(ValueError, match="vae_state.safetensors was trained with"):
        run(tmp_path / "parts", vae_batch=2)
    # A longer run continues the finished one; a shorter one is refused.
    longer = run(tmp_path / "parts", dit_iters=5)
    assert any(not torch.equal(longer[name], parts[name]) for name in parts)
    lines = files.read_log(tmp_path / "parts/teacher/log.jsonl", "iteration", "loss")
    trained = [line["iteration"] for line in lines if line["stage"] == "dit"]
    assert trained[-2:] == [4, 5] and TINY["dit_iters"] == 3
    with pytest.raises(ValueError, match="dit_state.safetensors was trained with"):
        run(tmp_path / "parts")


def test_a_longer_run_logs_the_mean_loss_of_its_own_iterations(tmp_path):
    for iterations in (3, 5):
        cfg, layer = teacher.Config(run=str(tmp_path), vae_iters=iterations), torch.nn.Linear(1, 1)
        fit.fit(cfg, "vae", layer, iterations, (1e-3, 1e-3), 0.4,
                lambda i, layer=layer: 0 * layer.weight.sum() + 2)
    lines = files.read_log(tmp_path / "teacher/log.jsonl", "loss")
    assert [(line["iteration"], line["loss"]) for line in lines] == [(3, 2.0), (5, 2.0)]


@pytest.mark.parametrize("changes, message", [
    ({"width": 48}, "expected a square"), ({"vae_crop": 40}, "multiple of 8 up to its side"),
    ({"dit_iter": 3}, "dit_iters"), ({"vae_iters": "many"}, "vae_iters"),
    ({"preset": "wan-t2v-1.3b"}, "tiny.yaml"),
    ({"out": Path(__file__).parent / "fixtures"}, "hunyuan_clip.safetensors exists, and is not")])
def test_settings_that_cannot_be_served_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_an_image_to_video_teacher_starts_as_its_base_and_writes_images_with_its_prompts(
        trained, tmp_path):
    base = trained[0] / "out"
    cfg = config.load_config(teacher.Config, "teacher", ["preset=tiny-i2v", f"base={base}"])
    dit, known = teacher.start_dit(cfg), load_file(base / "diffusion_pytorch_model.safetensors")
    x, t = torch.randn(1, 16, 2, 4, 4, generator=generator("x")), torch.full((1,), 0.4)
    cond = {"text": torch.randn(1, 3, 64), "image": torch.zeros(1, 37, 32),
            "frames": torch.randn(1, 20, 2, 4, 4)}
    for name, p in dit.named_parameters():  # without what the images add it is its base
        if "v_img" in name:
            p.data.zero_()
    want = model.load_dit(base, "tiny").requires_grad_(False)(x, t, cond)
    assert torch.allclose(dit(x, t, cond), want, atol=1e-5) and len(known) < len(dit.state_dict())

    got = run(tmp_path / "i2v", preset="tiny-i2v", base=str(base), first_frames=4, image_iters=2)
    out = tmp_path / "i2v/out"
    assert torch.equal(got["Wan2.1_VAE.safetensors:conv1.weight"],
                       load_file(base / "Wan2.1_VAE.safetensors")["conv1.weight"])
    for name, count, held_out in (("prompts", 4, False), ("prompts_heldout", 2, True)):
        prompts = read_prompts(out / f"{name}.jsonl", images=True)
        clips, captions, _ = world.make_clips(0, 0, count, 32, 5, held_out)
        assert [prompt.text for prompt in prompts] == captions
        for prompt, clip in zip(prompts, clips, strict=True):
            assert (read_image(prompt.image) - clip[:, 0]).abs().max() < 1 / 127
    gates = json.loads((out / "training.json").read_text())["gates"]
    assert {"teacher_oracle", "first_frame_psnr"} < set(gates)
    (tmp_path / "i2v/teacher/image_state.safetensors").unlink()
    with pytest.raises(ValueError, match="dit_state.* was trained with"):  # other image encoder
        run(tmp_path / "i2v", preset="tiny-i2v", base=str(base), first_frames=4, image_iters=3)
    with pytest.raises(FileNotFoundError, match="base: nowhere has no Wan2.1_VAE"):
        run(tmp_path / "other", preset="tiny-i2v", base="nowhere", first_frames=4)


def test_a_damaged_training_state_is_named(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/text_state.safetensors").write_bytes(b"PK\x03\x04 half a state")
    with pytest.raises(ValueError, match="text_state.safetensors: is a file of torch.save"):
        run(tmp_path)


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "GRACE", 0.1)
    with files.lock_folder(tmp_path / "teacher"), pytest.raises(ValueError, match="works here"):
        run(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "out").exists()


def test_a_training_whose_log_has_a_cut_line_reaches_its_end(trained, tmp_path):
    folder, expected = trained
    run_folder = tmp_path / "run"
    shutil.copytree(folder, run_folder)
    log, result = run_folder / "teacher/log.jsonl", run_folder / "out/training.json"
    log.write_bytes(log.read_bytes()[:-7])
    result.unlink()
    again = run(run_folder)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert {"vae", "dit", "text"} <= json.loads(result.read_text())["seconds"].keys()


def test_a_full_disk_is_a_one_line_error_and_the_training_resumes(small_disk):
    with pytest.raises(ValueError, match="cannot be written .*No space left on device"):
        run(small_disk)
