"""LoRA files of this project and of others: reading, merging, training, writing."""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from common.files import NUMBER, shape_error, parse_json
from common.linear import Linear, linear
from common.names import check_sizes, comfy_to_official, dit_tensors, official_names
from common.ranks import Ranks, generator, shard
from common.weights import (
    LazyTensor, full_tensor, file_kind, load_module, describe_model, open_tensors, safetensors_metadata)
from model import build_dit



# ------------------------------------------------------------------------------ files of others

PREFIXES = re.compile(r"^((base_model|model|diffusion_model|transformer|pipe\.dit)\.|"
                      r"lora_unet_|lora_transformer_)+")
PARTS = tuple((part, re.compile(rf"(.+?)(?:{end})")) for part, end in (
    ("down", r"\.lora_A(\.default)?(\.weight)?|\.lora_down\.weight|[._]lora\.down\.weight"),
    ("up", r"\.lora_B(\.default)?(\.weight)?|\.lora_up\.weight|[._]lora\.up\.weight"),
    ("bias", r"\.diff_b|\.lora_B(\.default)?\.bias"), ("alpha", r"\.alpha"),
    ("weight", r"\.diff"), ("modulation", r"\.diff_m")))
# Models by the names in a LoRA, as far as they tell.
LOOKS = ((r"double_blocks.*img_attn", "HunyuanVideo or Flux"),
         (r"(single_)?transformer_blocks", "HunyuanVideo, Flux or another, with diffusers' names"),
         (r"(down|up|input|output)_blocks", "Stable Diffusion"),
         (r"(^|\.)blocks[._]\d+[._](self_attn|cross_attn|attn1|attn2|ffn)", "Wan"),
         (r"lora_te|text_model", "a text encoder"))


def is_lora(tensors: Iterable[str]) -> bool:
    """Whether names are a LoRA's: some are the halves of a matrix."""
    return any(part_of(name)[0] in ("down", "up") for name in tensors)


def part_of(name: str) -> tuple[str | None, str]:
    """Which part of a change a tensor of a LoRA is, and of which module; None: it is no part."""
    for part, pattern in PARTS:
        if match := pattern.fullmatch(name):
            return part, PREFIXES.sub("", match[1])
    return None, name


def module_names(tensors: Iterable[str]) -> dict[str, str]:
    """Official module names of a DiT by the names that LoRAs have for them: official, Wan's in
    diffusers, and both with underscores for dots (kohya)."""
    names = {name.rpartition(".")[0]: name.rpartition(".")[0] for name in tensors}
    names |= {name: name for name in tensors if name.endswith("modulation")}
    if "patch_embedding.weight" in tensors:
        theirs = official_names({name: name for name in tensors}, "transformer", reverse=True)
        for name, official in theirs.items():
            names.setdefault(name.rpartition(".")[0], official.rpartition(".")[0])
    return {name.replace(".", "_"): official for name, official in names.items()} | names


def low_rank_product(up: LazyTensor, down: LazyTensor, scale: float,
                     shape: tuple[int, ...]) -> LazyTensor:
    """scale · up · down in fp32, in the shape of the weight that it changes, by rows if asked."""
    def read(rows: slice | None = None) -> Tensor:
        change = up.read(rows).float().flatten(1) @ down.read().float().flatten(1)
        return scale * change.unflatten(1, shape[1:])

    return LazyTensor(shape, torch.float32, up.file, read)


def scaled(diff: LazyTensor, scale: float) -> LazyTensor:
    """scale · diff in fp32."""
    return LazyTensor(diff.shape, torch.float32, diff.file,
                      lambda rows=None: scale * diff.read(rows).float())


def summed(parts: list[LazyTensor]) -> LazyTensor:
    """The sum of tensors of one shape, in fp32."""
    def read(rows: slice | None = None) -> Tensor:
        first, *others = (part.read(rows) for part in parts)
        return sum(others, first.float())

    return LazyTensor(parts[0].shape, torch.float32, parts[0].file, read)


def changes(path: Path, shapes: dict[str, tuple[int, ...]],
            scale: float = 1.0) -> tuple[dict[str, list[LazyTensor]], list[str]]:
    """What a LoRA file adds to each parameter of a DiT, and the names of what cannot be added.

    Args: shapes, of the DiT's parameters by official name; scale, what all of it is multiplied by.
    Raises ValueError for a file of which nothing fits, saying what it looks like, for matrices of
    another size, and for other kinds of change than a LoRA's.
    """
    tensors, modules = open_tensors(path), module_names(shapes)
    odd = next((n for n in tensors if n.endswith("dora_scale") or re.search(r"hada_|lokr_", n)), "")
    if odd:
        raise ValueError(f"{path}: {odd}: is a DoRA, LoHa or LoKr, which are not read here: wanted "
                         "a LoRA (lora_A and lora_B, or lora_down and lora_up)")
    found: dict[str, dict[str, tuple[str, LazyTensor]]] = {}
    unused = []
    for name, t in tensors.items():
        part, theirs = part_of(name)
        module = modules.get(theirs) or modules.get(
            comfy_to_official(f"{theirs}.weight").removesuffix(".weight"))
        if part is None or module is None:
            unused.append(name)
        else:
            found.setdefault(module, {})[part] = name, t
    out: dict[str, list[LazyTensor]] = {}
    without_alpha = adapter_scale(path)
    for module, parts in found.items():
        weight = f"{module}.weight"
        if {"up", "down"} <= parts.keys() and weight in shapes:
            (_, up), (name, down) = parts.pop("up"), parts.pop("down")
            check_lora_sizes(path, name, up, down, shapes[weight])
            alpha = without_alpha
            if "alpha" in parts:
                alpha = float(parts.pop("alpha")[1].read()) / down.shape[0]
            out.setdefault(weight, []).append(
                low_rank_product(up, down, scale * alpha, shapes[weight]))
        for part, (name, t) in parts.items():
            target = module if module in shapes else f"{module}.{part}"
            if shapes.get(target) == t.shape and part not in ("up", "down", "alpha"):
                out.setdefault(target, []).append(scaled(t, scale))
            else:
                unused.append(name)
    if not out:
        raise ValueError(f"{path}: none of its {len(tensors)} tensors (as "
                         f"{next(iter(tensors), 'none')}) changes one of this DiT's"
                         f"{lora_looks_like(tensors)}: wanted a LoRA for the DiT of `weights`")
    return out, unused


def check_lora_sizes(path: Path, name: str, up: LazyTensor, down: LazyTensor,
                shape: tuple[int, ...]) -> None:
    """Raise ValueError unless up · down is of the shape of the weight that it changes."""
    got = [up.shape[0], math.prod(down.shape[1:])]
    wanted = [shape[0], math.prod(shape[1:])]
    if got != wanted or math.prod(up.shape[1:]) != down.shape[0]:
        raise ValueError(f"{path}: {name} and its other half, {list(up.shape)} times "
                         f"{list(down.shape)}, change a matrix of {got}; this DiT's is {wanted}: "
                         "it is a LoRA for another size of the model than `preset`")


def adapter_scale(path: Path) -> float:
    """alpha / rank of a file that diffusers saved, which has it in its metadata; 1 for others."""
    if file_kind(path) != "safetensors":
        return 1.0
    where = f"{path}: its lora_adapter_metadata"
    about = parse_json(safetensors_metadata(path).get("lora_adapter_metadata", "{}"), where)
    keys = [key for key in ("transformer.lora_alpha", "transformer.r") if about.get(key)]
    if fault := shape_error(about, dict.fromkeys(keys, NUMBER)):
        raise ValueError(f"{where}: {fault}: save the LoRA anew")
    return about[keys[0]] / about[keys[1]] if len(keys) == 2 else 1.0


def lora_looks_like(tensors: dict[str, LazyTensor]) -> str:
    """"; it looks like …": what a file that does not fit is, or nothing."""
    if not is_lora(tensors):
        return f"{describe_model(tensors)}; it is no LoRA"
    return next((f"; it looks like a LoRA for {model}" for pattern, model in LOOKS
                 if any(re.search(pattern, name) for name in tensors)), "")


def with_lora(tensors: dict[str, LazyTensor], path: Path,
              scale: float = 1.0) -> dict[str, LazyTensor]:
    """A DiT's tensors with a LoRA added in fp32, lazily and by rows, so that sharded loading reads
    and computes only what a rank keeps. Says what of the file is not applied. Raises as changes."""
    added, unused = changes(path, {name: t.shape for name, t in tensors.items()}, scale)
    if unused and os.environ.get("RANK", "0") == "0":
        shown = ", ".join(unused[:4]) + (" …" if len(unused) > 4 else "")
        print(f"{path}: {len(unused)} tensor(s) are not applied, for this DiT has none of that "
              f"name and shape: {shown}", flush=True)
    return {name: summed([t, *added[name]]) if name in added else t for name, t in tensors.items()}


# ---------------------------------------------------------------------------------------- ours

PREFIX = "diffusion_model."


def lora_form(family: str, name: str, shape: tuple[int, ...]) -> str | None:
    """How a parameter's change goes into our files: "matrix" for B·A, or the ending of its name
    there; None if it is left out.

    Of HunyuanVideo only the blocks' matrices: diffusers refuses a file with more. Of Wan all of it;
    ComfyUI passes over modulation (LightX2V reads it), diffusers over modulation, norms and patches
    too.
    """
    if family == "hunyuan":
        blocks = name.startswith(("double_blocks.", "single_blocks."))
        return "matrix" if blocks and len(shape) == 2 else None
    if len(shape) == 2:
        return "matrix"
    return {"bias": "diff_b", "modulation": "diff_m"}.get(name.rpartition(".")[2], "diff")


def lora_names(name: str, form: str) -> tuple[str, ...]:
    """A parameter's names in our files: of A and B, or of its diff."""
    module = PREFIX + name.rpartition(".")[0]
    if form == "matrix":
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    return (f"{module}.{form}",)
FACTORS = (".lora_A", ".lora_B")


class LoRALinear(Linear):
    """A linear layer whose weights stay under their official names, and what is added to them."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        like = {"device": layer.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(layer.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + linear(linear(x, self.lora_A), self.lora_B)


def build_student(preset: str, rank: int | None) -> nn.Module:
    """A student's DiT on the meta device; with a rank, only the factors of its LoRA learn."""
    with torch.device("meta"):
        dit = build_dit(preset)
    for block in dit.blocks if rank is not None else ():
        for name, layer in list(block.named_modules()):
            if type(layer) is Linear:
                block.set_submodule(name, LoRALinear(layer, rank))
    for name, p in dit.named_parameters() if rank is not None else ():
        p.requires_grad_(name.endswith(FACTORS))
    return dit


def load_lora_student(cfg: Any, ranks: Ranks, compute_dtype: torch.dtype) -> nn.Module:
    """A student with a fresh LoRA of rank cfg.lora on the DiT of `weights`, fp32, sharded.

    A is uniform within 1/√in, by the seed and its name. Raises as model.load_dit.
    """
    dit = build_student(cfg.preset, cfg.lora)
    dit.sp = ranks.sp_group
    shard(dit, ranks, compute_dtype)
    check_sizes(cfg.weights, dit.cfg, f"preset '{cfg.preset}'")
    tensors = dit_tensors(cfg.weights)
    first = next(iter(tensors.values())).file
    for name, p in dit.named_parameters():
        if name.endswith(FACTORS):
            tensors[name] = fresh_factor(name, tuple(p.shape), cfg.seed, first)
    return load_module(dit, tensors, f"DiT from {cfg.weights}", device=ranks.device)


def fresh_factor(name: str, shape: tuple[int, ...], seed: int, file: Path) -> LazyTensor:
    """A or B as it is at the start, as if it were in a file."""
    def read(rows: slice | None = None) -> Tensor:
        value = torch.zeros(shape)
        if name.endswith("lora_A"):
            bound = shape[1] ** -0.5
            value.uniform_(-bound, bound, generator=generator("lora", seed, name))
        return value[rows] if rows else value

    return LazyTensor(shape, torch.float32, file, read)


def student_tensors(student: nn.Module, path: Path, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """A sharded student's tensors under official names in a dtype, gathered when they are read; a
    LoRA is merged in fp32."""
    learns_lora = any(name.endswith(FACTORS) for name, _ in student.named_parameters())
    own = {name: full_tensor(p, path, torch.float32 if learns_lora else dtype)
           for name, p in student.named_parameters()}
    merged = {name: t for name, t in own.items() if not name.endswith(FACTORS)}
    for name in [name for name in own if name.endswith("lora_A")]:
        module = name.removesuffix(".lora_A")
        weight = merged[f"{module}.weight"]
        change = low_rank_product(own[f"{module}.lora_B"], own[name], 1.0, weight.shape)
        merged[f"{module}.weight"] = summed([weight, change])
    return {name: as_dtype(t, dtype) for name, t in merged.items()}


def as_dtype(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """A lazy tensor that is read in another dtype."""
    return LazyTensor(tensor.shape, dtype, tensor.file,
                      lambda rows=None: tensor.read(rows).to(dtype))


def lora_file(student: nn.Module, path: Path) -> dict[str, LazyTensor]:
    """What the LoRA file of a sharded student holds: fp16, the form of lora.py, gathered on all
    ranks when it is read."""
    own = {name: full_tensor(p, path, torch.float32) for name, p in student.named_parameters()}
    tensors = {}
    for name in [name for name in own if name.endswith("lora_A")]:
        module = name.removesuffix(".lora_A")
        A, B = own[name], own[f"{module}.lora_B"]
        names = lora_names(f"{module}.weight", "matrix")
        for at, side in zip(names, (A, B), strict=True):
            tensors[at] = LazyTensor(side.shape, torch.float16, path, balanced(A, B, side is A))
    return tensors


def balanced(A: LazyTensor, B: LazyTensor, first: bool) -> Any:
    """A reader of A (first) or B with equal norms, so that fp16 is as fine for both."""
    def read(rows: slice | None = None) -> Tensor:
        a, b = A.read(), B.read()
        ratio = (b.norm() / a.norm()).sqrt()
        if ratio == 0:
            return (a if first else b).half()
        return (a * ratio if first else b / ratio).half()

    return read
