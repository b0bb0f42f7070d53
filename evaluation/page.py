"""The page, the table and the pictures of an evaluation."""

import html
import re
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.files import ROOT, replace_file, write_text
from common.video import write_video
from evaluation.measures import COLUMNS
from evaluation.sheets import comparison_sheet, data_uri, side_by_side, video_wall
from small_world import clips as world

LOOP_SECONDS = 4  # that an mp4 lasts at least: players stop at its end


def cells(row: dict, columns: dict[str, str]) -> list[str]:
    """A row's table cells as text."""
    def number(name: str) -> str:
        if name not in row:
            return ""
        digits = 2 if name in (*world.ATTRIBUTES, "all", "first") else 4
        return f"{row[name][0]:.{digits}f} ± {row[name][1]:.{digits}f}"

    return [row["label"], *(number(name) for name in columns), str(row["evaluations"]),
            f"{row['seconds']:.3f}"]


def columns_of(rows: list[dict]) -> dict[str, str]:
    """Table columns: key to heading; the oracle's only where it was asked."""
    first = {"first": "first frame, dB"} if "first" in rows[0] else {}
    oracle = {name: f"oracle: {name}" for name in (*world.ATTRIBUTES, "all") if name in rows[0]}
    return COLUMNS | first | oracle


def markdown(rows: list[dict], passed: list[dict], cfg: Any, facts: dict) -> str:
    """The table and the gates as Markdown."""
    columns = columns_of(rows)
    head = ["model", *columns.values(), "evaluations", "DiT s a video"]
    lines = [f"{cfg.count} videos of held-out captions, the same noise for every model, "
             f"{cfg.width}×{cfg.height}×{cfg.frames}, teacher guidance {cfg.cfg_scale}, "
             f"{facts['device']}; ± standard error. Columns: `python evaluate.py --help`.", "",
             "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cells(row, columns)) + " |" for row in rows]
    decode = sum(row["decode_seconds"] for row in rows) / len(rows)
    lines += ["", f"Decoding takes {decode:.3f} s a video on top, for every row."]
    if passed:
        lines += ["", "| gate | got | wanted | |", "|---|---|---|---|"]
        lines += [f"| {g['gate']} | {g['got']:.4f} | {g['wanted']} | "
                  f"{'pass' if g['pass'] else '**FAIL**'} |" for g in passed]
    return "\n".join(lines) + "\n"


def draw_table(path: Path, rows: list[dict], title: str) -> None:
    """Write the table with a bar chart of each main column as a PNG."""
    from matplotlib.figure import Figure  # half a second that only those who draw should pay

    columns = columns_of(rows)
    figure = Figure(figsize=(14, 4.6 + 0.3 * len(rows)), dpi=120, layout="constrained")
    top, bottom = figure.subfigures(2, height_ratios=[1.0 + 0.3 * len(rows), 3.6])
    axes = top.subplots()
    axes.set_axis_off()
    axes.set_title(title, fontsize=11, weight="bold", parse_math=False)
    head = ["model", *(name.replace(": ", ":\n") for name in columns.values()), "evalu-\nations",
            "DiT s\na video"]
    table = axes.table([cells(row, columns) for row in rows], colLabels=head, loc="center",
                       cellLoc="center", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    table.auto_set_column_width(list(range(len(head))))
    table.scale(1, 1.5)
    for column in range(len(head)):
        table[0, column].set_height(0.5 / (1.0 + 0.3 * len(rows)))
    panels = bottom.subplots(1, len(COLUMNS))
    labels = [row["label"].replace(", ", ",\n") for row in rows]
    for axes, (name, heading) in zip(panels, COLUMNS.items(), strict=True):
        shade = ["#8a8f98", *("#d98032" if row["label"].startswith("teacher") else "#2f6db3"
                              for row in rows[1:])]
        values, errors = zip(*(row[name] for row in rows), strict=True)
        axes.bar(range(len(rows)), values, yerr=errors, color=shade, capsize=3)
        axes.set_xticks(range(len(rows)), labels, fontsize=8, rotation=0 if len(rows) < 4 else 40)
        axes.set_title(heading, fontsize=10)
        axes.axhline(values[0], color="#8a8f98", lw=0.8, ls="--")
        axes.spines[["top", "right"]].set_visible(False)
    replace_file(path, lambda aside: figure.savefig(aside, format="png"))


@dataclass
class Example:
    """A caption that is shown, with the videos of teacher@n, teacher@m and the first student."""
    caption: str                                  # and its quantile
    videos: list[Tensor]
    notes: list[str]                              # of each video: its endpoint error


def html_of(text: str) -> str:
    """Paragraphs and tables of Markdown as HTML: no more than `markdown` writes, escaped."""
    blocks, text = [], html.escape(text.replace("`", "")).replace("**FAIL**", "<mark>FAIL</mark>")
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    for block in text.strip().split("\n\n"):
        head, *lines = [line[1:-1].replace("|", "<td>") for line in block.split("\n")]
        rows = "".join(f"<tr><td>{line}" for line in (head, *lines[1:]))
        blocks.append(f'<div class="wide"><table>{rows}</table></div>' if block.startswith("|")
                      else f"<p>{block}</p>")
    return "\n".join(blocks)


def html_example(example: Example, labels: list[str], fps: float) -> str:
    """One video of all models, under their names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, side_by_side(example.videos), fps, LOOP_SECONDS)
        source = data_uri(path)
    heads = "".join(f"<div><b>{html.escape(label)}</b><br>{note}</div>"
                    for label, note in zip(labels, example.notes, strict=True))
    return (f"<figure><figcaption>{html.escape(example.caption)}</figcaption>"
            f'<div class="three">{heads}</div>'
            f'<video autoplay loop muted playsinline src="{source}"></video></figure>')


def write_ladder(out: Path, examples: list[Example], labels: list[str], title: str,
                 fps: float) -> Path:
    """ladder.png and ladder.gif, which it returns: a row a model, a column a caption."""
    rows = [(label, [(e.videos[i], e.notes[i]) for e in examples])
            for i, label in enumerate(labels)]
    comparison_sheet(out / "ladder.png", [e.caption for e in examples], rows, title)
    strips = [(label, side_by_side([video for video, _ in cells])) for label, cells in rows]
    write_video(out / "ladder.gif", video_wall(strips, strips[0][1].shape[2] + 24), fps)
    return out / "ladder.gif"


def write_page(out: Path, examples: list[Example], labels: list[str], shown: list[dict],
               rows: list[dict], ladder: Path | None, table: str, cfg: Any, facts: dict) -> None:
    """Fill in assets/report.html, which then needs no other file.

    Args: shown, the rows of teacher@n, teacher@m and its students; rows, all; ladder as
    write_ladder has it; table as `markdown` has it.
    """
    texts = {**facts, "n": labels[0].partition("@")[2], "m": labels[1].partition("@")[2],
             "count": cfg.count}
    longest = max(row["endpoint"][0] for row in shown) or 1.0
    for name, row in {"best": shown[0], "few": shown[1], "student": shown[-1]}.items():
        texts |= {f"{name}_label": row["label"], f"{name}_error": f"{row['endpoint'][0]:.3f}",
                  f"{name}_bar": f"{100 * row['endpoint'][0] / longest:.1f}%",
                  f"{name}_cost": f"{row['evaluations']} evaluations, {row['seconds']:.3f} s"}
    curves = Path(cfg.run) / "distill/curves.png"
    words = [f"<li>{name}: {', '.join(values)}" for name, values in world.ATTRIBUTES.items()]
    parts = {
        "videos": "\n".join(html_example(e, labels, cfg.fps) for e in examples),
        "ladder": ladder and "<h2>All models</h2><p>A column is one caption and one noise. The "
        "first row is the target: which of the rows below keep it?</p><img alt=\"A row for "
        f'each model, a column for each caption" src="{data_uri(ladder)}">',
        "stills": data_uri(out / "videos.png"), "table": html_of(table),
        "curves": curves.is_file() and "<h2>How the student learned</h2><img alt=\"Losses, heads' "
        f'accuracy, gradients, held-out error" src="{data_uri(curves)}">',
        "words": "all" in rows[0] and "<p>The small world knows these words:</p>"
        f"<ul>{''.join(words)}</ul>"}
    template = string.Template((ROOT / "assets/report.html").read_text(encoding="utf-8"))
    write_text(out / "report.html", template.substitute(
        {name: html.escape(str(text)) for name, text in texts.items()},
        **{name: part or "" for name, part in parts.items()}))
