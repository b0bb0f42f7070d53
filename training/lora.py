"""A student that learns a LoRA: the teacher's weights, frozen, plus B·A in the blocks' matrices.

A [r, in] is random and B [out, r] zero at the start, so that the student begins as the teacher;
gradients, AdamW's moments and checkpoints are of A and B alone. Scale 1: what is stored is what is
added. Source: Hu et al., LoRA, 2021.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from common.folders import check_sizes, dit_tensors
from common.linear import Linear, linear
from common.lora import lora_names, product, summed
from common.ranks import Ranks, generator, shard
from common.weights import LazyTensor, full_tensor, load_module
from model import build_dit

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
        change = product(own[f"{module}.lora_B"], own[name], 1.0, weight.shape)
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
