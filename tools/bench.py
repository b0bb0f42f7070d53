"""How fast each part runs on this machine, and how much memory it needs, with random weights.

    python -m tools.bench [CONFIG] [--minutes 8]
    python -m tools.bench CONFIG --only "DiT"            (only the rows whose name contains "DiT")
    torchrun --nproc-per-node 8 -m tools.bench CONFIG

In:   the sizes of CONFIG and the settings of its synvid: and distill: sections.
Out:  a Markdown table, and <run>/bench.json (or --out FILE), which is written after each row.
Cost: about --minutes; the most important rows come first, rows that are left out are listed.

docs/scaling.md, "Measure your machine", explains the columns and the comparison with diffusers.
"""

import gc
import itertools
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import distill
import experts
from common.config import Shared, field, load_config
from common.files import error_summary, read_json, write_json
from common.linear import linear
from common.ranks import (
    Ranks, cli, compile_blocks, compute_dtype, generator, on_first_rank,
    setup_distributed)
from common.video import write_video
from evaluation.page import environment, markdown_table
from model import (
    check_model, collate, key_times, latent_shape, sample_euler, time_grid)
from tools.networks import (
    VIDEO_SIZE, Call, diffusers_version, frozen_parts, make_vae, peer_dits, peer_sizes, peer_vaes,
    random_dit, random_network, random_states, random_tensors, tokens_of, vae_run)
from training.data import Batch, Latents, pinned
from training.memory import gpu_bytes, memory_parts, meta_student, shortage
from training.monitor import step_flops


@dataclass
class Config(Shared):
    """Settings of a measurement."""
    minutes: float | None = field(None, "time for all rows; defaults to 8 on a GPU, 2 on a CPU",
                                  "[0, 10000]")
    only: str = field("", "measure only rows whose name contains this text")
    out: str | None = field(None, "JSON file for the results; defaults to <run>/bench.json")
    sp: int = field(1, "ranks that share each sample's tokens (Ulysses)", "[1, inf)")


# -------------------------------------------------------------------------- seconds and memory

class Row(NamedTuple):
    """One line of the table: what is timed, and how much work it is."""
    name: str
    prepare: Callable[[], list[Call]]   # builds networks; returns ours, and diffusers' if any
    flop: float = 0.0
    tokens: int | None = None
    plan: float | None = None          # bytes, from training/memory.py
    runs: int = 3                      # at least; if more than one, another one warms up first


ENOUGH_SECONDS, MOST_RUNS = 1.0, 20  # a row is repeated until it reaches one of these


def clock(run: Call, device: torch.device) -> float:
    """Seconds of one run, including the device's work."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def allocated(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """The result of work(), the bytes of CPU tensors that it leaves, and their peak meanwhile.

    Counted from torch's allocations: the growth of the process depends on what it freed before.
    What another thread frees, as gloo's may after a collective, is not recorded, and stays counted.
    """
    gc.collect()  # otherwise tensors of earlier work would be freed, and counted, meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    sizes = [0, *itertools.accumulate(e.nbytes() for e in events)]
    return result, sizes[-1], max(sizes)


def run_row(row: Row, device: torch.device) -> tuple[list[list[float]], list[int]]:
    """The seconds of each run, and the peak bytes (none on a CPU if the row runs once), of ours and
    of diffusers' if it takes part. Collective."""
    warm_up = row.runs > 1
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work = row.prepare()
        for run in work if warm_up else []:
            clock(run, device)
    else:
        work, held, _ = allocated(row.prepare)
        if len(work) > 1:  # the comparison with diffusers counts only what a later run allocates
            held, _ = 0, [run() for run in work]
        peaks = [held + allocated(run)[2] for run in work if warm_up]
    started, seconds = time.perf_counter(), [[] for _ in work]
    while on_first_rank(lambda: len(seconds[0]) < row.runs or (
            len(seconds[0]) < MOST_RUNS and time.perf_counter() - started < ENOUGH_SECONDS)):
        for run, times in zip(work, seconds, strict=True):
            times.append(clock(run, device))
    if device.type == "cuda":
        peaks = [torch.cuda.max_memory_allocated(device)]
    return seconds, peaks


def measure(row: Row, device: torch.device, peak: float, datasheet: float | None = None) -> dict:
    """A row's figures, or the error that it ended with. Collective.

    Args: peak, measured FLOP/s of the device; datasheet, the TFLOP/s that its datasheet states.
    """
    found = {"row": row.name, "tokens": row.tokens, "tflop": row.flop / 1e12,
             "floor_seconds": row.flop / peak, "plan_gib": row.plan and row.plan / 2 ** 30}
    try:
        seconds, peaks = run_row(row, device)
    except (RuntimeError, ValueError, OSError) as e:  # out of memory, no compiler, no such kernel
        seconds, peaks = [], []
        found["error"] = error_summary(e)
    if seconds:
        ours = statistics.median(seconds[0])
        found |= {"seconds": ours, "range": [min(seconds[0]), max(seconds[0])],
                  "runs": len(seconds[0]), "tflops": found["tflop"] / ours,
                  "mfu": found["floor_seconds"] / ours,
                  "mfu_datasheet": datasheet and found["tflop"] / ours / datasheet,
                  "peak_gib": peaks and peaks[0] / 2 ** 30}
    if len(seconds) > 1:
        ratios = [a / b for a, b in zip(*seconds, strict=True)]
        found |= {"diffusers_seconds": statistics.median(seconds[1]),
                  "diffusers_peak_gib": peaks[1] / 2 ** 30, "ratio": statistics.median(ratios),
                  "ratio_range": [min(ratios), max(ratios)]}
    return {name: value for name, value in found.items() if value}


def measure_peak(device: torch.device) -> float:
    """FLOP/s of a large linear layer in the dtype that networks compute in."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=compute_dtype(device))
    return 2 * n ** 3 / min(clock(lambda: linear(a, b), device) for _ in range(10))


def count_flops(make: Callable[[], nn.Module], run: Callable[[nn.Module], object]) -> float:
    """Floating-point operations of run(make()) by torch's count, on the meta device."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(make())
    return float(counter.get_total_flops())


# ------------------------------------------------------------------------- rows of the config

class Bench:
    """What the rows of a config share: settings of the stages, sizes, inputs, a temporary folder.

    Each method that returns a list of one Call is a row's `prepare`.
    """

    def __init__(self, cfg: Config, ranks: Ranks, folder: Path):
        self.cfg, self.ranks, self.device, self.folder = cfg, ranks, ranks.device, folder
        self.distill = replace(
            load_config(distill.Config, "distill", [str(cfg.path), "weights=random"]),
            iterations=10 ** 6, sp=cfg.sp, **{f.name: getattr(cfg, f.name) for f in fields(Shared)})
        self.distill.micro_batch = min(self.distill.micro_batch,
                                       max(self.distill.batch // ranks.dp_size, 1))
        self.distill.batch = self.distill.micro_batch * ranks.dp_size
        self.shape = latent_shape(cfg.frames, cfg.height, cfg.width)
        self.dit, self.tokens = tokens_of(cfg)

    def inputs(self, batch: int = 1) -> tuple[Tensor, Tensor, dict]:
        """Latents, times and conditioning of a batch, on the device."""
        x = torch.randn(batch, *self.shape, generator=generator("x", self.cfg.seed))
        t = torch.full((batch,), 0.7, dtype=torch.float64)
        cond = collate([random_states(self.cfg)] * batch)
        return x.to(self.device), t.to(self.device), {
            name: c.to(self.device) for name, c in cond.items()}

    def evaluation(self, compiled: bool = False, backward: bool = False) -> list[Call]:
        """One evaluation of the DiT; if `backward`, also a backward to all weights, with
        distill.py's activation checkpointing."""
        dit, inputs = random_dit(self.cfg, self.device, self.ranks.sp_ranks), self.inputs()
        dit.requires_grad_(backward)
        for block in dit.blocks:
            block.checkpointing = backward and self.distill.checkpointing
        if compiled:
            torch.compiler.reset()
            compile_blocks(dit)

        @torch.set_grad_enabled(backward)
        def run() -> None:
            v = dit(*inputs)
            if backward:
                v.square().mean().backward()
                dit.zero_grad()
        return [run]

    def k_step(self) -> list[Call]:
        """An iteration of Algorithm 1 with one micro-batch per rank, as distill.py runs it."""
        cfg, m = self.distill, len(self.cfg.key) - 1
        lacks = shortage(cfg, self.shape, self.ranks, gpu_bytes(self.ranks))
        if lacks and not cfg.force_plan:
            raise ValueError(f"memory plan: does not fit {lacks}")
        t_key = key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1]
        with patch.multiple(experts, check_sizes=lambda *_: None,
                            dit_tensors=lambda _: random_tensors(self.dit)):
            state = distill.build(cfg, t_key, self.ranks)
        slots, (_, _, cond) = list(range(cfg.micro_batch)), self.inputs(cfg.micro_batch)

        def loader(step: int) -> list[Batch]:
            latents = {k: pinned(torch.randn(cfg.micro_batch, *self.shape), self.device)
                       for k in range(m + 1)}
            return [Batch(Latents(latents, self.device), cond, slots)]
        steps = distill.algorithm_1(cfg, state, loader)
        return [lambda: next(steps)]

    def prompt_to_video(self, times: list[float], guided: bool) -> list[Call]:
        """Text encoders, Euler steps, VAE and video file, with all networks in memory."""
        cfg, dit = self.cfg, random_dit(self.cfg, self.device, self.ranks.sp_ranks)
        parts, path = frozen_parts(cfg), self.folder / f"video_{self.ranks.rank}.mp4"
        encoders = [run for name in parts if name.startswith("prompt")
                    for run in self.frozen_part(*parts[name])]
        vae = self.network(parts["VAE decode"][0])

        @torch.no_grad()
        def run() -> None:
            for encode in encoders:
                encode()
            x, _, cond = self.inputs()
            for latents in sample_euler(dit, x, times, cond, cond if guided else None,
                                        cfg.guidance):
                x = latents
            write_video(path, vae.decode(x)[0], cfg.fps)
        return [run]

    def network(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A random network; HunyuanVideo's VAE spreads its tiles over the ranks of a sample."""
        network = random_network(make, self.device)
        network.group = self.ranks.sp_group
        return network

    def frozen_part(self, make: Callable[[], nn.Module], run: Callable) -> list[Call]:
        """Run the VAE or one of the prompt's encoders."""
        network = self.network(make)

        @torch.no_grad()
        def call() -> None:
            with self.device:
                run(network)
        return [call]


def config_rows(b: Bench) -> Iterator[Row]:
    """The rows of a config, the most important first."""
    cfg, tokens = b.cfg, b.tokens
    flop, evaluations = b.dit.flops(tokens) / b.ranks.sp, 1 if cfg.guidance == 1 else 2
    key = key_times(cfg.family, cfg.n, cfg.shift, cfg.key)
    parts = frozen_parts(cfg)
    work = {name: count_flops(*part) for name, part in parts.items()}
    rest = sum(work.values()) - work["VAE encode"]
    taps = distill.tap_blocks(b.distill, b.dit.cfg.num_layers)
    k_step = statistics.mean(step_flops(b.distill, b.dit, tap, tokens) for tap in taps)
    plan = sum(memory_parts(b.distill, b.shape, b.device, b.ranks.world, b.ranks.sp).values())

    yield Row("DiT forward", b.evaluation, flop, tokens)
    yield Row("distill.py, one k-step of one micro-batch a rank", b.k_step, k_step / b.ranks.world,
              tokens * b.distill.micro_batch, plan, len(key) - 1)
    yield Row(f"prompt to video, {len(key) - 1} steps", partial(b.prompt_to_video, key, False),
              flop * (len(key) - 1) + rest, tokens)
    for name, part in parts.items():
        yield Row(name, partial(b.frozen_part, *part), work[name])
    yield Row("DiT forward + backward", partial(b.evaluation, backward=True), 3 * flop, tokens)
    grid = time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    yield Row(f"prompt to video, {cfg.n} steps", partial(b.prompt_to_video, grid, evaluations > 1),
              flop * evaluations * cfg.n + rest, tokens, runs=1)
    if b.device.type != "cuda":
        yield from peer_rows()
    yield Row("DiT forward, compiled", partial(b.evaluation, compiled=True), flop, tokens)


# ------------------------------------------------------------------------ against diffusers

# Width, heads, blocks; samples; frames, height and width of their latents. The first is the small
# world's DiT; each takes at most two thirds of a second on one core.
PEER_SIZES = ((128, 4, 6, 32, (3, 6, 6)), (384, 6, 2, 1, (3, 32, 32)), (768, 12, 2, 1, (5, 32, 32)))
GROWTH_SIZES = tuple((384, 6, 2, 1, (3, side, side)) for side in (16, 24, 48))  # forward alone


def peer_rows() -> list[Row]:
    """Small networks of both families against diffusers', in growing sizes; short rows first."""
    cases = [(size, backward) for size in PEER_SIZES for backward in (False, True)]
    cases += [(size, False) for size in GROWTH_SIZES]
    rows = []
    for family in ("wan", "hunyuan"):
        for (dim, heads, blocks, batch, latents), backward in cases:
            sizes, tokens = peer_sizes(family, dim, heads, blocks), math.prod(latents) // 4
            flop = batch * meta_student(sizes, None).flops(tokens) * (3 if backward else 1)
            passes = "forward + backward" if backward else "forward"
            count = f"{batch} × {tokens}" if batch > 1 else str(tokens)
            rows.append(Row(f"{family} DiT {passes}, {dim} wide, {blocks} blocks, {count} tokens",
                            partial(peer_dits, sizes, batch, latents, backward), flop,
                            batch * tokens, runs=5 if flop < 2e10 else 3))
        for way, frames in ("encode", 9), *(("decode", frames) for frames in (5, 9, 17, 33)):
            rows.append(Row(f"{family} VAE {way}, {frames} frames",
                            partial(peer_vaes, family, way, frames),
                            count_flops(partial(make_vae, family, True),
                                        vae_run(way, frames, *VIDEO_SIZE)), runs=5))
    return sorted(rows, key=lambda row: row.flop)


# ------------------------------------------------------------------------------------ report

COLUMNS = {"row": "", "seconds": "seconds", "spread": "±", "tokens": "tokens", "tflop": "TFLOP",
           "tflops": "TFLOP/s", "mfu": "MFU, measured peak", "mfu_datasheet": "datasheet's",
           "peak_gib": "peak GiB", "plan_gib": "plan GiB", "floor_seconds": "floor, s",
           "ratio": "ours / diffusers"}


def cell(found: dict, name: str) -> str:
    """A figure of a row as the table shows it."""
    value = found.get(name, "")
    if name == "seconds" and "error" in found:
        return found["error"].replace("|", "/")
    if name == "spread" and "range" in found:
        return f"{(found['range'][1] - found['range'][0]) / 2 / found['seconds']:.0%}"
    if name == "ratio" and value:
        return "{:.3f} ({:.2f} … {:.2f})".format(value, *found["ratio_range"])
    if name.startswith("mfu") and value:
        return f"{value:.1%}"
    return f"{value:.3g}" if isinstance(value, float) else f"{value}"


def table(result: dict) -> str:
    """A device's result as Markdown."""
    rows = result["rows"]
    columns = [name for name in COLUMNS if any(cell(found, name) for found in rows)]
    return "\n".join([
        *markdown_table([COLUMNS[name] for name in columns],
                        [[cell(found, name) for name in columns] for found in rows]), "",
        f"{result['device']}, {result['dtype']}, torch {result['torch']}; measured peak "
        f"{result['peak_tflops']:.3g} TFLOP/s; diffusers: {result['diffusers']}; "
        f"{result['seconds']:.0f} s in all",
        *(f"left out: {name}: {why}" for name, why in result["left_out"].items())])


def store(path: Path, name: str, result: dict) -> None:
    """Put a result into a JSON file, under bench → device → name, and keep the rest of the file."""
    results = read_json(path) if path.exists() else {}
    results.setdefault("bench", {}).setdefault(result["device"], {})[name] = result
    write_json(path, results)


def reason_to_skip(row: Row, peak: float, left: float) -> str | None:
    """Why a row is left out, if at half of the peak FLOP/s it needs more seconds than are left."""
    needed = 2 * (row.runs + (row.runs > 1)) * row.flop / peak
    return f"{max(left, 0):.0f} s left, needs about {needed:.0f} s" if needed >= left else None


def main(argv: list[str] | None = None) -> None:
    """Measure row by row until the time is over; print and store the results."""
    started = time.perf_counter()
    cfg = load_config(Config, "bench", argv, __doc__, "-m tools.bench")
    ranks = setup_distributed(cfg, cfg.sp, check_model(cfg).num_heads,
                              timedelta(minutes=30))  # a rank may run out of memory alone
    on_gpu, out = ranks.device.type == "cuda", Path(cfg.out or Path(cfg.run) / "bench.json")
    minutes = cfg.minutes if cfg.minutes is not None else 8 if on_gpu else 2
    peak = measure_peak(ranks.device)
    argv = sys.argv[1:] if argv is None else argv
    result = {"command": shlex.join(["python", "-m", "tools.bench", *argv]),
              **environment(ranks.device), "ranks": ranks.world,
              "dtype": str(compute_dtype(ranks.device)).removeprefix("torch."),
              "diffusers": diffusers_version() or "not installed",
              "peak_tflops": peak / 1e12, "seconds": 0.0, "rows": [], "left_out": {}}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(cfg, ranks, Path(on_first_rank(lambda: folder)))
        for row in config_rows(bench):
            if cfg.only not in row.name:
                continue
            left = 60 * minutes - (time.perf_counter() - started)
            if why := on_first_rank(partial(reason_to_skip, row, peak, left)):
                result["left_out"][row.name] = why
                continue
            found = measure(row, ranks.device, peak, bench.distill.peak_tflops if on_gpu else None)
            result["rows"].append(found)
            result["seconds"] = time.perf_counter() - started
            if ranks.rank == 0:
                print(f"{row.name}: {found.get('error') or cell(found, 'seconds') + ' s'}")
                store(out, cfg.path.stem, result)
    if ranks.rank == 0:
        store(out, cfg.path.stem, result)
        print(f"\n{table(result)}\nstored in {out}")


if __name__ == "__main__":
    cli(main)
