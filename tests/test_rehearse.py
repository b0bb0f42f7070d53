"""tools/rehearse.py: the bytes of a real run, and planted bugs."""

import json
from dataclasses import replace

import pytest
from processes import in_processes
from rehearse_worker import SIZES, measure, plant

from common.files import read_json


def test_a_rehearsal_counts_the_bytes_of_a_real_run_on_two_ranks(tmp_path):
    in_processes(2, measure, tmp_path)
    for family in SIZES:
        real, rehearsed = (read_json(tmp_path / f"{family}_{what}") for what in
                           ("real", "rehearsed"))
        print(family, real / 2 ** 20, rehearsed / 2 ** 20)
        assert rehearsed == pytest.approx(real, rel=0.05)
