"""A student as a LoRA: what distillation changed, layer by layer, as two thin matrices.

    python -m tools.extract_lora [CONFIG] [--student FILE] [--rank 32] [--out FILE]
    python sample.py [CONFIG] --lora FILE --prompt "…"

In:  the teacher's weights and the student that distill.py made from them.
Out: <run>/student_lora_rank32.safetensors (or --out), fp16, for ComfyUI, diffusers, LightX2V and
     sample.py; next to it a table of the energy that each layer keeps (.md, .json) and its plot.

A matrix's difference Δ = W_student - W_teacher is cut to its first r singular values: Δ ≈ B·A with
B = U√S, A = √S Vᵀ, the nearest of that rank (Eckart and Young). Other parameters are stored as full
differences. Energy kept: 1 - ‖Δ - B·A‖² / ‖Δ‖², B and A as stored.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from artifacts.lora import lora_form, lora_names
from artifacts.student import (
    exported_path, facts_in, file_metadata, open_student, stream_safetensors, student_facts)
from common.config import Shared, announce, field, load_config
from common.files import replace_file, write_json, write_text
from common.names import dit_tensors, fingerprint
from common.ranks import cli, generator, pick_device
from common.video import draw_panels
from common.weights import LazyTensor, describe_model
from experts import by_expert, with_level
from model import check_model


@dataclass
class Config(Shared):
    """Settings of an extraction."""
    student: str | None = field(None, "the student's file; none: <run>/student.safetensors")
    rank: int = field(32, "singular values kept of each matrix", "[1, inf)")
    out: str | None = field(None, "the LoRA's file; none: <run>/student_lora_rank32.safetensors")


# ------------------------------------------------------------------------------ decomposition

EXACT = 1024       # matrices with no more rows or columns are decomposed exactly
OVERSAMPLE = 16    # columns of the randomised decomposition in addition to twice the rank
ITERATIONS = 16    # its power iterations


def svd(delta: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular values of a matrix [out, in] and their vectors: U, S, Vᵀ.

    Exact for small matrices; for large ones randomised, seeded by the name. Source: Halko et al.,
    Finding structure with randomness, 2011, algorithms 4.4 and 5.1.
    """
    if min(delta.shape) <= EXACT:
        U, S, Vt = torch.linalg.svd(delta, full_matrices=False)
        return U[:, :rank], S[:rank], Vt[:rank]
    columns = min(2 * rank + OVERSAMPLE, *delta.shape)
    draw = torch.randn(delta.shape[1], columns, generator=generator("lora", name))
    Q = torch.linalg.qr(delta @ draw.to(delta.device)).Q                  # out columns
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(delta.mT @ Q).Q                               # in columns
        Q = torch.linalg.qr(delta @ Q).Q                                  # out columns
    U, S, Vt = torch.linalg.svd(Q.mT @ delta, full_matrices=False)
    return Q @ U[:, :rank], S[:rank], Vt[:rank]


def low_rank_factors(delta: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a matrix [out, in] in fp32, √S in each."""
    U, S, Vt = svd(delta, rank, name)
    return S.sqrt()[:, None] * Vt, U * S.sqrt()


# ---------------------------------------------------------------------------------- extraction

def parameter_change(student: LazyTensor, teacher: LazyTensor, device: torch.device) -> Tensor:
    """What distillation changed in a parameter, fp32."""
    return student.read().to(device).float() - teacher.read().to(device).float()


def table_row(name: str, teacher: LazyTensor, delta: Tensor, stored: Tensor | None,
              form: str | None, rank: int | None = None) -> dict:
    """A row of the table: the size of a change, and the part of it that the file keeps.

    Args: stored, the change as the file has it (None: it is left out); form, as lora_form.
    """
    square = delta.square().sum().item()
    lost = square if stored is None else (delta - stored).square().sum().item()
    weight = teacher.read().float().norm().item()
    return {"name": name, "shape": list(delta.shape), "form": form or "none",
            **({} if rank is None else {"rank": rank}), "square": square,
            "relative": square ** 0.5 / weight if weight else 0.0,
            "energy": 1 - lost / square if square else 1.0}


def lora_tensors(student: dict[str, LazyTensor], teacher: dict[str, LazyTensor], family: str,
                 rank: int, device: torch.device, rows: list[dict],
                 bar: tqdm) -> dict[str, LazyTensor]:
    """The LoRA's tensors under our names, fp16, each computed when it is read, in this order.

    Args: student and teacher, the same parameters under official names; rows, the table, filled
    as they are read; bar, of parameters.
    """
    def compute(name: str, form: str, r: int) -> list[Tensor]:
        delta = parameter_change(student[name], teacher[name], device)
        bar.update()
        if form == "matrix":
            A, B = (factor.half() for factor in low_rank_factors(delta, r, name))
            rows.append(table_row(name, teacher[name], delta, B.float() @ A.float(), form, r))
            return [A, B]
        rows.append(table_row(name, teacher[name], delta, delta.half().float(), form))
        return [delta.half()]

    tensors = {}
    for name, old in teacher.items():
        form, r = lora_form(family, name, old.shape), min(rank, *old.shape)
        if form is None:
            continue
        shapes = [(r, old.shape[1]), (old.shape[0], r)] if form == "matrix" else [old.shape]
        parts: list[Tensor] = []  # A and B come from one decomposition

        def read(rows: slice | None = None, name: str = name, form: str = form, r: int = r,
                 parts: list[Tensor] = parts) -> Tensor:
            if not parts:
                parts.extend(compute(name, form, r))
            return parts.pop(0)

        for key, shape in zip(lora_names(name, form), shapes, strict=True):
            tensors[key] = LazyTensor(shape, torch.float16, old.file, read)
    return tensors


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
    student = open_student(path, official=True)
    teacher, rows = dit_tensors(cfg.weights), []
    check_same_parameters(path, student, cfg.weights, teacher)
    device = pick_device(cfg.device)
    facts |= {"teacher": facts["teacher"] or fingerprint(cfg.weights), "lora_rank": cfg.rank}
    with tqdm(total=len(teacher), desc="lora", unit="parameter", mininterval=1) as bar:
        tensors = lora_tensors(student, teacher, cfg.family, cfg.rank, device, rows, bar)
        for level, part in by_expert(tensors).items():
            metadata = file_metadata(facts, level)
            replace_file(out.with_name(with_level(out.name, level)), functools.partial(
                stream_safetensors, tensors=part, metadata=metadata))
        for name, t in teacher.items():
            if lora_form(cfg.family, name, t.shape) is None:
                delta = parameter_change(student[name], t, device)
                rows.append(table_row(name, t, delta, None, None))
                bar.update()
    return rows


# -------------------------------------------------------------------------------------- report

def energy_kept(rows: list[dict]) -> float:
    """The part of the squared change of all rows that the file keeps."""
    square = sum(row["square"] for row in rows)
    return sum(row["square"] * row["energy"] for row in rows) / square if square else 1.0


def rows_by_layer(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of the blocks' matrices by their names inside a block, each with its block's number."""
    layers: dict[str, list[dict]] = {}
    for row in rows:
        if row["form"] == "matrix" and (match := re.search(r"blocks\.(\d+)\.", row["name"])):
            layer = row["name"].replace(f"{match[1]}.", "", 1).removesuffix(".weight")
            layers.setdefault(layer.removeprefix("blocks."), []).append(
                {"block": int(match[1]), **row})
    return layers


def write_energy(cfg: Config, rows: list[dict], out: Path, first: Path) -> None:
    """Write the table as Markdown and JSON, and its plot; print the sums. first, as in main."""
    sums = {"all": energy_kept(rows),
            "matrices": energy_kept([row for row in rows if row["form"] == "matrix"])}
    write_json(out.with_suffix(".json"), {"energy": sums, "rank": cfg.rank, "rows": rows})
    lines = [f"# {out.name}", "", f"Rank {cfg.rank}. Energy kept: {sums['all']:.4f} of all that "
             f"changed, {sums['matrices']:.4f} of the matrices in the file.", "",
             "| parameter | shape | form | ‖Δ‖ / ‖W‖ | energy kept |", "|---|---|---|---|---|"]
    for row in rows:
        form = {"matrix": f"rank {row.get('rank')}", "none": "left out"}.get(row["form"],
                                                                             row["form"])
        lines.append(f"| {row['name']} | {' × '.join(map(str, row['shape']))} | {form} | "
                     f"{row['relative']:.2e} | {row['energy']:.4f} |")
    write_text(out.with_suffix(".md"), "\n".join(lines) + "\n")
    layers = rows_by_layer(rows).items()
    draw_panels(out.with_suffix(".png"), {
        title: [(column, layer, points, "o-") for layer, points in layers]
        for title, column in ((f"energy kept at rank {cfg.rank}", "energy"),
                              ("‖Δ‖ / ‖W‖", "relative"))}, x="block", linear=("energy",))
    print(f"energy kept: {sums['all']:.4f} of all that changed, {sums['matrices']:.4f} of the "
          f"matrices in the file; per layer: {out.with_suffix('.md')}, .json, .png")
    print(f"{first}: {first.stat().st_size / 1e6:.3g} MB; use it by `python sample.py {cfg.path} "
          f"--lora {first}`; in ComfyUI, diffusers and LightX2V as `python sample.py --how "
          f"{first}` prints")


def check_out(out: Path, first: Path) -> None:
    """Raise ValueError for a name without the suffix, or if the file, its table or its plot would
    replace one of another kind: only a LoRA that this command extracted may be there."""
    if out.suffix != ".safetensors":
        raise ValueError(f"out: expected a name that ends in .safetensors, got {out}: add the "
                         "suffix")
    existing = [path for path in (first, *map(out.with_suffix, (".md", ".json", ".png")))
                if path.exists()]
    ours = first.is_file() and "lora_rank" in facts_in(first)
    if existing and not ours:
        raise ValueError(f"out: {existing[0]} exists, and is not of a LoRA that this command "
                         "extracted: choose another name by --out")


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
