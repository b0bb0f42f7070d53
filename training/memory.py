"""The memory plan: how much a run will need on each GPU and on a host, before it allocates."""

import math
import os
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from artifacts.lora import build_student
from artifacts.student import EXPORT_DTYPES
from common.ranks import Ranks, compute_dtype, on_first_rank
from model import sizes_of
from training.checkpoint import check_disk, checkpoints, run_folder

# What a block saves per token for its backward, as (a, b, c): a numbers in fp32 and b in the dtype
# of computation, both times the block's width, and c in that dtype, times its MLP's width. The
# first triple is for trainable weights, the second for frozen ones. EXTRA: what a backward with
# checkpointing needs in addition, times the width. Source: measured by tools/rehearse.py.
SAVED_PER_TOKEN = {"wan": ((8, 10, 3), (6, 6, 1)), "hunyuan": ((3, 8, 3), (3, 5, 1))}
EXTRA_PER_TOKEN = {"wan": 11, "hunyuan": 8}
USABLE_MEMORY = 0.92  # fraction of a GPU's memory; the rest is left for the framework

meta_student = lru_cache(maxsize=4)(build_student)  # a plan is computed for many settings


def memory_parts(cfg: Any, shape: tuple[int, ...], device: torch.device, world: int,
                 sp: int) -> dict[str, float]:
    """Bytes that each of `world` ranks needs for latents of `shape` [C,T,H,W], by purpose.

    Of two experts one computes at a time. A run that trains only one of them also holds the other,
    frozen, in the dtype of computation: for high noise the teacher's, for low noise the student's.
    """
    dit = meta_student(sizes_of(cfg.preset), cfg.lora, cfg.experts)
    held, frozen = len(dit.blocks) // dit.cfg.num_layers, 1 if cfg.experts == "both" else 2
    wide, replicas = compute_dtype(device).itemsize, world // sp
    count, *blocks = (sum(p.numel() for p in net.parameters()) for net in (dit, *dit.blocks))
    trainable, *in_blocks = (sum(trainable_sizes(net)) for net in (dit, *dit.blocks))
    rest, depth = (count - sum(blocks)) / held, dit.cfg.num_layers
    batch = min(cfg.micro_batch, max(cfg.batch // replicas, 1))
    tokens, D = math.prod(dit.token_grid(*shape[1:])) * batch, dit.cfg.dim
    L, stream = -(-tokens // sp), 4 if dit.cfg.family == "wan" else wide        # bytes a number
    saved, saved_frozen = (L * (D * (4 * a + wide * b) + dit.cfg.ffn_dim * wide * c)
                      for a, b, c in SAVED_PER_TOKEN[dit.cfg.family])
    # Activations of the student or of the teacher; with checkpointing never both at once.
    each = L * D * stream if cfg.checkpointing else saved + cfg.adv * saved_frozen
    # While backward is at a block: its weights and those gathered ahead, its gradients, and those
    # of the block after it in fp32; all parameters around the blocks in fp32.
    gathered = [2 * wide * all_of + (wide + 4) * learning + 4 * rest
                for all_of, learning in zip(blocks, in_blocks, strict=True)]
    if world == 1:  # nothing is gathered, and weights are cast only to another dtype
        gathered = [2 * wide * all_of * (wide < 4) + 4 * learning
                    for all_of, learning in zip(blocks, in_blocks, strict=True)]
    at = max(range(depth), key=lambda i: (i + 1) * each + gathered[i])  # the block of the peak
    backward = saved + cfg.checkpointing * EXTRA_PER_TOKEN[dit.cfg.family] * L * D * wide
    features = cfg.adv * tokens * (3 * D + 6 * cfg.head_dim) * 4
    phases = [(gathered[at], (at + 1) * each + backward, features * (not cfg.checkpointing))]
    if cfg.checkpointing and cfg.adv:  # the teacher's backward, before the student's
        layers = wide * (2 * blocks[-1] + rest) if world > 1 else 0
        phases.append((layers, depth * each + saved_frozen, features))
    layers, activations, features = max(phases, key=sum)
    aside = 2 if cfg.updates == "combined" and cfg.traj and cfg.adv else 1
    adam = 8 * (1 + (cfg.updates == "separate")) * trainable / world
    return {"student": 4 * count / world, "gradients": 4 * aside * trainable / held / world,
            "AdamW": 8 * max(trainable_sizes(dit)) / world if cfg.offload else adam,
            "teacher": wide * count * frozen / world,
            "gathered layers": layers, "activations": activations, "features, heads": features,
            "latents": 4 * (cfg.batch // replicas + 4 * batch) * math.prod(shape)
            + (device.type == "cpu") * waiting_latents(cfg, shape, replicas)}


def trainable_sizes(net: nn.Module) -> list[int]:
    """The number of elements of each trainable parameter."""
    return [p.numel() for p in net.parameters() if p.requires_grad]


def waiting_latents(cfg: Any, shape: tuple[int, ...], replicas: int) -> int:
    """Bytes of trajectories in a rank's host memory: of this pass over k and of the next batch."""
    return 8 * cfg.batch // replicas * math.prod(shape) * len(cfg.key)


def student_size(cfg: Any) -> tuple[int, int, int]:
    """The student's numbers of trainable and of frozen parameters, and AdamW's moments per
    trainable one."""
    dit = meta_student(sizes_of(cfg.preset), cfg.lora, cfg.experts)
    trainable = sum(trainable_sizes(dit))
    frozen = sum(p.numel() for p in dit.parameters()) - trainable
    return trainable, frozen, 4 if cfg.updates == "separate" else 2


def host_plan(cfg: Any, shape: tuple[int, ...], ranks: Ranks) -> str:
    """A line with what a node's host memory must hold in addition to the processes themselves: the
    copy of a checkpoint, with --offload also the moments, and waiting trajectories."""
    parameters, _, moments = student_size(cfg)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    need = 4 * parameters * (1 + moments * (1 + cfg.offload)) * local_ranks / ranks.world
    need += local_ranks * waiting_latents(cfg, shape, ranks.dp_size)
    text = f"  host memory     {need / 2 ** 30:9.2f} GiB per node, mostly a checkpoint's copy"
    lines = Path("/proc/meminfo").read_text().splitlines() if sys.platform == "linux" else []
    for line in lines:
        if line.startswith("MemAvailable:") and int(line.split()[1]) * 1024 < need:
            text += (f": MORE THAN THE {int(line.split()[1]) / 2 ** 20:.0f} GiB AVAILABLE; use "
                     "more nodes" + (", or leave out --offload" if cfg.offload else ""))
    return text


def gpu_bytes(ranks: Ranks) -> int | None:
    """The memory of this rank's GPU in bytes; None on a CPU."""
    return torch.cuda.mem_get_info(ranks.device)[1] if ranks.device.type == "cuda" else None


def shortage(cfg: Any, shape: tuple[int, ...], ranks: Ranks, have: int | None) -> str | None:
    """Settings with which a run would fit into `have` bytes per rank; None if it fits already."""
    def total(sp: int, offload: bool) -> float:
        other = replace(cfg, offload=offload)
        return sum(memory_parts(other, shape, ranks.device, ranks.world, sp).values())

    if have is None or total(ranks.sp, cfg.offload) < USABLE_MEMORY * have:
        return None
    heads = sizes_of(cfg.preset).num_heads
    others = ((sp, offload, total(sp, offload)) for offload in (False, True)
              for sp in range(1, ranks.world + 1) if ranks.world % sp == 0 and heads % sp == 0
              and cfg.batch % (ranks.world // sp) == 0)
    fitting = (f"--sp {sp}{' --offload true' if offload else ''} needs {size / 2 ** 30:.0f} GiB"
               for sp, offload, size in others if size < USABLE_MEMORY * have)
    return f"in {have / 2 ** 30:.0f} GiB: " + next(
        fitting, "not even with --sp and --offload: use more GPUs")


def print_plan(cfg: Any, shape: tuple[int, ...], ranks: Ranks, have: int | None) -> None:
    """Print the GiB that each rank and the host need, computed from the shapes, without the
    framework's own memory; in one line if they are small.

    Args: have, bytes of the GPU's memory, or None. Raises ValueError with settings that would fit
    if the run does not, unless force_plan.
    """
    parts = memory_parts(cfg, shape, ranks.device, ranks.world, ranks.sp)
    together = sum(parts.values())
    if together < 2 ** 30:
        print(f"memory plan: {together / 2 ** 20:.0f} MiB per rank")
        return
    print("memory plan")
    for name, size in parts.items():
        print(f"  {name:<16}{size / 2 ** 30:9.2f} GiB")
    print(f"  {'together':<16}{together / 2 ** 30:9.2f} GiB per rank")
    print(host_plan(cfg, shape, ranks))
    lacks = shortage(cfg, shape, ranks, have)
    if lacks and not cfg.force_plan:
        raise ValueError(f"memory plan: the run does not fit {lacks}: choose settings that fit, or "
                         "start anyway with --force_plan true")
    if have is not None:
        print(f"  DOES NOT FIT {lacks}" if lacks else f"  fits in {have / 2 ** 30:.0f} GiB")


def check_resources(cfg: Any, shape: tuple[int, ...], ranks: Ranks) -> None:
    """Print the memory plan. Raises ValueError if the run will not fit the GPU or the disk."""
    def check() -> None:
        print_plan(cfg, shape, ranks, gpu_bytes(ranks))
        trainable, frozen, moments = student_size(cfg)
        done, every = max(checkpoints(run_folder(cfg)), default=0), cfg.export_every
        students = 1 + (max((cfg.iterations - 1) // every - done // every, 0) if every else 0)
        students *= 2 if cfg.export == "diffusers" else 1
        export = students * EXPORT_DTYPES[cfg.export_dtype].itemsize * (trainable + frozen)
        check_disk(run_folder(cfg), trainable, moments, cfg.keep, export)

    on_first_rank(check)
