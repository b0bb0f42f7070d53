"""How much memory a run will need, told before it takes any: of each GPU, and of a node's host."""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from artifacts.lora import build_student
from common.ranks import Ranks, compute_dtype
from model import sizes_of

# Numbers that a block keeps for backward, a token: (fp32, as computed) in its width, (as computed)
# in its MLP's; with weights that learn, and frozen. And those that a backward takes beside them.
SAVED_PER_TOKEN = {"wan": ((8, 10, 3), (6, 6, 1)), "hunyuan": ((3, 8, 3), (3, 5, 1))}
EXTRA_PER_TOKEN = {"wan": 0, "hunyuan": 8}


def memory_parts(cfg: Any, shape: tuple[int, ...], device: torch.device, world: int,
                 sp: int) -> dict[str, float]:
    """Bytes that each rank of `world` needs for latents of `shape`, by what they are for."""
    dit = build_student(cfg.preset, cfg.lora)
    wide, replicas = compute_dtype(device).itemsize, world // sp
    count, *blocks = (sum(p.numel() for p in net.parameters()) for net in (dit, *dit.blocks))
    learning, *in_blocks = (sum(learning_sizes(net)) for net in (dit, *dit.blocks))
    rest, block, depth = count - sum(blocks), max(blocks), len(blocks)
    batch = min(cfg.micro_batch, max(cfg.batch // replicas, 1))
    tokens, D = math.prod(dit.token_grid(*shape[1:])) * batch, dit.cfg.dim
    L, stream = -(-tokens // sp), 4 if dit.cfg.family == "wan" else wide        # bytes a number
    learns, frozen = (L * (D * (4 * a + wide * b) + dit.cfg.ffn_dim * wide * c)
                      for a, b, c in SAVED_PER_TOKEN[dit.cfg.family])
    if cfg.checkpointing:  # of the student or of the teacher: never both at once
        kept = depth * L * D * stream
    else:
        kept = depth * (learns + cfg.adv * frozen)
    gathered = 3 * wide * block + (4 + wide) * rest + 2 * 4 * max(in_blocks)
    if world == 1:  # nothing is gathered, and cast only if it is computed in another dtype
        gathered = 2 * wide * block * (wide < 4) + 4 * max(in_blocks)
    aside = 2 if cfg.updates == "combined" and cfg.traj and cfg.adv else 1
    adam = 8 * (1 + (cfg.updates == "separate")) * learning / world
    return {"student": 4 * count / world, "gradients": 4 * aside * learning / world,
            "AdamW": 8 * max(learning_sizes(dit)) / world if cfg.offload else adam,
            "teacher": wide * count / world,
            "gathered layers": gathered,
            "activations": kept + learns + EXTRA_PER_TOKEN[dit.cfg.family] * L * D * wide,
            "features, heads": cfg.adv * tokens * (3 * D + 6 * cfg.head_dim) * 4,
            "latents": 4 * (cfg.batch // replicas + 4 * batch) * math.prod(shape)
            + (device.type == "cpu") * waiting_latents(cfg, shape, replicas)}


def learning_sizes(net: nn.Module) -> list[int]:
    """Numbers in each parameter that learns."""
    return [p.numel() for p in net.parameters() if p.requires_grad]


def waiting_latents(cfg: Any, shape: tuple[int, ...], replicas: int) -> int:
    """Bytes in a rank's host memory: trajectories of this pass over k and of the next batch."""
    return 8 * cfg.batch // replicas * math.prod(shape) * len(cfg.key)


def host_plan(cfg: Any, parameters: int, moments: int, shape: tuple[int, ...],
              ranks: Ranks) -> str:
    """What a node's host memory must hold, beside the processes themselves.

    Args: parameters that learn; moments, AdamW's of each, twice there with --offload.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    need = 4 * parameters * (1 + moments * (1 + cfg.offload)) * here / ranks.world
    need += here * waiting_latents(cfg, shape, ranks.dp_size)
    text = f"  host memory     {need / 2 ** 30:9.2f} GiB a node, most of it a checkpoint's copy"
    lines = Path("/proc/meminfo").read_text().splitlines() if sys.platform == "linux" else []
    for line in lines:
        if line.startswith("MemAvailable:") and int(line.split()[1]) * 1024 < need:
            text += (f": MORE THAN THE {int(line.split()[1]) / 2 ** 20:.0f} GiB AVAILABLE; use "
                     "more nodes" + (", or leave out --offload" if cfg.offload else ""))
    return text


def gpu_bytes(ranks: Ranks) -> int | None:
    """Bytes of this rank's GPU; None on a CPU."""
    return torch.cuda.mem_get_info(ranks.device)[1] if ranks.device.type == "cuda" else None


def shortage(cfg: Any, shape: tuple[int, ...], ranks: Ranks, have: int | None) -> str | None:
    """What a run that does not fit into `have` bytes a rank would need; None if it fits."""
    def together(sp: int, offload: bool) -> float:
        other = replace(cfg, offload=offload)
        return sum(memory_parts(other, shape, ranks.device, ranks.world, sp).values())

    if have is None or together(ranks.sp, cfg.offload) < USABLE_MEMORY * have:
        return None
    heads = sizes_of(cfg.preset).num_heads
    others = ((sp, offload, together(sp, offload)) for offload in (False, True)
              for sp in range(1, ranks.world + 1) if ranks.world % sp == 0 and heads % sp == 0
              and cfg.batch % (ranks.world // sp) == 0)
    good = (f"--sp {sp}{' --offload true' if offload else ''} needs {size / 2 ** 30:.0f} GiB"
            for sp, offload, size in others if size < USABLE_MEMORY * have)
    return f"in {have / 2 ** 30:.0f} GiB: " + next(
        good, "nor with --sp and --offload; use more GPUs")


def memory_plan(cfg: Any, shape: tuple[int, ...], ranks: Ranks, have: int | None = None) -> str:
    """GiB a rank will need, from the shapes; what the framework itself takes is not in it.

    Args: have, bytes of the GPU's memory (none: as it is). If they are too few, it says which of
    --sp and --offload would do.
    """
    parts = memory_parts(cfg, shape, ranks.device, ranks.world, ranks.sp)
    lines = [f"  {name:<16}{size / 2 ** 30:9.2f} GiB" for name, size in parts.items()]
    lines.append(f"  {'together':<16}{sum(parts.values()) / 2 ** 30:9.2f} GiB a rank")
    have = have or gpu_bytes(ranks)
    lacks = shortage(cfg, shape, ranks, have)
    if have is not None:
        lines.append(f"  DOES NOT FIT {lacks}" if lacks else f"  fits in {have / 2 ** 30:.0f} GiB")
    return "memory plan\n" + "\n".join(lines)
USABLE_MEMORY = 0.92  # of a GPU's memory; the rest is the framework's


def print_plans(cfg: Any, shape: tuple[int, ...], ranks: Ranks,
                have: int | None = None) -> tuple[int, int, int]:
    """Print both plans, in one line if they are small; have, as in memory_plan.

    Returns how many parameters of the student learn and are frozen, and AdamW's moments of each
    that learns. Raises ValueError if the run does not fit the GPU, unless force_plan.
    """
    dit = build_student(cfg.preset, cfg.lora)
    count = sum(learning_sizes(dit))
    frozen = sum(p.numel() for p in dit.parameters()) - count
    moments = 4 if cfg.updates == "separate" else 2
    need = sum(memory_parts(cfg, shape, ranks.device, ranks.world, ranks.sp).values())
    if need < 2 ** 30:
        print(f"memory plan: {need / 2 ** 20:.0f} MiB a rank", flush=True)
    else:
        print(memory_plan(cfg, shape, ranks, have), flush=True)
        print(host_plan(cfg, count, moments, shape, ranks), flush=True)
        lacks = shortage(cfg, shape, ranks, have or gpu_bytes(ranks))
        if lacks and not cfg.force_plan:
            raise ValueError(f"memory plan: {lacks}: wanted a run that fits; if you know better, "
                             "--force_plan true")
    return count, frozen, moments
