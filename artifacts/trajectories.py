"""SynVid on disk: manifest, trajectory files, the reader that training uses, verification."""

import hashlib
import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from common.config import Shared
from common.files import (
    NUMBER, path_hint, crc32_of_json, shape_error, parse_json, read_json, replace_file, error_summary,
    abbreviate, write_json)
from common.names import fingerprint
from common.prompts import Prompt
from common.ranks import Ranks, draw_noise
from model import key_times, latent_shape, time_grid

VERSION = 1  # of the format on disk
KINDS = {"stored": [int], "t": [NUMBER], "shape": [int], "seed": int, "n": int, "count": int,
         "dtype": str, "prompts": str, "family": str, "weights": str}  # of a manifest's values
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


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


def make_manifest(cfg: Any, prompts: list[Prompt]) -> dict[str, Any]:
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
            raise ValueError(f"{path}: {key} is {abbreviate(got.get(key))}, this config wants "
                             f"{abbreviate(value)}: "
                             f"{remedy}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a SynVid folder. Raises FileNotFoundError or ValueError with the remedy."""
    path = folder / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no SynVid{path_hint(folder)}; make it by `python "
                                "synvid.py CONFIG`")
    remedy = "make the trajectories anew by `python synvid.py CONFIG` in another --run"
    manifest = read_json(path, dict, remedy)
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path}: is of format version {abbreviate(manifest.get('version'))}; this "
                         f"code reads {VERSION}: {remedy}")
    more = {"earlier": [str]} if "earlier" in manifest else {}
    if fault := shape_error(manifest, KINDS | more):
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
        raise ValueError(f"{path}: cannot be used ({error_summary(e)}): rerun the `python "
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
