"""Tensors in files: safetensors and .pt, read lazily; names of other programs; the DiT's folder.

Every tensor is read when it is asked for, and each rank reads only the rows that it keeps.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pickle
import re
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

from common.files import ROOT, read_json, replace_file, short_reason
from common.ranks import local_rows


WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".model")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, read when asked for: shape, dtype, file, read(rows) of the first dim."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[..., Tensor]


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Names and lazy tensors of one safetensors file. Raises ValueError if it is none or cut."""
    def lazy(name: str) -> LazyTensor:
        view = f.get_slice(name)
        shape = tuple(view.get_shape())
        dtype = (view[:0] if shape else f.get_tensor(name)).dtype

        def read(rows: slice | None = None) -> Tensor:  # mapped anew: else all that was ever read
            with safe_open(path, "pt") as again:        # stays in this process's memory
                return again.get_slice(name)[rows] if rows and shape else again.get_tensor(name)

        return LazyTensor(shape, dtype, path, read)

    try:
        f = safe_open(path, "pt")
        return {name: lazy(name) for name in f.keys()}
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path}: not a whole safetensors file ({e}): copy or make it anew") from e


def safetensors_metadata(path: Path) -> dict[str, str]:
    """A safetensors file's own strings. Raises ValueError if it is none."""
    try:
        with safe_open(path, "pt") as f:
            return f.metadata() or {}
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path}: not a whole safetensors file ({e}): copy or make it anew") from e


def open_pth(path: Path) -> dict[str, LazyTensor]:
    """Names and memory-mapped tensors of a .pt/.pth file; only tensors are ever read from it.

    The wrappers {"module": …}, {"ema": …} and {"state_dict": …} are taken off.
    Raises ValueError for a damaged file or one that holds code.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as e:
        raise ValueError(f"{path}: cannot be read as weights ({short_reason(e)}): it is "
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


def open_tensors(path: str | Path) -> dict[str, LazyTensor]:
    """Every tensor of a checkpoint by name, none of them read yet.

    Args: path, a .safetensors, .pt, .pth or .bin file, an *.index.json, or a folder that holds one
    index or one weight file. Raises FileNotFoundError, ValueError naming the file and the remedy.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        found = found or sorted(p for p in path.iterdir() if p.suffix in (".pt", ".pth", ".bin"))
        if len(found) != 1:
            got = ", ".join(p.name for p in found) or "no weight file"
            raise FileNotFoundError(f"{path}: got {got}; wanted one .safetensors file, or shards "
                                    "with their .index.json")
        path = found[0]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such weight file; point `weights` at an official or "
                                "diffusers folder (or make the file that is missing)")
    if path.suffix == ".json":
        shards = read_json(path).get("weight_map", {})
        files = {name: open_tensors(path.parent / name) for name in sorted(set(shards.values()))}
        absent = [n for n, shard in shards.items() if n not in files[shard]]
        if absent:
            raise ValueError(f"{path}: {absent[0]} should be in {shards[absent[0]]} and is not: "
                             "shards and index are of different downloads")
        return {name: files[shard][name] for name, shard in shards.items()}
    return open_safetensors(path) if path.suffix == ".safetensors" else open_pth(path)


@functools.lru_cache
def name_rules(family: str, component: str, reverse: bool) -> list[tuple[re.Pattern, str]]:
    """Rules (pattern, template) from diffusers to official names of a component, or back."""
    rules = []
    for diffusers, official, note in read_json(ROOT / f"assets/{family}_diffusers_map.json"):
        if not re.match(rf"{component}\b", note) or (reverse and "alias" in note):
            continue
        source, target = (official, diffusers) if reverse else (diffusers, official)
        pattern = re.escape(source).replace(r"\{i\}", "(?P<i>[0-9]+)")
        pattern = pattern.replace(r"\{p\}", "(?P<p>weight|bias)")
        target = target.replace("{i}", r"\g<i>").replace("{p}", r"\g<p>")
        rules.append((re.compile(pattern), target))
    return rules


def joined(parts: list[LazyTensor]) -> LazyTensor:
    """Several tensors one after the other along their first dimension, as one; read lazily."""
    ends = list(itertools.accumulate(part.shape[0] for part in parts))

    def read(rows: slice | None = None) -> Tensor:
        a, b = (rows.start, rows.stop) if rows else (0, ends[-1])
        inside = [part.read(slice(max(a - end + part.shape[0], 0), min(b - end, 0) + part.shape[0]))
                  for part, end in zip(parts, ends, strict=True)
                  if a < end and b > end - part.shape[0]]
        return torch.cat(inside)

    first = parts[0]
    return LazyTensor((ends[-1], *first.shape[1:]), first.dtype, first.file, read)


def rows_of(tensor: LazyTensor | Tensor, start: int, stop: int) -> LazyTensor | Tensor:
    """Rows start … stop - 1 of a tensor; of a lazy one, lazily."""
    if isinstance(tensor, Tensor):
        return tensor[start:stop]

    def read(rows: slice | None = None) -> Tensor:
        rows = rows or slice(0, stop - start)
        return tensor.read(slice(start + rows.start, start + rows.stop))

    return LazyTensor((stop - start, *tensor.shape[1:]), tensor.dtype, tensor.file, read)


def swap_halves(tensor: LazyTensor | Tensor) -> LazyTensor | Tensor:
    """A tensor with the second half of its rows first."""
    rows = tensor.shape[0]
    halves = [rows_of(tensor, rows // 2, rows), rows_of(tensor, 0, rows // 2)]
    return torch.cat(halves) if isinstance(tensor, Tensor) else joined(halves)


def reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """A small tensor in another shape; it is read whole."""
    def read(rows: slice | None = None) -> Tensor:
        value = tensor.read().reshape(shape)
        return value[rows] if rows else value

    return LazyTensor(shape, tensor.dtype, tensor.file, read)


HUNYUAN_MARKS = {"context_embedder.proj_in.weight", "txt_in.input_embedder.weight"}


def official_names(tensors: dict, component: str, reverse: bool = False) -> dict:
    """Rename diffusers or transformers tensors to official names (reverse: the other way).

    Args: component, "transformer", "vae", "text_encoder" or "image_encoder". A name without a rule
    is kept, as official names are, so that strict loading can name it. Some diffusers layouts have
    q, k, v (and the MLP's input) apart, in the order of its rules, and [scale, shift] for [shift,
    scale] in the last layer: forward takes lazy tensors, reverse takes plain ones too.
    """
    hunyuan = component == "transformer" and bool(HUNYUAN_MARKS & tensors.keys())
    fused = hunyuan or component == "image_encoder"
    rules, found = name_rules("hunyuan" if hunyuan else "wan", component, reverse), {}
    for name, value in tensors.items():
        hits = [(i, match.expand(template)) for i, (pattern, template) in enumerate(rules)
                if (match := pattern.fullmatch(name))]
        if fused and reverse and hits:  # one official tensor, or the parts of it
            parts, D = [value], tensors["img_in.proj.bias"].shape[0]
            if len(hits) > 1:
                ends = [*(D, 2 * D, 3 * D)[:len(hits) - 1], value.shape[0]]
                parts = [rows_of(value, a, b) for a, b in itertools.pairwise([0, *ends])]
            elif name.startswith("final_layer.adaLN"):
                parts = [swap_halves(value)]
            found |= {target: [(i, part)] for (i, target), part in zip(hits, parts, strict=True)}
            continue
        i, target = hits[0] if hits else (0, name)
        if fused and hits and target.startswith("final_layer.adaLN"):
            value = swap_halves(value)
        found.setdefault(target, []).append((i, value))
    return {name: joined([v for _, v in sorted(parts, key=lambda part: part[0])])
            if fused and len(parts) > 1 else parts[-1][1] for name, parts in found.items()}


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
                             "it is of another model or size than the config's preset")
    for name, p in wanted.items():
        if tuple(p.shape) != tensors[name].shape:
            raise ValueError(f"{what}: {name} in {tensors[name].file} has shape "
                             f"{list(tensors[name].shape)}, wanted {list(p.shape)}: it is of "
                             "another size than the config's preset")
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
                                 f"as {local.dtype}: the weights are damaged")
    return module


# Where official folders keep a DiT: HunyuanVideo's ckpts, AccVideo's release.
OFFICIAL_DITS = ("hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt",
                 "accvideo-t2v-5-steps/diffusion_pytorch_model.pt",
                 "accvideo-t2v-5-steps/diffusion_pytorch_model.safetensors")


def find_dit(weights: str | Path) -> Path:
    """The weight file (or index of shards) of the DiT in an official or diffusers folder."""
    weights = Path(weights)
    for name in OFFICIAL_DITS:
        if (weights / name).is_file():
            return weights / name
    if (weights / "transformer").is_dir():
        weights = weights / "transformer"
    if not weights.is_dir():
        return weights
    file = weights / "diffusion_pytorch_model.safetensors"
    index = Path(f"{file}.index.json")
    return index if index.exists() else file


def check_sizes(weights: str | Path, sizes: Any, what: str) -> None:
    """Raise ValueError if a folder's config.json tells other sizes than `sizes` of `what`."""
    config = find_dit(weights).with_name("config.json")
    if not (Path(weights).is_dir() and config.exists()):
        return
    own = dataclasses.asdict(sizes)
    for key, got in read_json(config).items():
        name, got = sizes.diffusers.get(key, key), tuple(got) if isinstance(got, list) else got
        if name in own and got is not None and got != own[name]:
            raise ValueError(f"{config}: {key} is {got}, {what} has {own[name]}: choose the "
                             "preset that belongs to these weights, or add one")


def dit_tensors(weights: str | Path) -> dict[str, LazyTensor]:
    """The DiT tensors of an official or diffusers folder, or of one file, under official names."""
    return official_names(open_tensors(find_dit(weights)), "transformer")


def fingerprint(weights: str | Path) -> str:
    """Identity of a DiT's weights: a hash over each tensor's name, shape and first row.

    The same for official, diffusers, sharded and single files of one dtype. It tells models apart;
    it is no proof against damage.
    """
    tensors, digest = dit_tensors(weights), hashlib.sha256()
    for name in sorted(tensors):
        row = tensors[name].read(slice(0, 1)).float().contiguous()
        digest.update(f"{name}{list(tensors[name].shape)}".encode())
        digest.update(row.numpy().tobytes())
    return digest.hexdigest()[:32]


def fingerprint_files(weights: str | Path) -> str:
    """Identity of all weight files of a folder: names, sizes, first and last bytes of each.

    It tells whether two hosts have the same encoders, as far as a look at 128 KB of each can.
    """
    digest, weights = hashlib.sha256(), Path(weights)
    for path in sorted(p for p in weights.rglob("*")
                       if p.suffix in WEIGHT_SUFFIXES and p.is_file()):
        size = path.stat().st_size
        with path.open("rb") as f:
            ends = f.read(1 << 16)
            f.seek(max(0, size - (1 << 16)))
            ends += f.read()
        digest.update(f"{path.relative_to(weights)} {size} ".encode() + ends)
    return digest.hexdigest()[:32]


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Save tensors as safetensors with string metadata, written aside and renamed."""
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}

    def write(aside: Path) -> None:
        save_file(tensors, str(aside), metadata)
        aside.chmod(0o644)  # safetensors makes files that only their owner can read

    replace_file(path, write)


# ------------------------------------------------------------------------- writing safetensors

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def stream_safetensors(path: Path, tensors: dict[str, LazyTensor],
                       metadata: dict[str, str], write: bool = True) -> list | None:
    """Write a safetensors file one tensor at a time; returns [bytes, CRC-32], on the disk by then.

    Args: tensors, read() in order, once each, even after an error or without `write`: it may be a
    collective that every rank takes part in; metadata, strings.
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
        except OSError as e:
            error = e
    if file is not None:
        try:
            with file:
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            error = error or e
    if error is not None:
        raise error
    return [size, f"{crc:08x}"] if write else None


def full_tensor(p: DTensor, path: Path) -> LazyTensor:
    """A sharded parameter, gathered on all ranks when it is read."""
    def read(rows: slice | None = None) -> Tensor:
        value = p.detach().full_tensor()
        return value[rows] if rows else value

    return LazyTensor(tuple(p.shape), p.dtype, path, read)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements as they lie in a file."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
