"""Stage 1: prompts to denoising trajectories of the teacher on disk (SynVid), and their reader.

    python synvid.py [CONFIG] [--field value]
    torchrun --nproc-per-node 8 synvid.py CONFIG [field=value]

In:   the teacher's folder `weights` (text encoder, DiT; the VAE for videos) and a file of prompts.
Out:  <run>/synvid/manifest.json           what all trajectories share; another one is an error
      <run>/synvid/000/000123.safetensors  trajectory 123: `x` [stored,C,T,H,W] from noise to data,
                                           `cond.*` as the text encoder made it, padding cut
      <run>/synvid/videos/000123.mp4       of the first few
Cost: n evaluations of the teacher a trajectory (2n with guidance), most of the project's bill: for
      the paper's 38,400 on 8 GPUs at 400 TFLOP/s, computed, 17 days and 1.2 TB for HunyuanVideo at
      544p, 84 at 720p, 23 for Wan 14B, 3.9 for Wan 1.3B; distillation takes 4.4, 22, 3.0 and 0.5.
      It prints the bytes before it starts, and seconds, device-hours and ETA after the first batch.

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from common.config import Shared, announce, field, load_config, settings_to_compare
from common.files import (
    NUMBER, at_home, crc32_of_json, misfit, parse_json, read_json, replace_file, short_reason,
    shown, write_json)
from common.folders import fingerprint, fingerprint_files
from common.prompts import Prompt, digest_texts, read_prompts
from common.ranks import (
    Ranks, cli, compile_blocks, compute_dtype, draw_noise, on_first_rank, owned, prefer_attention,
    setup_distributed)
from common.video import write_video
from model import (
    build_dit, check_model, collate, key_times, latent_shape, load_dit, sample_euler, sizes_of,
    time_grid)

# frozen/ is imported where trajectories are made: the trainer reads SynVid without it.


@dataclass
class Config(Shared):
    """Settings of a job of generation."""
    prompts: str = field("assets/tiny/prompts.txt",
                         "UTF-8 text, a prompt a line; .jsonl of prompt and image for I2V")
    start: int = field(0, "first trajectory of this job", "[0, 1000000000]")
    count: int | None = field(None, "trajectories of this job; none: as far as one for each prompt",
                              "[1, 10000000]")
    keep: Literal["key", "all"] = field("key", "latents stored")
    dtype: Literal["fp16", "fp32"] = field("fp16", "of stored latents; bf16 would put 5% noise on "
                                           "Eq. 6")
    batch: int = field(16, "trajectories denoised at once, those of indices [b·batch, (b+1)·batch)",
                       "[1, 10000]")
    sp: int = field(1, "ranks that share each sample's tokens (Ulysses) and the DiT's weights",
                    "[1, inf)")
    cfg_parallel: bool = field(False, "the two evaluations of guidance on two groups of ranks")
    compile: bool = field(False, "torch.compile every block")
    verify: bool = field(False, "only read this job's trajectories again and list what is wrong")
    repair: bool = field(False, "verify, then make what is missing or damaged anew, and only that")
    videos: int = field(8, "how many of the first trajectories are also decoded to .mp4",
                        "[0, inf)")


VERSION = 1  # of the format on disk
KINDS = {"stored": [int], "t": [NUMBER], "shape": [int], "seed": int, "n": int, "count": int,
         "dtype": str, "prompts": str, "family": str, "weights": str}  # of a manifest's values
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def check_config(cfg: Config, prompts: list[Prompt]) -> range:
    """The indices of this job's trajectories. Raises ValueError for settings that cannot work."""
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
    stored = stored[1:]  # key[0] = 0 is the noise, which is drawn again from its seed
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
            raise ValueError(f"{path}: {key} is {shown(got.get(key))}, this config wants "
                             f"{shown(value)}: "
                             f"{remedy}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a SynVid folder. Raises FileNotFoundError or ValueError with the remedy."""
    path = folder / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no SynVid{at_home(folder)}; make it by `python "
                                "synvid.py CONFIG`")
    remedy = "make the trajectories anew by `python synvid.py CONFIG` in another --run"
    manifest = read_json(path, dict, remedy)
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path}: is of format version {shown(manifest.get('version'))}; this "
                         f"code reads {VERSION}: {remedy}")
    more = {"earlier": [str]} if "earlier" in manifest else {}
    if fault := misfit(manifest, KINDS | more):
        raise ValueError(f"{path}: {fault}: {remedy}")
    return manifest


def open_manifest(folder: Path, wanted: dict, make: bool = True,
                  prompts: list[Prompt] | None = None) -> dict[str, Any]:
    """The folder's manifest; if there is none it is made. Raises ValueError if it is another.

    If only `prompts` came in after those that it was made with, it grows: trajectories that are
    there keep theirs, which "earlier" tells, checksums of the manifests before.
    """
    if make and not (folder / "manifest.json").exists():
        write_json(folder / "manifest.json", wanted)
    manifest = read_manifest(folder)
    before = prompts[:max(manifest["count"], 0)] if make and prompts else []
    if manifest["count"] < wanted["count"] and digest(before) == manifest["prompts"]:
        grown = {**manifest, **{key: wanted[key] for key in ("count", "prompts")}}
        check_same(folder / "manifest.json", grown, wanted, "choose another folder with --run")
        earlier = [*manifest.get("earlier", []), crc32_of_json(manifest)]
        manifest = {**grown, "earlier": earlier}
        write_json(folder / "manifest.json", manifest)
    check_same(folder / "manifest.json", manifest, wanted,
               "one folder holds one kind of trajectories, and grows by prompts at the end of the "
               "file alone; choose another folder with --run, or remove this one to make it anew")
    return manifest


# ------------------------------------------------------------------------ a trajectory's file

def trajectory_path(folder: Path, i: int) -> Path:
    """Where trajectory i lies."""
    return folder / f"{i // 1000:03d}" / f"{i:06d}.safetensors"


def initial_noise(seed: int, i: int, prompt: str, shape: Iterable[int]) -> Tensor:
    """Noise of trajectory i, the latent at t = 1: fp32 [C,T,H,W] from (seed, i, prompt) alone."""
    return draw_noise(shape, [("synvid", seed, i, prompt)])[0]


def crc32(value: Tensor) -> str:
    """Checksum of a tensor with its dtype and shape."""
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
            raise ValueError(f"{trajectory_path(folder, i)}: the latent after step {j} holds NaN "
                             f"or infinity as {manifest['dtype']}: the teacher is damaged or not "
                             "of this grid, or its latents are too large for fp16 (then use "
                             "--dtype fp32)")
    conds = {f"cond.{name}": shorten(c.cpu()) for name, c in cond.items()}
    sums = {"x": [crc32(latent) for latent in x], **{name: crc32(c) for name, c in conds.items()}}
    facts = {"index": i, "prompt": prompt, "seed": manifest["seed"],
             "manifest": crc32_of_json(manifest), "crc32": sums}
    # One metadata key: safetensors writes several in a random order. Not by save_file: its own
    # temporary file has a random name, which the next run could not know for a leftover.
    text = json.dumps({"trajectory": facts, "crc32": crc32_of_json(facts)}, ensure_ascii=False)
    data = save({"x": x.contiguous(), **conds}, {"synvid": text})
    replace_file(trajectory_path(folder, i), lambda aside: aside.write_bytes(data),
                 wait=False)  # one that a power cut takes is made again


def read_trajectory(folder: Path, manifest: dict, i: int,
                    points: Iterable[int]) -> tuple[Tensor, dict[str, Tensor], str]:
    """Latents of trajectory i at points of the teacher's grid (0 is noise), read one by one.

    Returns (x [points,C,T,H,W] fp32, cond without batch dimension, prompt); what is read is held
    against its checksum. Raises ValueError naming a file that is missing, cut or changed.
    """
    path = trajectory_path(folder, i)
    try:
        with safe_open(path, "pt") as f:
            text = parse_json(f.metadata()["synvid"], "its header",
                              {"crc32": str, "trajectory": {"crc32": {str: str | list},
                                                            "prompt": str, "seed": int}})
            facts, sums = text["trajectory"], text["trajectory"]["crc32"]
            if text["crc32"] != crc32_of_json(facts) or sorted(f.keys()) != sorted(sums):
                raise ValueError("its header is damaged")
            known = crc32_of_json(manifest), *manifest.get("earlier", [])
            if facts["index"] != i or facts["manifest"] not in known:
                raise ValueError(f"it is trajectory {facts['index']} of manifest "
                                 f"{facts['manifest']}, not {i} of {crc32_of_json(manifest)}")
            latents, cond = [], {name: f.get_tensor(name) for name in sums if name != "x"}
            for point in points:
                if point == 0:
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
        raise ValueError(f"{path}: cannot be used ({short_reason(e)}): rerun the `python "
                         "synvid.py` command that made it with --repair: only what is damaged or "
                         "missing is made") from e
    cond = {name.removeprefix("cond."): c.float() if c.is_floating_point() else c
            for name, c in cond.items()}
    return torch.stack([latent.float() for latent in latents]), cond, facts["prompt"]


def find_trajectories(folder: Path) -> set[int]:
    """Indices of all trajectories in a folder; one that is still being written, or lies where no
    other program would look for it, is not one."""
    return {int(path.stem) for path in folder.glob("[0-9]*/[0-9]*.safetensors")
            if path.stem.isdecimal() and path == trajectory_path(folder, int(path.stem))}


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
            raise ValueError(f"{trajectory_path(self.folder, gap or 0)}: is missing, {self.count} "
                             "others are there: finish by the same `python synvid.py` command")

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

def sample_trajectories(cfg: Config, dit: nn.Module, noise: Tensor, stored: list[int], cond: dict,
                        uncond: dict | None,
                        cfg_group: dist.ProcessGroup | None = None) -> Tensor:
    """Latents [B,S,C,T,H,W], on the CPU, of noise [B,C,T,H,W] down the teacher's grid. Eq. 5."""
    times = time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    steps = sample_euler(dit, noise, times, cond, uncond, cfg.cfg_scale, cfg_group)
    return torch.stack([x.to("cpu", DTYPES[cfg.dtype]) for j, x in enumerate(steps, start=1)
                        if j in stored], 1)


def format_seconds(seconds: float) -> str:
    """Seconds as a short human duration: 45 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
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
        if not trajectory_path(folder, i).exists():
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
            print(f"{trajectory_path(folder, i)}: {found[i]}")
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
    count = len(wanted) - sum(i in wanted for i in there)
    sizes = sizes_of(cfg.preset)
    latents = len(manifest["stored"]) * math.prod(manifest["shape"]) * DTYPES[cfg.dtype].itemsize
    condition = sizes.text_len * sizes.text_dim * compute_dtype(device).itemsize
    if sizes.takes_image:  # fp32: its features, and 4 mask channels on the 16 of a latent
        frames = math.prod(manifest["shape"]) * 20 // 16
        condition += 4 * (sizes.image_len * sizes.image_dim + frames)
    need = count * (latents + condition + 2000)  # the header with the prompt
    free = shutil.disk_usage(folder).free
    with torch.device("meta"):
        dit = build_dit(cfg.preset)
    evaluations = cfg.n * (1 if cfg.cfg_scale == 1 else 2)
    flop = count * evaluations * dit.flops(math.prod(dit.token_grid(*manifest["shape"][1:])))
    print(f"synvid: {count} trajectories to do, {len(wanted) - count} of {len(wanted)} are "
          f"there; at most {format_bytes(need)} to write, {format_bytes(free)} free at {folder}\n"
          f"synvid: {evaluations} evaluations each, {flop:.3g} FLOP in all: {flop / 1.44e18:.3g} "
          "GPU-hours at 400 TFLOP/s (40% of an H100's peak)", flush=True)
    if need > free:
        raise ValueError(f"{folder}: {count} trajectories need up to {format_bytes(need)}, got "
                         f"{format_bytes(free)}: free some space, choose another --run, or make "
                         "fewer by --count")
    return [i for i in wanted if i not in there]


def decode_video(cfg: Config, folder: Path, manifest: dict, vae: nn.Module, i: int) -> None:
    """Decode trajectory i, as it is stored, to videos/NNNNNN.mp4."""
    x, _, _ = read_trajectory(folder, manifest, i, [manifest["n"]])
    with torch.no_grad():
        video = vae.decode(x.to(vae.dtype).to(next(vae.parameters()).device))
    write_video(folder / f"videos/{i:06d}.mp4", video[0], cfg.fps)


def print_cost(seconds: float, batch: int, rounds: int, chunks: int, ranks: Ranks) -> None:
    """Print what `chunks` batches cost, `rounds` of them a rank, from the first one's seconds."""
    tqdm.write(f"synvid: {format_seconds(seconds / batch)} a trajectory on {ranks.device.type}; in "
               f"all {seconds * chunks * ranks.world / ranks.dp_size / 3600:.3g} device-hours; "
               f"{format_seconds(seconds * (rounds - 1))} to go with {ranks.world} rank(s)")
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
    mine, dtype = list(chunks.items())[ranks.dp_rank::ranks.dp_size], compute_dtype(ranks.device)
    with_video = {i for i in wanted[:max(cfg.videos - cfg.start, 0)]
             if ranks.is_writer and not (folder / f"videos/{i:06d}.mp4").exists()}
    if with_video:
        vae = load_vae(cfg.weights, ranks.device, dtype, cfg.family)
        for i in sorted(with_video.difference(todo))[ranks.dp_rank::ranks.dp_size]:
            decode_video(cfg, folder, manifest, vae, i)
    if not mine:
        return
    dit = load_dit(cfg.weights, cfg.preset, dtype, ranks.device, ranks.sp_ranks)
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
        noise = draw_noise(manifest["shape"], [("synvid", cfg.seed, i, prompt.text)
                                               for i, prompt in zip(indices, chosen, strict=True)])
        x = sample_trajectories(cfg, dit, noise.to(ranks.device), manifest["stored"],
                                collate(conds), uncond, ranks.cfg_group)
        if read_manifest(folder) != manifest:
            raise ValueError(f"{folder}/manifest.json: was changed while this job ran: another job "
                             "with other settings writes there; give each its own --run")
        for i in missing if ranks.is_writer else []:
            b = i - indices.start
            write_trajectory(folder, manifest, i, chosen[b].text, x[b], conds[b])
        if number == 0 and ranks.rank == 0:
            print_cost(time.perf_counter() - first, cfg.batch, len(mine), len(chunks), ranks)
        for i in with_video.intersection(missing):
            decode_video(cfg, folder, manifest, vae, i)
        bar.update(len(missing))
    bar.close()
    if ranks.rank == 0:
        each = trajectory_path(folder, todo[0]).stat().st_size
        print(f"synvid: rank 0 made {bar.n} trajectories of {format_bytes(each)} in "
              f"{format_seconds(time.perf_counter() - first)}: {folder}", flush=True)


def make(cfg: Config) -> None:
    """Make what is missing of a job's trajectories; in all processes that torchrun started."""
    sizes = check_model(cfg)
    prompts = read_prompts(cfg.prompts, sizes.takes_image)
    wanted = check_config(cfg, prompts)
    same = settings_to_compare(cfg, teacher=fingerprint(cfg.weights), prompts=digest_texts(prompts),
                               encoders=fingerprint_files(cfg.weights))
    ranks = setup_distributed(cfg.device, cfg.sp, sizes.num_heads, same=same,
                              cfg_parallel=cfg.cfg_parallel and cfg.cfg_scale != 1)
    prefer_attention(cfg.attention, ranks.device)
    folder = Path(cfg.run) / "synvid"
    only_verify = cfg.verify and not cfg.repair  # nothing is written then
    with owned(folder, wanted.start, wanted.stop) if not only_verify else nullcontext():
        manifest = on_first_rank(lambda: open_manifest(folder, make_manifest(cfg, prompts),
                                                       not only_verify, prompts))
        damaged = verify(folder, wanted, manifest, ranks) if cfg.verify or cfg.repair else {}
        if only_verify:
            if damaged:
                raise SystemExit(1)
            return
        announce(cfg, "synvid", ranks.rank)
        todo = on_first_rank(lambda: plan(cfg, folder, wanted, manifest, ranks.device, damaged))
        with one_cpu_thread():
            generate(cfg, prompts, folder, manifest, wanted, todo, ranks)
        # Together: a node that leaves five minutes before others may take torchrun's store along.
        dist.barrier()


def main(argv: list[str] | None = None) -> None:
    make(load_config(Config, "synvid", argv, __doc__))


if __name__ == "__main__":
    cli(main)
