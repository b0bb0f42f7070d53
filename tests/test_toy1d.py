"""toy1d.py against the analytic field, closed forms and hand-made points."""

import json
import math
from dataclasses import replace

import pytest
import torch

import toy1d
from toy1d import Config, generator, time_grid

P = torch.tensor([-3.0, 3.0])
TINY = Config(M=(0.0, 6.0), iterations=400, batch=1024, lr=2e-3, trajectories=1500, pairs=2000,
              student_iterations=15, student_batch=64, repeats=2, samples=500)
SHORT = replace(TINY, n=10, iterations=30, trajectories=1000, samples=100)  # for plumbing


@pytest.fixture(scope="module")
def report():
    return json.loads(json.dumps(toy1d.analyse(TINY)))


def diffused(N, p=P, seed=0):
    rng = generator(seed, "test")
    x_0 = p[torch.randint(len(p), (N,), generator=rng)]
    return x_0, torch.randn(N, generator=rng), 1 - torch.rand(N, generator=rng)


# ---------------------------------------------------------------- Sec. 3.1
def test_forward_diffusion_goes_from_the_data_to_the_noise_with_mean_and_spread_of_eq_2():
    x_0, x_1 = torch.tensor(3.0), torch.randn(200_000, generator=generator(0, "test"))
    assert torch.equal(toy1d.forward_diffusion(x_0, x_1, torch.tensor(1.0)), x_1)
    assert torch.all(toy1d.forward_diffusion(x_0, x_1, torch.tensor(0.0)) == x_0)
    x_t = toy1d.forward_diffusion(x_0, x_1, torch.tensor(0.4))
    assert x_t.mean().item() == pytest.approx(0.6 * 3, abs=5e-3)
    assert x_t.std().item() == pytest.approx(0.4, abs=5e-3)


def test_velocity_target_is_the_derivative_of_the_path_in_t():
    x_0, x_1, t = (x.double() for x in diffused(100))
    path = [toy1d.forward_diffusion(x_0, x_1, t + h) for h in (-1e-3, 1e-3)]
    torch.testing.assert_close((path[1] - path[0]) / 2e-3, toy1d.velocity_target(x_0, x_1))


def test_exact_velocity_of_two_points_is_the_tanh_of_the_posterior_mean():
    x, t = torch.meshgrid(torch.linspace(-5, 5, 41), torch.linspace(0.05, 1, 20), indexing="ij")
    closed = (x - 3 * torch.tanh(3 * (1 - t) * x / t ** 2)) / t
    torch.testing.assert_close(toy1d.exact_velocity(x, t, P), closed, atol=1e-4, rtol=1e-4)


def test_exact_velocity_reaches_the_bayes_floor_and_nothing_near_it_does():
    def loss(scale):
        return toy1d.flow_matching_loss(lambda x, t: scale * toy1d.exact_velocity(x, t, P),
                                        *diffused(400_000)).item()
    floor = toy1d.bayes_floor(P)
    assert loss(1.0) == pytest.approx(floor, rel=0.015)  # sampling error, below 0.5%
    assert min(loss(0.95), loss(1.05)) > loss(1.0)
    assert toy1d.bayes_floor(P[:1]) == pytest.approx(0, abs=1e-9)  # one point: no uncertainty


def test_euler_step_is_eq_5_and_exact_on_a_straight_path():
    x = torch.tensor([1.0, -2.0])
    stepped = toy1d.euler_step(x, torch.tensor([3.0, 4.0]), torch.tensor(0.8), torch.tensor(0.6))
    torch.testing.assert_close(stepped, torch.tensor([1 - 0.2 * 3, -2 - 0.2 * 4]))
    x_0, x_1, _ = diffused(50)
    times = time_grid(7, 3.0)
    states = toy1d.euler_trajectory(lambda x, t: x_1 - x_0, x_1, times)
    torch.testing.assert_close(states, toy1d.forward_diffusion(x_0, x_1, times[:, None]))


def test_trajectories_of_the_exact_field_never_cross_and_end_on_the_data():
    noise = torch.linspace(-3, 3, 60)
    states = toy1d.euler_trajectory(lambda x, t: toy1d.exact_velocity(x, t, P), noise,
                                    time_grid(50))
    assert torch.all(states.diff(dim=1) > -1e-5)
    torch.testing.assert_close(states[-1], 3 * noise.sign(), atol=1e-4, rtol=0)


def test_every_tenth_time_of_the_shifted_grid_is_a_key_timestep_of_the_paper():
    paper = [1, 0.965517, 0.913043, 0.823529, 0.636364, 0]
    torch.testing.assert_close(time_grid(50, 7.0)[::10], torch.tensor(paper), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- the network
def test_students_start_as_the_teacher_and_are_independent():
    teacher = toy1d.ResNet(rng=generator(0, "test"))
    x, t = torch.randn(1, 64, generator=generator(1, "test")), torch.full((1, 64), 0.3)
    teacher(x, t)  # moves the batch statistics off their initial values
    teacher.eval()
    students = teacher.replicate(3).eval()
    torch.testing.assert_close(students(x.expand(3, -1), t.expand(3, -1)),
                               teacher(x, t).expand(3, -1))
    students(x.expand(3, -1), t.expand(3, -1))[1].sum().backward()
    grad = students.conv_in.weight.grad.view(3, -1)
    assert grad[1].abs().sum() > 0 and grad[[0, 2]].abs().sum() == 0


# ---------------------------------------------------------------- Sec. 3.2
def test_M_sums_the_distances_to_the_nearest_training_point():
    assert toy1d.mismatch(torch.tensor([-5.0, 0.5, 4.0]), P).item() == pytest.approx(2 + 2.5 + 1)
    assert toy1d.mismatch(P, P).item() == 0


@pytest.mark.parametrize("way", toy1d.WAYS)
@pytest.mark.parametrize("p", [P, torch.tensor([-1.0, 0.0, 4.0])])
def test_each_way_of_shifting_the_data_has_the_given_M(way, p):
    for M in (0.0, 0.5, 1.0):
        assert toy1d.mismatch(toy1d.shift_data(p, way, M), p).item() == pytest.approx(M)


def classes(x_t, x_d, states, ends):
    labels = toy1d.classify(*(torch.tensor(x) for x in (x_t, x_d, states, ends)), P, 0.05)
    return [toy1d.CLASSES[label] for label in labels]


def test_a_point_is_useful_only_near_a_trajectory_that_ends_at_its_training_point():
    states, ends = [0.5, -0.5, 0.04, 0.0], [3.01, -2.98, 2.97, -3.02]
    assert classes([0.52, 0.52, 0.7, -0.45], [3.0, -3.0, 3.0, -5.0], states, ends) == \
        ["useful", "noise", "dataset", "useful"]
    assert classes([0.02, 0.02], [3.0, -3.0], states, ends) == ["useful"] * 2  # both in reach
    assert classes([-0.04, -0.04], [3.0, -3.0], states, ends) == ["noise", "useful"]  # one is


def test_a_tie_belongs_to_the_lower_training_point():
    assert classes([0.5, -0.5], [0.0, 0.0], [0.5, -0.5], [3.0, -3.0]) == ["noise", "useful"]


def test_noise_mismatch_alone_has_its_closed_form_under_the_exact_flow():
    times, N = time_grid(50), 2000
    x_1 = torch.randn(49, N, generator=generator(0, "test"))
    for x_d in (3.0, 5.0, 1.0):
        x_t = toy1d.forward_diffusion(torch.tensor(x_d), x_1, times[1:-1, None])
        ends = toy1d.endpoints(lambda x, t: toy1d.exact_velocity(x, t, P), x_t, times)
        torch.testing.assert_close(ends.abs(), torch.full_like(ends, 3), atol=0.02, rtol=0)
        closed = toy1d.crossing_probability(torch.tensor([x_d]), times[1:-1], P)[0]
        measured = (ends < 0).float().mean(1)
        torch.testing.assert_close(measured, closed, atol=5 * 0.5 / math.sqrt(N), rtol=0)


def test_noise_mismatch_alone_falls_as_the_data_moves_outward():
    times = time_grid(50)[1:-1]
    shares = [toy1d.crossing_probability(toy1d.shift_data(P, "outward", M), times, P).mean()
              for M in (0.0, 2.0, 4.0, 6.0)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.09


def test_with_the_exact_field_no_point_is_off_every_trajectory_at_M_0_and_some_are_useless():
    cfg = replace(TINY, mismatch=("outward",), trajectories=5000)
    times, noise = time_grid(50), torch.randn(5000, generator=generator(0, "test"))

    def v(x, t):
        return toy1d.exact_velocity(x, t, P)
    paths = toy1d.euler_trajectory(v, noise, times)
    useless, _, _ = toy1d.measure_useless(cfg, v, paths, times, P, 0)
    found = {key: [float(x) for x in values] for key, values in useless["outward"].items()}
    assert found["dataset"][0] < 0.005 and found["dataset"][1] > 0.4
    assert found["noise"][0] == pytest.approx(found["crossing"][0], abs=0.01)
    assert found["useless"][1] > found["useless"][0] > 0.08


# ---------------------------------------------------------------- distillation
def test_perflow_on_straight_paths_learns_the_velocity_target():
    x_0, x_1, _ = diffused(200, p=P[:1])  # one training point: the exact flow is straight
    window = torch.arange(200) % 5
    start = toy1d.forward_diffusion(x_0, x_1, 1 - window / 5)

    def v(x, t):
        return toy1d.exact_velocity(x, t, P[:1])
    pairs = toy1d.perflow_pairs(v, start, window, 5, 50)
    torch.testing.assert_close(pairs[1], toy1d.forward_diffusion(x_0, x_1, pairs[3]),
                               atol=1e-4, rtol=0)
    torch.testing.assert_close(toy1d.segment_velocity(*pairs), toy1d.velocity_target(x_0, x_1),
                               atol=1e-3, rtol=0)


def test_an_euler_step_with_the_target_of_eq_6_lands_on_the_next_key_latent():
    l_high, l_low = torch.randn(2, 30, generator=generator(0, "test"))
    t_high, t_low = torch.tensor(0.9), torch.tensor(0.6)
    target = toy1d.segment_velocity(l_high, l_low, t_high, t_low)
    torch.testing.assert_close(toy1d.euler_step(l_high, target, t_high, t_low), l_low)


def test_accvideos_student_learns_from_teacher_states_only():
    def v(x, t):
        return toy1d.exact_velocity(x, t, P)
    noise, key = torch.randn(1500, generator=generator(0, "test")), time_grid(50, 7.0)
    paths, key_paths = (toy1d.euler_trajectory(v, noise, times) for times in (time_grid(50), key))
    lists = [toy1d.make_students(replace(TINY, M=M), P, v, paths, key_paths[::10], 0)
             for M in ((0.0, 2.0), (0.0, 6.0))]
    ours, perflow = ([students[i] for students in lists] for i in (0, -1))
    assert ours[0].name == "AccVideo" and not ours[0].interpolate
    assert all(torch.equal(a, b) for a, b in zip(ours[0].pairs, ours[1].pairs, strict=True))
    assert not torch.equal(perflow[0].pairs[0], perflow[1].pairs[0])
    assert torch.isin(ours[0].pairs[0], key_paths).all()
    half = next(s for s in lists[1] if s.name == "half on trajectories")
    assert torch.isin(half.pairs[0], paths).float().mean().item() == pytest.approx(0.5, abs=0.05)


# ---------------------------------------------------------------- the experiment, in miniature
def test_the_teacher_nears_the_bayes_floor_and_useless_points_grow_with_M(report):
    numbers = report["seeds"][0]
    assert numbers["teacher"]["loss"] < 1.1 * numbers["teacher"]["Bayes floor"]
    for way in toy1d.WAYS:
        assert 0.05 < numbers["useless"][way]["useless"][0] < numbers["useless"][way]["useless"][1]
        assert numbers["useless"][way]["M"] == [0, 6]


def test_the_same_seed_gives_the_same_numbers_whatever_else_runs():
    one, both = (json.loads(json.dumps(toy1d.analyse(replace(SHORT, seeds=n)))) for n in (1, 2))
    assert both["seeds"][0] == one["seeds"][0] and both["drawn"] == one["drawn"]
    assert both["seeds"][1] != one["seeds"][0]
    assert both["summary"]["teacher"]["loss"]["mean"] == pytest.approx(
        sum(seed["teacher"]["loss"] for seed in both["seeds"]) / 2)


def test_the_figure_is_drawn_from_the_json_alone_without_temporary_files(report, tmp_path):
    toy1d.draw_figure(report, str(tmp_path / "f"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.pdf", "f.png"]
    width = int.from_bytes((tmp_path / "f.png").read_bytes()[16:20], "big")
    assert width == 1200


def test_three_data_points_and_one_way_of_shifting_run_through(tmp_path):
    cfg = replace(SHORT, data=(-4.0, 0.0, 3.0), mismatch=("one-sided",), M=(0.0, 1.0, 3.0))
    found = toy1d.analyse(cfg)
    toy1d.draw_figure(json.loads(json.dumps(found)), str(tmp_path / "f"))
    assert found["summary"]["useless"]["one-sided"]["crossing"] == [None] * 3  # no closed form


# ---------------------------------------------------------------- options
def test_options_reach_the_configuration_and_M_follows_the_data():
    cfg, out = toy1d.parse_args(["--data", "1", "-1", "--seeds", "2", "--out", "runs/x"])
    assert cfg.data == (-1, 1) and cfg.seeds == 2 and out == "runs/x"
    assert cfg.M == pytest.approx((0, 2 / 3, 4 / 3, 2))
    assert toy1d.parse_args([])[0] == Config()
    twice = toy1d.parse_args(["--mismatch", "inward", "outward", "inward"])[0]
    assert twice.mismatch == ("inward", "outward")
    assert toy1d.parse_args(["--quick"])[0] == replace(Config(), **toy1d.QUICK)


@pytest.mark.parametrize("argv, option, expected", [
    (["--data", "3"], "--data", "two or more different"),
    (["--data", "3", "3"], "--data", "two or more different"),
    (["--data", "nan", "3"], "--data", "two or more different"),
    (["--M", "2", "4"], "--M", "the first of them 0"),
    (["--M", "0", "4", "2"], "--M", "increasing"),
    (["--M", "0", "nan"], "--M", "increasing"),
    (["--M", "0", "8"], "--M", "at most 6"),
    (["--mismatch", "sideways"], "--mismatch", "inward"),
    (["--epsilon", "0"], "--epsilon", "above 0"),
    (["--seeds", "0"], "--seeds", "1 or more"),
    (["--out", "."], "--out", "a file's path"),
])
def test_a_bad_value_is_refused_with_the_name_of_its_option(argv, option, expected, capsys):
    with pytest.raises(SystemExit):
        toy1d.parse_args(argv)
    message = capsys.readouterr().err
    assert option in message.splitlines()[-1] and expected in message


def test_a_loss_that_is_not_finite_stops_the_run_by_name():
    with pytest.raises(ValueError, match="seed 0: teacher: expected a finite loss, got"):
        toy1d.train_teacher(replace(TINY, iterations=30, lr=1e20), P, 0)
