"""A tiny HunyuanVideo, from an official folder on disk, through all stages."""

import json
from pathlib import Path

import pytest
import torch
from pixels import read_video
from processes import run_script
from safetensors import safe_open
from safetensors.torch import load_file
from test_hunyuan_encoders import (
    llm_rows, make_clip_tokenizer, make_llm_tokenizer, make_official, peer_clip, peer_llm, peer_vae)
from transformers import LlamaForCausalLM

import model
from common.config import load_config
from common.names import OFFICIAL_DITS, official_names
from common.ranks import generator
from frozen.load import load_text

PROMPTS = ["a red circle moves left", "the children run on the beach", "a circle"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config of preset hunyuan-tiny over random weights in HunyuanVideo's own folder layout."""
    root = tmp_path_factory.mktemp("hunyuan")
    make_llm_tokenizer(root / "tokenizers/llm")
    clip = make_clip_tokenizer(root / "saved")
    clip.save_pretrained(root / "tokenizers/clip")
    llm = peer_llm(llm_rows(root / "tokenizers"), LlamaForCausalLM)
    make_official(root / "ckpts", root / "tokenizers", peer_vae(), llm, peer_clip(len(clip)))
    dit, draw = model.build_dit("hunyuan-tiny"), generator("teacher")
    with torch.no_grad():
        for name, p in dit.named_parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.5 * p.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    place = root / "ckpts" / OFFICIAL_DITS[0]
    place.parent.mkdir(parents=True)
    torch.save({"module": dit.state_dict()}, place)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    values = {"family": "hunyuan", "preset": "hunyuan-tiny", "weights": str(root / "ckpts"),
              "run": str(root / "run"), "height": 32, "width": 48, "frames": 5, "n": 6,
              "shift": 7.0, "key": [0, 2, 4, 6], "device": "cpu",
              "synvid": {"prompts": str(root / "prompts.txt"), "count": 6, "batch": 3, "videos": 1},
              "distill": {"iterations": 4, "batch": 2, "micro_batch": 2, "held_out": 2,
                          "lr": 1e-3, "head_dim": 8, "eval_every": 4, "export_dtype": "fp32",
                          "export": "diffusers"}}
    path = root / "hunyuan.yaml"
    path.write_text(json.dumps(values))  # YAML holds JSON
    return path, root


@pytest.fixture(scope="module")
def distilled(config, run_stage):
    path, root = config
    run_stage("synvid", path)
    run_stage("distill", path)
    return path, root


def test_trajectories_hold_what_the_encoders_made_and_follow_the_teacher(distilled):
    _, root = distilled
    text = load_text(root / "ckpts", dtype=torch.float32, text_len=24, family="hunyuan")
    dit = model.load_dit(root / "ckpts", "hunyuan-tiny")
    times = model.time_grid("hunyuan", 6, 7.0).tolist()
    for i in (0, 4):
        with safe_open(root / f"run/synvid/000/{i:06d}.safetensors", "pt") as f:
            stored = {name: f.get_tensor(name) for name in f.keys()}
        (cond,) = text.encode_each([PROMPTS[i % 3]])
        assert stored.keys() == {"x", "cond.text", "cond.pooled", "cond.guidance"}
        assert torch.allclose(stored["cond.text"].float(), cond["text"], atol=1e-4)
        assert stored["cond.guidance"].item() == pytest.approx(6.016)
        x = torch.randn(16, 2, 4, 6, generator=generator("synvid", 0, i, PROMPTS[i % 3]))
        latents = list(model.sample_euler(dit, x[None], times, model.collate([cond])))
        for row, step in zip(stored["x"], (2, 4, 6), strict=True):
            error = (row.float() - latents[step - 1][0]).abs().max() / latents[step - 1].abs().max()
            assert error < 2e-3  # fp16 on disk


def test_both_losses_train_the_student_with_taps_at_the_last_and_the_two_thirds_block(distilled):
    _, root = distilled
    lines = [json.loads(x) for x in (root / "run/distill/log.jsonl").read_text().splitlines()]
    assert [x["k"] for x in lines] == [2, 1, 0, 2]
    assert all(x["loss_traj"] > 0 and x["grad_head"] > 0 for x in lines)
    assert lines[3]["grad_adv"] > 0  # a head's verdict is flat until its first update
    student = load_file(root / "run/student.safetensors")
    teacher = torch.load(root / "ckpts" / OFFICIAL_DITS[0], weights_only=True)["module"]
    assert student.keys() == teacher.keys()
    moved = [name for name in teacher if not torch.equal(student[name], teacher[name])]
    assert len(moved) > 0.9 * len(teacher)
    with safe_open(root / "run/student.safetensors", "pt") as f:
        facts = json.loads(f.metadata()["accvideo"])
    assert facts["family"] == "hunyuan" and facts["embedded_guidance"] == 6.016


def test_default_taps_of_60_blocks_are_the_paper_s_60th_and_40th():
    import distill
    with torch.device("meta"):
        depth = len(model.build_dit("hunyuan-t2v").blocks)
    cfg = load_config(distill.Config, "distill", ["configs/hunyuan-t2v-544p.yaml"])
    assert depth == 60 and (cfg.tap, cfg.tap_data) == (59, 39)
    assert distill.tap_blocks(distill.Config(key=cfg.key), depth) == [39, 59, 59, 59, 59]


@pytest.fixture(scope="module")
def sampled(distilled, run_stage):
    """The folder of the student's and the teacher's video of the first prompt."""
    path, root = distilled
    for options in ((), ("--teacher",)):
        run_stage("sample", path, "--prompt", PROMPTS[0], *options)
    return root / "run/samples"


def test_the_student_and_the_teacher_sample_videos(sampled):
    for who in ("student3", "teacher6"):
        video = read_video(next((sampled / who).glob("*.mp4")))
        assert video.shape == (3, 5, 32, 48) and video.std() > 0


def test_a_student_in_a_diffusers_folder_or_accvideo_s_released_file_samples_the_same(
        distilled, sampled, run_stage, tmp_path):
    path, root = distilled
    ours, folder = load_file(root / "run/student.safetensors"), root / "run/student_diffusers"
    theirs = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    expected = official_names(ours, "transformer", reverse=True)
    assert len(theirs) > len(ours) and theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)
    released = tmp_path / "accvideo-t2v-5-steps/diffusion_pytorch_model.pt"
    released.parent.mkdir()
    torch.save({"module": ours}, released)
    for student in (folder / "transformer", released):
        run_stage("sample", path, "--prompt", PROMPTS[0], "--student", student, "--out", tmp_path)
        one, two = (next((at / "student3").glob("*.mp4")) for at in (sampled, tmp_path))
        assert one.read_bytes() == two.read_bytes()
        two.unlink()


def test_two_ranks_that_share_tokens_make_the_trajectories_of_one(distilled, run_stage, tmp_path):
    path, root = distilled
    run_stage("synvid", path, f"run={tmp_path}", "sp=2", "count=3", ranks=2)
    for i in range(3):
        one, two = (load_file(p / f"synvid/000/{i:06d}.safetensors")
                    for p in (root / "run", tmp_path))
        assert one.keys() == two.keys() and torch.equal(one["cond.text"], two["cond.text"])
        assert (one["x"].float() - two["x"].float()).abs().max() < 2e-3 * one["x"].abs().max()


def test_two_ranks_that_share_tokens_and_tiles_sample_the_video_of_one(
        distilled, sampled, run_stage, tmp_path):
    path, _ = distilled
    run_stage("sample", path, f"prompt={PROMPTS[0]}", f"out={tmp_path}", "sp=2", ranks=2)
    one, two = (read_video(next((at / "student3").glob("*.mp4")))
                for at in (sampled, tmp_path))
    assert one.shape == two.shape and (one - two).abs().max() < 0.05  # the last bits, and H.264


def test_every_stage_runs_in_bf16_as_it_does_on_a_gpu(config, tmp_path):
    run = tmp_path / "bf16"
    done = run_script(Path(__file__).with_name("bf16_stage.py"), config[0], run, "synvid", "then",
                      "distill", "then", "sample", "--prompt", PROMPTS[0])
    assert done.returncode == 0, done.stderr[-3000:]
    with safe_open(run / "synvid/000/000000.safetensors", "pt") as f:
        assert f.get_tensor("cond.text").dtype == torch.bfloat16  # the encoder ran in bf16
    student = load_file(run / "student.safetensors")
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in student.values())
    lines = [json.loads(x) for x in (run / "distill/log.jsonl").read_text().splitlines()]
    assert all(x["loss_traj"] > 0 for x in lines) and len(list(run.glob("samples/*/*.mp4"))) == 1
