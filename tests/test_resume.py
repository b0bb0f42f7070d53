"""A run of several ranks that loses one of them or a file, or resumes on other ranks."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from processes import PATIENCE, run_script, script_command
from safetensors.torch import load_file

from artifacts.trajectories import trajectory_path
from training import data as loading

KILLED = Path(__file__).parent / "killed_stage.py"
QUICK = {"iterations": 6, "batch": 4, "micro_batch": 2, "held_out": 2, "save_every": 2,
         "eval_every": 3, "lr": 1e-3, "head_dim": 8, "keep": 2, "export_dtype": "fp32"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_weights, run_stage):
    """A folder, a config, and in <folder>/full an uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("resume")
    config = {"weights": str(tiny_weights), "height": 16, "width": 32, "frames": 5, "n": 6,
              "key": [0, 2, 4, 6], "device": "cpu", "distill": QUICK,
              "synvid": {"prompts": str(tiny_weights / "prompts.txt"), "count": 10, "videos": 0}}
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    for stage, ranks in (("synvid", 1), ("distill", 2)):
        run_stage(stage, path, f"run={folder / 'full'}", ranks=ranks)
    return folder, path


def begun(folder: Path, run: Path) -> Path:
    """A run's folder with the trajectories of the undisturbed one."""
    run.mkdir()
    os.symlink(folder / "full/synvid", run / "synvid")
    return run


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "distill/log.jsonl").read_text().splitlines()]


def assert_same_bits(run: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "student.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["step"] for line in lines_of(run)] == list(range(1, 7))


@pytest.fixture(scope="module")
def killed(undisturbed, tmp_path_factory):
    """The folder of a run that was killed in iteration 5, after the checkpoint of iteration 4."""
    (folder, config), parent = undisturbed, tmp_path_factory.mktemp("killed")
    run = begun(folder, parent / "run")
    done = run_script(KILLED, parent / "mark", 1, "iteration", 5, 1, "distill", config,
                      f"run={run}", ranks=2)
    assert done.returncode == -signal.SIGKILL and (parent / "mark").exists()
    return run


def test_wherever_a_rank_is_killed_the_same_command_ends_with_the_same_bits(
        undisturbed, killed, run_stage, tmp_path):
    (folder, config), run = undisturbed, tmp_path / "run"
    shutil.copytree(killed, run, symlinks=True)
    for rank, place, count in ((1, "checkpoint", 150), (0, "publish", 1), (0, "export", 40)):
        done = run_script(KILLED, tmp_path / place, rank, place, count, 1, "distill", config,
                          f"run={run}", ranks=2)
        assert done.returncode == -signal.SIGKILL and (tmp_path / place).exists(), done.stderr
        assert not (run / "student.safetensors").exists()
    run_stage("distill", config, f"run={run}", ranks=2)
    assert_same_bits(run, folder / "full")


def test_torchrun_restarts_a_run_that_lost_a_rank_and_a_signal_to_it_saves_on_all_ranks(
        undisturbed, run_stage, tmp_path):
    folder, config = undisturbed
    run, mark = begun(folder, tmp_path / "run"), tmp_path / "mark"
    command = script_command(KILLED, mark, 1, "iteration", 3, 1, "distill", config, f"run={run}",
                             "iterations=1000", ranks=2,
                             torchrun=f"--max-restarts=1 --shutdown-timeout={PATIENCE} "
                                      "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = run / "distill/log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 2):  # restarted
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)  # SIGTERM is sent to one process in test_distill.py
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, out  # torchrun's own status after a signal that it passes on
    # torchrun reports the rank that ended first, by itself: the other only lost its connection
    assert mark.exists() and "failed (exitcode: -9) local_rank: 1 " in out, out
    assert "resuming from" in out and "rerun the same command to resume" in out
    saved, done = [p.name for p in (run / "distill").glob("step_*")], len(lines_of(run))
    assert max(saved) == f"step_{done:06d}"
    run_stage("distill", config, f"run={run}", f"iterations={max(done + 1, 6)}", ranks=2)
    lines, full = lines_of(run), lines_of(folder / "full")
    assert [line["step"] for line in lines] == list(range(1, max(done + 1, 6) + 1))
    for name in ("loss_traj", "loss_adv", "grad_sum"):
        assert [line[name] for line in lines[:6]] == [line[name] for line in full]


@pytest.mark.parametrize("ranks,settings", [(1, {}), (4, {"sp": 2})], ids=str)
def test_a_run_resumes_on_other_ranks_and_with_sequence_parallelism(undisturbed, killed, run_stage,
                                                                 tmp_path, ranks, settings):
    (folder, config), run = undisturbed, tmp_path / "run"
    shutil.copytree(killed, run, symlinks=True)
    done = run_stage("distill", config, f"run={run}",
                     *(f"{name}={value}" for name, value in settings.items()), ranks=ranks)
    assert "resuming from" in done.stdout
    assert "step_000004" in done.stdout  # in the middle of a pass
    for ours, theirs in zip(lines_of(run), lines_of(folder / "full"), strict=True):
        assert (ours["step"], ours["k"]) == (theirs["step"], theirs["k"])
        for name in ("loss_traj", "loss_adv", "loss_head", "grad_traj", "endpoint"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (ours["step"], name)


def test_a_run_whose_synvid_has_grown_keeps_the_trajectories_it_began_with(
        undisturbed, killed, run_stage, tmp_path):
    (folder, config), run = undisturbed, tmp_path / "run"
    shutil.copytree(killed, run)  # the trajectories, too
    values = json.loads(config.read_text())
    more = tmp_path / "more.txt"
    more.write_text(Path(values["synvid"]["prompts"]).read_text() + "one more\n")
    count = len(more.read_text().splitlines())
    values["synvid"] |= {"prompts": str(more), "count": count}
    longer = tmp_path / "longer.yaml"
    longer.write_text(json.dumps(values))
    run_stage("synvid", longer, f"run={run}")
    done = run_stage("distill", longer, f"run={run}", ranks=2)
    assert "resuming from" in done.stdout
    assert len(list((run / "synvid").glob("*/*.safetensors"))) == count > 10
    assert_same_bits(run, folder / "full")
    ours, theirs = lines_of(run), lines_of(folder / "full")
    assert [line.get("endpoint") for line in ours] == [line.get("endpoint") for line in theirs]


def test_a_damaged_trajectory_loses_nothing_and_the_rerun_after_repair_gives_the_same_bits(
        undisturbed, killed, run_stage, tmp_path):
    (folder, config), run = undisturbed, tmp_path / "run"
    shutil.copytree(killed, run)  # after step 4, with the teacher's figures in the log
    epoch, position = divmod(5 * 4 + 3, 8)  # what the last iteration, 5, reads last
    for index in (9, loading.epoch_order(0, epoch, 8)[position]):  # 9 is held out
        path = trajectory_path(run / "synvid", index)
        data = path.read_bytes()
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
        shutil.rmtree(run / "distill/step_000005", ignore_errors=True)
        failed = run_stage("distill", config, f"run={run}", "eval_every=5", "save_every=100",
                           ranks=2, check=False)
        assert failed.returncode == 1 and failed.stderr.count("error: ") == 1, failed.stderr
        assert f"{path}: cannot be used" in failed.stderr
        assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5]
        assert max(p.name for p in (run / "distill").glob("step_*")) == "step_000005"
        assert not list((run / "distill").glob(".owner*-*"))
        path.write_bytes(data)
    again = run_stage("distill", config, f"run={run}", ranks=2)
    assert "step_000005" in again.stdout
    assert_same_bits(run, folder / "full")
