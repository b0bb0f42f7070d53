"""Ranks that have other settings or files than the first, that fail, or whose launcher ended."""

import contextlib
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import PATIENCE, in_processes, run_script, start_script
from safetensors.torch import load_file, save_file

import common
import distill
from artifacts.trajectories import trajectory_path
from common import weights
from common.files import ROOT
from common.prompts import Prompt, digest_texts
from common.ranks import AgreedError, errors_on_all_ranks, shared_queue
from common.weights import safetensors_metadata

DIFFERING = Path(__file__).parent / "differing_stage.py"
QUICK = {"iterations": 6, "batch": 4, "micro_batch": 2, "held_out": 2, "save_every": 100,
         "eval_every": 6, "lr": 1e-3, "head_dim": 8, "export_dtype": "fp32"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_weights, run_stage):
    """A folder with a config and, in <folder>/run, an undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    config = {"weights": str(tiny_weights), "run": str(folder / "run"), "height": 16, "width": 16,
              "frames": 5, "n": 6, "key": [0, 2, 4, 6], "device": "cpu", "distill": QUICK,
              "synvid": {"prompts": str(tiny_weights / "prompts.txt"), "count": 10, "videos": 0},
              "evaluate": {"prompts": str(tiny_weights / "prompts.txt"), "count": 4}}
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    for stage in ("synvid", "distill"):
        run_stage(stage, path)
    return folder, path


def failed_pair(override: str, stage: str, *args: object) -> str:
    """The errors of two ranks, of which the second also has `override`; they must fail."""
    done = run_script(DIFFERING, override, stage, *args, ranks=2)
    assert done.returncode == 1
    return done.stderr


OVERRIDES = ("lr=0.5", "seed=3", "batch=2", "iterations=7", "save_every=1", "sp=2")


def differing(ranks, folder: Path) -> None:
    """One of two processes, the second of which has other settings, or other weights."""
    _, config = folder / "run", folder / "config.yaml"
    for override in (*OVERRIDES, f"weights={folder / 'other'}"):
        args = [str(config), f"run={folder / 'new'}", *([override] if ranks.rank else [])]
        try:
            distill.main(args)
            said = "trained"
        except ValueError as e:
            said = str(e)
        with (folder / f"said{ranks.rank}.txt").open("a") as f:
            f.write(f"{said}\n")


def test_a_rank_with_other_settings_or_weights_is_named_before_training_starts(
        finished, make_weights):
    folder, _ = finished
    make_weights(folder / "other", seed=5)
    in_processes(2, differing, folder)
    said = (folder / "said0.txt").read_text().splitlines()
    names = [override.partition("=")[0] for override in OVERRIDES] + ["teacher"]
    assert [line.partition(":")[0] for line in said] == names
    assert all("rank 1 has" in line and "nothing was written" in line for line in said)
    assert (folder / "said1.txt").read_text() == "\n" * len(names)  # only rank 0 has a message
    assert not (folder / "new").exists()


@pytest.mark.parametrize("what", ["prompts", "encoders"])
def test_synvid_is_never_mixed_from_other_prompts_or_encoders(what, finished, tmp_path,
                                                              tiny_weights):
    _, config = finished
    if what == "prompts":
        other = tmp_path / "other.txt"
        other.write_text("another prompt\n" * 3)
    else:
        other = tmp_path / "other"
        shutil.copytree(tiny_weights, other)
        path = other / "models_t5_umt5-random.safetensors"
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    key = "weights" if what == "encoders" else what
    said = failed_pair(f"{key}={other}", "synvid", config, f"run={tmp_path / 'run'}")
    assert f"error: {what}: rank 1 has" in said and said.count("error: ") == 1
    assert not (tmp_path / "run").exists()


def test_ranks_never_evaluate_or_sample_different_students(finished, tmp_path):
    folder, config = finished
    student = folder / "run/student.safetensors"
    state = load_file(student)
    other = tmp_path / "other.safetensors"
    about = {name: text for name, text in safetensors_metadata(student).items() if name != "crc32"}
    save_file({name: value + 1e-3 for name, value in state.items()}, other, about)
    for stage, key, *more in (("evaluate", "students"), ("sample", "student", "prompt=a red disc")):
        said = failed_pair(f"{key}={other}", stage, config, f"{key}={student}",
                           f"run={tmp_path / 'run'}", *more)
        assert "rank 1 has" in said and said.count("error: ") == 1
        assert not (tmp_path / "run").exists()


def test_images_of_equal_size_and_other_bytes_are_other_prompts(tmp_path):
    image, digests = tmp_path / "a.png", []
    for byte in (b"a", b"b"):
        image.write_bytes(99 * b"x" + byte)
        digests.append(digest_texts([Prompt("a dog", image), Prompt("a cat")]))
    assert digests[0] != digests[1] == digest_texts([Prompt("a dog", image), Prompt("a cat")])


def failing(ranks, folder: Path) -> None:
    """One of three processes, two of which have an error."""
    with pytest.raises(AgreedError) as caught, errors_on_all_ranks():
        if ranks.rank:
            raise ValueError(f"rank {ranks.rank} is ill")
    (folder / str(ranks.rank)).write_text(str(caught.value))
    with errors_on_all_ranks():
        pass


def test_an_error_of_some_ranks_is_raised_on_all_and_printed_once(tmp_path):
    in_processes(3, failing, tmp_path)
    assert [(tmp_path / str(r)).read_text() for r in range(3)] == ["", "rank 1 is ill", ""]


@pytest.mark.parametrize("given, expected", [
    ({"RANK": "0"}, "expandable_segments:True"), ({}, None),
    ({"RANK": "0", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ({"RANK": "0", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None)])
def test_under_torchrun_memory_has_expandable_segments_unless_the_user_sets_others(
        given, expected, monkeypatch):
    for name in ("RANK", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that its value is restored after the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(common)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


def sharing(ranks, folder: Path) -> None:
    """One of two processes that share work; the second one's first piece outlasts all others."""
    taken, finished = [], folder / "finished"
    for number in shared_queue(9, ranks):
        taken.append(number)
        while ranks.rank == 1 and not finished.exists():
            time.sleep(0.01)
    finished.touch()
    together = list(shared_queue(9, replace(ranks, sp=2)))  # both are one replica
    (folder / f"{ranks.rank}.json").write_text(json.dumps([taken, together]))


def test_a_slow_rank_takes_less_of_shared_work_and_ranks_of_a_replica_take_the_same(tmp_path):
    in_processes(2, sharing, tmp_path)
    (fast, *one), (slow, *two) = (json.loads((tmp_path / f"{r}.json").read_text())
                                  for r in range(2))
    assert sorted(fast + slow) == list(range(9)) and len(slow) <= 1
    assert one == two == [list(range(9))]


@pytest.mark.parametrize("place,failures", [
    (".step_000002.part", 1), ("student.safetensors", 1),
    (".step_000002.part", 2), ("student.safetensors", 2)])
def test_the_last_checkpoint_and_the_export_get_a_second_try(place, failures, finished, tmp_path,
                                                             monkeypatch, capsys):
    folder, config = finished
    run, left, real = tmp_path / "run", [failures], weights.os.fsync
    shutil.copytree(folder / "run/synvid", run / "synvid")

    def fsync(handle: int) -> None:
        if place in os.readlink(f"/proc/self/fd/{handle}") and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(weights.os, "fsync", fsync)
    monkeypatch.setattr(distill, "catch_signals", list)
    try:
        distill.main([str(config), f"run={run}", "iterations=2"])
        error = None
    except ValueError as e:
        error = str(e)
    finally:
        dist.destroy_process_group()
    assert capsys.readouterr().out.count("trying once more") == 1 and left == [0]
    assert (error is None) == (failures == 1) == (run / "student.safetensors").exists()
    if error is not None:
        assert "cannot be written" in error and place.partition(".part")[0].strip(".") in error
    assert (run / "distill/log.jsonl").read_text().count("\n") == 2
    assert not list(run.rglob(".owner.*"))


def test_ranks_that_read_files_are_waited_for_longer_than_those_of_an_iteration(
        finished, tmp_path, monkeypatch, no_ranks):
    folder, config = finished
    shutil.copytree(folder / "run/synvid", tmp_path / "run/synvid")
    limits: dict[str, timedelta] = {}

    def noted(name: str, real: Callable) -> Callable:
        def call(*args, **kwargs):
            backend = dist.group.WORLD._get_backend(torch.device("cpu"))
            limits.setdefault(name, backend.options._timeout)
            return real(*args, **kwargs)
        return call

    for name in ("build", "update_heads"):
        monkeypatch.setattr(distill, name, noted(name, getattr(distill, name)))
    monkeypatch.setattr(distill.checkpoint, "resume", noted("resume", distill.checkpoint.resume))
    monkeypatch.setattr(distill, "catch_signals", list)
    distill.main([str(config), f"run={tmp_path / 'run'}", "iterations=1"])
    dist.destroy_process_group()
    startup, iteration = timedelta(hours=2), timedelta(minutes=10)
    assert limits == {"build": startup, "resume": startup, "update_heads": iteration}


def test_a_second_start_in_one_folder_is_refused_and_nothing_is_lost(finished, run_stage, tmp_path):
    folder, config = finished
    run, more = tmp_path / "run", ["iterations=10000", "eval_every=20000"]  # it does not end
    shutil.copytree(folder / "run/synvid", run / "synvid")
    [process] = start_script(ROOT / "distill.py", config, f"run={run}", *more)
    log = run / "distill/log.jsonl"
    while not (log.exists() and log.read_text()):
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGSTOP)  # it is suspended while others try
    try:
        for other in ([], ["lr=0.5"]):
            second = run_stage("distill", config, f"run={run}", *more, *other, check=False)
            assert second.returncode == 1 and second.stderr.count("\n") == 1
            assert f"process {process.pid} on host" in second.stderr
    finally:
        process.kill()
        process.join()
    count = log.read_text().count("\n")
    args = ("distill", config, f"run={run}", f"iterations={count + 2}")
    other = run_stage(*args, "lr=0.5", check=False)  # does not overwrite the first one's log
    assert other.returncode == 1 and "began with lr=0.001" in other.stderr
    assert log.read_text().count("\n") == count
    run_stage(*args)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, count + 3))


def test_two_jobs_of_the_same_trajectories_are_not_run_at_once(finished, run_stage, tmp_path):
    _, config = finished
    run = tmp_path / "run"
    [process] = start_script(ROOT / "synvid.py", config, f"run={run}", "count=30000")
    while not (run / "synvid/config.yaml").exists():
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGSTOP)
    try:
        second = run_stage("synvid", config, f"run={run}", "start=7", "count=2", check=False)
        assert second.returncode == 1 and second.stderr.count("\n") == 1
        assert f"process {process.pid} on host" in second.stderr
    finally:
        process.kill()
        process.join()
    run_stage("synvid", config, f"run={run}", "start=30000", "count=2")
    assert trajectory_path(run / "synvid", 30001).exists()


def test_what_a_rank_has_printed_is_not_lost_when_torchrun_ends_it(tmp_path):
    script = tmp_path / "ended.py"
    script.write_text("""
import os, signal
from common.ranks import cli
cli(lambda: print("a result") or os.kill(os.getpid(), signal.SIGTERM))
""")
    done = run_script(script)
    assert done.returncode == -signal.SIGTERM and done.stdout == "a result\n"


LAUNCHER = """
import os, subprocess, sys, time
worker = subprocess.Popen(sys.argv[1:], env={**os.environ, "RANK": "0", "WORLD_SIZE": "2",
    "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    "TORCHELASTIC_RUN_ID": "here"})
print(worker.pid, flush=True)
time.sleep(1800)
"""


def has_socket(pid: int) -> bool:
    """Whether a process has opened a socket, by which it waits for other ranks."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            if int(fd.name) > 2 and os.readlink(fd).startswith("socket:"):
                return True
    return False


def imports_torch(pid: int) -> bool:
    """Whether a process has begun to import torch."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("moment", [imports_torch, has_socket])
def test_a_rank_whose_launcher_was_killed_ends_although_it_waits_for_others(moment, finished,
                                                                            tmp_path):
    _, config = finished
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, sys.executable,
                                 str(ROOT / "distill.py"), config, f"run={tmp_path / 'run'}"],
                                stdout=subprocess.PIPE, text=True)
    worker = int(launcher.stdout.readline())
    while not moment(worker):
        time.sleep(0.02)
    end = os.pidfd_open(worker)
    launcher.kill()
    launcher.wait()
    assert wait([end], PATIENCE), "the worker is still running"
    os.close(end)
