"""The trainer's data: the SynVid folder, micro-batches read ahead, and fresh noise."""

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from artifacts.trajectories import SynVid, find_trajectories, open_trajectories, read_manifest
from common.config import Shared, as_options, load_yaml
from common.files import ROOT
from common.ranks import (
    Ranks, draw_noise, end_all, errors_on_all_ranks, generator, on_first_rank)
from model import collate, sizes_of


def open_synvid(cfg: Any) -> SynVid:
    """The trajectories of this run; in the small world, missing ones are made first. Raises as
    open_trajectories."""
    folder = Path(cfg.synvid) if cfg.synvid is not None else Path(cfg.run) / "synvid"
    if cfg.preset == "tiny" and cfg.synvid is None:
        on_first_rank(lambda: make_small_synvid(cfg, folder))
    return open_trajectories(folder, cfg)


def make_small_synvid(cfg: Any, folder: Path) -> None:
    """Run stage 1 as a process, unless the folder holds as many trajectories as the config sets.

    Raises ValueError if it fails.
    """
    section = (load_yaml(cfg.path) or {}).get("synvid")
    count = section.get("count") if isinstance(section, dict) else None
    if isinstance(count, int) and len(find_trajectories(folder)) >= count:
        return
    shared = {f.name: getattr(cfg, f.name) for f in fields(Shared)}
    if (folder / "manifest.json").exists():  # students of several seeds share one SynVid
        shared["seed"] = read_manifest(folder)["seed"]
    # Stage 1 runs as a single process, so torchrun's variables are removed from its environment.
    alone = {name: value for name, value in os.environ.items()
             if not name.startswith(("TORCHELASTIC", "MASTER_"))
             and not name.endswith(("RANK", "WORLD_SIZE"))}
    command = [sys.executable, str(ROOT / "synvid.py"), str(cfg.path), *as_options(shared)]
    if subprocess.run(command, env=alone).returncode:
        raise ValueError(f"{folder}: stage 1 failed, see the messages above: correct what they "
                         "name, then rerun this command")


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """x in pinned memory if the device is a GPU, so that copying it there does not block."""
    return x if device.type == "cpu" else x.pin_memory()


@dataclass
class Latents:
    """l_{t'_k} by k, [B,C,T,H,W], in host memory, since most of them wait in a queue.

    Reading one copies it to the device, from pinned memory without blocking.
    """
    host: dict[int, Tensor]
    device: torch.device

    def __getitem__(self, k: int) -> Tensor:
        return self.host[k].to(self.device, non_blocking=True)


@dataclass
class Batch:
    """One micro-batch of trajectories: x_key[k] [B,C,T,H,W], cond, and its slots in the batch."""
    x_key: Latents
    cond: dict[str, Tensor]
    slots: list[int]


def trained_steps(cfg: Any, t_key: list[float]) -> list[int]:
    """The k of the student's steps that a run trains, from noise to data: all m, or, for a run that
    trains one expert, those whose start t'_{k+1} is in that expert's range.

    Args: t_key[k] = t'_k. Raises ValueError if there is none.
    """
    ks, boundary = list(reversed(range(len(t_key) - 1))), sizes_of(cfg.preset).boundary
    if cfg.experts != "both":
        ks = [k for k in ks if (t_key[k + 1] >= boundary) == (cfg.experts == "high")]
    if not ks:
        end_all(f"key: no step starts in the range of the expert for {cfg.experts} noise, whose "
                f"boundary is {boundary}: choose other key timesteps")
    return ks


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order of trajectories in one pass over the data."""
    return torch.randperm(count, generator=generator("order", seed, epoch)).tolist()


def trajectories_of(cfg: Any, step: int, slots: Iterable[int], count: int) -> list[int]:
    """The trajectories, out of `count`, in some slots of an iteration's batch; each is used once
    before any is used again."""
    positions = [divmod(step * cfg.batch + slot, count) for slot in slots]
    return [epoch_order(cfg.seed, epoch, count)[position] for epoch, position in positions]


class Loader:
    """The micro-batches of an iteration; the next iteration's are read while this one computes.

    Slot s of iteration i always means the same trajectory; micro-batch a of a data-parallel replica
    (one rank, if sp is 1) holds the slots from (a·dp_size + dp_rank)·micro_batch on.
    """

    def __init__(self, cfg: Any, data: SynVid, ranks: Ranks):
        self.cfg, self.data, self.device = cfg, data, ranks.device
        self.shape = tuple(data.manifest["shape"])                            # C T H W
        self.count = len(data) - cfg.held_out
        if self.count < 1:
            end_all(f"held_out: expected fewer than the {len(data)} trajectories, got "
                    f"{cfg.held_out}: lower it, or make more trajectories")
        size, each = cfg.micro_batch, cfg.batch // (cfg.micro_batch * ranks.dp_size)
        self.ks = trained_steps(cfg, data.t_key)
        starts = [(a * ranks.dp_size + ranks.dp_rank) * size for a in range(each)]
        self.slots = [list(range(start, start + size)) for start in starts]
        self.pool, self.ahead = ThreadPoolExecutor(1), {}

    def batch(self, indices: list[int], slots: list[int], ks: list[int]) -> Batch:
        """Read the latents of some k of some trajectories, in fp32, as one micro-batch."""
        items = [self.data.read(i, ks) for i in indices]
        x = torch.stack([x_key for x_key, _, _ in items], 1)                    # len(ks) B C T H W
        cond = {name: pinned(c, self.device).to(self.device, non_blocking=True)
                for name, c in collate([c for _, c, _ in items]).items()}
        x = pinned(x, self.device)
        return Batch(Latents(dict(zip(ks, x, strict=True)), self.device), cond, slots)

    def read(self, step: int) -> list[Batch]:
        """The micro-batches of one iteration."""
        k = self.ks[step % len(self.ks)]
        last = self.ks[-1] if k == self.ks[0] and self.cfg.adv else k  # all latents for Q_m
        ks = list(range(last, k + 2))
        return [self.batch(trajectories_of(self.cfg, step, slots, self.count), slots, ks)
                for slots in self.slots]

    def __call__(self, step: int) -> list[Batch]:
        """As read, but an error on one rank is raised on all, before any of them computes."""
        ready = self.ahead.pop(step, None)
        with errors_on_all_ranks():
            batches = ready.result() if ready else self.read(step)
        self.ahead = {step + 1: self.pool.submit(self.read, step + 1)}
        return batches


def fresh_noise(cfg: Any, step: int, like: Batch) -> Tensor:
    """Fresh z ~ N(0, I) for a micro-batch, one draw per slot. Alg. 1, line 11; D4."""
    shape = next(iter(like.x_key.host.values())).shape[1:]
    z = draw_noise(shape, [("z", cfg.seed, step, slot) for slot in like.slots])
    return pinned(z, like.x_key.device).to(like.x_key.device, non_blocking=True)
