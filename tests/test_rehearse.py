"""tools/rehearse.py: the bytes of a real run, planted bugs, and the table in docs/scaling.md."""

import pytest
from processes import in_processes
from rehearse_worker import SIZES, measure_all

from common.files import ROOT, read_json
from tools.rehearse import GPUS, ROWS, plan_of, table_config


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """The folder with the figures of measure_all, on two ranks."""
    folder = tmp_path_factory.mktemp("figures")
    in_processes(2, measure_all, folder)
    return folder


def test_a_rehearsal_counts_the_bytes_of_a_real_run_on_two_ranks(figures):
    for family in SIZES:
        real, rehearsed = (read_json(figures / f"{family}_{what}")["bytes"]
                           for what in ("real", "rehearsed"))
        print(f"{family}: {real / 2 ** 20:.2f} MiB, rehearsed {rehearsed / 2 ** 20:.2f}")
        assert rehearsed == pytest.approx(real, rel=0.05)


def test_a_rehearsal_finds_a_planted_bug_of_each_kind(figures):
    found = read_json(figures / "found")
    assert "model.py" in found["clean"]["finding float64"]
    assert not {"finding fp32 in a block", "error"} & found["clean"].keys()
    assert "same device" in found["a tensor on the CPU"]["error"]
    assert "in_fp32" in found["fp32 in a block"]["finding fp32 in a block"]
    assert "waiting" in found["the host waits"]["finding the host waits for a value"]
    assert "error" in found["no gather of heads"]
    clean, bugs = found["clean"], found["moments that are not sharded"]
    assert bugs["AdamW"] > 1.4 * clean["AdamW"] and bugs["student"] == clean["student"]


def test_a_rehearsal_of_sampling_counts_the_formula_s_flops_and_all_networks(figures):
    made, sampled, small = (read_json(figures / run) for run in ("synvid", "sample", "small"))
    assert {"UMT5Encoder", "CLIPVision", "WanVAE", "WanDiT"} <= made["peak"].keys()
    assert made["traffic all-to-all synvid"] > 0
    assert "UMT5Encoder" in sampled["peak"] and "WanDiT" not in sampled["peak"]  # freed before
    assert sampled["FLOP counted sample"] == pytest.approx(sampled["FLOP formula sample"], 0.01)
    assert {"Llama", "CLIPText", "HunyuanVAE", "HunyuanDiT"} <= small["peak"].keys()
    assert sum(small["peak"].values()) < 2 ** 27 < made["peak"]["UMT5Encoder"]


def test_the_memory_plan_is_within_5_percent_of_each_peak_in_the_docs():
    lines = (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines()
    cells = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|")[3:6]
             for line in lines if line.startswith(("| hunyuan-", "| wan"))}
    assert {(row, str(sp)) for row, sp in ROWS} >= set(cells)
    for (row, sp), peaks in cells.items():
        for gpus, peak in zip(GPUS, peaks, strict=True):
            if (text := peak.strip()) != "–":
                plan = sum(plan_of(table_config(row, int(sp)), gpus).values()) / 2 ** 30
                assert plan == pytest.approx(float(text.split()[0]), rel=0.05, abs=0.05), row
