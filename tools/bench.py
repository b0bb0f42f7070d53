"""How fast and how large is it here: every part with random weights, measured; needs no files.

    python bench.py [CONFIG] [--minutes 8]             torchrun --nproc-per-node 8 bench.py CONFIG
    python bench.py CONFIG --only "DiT" --out bench.json        # rows with this in their name

In:   sizes of CONFIG, and what its synvid: and distill: say of batches, checkpointing and so on.
Out:  a Markdown table, and in the JSON file --out under bench → device → config's name the same;
      all else in that file stays. It is written after each row.
Cost: at most about --minutes; the most telling rows come first, and what was left out is listed.
      Needs disk for one DiT in the folder of temporary files, in which it leaves nothing.

Columns: seconds are the median over runs after a warm-up, ± half the range over the median; TFLOP
of a DiT as model.py counts them (its blocks), of other networks as torch does; MFU of the peak that
a large linear layer reached in the same run, and of the datasheet's (peak_tflops); peak memory,
on a GPU of all that is allocated, on a CPU what came to the process, beside diffusers of tensors;
plan: what training/memory.py foretells of it; floor: TFLOP over the measured peak.

On a CPU there are also small networks of both families against diffusers, if it is installed, with
the same shapes and weights: runs by turns A, B, A, B; the ratio is of neighbours, ours over theirs.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import distill
import synvid
from artifacts.trajectories import initial_noise, write_trajectory
from common.config import Shared, field, load_config
from common.files import commit, read_json, write_json
from common.ranks import (
    Ranks, cli, compile_blocks, compute_dtype, device_name, generator, on_first_rank,
    prefer_attention, processor, setup_distributed)
from common.video import write_video
from frozen.vae import HunyuanVAE, WanVAE
from model import (
    attention, build_dit, check_model, collate, key_times, latent_shape, load_dit, sample_euler,
    time_grid)
from tools.networks import (
    VIDEO_SIZE, has_diffusers, make_vae, peer_dits, peer_sizes, peer_vaes, random_dit,
    random_encoders, random_network, random_states, small_vae, write_random_dit)
from tools.timing import Row, Run, count_flops, measure, measure_peak
from training.memory import gpu_bytes, memory_parts, shortage
from training.monitor import step_flops



@dataclass
class Config(Shared):
    """Settings of a measurement."""
    minutes: float | None = field(None, "time for all rows; none: 8 on a GPU, 2 on a CPU",
                                  "[0, 10000]")
    only: str = field("", "measure only rows whose name has this in it")
    out: str = field("assets/results.json", "JSON file that the results go into")
    peak_tflops: float | None = field(None, "device's dense peak, as 989; none: distill's",
                                      "(0, inf)")
    sp: int = field(1, "ranks that share each sample's tokens (Ulysses)", "[1, inf)")


# ------------------------------------------------------------------------- rows of the config

class Bench:
    """What the rows of a config share: settings of the stages, sizes, inputs, a folder for files.
    """

    def __init__(self, cfg: Config, ranks: Ranks, folder: Path):
        self.cfg, self.ranks, self.device, self.folder = cfg, ranks, ranks.device, folder
        self.synvid: Any = settings_of(synvid.Config, "synvid", cfg)
        self.distill: Any = dataclasses.replace(
            settings_of(distill.Config, "distill", cfg), weights=str(folder / "dit.safetensors"),
            iterations=10 ** 6, sp=cfg.sp)
        self.distill.micro_batch = min(self.distill.micro_batch,
                                       max(self.distill.batch // ranks.dp_size, 1))
        self.distill.batch = self.distill.micro_batch * ranks.dp_size
        self.shape = latent_shape(cfg.frames, cfg.height, cfg.width)
        with torch.device("meta"):
            self.dit = build_dit(cfg.preset)
        self.tokens = math.prod(self.dit.token_grid(*self.shape[1:]))
        self.flop = self.dit.flops(self.tokens)              # of one evaluation of one sample
        self.bytes = sum(p.numel() for p in self.dit.parameters()) * compute_dtype(
            self.device).itemsize
        self.cond = random_states(cfg)

    def inputs(self, batch: int = 1) -> tuple[Tensor, Tensor, dict]:
        """Latents, times and conditioning of a batch, on the device."""
        x = torch.randn(batch, *self.shape, generator=generator("x", self.cfg.seed))
        t = torch.full((batch,), 0.7, dtype=torch.float64)
        cond = {name: c.to(self.device) for name, c in collate([self.cond] * batch).items()}
        return x.to(self.device), t.to(self.device), cond

    def forward(self, backend: SDPBackend | None = None, compiled: bool = False,
                batch: int = 1) -> list[Run]:
        """One evaluation, by one kind of attention kernels or by those preferred."""
        dit, inputs = random_dit(self.cfg, self.device, self.ranks.sp_ranks), self.inputs(batch)
        if compiled:
            torch.compiler.reset()
            compile_blocks(dit)

        @torch.no_grad()
        def run() -> None:
            with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
                dit(*inputs)
        return [run]

    def backward(self) -> list[Run]:
        """Forward, and backward to all weights; checkpointed as distill.py does it."""
        dit, inputs = random_dit(self.cfg, self.device, self.ranks.sp_ranks), self.inputs()
        dit.requires_grad_(True)
        for block in dit.blocks:
            block.checkpointing = self.distill.checkpointing
        return [lambda: (dit(*inputs).square().mean().backward(), dit.zero_grad())]

    def attention(self, anew: bool) -> list[Run]:
        """Attention of one layer, forward and backward; `anew`, each run at a prompt's length that
        no run has had, for which cuDNN first makes plans (docs/scaling.md)."""
        sizes, lengths = self.dit.cfg, itertools.count(1) if anew else itertools.repeat(1)
        heads, dim = sizes.num_heads // self.ranks.sp, sizes.dim // sizes.num_heads

        def run() -> None:
            shape = 3, 1, self.tokens + next(lengths), heads, dim
            qkv = torch.randn(shape, device=self.device, dtype=compute_dtype(self.device),
                              requires_grad=True)
            attention(*qkv).sum().backward()
        return [run]

    def write_weights(self) -> None:
        """A file of noise with the DiT's weights, made once."""
        path = Path(self.distill.weights)
        on_first_rank(lambda: path.exists() or write_random_dit(
            self.cfg, path, compute_dtype(self.device)))

    def loading(self) -> list[Run]:
        """The DiT out of a file that the system still has in its cache."""
        self.write_weights()
        return [lambda: load_dit(self.distill.weights, self.cfg.preset, compute_dtype(self.device),
                                 self.device, self.ranks.sp_ranks)]

    def k_step(self) -> list[Run]:
        """An iteration of Algorithm 1 of one micro-batch a rank, as distill.py runs it."""
        cfg, m = self.distill, len(self.cfg.key) - 1
        lacks = shortage(cfg, self.shape, self.ranks, gpu_bytes(self.ranks))
        if lacks and not cfg.force_plan:
            raise ValueError(f"memory plan: does not fit {lacks}")
        self.write_weights()
        t_key = key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1]
        state = distill.build(cfg, t_key, self.ranks)
        slots, (_, _, cond) = list(range(cfg.micro_batch)), self.inputs(cfg.micro_batch)

        def loader(step: int) -> list[distill.Batch]:
            latents = {k: distill.pinned(torch.randn(cfg.micro_batch, *self.shape), self.device)
                       for k in range(m + 1)}
            return [distill.Batch(distill.Latents(latents, self.device), cond, slots)]
        steps = distill.algorithm_1(cfg, state, loader)
        return [lambda: next(steps)]

    def k_step_flops(self) -> float:
        """Floating-point operations of a k-step on this rank's share, the mean over k."""
        cfg = self.distill
        state = distill.TrainState(self.dit, self.dit, nn.ModuleList(), {}, [],
                                   distill.tap_blocks(cfg, len(self.dit.blocks)), [])
        each = [step_flops(cfg, state, k, self.tokens) for k in range(len(cfg.key) - 1)]
        return statistics.mean(each) / self.ranks.world

    def walk(self, times: list[float], guided: bool) -> list[Run]:
        """Prompt to video file: text, steps, VAE, save; its networks are all in memory."""
        cfg, device = self.cfg, self.device
        encoders = [(random_network(make, device), run) for _, make, run in random_encoders(cfg)]
        dit = random_dit(cfg, device, self.ranks.sp_ranks)
        vae = self.vae()
        path = self.folder / f"walk_{self.ranks.rank}.mp4"

        @torch.no_grad()
        def run() -> None:
            cond = {name: c.to(device) for name, c in self.cond.items()}
            for network, encode in encoders:
                cond |= encode(network)
            cond, x = collate([cond]), self.inputs()[0]
            for latents in sample_euler(dit, x, times, cond, cond if guided else None,
                                        cfg.cfg_scale):
                x = latents
            write_video(path, vae.decode(x)[0], cfg.fps)
        return [run]

    def vae(self) -> WanVAE | HunyuanVAE:
        vae = random_network(lambda: make_vae(self.cfg), self.device)
        if vae.tiled:
            vae.group = self.ranks.sp_group
        return vae

    def decode(self) -> list[Run]:
        vae, latents = self.vae(), self.inputs()[0]
        return [torch.no_grad()(lambda: vae.decode(latents))]

    def encode(self) -> list[Run]:
        vae, cfg = self.vae(), self.cfg
        video = torch.zeros(1, 3, cfg.frames, cfg.height, cfg.width, device=self.device)
        return [torch.no_grad()(lambda: vae.encode(video))]

    def text(self, make: Callable[[], nn.Module], run: Callable) -> list[Run]:
        network = random_network(make, self.device)
        return [torch.no_grad()(lambda: run(network))]

    def synvid_rest(self) -> list[Run]:
        """A batch of trajectories with a teacher that takes no time: noise, Euler steps, storing.
        """
        cfg, folder = self.synvid, self.folder / f"synvid_{self.ranks.rank}"
        manifest = {"seed": cfg.seed, "dtype": cfg.dtype, "stored": list(cfg.key[1:])}

        @torch.no_grad()
        def run() -> None:
            noise = torch.stack([initial_noise(cfg.seed, i, "a prompt", self.shape)
                                 for i in range(cfg.batch)]).to(self.device)
            cond = collate([self.cond] * cfg.batch)
            x = synvid.sample_trajectories(cfg, lambda x, t, cond: x, noise, manifest["stored"],
                                           cond, cond)
            for i in range(cfg.batch):
                write_trajectory(folder, manifest, i, "a prompt", x[i], self.cond)
        return [run]


def settings_of(cls: type, stage: str, cfg: Config) -> Any:
    """A stage's settings from the same file, with what all stages share as it is here."""
    own = load_config(cls, stage, [str(cfg.path), "weights=random"])
    return dataclasses.replace(own, **{f.name: getattr(cfg, f.name)
                                       for f in dataclasses.fields(Shared)})


def vae_flops(make: Callable[[], nn.Module], way: str, *size: int) -> float:
    """Work to encode or decode a video of frames × height × width; a clip that is taken in chunks
    is counted whole, which is the same."""
    shape = latent_shape(*size) if way == "decode" else (3, *size)
    whole = {"decode": "reconstruct", "encode": "moments"}[way]
    return count_flops(make, lambda vae: getattr(vae, way if vae.tiled else whole)(
        torch.empty(1, *shape)))


def config_rows(b: Bench) -> Iterator[Row]:
    """The rows of a config, the most telling first."""
    cfg, tokens, F, share = b.cfg, b.tokens, b.flop, 1 / b.ranks.sp
    few, full = (key_times(cfg.family, cfg.n, cfg.shift, cfg.key),
                 time_grid(cfg.family, cfg.n, cfg.shift).tolist())
    decode, encode = (vae_flops(lambda: make_vae(cfg), way, cfg.frames, cfg.height, cfg.width)
                      for way in ("decode", "encode"))
    text = {name: count_flops(make, run) for name, make, run in random_encoders(cfg)}
    rest, evaluations = decode + sum(text.values()), 1 if cfg.cfg_scale == 1 else 2
    parts = memory_parts(b.distill, b.shape, b.device, b.ranks.world, b.ranks.sp)
    gpu = b.device.type == "cuda"

    yield Row("DiT forward", b.forward, F * share, tokens)
    yield Row("distill.py, one k-step of one micro-batch a rank", b.k_step, b.k_step_flops(),
              tokens * b.distill.micro_batch, sum(parts.values()), len(few) - 1, b.bytes / 5e8)
    yield Row(f"prompt to video, {len(few) - 1} steps", lambda: b.walk(few, False),
              F * share * (len(few) - 1) + rest, tokens)
    yield Row("VAE decode", b.decode, decode)
    yield Row("VAE encode", b.encode, encode)
    for name, make, run in random_encoders(cfg):
        yield Row(f"prompt: {name}", lambda make=make, run=run: b.text(make, run), text[name])
    yield Row("DiT forward + backward", b.backward, 3 * F * share, tokens)
    yield Row("DiT from a file, in the system's cache", b.loading, extra=b.bytes / 5e8)
    if b.synvid.batch > 1:
        yield Row(f"DiT forward, {b.synvid.batch} samples", lambda: b.forward(
            batch=b.synvid.batch), F * share * b.synvid.batch, tokens * b.synvid.batch)
    yield Row(f"synvid.py without the teacher's forwards, {b.synvid.batch} trajectories",
              b.synvid_rest)
    if gpu and cfg.family == "hunyuan":
        for lengths, anew in (("at a new length of prompt each time", True),
                              ("at one length", False)):
            yield Row(f"attention of a layer, forward + backward, {lengths}",
                      lambda anew=anew: b.attention(anew),
                      3 * 4 * tokens ** 2 * b.dit.cfg.dim * share, tokens)
    for kind in (("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION") if gpu
                 else ("FLASH_ATTENTION", "MATH")):
        backend = getattr(SDPBackend, kind)
        yield Row(f"DiT forward, {kind.lower()}", lambda backend=backend: b.forward(backend),
                  F * share, tokens)
        if gpu:
            yield Row(f"DiT forward, {kind.lower()}, compiled",
                      lambda backend=backend: b.forward(backend, True), F * share, tokens, extra=60)
    yield Row(f"prompt to video, {cfg.n} steps", lambda: b.walk(full, evaluations > 1),
              F * share * evaluations * cfg.n + rest, tokens, runs=1)
    if not gpu:
        yield from peer_rows()
        yield Row("DiT forward, compiled", lambda: b.forward(compiled=True), F, tokens, extra=40)


# ------------------------------------------------------------------------ against diffusers

# Width, heads, layers; samples and latent frames, height, width of a sample: two thirds of a second
# at most on a core. The first is the small world's.
PEER_SIZES = ((128, 4, 6, 32, (3, 6, 6)), (384, 6, 2, 1, (3, 32, 32)), (768, 12, 2, 1, (5, 32, 32)))
FRAMES = 9  # of the VAEs' video
GROWTH_DIT = tuple((384, 6, 2, 1, (3, side, side)) for side in (16, 24, 32, 48))
GROWTH_FRAMES = (5, FRAMES, 17, 33)


def peer_rows() -> list[Row]:
    """Small networks of both families against diffusers, and how cost grows; short ones first."""
    def dit_row(family: str, dim: int, heads: int, layers: int, batch: int,
                latents: tuple[int, int, int], learn: bool) -> Row:
        sizes = peer_sizes(family, dim, heads, layers)
        tokens = math.prod(latents) // 4
        with torch.device("meta"):
            flop = batch * build_dit(sizes).flops(tokens) * (3 if learn else 1)
        shape = f"{batch} × {tokens}" if batch > 1 else str(tokens)
        return Row(f"{family} DiT {'forward + backward' if learn else 'forward'}, {dim} wide, "
                   f"{layers} blocks, {shape} tokens",
                   lambda: peer_dits(sizes, batch, latents, learn), flop, batch * tokens,
                   runs=5 if flop < 2e10 else 3)

    def vae_row(family: str, way: str, frames: int) -> Row:
        flop = vae_flops(lambda: small_vae(family), way, frames, *VIDEO_SIZE)
        return Row(f"{family} VAE {way}, {frames} frames", lambda: peer_vaes(family, way, frames),
                   flop, runs=5)

    rows = []
    for family in ("wan", "hunyuan"):
        rows += [dit_row(family, *size, learn) for size in PEER_SIZES for learn in (False, True)]
        rows += [dit_row(family, *size, False) for size in GROWTH_DIT if size not in PEER_SIZES]
        rows += [vae_row(family, "encode", FRAMES)]
        rows += [vae_row(family, "decode", frames) for frames in GROWTH_FRAMES]
    return sorted(rows, key=lambda row: row.flop)


# ------------------------------------------------------------------------------------ report

COLUMNS = {"row": "", "seconds": "seconds", "spread": "±", "tokens": "tokens", "tflop": "TFLOP",
           "tflops": "TFLOP/s", "mfu": "MFU, measured peak", "mfu_datasheet": "datasheet's",
           "peak_gib": "peak GiB", "plan_gib": "plan GiB", "floor_seconds": "floor, s",
           "ratio": "ours / diffusers"}


def with_peaks(found: dict, peak: float, datasheet: float | None) -> dict:
    """A row's figures with its parts of both peaks (FLOP/s, TFLOP/s) and its floor."""
    if found["tflop"]:
        found["floor_seconds"] = found["tflop"] * 1e12 / peak
        if "seconds" in found:
            found["mfu"] = found["floor_seconds"] / found["seconds"]
            if datasheet is not None:
                found["mfu_datasheet"] = found["tflops"] / datasheet
    return {name: value for name, value in found.items() if value is not None}


def cell(found: dict, name: str) -> str:
    """A figure as the table shows it."""
    if name == "spread" and "range" in found:
        low, high = found["range"]
        return f"{(high - low) / 2 / found['seconds']:.0%}"
    if name == "seconds" and "error" in found:
        return found["error"].replace("|", "/")
    value = found.get(name)
    if value is None or value == 0:
        return ""
    if name == "ratio":
        low, high = found["ratio_range"]
        return f"{value:.3f} ({low:.2f} … {high:.2f})"
    if name.startswith("mfu"):
        return f"{value:.1%}"
    return f"{value:.3g}" if isinstance(value, float) else f"{value}"


def table(result: dict) -> str:
    """A device's result as Markdown."""
    rows = result["rows"]
    shown = [name for name in COLUMNS if any(cell(found, name) for found in rows)]
    lines = ["| " + " | ".join(COLUMNS[name] for name in shown) + " |",
             "|---" * len(shown) + "|"]
    lines += ["| " + " | ".join(cell(found, name) for name in shown) + " |" for found in rows]
    lines += ["", f"{result['device']}, {result['dtype']}, torch {result['torch']}; measured peak "
              f"{result['peak_tflops']:.3g} TFLOP/s; diffusers: {result['diffusers']}; "
              f"{result['seconds']:.0f} s in all"]
    if result.get("synvid_share") is not None:
        lines.append(f"synvid.py: {result['synvid_share']:.2%} of its time are not the teacher's "
                     "forwards")
    if result["left_out"]:
        lines += ["left out:", *(f"- {name}: {why}" for name, why in result["left_out"].items())]
    return "\n".join(lines)


def synvid_share(rows: list[dict], batch: int, evaluations: int) -> float | None:
    """Share of synvid.py's time that is not the teacher's forwards, if both rows were measured."""
    seconds = {found["row"]: found.get("seconds") for found in rows}
    forward = seconds.get(f"DiT forward, {batch} samples" if batch > 1 else "DiT forward")
    rest = next((s for name, s in seconds.items() if name.startswith("synvid.py")), None)
    if forward is None or rest is None:
        return None
    return rest / (rest + evaluations * forward)


def store(path: Path, device: str, name: str, result: dict) -> None:
    """Put a result under bench → device → name of a JSON file; all else in it stays."""
    everything = read_json(path) if path.exists() else {}
    if not isinstance(everything, dict):
        raise ValueError(f"{path}: got a {type(everything).__name__}; wanted a JSON object: give "
                         "another --out")
    everything.setdefault("bench", {}).setdefault(device, {})[name] = result
    write_json(path, everything)


def diffusers_version() -> str:
    return importlib.metadata.version("diffusers") if has_diffusers() else (
        "not installed, so nothing is compared; it comes with pip install .[test]")


def too_long(row: Row, peak: float, left: float) -> str | None:
    """Why a row is left out: it needs, at half the peak, more seconds than are left."""
    needs = row.extra + 2 * (row.runs + (row.runs > 1)) * row.flop / peak
    return f"{max(left, 0):.0f} s left, needs about {needs:.0f} s" if needs >= left else None


def main(argv: list[str] | None = None) -> None:
    """Measure row by row until the time is over; print and store what was found."""
    started = time.perf_counter()
    cfg = load_config(Config, "bench", argv, __doc__)
    sizes = check_model(cfg)
    ranks = setup_distributed(cfg.device, cfg.sp, sizes.num_heads)
    prefer_attention(cfg.attention, ranks.device)
    on_gpu, first = ranks.device.type == "cuda", ranks.rank == 0
    device = device_name(ranks.device) if on_gpu else f"{processor()}, " + device_name(
        ranks.device).removeprefix("CPU, ")
    minutes = cfg.minutes if cfg.minutes is not None else 8 if on_gpu else 2
    peak = measure_peak(ranks.device)
    result = {"command": shlex.join(["python", "bench.py", *(sys.argv[1:] if argv is None
                                                              else argv)]),
              "commit": commit(), "device": device, "ranks": ranks.world,
              "dtype": str(compute_dtype(ranks.device)).removeprefix("torch."),
              "torch": torch.__version__, "diffusers": diffusers_version(),
              "peak_tflops": peak / 1e12, "seconds": 0.0, "rows": [], "left_out": {}}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        folder = Path(on_first_rank(lambda: folder))
        bench = Bench(cfg, ranks, folder)
        datasheet = cfg.peak_tflops or bench.distill.peak_tflops
        result["datasheet_tflops"] = datasheet if on_gpu or cfg.peak_tflops else None
        for row in config_rows(bench):
            if cfg.only not in row.name:
                continue
            left = 60 * minutes - (time.perf_counter() - started)
            if why := on_first_rank(lambda row=row, left=left: too_long(row, peak, left)):
                result["left_out"][row.name] = why
                continue
            found = with_peaks(measure(row, ranks.device), peak, result["datasheet_tflops"])
            result["rows"].append(found)
            result["seconds"] = time.perf_counter() - started
            if first:
                print(f"{row.name}: {found.get('error') or cell(found, 'seconds') + ' s'}",
                      flush=True)
                store(Path(cfg.out), device, cfg.path.stem, result)
    evaluations = cfg.n * (1 if cfg.cfg_scale == 1 else 2)
    result["synvid_share"] = synvid_share(result["rows"], bench.synvid.batch, evaluations)
    if first:
        store(Path(cfg.out), device, cfg.path.stem, result)
        print(f"\n{table(result)}\nstored in {cfg.out}")


if __name__ == "__main__":
    cli(main)
