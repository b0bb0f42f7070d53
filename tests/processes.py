"""Scripts and functions in separate processes, forked from one that has only imported what they
need: importing torch takes longer than most of them. Except on Linux, where a fork is safe, each
starts from nothing. A test that patches a module before others import from it needs a command line
(script_command)."""

import functools
import itertools
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from common.config import Shared
from common.ranks import cli, setup_distributed
from model import PRESETS

# The small presets have half their blocks in tests and in the processes that they start: most of a
# stage's time on them is spent per block.
for name in ("tiny", "tiny-i2v", "tiny-experts"):
    PRESETS[name] = replace(PRESETS[name], num_layers=3)

START = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
START.set_forkserver_preload(["distill", "evaluate", "sample", "matplotlib.figure",
                              "matplotlib.backends.backend_agg", "torch._dynamo",
                              "torch.distributed.checkpoint"])
PATIENCE = 1800  # seconds after which a process counts as hung; no test depends on its speed


def script_command(script: Path, *args: Any, ranks: int = 1, torchrun: str = "") -> list[str]:
    """A script's command line: python, or torchrun with several ranks and maybe an option."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
              *torchrun.split(), "--"]
    return [sys.executable, *(launch if ranks > 1 else []), str(script), *map(str, args)]


@functools.cache
def group_store() -> TCPStore:
    """Where groups of processes find each other. This process keeps it, as torchrun does: a port
    that the first rank opens itself could be taken by another process before it starts."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


GROUPS = itertools.count()  # each is as another restart of one job: its keys have a prefix


def rank_variables(world: int) -> list[dict[str, str]]:
    """The environment by which the processes of a group find each other; one alone needs none."""
    if world == 1:
        return [{}]
    group = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(group_store().port), "TORCHELASTIC_USE_AGENT_STORE": "True",
             "TORCHELASTIC_RESTART_COUNT": str(next(GROUPS))}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **group} for rank in range(world)]


def start_each(world: int, target: Callable, *args: Any) -> list[Process]:
    """Start target(variables, *args) in `world` processes, each with its rank_variables."""
    processes = [START.Process(target=target, args=(variables, *args))
                 for variables in rank_variables(world)]
    for process in processes:
        process.start()
    return processes


def as_function(variables: Mapping[str, str], work: Callable, folder: Path) -> None:
    """The target of in_processes; it ends as a stage does."""
    os.environ.update(variables)
    cli(lambda: work(setup_distributed(Shared(device="cpu")), folder))


def as_script(variables: Mapping[str, str], argv: list[str], where: str,
              environment: Mapping[str, str], outputs: tuple[Path | str, Path | str]) -> None:
    """The target of start_script."""
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(variables)
    os.chdir(where)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")


def wait_for(processes: list[Process]) -> int:
    """The exit status of the first process that fails, after which the others are stopped, or 0.
    Of several that ended meanwhile, the first is one that a signal ended: the others lost it."""
    until, status = time.monotonic() + PATIENCE, 0
    running = {process.sentinel: process for process in processes}
    while running and not status:
        ended = multiprocessing.connection.wait(running, max(0.0, until - time.monotonic()))
        status = next(filter(None, sorted(running[s].exitcode for s in ended)), 0)
        running = {s: process for s, process in running.items() if s not in ended}
        if not ended:
            break
    for _ in range(20 * PATIENCE):
        if not any(process.is_alive() for process in running.values()):
            break
        for process in running.values():
            process.terminate()  # again, since it may have collected the signal before it failed
        time.sleep(0.05)
    for process in running.values():
        process.kill()
        process.join(PATIENCE)
    assert status or not running, f"no end after {PATIENCE} s"
    return status


def in_processes(world: int, work: Callable, folder: Path) -> None:
    """Run work(ranks, folder), a function of a module, in `world` connected processes.

    Fails if one of them does.
    """
    assert wait_for(start_each(world, as_function, work, folder)) == 0


def start_script(script: Path, *args: Any, ranks: int = 1,
                 outputs: tuple[Path, Path] | None = None) -> list[Process]:
    """Start a script as `python script args …`, or as torchrun would with several ranks.

    Args: outputs, files that stdout and stderr are appended to; None: they are discarded.
    """
    return start_each(ranks, as_script, [str(script), *map(str, args)], os.getcwd(),
                      dict(os.environ), outputs or (os.devnull, os.devnull))


def run_script(script: Path, *args: Any, ranks: int = 1) -> subprocess.CompletedProcess:
    """Run a script to its end: .returncode, and .stdout and .stderr as text."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder) / "out", Path(folder) / "err"
        for path in outputs:
            path.touch()
        status = wait_for(start_script(script, *args, ranks=ranks, outputs=outputs))
        return subprocess.CompletedProcess(args, status, *(path.read_text() for path in outputs))
