"""Tensors in files: safetensors and torch's, recognised by content, read lazily, written in order.

A tensor is read when it is needed, and each rank reads only the rows that it keeps.
"""

import contextlib
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.files import crc32_of_file, error_summary, read_json, replace_file
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


# How files start that are not weights: (start in lower case, what the file is, what to do).
OTHER_FILES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights",
     "fetch them by `git lfs pull`"),
    ((b"<!doctype", b"<html", b"<?xml"), "is a web page, not weights",
     "the download failed, perhaps for lack of a login: download it again"),
    (b"gguf", "is a GGUF file, whose weights are quantised",
     "use bf16, fp16 or fp32 weights as .safetensors"))
ZIP, PICKLES = b"PK\x03\x04", tuple(bytes((0x80, protocol)) for protocol in (2, 3, 4, 5))


def file_kind(path: Path) -> str:
    """What a weight file is by its first bytes: safetensors, torch, old torch or index.

    Raises ValueError naming what it is instead if it contains no weights that can be read.
    """
    with path.open("rb") as f:
        start = f.read(256)
    text = start.lstrip().lower()
    if not start:
        raise ValueError(f"{path}: is empty: copy or download it again")
    for begin, what, remedy in OTHER_FILES:
        if text.startswith(begin):
            raise ValueError(f"{path}: {what}: {remedy}")
    if start.startswith((ZIP, *PICKLES)):
        if path.suffix == ".safetensors":
            raise ValueError(f"{path}: is a file of torch.save despite its name: let its name end "
                             "in .pt")
        return "torch" if start.startswith(ZIP) else "old torch"
    if text.startswith(b"{") and path.suffix == ".json":
        return "index"
    if start[8:9] == b"{" or path.suffix == ".safetensors":  # opened reports a damaged one
        return "safetensors"
    raise ValueError(f"{path}: expected weights as .safetensors or torch's .pt, .pth or .bin, got "
                     f"a file that starts with {start[:8]!r}: name the right file")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file, open. Raises ValueError naming it if it is damaged or another file."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path}: not a complete safetensors file ({error_summary(e)}): copy or "
                         "make it again") from e


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Names and lazy tensors of one safetensors file. Raises ValueError as opened does."""
    def lazy(name: str) -> LazyTensor:
        view = f.get_slice(name)
        shape = tuple(view.get_shape())
        dtype = (view[:0] if shape else f.get_tensor(name)).dtype

        def read(rows: slice | None = None) -> Tensor:
            with opened(path) as file:  # mapped again: one map would keep all that was ever read
                return file.get_slice(name)[rows] if rows and shape else file.get_tensor(name)

        return LazyTensor(shape, dtype, path, read)

    with opened(path) as f:
        return {name: lazy(name) for name in f.keys()}


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The strings in a safetensors file's header. Raises ValueError as opened does."""
    with opened(path) as f:
        return f.metadata() or {}


def open_torch(path: Path, old: bool) -> dict[str, LazyTensor]:
    """Names and tensors of a file of torch.save, of which only tensors are ever read.

    They are memory-mapped, except in the format before torch 1.6 (old). The wrappers
    {"module": …}, {"ema": …} and {"state_dict": …} are stripped.
    Raises ValueError for a damaged file or one that contains code.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not old)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as e:
        raise ValueError(f"{path}: cannot be read as weights ({error_summary(e)}): it is damaged, "
                         "or contains code, which is never read: copy it again, or as "
                         ".safetensors") from e
    for wrapper in ("module", "ema", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(state).__name__} of "
                         "other things: name the right file")

    def lazy(value: Tensor) -> LazyTensor:
        return LazyTensor(tuple(value.shape), value.dtype, path,
                          lambda rows=None: value[rows] if rows and value.ndim else value)

    return {name: lazy(value) for name, value in state.items()}


def only_weights(folder: Path) -> Path:
    """The index of shards, or else the one weight file, of a folder; a plain name is preferred to a
    variant such as fp16. Raises FileNotFoundError if there is none, or more than one."""
    for pattern in ("*.safetensors.index.json", "*.safetensors.index.*.json", "*.bin.index.json"):
        if found := sorted(folder.glob(pattern)):
            break
    else:
        files = [p for p in sorted(folder.iterdir()) if p.suffix in WEIGHT_SUFFIXES[:-1]]
        safe = [p for p in files if p.suffix == ".safetensors"] or files
        found = [p for p in safe if "." not in p.stem] or safe
    if len(found) != 1:
        got = ", ".join(p.name for p in found[:6]) or "no weight file"
        raise FileNotFoundError(f"{folder}: expected one .safetensors file, or shards with their "
                                f".index.json, got {got}: name the file you mean")
    return found[0]


def open_tensors(path: str | Path) -> dict[str, LazyTensor]:
    """Every tensor of a checkpoint by name, none of them read yet.

    Args: path, a weight file of any suffix, an index of shards, or a folder that contains one of
    them. Raises FileNotFoundError or ValueError naming the file and the remedy.
    """
    path = only_weights(Path(path)) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file; point `weights` at an official or "
                                "diffusers folder (or make the file that is missing)")
    kind = file_kind(path)
    if kind == "index":
        shards = read_index(path)
        files = {name: open_tensors(path.parent / name) for name in sorted(set(shards.values()))}
        absent = [n for n, shard in shards.items() if n not in files[shard]]
        if absent:
            raise ValueError(f"{path}: {absent[0]} should be in {shards[absent[0]]} and is not: "
                             "shards and index are of different downloads: download both again")
        return {name: files[shard][name] for name, shard in shards.items()}
    return open_safetensors(path) if kind == "safetensors" else open_torch(path, kind != "torch")


def read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor by an index. Raises ValueError if it is not an index, or names a
    file outside its folder."""
    remedy = 'an index of shards has a "weight_map" of tensor names and files: copy it again'
    shards = read_json(path, {"weight_map": {str: str}}, remedy)["weight_map"]
    outside = [shard for shard in shards.values() if shard != Path(shard).name or shard == ".."]
    if outside:
        raise ValueError(f"{path}: expected files in its own folder only, got {outside[0]:.80}: "
                         "copy index and shards into one folder")
    return shards


# Models by a tensor that they have, and the start of its shape where that distinguishes them.
MODELS = (
    ("patch_embedding.weight", (1536, 16), "Wan 2.1 T2V 1.3B"),
    ("patch_embedding.weight", (5120, 16), "Wan 2.1 T2V 14B"),
    ("patch_embedding.weight", (5120, 36), "Wan 2.1 I2V 14B"),
    ("patch_embedding.weight", (3072, 48), "Wan 2.2 TI2V 5B"),
    ("patch_embedding.weight", (), "a Wan DiT"),
    ("img_in.proj.weight", (3072, 16), "HunyuanVideo"),
    ("img_in.proj.weight", (3072, 33), "HunyuanVideo I2V"),
    ("img_in.proj.weight", (), "a HunyuanVideo DiT"),
    ("encoder.conv_in.conv.weight", (), "HunyuanVideo's VAE"),
    ("encoder.conv1.weight", (), "Wan's VAE"),
    ("token_embedding.weight", (), "umT5"), ("shared.weight", (), "umT5"),
    ("model.embed_tokens.weight", (), "a LLaMA"), ("embed_tokens.weight", (), "a LLaMA"),
    ("text_model.embeddings.token_embedding.weight", (), "CLIP's text half"),
    ("visual.cls_embedding", (), "CLIP's image half"),
    ("double_blocks.0.img_attn.qkv.weight", (), "Flux or another model with its names"),
    ("input_blocks.0.0.weight", (), "Stable Diffusion"))


def describe_model(tensors: dict[str, LazyTensor]) -> str:
    """"; it looks like …": the model that some tensors are of by names and shapes; or ""."""
    for name, shape, model in MODELS:
        if name in tensors and tensors[name].shape[:len(shape)] == shape:
            width = tensors[name].shape[0]
            return f"; it looks like {model}" + ("" if shape else f", width {width}")
    return ""


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
            some = ", ".join(sorted(names)[:4]) + (" …" if len(names) > 4 else "")
            raise ValueError(f"{what}: the checkpoint {problem} {len(names)} tensor(s): {some}; "
                             "it is of another model or size than the config's preset"
                             f"{describe_model(tensors)}")
    for name, p in parameters.items():
        if tuple(p.shape) != tensors[name].shape:
            raise ValueError(f"{what}: {name} in {tensors[name].file} has shape "
                             f"{list(tensors[name].shape)}, expected {list(p.shape)}: it is of "
                             f"another size than the config's preset{describe_model(tensors)}")
    if dtype is not None:
        module.to(dtype)
    if any(p.is_meta for p in module.parameters()):
        module.to_empty(device=device)
    with torch.no_grad():
        for name, p in module.named_parameters():
            local, rows = local_rows(p)
            if local.numel() == 0:
                continue
            try:
                local.copy_(tensors[name].read(rows))
            except RuntimeError as e:
                raise ValueError(f"{what}: {name} cannot be read from {tensors[name].file} ({e}): "
                                 "the file is damaged, copy it again") from e
            if not bool(torch.isfinite(local).all()):
                raise ValueError(f"{what}: {name} in {tensors[name].file} holds NaN or infinity "
                                 f"as {local.dtype}: the weights are damaged, copy them again")
    return module


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Save tensors as safetensors with string metadata, atomically."""
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}

    def write(aside: Path) -> None:
        save_file(tensors, str(aside), metadata)
        aside.chmod(0o644)  # safetensors lets only their owner read its files

    replace_file(path, write)


# ------------------------------------------------------------------------- writing safetensors

CHECKSUM = "-" * 8  # placeholder in the metadata, crc32: CHECKSUM, for the CRC-32 of the data
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def stream_safetensors(path: Path, tensors: dict[str, LazyTensor],
                       metadata: dict[str, str], write: bool = True) -> list | None:
    """Write a safetensors file one tensor at a time; returns [bytes, CRC-32] once it is on disk.

    Each read() is called once, in order, even after an error or without `write`, since it may be a
    collective of all ranks. If metadata["crc32"] is CHECKSUM, it and the CRC-32 that is returned
    become that of the data alone, for check_data.
    Raises OSError if the file cannot be written. Source: the format's own description (8 bytes of
    header length, JSON, data).
    """
    header, end = {"__metadata__": metadata}, 0
    for name, t in tensors.items():
        start, end = end, end + t.dtype.itemsize * torch.Size(t.shape).numel()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    of_data = metadata.get("crc32") == CHECKSUM
    size, crc, error = len(head), 0 if of_data else zlib.crc32(head), None
    with contextlib.ExitStack() as stack:
        try:
            if write:
                file = stack.enter_context(path.open("wb"))
                file.write(head)
        except OSError as e:
            error = e
        for t in tensors.values():
            if not write or error is not None:
                bytes_of(t.read().flatten()[:1])  # [:1] waits for a GPU's part in the collective
                continue
            chunk = bytes_of(t.read())
            try:
                file.write(chunk)
            except OSError as e:
                error = e
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        if error is not None:
            raise error
        if write:
            if of_data:
                file.seek(8 + text.index(b'"crc32": "') + 10)
                file.write(f"{crc:08x}".encode())
            file.flush()
            os.fsync(file.fileno())
    return [size, f"{crc:08x}"] if write else None


def check_data(path: Path) -> None:
    """Raise ValueError if the CRC-32 in a safetensors file's metadata is not that of its data."""
    stored = safetensors_metadata(path).get("crc32")
    if stored is None:
        return
    with path.open("rb") as f:
        head = 8 + struct.unpack("<Q", f.read(8))[0]
    if stored != (found := crc32_of_file(path, head)):
        raise ValueError(f"{path}: is damaged: its data have CRC-32 {found}, expected {stored} by "
                         "its metadata: copy it again, or export it again by the command that made "
                         "it (a program that changes it on purpose should drop crc32 from its "
                         "metadata)")


def full_tensor(p: DTensor, path: Path, dtype: torch.dtype) -> LazyTensor:
    """A sharded parameter in another dtype; read() gathers it on all ranks."""
    def read(rows: slice | None = None) -> Tensor:
        value = p.detach().to(dtype).full_tensor()
        return value[rows] if rows else value

    return LazyTensor(tuple(p.shape), dtype, path, read)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements as bytes."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
