"""The paper's tables and figures: verdicts against closed forms, runs that are done once, and
what a teacher's features tell."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
import synvid
from common.files import ROOT, write_json
from common.ranks import generator
from tools import runs, tables, taps
from tools.runs import Job, Plan, compare, even_key, is_done, run_jobs, uniform_key
from model import time_grid
from small_world import clips as world

# --------------------------------------------------------------------------------- statistics

def test_a_verdict_is_the_paired_interval_s():
    better = compare([1.0, 2.0, 3.0], [1.5, 2.4, 3.6])
    assert better["difference"] == pytest.approx(-0.5) and better["pairs"] == 3
    assert better["half"] == pytest.approx(4.303 * 0.1 / 3 ** 0.5)  # t with 2 degrees of freedom
    assert better["verdict"] == "holds"
    assert compare([1.5, 2.4, 3.6], [1.0, 2.0, 3.0])["verdict"] == "does not hold"
    assert compare([1.0, 2.0, 3.0], [1.1, 1.9, 3.05])["verdict"] == "cannot be told"
    assert compare([1.0], [9.0]) == {"difference": -8.0, "half": None, "pairs": 1,
                                     "verdict": "cannot be told"}
    assert compare([1.0, 2.0, 3.0, 4.0], [2.0, 3.1])["pairs"] == 2  # the seeds that both have


def test_pairing_sees_what_the_spread_over_seeds_would_hide():
    theirs = [0.0, 10.0, 20.0, 30.0, 40.0]
    assert compare([x - 0.1 - 0.01 * i for i, x in enumerate(theirs)], theirs)["verdict"] == "holds"


def test_the_interval_covers_the_truth_in_19_of_20_draws():
    for count in (3, 5, 20):
        draws = torch.randn(2000, 2, count, generator=generator("cover", count)).tolist()
        right = sum(compare(*pair)["verdict"] == "cannot be told" for pair in draws)
        assert 0.93 < right / 2000 < 0.97, count


def row(label: str, far: float) -> dict:
    values = {"endpoint": far, "energy": far, "sliced": 0.1 + far, "hf": 1 - far,
              "spread": 1 + far, "c2st": 0.5 + far}
    return {"label": label, "evaluations": 2, **{k: (v, 0.01) for k, v in values.items()}}


def test_shortfalls_are_0_for_the_teacher_and_grow_on_both_sides_of_1():
    best = row("teacher@50", 0.0)
    for name, shortfall in runs.SHORTFALLS.items():
        assert shortfall(best, best) == (0.5 if name == "C2ST" else 0), name
        assert shortfall(row("a", 0.2), best) > shortfall(row("b", 0.1), best), name
    wide = row("a", 0.0) | {"hf": (1.3, 0.0), "spread": (0.8, 0.0)}
    assert runs.SHORTFALLS["HF from 1"](wide, best) == pytest.approx(0.3)
    assert runs.SHORTFALLS["spread from 1"](wide, best) == pytest.approx(0.2)


# ------------------------------------------------------------------------------ key timesteps

def test_the_uniform_key_timesteps_are_those_of_table_4():
    times = time_grid("hunyuan", 50, 7.0).tolist()
    key = uniform_key(times, 5)
    printed = [1, 0.8109, 0.6057, 0.3783, 0.2258, 0]
    assert [times[j] for j in [0, 31, 41, 46, 48, 50]] == pytest.approx(printed, abs=2e-4)
    assert key == [0, 32, 41, 46, 48, 50]  # .797 is nearer to .8 than the .811 that is printed
    with pytest.raises(ValueError, match="the uniform grid of 9 steps falls on .* take fewer"):
        uniform_key(times[-5:] + [0.0], 9)


def test_the_chosen_key_timesteps_are_evenly_spaced_indices():
    assert even_key(50, 5) == [0, 10, 20, 30, 40, 50]
    assert even_key(50, 3) == [0, 17, 33, 50] and even_key(50, 1) == [0, 50]


# --------------------------------------------------------------------------------------- runs

def plan_of(tmp_path: Path, at_once: int = 2) -> Plan:
    config = tmp_path / "config.yaml"
    config.write_text("seed: 0\nevaluate: {count: 3}\n")
    return Plan(str(config), tmp_path / "paper", (), (), ("python",), at_once, 1)


def job_of(plan: Plan, name: str, code: str, makes: str = "log.txt") -> Job:
    return Job(name, ("python", "-c", code), plan.folder / name, plan.config, makes)


def test_a_finished_run_is_not_done_again_and_another_command_is_refused(tmp_path):
    plan = plan_of(tmp_path)
    line = "import os; open('{}', 'a').write(os.environ['OMP_NUM_THREADS'])"
    marks = [tmp_path / name for name in "ab"]
    jobs = [job_of(plan, mark.name, line.format(mark)) for mark in marks]
    run_jobs(jobs, plan, "runs")
    run_jobs(jobs, plan, "runs")
    assert [mark.read_text() for mark in marks] == ["1", "1"]
    Path(plan.config).write_text("seed: 0\nevaluate: {count: 9}\n")  # of no concern to a run
    assert is_done(jobs[0].folder, list(jobs[0].command), plan.config)
    with pytest.raises(ValueError, match="done.json: got another command, .* or remove"):
        run_jobs([replace(jobs[0], command=("python", "-c", "1"))], plan, "runs")
    Path(plan.config).write_text("seed: 1\n")
    with pytest.raises(ValueError, match="done.json: got another settings"):
        run_jobs(jobs, plan, "runs")


def test_a_run_that_fails_is_named_with_its_log_and_the_others_are_stopped(tmp_path):
    plan = plan_of(tmp_path)
    slow = job_of(plan, "slow", "import time; time.sleep(600)")
    bad = job_of(plan, "bad", "raise SystemExit('no such teacher')")
    with pytest.raises(ValueError, match="bad: `python -c .* ended with 1, .*\n.*no such teacher"):
        run_jobs([slow, bad], plan, "runs")
    assert not (slow.folder / "done.json").exists()
    with pytest.raises(ValueError, match="mute: .* ended with 0, wanted 0 and student.safetensors"):
        run_jobs([job_of(plan, "mute", "1", "student.safetensors")], plan, "runs")


def test_runs_end_with_the_command_that_started_them(tmp_path):
    started = tmp_path / "started"
    code = f"""
from pathlib import Path
from evaluation.paper import Job, Plan, run_jobs
line = "import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
folder = Path({str(tmp_path)!r}) / "slow"
job = Job("slow", ("python", "-c", line), folder, "configs/tiny.yaml", "x")
run_jobs([job], Plan("", Path("."), (), (), (), 1, None), "runs")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (started.exists() and started.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


# ------------------------------------------------------------------------------------- tables

SETTINGS = tables.Settings(n=50, times=time_grid("wan", 50, 2.0).tolist(), m=2, m_config=5,
                           ladder=[5, 2, 1], seeds=3, baseline_seeds=2, iterations=80, clips=True)


def write_measured(plan: Plan, name: str, far: list[float]) -> None:
    folder = plan.folder / name / "evaluate"
    rows = [row("teacher@50", 0.0), row("teacher@2", 0.9),
            *(row(f"student@2 #{i}", x) for i, x in enumerate(far, 1)),
            row("student@2, mean of 3", 99.0)]
    write_json(folder / "table.json", {"rows": rows, "command": "python evaluate.py"})


def test_table_3_has_a_row_for_every_arm_and_a_verdict_for_every_claim(tmp_path):
    plan, noise = plan_of(tmp_path), [0.0, 0.01, 0.02]
    for arm in tables.arms_of("table3", SETTINGS):
        base = {"traj-m2": 0.3, "shared-m2": 0.2, "full-m2": 0.1}.get(arm.name, 0.5)
        base += 0.2 * arm.name.endswith("-mismatched")
        write_measured(plan, arm.name, [base + x for x in noise[:arm.seeds]])
    section = tables.table3(plan, SETTINGS)
    claims = {entry["claim"]: entry for entry in section.numbers["claims"]}
    assert len(claims) == 3 + 9 + 3
    for entry in claims.values():
        assert all(entry[name]["verdict"] == "holds" for name in runs.SHORTFALLS), entry
    one = claims["full nearer than phased consistency on clips of smaller objects"]
    assert one["C2ST"]["pairs"] == 2
    assert all(len(arm["seeds"]) == (2 if "-" in name and "m2" not in name else 3)
               for name, arm in section.numbers["arms"].items())
    text = "\n".join(section.lines)
    assert "| L_traj alone | 3 | 0.3100 ± 0.0058 |" in text and "| teacher@2 | | 0.9000 |" in text
    assert section.pictures == [plan.folder / "table3-m2.png"] and section.pictures[0].exists()


def test_all_baselines_share_the_clips_that_table_3_measures(tmp_path):
    plan = plan_of(tmp_path)
    jobs = [runs.train_job(plan, arm, 0) for arm in tables.arms_of("table3", SETTINGS)]
    clips = f"clips={runs.clips_folder(plan)}"
    assert [clips in job.command for job in jobs] == [False] * 3 + [True] * 9


def test_every_run_has_its_own_folder_and_tables_share_runs():
    runs = {}
    for table in tables.TABLES:
        for arm in tables.arms_of(table, SETTINGS):
            old = runs.setdefault(arm.name, arm)
            assert replace(old, seeds=arm.seeds) == arm
    assert {"full-m5", "full-m2", "full-m1", "uniform-m5", "uniform-m2", "adv-m2"} < runs.keys()
    assert "export_every=20" in runs["full-m2"].options
    assert not [name for name in runs if "matched" in name and "samples" in name]
    without = replace(SETTINGS, clips=False)
    assert {arm.name for arm in tables.baseline_arms(without)} == {
        "perflow-samples", "pcm-samples", "dmd-samples"}


@pytest.fixture
def study(make_config, tmp_path):
    """A config of a tiny teacher, its paper folder, and its evaluations' captions."""
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(world.make_captions(0, 0, 3, held_out=True)))
    config = make_config(
        n=4, key=[0, 2, 4], synvid={"count": 12, "batch": 4},
        distill={"iterations": 4, "batch": 4, "micro_batch": 4, "held_out": 2, "lr": 1e-3,
                 "head_dim": 8, "checkpointing": False},
        evaluate={"prompts": str(captions), "count": 4, "directions": 4, "c2st_steps": 1,
                  "seeds": 2, "jobs": 2, "steps": [2, 1]})
    return config, tmp_path / "run/paper"


def test_a_table_and_a_figure_are_one_command_that_goes_on_with_the_same_numbers(study):
    config, out = study
    argv = [str(config), "--paper", "table4,fig5", "options=lr=2e-3"]
    evaluate.main(argv)
    first = json.loads((out / "runs.json").read_text())
    arms = first["table4"]["arms"]
    assert [len(arm["seeds"]) for arm in arms.values()] == [2, 2]
    assert arms["full-m2"]["seeds"][0] != arms["full-m2"]["seeds"][1]
    assert first["fig5"]["prompts"] == 12 and first["fig5"]["words"]["100 %"] == 5
    assert "lr=2e-3" in (out / "full-m2/seed1/distill/config.yaml").read_text() or (
        "lr: 0.002" in (out / "full-m2/seed1/distill/config.yaml").read_text())
    page = (out / "report.html").read_text()
    assert "://" not in page and page.count('src="data:image/png') == 2
    assert "cannot be told" in page + (out / "runs.md").read_text()

    done = {path: path.stat().st_mtime_ns for path in out.rglob("done.json")}
    assert len(done) == 1 + 4 + 2  # SynVid, runs, evaluations
    for gone in ("uniform-m2/seed1", "uniform-m2/evaluate"):  # as if it had been killed there
        (out / gone / "done.json").unlink()
    (out / "uniform-m2/seed1/student.safetensors").unlink()
    shutil.rmtree(out / "uniform-m2/seed1/distill")
    evaluate.main(argv)
    again = json.loads((out / "runs.json").read_text())

    def without_seconds(tree):
        if isinstance(tree, dict):
            return {k: without_seconds(v) for k, v in tree.items() if "seconds" not in k}
        return [without_seconds(v) for v in tree] if isinstance(tree, list) else tree

    assert without_seconds(again["table4"]) == without_seconds(first["table4"])
    changed = {str(path.relative_to(out).parent) for path, when in done.items()
               if path.stat().st_mtime_ns != when}
    assert changed == {"uniform-m2/seed1", "uniform-m2/evaluate"}


@pytest.mark.parametrize("options, message", [
    (("--paper", "table9"), "paper: got 'table9'; wanted all, or of ladder, table3"),
    (("--paper", "table3", "seeds=0"), "seeds: got 0; wanted 1 ≤ seeds"),
    (("--paper", "table3", "paper_m=9"), "got 9; wanted 1 … 4"),
    (("--paper", "table3", "options=lambada_adv=1"), "unknown option 'lambada_adv=1'; did you"),
])
def test_a_paper_command_that_cannot_be_run_is_refused_first(study, options, message):
    config, out = study
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate.main([str(config), *options])
    assert not list(out.rglob("*.safetensors"))


# ----------------------------------------------------------------------------------- features

def test_a_probe_tells_shifted_features_and_is_at_chance_on_the_same():
    x, y = (torch.randn(200, 12, generator=generator(name)) for name in "xy")
    assert abs(taps.probe_accuracy(x, y) - 0.5) < 0.12
    shifted = y + torch.linspace(0, 2, 12)
    assert taps.probe_accuracy(x, shifted) > 0.9
    assert taps.probe_accuracy(3 * x + 7, 3 * shifted + 7) == taps.probe_accuracy(x, shifted)


def test_a_head_tells_a_pattern_in_features_and_is_at_chance_without():
    cfg = taps.Config(head_dim=8, lr_heads=1e-2, batch=16, updates=40)
    x, y = (torch.randn(96, 2, 6, 4, 4, generator=generator(name)) for name in "xy")
    assert abs(taps.head_accuracy(cfg, x, y, (0, 0)) - 0.5) < 0.16
    assert taps.head_accuracy(cfg, x, y + torch.tensor([1.0, -1.0]).repeat(2), (0, 0)) > 0.9


def test_the_first_component_is_the_pattern_that_was_planted():
    pattern = torch.rand(2, 4, 5, generator=generator("pattern"))
    direction = torch.randn(7, generator=generator("direction"))
    features = pattern[:, None] * direction.view(1, 7, 1, 1) + 3
    got = taps.first_component(features)
    want = (pattern - pattern.min()) / (pattern.max() - pattern.min())
    assert torch.allclose(got, want, atol=1e-4) or torch.allclose(1 - got, want, atol=1e-4)


def test_what_blocks_tell_is_one_command(study, ranks, tmp_path, capsys):
    config, _ = study
    synvid.main([str(config)])
    taps.main([str(config), "videos=8", "--blocks", "1,5", "updates=2"])
    found = json.loads((tmp_path / "run/taps/taps.json").read_text())
    assert found["D7"] == [3, 5]
    assert [(entry["k"], entry["block"]) for entry in found["found"]] == [
        (0, 1), (0, 5), (1, 1), (1, 5)]
    for entry in found["found"]:
        assert 0 <= entry["probe"] <= 1 and torch.tensor(entry["picture"]).shape == (1, 1)
    assert (tmp_path / "run/taps/taps.png").exists()
    assert "t'_1 = 0.781: a head is best at block" in capsys.readouterr().out
    for option, message in (("videos=13", "videos: expected 8 … 12.*got 13"),
                            ("blocks=6", "blocks: expected some of 0 … 5, got .6.")):
        with pytest.raises(ValueError, match=message):
            taps.main([str(config), "videos=8", option])


