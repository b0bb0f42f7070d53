"""tools/rehearse.py: the bytes of a real run, planted bugs, and the table in docs/scaling.md."""

import pytest
from processes import in_processes
from rehearse_worker import SIZES, find_planted_bugs, measure

from common.files import ROOT, read_json
from tools.rehearse import plan_table


def test_a_rehearsal_counts_the_bytes_of_a_real_run_on_two_ranks(tmp_path):
    in_processes(2, measure, tmp_path)
    for family in SIZES:
        real, rehearsed = (read_json(tmp_path / f"{family}_{what}")["bytes"]
                           for what in ("real", "rehearsed"))
        print(f"{family}: {real / 2 ** 20:.2f} MiB, rehearsed {rehearsed / 2 ** 20:.2f}")
        assert rehearsed == pytest.approx(real, rel=0.05)


def test_a_rehearsal_finds_a_planted_bug_of_each_kind(tmp_path):
    in_processes(1, find_planted_bugs, tmp_path)
    found = read_json(tmp_path / "found")
    assert "model.py" in found["clean"]["finding float64"]
    assert not {"finding fp32 in a block", "error"} & found["clean"].keys()
    assert "same device" in found["a tensor on the CPU"]["error"]
    assert "in_fp32" in found["fp32 in a block"]["finding fp32 in a block"]
    assert "waiting" in found["the host waits"]["finding the host waits for a value"]
    assert "error" in found["no gather of heads"]
    clean, bugs = found["clean"], found["moments that are not sharded"]
    assert bugs["AdamW"] > 1.4 * clean["AdamW"] and bugs["student"] == clean["student"]


def test_the_memory_plans_of_the_docs_are_those_of_the_code():
    assert plan_table() in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
