"""tools.baselines: each loss against a case whose answer is known, and students that sample."""

import json
import math

import pytest
import torch
from torch import Tensor

from tools import baselines
import evaluate
import toy1d
from tools.baselines import (
    add_noise, dmd_loss, flow_matching_loss, integrate, pcm_loss, perflow_loss, predict_x0, rollout,
    to_time, window_times)
from common.config import Shared
from common.files import ROOT
from common.ranks import generator
from common.weights import open_tensors, safetensors_metadata
from small_world import clips as world
from small_world import oracle

GRID = [1.0, 0.9, 0.8, 0.6, 0.4, 0.1, 0.0]
KEY = [0, 3, 4, 6]  # windows of 3, 1 and 2 steps; window k = 2 is the one at the noise


def windows(*k: int) -> Tensor:
    return window_times(GRID, KEY, torch.tensor(k))


def normal(*shape: int, key: str = "x") -> Tensor:
    return torch.randn(shape, generator=generator(key), dtype=torch.float64)


def constant(value: Tensor):
    return lambda x, t: value.expand_as(x)


# ------------------------------------------------------------------------------------ windows

def test_each_sample_s_window_has_the_teacher_s_times_and_repeats_its_end():
    assert windows(2, 0, 1).tolist() == [[1.0, 0.9, 0.8, 0.6], [0.4, 0.1, 0.0, 0.0],
                                         [0.6, 0.4, 0.4, 0.4]]


def test_integration_along_padded_windows_is_that_of_each_window_alone():
    x = normal(3, 2)
    together = integrate(lambda x, t: x * t[:, None], x, windows(2, 0, 1))
    for i, times in enumerate(([1.0, 0.9, 0.8, 0.6], [0.4, 0.1, 0.0], [0.6, 0.4])):
        y = x[i]
        for t, t_next in zip(times, times[1:], strict=False):
            y = y + (t_next - t) * y * t
        assert torch.allclose(together[i], y)


@pytest.mark.parametrize("method", ["perflow", "pcm", "dmd"])
def test_a_batch_has_as_many_times_as_samples(method):
    seen = []

    def network(x, t):
        seen.append(t)
        return x * 0.1

    n, count = 200, 16
    cfg = baselines.Config(method=method, key=[0, 50, 100, 150, 200], n=n)
    grid = [1 - i / n for i in range(n + 1)]
    baselines.compute_loss(cfg, (network,) * 3, normal(count, 2), grid, generator("draw"), False)
    drawn = {"perflow": seen[-1], "pcm": seen[-1], "dmd": seen[-2]}[method]  # dmd: the scores'
    assert drawn.shape == (count,) and len(set(drawn.tolist())) >= count - 2  # but for chance
    starts = {float(t) for t in torch.cat(seen)}
    assert len(starts) > 3  # windows too are drawn for each sample


# ------------------------------------------------------------------------------------ PeRFlow

def test_perflow_s_target_on_a_straight_path_is_its_velocity():
    x0, z, u = normal(5, 3), normal(5, 3, key="z"), torch.rand(5, generator=generator("u"))
    slope, wrong = normal(1, 3, key="v"), normal(1, 3, key="w")
    times = windows(0, 1, 2, 0, 1)
    assert perflow_loss(constant(slope), constant(slope), x0, z, times, u) < 1e-25
    got = perflow_loss(constant(wrong), constant(slope), x0, z, times, u)
    assert float(got) == pytest.approx(float((wrong - slope).square().mean()))


def test_perflow_evaluates_the_student_on_the_chord_at_the_part_u_of_the_window():
    x0, z, u, seen = normal(4, 2), normal(4, 2, key="z"), torch.tensor([0.0, 0.25, 0.5, 1.0]), []

    def student(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    def teacher(x, t):
        return x * t[:, None]

    loss = perflow_loss(student, teacher, x0, z, windows(2, 2, 2, 2), u)
    low = z
    for t, t_next in ((1.0, 0.9), (0.9, 0.8), (0.8, 0.6)):
        low = low + (t_next - t) * low * t
    [(x, t)] = seen
    assert torch.allclose(t, 1 - 0.4 * u.double())
    assert torch.allclose(x, torch.lerp(z, low, u.double()[:, None]))
    assert torch.allclose(loss, ((low - z) / 0.4).square().mean())


def test_perflow_agrees_with_the_toy_s_on_the_toy_s_data():
    p, n, K = torch.tensor([-1.0, 1.0]), 20, 4
    x0, z = p[torch.randint(2, (64,), generator=generator("p"))], normal(64, key="z").float()
    window = torch.full((64,), 1)  # the toy counts windows from noise

    def field(x, t):
        return toy1d.exact_velocity(x, t.float(), p)

    start = toy1d.forward_diffusion(x0, z, 1 - window / K)
    pairs = toy1d.perflow_pairs(field, start, window, K, n)
    target = toy1d.segment_velocity(*pairs)
    times = window_times([1 - j / n for j in range(n + 1)], [0, 5, 10, 15, 20], K - 1 - window)
    got = perflow_loss(lambda x, t: torch.zeros_like(x), field, x0, z, times, torch.zeros(64))
    assert float(got) == pytest.approx(float(target.square().mean()), rel=1e-4)


# ---------------------------------------------------------------------------------------- PCM

def test_pcm_s_function_is_the_identity_at_the_window_s_end():
    x, v = normal(4, 3), normal(4, 3, key="v")
    end, t = torch.tensor([[0.4] * 4, [0.4, 1.0, 0.4, 0.7]], dtype=torch.float64)
    got = to_time(constant(v), x, t, end)
    assert torch.equal(got[[0, 2]], x[[0, 2]])
    assert torch.allclose(got[1], x[1] - 0.6 * v[1]) and torch.allclose(got[3], x[3] - 0.3 * v[3])


def test_pcm_is_0_for_a_student_that_steps_to_the_teacher_s_end_and_not_for_another():
    x0, z, times = normal(6, 2), normal(6, 2, key="z"), windows(2, 2, 2, 0, 0, 1)
    j = torch.tensor([0, 1, 2, 0, 1, 0])

    def teacher(x, t):
        return x * t[:, None]

    def student(x, t):  # to where the teacher's own steps lead, from each sample's own time
        slopes = []
        for own, time, row in zip(x, t, times, strict=True):
            left = row[row <= time]
            if left[-1] == time:  # at the window's end
                left = torch.stack([time, time - 1])
            end = integrate(teacher, own[None], left[None])[0]
            slopes.append((end - own) / (left[-1] - time))
        return torch.stack(slopes)

    assert pcm_loss(student, teacher, x0, z, times, j) < 1e-25
    wrong = pcm_loss(lambda x, t: torch.zeros_like(x), teacher, x0, z, times, j)
    rows = torch.arange(6)
    t, t_next = times[rows, j], times[rows, j + 1]
    step = (t_next - t)[:, None] * teacher(add_noise(x0, z, t), t)
    assert float(wrong) == pytest.approx(float(step.square().mean()))


# ---------------------------------------------------------------------------------------- DMD

def gaussian(mean: float):
    """The velocity of data ~ N(mean, 1): (z - x0) on average, given x_t."""
    def v(x, t):
        t = t[:, None]
        keep = (1 - t) / ((1 - t) ** 2 + t ** 2)
        x0 = mean + keep * (x - (1 - t) * mean)
        return (x - x0) / t
    return v


def test_dmd_s_gradient_on_gaussians_is_the_closed_form():
    guess = normal(7, 5).requires_grad_()
    t, noise = torch.linspace(0.1, 0.9, 7).double(), normal(7, 5, key="n")
    dmd_loss(guess, gaussian(2.0), gaussian(-1.0), noise, t).backward()
    x = add_noise(guess.detach(), noise, t)
    real = x - t[:, None] * gaussian(2.0)(x, t)
    gap = (-1.0 - 2.0) * t ** 2 / ((1 - t) ** 2 + t ** 2)  # of the two posterior means
    want = gap[:, None] / (guess.detach() - real).abs().mean(1, keepdim=True) / guess.numel()
    assert torch.allclose(guess.grad, want)


def test_dmd_moves_a_gaussian_s_mean_to_the_teacher_s():
    mean = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([mean], 0.05)
    for i in range(200):
        guess = mean + normal(64, 1, key=f"z{i}")
        t = torch.rand(64, generator=generator("t", i)).double() * 0.9 + 0.05
        dmd_loss(guess, gaussian(2.0), gaussian(mean.item()), normal(64, 1, key=f"n{i}"),
                 t).backward()
        opt.step()
        opt.zero_grad()
    assert mean.item() == pytest.approx(2.0, abs=0.1)


def test_the_exact_velocity_predicts_the_data_from_noised_data():
    x0, z, t = normal(4, 3), normal(4, 3, key="z"), torch.tensor([0.2, 0.5, 0.7, 1.0])
    assert torch.allclose(predict_x0(constant(z - x0), add_noise(x0, z, t), t), x0)


def test_backward_simulation_brings_each_sample_to_its_own_key_time():
    z, t_key = normal(3, 2), torch.tensor([0.0, 0.4, 0.6, 1.0]).double()
    got = rollout(lambda x, t: x * t[:, None], z, t_key, torch.tensor([2, 1, 0]))
    first = z * (1 - 0.4)                   # from 1 to .6
    second = first * (1 - 0.2 * 0.6)        # from .6 to .4
    assert torch.allclose(got, torch.stack([z[0], first[1], second[2]]))


def test_the_flow_matching_loss_of_the_exact_velocity_is_the_variance_that_is_left():
    t, x0, z = torch.full((4000,), 0.5), normal(4000, 1), normal(4000, 1, key="z")
    assert float(flow_matching_loss(gaussian(0.0), x0, z, t)) == pytest.approx(2.0, abs=0.15)
    assert float(flow_matching_loss(constant(torch.zeros(1)), x0, z, t)) == pytest.approx(
        float((z - x0).square().mean()))


# --------------------------------------------------------------------------------- end to end

def test_mismatched_clips_are_of_smaller_objects_and_match_their_captions():
    matched = world.make_clips(1, 0, 32)[0]
    small, captions, _ = world.make_clips(1, 0, 32, radius=baselines.SMALLER)
    assert oracle.agreement(small, captions)["all"] > 0.9

    def area(video):
        return ((video.amax(1) - video.amin(1)) > 0.5).float().mean((1, 2, 3))

    assert area(small).max() < area(matched).min()


def test_clips_are_read_again_and_encoded_again_for_another_size(tmp_path):
    path, shapes = tmp_path / "clips.safetensors", []
    for height, is_kept in ((16, False), (16, True), (32, False)):
        before = path.stat().st_ino if path.exists() else None
        cfg = Shared(height=height, width=height, weights=str(ROOT / "assets/tiny"))
        baselines.keep_clips(cfg, path, world.SIZE, 1, 2, torch.device("cpu"))
        assert (path.stat().st_ino == before) == is_kept
        shapes.append(open_tensors(path)["latents"].shape)
    assert shapes == [(2, 16, 3, 2, 2), (2, 16, 3, 2, 2), (2, 16, 3, 4, 4)]


@pytest.fixture
def config(make_config):
    return make_config(n=4, key=[0, 2, 4], distill={
        "iterations": 4, "batch": 4, "micro_batch": 2, "held_out": 2, "lr": 1e-3, "head_dim": 8,
        "export_dtype": "fp32"}, synvid={"count": 6},
        evaluate={"count": 3, "directions": 4, "c2st_steps": 1})


@pytest.mark.parametrize("method", ["perflow", "pcm", "dmd"])
def test_a_method_s_student_is_one_that_evaluate_reads(method, config, tiny_weights, tmp_path,
                                                       ranks):
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(world.make_captions(0, 0, 3, held_out=True)))
    argv = [str(config), "--method", method, "--data_count", "6"]
    baselines.main(argv)
    path = tmp_path / f"run/baselines/{method}-matched-seed0/student.safetensors"
    assert not (tmp_path / "run/student.safetensors").exists()  # that is distill.py's
    facts = json.loads(safetensors_metadata(path)["accvideo"])
    assert facts["key"] == [0, 2, 4] and facts["iterations"] == 4
    first = {name: t.read() for name, t in open_tensors(path).items()}
    teacher = open_tensors(tiny_weights / "diffusion_pytorch_model.safetensors")
    moved = [float((first[name] - teacher[name].read()).abs().max()) for name in first]
    assert all(map(math.isfinite, moved)) and max(moved) > 0
    baselines.main(argv)  # by its seeds alone; the clips are read again
    again = open_tensors(path)
    assert all(torch.equal(first[name], again[name].read()) for name in first)
    evaluate.main([str(config), "--prompts", str(captions), "--pictures", "false", "--students",
                   str(path)])
    table = json.loads((tmp_path / "run/evaluate/table.json").read_text())
    assert [row["label"] for row in table["rows"]] == ["teacher@4", "teacher@2", "student@2"]


def test_bad_settings_of_a_method_are_refused_by_name(config, ranks):
    for option, message in (("fake_updates=0", "fake_updates: .*got 0"),
                            ("method=cd", "method: .*'cd'"),
                            ("preset=wan22-t2v-a14b", "preset: .* a single DiT, got wan22"),
                            ("batch=3", "batch: expected a multiple of .*, got 3"),
                            ("synvid=nowhere data=samples", "nowhere.*: no SynVid|nowhere")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            baselines.main([str(config), *option.split()])
