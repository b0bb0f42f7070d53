"""tools/bench.py: what it measures, how it counts work, and where it stores results."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import common.linear
from common.config import load_config
from tools import bench, networks
from tools.bench import Row, allocated, count_flops, measure
from tools.networks import peer_dits, peer_sizes, peer_vaes

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--height", "16", "--width", "16", "--frames", "5"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Rows run as often as they must, and without the rows against diffusers."""
    monkeypatch.setattr(bench, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(bench, "peer_rows", list)


def make_bench(ranks, folder, *options: str) -> bench.Bench:
    return bench.Bench(load_config(bench.Config, "bench", [*SMALL, *options]), ranks, folder)


def test_a_run_stores_rows_lists_what_it_left_out_and_keeps_other_results(
        tmp_path, capsys, monkeypatch, ranks):
    out = tmp_path / "results.json"
    before = {"demo": {"seconds": 3}, "bench": {"a GPU": {"tiny": {"rows": []}}}}
    out.write_text(json.dumps(before))
    monkeypatch.setattr(bench, "reason_to_skip", lambda row, peak, left: (
        None if row.name == "DiT forward" else "0 s left"))
    bench.main(["configs/tiny.yaml", "--device", "cpu", "--out", str(out)])
    after = json.loads(out.read_text())
    (device,) = after["bench"].keys() - before["bench"].keys()
    result = after["bench"].pop(device)["tiny"]
    assert after == before
    (forward,), left_out = result["rows"], result["left_out"]
    assert forward["row"] == "DiT forward" and len(left_out) > 5
    low, high = forward["range"]
    assert 0 < low <= forward["seconds"] <= high and forward["runs"] == 3
    assert forward["tokens"] == 3 * 4 * 4  # 9 frames of 64 × 64 pixels
    assert forward["mfu"] == pytest.approx(forward["tflops"] / result["peak_tflops"])
    weights = sum(p.numel() * 4 for p in networks.random_dit(
        load_config(bench.Config, "bench", []), CPU, None).parameters())
    assert weights < forward["peak_gib"] * 2 ** 30 < 2 * weights
    text = capsys.readouterr().out
    assert "| DiT forward |" in text and "left out: DiT forward, compiled: 0 s left" in text


def test_by_default_the_results_are_stored_in_the_run_folder(tmp_path, monkeypatch, ranks):
    bench.main(["--device", "cpu", "--minutes", "0", "--run", str(tmp_path / "run")])
    (device,) = json.loads((tmp_path / "run/bench.json").read_text())["bench"].values()
    assert device["tiny"]["rows"] == [] and len(device["tiny"]["left_out"]) > 5


def test_a_row_is_left_out_if_it_needs_more_time_than_is_left():
    row = Row("x", list, flop=10.0, runs=3)  # 2 · (3 + 1) · 10 / 10 seconds
    assert bench.reason_to_skip(row, 10.0, 8.1) is None
    assert bench.reason_to_skip(row, 10.0, 7.9) == "8 s left, needs about 8 s"


def test_rows_of_every_stage_are_measured_and_an_error_takes_the_place_of_figures(
        tmp_path, ranks, monkeypatch):
    def no_compiler(dit):
        raise ValueError("compile: found no g++")
    monkeypatch.setattr(bench, "compile_blocks", no_compiler)
    bench.main(["configs/tiny.yaml", *SMALL, "--minutes", "10000", "--n", "4", "--key", "0,2,4",
                "--out", str(tmp_path / "out.json")])
    (device,) = json.loads((tmp_path / "out.json").read_text())["bench"].values()
    rows = {found["row"]: found for found in device["tiny"]["rows"]}
    assert rows.pop("DiT forward, compiled")["error"] == "compile: found no g++"
    for found in rows.values():
        assert "error" not in found and found["seconds"] > 0, found
    starts = ("DiT forward", "distill.py", "prompt to video, 2", "prompt to video, 4",
              "prompt: umT5", "VAE encode", "VAE decode")
    assert all(any(name.startswith(start) for name in rows) for start in starts)
    assert [name for name, found in rows.items() if "plan_gib" in found] == [
        "distill.py, one k-step of one micro-batch a rank"]
    assert device["tiny"]["left_out"] == {}


@pytest.mark.parametrize("family, preset", [("hunyuan", "hunyuan-tiny"), ("wan", "tiny-i2v")])
def test_a_prompt_becomes_a_video_in_every_family(family, preset, tmp_path, ranks):
    b = make_bench(ranks, tmp_path, "--family", family, "--preset", preset, "--key", "0,50")
    rows = {row.name: row for row in bench.config_rows(b)}
    for name, row in rows.items():
        if name.startswith(("prompt", "DiT forward", "VAE")) and "compiled" not in name:
            assert row.flop > 0, name
    (run,) = rows["prompt to video, 1 steps"].prepare()
    run()
    assert (tmp_path / "video_0.mp4").stat().st_size > 0


def test_work_and_tokens_are_what_torch_counts(tmp_path, ranks, monkeypatch):
    b = make_bench(ranks, tmp_path, "--height", "48", "--width", "48", "--frames", "9")
    rows = {row.name: row for row in bench.config_rows(b)}
    dit = networks.random_dit(b.cfg, CPU, None)
    shapes = []
    dit.blocks[0].register_forward_pre_hook(lambda block, args: shapes.append(args[0].shape[1]))
    monkeypatch.setattr(common.linear, "HAS_ONEDNN", False)  # whose work torch does not count
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        dit(*b.inputs())
    blocks = [sum(counter.flop_counts[f"WanDiT.blocks.{i}"].values())
              for i in range(len(dit.blocks))]
    assert (rows["DiT forward"].flop, rows["DiT forward"].tokens) == (sum(blocks), shapes[0])
    (decode,) = rows["VAE decode"].prepare()
    with FlopCounterMode(display=False) as counter:
        decode()
    assert rows["VAE decode"].flop == counter.get_total_flops()


def test_a_row_that_fails_is_reported_and_the_others_are_measured(ranks):
    def fails():
        raise torch.OutOfMemoryError("out of memory | tried to allocate 84 GiB")
    found = measure(Row("too large", fails, 1e12, 7, 2.0 ** 30), CPU, 1e12)
    assert found == {"row": "too large", "tokens": 7, "tflop": 1.0, "plan_gib": 1.0,
                     "floor_seconds": 1.0, "error": "out of memory | tried to allocate 84 GiB"}
    good = measure(Row("small", lambda: [lambda: None], runs=1), CPU, 1e12)
    text = bench.table({"rows": [found, good], "left_out": {}, "device": "x", "dtype": "fp32",
                        "torch": "2", "peak_tflops": 1.0, "diffusers": "none", "seconds": 1.0})
    assert "| too large | out of memory / tried to allocate 84 GiB |" in text
    assert "| small |" in text


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_what_is_timed_against_diffusers_computes_the_same(family):
    pytest.importorskip("diffusers")
    sizes = peer_sizes(family, 64, 2, 2)
    ours, theirs = (call() for call in peer_dits(sizes, 2, (2, 4, 6), False))
    assert torch.allclose(ours, theirs, atol=1e-4) and ours.std() > 0.01
    for call in peer_dits(sizes, 1, (2, 4, 6), True):
        call()
    encoded = [call() for call in peer_vaes(family, "encode", 5)]
    decoded = [call() for call in peer_vaes(family, "decode", 5)]
    assert decoded[0].shape == decoded[1].shape and encoded[0].shape == encoded[1].shape


def test_without_diffusers_the_rows_are_ours_alone(monkeypatch):
    monkeypatch.setattr(networks, "diffusers_version", lambda: None)
    assert len(peer_dits(peer_sizes("wan", 64, 2, 2), 1, (1, 2, 2), False)) == 1
    assert len(peer_vaes("wan", "encode", 5)) == 1


def test_work_is_counted_from_shapes_alone():
    assert count_flops(lambda: torch.nn.Linear(5, 7), lambda net: net(torch.empty(3, 5))) == (
        2 * 3 * 5 * 7)


def test_the_peak_of_tensors_is_what_is_held_at_once():
    def run() -> None:
        a = torch.ones(1000)
        b = a + 1
        del a
        b.repeat(3).sum()
    assert 4 * 4000 <= allocated(run)[2] < 4 * 4100
