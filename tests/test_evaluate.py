"""evaluate.py: each metric against a case whose answer is known, and the table end to end."""

import html
import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_sample import KEY, N, write_student
from pixels import read_video
from safetensors.torch import load_file
from torch import Tensor

import evaluate
from artifacts.student import facts_in, load_student
from common.ranks import generator
from common.video import write_image
from evaluation.measures import (
    c2st, distances, edge_correlation, endpoint_error, energy_distance, gates, is_small_world,
    mean_row, projections, set_distances, sliced_wasserstein, spread)
from evaluation.page import choose_examples, html_of
from evaluation.sheets import data_uri
from evaluation.statistics import jackknife_error, leave_one_out, mean_and_error
from small_world.clips import make_captions, make_clips
from small_world.oracle import caption_attributes, high_frequency, oracle_hits
from tools.bench import allocated


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


def test_energy_distance_is_unbiased_and_detects_a_shift_of_gaussians():
    same = [energy(normal(48, 6, key=f"x{i}"), normal(48, 6, key=f"y{i}")) for i in range(40)]
    mean, error = mean_and_error(torch.tensor(same))
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
    mean, error = mean_and_error(torch.tensor(draws))
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


def test_jackknife_of_the_energy_distance_estimates_its_spread():
    found = []
    for i in range(60):
        x, y = normal(40, 5, key=f"x{i}"), normal(40, 5, key=f"y{i}") + 0.3
        energy = set_distances(x, y, 1)["energy"]
        found.append((energy(torch.arange(40)), jackknife_error(leave_one_out(energy, 40))))
    values, errors = torch.tensor(found).T
    assert 0.7 < float(errors.mean() / values.std()) < 1.5


def test_edge_correlation_depends_on_the_place_of_edges_not_on_their_strength():
    video = make_clips(0, 0, 2)[0]
    assert edge_correlation(0.5 * video[0] + 0.1, video[0]) == pytest.approx(1, abs=1e-4)
    assert edge_correlation(-video[0], video[0]) == pytest.approx(-1, abs=1e-4)
    assert abs(edge_correlation(video[0].roll(5, -1), video[0])) < 0.5
    assert edge_correlation(video[1], video[0]) < 0.7  # of the same strength, elsewhere


def test_high_frequency_energy_falls_with_blur_and_scales_with_the_square():
    video = make_clips(0, 0, 4)[0]
    blurred = torch.nn.functional.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1))
    sharp = high_frequency(video)
    assert high_frequency(blurred) < 0.5 * sharp
    assert high_frequency(0.5 * video) == pytest.approx(0.25 * sharp)
    assert high_frequency(torch.ones(1, 3, 1, 16, 16)) < 1e-10


def test_spread_is_the_ratio_of_variances_over_videos():
    x, i = normal(40, 3, 2), torch.arange(40)
    assert spread(0.5 * x + 7, x)(i) == pytest.approx(0.25)
    want = x[:9].var(0).sum() / normal(40, 3, 2, key="y")[:9].var(0).sum()
    assert spread(x, normal(40, 3, 2, key="y"))(i[:9]) == pytest.approx(float(want))


def test_c2st_is_half_for_one_distribution_and_near_one_for_a_pattern():
    x, y, cpu = normal(48, 4, 1, 4, 4), normal(48, 4, 1, 4, 4, key="y"), torch.device("cpu")
    same, error = c2st(x, y, 40, cpu)
    assert abs(same - 0.5) < 3 * error and error == pytest.approx((same * (1 - same) / 96) ** 0.5)
    assert c2st(x, y, 2, cpu) == c2st(x, y, 2, cpu)  # a function of its seeds
    accuracy, error = c2st(x + torch.tensor([1.0, -1.0]).repeat(2), y, 40, cpu)
    assert accuracy > 0.9 and error < 0.05


# ------------------------------------------------------------------------- the oracle and gates

def test_the_oracle_is_used_for_small_world_captions_only():
    cfg = evaluate.Config()
    captions = make_captions(0, 0, 5, held_out=True)
    assert is_small_world(captions, cfg)
    assert not is_small_world([*captions, "a fox in the snow"], cfg)
    assert not is_small_world(captions, evaluate.Config(width=64))


def test_the_oracle_reads_a_drawn_clip_and_rejects_another_caption():
    video, captions, _ = make_clips(0, 0, 1)
    hits = oracle_hits(video, captions)
    assert hits == {"colour": True, "shape": True, "direction": True, "all": True}
    blank = oracle_hits(torch.zeros_like(video), captions)
    assert not blank["all"] and not blank["shape"]


def row(label: str, endpoint: float, energy: float, hf: float, right: float = 1.0) -> dict:
    values = {"endpoint": endpoint, "energy": energy, "sliced": 0.1, "hf": hf, "all": right}
    return {"label": label, "kind": "student", "m": 5, "evaluations": 5, "seconds": 0.1,
            "decode_seconds": 0.03, **{name: (value, 0.01) for name, value in values.items()}}


def passes(teacher_n: dict, teacher_m: dict, student: dict) -> list[bool]:
    return [gate["pass"] for gate in gates(teacher_n, teacher_m, student)]


def test_gates_pass_a_good_student_and_fail_one_by_one():
    teachers = row("teacher@50", 0, 0, 1, 0.95), row("teacher@5", 0.08, 0.03, 0.7)
    assert passes(*teachers, row("student@5", 0.02, 0.001, 1.03)) == [True] * 5
    assert passes(*teachers, row("student@5", 0.05, 0.031, 1.06))[2:] == [False, False, False]
    assert passes(*teachers, row("student@5", 0.02, -0.04, 0.94))[2:] == [True, False, False]
    poor = row("teacher@50", 0, 0, 1, 0.85), row("teacher@5", 0.08, 0.03, 0.9)
    assert passes(*poor, row("student@5", 0.02, 0.001, 1.0))[:2] == [False, False]


def test_the_mean_of_students_has_the_error_over_students():
    mean = mean_row([row("student@5 #1", 0.02, 0.0, 1.0), row("student@5 #2", 0.04, 0.0, 1.1)])
    assert (mean["label"], mean["kind"], mean["m"]) == ("student@5, mean of 2", "mean", 5)
    assert mean["endpoint"] == pytest.approx((0.03, 0.01))
    assert mean["hf"] == pytest.approx((1.05, 0.05)) and mean["seconds"] == pytest.approx(0.1)
    assert mean["endpoint"][0] == pytest.approx(0.03, rel=1e-14)  # in float64
    one = mean_row([row("student@5", 0.02, 0.0, 1.0)])
    assert one["endpoint"] == (0.02, None)


# ---------------------------------------------------------------------------------- the examples

def test_the_examples_are_at_the_quantiles_of_the_errors():
    errors = torch.arange(21.0).flip(0)  # the video at place i has rank 20 − i
    examples = choose_examples(errors, [str(i) for i in range(21)])
    notes = [f" ({q} quantile)" for q in (".5", ".8", ".9", ".95", "1")]
    assert list(examples.items()) == list(zip((10, 4, 2, 1, 0), notes, strict=True))


def test_a_caption_is_an_example_once_at_the_highest_of_its_quantiles():
    errors, last = torch.tensor([0.4, 0.1, 0.3, 0.2]), " (1 quantile)"
    assert choose_examples(errors, ["a", "b", "c", "d"]) == {2: " (.8 quantile)", 0: last}
    assert choose_examples(errors, ["a", "b", "a", "d"]) == {0: last}
    assert choose_examples(errors[:1], ["a"]) == {0: last}


def test_the_small_world_s_examples_show_each_colour_and_shape_at_their_median_error():
    captions = make_captions(0, 0, 144, held_out=True)
    examples = choose_examples(torch.arange(144.0), captions)
    shown = [caption_attributes(captions[i]) for i in examples]
    assert [a["colour"] for a in shown] == list(range(6)) and set(examples.values()) == {""}
    assert [a["shape"] for a in shown] == [0, 1, 2, 0, 1, 2]
    first = [i for i, text in enumerate(captions) if "red" in text and "ball" in text]
    assert next(iter(examples)) == sorted(first)[len(first) // 2]


# ------------------------------------------------------------------------------------ end to end

def write_config(folder: Path, weights: Path) -> Path:
    """A small evaluation: its captions and its config."""
    captions, path = folder / "captions.txt", folder / "config.yaml"
    captions.write_text("\n".join(make_captions(0, 0, 3, held_out=True)))
    path.write_text(yaml.safe_dump({
        "weights": str(weights), "run": str(folder / "run"), "height": 16, "width": 16,
        "frames": 5, "n": N, "key": KEY, "device": "cpu", "evaluate": {
            "prompts": str(captions), "count": 4, "batch": 3, "directions": 8, "c2st_steps": 2}}))
    return path


@pytest.fixture
def run(tiny_weights, tmp_path, ranks):
    """evaluate.main for a small config: run(options…) -> table.json."""
    config = write_config(tmp_path, tiny_weights)

    def main(*options: str) -> dict:
        evaluate.main([str(config), *options])
        return json.loads((tmp_path / "run/evaluate/table.json").read_text())

    main.folder, main.weights = tmp_path, tiny_weights
    return main


@pytest.fixture(scope="module")
def finished(tiny_weights, tmp_path_factory, run_stage):
    """An evaluation with pictures of a student that is its teacher: config, folder, table, page,
    what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, tiny_weights)
    write_student(folder / "run/student.safetensors", tiny_weights, 0)
    write_image(folder / "run/distill/curves.png", torch.zeros(3, 8, 8))
    printed, out = run_stage("evaluate", config).stdout, folder / "run/evaluate"
    return SimpleNamespace(
        config=config, folder=folder, out=out, table=json.loads((out / "table.json").read_text()),
        page=(out / "report.html").read_text(encoding="utf-8"), printed=printed)


def test_the_table_of_a_student_that_is_its_teacher(finished):
    table, out = finished.table, finished.out
    teacher_n, teacher_m, student = table["rows"]
    assert [r["label"] for r in table["rows"]] == ["teacher@4", "teacher@2", "student@2"]
    assert [r["kind"] for r in table["rows"]] == ["teacher_n", "teacher_m", "student"]
    assert [r["evaluations"] for r in table["rows"]] == [r["m"] for r in table["rows"]] == [4, 2, 2]
    assert teacher_n["endpoint"] == [0, 0] and teacher_n["hf"] == [1, 0]
    assert teacher_m["endpoint"][0] > 0
    assert teacher_n["energy"] == teacher_n["sliced"] == [0, 0] and teacher_n["hf"] == [1, 0]
    assert teacher_n["edges"] == pytest.approx([1, 0], abs=1e-4)
    assert teacher_m["edges"][0] < 0.999
    for name in ("endpoint", "energy", "sliced", "hf", "edges", "all"):
        assert student[name] == teacher_m[name]
        assert len(student["left"][name]) == table["config"]["count"]
    assert len(table["gates"]) == 5 and table["command"].startswith("python evaluate.py ")
    names = {"config.yaml", "report.html", "table.json", "table.md", "table.png",
             "teacher.safetensors"}
    assert {p.name for p in out.iterdir()} == names | {f"videos.{s}" for s in ("gif", "mp4", "png")}
    frames = [read_video(out / f"videos.{suffix}").shape[1] for suffix in ("gif", "mp4")]
    assert frames == [5, 5 * 6]  # the mp4 shows it six times: four seconds
    assert (out / "table.md").read_text() in finished.printed
    assert finished.printed.endswith(f"results: {out / 'report.html'}\n")


def test_the_page_needs_no_other_file_and_contains_everything(finished):
    page, table, out = finished.page, finished.table, finished.out
    assert "://" not in page and "url(" not in page and "$" not in page
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?(.{5})""", page)
    assert len(sources) == 1 + 2 + 1 and set(sources) == {"data:"}  # video, pictures, icon
    assert data_uri(finished.folder / "run/distill/curves.png") in page
    assert data_uri(out / "videos.png") in page and data_uri(out / "videos.mp4") in page
    assert str(finished.folder) not in re.sub("<footer.*", "", page, flags=re.DOTALL)
    text = html.unescape(page)
    for row in table["rows"]:
        assert row["label"] in text and f"{row['endpoint'][0]:.4f}" in text
    for gate in table["gates"]:
        assert gate["gate"] in text and f"{gate['measured']:.4f}" in text


def test_the_page_contains_no_markup_of_captions_and_omits_what_was_not_measured(run):
    student = write_student(run.folder / "other/student.safetensors", run.weights, 0)
    write_image(run.folder / "run/distill/curves.png", torch.zeros(3, 8, 8))  # not this student's
    bad = '<script>alert("1 & 2")</script> $n <img src=x>'
    (run.folder / "captions.txt").write_text(bad + "\n")
    table, out = run("--students", str(student)), run.folder / "run/evaluate"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img src=x" not in page and bad not in page
    assert table["gates"] == []
    assert "all" not in table["rows"][0] and "oracle" not in (out / "table.md").read_text()
    assert "How the student learned" not in page and page.count("<video") == 1


def test_a_gate_that_fails_is_marked_in_the_page_and_errors_are_small():
    text = "a `b` < c\n\n| gate | got | |\n|---|---|---|\n| x | 1 ± 0.2 | **FAIL** |\n"
    assert html_of(text) == (
        '<p>a b &lt; c</p>\n<div class="wide"><table><tr><td> gate <td> got <td> '
        "<tr><td> x <td> 1 <small>± 0.2</small> <td> <mark>FAIL</mark> </table></div>")


def test_students_of_several_key_timesteps_follow_their_own_teacher(run):
    files = {name: write_student(run.folder / f"{name}.safetensors", run.weights, 0, t_key=t_key)
             for name, t_key in (("a", [1.0, 0.0]), ("b", [1.0, 0.5, 0.0]), ("c", [1.0, 0.0]))}
    rows = run("--students", ",".join(str(files[name]) for name in "abc"))["rows"]
    assert [r["label"] for r in rows] == [
        "teacher@4", "teacher@1", "student@1 #1", "student@1 #2", "student@1, mean of 2",
        "teacher@2", "student@2"]
    for name in ("endpoint", "energy", "hf", "spread"):  # students that are their teacher
        assert rows[1][name] == rows[2][name] == rows[3][name] != rows[5][name] == rows[6][name]
    height = read_video(run.folder / "run/evaluate/videos.gif").shape[2]
    assert height == 58 + 5 * (128 + 24)  # of students with equal key timesteps the first is shown
    files["d"] = write_student(run.folder / "d.safetensors", run.weights, t_key=[1, .25, 0])
    rows = run("--students", f"{files['b']},{files['d']}", "pictures=false")
    assert [r["label"] for r in rows["rows"][1:]] == [
        "teacher@2 at 1, 0.5, 0", "student@2 at 1, 0.5, 0", "teacher@2 at 1, 0.25, 0",
        "student@2 at 1, 0.25, 0"]


def test_the_teacher_may_take_other_numbers_of_steps_by_either_solver(run):
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    rows = {row["label"]: row for row in run("--teacher_steps", "4,2", "pictures=false")["rows"]}
    assert list(rows) == ["teacher@4", "teacher@2", "student@2", "teacher@4 by euler",
                          "teacher@4 by unipc", "teacher@2 by euler", "teacher@2 by unipc"]
    assert rows["teacher@4 by euler"]["endpoint"][0] == 0  # the same grid
    found = [rows[f"teacher@{n} by {solver}"]["endpoint"][0] for n, solver in
             ((4, "unipc"), (2, "euler"), (2, "unipc"))]
    assert len(set(found)) == 3 and min(found) > 0
    assert rows["teacher@2 by unipc"]["evaluations"] == 2


def test_the_teacher_s_latents_are_read_again_unless_something_that_made_them_has_changed(
        run, monkeypatch):
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    plain, sampled = evaluate.sample_model, []

    def counted(cfg, label, *args, **options):
        sampled.append(label)
        return plain(cfg, label, *args, **options)

    monkeypatch.setattr(evaluate, "sample_model", counted)
    first = run("pictures=false")
    labels = ["teacher@4", "teacher@4, other noise", "teacher@2", "student@2"]
    assert sampled == labels
    sampled.clear()
    again = run("--directions", "8", "pictures=false")
    assert sampled == labels[2:]
    for row, before in zip(again["rows"], first["rows"], strict=True):
        assert all(row[name] == before[name] for name in row if "seconds" not in name)
    monkeypatch.setattr(evaluate.page, "write_report", lambda *_: None)
    for option in ("seed=1", "count=5", f"prompts={run.weights / 'prompts.txt'}", "batch=2"):
        sampled.clear()
        evaluate.main([str(run.folder / "config.yaml"), option])
        assert sampled == labels, option
    student = run.folder / "run/student.safetensors"  # a file of another kind is not replaced
    before = student.read_bytes()
    with pytest.raises(ValueError, match="student.safetensors: expected latents of teacher@4"):
        run(f"teacher_samples={student}")
    assert student.read_bytes() == before


def test_latents_of_many_large_videos_are_never_all_in_float64():
    x, y = normal(256, 16384).float(), normal(256, 16384, key="y").float()
    for work in (lambda: endpoint_error(x, y), lambda: distances(x, y), lambda: projections(x, 2),
                 lambda: spread(x, y)):
        _, _, peak = allocated(work)
        assert peak < 1.5 * x.nbytes  # x and y in float64 have 4 times the bytes of x


def test_an_interrupted_evaluation_continues_with_the_teacher_s_next_batch(run, monkeypatch):
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    expected, out = run("batch=2", "pictures=false"), run.folder / "run/evaluate"
    file = out / "teacher.safetensors"
    latents = load_file(file)
    file.unlink()
    plain, calls = evaluate.sample_batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(evaluate, "sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("batch=2", "pictures=false")
    again = run("batch=2", "pictures=false")
    assert len(calls) == 4 + 1 + 2 * 2  # the batch that was lost, teacher@2 and the student
    assert [x.name for x in out.iterdir() if x.name.startswith(".teacher")] == []
    assert min(facts_in(file)["seconds"]) > 0
    assert all(torch.equal(x, latents[label]) for label, x in load_file(file).items())
    for row, before in zip(again["rows"], expected["rows"], strict=True):
        assert all(row[name] == before[name] for name in row if "seconds" not in name)


def test_several_students_have_a_row_each_and_one_of_their_mean(run, monkeypatch):
    """And one at a time is in memory."""
    earlier = []

    def load(*args):
        assert not any(student() for student in earlier)
        student = load_student(*args)
        earlier.append(weakref.ref(student))
        return student

    monkeypatch.setattr(evaluate, "load_student", load)
    a = write_student(run.folder / "a.safetensors", run.weights)
    b = write_student(run.folder / "b.safetensors", run.weights, 0)
    rows = run("--students", f"{a}, {b}", "--pictures", "false")["rows"]
    labels = [r["label"] for r in rows[2:]]
    assert labels == ["student@2 #1", "student@2 #2", "student@2, mean of 2"] and len(earlier) == 2
    for name in ("endpoint", "energy", "hf"):
        assert rows[4][name][0] == pytest.approx((rows[2][name][0] + rows[3][name][0]) / 2)


@pytest.mark.parametrize("facts, message", [
    ({"cfg_scale": 3.0}, "cfg_scale: expected the config's 1.0, got 3.0"),
    ({"n": 50}, "n: expected the config's 4, got 50"),
    ({"teacher": "0123abcd"}, "teacher 0123abcd"),
    ({}, "names: expected 2, one for each student, got 3"),
])
def test_students_that_cannot_be_compared_are_refused(run, facts, message):
    good = write_student(run.folder / "good.safetensors", run.weights, 0)
    bad = write_student(run.folder / "bad.safetensors", run.weights, 0, **facts)
    with pytest.raises(ValueError, match=message):
        run("--students", f"{good},{bad}", *(() if facts else ("--names=a,b,c",)))


def test_two_ranks_make_the_table_and_the_videos_of_one(finished, run_stage, tmp_path):
    student = f"students={finished.folder / 'run/student.safetensors'}"
    run_stage("evaluate", finished.config, f"run={tmp_path}", student, ranks=2)
    two = json.loads((tmp_path / "evaluate/table.json").read_text())
    assert two["command"].startswith("torchrun --nproc-per-node=2 evaluate.py")
    rows = finished.table["rows"]
    assert [row["label"] for row in two["rows"]] == [row["label"] for row in rows]
    for ours, theirs in zip(two["rows"], rows, strict=True):
        for name in ("endpoint", "energy", "sliced", "hf", "all"):  # another batch: last bits
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)
    ours, theirs = (read_video(out / "videos.mp4") for out in (tmp_path / "evaluate", finished.out))
    assert (ours - theirs).abs().mean() < 0.005  # H.264, too
    failed = run_stage("evaluate", finished.config, "count=3", ranks=4, check=False)
    assert failed.returncode == 1
    error = "count: expected at least one video for each of 4 ranks, got 3"
    assert failed.stderr.count(error) == 1


def test_latents_that_are_not_finite_are_refused_with_the_model_s_label(ranks):
    def broken(x, t, cond):
        return x / 0

    noise, conds = torch.ones(3, 16, 1, 2, 2), [{"text": torch.ones(1, 2)}] * 3
    with pytest.raises(ValueError, match="student@1: the latents contain NaN or infinity"):
        evaluate.sample_model(evaluate.Config(), "student@1", "student", broken, [1.0, 0.0], noise,
                              conds, None, torch.device("cpu"))


@pytest.mark.parametrize("options, message", [
    (("--count", "2"), "count: .*got 2"),
    (("--prompts", "nowhere.txt"), "nowhere.txt: "),
    (("--frames", "8"), "frames: .*got 8"),
    (("--prompt", "x"), "unknown option '--prompt'.*'prompts'"),
    (("--students", "nowhere.safetensors"), "nowhere.safetensors: .*distill.py"),
])
def test_bad_options_are_refused_by_name(run, options, message):
    write_student(run.folder / "run/student.safetensors", run.weights, 0)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*options)
