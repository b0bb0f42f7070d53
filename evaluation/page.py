"""What an evaluation writes: the table as Markdown, JSON and PNG, videos, and one HTML page."""

import html
import itertools
import re
import shlex
import string
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import Shared
from common.files import ROOT, replace_file, write_json, write_text
from common.ranks import device_name
from common.video import write_image, write_video
from evaluation.measures import Samples, endpoint_error, gates
from evaluation.sheets import data_uri, stills, video_table
from small_world.clips import ATTRIBUTES
from small_world.oracle import caption_attributes

ORACLE = (*ATTRIBUTES, "all")
COLUMN_TITLES = {
    "endpoint": "endpoint error ↓", "energy": "energy − teacher's ↓",
    "sliced": "sliced W − teacher's ↓", "hf": "HF, 1 = teacher's",
    "edges": "edges in place, 1 = teacher's", "spread": "spread, 1 = teacher's",
    "c2st": "C2ST, .5 = chance"}
ALL_TITLES = COLUMN_TITLES | {"floor": "floor, 1 = teacher's", "first": "first frame, dB"} | {
    name: f"oracle: {name}" for name in ORACLE}
LOOP_SECONDS = 4  # an mp4 lasts at least this long: players stop at its end


def environment(device: torch.device) -> dict[str, str | None]:
    """What a table was made with: torch, the device, and this code's commit, with -dirty at its end
    if files differ from it (None outside a repository)."""
    status, text = subprocess.getstatusoutput(
        f"git -C {shlex.quote(str(ROOT))} describe --always --dirty 2>/dev/null")
    return {"commit": None if status else text, "device": device_name(device),
            "torch": torch.__version__}


# ------------------------------------------------------------------------------------ the table

def table_columns(rows: list[dict]) -> dict[str, str]:
    """Key and title of each column that was measured."""
    return {name: title for name, title in ALL_TITLES.items() if name in rows[0]}


def plus_minus(value: float, error: float | None, digits: int = 4, sign: str = "") -> str:
    """A number with its error, if it has one."""
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
            *("| " + " | ".join(row) + " |" for row in rows)]


def markdown(rows: list[dict], bounds: list[dict], cfg: Shared, facts: dict) -> str:
    """The table and the gates as Markdown."""
    columns = table_columns(rows)
    lines = [f"{cfg.count} videos of held-out captions, the same noise for every model, "
             f"{cfg.width}×{cfg.height}×{cfg.frames}, teacher guidance {cfg.guidance}, "
             f"{facts['device']}; ± standard error. Columns: `python evaluate.py --help`.", "",
             *markdown_table(["model", *columns.values(), "evaluations", "DiT s per video"], [
                 [row["label"], *(plus_minus(*row[name], 2 if name in (*ORACLE, "first") else 4)
                                  for name in columns),
                  str(row["evaluations"]), f"{row['seconds']:.3f}"] for row in rows])]
    decode = sum(row["decode_seconds"] for row in rows) / len(rows)
    lines += ["", f"Decoding takes {decode:.3f} s per video in addition, in every row."]
    if bounds:
        lines += ["", *markdown_table(["gate", "measured", "required", ""], [
            [gate["gate"], f"{gate['measured']:.4f}", gate["required"],
             "pass" if gate["pass"] else "**FAIL**"] for gate in bounds])]
    return "\n".join(lines) + "\n"


def write_report(cfg: Shared, out: Path, models: list[Samples], rows: list[dict],
                 captions: list[str], chosen: dict[int, str], students: list[dict],
                 facts: dict) -> None:
    """Write table.md, table.json and, with cfg.pictures, pictures and page; print the table.

    Args: chosen by choose_examples; students as evaluate.read_students returns them.
    """
    first_students = itertools.takewhile(lambda row: row["kind"] in ("student", "mean"), rows[2:])
    compared = [*rows[:2], list(first_students)[-1]]  # teacher@n, teacher@m, the (mean) student
    bounds = gates(*compared) if "all" in rows[0] else []
    text = markdown(rows, bounds, cfg, facts)
    write_text(out / "table.md", text)
    write_json(out / "table.json", {**facts, "config": asdict(cfg), "rows": rows, "gates": bounds,
                                    "students": students})
    if cfg.pictures:
        curves = Path(students[0]["file"]).parent / "distill/curves.png"  # of the first student
        write_pictures(cfg, out, models, rows, compared, captions, chosen, text, curves, facts)
    print(f"\n{text}\nresults: {out / ('report.html' if cfg.pictures else 'table.md')}")


# ------------------------------------------------------------------------------------- pictures

GREY, ORANGE, BLUE = "#8a8f98", "#d98032", "#2f6db3"  # teacher@n, teacher@m, students


@contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of a size in inches, which is written as a PNG at the end."""
    from matplotlib.figure import Figure  # takes half a second: only where something is drawn

    figure = Figure((width, height), dpi=120, layout="constrained")
    yield figure
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    replace_file(path, lambda aside: figure.savefig(aside, format="png"))


def draw_table(path: Path, rows: list[dict], title: str) -> None:
    """Write a PNG with a panel for each column and a bar for each row, ± its error."""
    columns = {name: text for name, text in table_columns(rows).items() if name not in ATTRIBUTES}
    colours = [GREY if row["kind"] == "teacher_n" else BLUE if row["kind"] in ("student", "mean")
               else ORANGE for row in rows]
    with drawing(path, 2 + 2.1 * len(columns), 1 + 0.34 * len(rows)) as figure:
        panels = figure.subplots(1, len(columns), sharey=True)
        for axes, (name, heading) in zip(panels, columns.items(), strict=True):
            values, errors = zip(*(row[name] for row in rows), strict=True)
            bars = axes.barh(range(len(rows)), values, color=colours, capsize=2,
                             xerr=[error or 0.0 for error in errors])
            axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=7)
            axes.axvline(values[0], color=GREY, lw=0.8, ls="--")
            axes.margins(x=0.25)
            axes.set_title(heading, fontsize=10)
        panels[0].set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
        panels[0].invert_yaxis()
        figure.suptitle(title, fontsize=11, parse_math=False)


def choose_examples(errors: Tensor, captions: list[str]) -> dict[int, str]:
    """The videos to show, with a note on each: {index: note}, from errors [N].

    For the small world, one video per colour, with the shapes in turn: the one of median error
    among its colour and shape. Otherwise the videos at some quantiles of the error, easy ones
    first; a caption is shown once, at its highest quantile.
    """
    order, examples = errors.argsort(stable=True).tolist(), {}
    kinds = [(a["colour"], a["shape"]) for a in map(caption_attributes, captions)]
    groups = [[i for i in order if kinds[i] == (colour, colour % len(ATTRIBUTES["shape"]))]
              for colour in range(len(ATTRIBUTES["colour"]))]
    if all(groups):
        return {group[len(group) // 2]: "" for group in groups}
    for quantile in (1.0, 0.95, 0.9, 0.8, 0.5):
        video = order[round(quantile * (len(order) - 1))]
        if captions[video] not in [captions[i] for i in examples]:
            examples[video] = f" ({quantile:g} quantile)".replace("0.", ".")
    return dict(reversed(examples.items()))


def write_pictures(cfg: Shared, out: Path, models: list[Samples], rows: list[dict],
                   compared: list[dict], captions: list[str], chosen: dict[int, str], table: str,
                   curves: Path, facts: dict) -> None:
    """Write the table as a picture, videos and stills of the models, and the page.

    videos.* have a row of videos for teacher@n, and for each teacher@m and student.
    Args: compared, the rows of teacher@n, teacher@m and the student; chosen by choose_examples;
    table, the text of table.md; curves, the picture of the first student's training.
    """
    draw_table(out / "table.png", rows, f"{cfg.count} held-out captions, the same noise for all")
    pictured = []
    for kind, group in itertools.groupby(models, key=lambda model: model.kind):
        if kind != "teacher_steps":  # of unnamed students the first represents all
            pictured += list(group)[:None if cfg.names else 1]
    labels = [model.label.removesuffix(" #1") for model in pictured]
    headings, lines = [captions[i] + note for i, note in chosen.items()], []
    for model, label in zip(pictured, labels, strict=True):
        error = endpoint_error(model.latents, models[0].latents)
        lines.append((label.replace("@", "\n") + " steps" * ("@" in label), [
            (model.examples[i], f"error {float(error[i]):.3f}" if lines else "the target")
            for i in chosen]))
    title = (f"captions at quantiles of {labels[1]}'s endpoint error" if any(chosen.values()) else
             f"per colour the video with {labels[1]}'s median error for its colour and shape")
    videos = video_table(headings, lines)
    write_video(out / "videos.gif", videos, cfg.fps)
    write_video(out / "videos.mp4", videos, cfg.fps, LOOP_SECONDS)
    frames = [(label, [(stills(video), note) for video, note in cells]) for label, cells in lines]
    write_image(out / "videos.png", video_table(headings, frames)[0])
    write_page(cfg, out, compared, table, curves, {**facts, "shown": title})


# ------------------------------------------------------------------------------------- the page

def html_of(text: str) -> str:
    """Paragraphs and tables of Markdown as HTML, escaped; only the forms that our tables use.

    In a table, an error is below its number, so that 16 columns fit into 1200 pixels.
    """
    blocks, text = [], html.escape(text.replace("`", "")).replace("**FAIL**", "<mark>FAIL</mark>")
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    for block in text.strip().split("\n\n"):
        head, *lines = [line[1:-1].replace("|", "<td>") for line in block.split("\n")]
        rows = "".join(f"<tr><td>{line}" for line in (head, *lines[1:]))
        rows = re.sub(r" (± [\d.]+:?)", r" <small>\1</small>", rows)
        blocks.append(f'<div class="wide"><table>{rows}</table></div>' if block.startswith("|")
                      else f"<p>{block}</p>")
    return "\n".join(blocks)


def write_page(cfg: Shared, out: Path, compared: list[dict], table: str, curves: Path,
               facts: dict) -> None:
    """Fill in assets/report_template.html with the pictures in `out`; the page needs no other file.
    """
    texts = {**facts, "n": compared[0]["m"], "m": compared[1]["m"], "count": cfg.count}
    longest = max(row["endpoint"][0] for row in compared) or 1.0
    for name, row in zip(("teacher_n", "teacher_m", "student"), compared, strict=True):
        texts |= {f"{name}_label": row["label"], f"{name}_error": f"{row['endpoint'][0]:.3f}",
                  f"{name}_bar": f"{100 * row['endpoint'][0] / longest:.1f}%",
                  f"{name}_cost": f"{row['evaluations']} evaluations, {row['seconds']:.3f} s"}
    parts = {"videos": data_uri(out / "videos.mp4"), "stills": data_uri(out / "videos.png"),
             "table": html_of(table), "curves": ""}
    if curves.is_file():
        parts["curves"] = ('<h2>How the student learned</h2><img alt="Losses, accuracy of the '
                           f'heads, gradients, held-out error" src="{data_uri(curves)}">')
    template = (ROOT / "assets/report_template.html").read_text(encoding="utf-8")
    write_text(out / "report.html", string.Template(template).substitute(
        {name: html.escape(str(text)) for name, text in texts.items()}, **parts))
