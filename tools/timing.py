"""Seconds, memory and floating-point operations of what can be run, as bench.py tells them."""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from common.files import error_summary
from common.linear import linear
from common.ranks import compute_dtype, on_first_rank

Run = Callable[[], object]


class Row(NamedTuple):
    """One line of the table: what is timed, and how much work it is."""
    name: str
    prepare: Callable[[], list[Run]]   # makes networks; gives what is timed: ours, maybe theirs
    flop: float = 0.0
    tokens: int | None = None
    plan: float | None = None          # bytes
    runs: int = 3                      # at least; before them one warms up, with a peer two
    extra: float = 0.0                 # seconds that preparing takes, about
ENOUGH, MOST = 1.0, 20  # a row that has had its least runs goes on for so many seconds, or runs


def clock(run: Run, device: torch.device) -> float:
    """Seconds of one run, the device's work included."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def memory_now(device: torch.device, reset: bool = False) -> int:
    """The most bytes held since `reset`, which gives back what is not needed and counts anew."""
    if device.type == "cuda":
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if reset:  # else what one network freed would hide what the next one takes
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024


def allocated(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """What `work` gives, the bytes of tensors that it leaves on the CPU, and most at one time. (How
    much the process grows depends on what it had freed before.)"""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events()
              if e.name() == "[memory]"]
    now = most = 0
    for _, count in sorted(events, key=lambda event: event[0]):
        now += count
        most = max(most, now)
    return result, now, most


def measure(row: Row, device: torch.device) -> dict:
    """A row's seconds and peak memory; an error is told in their place. All ranks do it together.
    """
    held = memory_now(device, reset=True)
    held = 0 if device.type == "cuda" else held
    try:
        work, peaks = row.prepare(), []
        for run in work if row.runs > 1 else []:
            clock(run, device)  # warms up: code and tables that stay come to the process
            if len(work) > 1:
                peaks.append(allocated(run)[2])
        started, seconds = time.perf_counter(), [[] for _ in work]

        def goes_on() -> bool:
            done = len(seconds[0])
            return done < row.runs or (done < MOST and time.perf_counter() - started < ENOUGH)

        while on_first_rank(goes_on):
            for run, times in zip(work, seconds, strict=True):
                times.append(clock(run, device))
        if len(work) == 1:
            peaks = [memory_now(device) - held]
    except (RuntimeError, ValueError, OSError) as e:  # out of memory, no compiler, no such kernel
        return {"row": row.name, "tokens": row.tokens, "tflop": row.flop / 1e12,
                "plan_gib": row.plan and row.plan / 2 ** 30, "error": error_summary(e)}
    return figures(row, seconds, peaks)


def figures(row: Row, seconds: list[list[float]], peaks: list[int]) -> dict:
    """What a row's times say, as it is stored."""
    ours = statistics.median(seconds[0])
    found = {"row": row.name, "seconds": ours, "range": [min(seconds[0]), max(seconds[0])],
             "runs": len(seconds[0]), "tokens": row.tokens, "tflop": row.flop / 1e12,
             "tflops": row.flop / 1e12 / ours, "peak_gib": peaks[0] / 2 ** 30,
             "plan_gib": row.plan and row.plan / 2 ** 30}
    if len(seconds) > 1:
        ratios = [a / b for a, b in zip(*seconds, strict=True)]
        found |= {"diffusers_seconds": statistics.median(seconds[1]),
                  "diffusers_peak_gib": peaks[1] / 2 ** 30, "ratio": statistics.median(ratios),
                  "ratio_range": [min(ratios), max(ratios)]}
    return found


def measure_peak(device: torch.device) -> float:
    """FLOP/s of a large linear layer in the dtype that networks compute in here."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=compute_dtype(device))
    return 2 * n ** 3 / min(clock(lambda: linear(a, b), device) for _ in range(10))


def count_flops(make: Callable[[], nn.Module], run: Callable[[nn.Module], object]) -> float:
    """Floating-point operations of run(make()) by torch's count, from shapes alone."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(make())
    return float(counter.get_total_flops())
