"""UniPC: its grid and steps against the official numbers and a closed form, and as an option."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_model import (
    decoded, fixture_file, fixture_weights, near, recording, shards, wan_config)
from test_sample import fast_videos
from torch import Tensor

import sample
from common.config import load_config
from common.files import ROOT, read_log
from common.ranks import generator
from common.weights import load_module
from frozen import unipc
from frozen.unipc import sample_unipc, unipc_grid
from model import build_dit, collate, key_times, sample_euler, sizes_of

TENSOR, CONFIG, _ = fixture_file("wan_schedule")
SCHEDULES = {s["name"]: s for s in CONFIG["schedules"] if s["solver"] == "unipc"}


def grid_of(name: str) -> Tensor:
    """The grid of one of the fixture's schedules."""
    s = SCHEDULES[name]
    return unipc_grid(s["steps"], s["shift"], twice=s["form"] == "shift_in_constructor")


class Replay(torch.nn.Module):
    """Answers each call with the next of some velocities; notes the official time of the call."""

    def __init__(self, velocities: Tensor):
        super().__init__()
        self.velocities, self.steps = velocities, []

    def forward(self, x, t, cond):
        self.steps.append(round(t[0].item() * 1000, 6))
        return self.velocities[len(self.steps) - 1]


# ------------------------------------------------------------------------- the official numbers

@pytest.mark.parametrize("name", SCHEDULES)
def test_the_grid_equals_the_official_one(name):
    grid = grid_of(name)
    assert grid.dtype == torch.float64 and grid[-1] == 0
    torch.testing.assert_close(grid.float(), TENSOR(f"out.{name}.sigmas"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_and_integer_times_equal_the_official_solver_s(name):
    want, dit = TENSOR(f"out.{name}.x"), Replay(TENSOR(f"in.{name}.v"))
    steps = sample_unipc(dit, TENSOR(f"in.{name}.x"), grid_of(name).tolist(), {})
    for expected in want:
        near(next(steps), expected, 2e-6)
    assert dit.steps == TENSOR(f"out.{name}.timesteps").tolist()[:len(want)]


def fixture_dit(name: str, **more):
    """The DiT of a parity fixture, with its official weights."""
    with torch.device("meta"):
        dit = build_dit(replace(wan_config(fixture_file(name)[1]), **more))
    return load_module(dit, fixture_weights(name), "fixture").requires_grad_(False)


@pytest.mark.parametrize("case, guided", [("cfg_unipc", True), ("few_unipc", False)])
def test_text_to_video_by_unipc_equals_the_official_pipelines(case, guided):
    """Wan 2.1's with guidance, AccVideo's few-step one, which shifts its grid twice, without."""
    tensor, _, notes = fixture_file("wan_t2v_pipeline")
    about = next(c for c in notes["cases"] if c["name"] == case)
    dit, steps = recording(fixture_dit("wan_t2v_dit"))
    cond, uncond = ({"text": tensor(name)[None]} for name in ("in.context", "in.context_null"))
    times = unipc_grid(about["steps"], about["shift"], twice=about["code"] == "accvideo").tolist()
    *_, x = sample_unipc(dit, tensor(f"in.{case}.noise")[None], times, cond,
                         uncond if guided else None, about["guide"])
    assert steps == pytest.approx(tensor(f"out.{case}.model_t").tolist(), rel=1e-9)
    near(x[0], tensor(f"out.{case}.latent"), 2e-5)
    near(decoded(x[0]), tensor(f"out.{case}.video"), 2e-5)


def test_image_to_video_by_unipc_equals_the_official_pipeline():
    tensor, _, notes = fixture_file("wan_i2v_pipeline")
    about = next(c for c in notes["cases"] if c["name"] == "cfg_unipc")
    clip_dim = fixture_file("wan_i2v_dit")[2]["clip_dim"]
    dit, steps = recording(fixture_dit("wan_i2v_dit", image_dim=clip_dim))
    image = {"image": tensor("out.cfg_unipc.clip_fea")[0], "frames": tensor("out.cfg_unipc.y")}
    conds = [collate([{"text": tensor(name), **image}]) for name in
             ("in.context", "in.context_null")]
    times = unipc_grid(about["steps"], about["shift"]).tolist()
    *_, x = sample_unipc(dit, tensor("in.cfg_unipc.noise")[None], times, *conds, about["guide"])
    assert steps == pytest.approx(tensor("out.cfg_unipc.model_t").tolist(), rel=1e-9)
    near(x[0], tensor("out.cfg_unipc.latent"), 2e-5)
    near(decoded(x[0]), tensor("out.cfg_unipc.video"), 2e-5)


# ------------------------------------------------------------------------------- a closed form

class Gaussian(torch.nn.Module):
    """The exact velocity where data are normal with deviation s, at the solver's exact times.

    x_t is normal with variance (1 - t)² s² + t², so that v = (t - (1 - t) s²) / variance · x. The
    exact times are used and not those cut to 1/1000, whose error no step size would lessen.
    """

    def __init__(self, times: list[float], s: float):
        super().__init__()
        self.times, self.s = iter(times), s

    def forward(self, x, t, cond):
        t = next(self.times)
        return (t - (1 - t) * self.s ** 2) / deviation(t, self.s) ** 2 * x


def deviation(t: float, s: float) -> float:
    return math.hypot((1 - t) * s, t)


def ode_error(solver, n: int, s: float = 0.7) -> float:
    """Relative error of a solver's end, on UniPC's grid of n steps, where the ODE is linear."""
    times = unipc_grid(n, 2.0).tolist()
    x = torch.randn(1, 16, 1, 2, 2, generator=generator("ode"), dtype=torch.float64)
    *_, end = solver(Gaussian(times, s), x, times, {})
    want = x * s / deviation(times[0], s)
    return ((end - want).norm() / want.norm()).item()


def test_halving_the_step_quarters_unipc_s_error_and_only_halves_euler_s():
    errors = {solver: [ode_error(solver, n) for n in (40, 80, 160, 320)]
              for solver in (sample_euler, sample_unipc)}
    print(errors)
    for solver, order in ((sample_euler, 1), (sample_unipc, 2)):
        for coarse, fine in itertools.pairwise(errors[solver]):
            assert coarse / fine == pytest.approx(2 ** order, rel=0.1)
    assert errors[sample_unipc][0] < errors[sample_euler][0] / 10


# ------------------------------------------------------------------------------ as an option

@pytest.fixture
def run(make_config, tmp_path, monkeypatch):
    """sample.main for a small guided config: run(options…) -> a batch's arguments and latents."""
    config = make_config(n=4, key=[0, 1, 4], width=32, cfg_scale=2.0)
    calls, real = [], unipc.sample_batch

    def spy(*args):
        calls.append((args, real(*args)))
        return calls[-1][1]

    def main(*options: str):
        sample.main([str(config), "--prompt", "a red disc", *options])
        return calls.pop()

    monkeypatch.setattr(sample, "sample_batch", spy)
    fast_videos(monkeypatch)
    main.out = tmp_path / "run/samples"
    return main


@pytest.mark.parametrize("options, n", [((), 4), (("--steps", "3"), 3)])
def test_a_teacher_s_video_by_unipc_is_another_file_than_euler_s(run, options, n):
    run("--teacher", *options)
    (dit, noise, times, conds, unconds, scale, *_), latents = run(
        "--teacher", "--solver", "unipc", *options)
    assert times == unipc_grid(n, 7.0).tolist() and scale == 2.0
    *_, want = sample_unipc(dit, noise, times, collate(conds), collate(unconds), 2.0)
    assert torch.equal(latents, want)
    settings, video = read_log(run.out / f"teacher{n}_unipc.jsonl")
    assert video["evaluations"] == 2 * n and settings["values"]["solver"] == "unipc"
    videos = [next((run.out / f"teacher{n}{by}").glob("*.mp4")) for by in ("", "_unipc")]
    assert videos[0].read_bytes() != videos[1].read_bytes()


@pytest.mark.parametrize("form", ["file", "folder of shards"])
def test_a_released_student_samples_as_its_authors_command_does(run, tiny_weights, tmp_path, form):
    file = tiny_weights / "diffusion_pytorch_model.safetensors"  # says nothing of itself
    student = file if form == "file" else shards(tmp_path / "wanx", load_file(file), {})
    (dit, noise, times, conds, unconds, scale, *_), latents = run(
        "--student", str(student), "--solver", "unipc")
    assert times == unipc_grid(2, 7.0, twice=True).tolist() and unconds is None
    *_, want = sample_unipc(dit, noise, times, collate(conds))
    assert torch.equal(latents, want)
    assert len(list((run.out / "student2_unipc").glob("a-red-disc_*_seed0.mp4"))) == 1
    assert run("--student", str(student))[0][2] == key_times("wan", 4, 7.0, [0, 1, 4])


def sampling_times(config: str, *options: str) -> list[float]:
    """The times of sample.py with a shipped config."""
    cfg = load_config(sample.Config, "sample", [str(ROOT / f"configs/{config}.yaml"), *options])
    sample.check_options(cfg)
    return sample.sampling_times(cfg, sizes_of(cfg.preset).takes_image)


@pytest.mark.parametrize("config, want", [
    ("wan-t2v-14b-480p", [999, 978, 952, 921, 882, 833, 769, 681, 555, 357]),
    ("wan-i2v-14b-480p", [999, 963, 922, 874, 817, 749, 666, 562, 428, 249])])
def test_shipped_configs_sample_a_student_at_the_published_times(config, want, monkeypatch):
    monkeypatch.setattr(sample, "student_facts", lambda path, cfg, foreign: {
        "t_key": key_times(cfg.family, cfg.n, cfg.shift, cfg.key), "shift": cfg.shift})
    times = sampling_times(config, "--solver", "unipc")
    assert [math.floor(1000 * t) for t in times] == [*want, 0]


@pytest.mark.parametrize("config, schedule", [("wan-t2v-14b-480p", "unipc_t2v_50"),
                                              ("wan-i2v-14b-480p", "unipc_i2v480_40")])
def test_shipped_configs_sample_a_teacher_along_wan_s_own_grid(config, schedule):
    assert sampling_times(config, "--teacher", "--solver", "unipc") == grid_of(schedule).tolist()


@pytest.mark.parametrize("who", ["--teacher=true", "--teacher=false"])
def test_unipc_is_refused_for_hunyuan_video(who):
    with pytest.raises(ValueError, match="solver: expected euler for family hunyuan, got unipc"):
        sampling_times("hunyuan-t2v-544p", who, "--solver", "unipc")


def test_an_unknown_solver_and_other_steps_than_a_student_s_are_refused(run, tiny_weights):
    with pytest.raises(ValueError, match=r"solver: expected euler \| unipc, got 'unipcc'"):
        run("--solver", "unipcc")
    student = str(tiny_weights / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="steps: got 3; .* was distilled for 2 steps"):
        run("--student", student, "--solver", "unipc", "--steps", "3")
