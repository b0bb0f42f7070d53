"""evaluate.py: each metric against a case whose answer is known, and the table end to end."""

import html
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from test_sample import KEY, N, write_student
from torch import Tensor

import evaluate
import sample
from common.config import load_config
from common.prompts import Prompt
from common.ranks import generator
from common.video import data_uri, read_video, write_image
from evaluation.measures import (
    c2st, distances, endpoint_error, energy_distance, gates, jackknife, mean_error, mean_row,
    projections, set_distances, sliced_wasserstein, spread)
from evaluation.page import html_of
from small_world import clips as world


def normal(*shape: int, key: str = "x") -> Tensor:
    return torch.randn(shape, generator=generator(key), dtype=torch.float64)


def energy(x: Tensor, y: Tensor) -> float:
    return energy_distance(distances(x, x), distances(y, y), distances(x, y))


# ----------------------------------------------------------------------------------- metrics

def test_endpoint_error_is_0_for_the_same_and_scales_with_the_square():
    x = normal(3, 2, 4)
    assert endpoint_error(x, x).tolist() == [0, 0, 0]
    assert torch.allclose(endpoint_error(1.5 * x, x), torch.full((3,), 0.25, dtype=torch.float64))
    assert torch.equal(endpoint_error(torch.zeros_like(x), x), torch.ones(3))


def test_distances_are_root_mean_squares_over_elements():
    x, y = normal(3, 2, 5), normal(4, 2, 5, key="y")
    want = (x[:, None] - y[None]).square().mean((2, 3)).sqrt()
    assert torch.allclose(distances(x, y), want)


def test_energy_distance_of_points_is_the_closed_form():
    x, y = torch.zeros(5, 7), torch.full((5, 7), 3.0)
    assert energy(x, y) == pytest.approx(6)   # 2 · |0 − 3| − 0 − 0
    assert energy(x, x) == 0


def test_energy_distance_is_unbiased_and_tells_a_shift_of_gaussians():
    same = [energy(normal(48, 6, key=f"x{i}"), normal(48, 6, key=f"y{i}")) for i in range(40)]
    mean, error = mean_error(torch.tensor(same))
    assert abs(mean) < 3 * error
    # one dimension: E|N(s, 2)| = 2 exp(−s²/4)/√π + s erf(s/2), for a difference of two N(·, 1)
    s = torch.tensor(2.0, dtype=torch.float64)
    far = 2 * torch.exp(-s ** 2 / 4) / torch.pi ** 0.5 + s * torch.erf(s / 2)
    want = 2 * far - 4 / torch.pi ** 0.5
    got = energy(normal(2000, 1), normal(2000, 1, key="y") + s)
    assert got == pytest.approx(float(want), abs=0.08)


def test_energy_distance_of_samples_that_share_captions_has_no_bias():
    means = 5 * normal(24, 6, key="captions")
    draws = [energy(means + normal(24, 6, key=f"x{i}"), means + normal(24, 6, key=f"y{i}"))
             for i in range(60)]
    mean, error = mean_error(torch.tensor(draws))
    assert abs(mean) < 3 * error


def test_projections_are_fixed_and_onto_unit_vectors():
    x = normal(5, 3, 4)
    assert torch.equal(projections(x, 7), projections(x, 7))
    u = projections(torch.eye(12, dtype=torch.float64).view(12, 3, 4), 7)  # the directions
    assert torch.allclose(u.square().sum(0), torch.ones(7, dtype=torch.float64))
    assert torch.allclose(projections(x, 7), x.flatten(1) @ u)


def test_sliced_wasserstein_of_a_shifted_set_is_the_mean_projected_shift():
    x, shift = normal(50, 4), torch.tensor([3.0, 0, -1, 0], dtype=torch.float64)
    u = projections(torch.eye(4, dtype=torch.float64), 32)
    got = sliced_wasserstein(projections(x + shift, 32), projections(x, 32)[torch.randperm(50)])
    assert got == pytest.approx(float((shift @ u).abs().mean()))
    one = sliced_wasserstein(projections(x[:, :1] + 2, 32), projections(x[:, :1], 32))
    assert one == pytest.approx(2)   # in one dimension every direction is the axis


def test_sliced_wasserstein_of_unlike_spreads_is_the_closed_form():
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    assert sliced_wasserstein(3 * x, x) == pytest.approx(2 * float(x.abs().mean()))


def test_jackknife_of_a_mean_is_its_standard_error():
    x = normal(30)
    got = jackknife(lambda i: float(x[i].mean()), 30)
    assert got == pytest.approx(mean_error(x))


def test_jackknife_of_the_energy_distance_tells_its_spread():
    found = []
    for i in range(60):
        x, y = normal(40, 5, key=f"x{i}"), normal(40, 5, key=f"y{i}") + 0.3
        found.append(jackknife(set_distances(x, y, 1)["energy"], 40))
    values, errors = torch.tensor(found).T
    assert 0.7 < float(errors.mean() / values.std()) < 1.5


def test_high_frequency_energy_falls_with_blur_and_scales_with_the_square():
    video = world.make_clips(0, 0, 4)[0]
    blurred = torch.nn.functional.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1))
    whole = world.high_frequency(video)
    assert world.high_frequency(blurred) < 0.5 * whole
    assert world.high_frequency(0.5 * video) == pytest.approx(0.25 * whole)
    assert world.high_frequency(torch.ones(1, 3, 1, 16, 16)) < 1e-10


def test_spread_is_the_ratio_of_variances_over_videos():
    x, i = normal(40, 3, 2), torch.arange(40)
    assert spread(0.5 * x + 7, x)(i) == pytest.approx(0.25)
    want = x[:9].var(0).sum() / normal(40, 3, 2, key="y")[:9].var(0).sum()
    assert spread(x, normal(40, 3, 2, key="y"))(i[:9]) == pytest.approx(float(want))


def test_c2st_is_half_for_one_distribution_and_near_one_for_a_pattern():
    x, y, cpu = normal(48, 4, 2, 6, 6), normal(48, 4, 2, 6, 6, key="y"), torch.device("cpu")
    same, error = c2st(x, y, 40, cpu)
    assert abs(same - 0.5) < 0.15 and error < 0.08
    accuracy, error = c2st(x + torch.tensor([1.0, -1.0]).repeat(3), y, 40, cpu)
    assert accuracy > 0.9 and error < 0.05
    assert c2st(x, y, 40, cpu) == (same, c2st(x, y, 40, cpu)[1])  # by its seeds alone


# ------------------------------------------------------------------------- the oracle and gates

def test_the_oracle_is_asked_for_small_world_captions_only():
    cfg = evaluate.Config()
    captions = world.make_captions(0, 0, 5, held_out=True)
    assert evaluate.is_small_world(captions, cfg)
    assert not evaluate.is_small_world([*captions, "a fox in the snow"], cfg)
    assert not evaluate.is_small_world(captions, evaluate.Config(width=64))


def test_the_oracle_reads_a_drawn_clip_and_rejects_another_caption():
    video, captions, _ = world.make_clips(0, 0, 1)
    hits = world.oracle_hits(video, captions)
    assert hits == {"colour": True, "shape": True, "direction": True, "all": True}
    blank = world.oracle_hits(torch.zeros_like(video), captions)
    assert not blank["all"] and not blank["shape"]


def row(label: str, endpoint: float, energy: float, hf: float, right: float = 1.0) -> dict:
    values = {"endpoint": endpoint, "energy": energy, "sliced": 0.1, "hf": hf, "all": right}
    return {"label": label, "evaluations": 5, "seconds": 0.1, "decode_seconds": 0.03,
            **{name: (value, 0.01) for name, value in values.items()}}


def passes(best: dict, few: dict, student: dict) -> list[bool]:
    return [gate["pass"] for gate in gates(best, few, student)]


def test_gates_pass_a_good_student_and_name_what_fails():
    best, few = row("teacher@50", 0, -0.01, 1, 0.95), row("teacher@5", 0.08, 0.02, 0.7)
    assert passes(best, few, row("student@5", 0.02, -0.009, 1.03)) == [True] * 5
    assert passes(best, few, row("student@5", 0.05, 0.021, 1.06))[2:] == [False, False, False]
    assert passes(best, few, row("student@5", 0.02, -0.05, 0.94))[2:] == [True, False, False]
    poor = row("teacher@50", 0, -0.01, 1, 0.85), row("teacher@5", 0.08, 0.02, 0.9)
    assert passes(*poor, row("student@5", 0.02, -0.009, 1.0))[:2] == [False, False]


def test_the_mean_of_students_has_the_error_over_students():
    mean = mean_row([row("student@5 #1", 0.02, 0.0, 1.0), row("student@5 #2", 0.04, 0.0, 1.1)])
    assert mean["label"] == "student@5, mean of 2"
    assert mean["endpoint"] == pytest.approx((0.03, 0.01))
    assert mean["hf"] == pytest.approx((1.05, 0.05)) and mean["seconds"] == pytest.approx(0.1)


# ------------------------------------------------------------------------------ what is shown

def test_the_videos_shown_are_at_the_quantiles_of_the_errors():
    errors = torch.arange(21.0).flip(0)  # the video at place i has rank 20 − i
    shown = evaluate.videos_to_show(errors, [str(i) for i in range(21)])
    assert list(shown.items()) == [(10, 0.5), (4, 0.8), (2, 0.9), (1, 0.95), (0, 1.0)]


def test_a_caption_is_shown_once_at_the_highest_of_its_quantiles():
    errors = torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert evaluate.videos_to_show(errors, ["a", "b", "c", "d"]) == {2: 0.8, 0: 1.0}
    assert evaluate.videos_to_show(errors, ["a", "b", "a", "d"]) == {0: 1.0}
    assert evaluate.videos_to_show(errors[:1], ["a"]) == {0: 1.0}


def test_the_values_of_ranks_come_together_in_the_videos_order():
    values = torch.arange(7)
    assert torch.equal(evaluate.interleaved([values[rank::3] for rank in range(3)]), values)
    assert torch.equal(evaluate.interleaved([values]), values)


# ------------------------------------------------------------------------------------ end to end

@pytest.fixture
def run(tiny_weights, tmp_path, make_config, ranks):
    """evaluate.main for a small config: run(options…) -> table.json."""
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(world.make_captions(0, 0, 3, held_out=True)))
    config = make_config(n=N, key=KEY, evaluate={
        "prompts": str(captions), "count": 4, "batch": 3, "directions": 8, "c2st_steps": 2})

    def main(*options: str) -> dict:
        evaluate.main([str(config), *options])
        return json.loads((tmp_path / "run/evaluate/table.json").read_text())

    main.folder, main.weights, main.config = tmp_path, tiny_weights, config
    return main


def test_the_table_of_a_student_that_is_its_teacher(run, capsys):
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    out, table = run.folder / "run/evaluate", run()
    best, few, student = table["rows"]
    assert [r["label"] for r in table["rows"]] == ["teacher@4", "teacher@2", "student@2"]
    assert [r["evaluations"] for r in table["rows"]] == [4, 2, 2]
    assert best["endpoint"] == [0, 0] and best["hf"] == [1, 0] and few["endpoint"][0] > 0
    for name in ("endpoint", "energy", "sliced", "hf", "all"):
        assert student[name] == few[name]
    assert len(table["gates"]) == 5 and table["command"].startswith("python evaluate.py ")
    names = {"config.yaml", "report.html", "table.json", "table.md", "table.png",
             "teacher.safetensors"}
    assert {p.name for p in out.iterdir()} == names | {f"videos.{s}" for s in ("gif", "mp4", "png")}
    frames = [read_video(out / f"videos.{suffix}").shape[1] for suffix in ("gif", "mp4")]
    assert frames == [5, 5 * 6]  # the mp4 shows it six times: four seconds
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() in printed and str(out / "videos.mp4") in printed
    look, beside, after, command = printed.strip().split("\n")[-4:]
    assert look.startswith(f"look at {out / 'report.html'} ") and str(out / "videos.mp4") in beside
    assert after.endswith("source .venv/bin/activate") and command.strip() == table["next"]


def page_of(run, *options: str) -> tuple[str, dict]:
    """The page of an evaluation, and its table."""
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    table = run(*options)
    return (run.folder / "run/evaluate/report.html").read_text(encoding="utf-8"), table


def test_the_page_needs_no_other_file_and_says_everything(run):
    curves = run.folder / "run/distill/curves.png"
    write_image(curves, torch.zeros(3, 8, 8))
    page, table = page_of(run)
    assert "://" not in page and "url(" not in page and "$" not in page
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?(.{5})""", page)
    assert len(sources) == 2 + 2 + 1 and set(sources) == {"data:"}  # videos, pictures, icon
    assert data_uri(curves) in page and data_uri(curves.parents[1] / "evaluate/videos.png") in page
    assert str(run.folder) not in re.sub("<pre>.*?</pre>|<footer.*", "", page, flags=re.DOTALL)
    text = html.unescape(page)
    for row in table["rows"]:
        assert row["label"] in text and f"{row['endpoint'][0]:.4f}" in text
    for gate in table["gates"]:
        assert gate["gate"] in text and f"{gate['got']:.4f}" in text
    for name, values in world.ATTRIBUTES.items():
        assert f"{name}: {', '.join(values)}" in text
    assert f"source .venv/bin/activate\n{table['next']}</pre>" in text


def test_the_page_escapes_captions_and_leaves_out_what_there_is_not(run):
    bad = '<script>alert("1 & 2")</script> $n <img src=x>'
    (run.folder / "captions.txt").write_text(bad + "\n")
    page, table = page_of(run)
    assert "<script" not in page and "<img src=x" not in page and html.escape(bad) in page
    assert bad in shlex.split(table["next"])
    assert table["gates"] == [] and "The small world knows" not in page
    assert "How the student learned" not in page and page.count("<video") == 1


def test_the_next_command_has_the_config_and_what_it_was_overridden_with(run):
    config, prompt = str(run.config), Prompt("a cat's day", Path("cat.jpg"))
    argv = [config, "--seed", "3", "key=0,3,4", "count=9", "--students", "a.pt, b.pt"]
    cfg = load_config(evaluate.Config, "evaluate", argv)
    words = shlex.split(evaluate.next_command(cfg, argv, prompt))
    assert words == ["python", "sample.py", config, "--key", "0,3,4", "--seed", "3", "--student",
                     "a.pt", "--image", "cat.jpg", "--prompt", "a cat's day"]
    sample_cfg = load_config(sample.Config, "sample", words[2:])
    assert sample_cfg.key == [0, 3, 4] and sample_cfg.student == "a.pt" and sample_cfg.seed == 3
    plain = evaluate.next_command(load_config(evaluate.Config, "evaluate", [config]), [config],
                                  Prompt("x"))
    assert plain == f"python sample.py {config} --prompt x"


def test_a_gate_that_fails_is_marked_in_the_page():
    text = "a `b` < c\n\n| gate | got | |\n|---|---|---|\n| x | 1 | **FAIL** |\n"
    assert html_of(text) == (
        '<p>a b &lt; c</p>\n<div class="wide"><table><tr><td> gate <td> got <td> '
        "<tr><td> x <td> 1 <td> <mark>FAIL</mark> </table></div>")


def test_students_with_unlike_steps_stand_by_their_own_teacher_and_on_a_ladder(run):
    files = {name: write_student(run.folder / f"{name}.safetensors", run.weights, 0, t_key=t_key)
             for name, t_key in (("a", [1.0, 0.0]), ("b", [1.0, 0.5, 0.0]), ("c", [1.0, 0.0]))}
    rows = run("--students", ",".join(str(files[name]) for name in "abc"))["rows"]
    assert [r["label"] for r in rows] == [
        "teacher@4", "teacher@1", "student@1 #1", "student@1 #2", "student@1, mean of 2",
        "teacher@2", "student@2"]
    for name in ("endpoint", "energy", "hf", "spread"):  # students that are their teacher
        assert rows[1][name] == rows[2][name] == rows[3][name] != rows[5][name] == rows[6][name]
    page = (run.folder / "run/evaluate/report.html").read_text()
    assert data_uri(run.folder / "run/evaluate/ladder.gif") in page
    rows = run("--students", f"{files['b']},"
               f"{write_student(run.folder / 'd.safetensors', run.weights, t_key=[1, .25, 0])}")
    assert [r["label"] for r in rows["rows"][1:]] == [
        "teacher@2 at 1, 0.5, 0", "student@2 at 1, 0.5, 0", "teacher@2 at 1, 0.25, 0",
        "student@2 at 1, 0.25, 0"]


def test_the_teacher_may_take_other_numbers_of_steps_by_either_solver(run, no_pictures):
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    rows = {row["label"]: row for row in run("--teacher_steps", "4,2")["rows"]}
    assert list(rows) == ["teacher@4", "teacher@2", "student@2", "teacher@4 by euler",
                          "teacher@4 by unipc", "teacher@2 by euler", "teacher@2 by unipc"]
    assert rows["teacher@4 by euler"]["endpoint"][0] == 0  # the same grid
    found = [rows[f"teacher@{n} by {solver}"]["endpoint"][0] for n, solver in
             ((4, "unipc"), (2, "euler"), (2, "unipc"))]
    assert len(set(found)) == 3 and min(found) > 0
    assert rows["teacher@2 by unipc"]["evaluations"] == 2


def test_the_teacher_s_latents_are_read_again_where_nothing_that_made_them_has_changed(
        run, no_pictures, monkeypatch):
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    plain, sampled = evaluate.sample_model, []

    def counted(label, *args):
        sampled.append(label)
        return plain(label, *args)

    monkeypatch.setattr(evaluate, "sample_model", counted)
    first = run()
    whole = ["teacher@4", "teacher@4, other noise", "teacher@2", "student@2"]
    assert sampled == whole
    sampled.clear()
    again = run("--directions", "8")
    assert sampled == whole[2:]
    for row, before in zip(again["rows"], first["rows"], strict=True):
        assert all(row[name] == before[name] for name in row if "seconds" not in name)
    for option in ("seed=1", "count=5", f"prompts={run.weights / 'prompts.txt'}", "batch=2"):
        sampled.clear()
        run(option)
        assert sampled == whole, option


@pytest.fixture
def no_pictures(monkeypatch):
    """Tables without the seconds that pictures and videos of them take."""
    for name in ("draw_table", "comparison_sheet", "write_video", "write_page"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: None)


def test_several_students_have_a_row_each_and_one_of_their_mean(run, no_pictures):
    a = write_student(run.folder / "a.safetensors", run.weights)
    b = write_student(run.folder / "b.safetensors", run.weights, 0)
    rows = run("--students", f"{a}, {b}", "--cfg_scale", "1.0")["rows"]
    labels = [r["label"] for r in rows[2:]]
    assert labels == ["student@2 #1", "student@2 #2", "student@2, mean of 2"]
    for name in ("endpoint", "energy", "hf"):
        assert rows[4][name][0] == pytest.approx((rows[2][name][0] + rows[3][name][0]) / 2)


def test_captions_of_the_world_at_large_have_no_oracle_and_no_gates(run, no_pictures):
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    (run.folder / "captions.txt").write_text("a fox in the snow\n")
    table = run()
    assert table["gates"] == [] and "all" not in table["rows"][0]
    assert "oracle" not in (run.folder / "run/evaluate/table.md").read_text()


@pytest.mark.parametrize("facts, message", [
    ({"cfg_scale": 3.0}, "cfg_scale 3.0, wanted 1.0, as the config has"),
    ({"n": 50}, "n 50, wanted 4, as the config has"),
    ({"teacher": "0123abcd"}, "distilled from teacher 0123abcd"),
    ({}, "names: got 3; wanted 2, one for each student"),
])
def test_students_that_cannot_be_compared_are_refused(run, facts, message):
    good = write_student(run.folder / "good.safetensors", run.weights, 0)
    bad = write_student(run.folder / "bad.safetensors", run.weights, 0, **facts)
    with pytest.raises(ValueError, match=message):
        run("--students", f"{good},{bad}", *(() if facts else ("--names=a,b,c",)))


def test_two_ranks_make_the_table_and_the_videos_of_one(run, run_stage):
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    out, one = run.folder / "run/evaluate", run()
    wall = read_video(out / "videos.mp4")
    run_stage("evaluate", run.config, ranks=2)
    two = json.loads((out / "table.json").read_text())
    assert two["command"].startswith("torchrun --nproc-per-node=2 evaluate.py")
    assert [row["label"] for row in two["rows"]] == [row["label"] for row in one["rows"]]
    for ours, theirs in zip(two["rows"], one["rows"], strict=True):
        for name in ("endpoint", "energy", "sliced", "hf", "all"):  # another batch: last bits
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)
    assert (read_video(out / "videos.mp4") - wall).abs().mean() < 0.005  # H.264, too
    alone = run_stage("evaluate", run.config, "count=3", ranks=4, check=False)
    assert alone.returncode == 1 and "count: got 3; wanted at least one for each" in alone.stderr


def test_latents_that_are_not_finite_are_refused_by_the_model_s_name(ranks):
    def broken(x, t, cond):
        return x / 0

    noise, conds = torch.ones(3, 16, 1, 2, 2), [{"text": torch.ones(1, 2)}] * 3
    with pytest.raises(ValueError, match="student@1: its latents hold NaN or infinity"):
        evaluate.sample_model("student@1", broken, [1.0, 0.0], noise, conds, None,
                              evaluate.Config(), torch.device("cpu"))


@pytest.mark.parametrize("options, message", [
    (("--count", "2"), "count: got 2; wanted 3"),
    (("--prompts", "nowhere.txt"), "nowhere.txt: no such prompt file"),
    (("--frames", "8"), "frames: .*got 8"),
    (("--prompt", "x"), "unknown option '--prompt'; did you mean 'prompts'"),
    (("--students", "nowhere.safetensors"), "nowhere.safetensors: .*`python distill.py CONFIG`"),
])
def test_bad_options_are_refused_by_name(run, options, message):
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*options)
