"""A student as a LoRA: what distillation changed in each layer, as two thin matrices.

    python -m tools.extract_lora [CONFIG] [--student FILE] [--rank 32] [--out FILE]
    python sample.py [CONFIG] --lora FILE --prompt "…"

In:  the teacher's weights and the student that distill.py made from them.
Out: <run>/student_lora_rank32.safetensors (or --out), fp16, for ComfyUI, diffusers, LightX2V and
     sample.py; next to it a .json with the energy that each layer keeps.

Of a matrix's difference Δ = W_student - W_teacher, the first r singular values are kept: Δ ≈ B·A
with B = U√S, A = √S Vᵀ, the nearest matrix of that rank (Eckart and Young). For Wan, other
parameters are stored as full differences; for HunyuanVideo, the file has only the matrices of the
blocks. Energy kept: 1 - ‖Δ - B·A‖² / ‖Δ‖², with B and A as stored.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from artifacts.lora import lora_form, lora_names
from artifacts.student import (
    exported_path, facts_in, file_metadata, official_tensors, open_student, stream_safetensors,
    student_facts)
from common.config import Shared, announce, field, load_config
from common.files import replace_file, write_json
from common.names import dit_tensors, fingerprint
from common.ranks import cli, generator, pick_device
from common.weights import LazyTensor, describe_model, lazy_tensor
from experts import by_expert, with_level
from model import check_model


@dataclass
class Config(Shared):
    """Settings of an extraction."""
    student: str | None = field(None, "the student's file; none: <run>/student.safetensors")
    rank: int = field(32, "singular values kept of each matrix", "[1, inf)")
    out: str | None = field(None, "the file; defaults to <run>/student_lora_rank<rank>.safetensors")


# ------------------------------------------------------------------------------ decomposition

EXACT = 1024        # matrices with no more rows or columns are decomposed exactly
EXTRA_COLUMNS = 16  # of the randomised decomposition in addition to twice the rank


def low_rank_factors(delta: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a matrix [out, in] in fp32, each with √S; r is at most `rank`.

    Exact for small matrices; for large ones randomised, seeded by the name, with 16 power
    iterations. Source: Halko et al., Finding structure with randomness, 2011, algorithms 4.4, 5.1.
    """
    if min(delta.shape) <= EXACT:
        U, S, Vt = torch.linalg.svd(delta, full_matrices=False)
    else:
        columns = min(2 * rank + EXTRA_COLUMNS, *delta.shape)
        draw = torch.randn(delta.shape[1], columns, generator=generator("lora", name))
        Q = torch.linalg.qr(delta @ draw.to(delta.device)).Q              # out columns
        for _ in range(16):
            Q = torch.linalg.qr(delta.mT @ Q).Q                           # in columns
            Q = torch.linalg.qr(delta @ Q).Q                              # out columns
        U, S, Vt = torch.linalg.svd(Q.mT @ delta, full_matrices=False)
        U = Q @ U[:, :rank]
    root = S[:rank].sqrt()
    return root[:, None] * Vt[:rank], U[:, :rank] * root


# ---------------------------------------------------------------------------------- extraction

def lora_tensors(cfg: Config, student: dict[str, LazyTensor],
                 teacher: dict[str, LazyTensor]) -> tuple[dict[str, Tensor], list[dict]]:
    """The LoRA's tensors under our names, fp16 on the CPU, and a table of the parameters: the size
    of each change, and the part of it that the LoRA keeps.

    Args: student and teacher, the same parameters under official names.
    """
    tensors, rows, device = {}, [], pick_device(cfg.device)
    for name, old in tqdm(teacher.items(), "lora", unit="parameter", mininterval=1):
        before = old.read().to(device).float()
        delta = student[name].read().to(device).float() - before
        form, kept = lora_form(cfg.family, name, old.shape), torch.zeros_like(delta)
        row = {"name": name, "shape": list(delta.shape), "form": form or "none"}
        if form == "matrix":
            A, B = parts = [x.half() for x in low_rank_factors(delta, cfg.rank, name)]
            row["rank"], kept = len(A), B.float() @ A.float()
        elif form is not None:
            parts = [delta.half()]
            kept = parts[0].float()
        if form is not None:
            for key, part in zip(lora_names(name, form), parts, strict=True):
                tensors[key] = part.cpu()
        square, lost = (x.square().sum().item() for x in (delta, delta - kept))
        weight = before.norm().item()
        rows.append(row | {"square": square, "relative": square ** 0.5 / weight if weight else 0.0,
                           "energy": 1 - lost / square if square else 1.0})
    return tensors, sorted(rows, key=lambda row: row["form"] == "none")


def check_same_parameters(path: Path, student: dict[str, LazyTensor], weights: str,
                          teacher: dict[str, LazyTensor]) -> None:
    """Raise ValueError unless both have the same names and shapes."""
    a, b = ({name: t.shape for name, t in tensors.items()} for tensors in (student, teacher))
    if a != b:
        name = next(n for n in sorted(a.keys() | b.keys()) if a.get(n) != b.get(n))
        raise ValueError(f"{path}: {name} is {a.get(name)}, in {weights} it is {b.get(name)}"
                         f"{describe_model(student)}: point `weights` at the student's teacher")


def extract(cfg: Config, path: Path, out: Path) -> list[dict]:
    """Write the LoRA file of a student, or those of its two experts; returns the table's rows.

    Raises ValueError naming what does not fit, for example a student of another teacher.
    """
    facts = student_facts(path, cfg, foreign=cfg.student is not None, same_teacher=True)
    student = official_tensors(open_student(path))
    teacher = dit_tensors(cfg.weights)
    check_same_parameters(path, student, cfg.weights, teacher)
    facts |= {"teacher": facts["teacher"] or fingerprint(cfg.weights), "lora_rank": cfg.rank}
    tensors, rows = lora_tensors(cfg, student, teacher)
    for level, part in by_expert(tensors).items():
        file = out.with_name(with_level(out.name, level))
        replace_file(file, functools.partial(
            stream_safetensors, metadata=file_metadata(facts, level),
            tensors={name: lazy_tensor(tensor, file) for name, tensor in part.items()}))
    return rows


# -------------------------------------------------------------------------------------- report

def energy_kept(rows: list[dict]) -> float:
    """The part of the squared change of all rows that the file keeps."""
    square = sum(row["square"] for row in rows)
    return sum(row["square"] * row["energy"] for row in rows) / square if square else 1.0


def write_energy(cfg: Config, rows: list[dict], out: Path, first: Path) -> None:
    """Write the table as JSON; print the sums. first, as in main."""
    sums = {"all": energy_kept(rows),
            "matrices": energy_kept([row for row in rows if row["form"] == "matrix"])}
    write_json(out.with_suffix(".json"), {"energy": sums, "rank": cfg.rank, "rows": rows})
    print(f"energy kept: {sums['all']:.4f} of all that changed, {sums['matrices']:.4f} of the "
          f"matrices in the file; per layer: {out.with_suffix('.json')}")
    print(f"{first}: {first.stat().st_size / 1e6:.3g} MB; use it by `python sample.py {cfg.path} "
          f"--lora {first}`; for ComfyUI, diffusers and LightX2V see `python sample.py --how "
          f"{first}`")


def check_out(out: Path, first: Path) -> None:
    """Raise ValueError for a name without the suffix, or if the file or its table would replace
    another kind of file: only a LoRA that this command extracted is replaced."""
    if out.suffix != ".safetensors":
        raise ValueError(f"out: expected a name that ends in .safetensors, got {out}: add the "
                         "suffix")
    existing = [path for path in (first, out.with_suffix(".json")) if path.exists()]
    ours = first.is_file() and "lora_rank" in facts_in(first)
    if existing and not ours:
        raise ValueError(f"out: {existing[0]} exists, and does not belong to a LoRA that this "
                         "command extracted: choose another name by --out")


def main(argv: list[str] | None = None) -> None:
    """Read the config, extract, report."""
    cfg = load_config(Config, "lora", argv, __doc__, "-m tools.extract_lora")
    level = "" if check_model(cfg).boundary is None else "high"  # of the first of two files
    path = Path(cfg.student or exported_path(cfg))
    out = Path(cfg.out or Path(cfg.run) / f"student_lora_rank{cfg.rank}.safetensors")
    first = out.with_name(with_level(out.name, level))
    check_out(out, first)
    announce(cfg, "lora")
    write_energy(cfg, extract(cfg, path, out), out, first)


if __name__ == "__main__":
    cli(main)
