"""LoRA files of this project and of others: reading, merging, training, writing."""

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.files import NUMBER, abbreviate, parse_json, read_json, shape_error
from common.linear import Linear, linear
from common.names import EXPERTS, PEFT_SETTINGS, comfy_to_official, expert_files, official_names
from common.ranks import Ranks, generator
from common.weights import (
    LazyTensor, describe_model, load_module, open_tensors, safetensors_metadata)
from experts import by_expert, preset_tensors, shard_dit
from model import build_dit

# --------------------------------------------------------------------------- reading and merging

PREFIXES = re.compile(r"^((base_model|model|diffusion_model|transformer|unet|dit|module|pipe)\.|"
                      r"lora_unet_|lora_transformer_)+")
# The parts of a module's change, by the endings of their names in various programs.
PARTS = {part: re.compile(rf"(.+?)(?:{ending})") for part, ending in {
    "down": r"\.lora_A(\.default)?(\.weight)?|\.lora_down\.weight|[._]lora\.down\.weight",
    "up": r"\.lora_B(\.default)?(\.weight)?|\.lora_up\.weight|[._]lora\.up\.weight",
    "up_bias": r"\.lora_B(\.default)?\.bias", "alpha": r"\.alpha", "weight": r"\.diff",
    "bias": r"\.diff_b", "modulation": r"\.diff_m"}.items()}
# Names of changes of other kinds: DoRA, LoHa, LoKr, a third factor.
OTHER_KINDS = re.compile(r"dora_scale|lora_magnitude_vector|hada_|lokr_|lora_mid")
# Settings of peft which, unless empty, make a change something else than alpha / rank times B·A.
PEFT_EXTRAS = (
    "alpha_pattern", "use_dora", "fan_in_fan_out", "modules_to_save", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")
PEFT_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others also change W


def is_lora(tensors: Iterable[str]) -> bool:
    """Whether the names belong to a LoRA, or to another kind of change, which lora_changes refuses.
    """
    return any(split_name(name)[0] or OTHER_KINDS.search(name) for name in tensors)


def split_name(name: str) -> tuple[str | None, str]:
    """Which part of a change a LoRA's tensor is (None if it is no part), and its module's name."""
    for part, pattern in PARTS.items():
        if match := pattern.fullmatch(name):
            return part, PREFIXES.sub("", match[1])
    return None, name


def module_names(tensors: Iterable[str]) -> dict[str, str]:
    """Official module names of a DiT by the names that LoRA files use: the official ones, Wan's in
    diffusers, and both with underscores for dots (kohya)."""
    names = {name.rpartition(".")[0]: name.rpartition(".")[0] for name in tensors}
    names |= {name: name for name in tensors if name.endswith("modulation")}
    if "patch_embedding.weight" in tensors:
        diffusers = official_names({name: name for name in tensors}, "transformer", reverse=True)
        for name, official in diffusers.items():
            names.setdefault(name.rpartition(".")[0], official.rpartition(".")[0])
    return {name.replace(".", "_"): official for name, official in names.items()} | names


# A function that reads a part of a change in fp32: all of it, or the given rows.
Change = Callable[[slice | None], Tensor]


def low_rank_product(up: LazyTensor, down: LazyTensor, scale: float,
                     shape: tuple[int, ...]) -> Change:
    """scale · up · down in the shape of the weight that it changes."""
    def read(rows: slice | None) -> Tensor:
        change = up.read(rows).float().flatten(1) @ down.read().float().flatten(1)
        return scale * change.unflatten(1, shape[1:])

    return read


def changed(weight: LazyTensor, changes: list[Change]) -> LazyTensor:
    """A weight with its changes added, in fp32."""
    return replace(weight, dtype=torch.float32, read=lambda rows=None: sum(
        (change(rows) for change in changes), weight.read(rows).float()))


def lora_changes(path: Path, shapes: dict[str, tuple[int, ...]],
                 scale: float = 1.0) -> tuple[dict[str, list[Change]], list[str]]:
    """What a LoRA file adds to each parameter of a DiT, and the names of tensors without a place.

    Args: path, for two experts one of the two files; shapes of the DiT's parameters by official
    name; scale, the factor of all changes.
    Raises ValueError for a file in which nothing fits, for matrices of another size, and for other
    kinds of change than a LoRA's.
    """
    parts = by_expert(shapes)
    if "" in parts:
        return changes_of_one(path, shapes, scale)
    if (files := expert_files(path)) is None:
        raise ValueError(f"{path}: expected a name with high_noise or low_noise, since `weights` "
                         "has two DiTs: give one of two LoRA files that differ only in this")
    found = [changes_of_one(file, part, scale)
             for file, part in zip(files, parts.values(), strict=True)]
    return ({f"{expert}.{name}": change for expert, (changes, _) in zip(EXPERTS, found, strict=True)
             for name, change in changes.items()}, [name for _, others in found for name in others])


def changes_of_one(path: Path, shapes: dict[str, tuple[int, ...]],
                   scale: float) -> tuple[dict[str, list[Change]], list[str]]:
    """lora_changes for one DiT."""
    tensors, modules = open_tensors(path), module_names(shapes)
    parts: dict[str, dict[str, tuple[str, LazyTensor]]] = {}  # by official module
    unused = []
    for name, tensor in tensors.items():
        if OTHER_KINDS.search(name):
            raise ValueError(f"{path}: {name}: is a DoRA, LoHa or LoKr, which are not supported: "
                             "give a LoRA (lora_A and lora_B, or lora_down and lora_up)")
        part, module = split_name(name)
        official = modules.get(module) or modules.get(
            comfy_to_official(f"{module}.weight").removesuffix(".weight"))
        if part is None or official is None:
            unused.append(name)
        elif part in parts.setdefault(official, {}) or not (
                tensor.dtype.is_floating_point or part == "alpha"):
            raise ValueError(f"{path}: {name}: expected one floating-point {part} for {official}, "
                             f"got {tensor.dtype} and {parts[official].get(part, ('no other',))[0]}"
                             ": save one LoRA, in 16 bits, in the file")
        else:
            parts[official][part] = name, tensor
    changes: dict[str, list[Change]] = {}
    factor = peft_factor(path, tensors)
    for module, found in parts.items():
        weight, times = f"{module}.weight", 1.0
        if {"up", "down"} <= found.keys() and weight in shapes:
            (_, up), (name, down) = found.pop("up"), found.pop("down")
            rank, got = down.shape[0], [up.shape[0], math.prod(down.shape[1:])]
            expected = [shapes[weight][0], math.prod(shapes[weight][1:])]
            if got != expected or math.prod(up.shape[1:]) != rank:
                raise ValueError(f"{path}: {name} and its other half, {list(up.shape)} times "
                                 f"{list(down.shape)}, change a matrix of {got}; this DiT's is "
                                 f"{expected}: it is a LoRA for another size than `preset`")
            times = (float(found.pop("alpha")[1].read()) / rank if "alpha" in found else
                     factor(rank))
            changes.setdefault(weight, []).append(
                low_rank_product(up, down, scale * times, shapes[weight]))
        for part, (name, tensor) in found.items():
            target = module if module in shapes else f"{module}.{part.removeprefix('up_')}"
            if shapes.get(target) == tensor.shape and part not in ("up", "down", "alpha"):
                by = scale * (times if part == "up_bias" else 1.0)  # it is scaled as B·A is
                changes.setdefault(target, []).append(
                    lambda rows, t=tensor, by=by: by * t.read(rows).float())
            else:
                unused.append(name)
    if not changes:
        what = "" if is_lora(tensors) else f"{describe_model(tensors)}; it is not a LoRA"
        raise ValueError(f"{path}: none of its {len(tensors)} tensors (such as "
                         f"{next(iter(tensors), 'none')}) changes one of this DiT's{what}: give a "
                         "LoRA for the DiT of `weights`")
    return changes, unused


def peft_factor(path: Path, tensors: dict[str, LazyTensor]) -> Callable[[int], float]:
    """The factor of B·A as a function of its rank, from peft's settings; 1 for files without them.

    The settings are in the metadata of a file that diffusers saved, maybe with "transformer." in
    front of each; for peft's own files ("base_model.…", adapter_model.safetensors) they are in
    adapter_config.json next to the file.
    Raises ValueError for settings with which a change is more than a factor times B·A.
    """
    file = next((t.file for t in tensors.values()), path)
    where, config = f"{file}: its lora_adapter_metadata", file.with_name(PEFT_SETTINGS)
    stored = parse_json(safetensors_metadata(file).get("lora_adapter_metadata", "{}"), where,
                        remedy="save the LoRA again")
    settings = {name.removeprefix("transformer."): value for name, value in stored.items()}
    if not settings and (file.stem == "adapter_model" or any(
            name.startswith("base_model.") for name in tensors)):
        if config.exists():
            where, settings = str(config), read_json(config)
        else:
            warn_of_alpha(config)
    extras = [name for name in PEFT_EXTRAS if settings.get(name)]
    extras += ["bias"] * (settings.get("bias") not in (None, "none"))
    extras += ["init_lora_weights"] * (settings.get("init_lora_weights") not in PEFT_STARTS)
    if extras:
        name, value = extras[0], abbreviate(settings[extras[0]])
        raise ValueError(f"{where}: {name}: expected none, got {value}: merge the LoRA in peft "
                         "and give the result as `weights`")
    alpha = settings.get("lora_alpha")
    if alpha is None:
        return lambda rank: 1.0
    if error := shape_error(alpha, NUMBER, "lora_alpha"):
        raise ValueError(f"{where}: {error}: save the LoRA again")
    return lambda rank: alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


@functools.lru_cache
def warn_of_alpha(config: Path) -> None:
    """Print once that a LoRA's alpha is missing, and what is used instead."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{config}: no such file: the LoRA's alpha is assumed to be its rank")


def with_lora(dit: dict[str, LazyTensor], path: Path, scale: float = 1.0) -> dict[str, LazyTensor]:
    """A DiT's tensors with a LoRA added in fp32, lazily and by rows, so that sharded loading reads
    and computes only what a rank keeps. Prints which tensors are not applied. Raises as
    lora_changes."""
    changes, unused = lora_changes(path, {name: t.shape for name, t in dit.items()}, scale)
    if unused and os.environ.get("RANK", "0") == "0":
        names = ", ".join(unused[:4]) + (" …" if len(unused) > 4 else "")
        print(f"{path}: {len(unused)} tensor(s) are not applied, since this DiT has none of that "
              f"name and shape: {names}")
    return {name: changed(t, changes[name]) if name in changes else t for name, t in dit.items()}


# --------------------------------------------------------------------------------- our own files

def lora_form(family: str, name: str, shape: tuple[int, ...]) -> str | None:
    """The form of a parameter's change in our files: "matrix" for B·A, or else the ending of its
    name there; None if it is left out.

    For HunyuanVideo only the blocks' matrices are kept, since diffusers refuses a file with more.
    For Wan all parameters are kept; ComfyUI skips modulation (LightX2V reads it), diffusers also
    norms and patches.
    """
    if family == "hunyuan":
        blocks = name.startswith(("double_blocks.", "single_blocks."))
        return "matrix" if blocks and len(shape) == 2 else None
    if len(shape) == 2:
        return "matrix"
    return {"bias": "diff_b", "modulation": "diff_m"}.get(name.rpartition(".")[2], "diff")


def lora_names(name: str, form: str) -> tuple[str, ...]:
    """A parameter's names in our files: of A and B, or of its difference; an expert's name stays in
    front."""
    expert, _, rest = name.partition(".")
    prefix, name = (f"{expert}.", rest) if expert in EXPERTS else ("", name)
    module = f"{prefix}diffusion_model.{name.rpartition('.')[0]}"
    if form == "matrix":
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    return (f"{module}.{form}",)


# -------------------------------------------------------------------------------------- training

FACTORS = (".lora_A", ".lora_B")


class LoRALinear(Linear):
    """A linear layer whose weights keep their official names, with B·A added to them."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        like = {"device": layer.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(layer.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + linear(linear(x, self.lora_A), self.lora_B)


def build_student(preset: str, rank: int | None, experts: str = "both") -> nn.Module:
    """A student's DiT on the meta device; with a rank, only the factors of its LoRA are trainable.
    experts, as in model.build_dit."""
    with torch.device("meta"):
        dit = build_dit(preset, experts)
    if rank is None:
        return dit
    for block in dit.blocks:
        for name, layer in list(block.named_modules()):
            if type(layer) is Linear:
                block.set_submodule(name, LoRALinear(layer, rank))
    for name, p in dit.named_parameters():
        p.requires_grad_(name.endswith(FACTORS))
    return dit


def load_lora_student(cfg: Any, ranks: Ranks, compute_dtype: torch.dtype) -> nn.Module:
    """A student with a fresh LoRA of rank cfg.lora on the DiT of `weights`, fp32, sharded.

    A is uniform within 1/√in, by the seed and its name; B is 0. Raises as model.load_dit.
    """
    dit = shard_dit(build_student(cfg.preset, cfg.lora, cfg.experts), ranks, compute_dtype)
    tensors = preset_tensors(cfg.weights, dit.cfg, cfg.preset, cfg.experts)
    file = next(iter(tensors.values())).file
    for name, p in dit.named_parameters():
        if name.endswith(FACTORS):
            shape = tuple(p.shape)
            tensors[name] = LazyTensor(shape, torch.float32, file, functools.partial(
                fresh_factor, name, shape, cfg.seed))
    return load_module(dit, tensors, f"DiT from {cfg.weights}", device=ranks.device)


def fresh_factor(name: str, shape: tuple[int, ...], seed: int,
                 rows: slice | None = None) -> Tensor:
    """The initial A or B, or some rows of it, fp32."""
    value, bound = torch.zeros(shape), shape[1] ** -0.5
    if name.endswith("lora_A"):
        value.uniform_(-bound, bound, generator=generator("lora", seed, name))
    return value[rows] if rows else value


# --------------------------------------------------------------------------------------- writing

def factor_pairs(tensors: dict[str, LazyTensor]) -> Iterator[tuple[str, LazyTensor, LazyTensor]]:
    """The weight's name, A and B of each layer with a LoRA."""
    for name, A in tensors.items():
        module, _, factor = name.rpartition(".")
        if factor == "lora_A":
            yield f"{module}.weight", A, tensors[f"{module}.lora_B"]


def full_tensor(p: DTensor, path: Path, dtype: torch.dtype) -> LazyTensor:
    """A sharded parameter in another dtype; read() gathers it on all ranks."""
    def read(rows: slice | None = None) -> Tensor:
        value = p.detach().to(dtype).full_tensor()
        return value[rows] if rows else value

    return LazyTensor(tuple(p.shape), dtype, path, read)


def student_tensors(student: nn.Module, path: Path, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """A sharded student's tensors under official names in a dtype, gathered when they are read; a
    LoRA is merged in fp32."""
    has_lora = any(name.endswith(FACTORS) for name, _ in student.named_parameters())
    tensors = {name: full_tensor(p, path, torch.float32 if has_lora else dtype)
               for name, p in student.named_parameters()}
    merged = {name: t for name, t in tensors.items() if not name.endswith(FACTORS)}
    for name, A, B in factor_pairs(tensors):
        merged[name] = changed(merged[name], [low_rank_product(B, A, 1.0, merged[name].shape)])
    return {name: LazyTensor(t.shape, dtype, path, lambda rows=None, t=t: t.read(rows).to(dtype))
            for name, t in merged.items()}


def lora_file(student: nn.Module, path: Path) -> dict[str, LazyTensor]:
    """The tensors of a sharded student's LoRA file, fp16 in the form of tools/extract_lora.py,
    gathered on all ranks when they are read."""
    parameters = {name: full_tensor(p, path, torch.float32)
                  for name, p in student.named_parameters()}
    tensors = {}
    for name, A, B in factor_pairs(parameters):
        for key, factor in zip(lora_names(name, "matrix"), (A, B), strict=True):
            read = functools.partial(read_balanced, A, B, factor is A)
            tensors[key] = LazyTensor(factor.shape, torch.float16, path, read)
    return tensors


def read_balanced(A: LazyTensor, B: LazyTensor, first: bool) -> Tensor:
    """A (if `first`) or B, both scaled to equal norms, so that fp16 suits both equally well."""
    a, b = A.read(), B.read()
    ratio = (b.norm() / a.norm()).sqrt() or 1.0  # B is 0 before the first update
    return (a * ratio if first else b / ratio).half()
