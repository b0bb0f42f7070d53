"""What a training run tells its person: figures of an iteration, curves, the memory it needs, its
work, and how far it still is from held-out trajectories."""

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import Ranks, build_dit, compute_dtype, replace_file, sizes_of, velocity, walk


class Log:
    """Figures of one iteration: kept on the device, gathered once at its end."""

    def __init__(self, student: nn.Module):
        self.device = next(student.parameters()).device
        self.values, self.marks, self.aside = {}, [("", self.now())], []

    def now(self) -> float | torch.cuda.Event:
        """A moment: the clock on a CPU, an event in the stream on a GPU (no waiting)."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, **figures: Tensor) -> None:
        """Add one micro-batch's figures; the mean over micro-batches and ranks is logged."""
        for name, value in figures.items():
            self.values.setdefault(name, []).append(value.detach().float().to(self.device))

    def lap(self, name: str) -> None:
        """Count the time since the last lap as `name`'s."""
        self.marks.append((name, self.now()))

    def gather(self, stop: bool) -> dict[str, float]:
        """Means over micro-batches and ranks, seconds of each part, stop > 0 if a rank wants to."""
        self.add(stop=torch.tensor(float(stop)))
        names = sorted(self.values)
        means = torch.stack([torch.stack(self.values[n]).mean() for n in names])
        dist.all_reduce(means)
        out = dict(zip(names, (means / dist.get_world_size()).tolist(), strict=True))
        for (_, a), (name, b) in zip(self.marks, self.marks[1:], strict=False):
            seconds = b - a if isinstance(a, float) else a.elapsed_time(b) / 1000
            out[f"s_{name}"] = out.get(f"s_{name}", 0.0) + seconds
        return out


def append_log(path: Path, line: dict) -> None:
    """Append one line of JSON. Raises ValueError naming the file when it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
    except OSError as e:
        raise ValueError(f"{path}: cannot be written ({e}): free some space; the same command then "
                         "goes on from the last checkpoint") from e


def read_log(path: Path, step: int) -> list[dict]:
    """A log's lines up to an iteration; what a crash cut off or will be repeated is dropped."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            lines += [entry] if entry["step"] <= step else []
    return lines


def draw_panels(path: Path, panels: dict[str, list[tuple]], x: str, linear: tuple[str, ...] = (),
                colours: int = 10) -> None:
    """Draw figures of a log as one PNG of panels, two in a row.

    Args: panels, {title: [(figure, label or None, log lines, line style), …]}; x, the figure on the
    horizontal axis; titles that start with one of `linear` have a linear vertical axis, others a
    logarithmic one; colours, after how many curves of a panel the colours start again.
    """
    from matplotlib.figure import Figure  # half a second that only those who draw should pay

    rows = (len(panels) + 1) // 2
    fig = Figure(figsize=(12, 3.5 * rows), layout="constrained")
    axes = fig.subplots(rows, 2, squeeze=False)
    for ax, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, label, lines, style) in enumerate(curves):
            points = [(line[x], line[name]) for line in lines if name in line]
            if points:
                ax.plot(*zip(*points, strict=True), style, lw=1, color=f"C{i % colours}",
                        label=label)
        ax.set(title=title, xlabel=x, yscale="linear" if title.startswith(linear) else "log")
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8)
    replace_file(path, lambda aside: fig.savefig(aside, dpi=90, format="png"))


# Numbers that a block keeps for backward, a token: (fp32, as computed) in its width, (as computed)
# in its MLP's; with weights that learn, and frozen. And those that a backward takes beside them.
KEPT = {"wan": ((8, 10, 3), (6, 6, 1)), "hunyuan": ((3, 8, 3), (3, 5, 1))}
BESIDE = {"wan": 0, "hunyuan": 8}


def memory_parts(cfg: Any, shape: tuple[int, ...], device: torch.device, world: int,
                 sp: int) -> dict[str, float]:
    """Bytes that each rank of `world` needs for latents of `shape`, by what they are for."""
    with torch.device("meta"):
        dit = build_dit(cfg.preset)
    wide, teams = compute_dtype(device).itemsize, world // sp
    count, *blocks = (sum(p.numel() for p in net.parameters()) for net in (dit, *dit.blocks))
    rest, block, depth = count - sum(blocks), max(blocks), len(blocks)
    batch = min(cfg.micro_batch, max(cfg.batch // teams, 1))
    tokens, D = math.prod(dit.token_grid(*shape[1:])) * batch, dit.cfg.dim
    L, stream = -(-tokens // sp), 4 if dit.cfg.family == "wan" else wide        # bytes a number
    learns, frozen = (L * (D * (4 * a + wide * b) + dit.cfg.ffn_dim * wide * c)
                      for a, b, c in KEPT[dit.cfg.family])
    if cfg.checkpointing:
        kept = depth * L * D * stream * (1 + cfg.adv)
    else:
        kept = depth * (learns + cfg.adv * frozen)
    gathered = 3 * wide * block + (4 + wide) * rest + 2 * 4 * block
    if world == 1:  # nothing is gathered, and cast only if it is computed in another dtype
        gathered = 2 * wide * block * (wide < 4) + 4 * block
    aside = 2 if cfg.updates == "combined" and cfg.traj and cfg.adv else 1
    adam = 8 * (1 + (cfg.updates == "separate")) * count / world
    return {"student": 4 * count / world, "gradients": 4 * aside * count / world,
            "AdamW": 8 * max(p.numel() for p in dit.parameters()) / world if cfg.offload else adam,
            "teacher": wide * count / world,
            "gathered layers": gathered,
            "activations": kept + learns + BESIDE[dit.cfg.family] * L * D * wide,
            "features, heads": cfg.adv * tokens * (3 * D + 6 * cfg.head_dim) * 4,
            "latents": 4 * (cfg.batch // teams + 4 * batch) * math.prod(shape)
            + (device.type == "cpu") * waiting_latents(cfg, shape, teams)}


def waiting_latents(cfg: Any, shape: tuple[int, ...], teams: int) -> int:
    """Bytes in a rank's host memory: trajectories of this pass over k and of the next batch."""
    return 8 * cfg.batch // teams * math.prod(shape) * len(cfg.key)


def host_plan(cfg: Any, parameters: int, moments: int, shape: tuple[int, ...],
              ranks: Ranks) -> str:
    """What a node's host memory must hold, beside the processes themselves.

    Args: parameters of the student; moments, AdamW's of each, twice there with --offload.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    need = 4 * parameters * (1 + moments * (1 + cfg.offload)) * here / ranks.world
    need += here * waiting_latents(cfg, shape, ranks.teams)
    told = f"  host memory     {need / 2 ** 30:9.2f} GiB a node, most of it a checkpoint's copy"
    lines = Path("/proc/meminfo").read_text().splitlines() if sys.platform == "linux" else []
    for line in lines:
        if line.startswith("MemAvailable:") and int(line.split()[1]) * 1024 < need:
            told += (f": MORE THAN THE {int(line.split()[1]) / 2 ** 20:.0f} GiB AVAILABLE; use "
                     "more nodes" + (", or leave out --offload" if cfg.offload else ""))
    return told


def memory_plan(cfg: Any, shape: tuple[int, ...], ranks: Ranks, have: int | None = None) -> str:
    """GiB a rank will need, from the shapes; what the framework itself takes is not in it.

    Args: have, bytes of the GPU's memory (none: as it is). If they are too few, it says which of
    --sp and --offload would do.
    """
    def together(sp: int, offload: bool) -> float:
        other = replace(cfg, offload=offload)
        return sum(memory_parts(other, shape, ranks.device, ranks.world, sp).values())

    parts = memory_parts(cfg, shape, ranks.device, ranks.world, ranks.sp)
    need = sum(parts.values())
    lines = [f"  {name:<16}{size / 2 ** 30:9.2f} GiB" for name, size in parts.items()]
    lines.append(f"  {'together':<16}{need / 2 ** 30:9.2f} GiB a rank")
    if have is None and ranks.device.type == "cuda":
        have = torch.cuda.mem_get_info(ranks.device)[1]
    if have is not None and need < ROOM * have:
        lines.append(f"  fits in {have / 2 ** 30:.0f} GiB")
    elif have is not None:
        heads = sizes_of(cfg.preset).num_heads
        others = ((sp, offload, together(sp, offload)) for offload in (False, True)
                  for sp in range(1, ranks.world + 1) if ranks.world % sp == 0 and heads % sp == 0
                  and cfg.batch % (ranks.world // sp) == 0)
        good = (f"--sp {sp}{' --offload true' if offload else ''} needs {size / 2 ** 30:.0f} GiB"
                for sp, offload, size in others if size < ROOM * have)
        lines.append(f"  DOES NOT FIT in {have / 2 ** 30:.0f} GiB: " + next(
            good, "nor with --sp and --offload; use more GPUs"))
    return "memory plan\n" + "\n".join(lines)


ROOM = 0.92  # of a GPU's memory; the rest is the framework's


def step_flops(cfg: Any, nets: Any, k: int, tokens: int) -> float:
    """Floating-point operations of an iteration, recomputation not counted (for MFU).

    Student: forward and backward (3 forwards' worth) for each loss; teacher: two forwards and a
    backward to its input, as far as the tap.
    """
    tapped = (nets.taps[k] + 1) / len(nets.teacher.blocks)
    forwards = 3 * cfg.traj + 3 * cfg.adv * (1 + tapped)
    return forwards * cfg.batch * nets.student.flops(tokens)


def relative_error(x: Tensor, y: Tensor) -> Tensor:
    """‖x − y‖² / ‖y‖² of every sample: [B]."""
    return (x - y).flatten(1).square().sum(1) / y.flatten(1).square().sum(1)


@torch.no_grad()
def held_out_errors(cfg: Any, dit: nn.Module, loader: Any, ranks: Ranks) -> dict:
    """How far a network at the key timesteps is from held-out trajectories of the teacher.

    Returns endpoint, ‖its m-step result − l_0‖² / ‖l_0‖² from the stored noise, and velocity, that
    ratio of the slope of Eq. 6 by k; means over the held-out trajectories of all ranks.
    """
    t_key, size = loader.data.t_key, cfg.micro_batch
    m = len(t_key) - 1
    sums = torch.zeros(m + 2, device=ranks.device)
    for start in range(0, cfg.held_out, size * ranks.teams):  # every rank runs as many forwards
        rows = [start + ranks.team * size + j for j in range(size)]
        real = torch.tensor([float(r < cfg.held_out) for r in rows], device=ranks.device)
        b = loader.batch([loader.count + min(r, cfg.held_out - 1) for r in rows], rows,
                         list(range(m + 1)))
        *_, x = walk(dit, b.x_key[m], t_key[::-1], b.cond)
        errors = [relative_error(x, b.x_key[0])]
        for k in range(m):
            slope = (b.x_key[k] - b.x_key[k + 1]) / (t_key[k] - t_key[k + 1])
            v = velocity(dit, b.x_key[k + 1], t_key[k + 1], b.cond)
            errors.append(relative_error(v, slope))
        sums += torch.cat([(torch.stack(errors) * real).sum(1), real.sum()[None]])
    dist.all_reduce(sums)
    endpoint, *by_k = (sums[:-1] / sums[-1]).tolist()
    return {"endpoint": endpoint, "velocity": by_k}


def draw_curves(path: Path, lines: list[dict], m: int) -> None:
    """Losses, head accuracy, gradient norms and held-out error from the log, as one PNG."""
    by_k = [(f"k={k}", [x for x in lines if x["k"] == k]) for k in range(m)]
    norms = [(f"grad_{name}", name, lines, "-") for name in ("traj", "adv", "sum", "head")]
    draw_panels(path, {
        "L_traj (Eq. 6)": [("loss_traj", label, own, "-") for label, own in by_k],
        "head accuracy: real (solid), generated (dashed)":
            [("acc_real", label, own, "-") for label, own in by_k]
            + [("acc_fake", None, own, "--") for _, own in by_k],
        "gradient norms before clipping": norms,
        "held-out endpoint error": [("endpoint", "student", lines, "o-"),
                                    ("endpoint_teacher", "teacher, no CFG", lines, "--")]},
        x="step", linear=("head accuracy",), colours=m)
