"""The paper's tables and figures: verdicts against closed forms, runs that are done once, and
what a teacher's features detect."""

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
import yaml
from processes import PATIENCE, start_script

import synvid
from common.config import load_config
from common.files import ROOT, write_json
from common.prompts import read_prompts
from common.ranks import generator
from common.weights import save_tensors
from model import time_grid
from small_world.clips import make_captions
from tools import paper, runs, tables, taps
from tools.runs import Measured, Plan, Run, is_done, run_all
from tools.tables import even_key, uniform_key

# --------------------------------------------------------------------------------- statistics

def row(label: str, far: float) -> dict:
    values = {"endpoint": far, "energy": far, "sliced": far, "hf": 1 - far, "edges": 1 - far,
              "floor": 1 - far, "spread": 1 + far, "c2st": 0.5 + far}
    kind = "student" if label.startswith("student") else "teacher_m"
    return {"label": label, "kind": kind, "m": 2, "evaluations": 2,
            **{name: (value, 0.01) for name, value in values.items()},
            "left": {name: [value] * 4 for name, value in values.items()}}


def arm(*far: float) -> Measured:
    """An arm whose students are so far from the teacher, one per seed, alike on all videos."""
    return Measured("an arm", row("teacher@50", 0.0), row("teacher@2", 0.0),
                    [row("student@2", value) for value in far], "")


def verdict(ours: list[float], theirs: list[float]) -> dict:
    return runs.compare(arm(*ours), arm(*theirs), "endpoint error")


def test_a_verdict_is_the_paired_interval_s():
    better = verdict([1.0, 2.0, 3.0], [1.5, 2.4, 3.6])
    assert better["difference"] == pytest.approx(-0.5) and better["pairs"] == 3
    assert better["half"] == pytest.approx(4.303 * 0.1 / 3 ** 0.5, rel=1e-3)  # 2 degrees of freedom
    assert better["verdict"] == "holds"
    assert verdict([1.5, 2.4, 3.6], [1.0, 2.0, 3.0])["verdict"] == "does not hold"
    assert verdict([1.0, 2.0, 3.0], [1.1, 1.9, 3.05])["verdict"] == "undecided"
    assert verdict([1.0], [9.0]) == {"difference": -8.0, "half": None, "pairs": 1, "p": None,
                                     "verdict": "undecided"}
    assert verdict([1.0, 2.0, 3.0, 4.0], [2.0, 3.1])["pairs"] == 2  # the seeds that both have


def test_pairing_sees_what_the_spread_over_seeds_would_hide():
    theirs = [0.0, 10.0, 20.0, 30.0, 40.0]
    assert verdict([x - 0.1 - 0.01 * i for i, x in enumerate(theirs)], theirs)["verdict"] == "holds"


def test_videos_that_disagree_widen_an_interval():
    ours, theirs = arm(0.10, 0.11, 0.12), arm(0.20, 0.21, 0.22)
    narrow = runs.compare(ours, theirs, "HF from 1")
    for student in ours.rows:
        student["left"]["hf"] = [0.9, 0.7, 1.1, 0.9]
    wide = runs.compare(ours, theirs, "HF from 1")
    assert narrow["verdict"] == "holds" and narrow["half"] < 1e-6 < wide["half"]
    assert wide["verdict"] == "undecided" and wide["difference"] == narrow["difference"]


def test_a_claim_is_corrected_for_all_claims_and_measures_of_its_table():
    ours, theirs = arm(0.10, 0.11, 0.13, 0.12), arm(0.20, 0.22, 0.21, 0.23)
    [alone] = runs.make_claims([("ours nearer than theirs", ours, theirs)])
    both = runs.make_claims([("ours nearer than theirs", ours, theirs),
                             ("theirs nearer than ours", theirs, ours)])
    for name in ("endpoint error", "floor from 1"):
        assert alone[name]["p"] <= alone[name]["holm"] <= both[0][name]["holm"]
    assert both[0]["energy"]["verdict"] == "holds"
    assert both[1]["energy"]["verdict"] == "does not hold"
    assert both[0]["C2ST"]["verdict"] == "holds" and both[0]["C2ST"]["half"] > 0.0196
    assert "**holds**" in "\n".join(runs.claim_lines(both))


def test_shortfalls_are_0_for_the_teacher_and_grow_on_both_sides_of_1():
    for name, (column, shortfall) in runs.SHORTFALLS.items():
        near, far, farther = (shortfall(row("a", x)[column][0]) for x in (0.0, 0.1, 0.2))
        assert near == (0.5 if name == "C2ST" else 0) and near < far < farther, name
    assert runs.SHORTFALLS["HF from 1"][1](1.3) == pytest.approx(0.3)
    assert runs.SHORTFALLS["spread from 1"][1](0.8) == pytest.approx(0.2)


# ------------------------------------------------------------------------------ key timesteps

def test_the_uniform_key_timesteps_are_those_of_table_4():
    times = time_grid("hunyuan", 50, 7.0).tolist()
    key = uniform_key(times, 5)
    printed = [1, 0.8109, 0.6057, 0.3783, 0.2258, 0]
    assert [times[j] for j in [0, 31, 41, 46, 48, 50]] == pytest.approx(printed, abs=2e-4)
    assert key == [0, 32, 41, 46, 48, 50]  # .797 is nearer to .8 than the .811 that is printed
    with pytest.raises(ValueError, match="the uniform grid of 9 steps: .* choose fewer"):
        uniform_key(times[-5:] + [0.0], 9)


def test_the_chosen_key_timesteps_are_evenly_spaced_indices():
    assert even_key(50, 5) == [0, 10, 20, 30, 40, 50]
    assert even_key(50, 3) == [0, 17, 33, 50] and even_key(50, 1) == [0, 50]


# --------------------------------------------------------------------------------------- runs

def plan_of(tmp_path: Path, at_once: int = 2) -> Plan:
    config = tmp_path / "config.yaml"
    config.write_text("seed: 0\nevaluate: {count: 3}\n")
    return Plan(str(config), tmp_path / "paper", (), (), (), ("python",), at_once)


def run_of(plan: Plan, name: str, code: str, output: str = "log.txt") -> Run:
    return Run(("python", "-c", code), plan.folder / name, output)


def test_a_finished_run_is_not_done_again_and_another_command_is_refused(tmp_path):
    plan = plan_of(tmp_path)
    line = "import os; open('{}', 'a').write(os.environ['OMP_NUM_THREADS'])"
    marks = [tmp_path / name for name in "ab"]
    started = [run_of(plan, mark.name, line.format(mark)) for mark in marks]
    run_all(started, plan, "runs")
    run_all(started, plan, "runs")
    assert [mark.read_text() for mark in marks] == ["1", "1"]
    (started[1].folder / started[1].output).unlink()  # its product is missing: it is made again
    run_all(started, plan, "runs")
    assert [mark.read_text() for mark in marks] == ["1", "11"]
    Path(plan.config).write_text("seed: 0\nevaluate: {count: 9}\n")  # of no concern to a run
    assert is_done(started[0], plan.config)
    synvid_run = run_of(plan, "synvid", "open('{}', 'w')".format(
        plan.folder / "synvid/manifest.json"), "manifest.json")
    run_all([synvid_run], plan, "runs")
    Path(plan.config).write_text("seed: 0\nsynvid: {count: 9}\n")  # which SynVid depends on
    assert is_done(started[0], plan.config)
    with pytest.raises(ValueError, match="done.json: expected settings"):
        is_done(synvid_run, plan.config)
    with pytest.raises(ValueError, match="done.json: expected command .* or remove"):
        run_all([replace(started[0], command=("python", "-c", "1"))], plan, "runs")
    Path(plan.config).write_text("seed: 1\n")
    with pytest.raises(ValueError, match="done.json: expected settings"):
        run_all(started, plan, "runs")


@pytest.mark.parametrize("launch", ["python", "torchrun --standalone --nproc-per-node=1"])
def test_a_tool_is_started_as_a_module_from_any_folder(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = replace(plan_of(tmp_path), launch=tuple(launch.split()))
    command = plan.command("common.files", plan.folder, "seed=1")  # a module that does nothing
    assert command == (*launch.split(), "-m", "common.files", plan.config, f"run={plan.folder}",
                       "seed=1")
    run_all([Run(command, plan.folder / "tool", "log.txt")], plan, "runs")
    assert plan.command("synvid.py", plan.folder)[-3] == os.path.relpath(ROOT / "synvid.py")


def test_a_run_that_fails_is_reported_with_its_log_and_the_others_are_stopped(tmp_path):
    plan = plan_of(tmp_path)
    slow = run_of(plan, "slow", "import time; time.sleep(600)")
    bad = run_of(plan, "bad", "raise SystemExit('no such teacher')")
    with pytest.raises(ValueError, match="/bad: `python -c .* status 0.*got 1: .*\n.*no such teac"):
        run_all([slow, bad], plan, "runs")
    assert not (slow.folder / "done.json").exists()
    with pytest.raises(ValueError, match="/mute: .* and student.safetensors, got 0"):
        run_all([run_of(plan, "mute", "1", "student.safetensors")], plan, "runs")


def test_runs_end_with_the_command_that_started_them(tmp_path):
    started = tmp_path / "started"
    code = f"""
from pathlib import Path
from tools.runs import Plan, Run, run_all
line = "import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
run = Run(("python", "-c", line), Path({str(tmp_path)!r}) / "slow", "x")
run_all([run], Plan("configs/tiny.yaml", Path("."), (), (), (), (), 1), "runs")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (started.exists() and started.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_a_hangup_that_nohup_ignores_ends_no_runs(tmp_path):
    plan, before = plan_of(tmp_path), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_all([run_of(plan, "a", "import os; os.kill(os.getppid(), 1)")], plan, "runs")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (plan.folder / "a/done.json").exists()


# ------------------------------------------------------------------------------------- tables

SETTINGS = tables.Settings(n=50, times=time_grid("wan", 50, 2.0).tolist(), m=2, m_config=5,
                           ladder=[5, 2, 1], seeds=range(3), other_seeds=range(2), iterations=80,
                           lr=2e-4, lambda_adv=0.1, clips=True, traj_lr=4e-4, shared_lambda=0.15,
                           methods={"perflow": [2e-3, 160], "pcm": [6e-4, 80], "dmd": [2e-4, 80]})


def write_measured(plan: Plan, name: str, far: list[float]) -> None:
    folder = plan.folder / name / "evaluate"
    rows = [row("teacher@50", 0.0), row("teacher@2", 0.9),
            *(row(f"student@2 #{i}", x) for i, x in enumerate(far, 1)),
            row("student@2, mean of 3", 99.0) | {"kind": "mean"}]
    write_json(folder / "table.json", {"rows": rows, "command": "python evaluate.py"})


def test_table_3_has_a_row_for_every_arm_and_a_verdict_for_every_claim(tmp_path):
    plan, noise = plan_of(tmp_path), [0.0, 0.01, 0.02]
    parts = {"traj-m2": 0.6, "traj-rate-m2": 0.5, "shared-m2": 0.4, "shared-dose-m2": 0.3,
             "full-m2": 0.2, "full-rate-m2": 0.1}
    for table in ("table3", "methods"):
        for arm in tables.arms_of(table, SETTINGS):
            base = parts.get(arm.name, 0.8 - 0.1 * arm.name.endswith("-samples")
                             + 0.2 * arm.name.endswith("-mismatched"))
            write_measured(plan, arm.name, [base + x for x in noise[:len(arm.seeds)]])
        section = tables.arms_table(plan, SETTINGS, table)
        claims = {entry["claim"]: entry for entry in section.numbers["claims"]}
        assert len(claims) == {"table3": 6, "methods": 10 + 6}[table]
        for entry in claims.values():
            assert {entry[name]["verdict"] for name in runs.SHORTFALLS} == {"holds"}, entry
        assert {len(arm["seeds"]) for arm in section.numbers["arms"].values()} == (
            {3} if table == "table3" else {3, 2})
        assert section.pictures == [plan.folder / f"{table}-m2.png"]
        assert section.pictures[0].exists()
        text = "\n".join(section.lines)
        if table == "table3":
            assert "| L_traj alone | 3 | 0.6100 ± 0.0058 |" in text
            assert "| teacher@2 |  | 0.9000 |" in text
    one = claims["full nearer than phased consistency on clips of smaller objects"]
    assert one["C2ST"]["pairs"] == 2
    shares = tables.data_shares(section.numbers["arms"], SETTINGS)
    for found in shares.values():
        assert sum(found.values()) == pytest.approx(1)
        assert found["mismatch"] == pytest.approx(0.2 / 1.005)


def test_controls_and_other_methods_take_the_settings_that_the_search_chose(tmp_path):
    plan = plan_of(tmp_path)
    commands = {arm.name: plan.train(arm, 0).command for table in ("table3", "methods")
                for arm in tables.arms_of(table, SETTINGS)}
    assert {name for name, command in commands.items() if "lr=0.0004" in command} == {
        "traj-rate-m2", "full-rate-m2"}
    assert "lambda_adv=0.15" in commands["shared-dose-m2"]
    assert {"lr=0.002", "iterations=160"} < set(commands["perflow-matched"])
    # All share the clips whose distance to the teacher's the page shows.
    clips = f"clips={plan.folder / 'clips'}"
    assert {name for name, command in commands.items() if clips in command} == {
        name for name, command in commands.items() if "tools.baselines" in command}
    simulated = [name for name, command in commands.items() if "method=dmd" in command
                 and "simulate=false" not in command]
    assert simulated == ["dmd-captions"]


def test_every_method_is_searched_alike_on_other_captions_noise_and_seeds(tmp_path):
    plan = replace(plan_of(tmp_path), evaluation=("prompts=a",),
                   search_evaluation=("prompts=b",))
    arms = tables.arms_of("search", SETTINGS)
    by_method = {}
    for arm in arms[3:]:
        options = dict(option.split("=") for option in arm.options)
        by_method.setdefault(arm.name.split("/")[1].split("-")[0], set()).add(
            (options["lr"], options["iterations"]))
        assert arm.seeds == range(100, 101)
    assert set(map(frozenset, by_method.values())) == {frozenset(
        (lr, iterations) for lr in ("0.0002", "0.0006", "0.002") for iterations in ("80", "160"))}
    assert by_method.keys() == {"traj", "full", *tables.METHODS}
    assert [option for arm in arms[:3] for option in arm.options if "lambda" in option] == [
        "lambda_adv=0.1", "lambda_adv=0.15", "lambda_adv=0.2"]
    [evaluation] = tables.evaluations_of("search", SETTINGS, plan)
    command = evaluation.command
    assert "prompts=b" in command and "prompts=a" not in command
    assert "seed100/student.safetensors" in " ".join(command)

    folder = plan.folder / "search"
    write_measured(plan, "search", [0.1 + i / 100 for i in range(len(arms))])
    for arm in arms:
        path = plan.student(arm, 100).parent / "distill/log.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"step": i, "grad_adv": i}) + "\n" for i in (1, 2))
                        if "shared" in arm.name else "")
    section = tables.search_table(plan, SETTINGS)
    assert len(section.numbers["rows"]) == len(arms) == 33 and folder.exists()
    assert set(section.numbers["doses"].values()) == {1.5} and len(section.numbers["doses"]) == 3


def test_every_run_has_its_own_folder_and_tables_share_runs():
    arms = {}
    for table in (*tables.TABLES, "search"):
        for arm in tables.arms_of(table, SETTINGS):
            old = arms.setdefault(arm.name, arm)
            assert replace(old, seeds=arm.seeds) == arm
    assert {"full-m5", "full-m2", "full-m1", "uniform-m5", "uniform-m2", "adv-m2"} < arms.keys()
    assert "export_every=20" in arms["full-m2"].options
    assert not [name for name in arms if "matched" in name and "samples" in name]
    without = replace(SETTINGS, clips=False)
    assert {arm.name for arm in tables.method_arms(without)} == {
        "perflow-samples", "pcm-samples", "dmd-captions", "dmd-samples"}


@pytest.fixture
def study(make_config, tmp_path):
    """A config of a tiny teacher, its paper folder, and its evaluations' captions."""
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(make_captions(0, 0, 3, held_out=True)))
    config = make_config(
        n=4, key=[0, 2, 4], synvid={"count": 12, "batch": 4},
        distill={"iterations": 4, "batch": 4, "micro_batch": 4, "held_out": 2, "lr": 1e-3,
                 "head_dim": 8, "checkpointing": False},
        evaluate={"prompts": str(captions), "count": 4, "directions": 4, "c2st_steps": 1},
        paper={"seeds": 2, "other_seeds": 2, "jobs": 2, "steps": [2, 1]})
    return config, tmp_path / "run/paper"


class Forked:
    """A command of runs.start, forked from a process that has imported torch; as a Popen."""

    def __init__(self, command: tuple[str, ...], log: Path, one_thread: bool):
        log.parent.mkdir(parents=True, exist_ok=True)
        ranks = [int(word.split("=")[1]) for word in command if word.startswith("--nproc")]
        _, script, *args = [word for word in command if not word.startswith("--")]
        self.processes = start_script(Path(script), *args, ranks=sum(ranks) or 1,
                                      outputs=(log, log))
        self.returncode = None

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        self.returncode = None if None in codes else next(filter(None, codes), 0)
        return self.returncode

    def terminate(self) -> None:
        for process in self.processes:
            process.terminate()

    def wait(self) -> None:
        for process in self.processes:
            process.join()


def without_seconds(tree):
    """A JSON value without what the clock decides."""
    if isinstance(tree, dict):
        return {k: without_seconds(v) for k, v in tree.items() if "seconds" not in k}
    return [without_seconds(v) for v in tree] if isinstance(tree, list) else tree


def test_a_table_and_a_figure_are_one_command_that_resumes_with_the_same_numbers(
        study, monkeypatch):
    monkeypatch.setattr(runs, "start", Forked)
    config, out = study
    argv = [str(config), "--tables", "table4,fig5", "options=lr=2e-3", "--count", "3"]
    paper.main(argv)
    first = json.loads((out / "paper.json").read_text())
    arms = first["table4"]["arms"]
    assert [len(arm["seeds"]) for arm in arms.values()] == [2, 2]
    assert arms["full-m2"]["seeds"][0] != arms["full-m2"]["seeds"][1]
    assert first["fig5"]["prompts"] == 12 and first["fig5"]["words"]["100 %"] == 5
    trained, measured = (yaml.safe_load((out / path / "config.yaml").read_text())
                         for path in ("full-m2/seed1/distill", "full-m2/evaluate"))
    assert trained["lr"] == 2e-3 and trained["seed"] == 1
    assert (measured["count"], measured["directions"]) == (3, 4)  # of the command, of the file
    page = (out / "report.html").read_text()
    assert "://" not in page and page.count('src="data:image/png') == 2
    assert "undecided" in page

    done = {path: path.stat().st_mtime_ns for path in out.rglob("done.json")}
    assert len(done) == 1 + 4 + 2  # SynVid, runs, evaluations
    for unfinished in ("uniform-m2/seed1", "uniform-m2/evaluate"):  # as if killed there
        (out / unfinished / "done.json").unlink()
    (out / "uniform-m2/seed1/student.safetensors").unlink()
    shutil.rmtree(out / "uniform-m2/seed1/distill")
    paper.main(argv)
    again = json.loads((out / "paper.json").read_text())
    assert without_seconds(again["table4"]) == without_seconds(first["table4"])
    changed = {str(path.relative_to(out).parent) for path, when in done.items()
               if path.stat().st_mtime_ns != when}
    assert changed == {"uniform-m2/seed1", "uniform-m2/evaluate"}


@pytest.mark.parametrize("options, message", [
    (("--tables", "table9"), "tables: expected all, or some of ladder, table3"),
    (("seeds=0",), "seeds: .*got 0"),
    (("pcm=1e-3",), "pcm: expected a learning rate and a number of iterations"),
    (("m=9",), "expected 1 … 4, .* got 9"),
    (("key=0,1,4",), r"key: expected \[0, 2, 4\], .* got \[0, 1, 4\]: .*--m"),
    (("count=2",), "count: .*got 2"),
    (("options=lambada_adv=1",), "unknown option 'lambada_adv=1'.*lambda_adv"),
])
def test_a_paper_command_that_cannot_be_run_is_refused_first(study, options, message):
    config, out = study
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        paper.main([str(config), "--tables", "table3", *options])
    assert not list(out.rglob("*.safetensors"))


def test_fig5_is_of_synvid_s_prompts_and_alone_of_a_given_file(study, tmp_path):
    config, out = study
    (tmp_path / "own.txt").write_text("one two\none\n")
    trajectory = out / "synvid/000/000000.safetensors"
    save_tensors(trajectory, {"x": torch.zeros(1)}, {
        "synvid": json.dumps({"trajectory": {"prompt": "one two three"}})})

    def lengths(*options: str) -> tuple[int, int]:
        paper.main([str(config), "--tables", "fig5", *options])
        fig5 = json.loads((out / "paper.json").read_text())["fig5"]
        return fig5["prompts"], fig5["words"]["100 %"]

    assert lengths() == (1, 3)
    assert lengths(f"--prompts={tmp_path / 'own.txt'}") == (2, 2)
    trajectory.unlink()
    prompts = read_prompts(load_config(synvid.Config, "synvid", [str(config)]).prompts)
    assert lengths() == (len(prompts), max(len(prompt.text.split()) for prompt in prompts))
    assert not (out / "synvid/manifest.json").exists()


def test_other_tables_have_at_most_the_seeds_of_table_3(study):
    cfg = load_config(paper.Config, "paper", [str(study[0]), "seeds=1"])
    assert cfg.other_seeds == 2 and paper.read_settings(cfg)[2].other_seeds == range(1)


@pytest.mark.parametrize("name", ["launch", "options"])
def test_a_config_file_cannot_start_programs(name, make_config, tmp_path):
    config = make_config(paper={name: f"touch {tmp_path}/started"})
    with pytest.raises(ValueError, match=f"paper.{name}: expected on the command line only"):
        paper.main([str(config), "--tables", "fig5"])


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


def test_what_blocks_tell_is_one_command(study, ranks, tmp_path, capsys):
    config, _ = study
    synvid.main([str(config)])
    taps.main([str(config), "videos=8", "--blocks", "1,2", "updates=2"])
    found = json.loads((tmp_path / "run/taps/taps.json").read_text())
    assert found["D7"] == [1, 2]
    assert [(entry["k"], entry["block"]) for entry in found["found"]] == [
        (0, 1), (0, 2), (1, 1), (1, 2)]
    for entry in found["found"]:
        assert 0 <= entry["probe"] <= 1 and 0 <= entry["head"] <= 1
    assert (tmp_path / "run/taps/taps.png").exists()
    assert "t'_1 = 0.781: a head is best at block" in capsys.readouterr().out
    for option, message in (("videos=13", "videos: expected at least 8 .*SynVid's 12, got 13"),
                            ("blocks=3", "blocks: expected some of 0 … 2, got .3.")):
        with pytest.raises(ValueError, match=message):
            taps.main([str(config), "videos=8", option])


