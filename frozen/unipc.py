"""UniPC, the solver of Wan's official commands: its grid of times and its steps; and the denoising
of a batch by either solver.

It is multistep UniPC (arXiv 2302.04867) of order 2, variant B2(h) = e^h - 1 ("bh2"), on predictions
of x0. A step costs one evaluation, as Euler's does: the predictor steps to the next time, and the
evaluation there first corrects the predicted latent.

The grid is not `time_grid`'s: it starts below 1, and the DiT is evaluated at its times cut down to
1/1000, as the official code gives it integers of 1000·t. The steps use the uncut times.

Symbols: λ(t) = ln((1 - t) / t) · h = λ(t_next) - λ(t) · m[i] the x0 predicted at times[i].
"""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from common.ranks import Timer
from model import collate, sample_euler, shift_time, velocity


def unipc_grid(n: int, shift: float, twice: bool = False) -> Tensor:
    """The times t_n > … > t_0 = 0 of n UniPC steps, in the order in which sampling visits them.

    Args: twice, whether 0.999, where the even grid starts, is shifted before the whole grid is:
    AccVideo's text-to-video script does that, its image-to-video script and Wan's do not.
    Returns float64 [n + 1]. Source: the releases.
    """
    first = torch.tensor(0.999, dtype=torch.float64)
    first = shift_time(first, shift) if twice else first
    return shift_time(torch.linspace(first.item(), 0, n + 1, dtype=torch.float64), shift)


def sample_unipc(dit: nn.Module, x: Tensor, times: list[float], cond: dict,
                 uncond: dict | None = None, cfg_scale: float = 1.0) -> Iterator[Tensor]:
    """Denoise x along `times`, yielding the latent after each UniPC step, without gradient.

    Args: x [B,C,T,H,W] fp32 at times[0]; times falling, below 1, as from unipc_grid; the rest as in
    `velocity`. The state stays fp32; its factors are computed in float64. Source: arXiv 2302.04867;
    Wan 2.1's release.
    """
    lam = [math.log((1 - t) / t) if t > 0 else math.inf for t in times]
    m, before = [], x
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        with torch.no_grad():
            v = velocity(dit, x, math.floor(1000 * t) / 1000, cond, uncond, cfg_scale)
            m = [*m[-2:], x - t * v.float()]
            if i > 0:
                x = data_step(before, corrected(m, lam[:i + 1]), times[i - 1], t)
            first_order = i == 0 or i == len(times) - 2
            before, x0 = x, m[-1] if first_order else predicted(m, lam[:i + 2])
            x = data_step(x, x0, t, t_next)
        yield x


def data_step(x: Tensor, x0: Tensor, t: float, t_next: float) -> Tensor:
    """A step from t to t_next on the straight path to x0; at t_next = 0 that is x0 itself."""
    # The solver's factor of x0, (1 - t_next)·(1 - e^-h), is 1 - t_next / t with this λ.
    return t_next / t * x + (1 - t_next / t) * x0


def predicted(m: list[Tensor], lam: list[float]) -> Tensor:
    """x0 for the predictor's step of order 2: the line through m[-2:], half a step ahead in λ.

    Args: m, up to the present; lam, up to the next time. Source: UniP-2.
    """
    h = lam[-1] - lam[-2]
    r = (lam[-3] - lam[-2]) / h
    return m[-1] + 0.5 * (m[-2] - m[-1]) / r


def corrected(m: list[Tensor], lam: list[float]) -> Tensor:
    """x0 with which the last step is taken again, given m[-1] at its end.

    Args: m and lam, up to the present. With two m the order is 1, with three 2. Source: UniC.
    """
    h = lam[-1] - lam[-2]
    if len(m) == 2:
        return m[-2] + 0.5 * (m[-1] - m[-2])
    r = (lam[-3] - lam[-2]) / h
    B = math.expm1(-h)
    g = -B / h - 1
    b1, b2 = g / B, 2 * (-g / h - 0.5) / B
    p1 = (b1 - b2) / (1 - r)
    return m[-2] + p1 * (m[-3] - m[-2]) / r + (b1 - p1) * (m[-1] - m[-2])


def sample_batch(dit: nn.Module, noise: Tensor, times: list[float], conds: list[dict],
                 unconds: list[dict] | None, cfg_scale: float, timer: Timer, bar: tqdm,
                 solver: str = "euler") -> Tensor:
    """Denoise a batch from noise to data; returns latents [B,C,T,H,W]. Eq. 5.

    Args: noise [B,C,T,H,W]; times, falling to 0; conds and unconds, one per video (no guidance:
    None); timer, which gets a lap "steps" per step; bar, advanced by B per step; solver, euler or
    unipc.
    """
    def batch(samples: list[dict]) -> dict[str, Tensor]:
        return {name: c.to(timer.device) for name, c in collate(samples).items()}

    x = noise.to(timer.device)
    uncond = None if unconds is None else batch(unconds)
    steps = sample_unipc if solver == "unipc" else sample_euler
    for latents in steps(dit, x, times, batch(conds), uncond, cfg_scale):
        x = latents
        timer.lap("steps")
        bar.update(len(conds))
    return x
