"""Two DiTs as one: Wan 2.2 A14B has an expert for high and one for low noise.

Every stage treats them as one DiT. At each time only one of them computes, so a batch, whose
samples share a time, needs one. Source: Wan 2.2's release, text2video.py and image2video.py.
The sharding of a DiT, and the check of weights against a preset's sizes, are here too.
"""

import itertools
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from common.files import abbreviate, read_json
from common.names import EXPERTS, dit_files, dit_tensors
from common.ranks import Ranks
from common.weights import LazyTensor


class Experts(nn.Module):
    """The two experts, or only one of them, behind the interface of a DiT.

    Args: dits, by the official folders' names, with which their parameters' names begin.
    """

    def __init__(self, dits: dict[str, nn.Module]):
        super().__init__()
        for name, dit in dits.items():
            self.add_module(name, dit)
        first = next(self.children())
        self.cfg, self.token_grid, self.flops = first.cfg, first.token_grid, first.flops

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all experts; taps are indices into those of one."""
        return [block for dit in self.children() for block in dit.blocks]

    def at(self, t: float) -> nn.Module:
        """The expert that computes at time t, not rounded: 0.89998 is below a boundary of 0.9."""
        return getattr(self, EXPERTS[t < self.cfg.boundary])

    def forward(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As WanDiT.forward. Reading t [B] waits for the device; expert_at needs no reading.

        Raises ValueError for times on both sides of the boundary.
        """
        experts = {self.at(time) for time in t.tolist()}
        if len(experts) != 1:
            raise ValueError(f"t: expected times on one side of {self.cfg.boundary}, got "
                             f"{t.tolist()}: evaluate each expert separately")
        return experts.pop()(x, t, *args, **kwargs)


def expert_at(dit: nn.Module, t: float) -> nn.Module:
    """The network that computes at time t: one of two experts, or the only DiT."""
    return dit.at(t) if isinstance(dit, Experts) else dit


def shard_dit(dit: nn.Module, ranks: Ranks, dtype: torch.dtype | None = None) -> nn.Module:
    """Shard a DiT's parameters over all ranks (FSDP2): each block separately, then the rest. Two
    experts are sharded separately, so that neither is gathered while the other computes.

    dtype: what a block's weights are cast to when gathered (None: as stored). The embeddings and
    the head around the blocks stay as stored. Gradients are reduced in fp32.
    """
    # The root reshards too: otherwise a forward without backward would leave it unsharded, and a
    # checkpoint taken then would lack the optimizer's state of its sharded parameters.
    options = {"mesh": ranks.mesh, "reshard_after_forward": True}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # torch counts the final reshape as a view; nothing writes into a DiT's output in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    for part in dit.children() if isinstance(dit, Experts) else (dit,):
        part.sp = ranks.sp_group
        for block in part.blocks:
            fully_shard(block, mp_policy=replace(policy, param_dtype=dtype), **options)
        fully_shard(part, mp_policy=policy, **options)
    return dit


def crossing_note(grid: list[float], key: list[int], boundary: float | None) -> str:
    """A line if a step of the student crosses the boundary: there the student's high-noise expert
    has to learn steps of the teacher's low-noise expert. "" if no step does.

    Args: grid, the teacher's times; key, indices into it.
    """
    first_low = next((j for j, t in enumerate(grid) if boundary and t < boundary), None)
    if first_low is None or first_low in key:
        return ""
    start, stop = next(pair for pair in itertools.pairwise(key) if pair[1] > first_low)
    return (f"key: the student's step from {start} to {stop} of the teacher's grid crosses the "
            f"boundary between the experts: with {first_low} as a key timestep none does")


def check_sizes(weights: str | Path, sizes: Any, preset: str) -> None:
    """Raise ValueError if `weights` has another number of DiTs than a preset, or if a folder's JSON
    files contain other sizes than the preset's `sizes`, or another boundary."""
    files, expected = dit_files(weights), asdict(sizes)
    if (len(files) == 2) != (sizes.boundary is not None):
        raise ValueError(f"{weights}: expected {3 - len(files)} DiT(s) by preset '{preset}', got "
                         f"{len(files)} (Wan 2.2 A14B has two): choose the preset of these weights")
    if not Path(weights).is_dir():
        return
    for path in [*(file.with_name("config.json") for file in files.values()),
                 Path(weights) / "model_index.json"]:
        for key, got in read_json(path).items() if path.exists() else ():
            name, got = sizes.diffusers.get(key, key), tuple(got) if isinstance(got, list) else got
            if name in expected and got is not None and got != expected[name]:
                raise ValueError(f"{path}: {key} is {abbreviate(got)}, preset '{preset}' has "
                                 f"{expected[name]}: choose the preset of these weights")


def preset_tensors(weights: str | Path, sizes: Any, preset: str,
                   experts: str = "both") -> dict[str, LazyTensor]:
    """The DiT tensors of `weights`; experts, as in model.build_dit. Raises as check_sizes."""
    check_sizes(weights, sizes, preset)
    return {name: t for name, t in dit_tensors(weights).items()
            if experts == "both" or name.startswith(experts)}


def by_expert(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by parameter, split into {"high": …, "low": …} for the two experts, under each one's
    own parameter names; {"": tensors} for a model with one DiT."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        expert, _, rest = name.partition(".")
        level = expert.removesuffix("_noise_model") if expert in EXPERTS else ""
        parts.setdefault(level, {})[rest if level else name] = value
    return parts


def with_level(name: str, level: str) -> str:
    """A file's name for one expert: student.safetensors → student_high_noise.safetensors."""
    stem, dot, suffix = name.partition(".")
    return f"{stem}_{level}_noise{dot}{suffix}" if level else name
