"""Tensors in files: safetensors and torch's, told by their content, read lazily, written in order.

Every tensor is read when it is asked for, and each rank reads only the rows that it keeps.
"""

import itertools
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.files import crc32_of_file, read_json, replace_file, error_summary
from common.ranks import local_rows


WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".model")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, read when asked for: shape, dtype, file, read(rows) of the first dim."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[..., Tensor]


def file_kind(path: Path) -> str:
    """What a weight file is by its first bytes: safetensors, torch, old torch or index.

    Raises ValueError saying what it is if it holds no weights that can be read.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(256)
    text = start.lstrip().lower()
    for is_it, what, remedy in (
            (not start, "is empty", "copy or download it again"),
            (start.startswith(b"version https://git-lfs"), "is a Git LFS pointer, not the weights",
             "fetch them by `git lfs pull`"),
            (text.startswith((b"<!doctype", b"<html", b"<?xml")), "is a web page, not weights",
             "the download failed, perhaps for want of a login: download it again"),
            (path.suffix == ".safetensors" and start.startswith((b"PK\x03\x04", b"\x80\x02")),
             "is a file of torch.save, whatever its name says", "let its name end in .pt"),
            (start.startswith(b"GGUF"), "is a GGUF file, whose weights are quantised",
             "wanted bf16, fp16 or fp32 weights as .safetensors")):
        if is_it:
            raise ValueError(f"{path}: {what}: {remedy}")
    if start.startswith(b"PK\x03\x04"):
        return "torch"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "old torch"
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
    if start[8:9] == b"{" and length <= size - 8:
        return "safetensors"
    if text.startswith(b"{") and path.suffix == ".json":
        return "index"
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        raise ValueError(f"{path}: not a whole safetensors file (its header does not fit into its "
                         f"{size} bytes): copy or make it anew")
    raise ValueError(f"{path}: is no weight file that is known here (it begins with "
                     f"{start[:8]!r}): wanted .safetensors, or torch's .pt, .pth or .bin")


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Names and lazy tensors of one safetensors file. Raises ValueError if it is none or cut."""
    def lazy(name: str) -> LazyTensor:
        view = f.get_slice(name)
        shape = tuple(view.get_shape())
        dtype = (view[:0] if shape else f.get_tensor(name)).dtype

        def read(rows: slice | None = None) -> Tensor:  # mapped anew: else all that was ever read
            with whole(path) as again:                  # stays in this process's memory
                return again.get_slice(name)[rows] if rows and shape else again.get_tensor(name)

        return LazyTensor(shape, dtype, path, read)

    with whole(path) as f:
        try:
            return {name: lazy(name) for name in f.keys()}
        except (SafetensorError, OSError, ValueError) as e:
            raise ValueError(f"{path}: not a whole safetensors file ({error_summary(e)}): "
                             "copy or make it anew") from e


def whole(path: Path) -> Any:
    """A safetensors file, open. Raises ValueError if it is none or cut."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path}: not a whole safetensors file ({error_summary(e)}): copy or "
                         "make it anew") from e


def safetensors_metadata(path: Path) -> dict[str, str]:
    """A safetensors file's own strings. Raises ValueError if it is none."""
    with whole(path) as f:
        return f.metadata() or {}


def open_torch(path: Path, old: bool) -> dict[str, LazyTensor]:
    """Names and tensors of a file of torch.save; only tensors are ever read from it.

    They are memory-mapped, but for those of the format before torch 1.6 (old). The wrappers
    {"module": …}, {"ema": …} and {"state_dict": …} are taken off.
    Raises ValueError for a damaged file or one that holds code.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not old)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as e:
        raise ValueError(f"{path}: cannot be read as weights ({error_summary(e)}): it is "
                         "damaged, or holds code, which is never read: copy it again, or as "
                         ".safetensors") from e
    for wrapper in ("module", "ema", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: got {type(state).__name__} of other things than tensors; wanted "
                         "a state dict of tensors")

    def lazy(value: Tensor) -> LazyTensor:
        return LazyTensor(tuple(value.shape), value.dtype, path,
                          lambda rows=None: value[rows] if rows and value.ndim else value)

    return {name: lazy(value) for name, value in state.items()}


def only_weights(folder: Path) -> Path:
    """The index of shards, or the one weight file, of a folder; a full one goes before a variant
    such as fp16. Raises FileNotFoundError if there is none, or more than one."""
    for pattern in ("*.safetensors.index.json", "*.safetensors.index.*.json", "*.bin.index.json"):
        if found := sorted(folder.glob(pattern)):
            break
    else:
        files = [p for p in sorted(folder.iterdir()) if p.suffix in WEIGHT_SUFFIXES[:-1]]
        safe = [p for p in files if p.suffix == ".safetensors"] or files
        found = [p for p in safe if "." not in p.stem] or safe
    if len(found) != 1:
        got = ", ".join(p.name for p in found[:6]) or "no weight file"
        raise FileNotFoundError(f"{folder}: got {got}; wanted one .safetensors file, or shards "
                                "with their .index.json: name the file you mean")
    return found[0]


def open_tensors(path: str | Path) -> dict[str, LazyTensor]:
    """Every tensor of a checkpoint by name, none of them read yet.

    Args: path, a weight file of any suffix, an index of shards, or a folder that holds one of
    them. Raises FileNotFoundError, ValueError naming the file and the remedy.
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
    """Tensor names and the shard of each, of an index. ValueError if it is none, or names a file
    outside its folder."""
    what = 'as an index of shards has a "weight_map" of tensor names and files: copy it again'
    shards = read_json(path, {"weight_map": {str: str}}, what)["weight_map"]
    if not shards:
        raise ValueError(f"{path}: weight_map is empty: {what}")
    outside = [shard for shard in shards.values() if shard != Path(shard).name or shard == ".."]
    if outside:
        raise ValueError(f"{path}: names {outside[0]:.80}; wanted files of its own folder only: "
                         "copy index and shards into one folder")
    return shards


# Models by a tensor that they have, and its shape as far as it tells them apart.
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
    """"; it looks like …": what model some tensors are of, told by names and shapes, or nothing."""
    for name, shape, model in MODELS:
        if name in tensors and tensors[name].shape[:len(shape)] == shape:
            width = tensors[name].shape[0]
            return f"; it looks like {model}" + ("" if shape else f", width {width}")
    return ""


def load_module(module: nn.Module, tensors: dict[str, LazyTensor], what: str,
                dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Fill a module's parameters, strictly, each rank reading only the rows it keeps.

    Args: module, maybe on the meta device and sharded; what, a name for errors; dtype to keep the
    parameters in (None: as the module has them); device for parameters that are still on meta.
    Raises ValueError naming the missing, extra, misshapen or non-finite tensors.
    """
    wanted = dict(module.named_parameters())
    for problem, names in (("misses", wanted.keys() - tensors.keys()),
                           ("has unknown", tensors.keys() - wanted.keys())):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (" …" if len(names) > 4 else "")
            raise ValueError(f"{what}: the checkpoint {problem} {len(names)} tensor(s): {shown}; "
                             "it is of another model or size than the config's preset"
                             f"{describe_model(tensors)}")
    for name, p in wanted.items():
        if tuple(p.shape) != tensors[name].shape:
            raise ValueError(f"{what}: {name} in {tensors[name].file} has shape "
                             f"{list(tensors[name].shape)}, wanted {list(p.shape)}: it is of "
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
            except (SafetensorError, RuntimeError) as e:
                raise ValueError(f"{what}: {name} cannot be read from {tensors[name].file} ({e}): "
                                 "the file is damaged, copy it again") from e
            if not bool(torch.isfinite(local).all()):
                raise ValueError(f"{what}: {name} in {tensors[name].file} holds NaN or infinity "
                                 f"as {local.dtype}: the weights are damaged, copy them again")
    return module


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Save tensors as safetensors with string metadata, written aside and renamed."""
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}

    def write(aside: Path) -> None:
        save_file(tensors, str(aside), metadata)
        aside.chmod(0o644)  # safetensors makes files that only their owner can read

    replace_file(path, write)


# ------------------------------------------------------------------------- writing safetensors

CHECKSUM = "-" * 8  # as crc32 in the metadata: put the data's CRC-32 here
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def stream_safetensors(path: Path, tensors: dict[str, LazyTensor],
                       metadata: dict[str, str], write: bool = True) -> list | None:
    """Write a safetensors file one tensor at a time; returns [bytes, CRC-32], on the disk by then.

    Args: tensors, read() in order, once each, even after an error or without `write`: it may be a
    collective that every rank takes part in; metadata, strings; if its crc32 is CHECKSUM, the
    sum is of the data alone, and stands there in the end, for check_data.
    Raises OSError if it cannot be written. Source: the format's own description (8 bytes of header
    length, JSON, data).
    """
    header, end = {"__metadata__": metadata}, 0
    for name, t in tensors.items():
        start, end = end, end + t.dtype.itemsize * torch.Size(t.shape).numel()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    size, crc, error, file = 0, 0, None, None
    says_sum, head = metadata.get("crc32") == CHECKSUM, len(text) + 8
    chunks = itertools.chain([struct.pack("<Q", len(text)) + text],
                             (bytes_of(t.read() if write else t.read().flatten()[:1])
                              for t in tensors.values()))  # [:1] waits for a GPU's part in it
    for chunk in chunks:
        if not write or error is not None:
            continue
        try:
            file = file or path.open("wb")
            file.write(chunk)
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            crc = 0 if says_sum and size == head else crc
        except OSError as e:
            error = e
    if file is not None:
        try:
            with file:
                if says_sum:
                    file.seek(8 + text.index(b'"crc32": "') + 10)
                    file.write(f"{crc:08x}".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            error = error or e
    if error is not None:
        raise error
    return [size, f"{crc:08x}"] if write else None


def check_data(path: Path) -> None:
    """Raise ValueError if a safetensors file says its data's CRC-32 and holds other data."""
    told = safetensors_metadata(path).get("crc32")
    if told is None:
        return
    with path.open("rb") as f:
        head = 8 + struct.unpack("<Q", f.read(8))[0]
    if told != (found := crc32_of_file(path, head)):
        raise ValueError(f"{path}: is damaged: its data have CRC-32 {found}, wanted {told} as "
                         "it says: copy it again, or export it anew by the command that made it "
                         "(a program that changed it on purpose should drop crc32 from its "
                         "metadata)")


def full_tensor(p: DTensor, path: Path, dtype: torch.dtype) -> LazyTensor:
    """A sharded parameter in another dtype, gathered on all ranks when it is read."""
    def read(rows: slice | None = None) -> Tensor:
        value = p.detach().to(dtype).full_tensor()
        return value[rows] if rows else value

    return LazyTensor(tuple(p.shape), dtype, path, read)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements as they lie in a file."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
