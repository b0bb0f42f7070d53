"""Stage 1: prompts to denoising trajectories of the teacher on disk (SynVid), and their reader.

    python synvid.py [CONFIG] [--field value]
    torchrun --nproc-per-node 8 synvid.py CONFIG [field=value]

In:   the teacher's folder `weights` (text encoder, DiT; the VAE for videos) and a file of prompts.
Out:  <run>/synvid/manifest.json           what all trajectories share; another one is an error
      <run>/synvid/000/000123.safetensors  trajectory 123: `x` [stored,C,T,H,W] from noise to data,
                                           `cond.*` as the text encoder made it, padding cut
      <run>/synvid/videos/000123.mp4       of the first few
Cost: n evaluations of the teacher a trajectory (2n with guidance), most of the project's bill. It
      prints the bytes before it starts, and seconds, device-hours and ETA after the first batch.

Trajectory i is a function of (seed, i, its prompt) alone: the prompts are taken in turn (with
their images, cut to the videos' shape, if the teacher is image-to-video) and the noise is drawn on
the CPU. Neither ranks, order nor restarts change a byte; another batch size or machine changes the
last bits of a velocity, no more. On CPU a rank computes with one thread.
The same command continues where it was stopped; --verify lists what is missing, cut or changed, and
--repair makes just that again. Several jobs, each with its --start and --count,
may fill one folder at the same time: the manifest holds nothing of a single job (its `count` is the
number of prompts; which trajectories there are is told by their files).

Shapes: B batch, C channels, T H W latent frames, height and width, S stored latents, m steps of the
student, L tokens, D width.
"""

import hashlib
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from config import Shared, announce, cli, field, load_config, rate
from model import (
    Ranks, build_dit, collate, compile_blocks, compute_dtype, fingerprint, generator, key_times,
    latent_shape, load_dit, prefer_attention, read_json, replace_file, setup_distributed, sizes_of,
    time_grid, walk, write_json)
from video import Prompt, read_prompts, write_video

# frozen/ is imported where trajectories are made: the trainer reads SynVid without it.


@dataclass
class Config(Shared):
    """Settings of a job of generation."""
    prompts: str = field("assets/tiny/prompts.txt",
                         "UTF-8 text, a prompt a line; .jsonl of prompt and image for I2V")
    start: int = field(0, "first trajectory of this job")
    count: int | None = field(None, "trajectories of this job; none: as far as one for each prompt")
    keep: str = field("key", "latents stored: key | all")
    dtype: str = field("fp16", "of stored latents: fp16 | fp32; bf16 would put 5% noise on Eq. 6")
    store_noise: bool = field(False, "store the noise as well; it can be drawn again from its seed")
    batch: int = field(16, "trajectories denoised at once, those of indices [b·batch, (b+1)·batch)")
    sp: int = field(1, "ranks that share each sample's tokens (Ulysses) and the DiT's weights")
    cfg_parallel: bool = field(False, "the two evaluations of guidance on two groups of ranks")
    compile: bool = field(False, "torch.compile every block")
    verify: bool = field(False, "only read this job's trajectories again and list what is wrong")
    repair: bool = field(False, "verify, then make what is missing or damaged anew, and only that")
    videos: int = field(8, "how many of the first trajectories are also decoded to .mp4")


VERSION = 1  # of the format on disk
CHOICES = {"keep": ("key", "all"), "dtype": ("fp16", "fp32")}
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def check_config(cfg: Config, prompts: list[Prompt]) -> range:
    """The indices of this job's trajectories. Raises ValueError for settings that cannot work."""
    for key, choices in CHOICES.items():
        if getattr(cfg, key) not in choices:
            raise ValueError(f"{key}: got '{getattr(cfg, key)}'; wanted {' | '.join(choices)}")
    for key, least in (("start", 0), ("count", 1), ("batch", 1), ("videos", 0), ("sp", 1)):
        if getattr(cfg, key) is not None and getattr(cfg, key) < least:
            raise ValueError(f"{key}: got {getattr(cfg, key)}; wanted {least} or more")
    if cfg.count is None and cfg.start >= len(prompts):
        raise ValueError(f"start: got {cfg.start} with no count; {cfg.prompts} has {len(prompts)} "
                         "prompts: say with --count how many more trajectories you want")
    return range(cfg.start, cfg.start + cfg.count if cfg.count else len(prompts))


# ---------------------------------------------------------------------------------- manifest

def teacher_facts(cfg: Shared) -> dict[str, Any]:
    """What teacher and grid decide about a trajectory; SynVid and trainer must agree on it."""
    negative = cfg.negative_prompt if cfg.cfg_scale != 1 else None  # else it is not used
    embedded = cfg.embedded_guidance if cfg.family == "hunyuan" else None
    return {"family": cfg.family, "weights": fingerprint(cfg.weights), "n": cfg.n,
            "shift": cfg.shift, "cfg_scale": cfg.cfg_scale, "negative_prompt": negative,
            "embedded_guidance": embedded,
            "frames": cfg.frames, "height": cfg.height, "width": cfg.width,
            "shape": list(latent_shape(cfg.frames, cfg.height, cfg.width))}


def digest(prompts: list[Prompt]) -> str:
    """SHA-256 over all prompts, and over their images' bytes."""
    images = {image: hashlib.sha256(image.read_bytes()).hexdigest()
              for _, image in prompts if image is not None}
    lines = [json.dumps([text, images.get(image)]) for text, image in prompts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def make_manifest(cfg: Config, prompts: list[Prompt]) -> dict[str, Any]:
    """What all trajectories of a folder share, whichever job or rank makes them."""
    stored = list(cfg.key) if cfg.keep == "key" else list(range(cfg.n + 1))
    stored = stored if cfg.store_noise else stored[1:]  # key[0] = 0 is the noise
    times = time_grid(cfg.family, cfg.n, cfg.shift)[stored].tolist()
    return {"version": VERSION, **teacher_facts(cfg), "stored": stored, "t": times,
            "dtype": cfg.dtype, "seed": cfg.seed, "count": len(prompts),
            "prompts": digest(prompts)}


def check_same(path: Path, got: dict, wanted: dict, remedy: str) -> None:
    """Raise ValueError naming the first key of `wanted` that a manifest tells otherwise."""
    for key, value in wanted.items():
        same = got.get(key) == value
        if key == "t" and isinstance(got.get("t"), list):  # libraries differ in the last bit
            same = len(got["t"]) == len(value) and all(map(math.isclose, got["t"], value))
        if not same:
            raise ValueError(f"{path}: {key} is {got.get(key)!r}, this config wants {value!r}: "
                             f"{remedy}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a SynVid folder. Raises FileNotFoundError or ValueError with the remedy."""
    path = folder / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no SynVid; make it by `python synvid.py CONFIG`")
    manifest = read_json(path)
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise ValueError(f"{path}: is of format version {version}; this code reads {VERSION}: make "
                         "the trajectories anew by `python synvid.py CONFIG` in another --run")
    return manifest


def claim(folder: Path, wanted: dict, make: bool = True) -> dict[str, Any]:
    """The folder's manifest; if there is none it is made. Raises ValueError if it is another."""
    if make and not (folder / "manifest.json").exists():
        write_json(folder / "manifest.json", wanted)
    manifest = read_manifest(folder)
    check_same(folder / "manifest.json", manifest, wanted,
               "one folder holds one kind of trajectories; choose another folder with --run, or "
               "remove this one to make it anew")
    return manifest


# ------------------------------------------------------------------------ a trajectory's file

def place(folder: Path, i: int) -> Path:
    """Where trajectory i lies."""
    return folder / f"{i // 1000:03d}" / f"{i:06d}.safetensors"


def initial_noise(seed: int, i: int, prompt: str, shape: Iterable[int]) -> Tensor:
    """Noise of trajectory i, the latent at t = 1: fp32 [C,T,H,W] from (seed, i, prompt) alone."""
    return torch.randn(tuple(shape), generator=generator("synvid", seed, i, prompt))


def crc32(value: Tensor | dict) -> str:
    """Checksum of a tensor with its dtype and shape, or of a dict of plain values."""
    if isinstance(value, dict):
        return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"
    kind = f"{value.dtype}{list(value.shape)}".encode()
    return f"{zlib.crc32(value.flatten().view(torch.uint8).numpy(), zlib.crc32(kind)):08x}"


def shorten(c: Tensor) -> Tensor:
    """A text state as bf16 if that loses nothing (its encoder ran in bf16), else as it is."""
    lossless = c.is_floating_point() and torch.equal(c.bfloat16().to(c.dtype), c)
    return c.bfloat16() if lossless else c


def write_trajectory(folder: Path, manifest: dict, i: int, prompt: str, x: Tensor,
                     cond: dict[str, Tensor]) -> None:
    """Write trajectory i. x [S,C,T,H,W] in the manifest's dtype; cond without batch dimension.

    Raises ValueError if a latent is not finite or the file cannot be written.
    """
    for j, latent in zip(manifest["stored"], x, strict=True):
        if not torch.isfinite(latent).all():
            raise ValueError(f"{place(folder, i)}: the latent after step {j} holds NaN or infinity "
                             f"as {manifest['dtype']}: the teacher is damaged or not of this grid, "
                             "or its latents are too large for fp16 (then use --dtype fp32)")
    conds = {f"cond.{name}": shorten(c.cpu()) for name, c in cond.items()}
    sums = {"x": [crc32(latent) for latent in x], **{name: crc32(c) for name, c in conds.items()}}
    facts = {"index": i, "prompt": prompt, "seed": manifest["seed"], "manifest": crc32(manifest),
             "crc32": sums}
    # One metadata key: safetensors writes several in a random order. Not by save_file: its own
    # temporary file has a random name, which the next run could not know for a leftover.
    text = json.dumps({"trajectory": facts, "crc32": crc32(facts)}, ensure_ascii=False)
    data = save({"x": x.contiguous(), **conds}, {"synvid": text})
    replace_file(place(folder, i), lambda aside: aside.write_bytes(data))


def read_trajectory(folder: Path, manifest: dict, i: int,
                    points: Iterable[int]) -> tuple[Tensor, dict[str, Tensor], str]:
    """Latents of trajectory i at points of the teacher's grid (0 is noise), read one by one.

    Returns (x [points,C,T,H,W] fp32, cond without batch dimension, prompt); what is read is held
    against its checksum. Raises ValueError naming a file that is missing, cut or changed.
    """
    path = place(folder, i)
    try:
        with safe_open(path, "pt") as f:
            text = json.loads(f.metadata()["synvid"])
            facts, sums = text["trajectory"], text["trajectory"]["crc32"]
            if text["crc32"] != crc32(facts) or sorted(f.keys()) != sorted(sums):
                raise ValueError("its header is damaged")
            if (facts["index"], facts["manifest"]) != (i, crc32(manifest)):
                raise ValueError(f"it is trajectory {facts['index']} of manifest "
                                 f"{facts['manifest']}, not {i} of {crc32(manifest)}")
            latents, cond = [], {name: f.get_tensor(name) for name in sums if name != "x"}
            for point in points:
                if point == 0 and 0 not in manifest["stored"]:
                    noise = initial_noise(facts["seed"], i, facts["prompt"], manifest["shape"])
                    latents.append(noise)
                    continue
                row = manifest["stored"].index(point)
                latents.append(f.get_slice("x")[row])
                if crc32(latents[-1]) != sums["x"][row]:
                    raise ValueError(f"its latent after step {point} does not match its checksum")
            if any(crc32(c) != sums[name] for name, c in cond.items()):
                raise ValueError("its text states do not match their checksum")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise ValueError(f"{path}: cannot be used ({e}): delete the file and rerun the `python "
                         "synvid.py` command that made it (only what is missing is made), or rerun "
                         "it with --repair") from e
    cond = {name.removeprefix("cond."): c.float() if c.is_floating_point() else c
            for name, c in cond.items()}
    return torch.stack([latent.float() for latent in latents]), cond, facts["prompt"]


def find_trajectories(folder: Path) -> set[int]:
    """Indices of all trajectories in a folder; a file that is still being written is not one."""
    return {int(path.stem) for path in folder.glob("[0-9]*/[0-9]*.safetensors")
            if path.stem.isdecimal()}


class SynVid:
    """The trajectories of a folder: checked against the trainer's config, read when asked for.

    Args: folder, <run>/synvid; cfg, the trainer's config.
    Attributes: manifest; t_key[k] = t'_k, times of the key timesteps (k = 0 data, k = m noise).
    Raises FileNotFoundError if there is none, ValueError if it is of another teacher, grid,
    guidance or resolution, lacks a key timestep, or has a gap (a job was stopped).
    """

    def __init__(self, folder: str | Path, cfg: Shared):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        path = self.folder / "manifest.json"
        check_same(path, self.manifest, teacher_facts(cfg),
                   "train with the config that made these trajectories, or make others by `python "
                   "synvid.py CONFIG` in another --run")
        self.points = cfg.key[::-1]  # of the teacher's grid; points[k] belongs to t'_k
        self.t_key = key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1]
        lacking = [j for j in self.points if j not in (0, *self.manifest["stored"])]
        if lacking:
            raise ValueError(f"{path}: holds the latents after steps {self.manifest['stored']}, "
                             f"key {cfg.key} needs {lacking[-1]}: make others with this key, or "
                             "with --keep all, by `python synvid.py CONFIG` in another --run")
        there = find_trajectories(self.folder)
        self.count = len(there)
        gap = next((i for i in range(self.count) if i not in there), None)
        if gap is not None or not there:
            raise ValueError(f"{place(self.folder, gap or 0)}: is missing, {self.count} others are "
                             "there: finish by the same `python synvid.py` command")

    def __len__(self) -> int:
        return self.count

    def read(self, i: int,
             ks: Iterable[int] | None = None) -> tuple[Tensor, dict[str, Tensor], str]:
        """Key latents of trajectory i: (x_key with x_key[k] = l_{t'_k}, cond, prompt).

        Args: i in 0 … len - 1; ks, the k wanted, in order (none: 0 … m). x_key is fp32
        [len(ks),C,T,H,W], cond without batch dimension. Raises ValueError naming a damaged file.
        """
        if not 0 <= i < self.count:
            raise IndexError(f"trajectory {i} of {self.count} in {self.folder}")
        points = self.points if ks is None else [self.points[k] for k in ks]
        return read_trajectory(self.folder, self.manifest, i, points)


# -------------------------------------------------------------------------------- generation

def denoise(cfg: Config, dit: nn.Module, noise: Tensor, stored: list[int], cond: dict,
            uncond: dict | None, branches: dist.ProcessGroup | None = None) -> Tensor:
    """Walk noise [B,C,T,H,W] down the teacher's grid; returns latents [B,S,C,T,H,W] on the CPU."""
    times = time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    kept = [noise.to("cpu", DTYPES[cfg.dtype])] if 0 in stored else []
    steps = walk(dit, noise, times, cond, uncond, cfg.cfg_scale, branches)        # Eq. 5
    for j, x in enumerate(steps, start=1):
        if j in stored:
            kept.append(x.to("cpu", DTYPES[cfg.dtype]))
    return torch.stack(kept, 1)


def on_first_rank(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """What `work` gives on rank 0, told to all; its error ends all ranks, and is told once."""
    told = [None, None]
    if ranks.rank == 0:
        try:
            told = [work(), None]
        except (ValueError, FileNotFoundError) as e:
            told = [None, e]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1] if ranks.rank == 0 else SystemExit(1)
    return told[0]


def size(count: float) -> str:
    """Bytes as a short human size."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 100 or unit == "TB" else f"{count:.0f} {unit}"
        count /= 1000


def verify(folder: Path, wanted: range, manifest: dict, ranks: Ranks) -> dict[int, str]:
    """What is wrong with which of the trajectories: every byte is read, a share on each rank."""
    found: dict[int, str] = {}
    for i in tqdm(wanted[ranks.rank::ranks.world], "verify", unit="trajectory", mininterval=1,
                  disable=None if ranks.rank == 0 else True):
        if not place(folder, i).exists():
            found[i] = "missing"
            continue
        try:
            read_trajectory(folder, manifest, i, manifest["stored"])
        except ValueError as e:
            found[i] = str(e.__cause__)
    parts: list[Any] = [None] * ranks.world
    dist.all_gather_object(parts, found)
    found = {i: fault for part in parts for i, fault in part.items()}
    if ranks.rank == 0:
        for i in sorted(found):
            print(f"{place(folder, i)}: {found[i]}")
        print(f"synvid: {len(wanted) - len(found)} of {len(wanted)} trajectories are whole, "
              f"{len(found)} are not", flush=True)
    return found


def plan(cfg: Config, folder: Path, wanted: range, manifest: dict, device: torch.device,
         damaged: Iterable[int]) -> list[int]:
    """Indices still to be made; prints their bytes. Removes what killed runs left half-written.

    Only this job's indices are cleared so: other jobs may be writing. Raises ValueError if the
    disk is too small.
    """
    for part in folder.glob("*/.*.part*"):
        index = part.name[1:].partition(".")[0]
        if index.isdecimal() and int(index) in wanted:
            part.unlink(missing_ok=True)
    there = find_trajectories(folder).difference(damaged)
    todo = [i for i in wanted if i not in there]
    sizes = sizes_of(cfg.preset)
    latents = len(manifest["stored"]) * math.prod(manifest["shape"]) * DTYPES[cfg.dtype].itemsize
    told = sizes.text_len * sizes.text_dim * compute_dtype(device).itemsize
    if sizes.takes_image:  # fp32: its features, and 4 mask channels on the 16 of a latent
        told += 4 * (sizes.image_len * sizes.image_dim + math.prod(manifest["shape"]) * 20 // 16)
    need = len(todo) * (latents + told + 2000)  # the header with the prompt
    free = shutil.disk_usage(folder).free
    with torch.device("meta"):
        dit = build_dit(cfg.preset)
    evaluations = cfg.n * (1 if cfg.cfg_scale == 1 else 2)
    flop = len(todo) * evaluations * dit.flops(math.prod(dit.token_grid(*manifest["shape"][1:])))
    print(f"synvid: {len(todo)} trajectories to do, {len(wanted) - len(todo)} of {len(wanted)} are "
          f"there; at most {size(need)} to write, {size(free)} free at {folder}\n"
          f"synvid: {evaluations} evaluations each, {flop:.3g} FLOP in all: {flop / 1.44e18:.3g} "
          "GPU-hours at 400 TFLOP/s (40% of an H100's peak)", flush=True)
    if need > free:
        raise ValueError(f"{folder}: {len(todo)} trajectories need up to {size(need)}, got "
                         f"{size(free)}: free some space, choose another --run, or make fewer by "
                         "--count")
    return todo


def decode_video(cfg: Config, folder: Path, manifest: dict, vae: nn.Module, i: int) -> None:
    """Decode trajectory i, as it is stored, to videos/NNNNNN.mp4."""
    x, _, _ = read_trajectory(folder, manifest, i, [manifest["n"]])
    with torch.no_grad():
        video = vae.decode(x.to(vae.dtype).to(next(vae.parameters()).device))
    write_video(folder / f"videos/{i:06d}.mp4", video[0], cfg.fps)


def tell_cost(seconds: float, batch: int, rounds: int, chunks: int, ranks: Ranks) -> None:
    """Print what `chunks` batches cost, `rounds` of them a rank, from the first one's seconds."""
    tqdm.write(f"synvid: {rate(seconds / batch)} a trajectory on {ranks.device.type}; in all "
               f"{seconds * chunks * ranks.world / ranks.teams / 3600:.3g} device-hours; "
               f"{rate(seconds * (rounds - 1))} to go with {ranks.world} rank(s)")
    sys.stdout.flush()


@contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Compute with one thread a rank inside: matrix products round otherwise with another number.

    torchrun gives each of several ranks one thread and a lone process all; use ranks for cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generate(cfg: Config, prompts: list[Prompt], folder: Path, manifest: dict, wanted: range,
             todo: list[int], ranks: Ranks) -> None:
    """Make this rank's part of the trajectories `todo` and of the videos that are missing."""
    from frozen.load import load_conditioner, load_vae

    chunks: dict[int, list[int]] = {}
    for i in todo:
        chunks.setdefault(i // cfg.batch, []).append(i)
    mine, dtype = list(chunks.items())[ranks.team::ranks.teams], compute_dtype(ranks.device)
    films = {i for i in wanted[:max(cfg.videos - cfg.start, 0)]
             if ranks.leads and not (folder / f"videos/{i:06d}.mp4").exists()}
    if films:
        vae = load_vae(cfg.weights, ranks.device, dtype, cfg.family)
        for i in sorted(films.difference(todo))[ranks.team::ranks.teams]:
            decode_video(cfg, folder, manifest, vae, i)
    if not mine:
        return
    dit = load_dit(cfg.weights, cfg.preset, dtype, ranks.device, ranks.sharers)
    dit.requires_grad_(False)
    if cfg.compile:
        compile_blocks(dit)
    conditioner, uncond = load_conditioner(cfg, ranks.device, dtype, crop=True), None

    first = time.perf_counter()
    bar = tqdm(total=sum(len(missing) for _, missing in mine), desc="synvid", unit="trajectory",
               mininterval=1 if sys.stderr.isatty() else 60, disable=ranks.rank != 0)
    for number, (chunk, missing) in enumerate(mine):
        # A chunk is computed whole, even if little of it is missing: same rounding, same bytes.
        indices = range(chunk * cfg.batch, (chunk + 1) * cfg.batch)
        chosen = [prompts[i % len(prompts)] for i in indices]
        conds = conditioner.encode_each(chosen, cfg.height, cfg.width)
        if cfg.cfg_scale != 1:
            uncond = collate(conditioner.with_text(cfg.negative_prompt, conds))
        noise = torch.stack([initial_noise(cfg.seed, i, prompt.text, manifest["shape"])
                             for i, prompt in zip(indices, chosen, strict=True)])
        x = denoise(cfg, dit, noise.to(ranks.device), manifest["stored"], collate(conds), uncond,
                    ranks.branch_group)
        if read_manifest(folder) != manifest:
            raise ValueError(f"{folder}/manifest.json: was changed while this job ran: another job "
                             "with other settings writes there; give each its own --run")
        for i in missing if ranks.leads else []:
            b = i - indices.start
            write_trajectory(folder, manifest, i, chosen[b].text, x[b], conds[b])
        if number == 0 and ranks.rank == 0:
            tell_cost(time.perf_counter() - first, cfg.batch, len(mine), len(chunks), ranks)
        for i in films.intersection(missing):
            decode_video(cfg, folder, manifest, vae, i)
        bar.update(len(missing))
    bar.close()
    if ranks.rank == 0:
        each = place(folder, todo[0]).stat().st_size
        print(f"synvid: rank 0 made {bar.n} trajectories of {size(each)} in "
              f"{rate(time.perf_counter() - first)}: {folder}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Make what is missing of this job's trajectories."""
    cfg = load_config(Config, "synvid", argv, __doc__)
    prompts = read_prompts(cfg.prompts, sizes_of(cfg.preset).takes_image)
    wanted = check_config(cfg, prompts)
    ranks = setup_distributed(cfg.device, cfg.sp, sizes_of(cfg.preset).num_heads,
                              branches=1 + (cfg.cfg_parallel and cfg.cfg_scale != 1))
    prefer_attention(cfg.attention, ranks.device)
    folder = Path(cfg.run) / "synvid"
    only = cfg.verify and not cfg.repair  # nothing is written then
    manifest = on_first_rank(ranks, lambda: claim(folder, make_manifest(cfg, prompts), not only))
    damaged = verify(folder, wanted, manifest, ranks) if cfg.verify or cfg.repair else {}
    if only:
        if damaged:
            raise SystemExit(1)
        return
    announce(cfg, "synvid", ranks)
    todo = on_first_rank(ranks, lambda: plan(cfg, folder, wanted, manifest, ranks.device, damaged))
    with one_cpu_thread():
        generate(cfg, prompts, folder, manifest, wanted, todo, ranks)
    # Together: a node that leaves five minutes before others may take torchrun's store with it.
    dist.barrier()


if __name__ == "__main__":
    cli(main)
