"""The trainer's data: micro-batches of trajectories by iteration, read ahead; fresh noise."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from artifacts.trajectories import SynVid
from common.ranks import Ranks, draw_noise, generator, raise_together
from model import collate



# ------------------------------------------------------------------------------------- data

def pinned(x: Tensor, device: torch.device) -> Tensor:
    """x in memory from which a copy to a GPU need not be waited for; as it is for a CPU."""
    return x.pin_memory() if device.type == "cuda" else x


@dataclass
class Latents:
    """l_{t'_k} by k, [B,C,T,H,W], in host memory: most of them wait; one that is read is copied to
    the device, from pinned memory without waiting."""
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


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order of trajectories in one pass over the data."""
    return torch.randperm(count, generator=generator("order", seed, epoch)).tolist()


class Loader:
    """Micro-batches of an iteration by its number, the next one's read while this one computes.

    Slot s of iteration i always means the same trajectory; micro-batch a of a data-parallel replica
    (one rank, if sp is 1) holds the slots from (a·dp_size + dp_rank)·micro_batch on.
    """

    def __init__(self, cfg: Any, data: SynVid, ranks: Ranks):
        self.cfg, self.data, self.device = cfg, data, ranks.device
        self.shape = tuple(data.manifest["shape"])                            # C T H W
        count = torch.tensor(len(data) - cfg.held_out)
        dist.broadcast(count, 0)  # a job may still be adding trajectories
        self.count = int(count)
        if self.count < 1:
            raise ValueError(f"held_out: got {cfg.held_out} of {len(data)} trajectories; wanted "
                             "fewer, or more trajectories")
        size, each = cfg.micro_batch, cfg.batch // (cfg.micro_batch * ranks.dp_size)
        starts = [(a * ranks.dp_size + ranks.dp_rank) * size for a in range(each)]
        self.slots = [list(range(start, start + size)) for start in starts]
        self.pool, self.ahead = ThreadPoolExecutor(1), {}

    def batch(self, indices: list[int], slots: list[int], ks: list[int]) -> Batch:
        """Read the latents of some k and stack them; fp32 whatever they are stored in."""
        items = [self.data.read(i, ks) for i in indices]
        x = torch.stack([x_key for x_key, _, _ in items], 1)                    # len(ks) B C T H W
        cond = {name: pinned(c, self.device).to(self.device, non_blocking=True)
                for name, c in collate([c for _, c, _ in items]).items()}
        x = pinned(x, self.device)
        return Batch(Latents(dict(zip(ks, x, strict=True)), self.device), cond, slots)

    def read(self, step: int) -> list[Batch]:
        """The micro-batches of one iteration: each trajectory once before any comes again."""
        m, out = len(self.data.t_key) - 1, []
        k = m - 1 - step % m
        ks = list(range(m + 1)) if k == m - 1 and self.cfg.adv else [k, k + 1]  # all go into Q_m
        for slots in self.slots:
            positions = [divmod(step * self.cfg.batch + slot, self.count) for slot in slots]
            out.append(self.batch([epoch_order(self.cfg.seed, epoch, self.count)[position]
                                   for epoch, position in positions], slots, ks))
        return out

    def __call__(self, step: int) -> list[Batch]:
        """As read; an error of one rank is one of all, before any of them computes."""
        ready, batches, error = self.ahead.pop(step, None), [], None
        try:
            batches = ready.result() if ready else self.read(step)
        except (ValueError, OSError) as e:
            error = e
        raise_together(error)
        self.ahead = {step + 1: self.pool.submit(self.read, step + 1)}
        return batches


def fresh_noise(cfg: Any, step: int, like: Batch) -> Tensor:
    """Fresh z ~ N(0, I), one draw a slot. Alg. 1; D4."""
    shape = next(iter(like.x_key.host.values())).shape[1:]
    z = draw_noise(shape, [("z", cfg.seed, step, slot) for slot in like.slots])
    return z.to(like.x_key.device)
