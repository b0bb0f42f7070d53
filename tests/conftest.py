"""Fixtures of several test files: one CPU thread, random weights in the official layout, configs,
and stages as commands."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: here and in every process started

import io
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import torch.distributed as dist
import yaml
from processes import run_script
from torch import nn

import common.linear
from common.files import ROOT, write_json
from common.names import EXPERTS
from common.ranks import generator, setup_distributed
from common.weights import save_tensors
from frozen.image import CLIPVision
from frozen.text import UMT5Encoder
from frozen.vae import WanVAE
from model import PRESETS, WanConfig, WanDiT

SLOW_FIRST = ("test_resume.py", "test_parallel.py", "test_experts.py", "test_paper.py",
              "test_ranks.py", "test_distill.py", "test_evaluate.py", "test_lora.py",
              "test_export.py", "test_synvid.py", "test_teacher.py", "test_compile.py",
              "test_toy1d.py", "test_hunyuan_stages.py", "test_i2v_stages.py", "test_model.py",
              "test_bench.py", "test_baselines.py", "test_memory.py", "test_rehearse.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first, so that parallel test processes end at about the same time."""
    rank = {name: i for i, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


CAPTIONS = [f"a {colour} {shape} moves {direction}" for colour in ("red", "green", "blue")
            for shape in ("disc", "ring", "cross") for direction in ("left", "right", "up")]


@pytest.fixture(params=("torch", "onednn"))
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that multiplies matrices of any size: torch's own or oneDNN."""
    if request.param == "onednn" and not common.linear.HAS_ONEDNN:
        pytest.skip("this CPU has no AVX-512: torch's own library multiplies")
    monkeypatch.setattr(common.linear, "WORTH", 1 if request.param == "onednn" else math.inf)
    monkeypatch.setattr(common.linear, "ROWS", 1)
    return request.param


def randomise(module: nn.Module, *key: int | str) -> dict[str, torch.Tensor]:
    """Fill a module with normal weights of deviation 1/sqrt(fan in); returns its state dict."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1 and not name.endswith("gamma"):
                draw = torch.randn(p.shape, generator=generator(*key, name))
                p.copy_(draw * p[0].numel() ** -0.5)
    return module.state_dict()


def make_tokenizer(path: Path, texts: list[str]) -> int:
    """Train a sentencepiece model with umT5's special ids; returns its vocabulary size."""
    path.parent.mkdir(parents=True)
    out, words = io.BytesIO(), sorted({word for text in texts for word in text.split()})
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *words]), model_writer=out, model_type="unigram",
        vocab_size=80, hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        normalization_rule_name="identity", minloglevel=2)
    path.write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()).vocab_size()


def write_weights(folder: Path, seed: int = 0, sizes: WanConfig = PRESETS["tiny"]) -> Path:
    """Random teacher, VAE, umT5 and tokenizer in Wan's official layout, and a prompts.txt.

    Sizes of an image-to-video DiT bring a small image encoder.
    Args: folder, which must not exist; sizes of the DiT: the preset `tiny` for commands, others
    where the test itself adds them to model.PRESETS. Returns the folder.
    """
    for place in (".",) if sizes.boundary is None else EXPERTS:
        dit, key = WanDiT(sizes), ((seed,) if place == "." else (seed, place))
        dit.init_weights(generator(*key, "dit"))
        with torch.no_grad():  # the official initial head is zero: no velocity at all
            dit.head.head.weight.normal_(std=sizes.dim ** -0.5, generator=generator(*key, "head"))
        save_tensors(folder / place / "diffusion_pytorch_model.safetensors", dit.state_dict(), {})
        arguments = {key: getattr(sizes, key) for key in (
            "dim", "eps", "ffn_dim", "freq_dim", "in_dim", "model_type", "num_heads", "num_layers",
            "out_dim", "text_len")}
        write_json(folder / place / "config.json", {"_class_name": "WanModel", **arguments})
    vae = {"dim": 4, "num_res_blocks": 1}
    save_tensors(folder / "Wan2.1_VAE.safetensors", randomise(WanVAE(**vae), seed, "vae"),
                 {"config": json.dumps(vae)})
    size = make_tokenizer(folder / "google/umt5-xxl/spiece.model", CAPTIONS)
    text = {"vocab_size": size, "dim": sizes.text_dim, "dim_attn": 32, "num_heads": 2,
            "dim_ffn": 64, "num_layers": 2}
    save_tensors(folder / "models_t5_umt5-random.safetensors",
                 randomise(UMT5Encoder(**text), seed, "text"), {"config": json.dumps(text)})
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    if sizes.has_clip:
        tower = {"dim": sizes.image_dim, "dim_ffn": 64, "num_heads": 2, "size": 48, "patch": 8}
        state = randomise(CLIPVision(**tower, num_layers=2), seed, "image")
        save_tensors(folder / "models_clip_random.safetensors",
                     {f"visual.{name}": p for name, p in state.items()},
                     {"config": json.dumps({**tower, "num_layers": 3})})
    return folder


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., Path]:
    """The function `write_weights(folder, seed, sizes)`, for other seeds or sizes."""
    return write_weights


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """A weight folder of preset `tiny` with random weights and prompts.txt; read it only."""
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def make_config(tiny_weights, tmp_path) -> Callable[..., Path]:
    """make_config(**values) writes a YAML config of a quick run and returns its path.

    Stages' own keys go in as dicts: make_config(n=4, key=[0, 2, 4], synvid={"count": 3}).
    """
    def write(name: str = "config.yaml", **values: Any) -> Path:
        quick = {"weights": str(tiny_weights), "run": str(tmp_path / "run"), "height": 16,
                 "width": 16, "frames": 5, "n": 4, "key": [0, 2, 4], "device": "cpu"}
        stages = {"synvid": {"prompts": str(tiny_weights / "prompts.txt"), "videos": 0,
                             **values.pop("synvid", {})}}
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**quick, **values, **stages}), encoding="utf-8")
        return path
    return write


@pytest.fixture(scope="session")
def run_stage() -> Callable[..., subprocess.CompletedProcess]:
    """run_stage("synvid", config, "--count", 3, ranks=2) runs a stage; .stdout, .stderr are text.

    A failing command fails the test unless check=False.
    """
    def run(stage: str, *args: Any, ranks: int = 1,
            check: bool = True) -> subprocess.CompletedProcess:
        done = run_script(ROOT / f"{stage}.py", *args, ranks=ranks)
        assert not check or done.returncode == 0, done.stderr
        return done
    return run


@pytest.fixture
def ranks():
    """This process alone, set up as in every stage."""
    yield setup_distributed("cpu")
    dist.destroy_process_group()


@pytest.fixture
def no_ranks():
    """Leave the process group of an earlier test: with one, ranks.cli ends this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Evil:
    """A pickle of this creates a file where it is loaded."""

    def __init__(self, target: str):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")
