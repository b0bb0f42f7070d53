"""Standard errors over videos and over seeds, intervals for a difference, many comparisons.

An arm has one value per seed, each measured on the same N videos. A claim about two arms needs an
interval over both: other seeds would give other students, other captions and noise other videos.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Statistic = Callable[[Tensor], float]  # a statistic of some videos, given their indices


def mean_and_error(values: Tensor | Sequence[float]) -> tuple[float, float | None]:
    """Mean of values [N] and its standard error, which is None for a single value; in float64."""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def leave_one_out(statistic: Statistic, n: int) -> Tensor:
    """The statistic of all but one of n videos, for each of them: float64 [N]."""
    every = torch.arange(n)
    return torch.tensor([statistic(every[every != i]) for i in range(n)], dtype=torch.float64)


def jackknife_error(replicates: Tensor) -> float:
    """Standard error of a statistic from its leave-one-out values [N]. Source: Efron, 1982."""
    n = len(replicates)
    return float(((n - 1) * replicates.double().var(correction=0)).sqrt())


def t_probability(t: float, degrees: float) -> float:
    """P(|T| < t) of Student's t with so many degrees of freedom, which need not be whole.

    With t = sqrt(degrees) tan θ the density is cos θ to the power degrees - 1: Simpson's rule.
    """
    end, n = math.atan(abs(t) / degrees ** 0.5), 2000
    theta = torch.linspace(0, end, n + 1, dtype=torch.float64)
    weights = torch.full((n + 1,), 2.0, dtype=torch.float64)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    area = float((weights * theta.cos() ** (degrees - 1)).sum()) * end / n / 3
    scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    return 2 * math.exp(scale) / math.pi ** 0.5 * area


def t_quantile(degrees: float) -> float:
    """The t with P(|T| < t) = 0.95, by bisection."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        if t_probability(middle, degrees) < 0.95:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def difference(ours: Sequence[float], theirs: Sequence[float],
               videos: tuple[float, float] = (0.0, math.inf)) -> dict:
    """Our value minus theirs with a 95% interval over seeds and videos.

    Args: ours, theirs, a value per seed, paired; videos, the variance of the difference over videos
    and its degrees of freedom; by default the interval is over seeds alone.
    The variance is the sum of both parts; the interaction of seeds and videos counts twice, so that
    the interval errs on the wide side. Degrees of freedom after Satterthwaite, 1946.
    Returns {"difference", "half", "pairs", "p"}; half and p are None for a single seed.
    """
    gaps = torch.tensor([a - b for a, b in zip(ours, theirs, strict=False)], dtype=torch.float64)
    pairs, mean = len(gaps), float(gaps.mean())
    if pairs < 2:
        return {"difference": mean, "half": None, "pairs": pairs, "p": None}
    parts = [(float(gaps.var()) / pairs, pairs - 1), videos]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return {"difference": mean, "half": 0.0, "pairs": pairs, "p": float(mean == 0)}
    uncertainty = sum(part ** 2 / count for part, count in parts)
    degrees = min(variance ** 2 / uncertainty if uncertainty else math.inf, 1e6)  # the normal
    error = variance ** 0.5
    return {"difference": mean, "half": error * t_quantile(degrees), "pairs": pairs,
            "p": max(0.0, 1 - t_probability(mean / error, degrees))}  # the integral has errors


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the same order. Source: Holm, 1979."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
