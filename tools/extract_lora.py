"""A student as a LoRA: what distillation changed, layer by layer, as two thin matrices.

    python lora.py [CONFIG] [--student FILE] [--rank 32] [--out FILE]
    python sample.py [CONFIG] --lora FILE --prompt "…"

In:   the teacher's weights and the student that distill.py made of them.
Out:  <run>/student_lora_rank32.safetensors (or --out), fp16, for ComfyUI, diffusers, LightX2V and
      sample.py; beside it a table of the energy that each layer keeps (.md, .json) and its plot.
Cost: memory of one matrix of both; small world seconds, Wan 14B minutes on a GPU.

A matrix's difference Δ = W_student - W_teacher is cut to its first r singular values: Δ ≈ B·A with
B = U√S, A = √S Vᵀ, by Eckart and Young the nearest of that rank. Biases, norms, modulation and the
patch embedding change by whole differences. Energy kept: 1 - ‖Δ - B·A‖² / ‖Δ‖², B and A as stored.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from artifacts.lora import lora_form, lora_names
from artifacts.student import student_facts
from common.config import Shared, announce, field, load_config
from common.files import replace_file, write_json, write_text
from common.names import dit_tensors, fingerprint, official_names
from common.ranks import cli, generator, pick_device
from common.video import draw_panels
from common.weights import CHECKSUM, LazyTensor, describe_model, open_tensors, stream_safetensors
from model import check_model



@dataclass
class Config(Shared):
    """Settings of an extraction."""
    student: str | None = field(None, "the student's file; none: <run>/student.safetensors")
    rank: int = field(32, "singular values kept of each matrix")
    out: str | None = field(None, "the LoRA's file; none: <run>/student_lora_rank32.safetensors")


# ------------------------------------------------------------------------------ decomposition

EXACT = 1024       # matrices with no more rows or columns are decomposed exactly
OVERSAMPLE = 16    # columns beside twice the rank, and
ITERATIONS = 16    # power iterations, of the randomised decomposition


def svd(delta: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular values of a matrix [out, in] and their vectors: U, S, Vᵀ.

    Exact for small matrices; for large ones randomised, by a seed of the name. Source: Halko et
    al., Finding structure with randomness, 2011, algorithms 4.4 and 5.1.
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


def factors(delta: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a matrix [out, in] in fp32, √S in each."""
    U, S, Vt = svd(delta, rank, name)
    return S.sqrt()[:, None] * Vt, U * S.sqrt()


def difference(student: LazyTensor, teacher: LazyTensor, device: torch.device) -> Tensor:
    """What distillation changed of a parameter, fp32."""
    return student.read().to(device).float() - teacher.read().to(device).float()


# ---------------------------------------------------------------------------------- extraction

def describe(name: str, teacher: LazyTensor, delta: Tensor, stored: Tensor | None, **more) -> dict:
    """A row of the table: how large a change is, and what of it the file keeps.

    Args: stored, the change as the file has it; None: it is left out.
    """
    square = delta.square().sum().item()
    lost = square if stored is None else (delta - stored).square().sum().item()
    weight = teacher.read().float().norm().item()
    return {"name": name, "shape": list(delta.shape), **more, "square": square,
            "relative": square ** 0.5 / weight if weight else 0.0,
            "energy": 1 - lost / square if square else 1.0}


def lora_tensors(student: dict[str, LazyTensor], teacher: dict[str, LazyTensor], family: str,
                 rank: int, device: torch.device, rows: list[dict]) -> dict[str, LazyTensor]:
    """The LoRA's tensors under our names, fp16, each computed when it is read, in this order.

    Args: student and teacher, the same parameters under official names; rows, filled with the
    table as they are read. Both halves of a matrix come from one decomposition.
    """
    def matrix(name: str, r: int) -> dict[str, LazyTensor]:
        old, made = teacher[name], {}

        def read(side: str) -> Tensor:
            if not made:
                delta = difference(student[name], old, device)
                A, B = (half.half() for half in factors(delta, r, name))
                rows.append(describe(name, old, delta, B.float() @ A.float(), form="matrix",
                                     rank=r))
                made.update(A=A, B=B)
            return made.pop(side)

        shapes = {"A": (r, old.shape[1]), "B": (old.shape[0], r)}
        return {at: LazyTensor(shapes[side], torch.float16, old.file,
                               lambda rows=None, side=side: read(side))
                for at, side in zip(lora_names(name, "matrix"), "AB", strict=True)}

    def whole(name: str, form: str) -> dict[str, LazyTensor]:
        def read(_: slice | None = None) -> Tensor:
            delta = difference(student[name], teacher[name], device)
            rows.append(describe(name, teacher[name], delta, delta.half().float(), form=form))
            return delta.half()

        at, = lora_names(name, form)
        return {at: LazyTensor(teacher[name].shape, torch.float16, teacher[name].file, read)}

    out = {}
    for name, t in teacher.items():
        form = lora_form(family, name, t.shape)
        if form is not None:
            out |= matrix(name, min(rank, *t.shape)) if form == "matrix" else whole(name, form)
    return out


def check_pair(path: Path, student: dict[str, LazyTensor], weights: str,
               teacher: dict[str, LazyTensor]) -> None:
    """Raise ValueError unless both have the same parameters."""
    a, b = ({name: t.shape for name, t in tensors.items()} for tensors in (student, teacher))
    if a != b:
        name = next(n for n in sorted(a.keys() | b.keys()) if a.get(n) != b.get(n))
        raise ValueError(f"{path}: {name} is {a.get(name)}, in {weights} it is {b.get(name)}"
                         f"{describe_model(student)}: point `weights` at the student's teacher")


def extract(cfg: Config, path: Path, out: Path) -> list[dict]:
    """Write the LoRA file of a student; returns the table's rows.

    Raises ValueError naming what does not fit, as a student of another teacher.
    """
    facts = student_facts(path, cfg, foreign=cfg.student is not None, same_teacher=True)
    student = official_names(open_tensors(path), "transformer")
    teacher, rows = dit_tensors(cfg.weights), []
    check_pair(path, student, cfg.weights, teacher)
    device = pick_device(cfg.device)
    tensors = lora_tensors(student, teacher, cfg.family, cfg.rank, device, rows)
    facts |= {"teacher": facts["teacher"] or fingerprint(cfg.weights), "lora_rank": cfg.rank}
    about = {"format": "pt", "accvideo": json.dumps(facts), "crc32": CHECKSUM}
    bar = tqdm(tensors.items(), desc="lora", unit="tensor", mininterval=1)
    shown = {name: LazyTensor(t.shape, t.dtype, t.file, lambda rows=None, t=t: (bar.update(),
             t.read())[1]) for name, t in tensors.items()}
    replace_file(out, lambda aside: stream_safetensors(aside, shown, about))
    bar.close()
    for name, t in teacher.items():
        if lora_form(cfg.family, name, t.shape) is None:
            rows.append(describe(name, t, difference(student[name], t, device), None, form="none"))
    return rows


# -------------------------------------------------------------------------------------- report

def totals(rows: list[dict]) -> dict[str, float]:
    """Energy kept of all that changed, and of the matrices that have a low rank."""
    def energy(some: list[dict]) -> float:
        square = sum(row["square"] for row in some)
        return sum(row["square"] * row["energy"] for row in some) / square if square else 1.0

    matrices = [row for row in rows if row["form"] == "matrix"]
    return {"all": energy(rows), "matrices": energy(matrices)}


def by_kind(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of the blocks' matrices by what they are in their block, each with its block's number.
    """
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        if row["form"] == "matrix" and (at := re.search(r"blocks\.(\d+)\.", row["name"])):
            kind = row["name"].replace(f"{at[1]}.", "", 1).removesuffix(".weight")
            kinds.setdefault(kind.removeprefix("blocks."), []).append({"block": int(at[1]), **row})
    return kinds


def report(cfg: Config, rows: list[dict], out: Path) -> None:
    """Write the table as Markdown and JSON, and its plot; print the sums."""
    sums = totals(rows)
    write_json(out.with_suffix(".json"), {"energy": sums, "rank": cfg.rank, "rows": rows})
    lines = [f"# {out.name}", "", f"Rank {cfg.rank}. Energy kept: {sums['all']:.4f} of all that "
             f"changed, {sums['matrices']:.4f} of the matrices in the file.", "",
             "| parameter | shape | form | ‖Δ‖ / ‖W‖ | energy kept |", "|---|---|---|---|---|"]
    for row in rows:
        form = f"rank {row['rank']}" if row["form"] == "matrix" else row["form"]
        form = {"none": "left out"}.get(form, form)
        lines.append(f"| {row['name']} | {' × '.join(map(str, row['shape']))} | {form} | "
                     f"{row['relative']:.2e} | {row['energy']:.4f} |")
    write_text(out.with_suffix(".md"), "\n".join(lines) + "\n")
    kinds = by_kind(rows)
    draw_panels(out.with_suffix(".png"), {
        title: [(figure, kind, points, "o-") for kind, points in kinds.items()]
        for title, figure in ((f"energy kept at rank {cfg.rank}", "energy"),
                              ("‖Δ‖ / ‖W‖", "relative"))}, x="block", linear=("energy",))
    print(f"energy kept: {sums['all']:.4f} of all that changed, {sums['matrices']:.4f} of the "
          f"matrices in the file; a layer each: {out.with_suffix('.md')}, .json, .png")
    print(f"{out}: {out.stat().st_size / 1e6:.3g} MB; use it by `python sample.py {cfg.path} "
          f"--lora {out}`, or in ComfyUI, diffusers and LightX2V")


def main(argv: list[str] | None = None) -> None:
    """Read the config, extract, report."""
    cfg = load_config(Config, "lora", argv, __doc__)
    check_model(cfg)
    if cfg.rank < 1:
        raise ValueError(f"rank: got {cfg.rank}; wanted 1 or more")
    path = Path(cfg.student or Path(cfg.run) / "student.safetensors")
    out = Path(cfg.out or Path(cfg.run) / f"student_lora_rank{cfg.rank}.safetensors")
    if out.suffix != ".safetensors":
        raise ValueError(f"out: got {out}; wanted a name that ends in .safetensors")
    announce(cfg, "lora")
    report(cfg, extract(cfg, path, out), out)


if __name__ == "__main__":
    cli(main)
