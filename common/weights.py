"""Tensors in files: safetensors and torch's, recognised by content, read lazily, written in order.

A tensor is read when it is needed, and each rank reads only the rows that it keeps.
"""

import json
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.files import error_summary, read_json, replace_file
from common.ranks import local_rows

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".model")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: read() returns all of it, read(slice(a, b)) rows of its first dim."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[..., Tensor]

    def __getitem__(self, rows: slice) -> "LazyTensor":
        """Some rows, as lazily."""
        start, stop, _ = rows.indices(self.shape[0])

        def read(part: slice | None = None) -> Tensor:
            part = part or slice(0, stop - start)
            return self.read(slice(start + part.start, start + part.stop))

        return replace(self, shape=(stop - start, *self.shape[1:]), read=read)


def dtype_name(tensor: LazyTensor) -> str:
    """The dtype without "torch."."""
    return str(tensor.dtype).removeprefix("torch.")


def lazy_tensor(tensor: Tensor, file: Path) -> LazyTensor:
    """A tensor in memory as a lazy one of a file."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, file,
                      lambda rows=None: tensor[rows] if rows and tensor.ndim else tensor)


# How files start that are not weights: (start in lower case, what the file is, what to do).
OTHER_FILES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights", "run `git lfs pull`"),
    ((b"<!doctype", b"<html", b"<?xml"), "is a web page, not weights", "log in and download again"),
    (b"gguf", "is a GGUF file, whose weights are quantised", "use bf16, fp16 or fp32 .safetensors"))
TORCH_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip, pickles


def file_kind(path: Path) -> str:
    """Whether a weight file is torch's or else safetensors, by its first bytes.

    Raises ValueError naming what it is instead if it contains no weights that can be read.
    """
    with path.open("rb") as f:
        start = f.read(256)
    for begin, what, remedy in OTHER_FILES:
        if start.lstrip().lower().startswith(begin):
            raise ValueError(f"{path}: {what}: {remedy}")
    # A safetensors file starts with the length of its JSON: 640 has the bytes of a pickle.
    if not start.startswith(TORCH_STARTS) or start[8:9] == b"{":
        return "safetensors"
    if path.suffix == ".safetensors":  # torch.load would read it as one
        raise ValueError(f"{path}: is a file of torch.save despite its name: let it end in .pt")
    return "torch"


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
          "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def safetensors_header(path: Path) -> tuple[dict[str, str], dict[str, dict], int]:
    """The metadata of a safetensors file, what it says about each tensor (dtype, shape,
    data_offsets), and where its data start. The data are not read, so that their size is free.

    Raises ValueError naming the file unless the tensors fill the data without gap or overlap.
    Source: the format's own description (8 bytes of header length, JSON, data).
    """
    try:
        with safe_open(path, "pt", backend="pread"):  # checks the header; nothing is mapped
            pass
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            entries = json.loads(f.read(length))
        metadata = entries.pop("__metadata__", {})
        if unknown := {entry["dtype"] for entry in entries.values()} - DTYPES.keys():
            raise ValueError(f"dtypes {unknown} are not supported")
    except (ValueError, SafetensorError) as e:
        raise ValueError(f"{path}: not a complete safetensors file ({error_summary(e)}): copy or "
                         "make it again") from e
    return metadata, entries, 8 + length


def open_safetensors(path: Path, header: tuple | None = None) -> dict[str, LazyTensor]:
    """Names and lazy tensors of one safetensors file; header, safetensors_header(path), which is
    read if it is not given. Raises as safetensors_header does."""
    _, entries, data = header or safetensors_header(path)
    tensors = {}
    for name, entry in entries.items():
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        read = partial(read_part, path, data + entry["data_offsets"][0], dtype, shape)
        tensors[name] = LazyTensor(shape, dtype, path, read)
    return tensors


def read_part(path: Path, start: int, dtype: torch.dtype, shape: tuple[int, ...],
              rows: slice | None = None) -> Tensor:
    """Some rows, or all, of the tensor that begins at byte `start` of a file."""
    if rows and shape:
        first, stop, _ = rows.indices(shape[0])
        start += first * dtype.itemsize * math.prod(shape[1:])
        shape = (max(0, stop - first), *shape[1:])
    tensor = torch.empty(shape, dtype=dtype)
    with path.open("rb") as file:  # not mapped: a map would keep all that was ever read in memory
        file.seek(start)
        if file.readinto(tensor.flatten().view(torch.uint8).numpy()) < tensor.nbytes:
            raise ValueError(f"{path}: was cut while it was read: copy or make it again")
    return tensor


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The strings in a safetensors file's header, {} for a file of torch.save. Raises ValueError as
    safetensors_header does."""
    return safetensors_header(path)[0] if file_kind(path) == "safetensors" else {}


def open_torch(path: Path) -> dict[str, LazyTensor]:
    """Names and tensors of a file of torch.save, of which only tensors are ever read.

    They are memory-mapped, except in the format before torch 1.6. The wrappers {"module": …},
    {"ema": …} and {"state_dict": …} are stripped.
    Raises ValueError for a damaged file or one that contains code.
    """
    try:
        with warnings.catch_warnings():  # of pickle protocols; the error says what to do
            warnings.simplefilter("ignore")
            state = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as e:
        raise ValueError(f"{path}: cannot be read as weights ({error_summary(e)}): it is damaged, "
                         "or contains code, which is never read: save it as .safetensors") from e
    for wrapper in ("module", "ema", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(v, Tensor) for name, v in state.items()):
        raise ValueError(f"{path}: expected tensors by name, got something else: name another file")
    return {name: lazy_tensor(value, path) for name, value in state.items()}


def only_weights(folder: Path, stem: str = "") -> Path:
    """The index of shards, or else the one weight file, of a folder; a plain name is preferred to a
    variant such as fp16.

    Args: stem, the start of its name; then an index and a plain file are not both accepted.
    Raises FileNotFoundError if there is none, or more than one.
    """
    files = [p for p in sorted(folder.iterdir()) if p.name.startswith(stem)]
    found = [p for p in files if p.suffix in WEIGHT_SUFFIXES[:-1]]
    found = [p for p in found if p.suffix == ".safetensors"] or found or [
        p for p in files if p.suffix == ".gguf"]  # which is refused by what it is
    plain = [p for p in found if p.stem == stem]
    found = plain or [p for p in found if "." not in p.stem] or found
    indices = [p for p in files if p.suffix == ".json" and ".index" in p.suffixes]
    if indices:  # of safetensors rather than .bin, of a plain name rather than a variant
        indices.sort(key=lambda p: (".safetensors" not in p.suffixes, len(p.suffixes)))
        found = indices[:1] + plain
    if len(found) != 1:
        got = ", ".join(p.name for p in found[:6]) or "no weight file"
        raise FileNotFoundError(f"{folder}: expected one .safetensors file, or shards with their "
                                f".index.json, got {got}: name the file you mean")
    return found[0]


SHARD_NAME = re.compile(r".*-\d{5}-of-(\d{5})\.\w+")


def open_tensors(path: str | Path) -> dict[str, LazyTensor]:
    """Every tensor of a checkpoint by name, none of them read yet.

    Args: path, a weight file of any suffix, an index of shards, or a folder that contains one of
    them. Raises FileNotFoundError or ValueError naming the file and the remedy.
    """
    path = only_weights(Path(path)) if Path(path).is_dir() else Path(path)
    if (shard := SHARD_NAME.fullmatch(path.name)) and int(shard[1]) > 1:
        raise ValueError(f"{path}: is one of {int(shard[1])} shards: get the others and their "
                         ".index.json, and point `weights` at their folder")
    if path.suffix != ".json" or not path.is_file():
        return open_file(path)
    shards = read_index(path)
    files = {name: open_file(path.parent / name) for name in sorted(set(shards.values()))}
    if absent := [name for name, shard in shards.items() if name not in files[shard]]:
        raise ValueError(f"{path}: {absent[0]} should be in {shards[absent[0]]} and is not: shards "
                         "and index are of different downloads: download both again")
    return {name: files[shard][name] for name, shard in shards.items()}


def open_file(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of one weight file. HunyuanVideo's fp8 release keeps the scale of each layer in
    a file of its own, …_fp8_map.pt: they are added as `<layer>.weight_scale`. Raises as
    open_tensors."""
    if not path.is_file():
        link = f", only a link to {path.readlink()}" if path.is_symlink() else ""
        raise FileNotFoundError(f"{path}: no such weight file{link}: download it again, or point "
                                "`weights` at an official or diffusers folder")
    tensors = open_torch(path) if file_kind(path) == "torch" else open_safetensors(path)
    scales = path.with_name(f"{path.stem}_map{path.suffix}")
    if path.stem.endswith("_fp8") and scales.is_file():
        tensors |= {f"{layer}.weight_scale": t for layer, t in open_file(scales).items()}
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor by an index. Raises ValueError if it is not an index, or names a
    file outside its folder."""
    remedy = 'an index of shards has a "weight_map" of tensor names and files: copy it again'
    shards = read_json(path, {"weight_map": {str: str}}, remedy)["weight_map"]
    for shard in shards.values():
        if shard != Path(shard).name or shard == ".." or len(shard) > 255:
            raise ValueError(f"{path}: expected files in its folder, got {shard:.80}: copy both")
    return shards


# ------------------------------------------------------------------------------------ identity

# The blocks of a file or tensor that its identity reads; bytes of a file's, values of a tensor's.
BLOCKS, BLOCK, BLOCK_VALUES = 64, 4096, 1024


def block_starts(size: int, block: int) -> list[int]:
    """Where BLOCKS blocks start that are spread from the beginning to the end of `size`; blocks
    that cover all of it if they can."""
    if size <= BLOCKS * block:
        return list(range(0, size, block))
    return [i * (size - block) // (BLOCKS - 1) for i in range(BLOCKS)]


def sample_blocks(tensor: LazyTensor) -> Tensor:
    """The values of a tensor's spread blocks, in fp32 and one dimension; all of a small tensor."""
    size, row = math.prod(tensor.shape), max(1, math.prod(tensor.shape[1:]))
    if size <= BLOCKS * BLOCK_VALUES:
        return tensor.read().float().flatten()
    blocks = []
    for start in block_starts(size, BLOCK_VALUES):
        a, stop = start // row, start + BLOCK_VALUES
        rows = tensor.read(slice(a, -(-stop // row))).flatten()
        blocks.append(rows[start - a * row:stop - a * row].float())
    return torch.cat(blocks)


def sample_file(path: Path) -> bytes:
    """The bytes of a file's spread blocks; all of a small file."""
    with path.open("rb") as f:
        starts = block_starts(path.stat().st_size, BLOCK)
        return b"".join(os.pread(f.fileno(), BLOCK, start) for start in starts)


# DiTs by a tensor that they have, and the start of its shape where that distinguishes them.
MODEL_MARKS = (
    ("vace_patch_embedding.weight", (), "Wan 2.1 VACE"),
    ("img_emb.proj.3.weight", (5120,), "Wan 2.1 I2V 14B"),
    ("patch_embedding.weight", (1536, 16), "Wan 2.1 T2V 1.3B"),
    ("patch_embedding.weight", (5120, 16), "Wan 2.1 T2V 14B"),
    ("patch_embedding.weight", (5120, 36), "Wan 2.2 I2V A14B"),
    ("patch_embedding.weight", (), "a Wan DiT of another size"),
    ("img_in.proj.weight", (3072, 16), "HunyuanVideo"),
    ("img_in.proj.weight", (), "a HunyuanVideo DiT of another size"))


def describe_model(tensors: dict[str, LazyTensor]) -> str:
    """"; it looks like …": the DiT that some tensors are of by names and shapes; or ""."""
    return next((f"; it looks like {model}" for name, shape, model in MODEL_MARKS
                 if name in tensors and tensors[name].shape[:len(shape)] == shape), "")


def load_module(module: nn.Module, tensors: dict[str, LazyTensor], what: str,
                dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Fill a module's parameters, strictly; each rank reads only the rows it keeps.

    Args: module, maybe on the meta device and sharded; what, a name for errors; dtype of the
    parameters (None: as the module has them); device for parameters that are still on meta.
    Raises ValueError naming the missing, extra, misshapen or non-finite tensors.
    """
    parameters = dict(module.named_parameters())
    for problem, names in (("misses", parameters.keys() - tensors.keys()),
                           ("has unknown", tensors.keys() - parameters.keys())):
        if names:
            some = ", ".join(f"{n:.80}" for n in sorted(names)[:4])
            raise ValueError(f"{what}: the checkpoint {problem} {len(names)} tensor(s), as {some}: "
                             f"it is not of the preset's model or size{describe_model(tensors)}")
    for name, p in parameters.items():
        t = tensors[name]
        if not t.dtype.is_floating_point or p.shape != t.shape:
            raise ValueError(f"{what}: {name} in {t.file} holds {dtype_name(t)} {list(t.shape)}, "
                             f"expected {list(p.shape)} of floats{describe_model(tensors)}")
    if dtype is not None:
        module.to(dtype)
    if any(p.is_meta for p in module.parameters()):
        module.to_empty(device=device)
    with torch.no_grad():
        for name, p in module.named_parameters():
            local, rows = local_rows(p)
            if local.numel() == 0:
                continue
            local.copy_(tensors[name].read(rows))
            if not bool(torch.isfinite(local).all()):
                raise ValueError(f"{what}: {name} in {tensors[name].file} holds NaN or infinity "
                                 f"as {local.dtype}: the weights are damaged, copy them again")
    return module


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Save tensors as safetensors with string metadata, atomically."""
    data = save({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, metadata)
    replace_file(path, lambda aside: aside.write_bytes(data))
