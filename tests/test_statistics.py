"""Intervals over seeds and videos: Student's t, the jackknife, Holm's correction."""

import math

import pytest
import torch

from common.ranks import generator
from evaluation.statistics import (
    difference, holm, jackknife_error, leave_one_out, mean_and_error, t_probability, t_quantile)

TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 7: 2.365, 10: 2.228, 11: 2.201, 20: 2.086, 30: 2.042,
         120: 1.980}  # two-sided 95% points of Student's t, as printed in tables


@pytest.mark.parametrize("degrees, value", TABLE.items())
def test_t_quantiles_are_those_of_the_tables(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, abs=6e-4)
    assert t_probability(value, degrees) == pytest.approx(0.95, abs=1e-4)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = torch.randn(30, generator=generator("x"), dtype=torch.float64)
    left = leave_one_out(lambda i: float(x[i].mean()), 30)
    assert jackknife_error(left) == pytest.approx(mean_and_error(x)[1])


@pytest.mark.parametrize("seeds, videos, shared", [(5, 60, 2.0), (8, 144, 0.5), (3, 30, 0.0)])
def test_an_interval_over_seeds_and_videos_covers_the_truth(seeds, videos, shared):
    g, hits, runs = generator("coverage", seeds), 0, 400
    for _ in range(runs):
        x = (0.3 * torch.randn(seeds, 1, generator=g) + torch.randn(seeds, videos, generator=g)
             + shared * torch.randn(1, videos, generator=g)).double()
        left = (x.sum(1, keepdim=True) - x) / (videos - 1)
        found = difference(x.mean(1).tolist(), [0.0] * seeds,
                           (jackknife_error(left.mean(0)) ** 2, videos - 1))
        hits += abs(found["difference"]) <= found["half"]
    assert 0.93 < hits / runs <= 1.0


def test_an_interval_over_seeds_alone_misses_what_the_videos_share():
    g, hits, runs = generator("shared"), 0, 200
    for _ in range(runs):
        x = (torch.randn(5, 60, generator=g) + 2 * torch.randn(1, 60, generator=g)).double()
        found = difference(x.mean(1).tolist(), [0.0] * 5)
        hits += abs(found["difference"]) <= found["half"]
    assert hits / runs < 0.8  # which is why both are counted


def test_one_seed_has_no_interval_and_equal_arms_have_no_difference():
    assert difference([1.0], [0.5]) == {"difference": 0.5, "half": None, "pairs": 1, "p": None}
    same = difference([1.0, 2.0], [1.0, 2.0])
    assert (same["difference"], same["half"], same["p"]) == (0, 0, 1)


def test_equal_gaps_leave_the_scatter_of_the_videos_alone():
    found = difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5], (1e-4, math.inf))
    assert found["half"] == pytest.approx(1.96 * 0.01, rel=1e-3) and found["p"] < 1e-6


def test_holm_corrects_as_in_his_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
