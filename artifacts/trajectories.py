"""SynVid on disk: the manifest, the trajectory files, the reader for training, and verification.

    <run>/synvid/manifest.json            what all trajectories of the folder share
    <run>/synvid/000/000123.safetensors   trajectory 123: `x` [S,C,T,H,W], latents from noise to
                                          data; `cond.*` as the encoders made it, without padding
    <run>/synvid/videos/000123.mp4        its last latent decoded, for the first trajectories

The manifest holds only what follows from the config and never changes, so that it can be written
again when it is lost or damaged. Everything else is in the header of each trajectory's file: its
index, prompt, image, seed, the identity of its encoders, and checksums of its tensors and of the
manifest.

Shapes: S stored latents; C channels, T H W latent frames, height and width.
"""

import contextlib
import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import Shared
from common.files import (
    NUMBER, abbreviate, crc32_of_json, error_summary, parse_json, read_json,
    shape_error, write_json)
from common.names import fingerprint
from common.ranks import Ranks, draw_noise, gather_values, on_first_rank, progress_bar, require_same
from common.video import write_video
from common.weights import open_safetensors, safetensors_header, save_tensors
from model import key_times, latent_shape, sizes_of, time_grid

VERSION = 2  # of the format on disk; 1 also held the number and the digest of the prompts
MANIFEST_TYPES = {"stored": [int], "t": [NUMBER], "shape": [int], "seed": int, "n": int,
                  "dtype": str, "family": str, "weights": str}
HEADER_TYPES = {"crc32": str, "trajectory": {"crc32": {str: str | list}, "prompt": str,
                                             "seed": int, "index": int, "manifest": str}}
LATENT_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, IndexError)


# ---------------------------------------------------------------------------------- manifest

def teacher_settings(cfg: Shared) -> dict[str, Any]:
    """The settings of teacher and grid on which SynVid and trainer must agree."""
    negative = cfg.negative_prompt if cfg.guidance != 1 else None  # otherwise it is not used
    embedded = cfg.embedded_guidance if cfg.family == "hunyuan" else None
    boundary = sizes_of(cfg.preset).boundary
    return {"family": cfg.family, "weights": fingerprint(cfg.weights), "n": cfg.n,
            "shift": cfg.shift, "cfg_scale": cfg.guidance, "negative_prompt": negative,
            "embedded_guidance": embedded, **({"boundary": boundary} if boundary else {}),
            "frames": cfg.frames, "height": cfg.height, "width": cfg.width,
            "shape": list(latent_shape(cfg.frames, cfg.height, cfg.width))}


def make_manifest(cfg: Any) -> dict[str, Any]:
    """The manifest of the trajectories that a config of stage 1 describes."""
    points = cfg.key if cfg.keep == "key" else range(cfg.n + 1)
    stored = list(points[1:])  # points[0] = 0 is the noise, which is drawn again from its seed
    times = time_grid(cfg.family, cfg.n, cfg.shift)[stored].tolist()
    return {"version": VERSION, **teacher_settings(cfg), "stored": stored, "t": times,
            "dtype": cfg.dtype, "seed": cfg.seed}


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Checksum of a manifest without its times, which libraries round differently."""
    return crc32_of_json({key: value for key, value in manifest.items() if key != "t"})


def check_same(path: Path, stored: dict, expected: dict, remedy: str) -> None:
    """Raise ValueError naming the first key of `expected` that a stored manifest contradicts."""
    for key, value in expected.items():
        same = stored.get(key) == value
        if key == "t":  # libraries differ in the last bit
            same = len(stored["t"]) == len(value) and all(
                math.isclose(a, b, abs_tol=1e-9) for a, b in zip(stored["t"], value, strict=True))
        if not same:
            raise ValueError(f"{path}: {key}: expected {abbreviate(value)} by this config, got "
                             f"{abbreviate(stored.get(key))}: {remedy}")


def read_manifest(folder: Path, config: str | Path = "CONFIG") -> dict[str, Any]:
    """The manifest of a SynVid folder. Raises FileNotFoundError or ValueError with the remedy, a
    command with the path of a config."""
    path = folder / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no SynVid in this folder: make it by "
                                f"`python synvid.py {config}`")
    remedy = "rerun the `python synvid.py` command that made it, which writes it again"
    manifest = read_json(path, dict, remedy)
    if manifest.get("version") != VERSION:
        found = abbreviate(manifest.get("version"))
        raise ValueError(f"{path}: expected format version {VERSION}, got {found}: make the "
                         f"trajectories again by `python synvid.py {config}` in another --run")
    if fault := shape_error(manifest, MANIFEST_TYPES):
        raise ValueError(f"{path}: {fault}: {remedy}")
    return manifest


def open_manifest(folder: Path, cfg: Any, write: bool = True) -> dict[str, Any]:
    """The manifest of a folder, written first from a config of stage 1 if it is missing.

    A damaged one is written again if the trajectories of the folder record the config's.
    Raises ValueError if the folder contains trajectories of other settings.
    """
    path, stored, expected = folder / "manifest.json", None, make_manifest(cfg)
    remedy = ("a folder holds trajectories of one teacher, grid, guidance, size, dtype and seed: "
              "choose another one with --run, or delete it to make it again")
    try:
        stored = read_manifest(folder)
        check_same(path, stored, expected, remedy)
        return stored
    except (ValueError, FileNotFoundError):
        recorded = first_header(folder).get("manifest")
        fits = recorded == manifest_checksum(expected)
        if not write or (stored is not None and not fits):
            raise
        if recorded is not None and not fits:
            raise ValueError(f"{path}: is missing or damaged, and the trajectories of the folder "
                             f"were made with other settings: {remedy}") from None
    write_json(path, expected)
    if recorded is not None:
        print(f"{path}: was missing or damaged; written again from the config")
    stored = read_manifest(folder)  # another job may have written its own
    check_same(path, stored, expected, remedy)
    return stored


def first_header(folder: Path) -> dict[str, Any]:
    """The header of a folder's first readable trajectory; {} if there is none."""
    for part in sorted(folder.glob("[0-9]*")):  # not all of a large folder is listed
        for i in sorted(find_trajectories(folder, part.name)):
            with contextlib.suppress(*READ_ERRORS):
                return read_header(safetensors_header(trajectory_path(folder, i)))
    return {}


def check_other_jobs(folder: Path, manifest: dict, encoders: str) -> None:
    """Raise ValueError if another job has replaced this job's manifest, or made trajectories with
    other text or image encoders."""
    check_same(folder / "manifest.json", read_manifest(folder), manifest, "another job with other "
               "settings replaced it: give each job its own --run")
    first = first_header(folder)
    if (found := first.get("encoders", encoders)) != encoders:
        raise ValueError(f"{trajectory_path(folder, first['index'])}: was made with other text or "
                         f"image encoders ({found}) than those of `weights` ({encoders}): use the "
                         "same in all jobs, or choose another --run")


# ---------------------------------------------------------------------- a trajectory's file

def trajectory_path(folder: Path, i: int) -> Path:
    """The file of trajectory i."""
    return folder / f"{i // 1000:03d}" / f"{i:06d}.safetensors"


def find_trajectories(folder: Path, part: str = "[0-9]*") -> set[int]:
    """Indices of the complete trajectories in a folder, or in a part of it, such as 000: those
    whose files have their final name."""
    return {int(path.stem) for path in folder.glob(f"{part}/[0-9]*.safetensors")
            if path.stem.isdecimal() and path == trajectory_path(folder, int(path.stem))}


def first_gap(existing: set[int]) -> range:
    """The first range of indices that are missing although later ones exist; empty if none are."""
    first = next(i for i in itertools.count() if i not in existing)
    return range(first, min((i for i in existing if i > first), default=first))


def initial_noise(seed: int, i: int, prompt: str, shape: Iterable[int]) -> Tensor:
    """Noise of trajectory i, the latent at t = 1: fp32 [C,T,H,W] from (seed, i, prompt) alone."""
    return draw_noise(shape, [("synvid", seed, i, prompt)])[0]


def crc32(value: Tensor) -> str:
    """Checksum of a tensor with its dtype and shape."""
    kind = f"{value.dtype}{list(value.shape)}".encode()
    return f"{zlib.crc32(value.flatten().view(torch.uint8).numpy(), zlib.crc32(kind)):08x}"


def bf16_if_exact(c: Tensor) -> Tensor:
    """A tensor as bf16 if no value changes (its encoder ran in bf16); otherwise the tensor."""
    exact = c.is_floating_point() and torch.equal(c.bfloat16().to(c.dtype), c)
    return c.bfloat16() if exact else c


def write_trajectory(folder: Path, manifest: dict, i: int, prompt: str, x: Tensor,
                     cond: dict[str, Tensor], encoders: str, image: Path | None = None) -> None:
    """Write trajectory i.

    Args: x [S,C,T,H,W], stored in the manifest's dtype; cond without batch dimension; encoders,
    the Conditioner.identity of those that made it; image, the file of the first frame for
    image-to-video. Raises ValueError if a latent is not finite in that dtype or the file cannot be
    written.
    """
    path, x = trajectory_path(folder, i), x.to(LATENT_DTYPES[manifest["dtype"]])
    for j, latent in zip(manifest["stored"], x, strict=True):
        if not torch.isfinite(latent).all():
            raise ValueError(f"{path}: the latent after step {j} contains NaN or infinity as "
                             f"{manifest['dtype']}: check the teacher's weights, use --dtype fp32, "
                             "or, if this is the only one, change its prompt")
    conds = {f"cond.{name}": bf16_if_exact(c.cpu()) for name, c in cond.items()}
    sums = {"x": [crc32(latent) for latent in x], **{name: crc32(c) for name, c in conds.items()}}
    header = {"index": i, "prompt": prompt, "seed": manifest["seed"],
              "manifest": manifest_checksum(manifest), "encoders": encoders, "crc32": sums}
    if image is not None:
        header["image"] = hashlib.sha256(image.read_bytes()).hexdigest()
    # One metadata key, because safetensors writes several in random order. Not by save_file,
    # because its temporary file has a random name, which no later run could recognise.
    text = json.dumps({"trajectory": header, "crc32": crc32_of_json(header)}, ensure_ascii=False)
    save_tensors(path, {"x": x, **conds}, {"synvid": text})


def read_header(contents: tuple[dict, dict, int]) -> dict[str, Any]:
    """The header of a trajectory, from what safetensors_header returned for its file. Raises one of
    READ_ERRORS if it is damaged."""
    metadata, entries, _ = contents
    text = parse_json(metadata["synvid"], "its header", HEADER_TYPES)
    header = text["trajectory"]
    if text["crc32"] != crc32_of_json(header) or sorted(entries) != sorted(header["crc32"]):
        raise ValueError("its header is damaged")
    return header


def read_trajectory(folder: Path, manifest: dict, i: int, points: Iterable[int],
                    encoders: str | None = None) -> tuple[Tensor, dict[str, Tensor], str]:
    """Latents of trajectory i at the given points of the teacher's grid, where 0 is the noise.

    Only these latents are read, and each is compared with its checksum. With `encoders`, the
    trajectory must have been made with encoders of this identity.
    Returns (x [points,C,T,H,W] fp32, cond without batch dimension, prompt). Raises ValueError
    naming a file that is missing, truncated or changed.
    """
    path, latents = trajectory_path(folder, i), []
    try:
        # The file is read, not memory-mapped: there an error of a network disk would end the
        # process by a signal.
        contents = safetensors_header(path)
        header, tensors = read_header(contents), open_safetensors(path, contents)
        recorded, expected = header["manifest"], manifest_checksum(manifest)
        if (header["index"], recorded) != (i, expected):
            raise ValueError(f"it is trajectory {header['index']} of manifest {recorded}, not "
                             f"{i} of {expected}")
        if encoders not in (None, header.get("encoders", encoders)):
            raise ValueError("it was made with other text or image encoders than the first "
                             "trajectory of the folder")
        sums = header["crc32"]
        cond = {name: tensors[name].read() for name in sums if name != "x"}
        for point in points:
            if point == 0:
                latents.append(initial_noise(header["seed"], i, header["prompt"],
                                             manifest["shape"]))
                continue
            row = manifest["stored"].index(point)
            latents.append(tensors["x"].read(slice(row, row + 1))[0])
            if crc32(latents[-1]) != sums["x"][row]:
                raise ValueError(f"its latent after step {point} does not match its checksum")
        if any(crc32(c) != sums[name] for name, c in cond.items()):
            raise ValueError("its text states do not match their checksum")
    except READ_ERRORS as e:
        fault = error_summary(e).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: cannot be used ({fault}): rerun the `python synvid.py` command "
                         "that made it with --repair") from e
    cond = {name.removeprefix("cond."): c.float() if c.is_floating_point() else c
            for name, c in cond.items()}
    return torch.stack([latent.float() for latent in latents]), cond, header["prompt"]


@torch.no_grad()
def decode_trajectory(folder: Path, manifest: dict, i: int, vae: torch.nn.Module,
                      fps: float) -> None:
    """Decode the last latent of trajectory i to videos/NNNNNN.mp4."""
    x, _, _ = read_trajectory(folder, manifest, i, [manifest["n"]])
    video = vae.decode(x.to(next(vae.parameters()).device, vae.dtype))
    write_video(folder / f"videos/{i:06d}.mp4", video[0], fps)


# ------------------------------------------------------------------------ reader for training

class SynVid:
    """The trajectories of a folder, checked against the trainer's config and read on demand.

    Args: folder, <run>/synvid; cfg, the trainer's config.
    Attributes: manifest and its checksum; t_key[k] = t'_k, times of the key timesteps (k = 0 data,
    k = m noise).
    Raises FileNotFoundError if there is no SynVid; ValueError if it was made with another teacher,
    grid, guidance or resolution, lacks a key timestep, or has a gap.
    """

    def __init__(self, folder: str | Path, cfg: Shared):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, cfg.path)
        self.checksum = manifest_checksum(self.manifest)
        path = self.folder / "manifest.json"
        remedy = ("train with the config that made these trajectories, or make others by `python "
                  "synvid.py CONFIG` in another --run")
        check_same(path, self.manifest, teacher_settings(cfg), remedy)
        self.points = cfg.key[::-1]  # of the teacher's grid; points[k] belongs to t'_k
        self.t_key = key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1]
        times = dict(zip(self.manifest["stored"], self.manifest["t"], strict=False))
        lacking = [j for j in self.points if j not in (0, *times)]
        if lacking:
            raise ValueError(f"{path}: key {cfg.key} needs the latent after step {lacking[-1]}, "
                             f"the trajectories hold those after {self.manifest['stored']}: make "
                             "others with this key, or --keep all, in another --run")
        check_same(path, {"t": [times[j] for j in self.points if j]}, {"t": self.t_key[:-1]},
                   remedy)  # differs if time_grid was edited
        existing = find_trajectories(self.folder)
        self.count, self.encoders = len(existing), first_header(self.folder).get("encoders")
        if gap := first_gap(existing) if existing else range(1):
            raise ValueError(f"{trajectory_path(self.folder, gap[0])}: is missing, the first of a "
                             f"gap of {len(gap)}; {self.count} trajectories exist: finish by the "
                             "same `python synvid.py` command")

    def __len__(self) -> int:
        return self.count

    def read(self, i: int,
             ks: Iterable[int] | None = None) -> tuple[Tensor, dict[str, Tensor], str]:
        """Key latents of trajectory i: (x_key with x_key[k] = l_{t'_k}, cond, prompt).

        Args: i in 0 … len - 1; ks, the k to read, in order (None: 0 … m). x_key is fp32
        [len(ks),C,T,H,W], cond without batch dimension. Raises ValueError naming a damaged file.
        """
        points = self.points if ks is None else [self.points[k] for k in ks]
        return read_trajectory(self.folder, self.manifest, i, points, self.encoders)


def open_trajectories(folder: Path, cfg: Shared) -> SynVid:
    """The trajectories that rank 0 finds, on all ranks: a network disk may not show all of them
    everywhere yet. Raises as SynVid; ValueError if a rank has another manifest or none."""
    data = on_first_rank(lambda: SynVid(folder, cfg))
    data.folder = folder  # paths may differ from rank to rank
    exists = (folder / "manifest.json").exists()
    require_same({"synvid": manifest_checksum(read_manifest(folder)) if exists else None})
    return data


# ------------------------------------------------------------------------------- verification

def verify(folder: Path, indices: range, manifest: dict, ranks: Ranks) -> dict[int, str]:
    """The faulty trajectories with their faults; every byte is read, and ranks share the work."""
    faults: dict[int, str] = {}
    encoders = first_header(folder).get("encoders")
    own = indices[ranks.rank::ranks.world]
    bar = progress_bar(len(own), "verify", ranks.rank, unit="trajectory")
    for i in own:
        bar.update()
        try:
            read_trajectory(folder, manifest, i, manifest["stored"], encoders)
        except ValueError as e:
            path = trajectory_path(folder, i)
            faults[i] = str(e.__cause__).removeprefix(f"{path}: ") if path.exists() else "missing"
    bar.close()
    faults = {i: fault for part in gather_values(faults) for i, fault in part.items()}
    if ranks.rank == 0:
        for i in sorted(faults):
            print(f"{trajectory_path(folder, i)}: {faults[i]}")
        print(f"synvid: {len(indices) - len(faults)} of {len(indices)} trajectories are complete, "
              f"{len(faults)} are damaged or missing")
    return faults
