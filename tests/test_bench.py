"""bench.py: what it measures, that it counts work as torch does, and that it spoils no results."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tools import networks
from tools import bench
import common.linear
from common.config import load_config
from tools.timing import Row, allocated, count_flops, measure
from common.ranks import generator
from tools.networks import peer_dits, peer_sizes, peer_vaes

CPU = torch.device("cpu")


@pytest.fixture
def out(tmp_path):
    """A file of results that already tells of other things and other devices."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"demo": {"seconds": 3},
                                "bench": {"a GPU": {"tiny": {"rows": []}}}}))
    return path


def run(out, *options: str) -> dict:
    """bench.main on the small world; what it stored of this device."""
    before = json.loads(out.read_text())
    bench.main(["configs/tiny.yaml", "--device", "cpu", "--out", str(out), *options])
    after = json.loads(out.read_text())
    (device,) = after["bench"].keys() - before["bench"].keys()
    result = after["bench"].pop(device)
    assert after == before
    return result["tiny"]


def test_a_short_run_stores_rows_lists_what_it_left_out_and_keeps_other_results(
        out, capsys, monkeypatch, ranks):
    monkeypatch.setattr(common.measure, "ENOUGH", 0.0)
    result = run(out, "--minutes", "0.1")
    measured = {found["row"]: found for found in result["rows"]}
    assert len(result["left_out"]) > 5 and not measured.keys() & result["left_out"].keys()
    forward = measured["DiT forward"]
    low, high = forward["range"]
    assert 0 < low <= forward["seconds"] <= high and forward["runs"] >= 3
    assert forward["tokens"] == 3 * 3 * 3  # 9 frames of 48 × 48 pixels
    assert forward["mfu"] == pytest.approx(
        forward["tflops"] / result["peak_tflops"]) and forward["peak_gib"] > 0
    text = capsys.readouterr().out
    assert "| DiT forward |" in text and "- DiT forward, compiled: 0 s left" in text


def test_rows_of_every_stage_are_measured_and_one_that_fails_is_told(out, ranks, monkeypatch):
    def no_compiler(dit):
        raise ValueError("compile: found no g++")
    monkeypatch.setattr(common.measure, "ENOUGH", 0.0)
    monkeypatch.setattr(bench, "compile_blocks", no_compiler)
    monkeypatch.setattr(bench, "peer_rows", list)
    result = run(out, "--minutes", "5", "--height", "16", "--width", "16", "--frames", "5",
                 "--n", "4", "--key", "0,2,4")
    rows = {found["row"]: found for found in result["rows"]}
    assert rows.pop("DiT forward, compiled")["error"] == "compile: found no g++"
    for found in rows.values():
        assert "error" not in found and found["seconds"] > 0, found
    starts = ("DiT forward", "distill.py", "prompt to video, 2", "prompt to video, 4", "synvid.py",
              "DiT from a file", "prompt: umT5", "VAE encode", "VAE decode")
    assert all(any(name.startswith(start) for name in rows) for start in starts)
    assert [name for name, found in rows.items() if "plan_gib" in found] == [
        "distill.py, one k-step of one micro-batch a rank"]
    assert 0 < result["synvid_share"] < 1 and result["left_out"] == {}


@pytest.mark.parametrize("family, preset", [("hunyuan", "hunyuan-tiny"), ("wan", "tiny-i2v")])
def test_every_family_s_prompt_becomes_a_video(family, preset, tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(bench, "peer_rows", list)
    cfg = load_config(bench.Config, "bench", ["--family", family, "--preset", preset, "--device",
                                              "cpu", "--height", "16", "--width", "32",
                                              "--frames", "5", "--key", "0,50"])
    own = bench.Bench(cfg, ranks, tmp_path)
    rows = {row.name: row for row in bench.config_rows(own)}
    for name, row in rows.items():
        if name.startswith(("prompt", "DiT forward", "VAE")) and "compiled" not in name:
            assert row.flop > 0, name
    (walk,) = rows["prompt to video, 1 steps"].prepare()
    walk()
    assert (tmp_path / "walk_0.mp4").stat().st_size > 0


def test_work_and_tokens_are_what_torch_counts(tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(bench, "peer_rows", list)
    cfg = load_config(bench.Config, "bench", ["--device", "cpu"])
    own = bench.Bench(cfg, ranks, tmp_path)
    rows = {row.name: row for row in bench.config_rows(own)}
    dit = networks.random_dit(cfg, CPU, None)
    shapes = []
    dit.blocks[0].register_forward_pre_hook(lambda block, args: shapes.append(args[0].shape[1]))
    monkeypatch.setattr(common.linear, "HAS_ONEDNN", False)  # whose work torch does not count
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        dit(*own.inputs())
    blocks = [sum(counter.flop_counts[f"WanDiT.blocks.{b}"].values())
              for b in range(len(dit.blocks))]
    assert (rows["DiT forward"].flop, rows["DiT forward"].tokens) == (sum(blocks), shapes[0])
    (decode,) = rows["VAE decode"].prepare()
    with FlopCounterMode(display=False) as counter:
        decode()
    assert rows["VAE decode"].flop == counter.get_total_flops()


def test_on_a_gpu_attention_is_timed_at_lengths_that_are_new_and_at_one(tmp_path, ranks,
                                                                        monkeypatch):
    cfg = load_config(bench.Config, "bench", ["--family", "hunyuan", "--preset", "hunyuan-tiny",
                                              "--device", "cpu", "--height", "16", "--width", "32",
                                              "--frames", "5", "--key", "0,50"])
    own, lengths, real = bench.Bench(cfg, ranks, tmp_path), [], bench.attention
    monkeypatch.setattr(bench, "attention", lambda q, k, v: lengths.append(q.shape[1])
                        or real(q, k, v))
    for anew in (True, False):
        (run,) = own.attention(anew)
        run(), run()
    assert [n - own.tokens for n in lengths] == [1, 2, 1, 1]
    own.device = torch.device("cuda")
    names = [row.name for row in bench.config_rows(own)]
    assert sum(name.startswith("attention of a layer, forward + backward") for name in names) == 2


def test_a_row_that_fails_is_told_and_the_others_go_on(ranks):
    def fails():
        raise torch.OutOfMemoryError("out of memory | tried to allocate 84 GiB")
    found = measure(Row("too large", fails, 1e12, 7, 2.0 ** 30), CPU)
    assert found == {"row": "too large", "tokens": 7, "tflop": 1.0, "plan_gib": 1.0,
                     "error": "out of memory | tried to allocate 84 GiB"}
    good = measure(Row("small", lambda: [lambda: None], runs=1), CPU)
    shown = bench.table({"rows": [found, good], "left_out": {}, "device": "x", "dtype": "fp32",
                         "torch": "2", "peak_tflops": 1.0, "diffusers": "none", "seconds": 1.0})
    assert "| too large | out of memory / tried to allocate 84 GiB |" in shown
    assert "| small |" in shown


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_what_is_timed_against_diffusers_computes_the_same(family):
    pytest.importorskip("diffusers")
    sizes = peer_sizes(family, 64, 2, 2)
    ours, theirs = (call() for call in peer_dits(sizes, 2, (2, 4, 6), False))
    assert torch.allclose(ours, theirs, atol=1e-4)
    for call in peer_dits(sizes, 1, (2, 4, 6), True):
        call()
    encoded = [call() for call in peer_vaes(family, "encode", 5)]
    decoded = [call() for call in peer_vaes(family, "decode", 5)]
    assert decoded[0].shape == decoded[1].shape and encoded[0].shape == encoded[1].shape


def test_without_diffusers_the_rows_are_ours_alone(monkeypatch):
    monkeypatch.setattr("frozen.peers.has_diffusers", lambda: False)
    monkeypatch.setattr(bench, "has_diffusers", lambda: False)
    assert len(peer_dits(peer_sizes("wan", 64, 2, 2), 1, (1, 2, 2), False)) == 1
    assert bench.diffusers_version().startswith("not installed")


def test_a_count_from_shapes_alone_is_that_of_a_run():
    layer = torch.nn.Linear(5, 7)
    assert count_flops(lambda: torch.nn.Linear(5, 7), lambda net: net(torch.empty(3, 5))) == (
        2 * 3 * 5 * 7)
    assert layer(torch.randn(3, 5, generator=generator("x"))).shape == (3, 7)


def test_the_peak_of_tensors_is_what_is_held_at_once():
    def run() -> None:
        a = torch.ones(1000)
        b = a + 1
        del a
        b.repeat(3).sum()
    assert 4 * 4000 <= allocated(run)[2] < 4 * 4100
