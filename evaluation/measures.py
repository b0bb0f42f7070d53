"""Measures of how far a model's videos are from the teacher's, in float64, and the table's rows.

What a column means stands in evaluate.py. Legend: N videos, C channels, T frames, H W height and
width of latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common.ranks import generator
from small_world import clips as world

# ---------------------------------------------------------------------------------- measures

Statistic = Callable[[Tensor], float]  # of the videos whose indices it is given


def endpoint_error(x: Tensor, x50: Tensor) -> Tensor:
    """‖x − x50‖² / ‖x50‖² of each video, float64 [N], for latents [N, …] from the same noise."""
    x, x50 = x.double().flatten(1), x50.double().flatten(1)
    return (x - x50).square().sum(1) / x50.square().sum(1)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square difference of each x [N, …] to each y [M, …], float64 [N, M]."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5


def energy_distance(xx: Tensor, yy: Tensor, xy: Tensor) -> float:
    """2 E|x − y| − E|x − x'| − E|y − y'| from the distance matrices of N videos each.

    x_i and y_i share caption i, so the diagonal of xy is left out like those of xx and yy: all
    three means are over the same pairs of captions, and equal distributions give 0 on average.
    Source: Székely and Rizzo, 2013 (U-statistic).
    """
    off = 1 - torch.eye(len(xx), dtype=xx.dtype)
    return float(((2 * xy - xx - yy) * off).sum() / off.sum())


def projections(x: Tensor, count: int) -> Tensor:
    """x [N, …] along `count` fixed random unit directions, float64 [N, count]."""
    x, g = x.double().flatten(1), generator("sliced Wasserstein")
    out = []
    for _ in range(count):  # one by one: large latents have millions of elements
        u = torch.randn(x.shape[1], generator=g, dtype=torch.float64)
        out.append(x @ (u / u.norm()))
    return torch.stack(out, 1)


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Mean over directions of the Wasserstein-1 distance of projections x, y [N, directions]."""
    return float((x.sort(0).values - y.sort(0).values).abs().mean())


def set_distances(x: Tensor, y: Tensor, directions: int) -> dict[str, Statistic]:
    """Energy and sliced Wasserstein distance of latents x, y [N, …] as functions of indices."""
    xx, yy, xy = distances(x, x), distances(y, y), distances(x, y)
    p, q = projections(x, directions), projections(y, directions)
    return {"energy": lambda i: energy_distance(xx[i][:, i], yy[i][:, i], xy[i][:, i]),
            "sliced": lambda i: sliced_wasserstein(p[i], q[i])}


def mean_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error, of values [N]."""
    values = values.double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def jackknife(statistic: Statistic, n: int) -> tuple[float, float]:
    """A statistic of n videos, given their indices, and its leave-one-out standard error."""
    every = torch.arange(n)
    left = torch.tensor([statistic(every[every != i]) for i in range(n)], dtype=torch.float64)
    return statistic(every), float(((n - 1) * left.var(correction=0)).sqrt())


def spread(x: Tensor, of: Tensor) -> Statistic:
    """Variance of latents x [N, …] over videos, summed over elements, over that of `of` [N, …]."""
    def variance(z: Tensor) -> Statistic:
        z = z.double().flatten(1)
        squares = z.square().sum(1)
        return lambda i: float(squares[i].sum() - z[i].sum(0).square().sum() / len(i))

    own, other = variance(x), variance(of)
    return lambda i: own(i) / other(i)


C2ST_FITS, C2ST_BATCH = 3, 16  # initialisations; videos of each kind in an iteration


def c2st(x: Tensor, y: Tensor, steps: int, device: torch.device) -> tuple[float, float]:
    """Accuracy of a classifier trained for some steps to tell x from y [N,C,T,H,W]; 0.5: it cannot.

    Half of the videos train it and the other half asks it, then the other way round. Returns mean
    and standard error over C2ST_FITS initialisations.
    Source: the classifier two-sample test, Lopez-Paz and Oquab, 2017.
    """
    both, right = torch.stack((x, y)).float(), []                       # 2 N C T H W
    for fit in range(C2ST_FITS):
        hits = [classify(both[:, fold::2], both[:, 1 - fold::2], steps, fit, device)
                for fold in (0, 1)]
        right.append(sum(hits) / (2 * len(x)))
    return mean_error(torch.tensor(right))


def classify(known: Tensor, asked: Tensor, steps: int, fit: int, device: torch.device) -> int:
    """How many of `asked` [2,M,C,T,H,W] a small network puts on the right side of x and y, when
    it has learned from `known` in so many steps; fit numbers its initialisation and order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit)
        net = nn.Sequential(
            nn.Conv3d(known.shape[2], 32, 3, padding=1), nn.SiLU(),
            nn.Conv3d(32, 64, 3, stride=(1, 2, 2), padding=1), nn.SiLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 1))
    net, g = net.to(device), generator("classifier", fit)
    opt = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    signs = torch.tensor([1.0, -1.0], device=device)[:, None]
    for _ in range(steps):
        pick = torch.randint(known.shape[1], (min(C2ST_BATCH, known.shape[1]),), generator=g)
        logits = net(known[:, pick].to(device).flatten(0, 1)).view(2, -1)
        F.softplus(-signs * logits).mean().backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    with torch.no_grad():
        logits = torch.cat([net(some.to(device)) for some in asked.flatten(0, 1).split(C2ST_BATCH)])
    return int((signs * logits.view(2, -1) > 0).sum())


@dataclass
class Samples:
    """A model's latents [N,C,T,H,W], and after measure_videos what its videos showed."""
    label: str
    latents: Tensor
    evaluations: int
    seconds: float                                # of the DiT, a video
    hf: Tensor | None = None                      # [N]
    first: Tensor | None = None                   # [N], dB, if the videos start from images
    hits: dict[str, Tensor] | None = None         # [N] bool for each attribute, and "all"
    shown: dict[int, Tensor] | None = None        # by index, small
    decode_seconds: float = 0.0                   # a video


# --------------------------------------------------------------------------------- the table

COLUMNS = {"endpoint": "endpoint error ↓", "energy": "energy distance", "sliced": "sliced W ↓",
           "hf": "HF, 1 = teacher's",
           "spread": "spread, 1 = teacher's", "c2st": "C2ST, .5 = alike"}


def measure(samples: Samples, best: Samples, reference: Tensor, directions: int, c2st_steps: int,
            device: torch.device) -> dict:
    """One row of the table: {"label", "evaluations", "seconds", column: (value, standard error)}.

    Args: best, teacher@n from the same noise; reference, independent teacher@n latents [N,…].
    """
    n = len(samples.latents)
    row = {"label": samples.label, "evaluations": samples.evaluations, "seconds": samples.seconds,
           "decode_seconds": samples.decode_seconds,
           "endpoint": mean_error(endpoint_error(samples.latents, best.latents)),
           "hf": jackknife(lambda i: float(samples.hf[i].sum() / best.hf[i].sum()), n),
           "spread": jackknife(spread(samples.latents, best.latents), n),
           "c2st": c2st(samples.latents, reference, c2st_steps, device)}
    zero = set_distances(best.latents, reference, directions)
    for name, distance in set_distances(samples.latents, reference, directions).items():
        row[name] = jackknife(distance, n)
        if samples is not best:
            gap = jackknife(lambda i, d=distance, z=zero[name]: d(i) - z(i), n)
            row[name] = (row[name][0], gap[1])
    if samples.first is not None:
        row["first"] = mean_error(samples.first)
    for name, hits in (samples.hits or {}).items():
        row[name] = mean_error(hits)
    return row


def mean_row(rows: list[dict]) -> dict:
    """The mean of several students' rows, ± the standard error over students."""
    out = {"label": f"{rows[0]['label'].split(' #')[0]}, mean of {len(rows)}",
           "evaluations": rows[0]["evaluations"]}
    for name in rows[0].keys() - out.keys():
        if isinstance(rows[0][name], tuple):
            out[name] = mean_error(torch.tensor([row[name][0] for row in rows]))
        else:
            out[name] = sum(row[name] for row in rows) / len(rows)
    return out


def gates(best: dict, few: dict, student: dict) -> list[dict]:
    """The small world's gates, from the rows of teacher@n, teacher@m and the (mean) student."""
    near, far = (abs(row["energy"][0] - best["energy"][0]) for row in (student, few))
    if "first" in student:  # the image settles what few steps would blur
        second = world.gate("student's first frame against its image, dB", student["first"][0], 30)
    else:
        second = world.gate(f"{few['label']}: high-frequency energy", few["hf"][0], most=0.85)
    return [
        world.gate(f"{best['label']}: all attributes right", best["all"][0], 0.9), second,
        world.gate(f"student's endpoint error / {few['label']}'s",
                   student["endpoint"][0] / few["endpoint"][0], most=0.5),
        world.gate("student's high-frequency energy", student["hf"][0], 0.95, 1.05),
        world.gate(f"student's energy distance from {best['label']}'s, at most {few['label']}'s",
                   near, most=far)]
