"""A stage at full size on pretended GPUs: memory, traffic and work, before any GPU is rented.

    python -m tools.rehearse CONFIG [--stage distill|synvid|sample] [--gpus 8] [field=value]
    python -m tools.rehearse --table FILE   # the table of docs/scaling.md; resumes from FILE

In:  CONFIG, with its section for the stage; --gib, the memory of a GPU (80). No weights, no GPU.
Out: peak memory per GPU and what it consists of, for distill also its memory plan and the host
     memory of a checkpoint; traffic and FLOPs by part of the run; places where the host waits for
     the GPU or copies from pageable memory, or where a block computes in fp32.

distill runs an iteration at k = m - 1 (with iterations=1 only this one) and one at k = 0, synvid a
batch of two steps, sample a batch of two steps (the teacher's with teacher=true), with all encoders
and the VAE. The stage's own functions run on tensors without data ("fake" tensors of torch), as
rank 0 of a process group that moves nothing. Few blocks are run, at two depths: every figure is
linear in the depth at each point of the run. What a GPU adds is not counted: the CUDA context,
workspaces of kernels and NCCL, fragmentation of the allocator.
"""

import common  # noqa: F401 (before torch, see common)
import argparse
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm import tqdm

import distill
import model
import sample
import synvid
from artifacts import trajectories
from artifacts.videos import Video
from common.config import load_config
from common.files import ROOT, append_log, read_log
from common.prompts import Prompt
from common.ranks import Ranks, cli, compute_dtype
from frozen.image import Conditioner
from model import check_model, key_times, latent_shape, load_dit, sizes_of, time_grid
from tools.networks import random_states, tokens_of
from tools.pretend import Figures, Meter, nothing, pretended_ranks, total_bytes
from training import checkpoint
from training.data import Loader, trained_steps
from training.memory import USABLE_MEMORY, memory_parts
from training.monitor import step_flops

GiB = 2 ** 30

# ------------------------------------------------------------------------------------ the stages

@dataclass
class NoTrajectories:
    """Replaces SynVid for Loader: any number of trajectories, all of zeros."""
    manifest: dict
    t_key: list[float]
    cond: dict[str, Tensor]

    def __len__(self) -> int:
        return 10 ** 6

    def read(self, i: int, ks: list[int]) -> tuple[Tensor, dict, str]:
        return torch.zeros(len(ks), *self.manifest["shape"]), self.cond, ""


def rehearse_distill(cfg: distill.Config, ranks: Ranks, meter: Meter) -> None:
    """distill.py: build, an iteration at the first k and one at the last, a checkpoint's copy."""
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch // ranks.dp_size)
    size = cfg.micro_batch * ranks.dp_size
    cfg.batch = min(cfg.batch // size, 2) * size  # a third micro-batch adds nothing to the peak
    t_key = key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1]
    data = NoTrajectories({"shape": latent_shape(cfg.frames, cfg.height, cfg.width)}, t_key,
                          random_states(cfg))
    state = distill.build(cfg, t_key, ranks)
    for p in (*state.student.parameters(), *state.teacher.parameters()):  # as in the memory plan,
        meter.label("student" if p.dtype == torch.float32 else "teacher", [p])  # also with a LoRA
    meter.label("heads", state.heads.parameters())
    meter.label("AdamW", [x for opt in state.opts.values() for s in opt.state.values()
                          for x in s.values()])
    for name in ("student", "teacher"):
        meter.watch(getattr(state, name), name)
    loader, ks = Loader(cfg, data, ranks), trained_steps(cfg, t_key)
    loader.pool = SimpleNamespace(submit=lambda read, step: SimpleNamespace(
        result=lambda: read(step)))  # another thread would not be counted
    parts = [ks[0], ks[-1]][:min(cfg.iterations, len(ks))]
    cfg.iterations = len(ks)
    for k in parts:
        meter.begin(f"k={k}")
        state.step = ks.index(k)
        if k != ks[0]:  # one micro-batch, with the latents that the steps between would have made
            loader.slots, cfg.batch = loader.slots[:1], size
            state.queues[k + 1] = deque(state.queues[k + 1] or state.queues[ks[0]])
        _, _, log = next(distill.algorithm_1(cfg, state, loader))
        log.gather()
        meter.figures["FLOP", "formula", f"k={k}"] = step_flops(
            cfg, state.student, state.taps[k], tokens_of(cfg)[1], recomputed=True) / ranks.world
    meter.begin("checkpoint")
    tensors, _ = checkpoint.copy_to_host(checkpoint.tensors_of(state, {}), ranks, None)
    meter.figures["checkpoint",] = total_bytes(list(tensors.values()))


PROMPT = Prompt("a prompt", Path("image.png"))


def rehearse_synvid(cfg: synvid.Config, ranks: Ranks, meter: Meter) -> None:
    """synvid.py: a batch of prompts, two steps of the teacher, a decoded video."""
    shape = latent_shape(cfg.frames, cfg.height, cfg.width)
    manifest, cfg.n, cfg.videos = {"shape": shape, "stored": [1, 2], "n": 2}, 2, 1
    meter.begin("synvid")
    with patch.object(Conditioner, "identity", nothing), patch.multiple(
            synvid, load_dit=lambda *args: meter.watch(load_dit(*args), "DiT"),
            check_other_jobs=nothing, write_trajectory=nothing, print_cost=nothing,
            shared_queue=lambda count, _: iter(range(count))), patch.multiple(
            trajectories, read_trajectory=lambda *_: (torch.zeros(1, *shape), {}, ""),
            write_video=nothing):
        synvid.generate(cfg, [PROMPT], Path("random"), manifest, range(cfg.batch),
                        list(range(cfg.batch)), ranks)
    count_evaluations(cfg, ranks, meter)


def rehearse_sample(cfg: sample.Config, ranks: Ranks, meter: Meter) -> None:
    """sample.py: a batch of prompts, two steps of the student or the teacher, decoded videos."""
    def load(weights: str, preset: str, dtype: torch.dtype, *args: Any) -> nn.Module:
        return meter.watch(load_dit(weights, preset, dtype, *args), "DiT").requires_grad_(False)

    meter.begin("sample")
    sample.drop_guidance(cfg)
    video = Video(0, PROMPT, 0, cfg.height, cfg.width, Path(__file__).name)
    with patch.multiple(
            sample, load_dit=load, write_video=nothing, append_log=nothing,
            load_student=lambda cfg, _, device, shards, scale: load(
                cfg.weights, cfg.preset, compute_dtype(device), device, shards)):
        sample.sample_videos(cfg, [video] * cfg.batch, time_grid(
            cfg.family, 2, cfg.shift).tolist(), "", Path(__file__), ranks)
    count_evaluations(cfg, ranks, meter)


def count_evaluations(cfg: Any, ranks: Ranks, meter: Meter) -> None:
    """FLOPs of a rank in two steps of a batch, by the DiT's formula."""
    dit, tokens = tokens_of(cfg)
    flop = 2 * (1 if cfg.guidance == 1 else 2) * cfg.batch * dit.flops(tokens) / ranks.replica_size
    meter.figures["FLOP", "formula", meter.segment[0]] = flop


STAGES: dict[str, tuple[type, Callable]] = {  # by the module that defines the stage's Config
    "distill": (distill.Config, rehearse_distill), "synvid": (synvid.Config, rehearse_synvid),
    "sample": (sample.Config, rehearse_sample)}

# --------------------------------------------------------------------------------- extrapolation

def shallow(sizes: model.Sizes, depth: int) -> model.Sizes:
    """Sizes with fewer blocks. depth, in units of the fewest blocks that keep the ratio of their
    kinds."""
    if sizes.family == "wan":
        return replace(sizes, num_layers=depth)
    unit = math.gcd(sizes.num_double, sizes.num_single)
    return replace(sizes, num_double=sizes.num_double // unit * depth,
                               num_single=sizes.num_single // unit * depth)


def run_at(cfg: Any, gpus: int, sizes: model.Sizes) -> Figures:
    """The figures with a DiT of these sizes."""
    cfg, full = replace(cfg), sizes_of(cfg.preset).num_layers
    for name in ("tap", "tap_data"):
        if (tap := getattr(cfg, name, None)) is not None:
            setattr(cfg, name, math.ceil((tap + 1) * sizes.num_layers / full) - 1)
    (_, stage), meter = STAGES[type(cfg).__module__], Meter()
    with patch.dict(model.PRESETS, {cfg.preset: sizes}), pretended_ranks(
            cfg, gpus, sizes.num_heads, meter) as ranks:
        stage(cfg, ranks, meter)
        for segment, (_, parts) in meter.peaks.items():
            meter.figures.update({("peak", segment, part): n for part, n in parts.items() if n})
    return meter.figures


def rehearse(cfg: Any, gpus: int) -> Figures:
    """The figures at full depth; those of a deep DiT are extrapolated from two smaller depths."""
    sizes = sizes_of(cfg.preset)
    # At least three blocks of a kind: a first, a middle and a last one. At k = 0 a tap is at 2/3.
    with_tap = sizes.family == "wan" and getattr(cfg, "iterations", 1) > 1
    few, more = (shallow(sizes, depth) for depth in (3, 6 if with_tap else 4))
    if more.num_layers >= sizes.num_layers:
        return run_at(cfg, gpus, sizes)
    a, b = (run_at(cfg, gpus, s) for s in (few, more))
    slope = (sizes.num_layers - few.num_layers) / (more.num_layers - few.num_layers)
    segments = {key[1] for key in a if key[0] == "peak"}  # the others are like their neighbours
    return Counter({key: a[key] + slope * (b[key] - a[key]) for key in a | b
                    if key[0] != "peak" or key[1] in segments})


def peak_of(figures: Figures) -> dict[str, float]:
    """Bytes at the peak of the run, by purpose."""
    segments: dict[tuple, dict[str, float]] = {}
    for key, size in figures.items():
        if key[0] == "peak":
            segments.setdefault(key[1], {})[key[2]] = size
    return max(segments.values(), key=lambda parts: sum(parts.values()))


# ------------------------------------------------------------------------------------ the report

ACTIVATIONS = "activations, latents"


def plan_of(cfg: distill.Config, gpus: int) -> dict[str, float]:
    """Bytes of distill.py's memory plan on a GPU, by purpose."""
    plan = memory_parts(cfg, latent_shape(cfg.frames, cfg.height, cfg.width),
                        torch.device("cuda"), gpus, cfg.sp)
    return plan | {ACTIVATIONS: sum(plan.pop(name) for name in (
        "activations", "features, heads", "latents"))}


def by_purpose(parts: dict[str, float]) -> dict[str, float]:
    """Bytes at a peak by the purposes of the memory plan."""
    named = {name: size for name, size in parts.items() if ":" not in name and name != "heads"}
    return named | {ACTIVATIONS: sum(parts.values()) - sum(named.values())}


def format_figures(figures: Figures, plan: dict[str, float], gib: float) -> str:
    """All figures as text; plan, where the stage has one."""
    parts = peak_of(figures)
    purposes, total = by_purpose(parts), sum(parts.values())
    rows = [(name, purposes.get(name, 0), plan.get(name, 0))
            for name in dict.fromkeys((*plan, *purposes))]
    lines = [f"{'GiB of a GPU at the peak':<40}{'rehearsed':>10}{'plan' * bool(plan):>10}"]
    for name, size, planned in (*rows, ("together", total, sum(plan.values()))):
        lines.append(f"  {name:<38}{size / GiB:10.3f}" + f"{planned / GiB:10.3f}" * bool(plan))
    fits = total < USABLE_MEMORY * gib * GiB
    lines.append(f"  {'fits' if fits else 'DOES NOT FIT'} in {gib:g} GiB, of which "
                 f"{USABLE_MEMORY:.0%} are usable")
    lines.append("most of the activations, GiB, by the line that allocates them")
    of_lines = Counter({name: size for name, size in parts.items() if ":" in name})
    lines += [f"  {name:<38}{size / GiB:10.3f}" for name, size in of_lines.most_common(8)]
    rest = {key: n for key, n in figures.items() if key[0] not in ("peak", "finding")}
    for key, number in sorted(rest.items()):
        unit, by = ("TFLOP", 1e12) if key[0] == "FLOP" else ("GB", 1e9)
        lines.append(f"{' '.join(key):<40}{number / by:10.3f} {unit}")
    found = sorted((names, number) for (kind, *names), number in figures.items()
                   if kind == "finding")
    lines += [f"{what}: {where} ({number:.0f} times)" for (what, where), number in found]
    return "\n".join(lines)


# -------------------------------------------------------------------- the table of docs/scaling.md

GPUS, SP = (1, 4, 8), (1, 2, 4, 8)
VARIANTS = ("hunyuan-t2v-544p offload=true", "hunyuan-t2v-544p lora=64",
            "wan-t2v-14b-480p offload=true", "wan-t2v-14b-480p lora=64",
            *(f"wan22-t2v-a14b-480p {x}" for x in ("offload=true", "experts=high", "experts=low")))
ROWS = [(name, sp) for name in sorted(path.stem for path in ROOT.glob("configs/[hw]*.yaml"))
        for sp in SP] + [(name, 4) for name in VARIANTS]


def table_config(row: str, sp: int) -> distill.Config:
    """The config of a row, which is a name in configs/ and settings; only k = m - 1 is run."""
    name, *settings = row.split()
    return load_config(distill.Config, "distill", [
        str(ROOT / f"configs/{name}.yaml"), "weights=random", "iterations=1", f"sp={sp}",
        *settings])


def make_table(path: Path) -> str:
    """The table: GiB per GPU and how far the plan is from it; GB that a rank of the last column
    receives for a micro-batch at k = m - 1, rehearsed and by formula; CPU seconds of a rehearsal.

    path: a file of JSON lines with the finished cells; missing ones are rehearsed and appended.
    """
    cells = {(x["row"], x["sp"], x["gpus"]): x for x in read_log(path, "gpus", "sp", "peak")}
    possible = [(row, sp, gpus) for row, sp in ROWS for gpus in GPUS if sp <= gpus
                and sizes_of(table_config(row, sp).preset).num_heads % sp == 0]
    missing = [cell for cell in possible if cell not in cells]
    for row, sp, gpus in tqdm(missing, "rehearse", unit="cell"):
        started, figures = time.process_time(), rehearse(table_config(row, sp), gpus)
        cells[row, sp, gpus] = {
            "row": row, "sp": sp, "gpus": gpus, "peak": sum(peak_of(figures).values()),
            "seconds": time.process_time() - started,
            "traffic": {key[1]: n for key, n in figures.items() if key[0] == "traffic"}}
        append_log(path, cells[row, sp, gpus])
    lines = ["| | `sp` | 1 GPU | 4 GPUs | 8 GPUs | FSDP2 | all-to-all | s |", "|---" * 8 + "|"]
    for row, sp in ROWS:
        if (row, sp, GPUS[-1]) not in cells:
            continue
        cfg, found = table_config(row, sp), []
        for gpus in GPUS:
            cell = cells.get((row, sp, gpus))
            difference = cell and sum(plan_of(cfg, gpus).values()) / cell["peak"] - 1
            found.append("–" if cell is None else f"{cell['peak'] / GiB:.1f} ({difference:+.1%})")
        by_kind, micro = Counter(cell["traffic"]), 1e9 * min(cfg.batch * sp // gpus, 2)
        for rehearsed, formula in zip((by_kind["all-gather"] + by_kind["reduce-scatter"],
                                       by_kind["all-to-all"]), traffic(cfg, gpus), strict=True):
            found.append(f"{rehearsed / micro:.0f} / {formula / 1e9:.0f}")
        lines.append(f"| {row} | {sp} | {' | '.join(found).replace('-', '−')} | "
                     f"{cell['seconds']:.0f} |")
    return "\n".join(lines)


def traffic(cfg: distill.Config, gpus: int) -> tuple[float, float]:
    """Bytes that a rank receives for a micro-batch: by FSDP2 24 per parameter (16 with a LoRA), and
    by all-to-all q, k, v and the output in each of 11 passes through the blocks."""
    (dit, tokens), sp = tokens_of(cfg), cfg.sp
    sizes = dit.cfg
    parameters = sum(p.numel() for p in dit.parameters()) * sizes.num_layers / len(dit.blocks)
    tokens += sizes.text_len * (cfg.family == "hunyuan")
    moved = 4 * tokens / sp * sizes.dim * (sp - 1) / sp * 2
    return ((24 if cfg.lora is None else 16) * parameters * (gpus - 1) / gpus,
            11 * sizes.num_layers * moved)


def main() -> None:
    """Read the options, rehearse, report."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("config", nargs="?", default="configs/tiny.yaml")
    parser.add_argument("--stage", choices=STAGES, default="distill")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gib", type=float, default=80)
    parser.add_argument("--table", type=Path)
    own, rest = parser.parse_known_args()
    if own.table is not None:
        return print(make_table(own.table))
    started = time.perf_counter()
    cfg = load_config(STAGES[own.stage][0], own.stage, [own.config, "--weights=random", *rest],
                      __doc__, "-m tools.rehearse")
    check_model(cfg)
    figures = rehearse(cfg, own.gpus)
    plan = plan_of(cfg, own.gpus) if own.stage == "distill" else {}
    print(f"{own.stage}: {cfg.origin} on {own.gpus} GPUs, rehearsed in "
          f"{time.perf_counter() - started:.0f} s\n{format_figures(figures, plan, own.gib)}")


if __name__ == "__main__":
    cli(main)
