"""The videos that sample.py makes: their file names, prompt files that name them, their record.

<who>/<slug>_<checksum>_seed<seed>.mp4   a video; the checksum covers all that it is made from
<who>.jsonl                              the record: a line for each finished video, and one for
                                         each set of settings, which the others name by checksum
<who>.json, <who>.png                    prompts, files, seconds and a contact sheet of one command
FILE.jsonl                               a prompt file whose lines give prompt, seed and file name,
                                         as `python -m tools.vbench` writes it
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from common.files import (
    append_log, crc32_of_file, crc32_of_json, parse_json, read_log, read_text, remove_leftovers,
    write_json, write_text)
from common.prompts import LARGEST, Prompt
from common.video import picture_sheet, read_video, thumbnail, to_uint8

# The bytes of a file name that leave room for what replace_file adds while it writes.
NAME_BYTES = 255 - len(".." + "4194304-01234567" + ".part.mp4")
SHEET_ROWS = 12  # videos on a contact sheet: the first ones


class Video(NamedTuple):
    """One video to make."""
    index: int                                    # of its prompt
    prompt: Prompt
    seed: int
    height: int                                   # pixels
    width: int
    file: str                                     # relative to the record's folder


def video_name(index: int, prompt: Prompt, seed: int, settings: str) -> str:
    """The name of a video's file; with another prompt, image or settings it is another one.

    Args: index, of the prompt, by which its noise is drawn; settings, a checksum of all others.
    """
    slug = re.sub(r"\W+", "-", prompt.text.lower())[:40].strip("-") or "video"
    image = prompt.image and crc32_of_file(prompt.image)
    return f"{slug}_{crc32_of_json([settings, index, prompt.text, image])}_seed{seed}.mp4"


# ------------------------------------------------------------------ prompt files that name videos

def name_error(name: str) -> str:
    """Why a text cannot be the name of a video's file; "" if it can."""
    if "/" in name or "\0" in name or not name.endswith(".mp4"):
        return "a slash or NUL in it, or no .mp4 at its end"
    size = len(name.encode(errors="replace"))
    return f"{size} bytes, more than {NAME_BYTES}" if size > NAME_BYTES else ""


def write_named_videos(path: Path, videos: list[dict[str, Any]]) -> None:
    """Write a prompt file; each video has "prompt", "seed" and "file"."""
    write_text(path, "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in videos))


def read_named_videos(path: Path) -> list[dict[str, Any]]:
    """Seed and file of each prompt of a file that names its videos; [] for other prompt files.

    Raises ValueError for a line without either, and for a name that is not usable or not unique.
    """
    text = read_text(path, LARGEST) if path.suffix == ".jsonl" else ""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines or '"file":' not in lines[0]:
        return []
    videos, names = [], set()
    for i, line in enumerate(lines, 1):
        where = f"{path}: prompt {i}"
        videos.append(parse_json(line, where, {"seed": int, "file": str},
                                 "write the file again by `python -m tools.vbench`"))
        name = videos[-1]["file"]
        if error := name_error(name) or ("a name used before" if name in names else ""):
            raise ValueError(f"{where}: file: expected a file name, got {name!r:.90} with {error}: "
                             "correct it")
        names.add(name)
    return videos


# -------------------------------------------------------------------------------- the record

def finished_videos(record: Path, videos: list[Video],
                    settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The record's lines, by file, of those videos that exist with their recorded size.

    Args: settings, what all of them share: JSON values; their line is added to the record. Files
    that killed processes left half-written are removed.
    Raises ValueError naming a file that was made from another prompt, seed or setting.
    """
    remove_leftovers(record.with_suffix(""))
    lines, checksum, finished = read_log(record), crc32_of_json(settings), {}
    stored = {line.get("settings"): line["values"] for line in lines if "values" in line}
    recorded = {line["file"]: line for line in lines if "file" in line}
    if checksum not in stored:
        append_log(record, {"settings": checksum, "values": settings})
    for video in videos:
        path, line = record.parent / video.file, recorded.get(video.file)
        if line is None or not path.exists() or path.stat().st_size != line.get("bytes"):
            continue
        before = {**line, **stored.get(line.get("settings"), {})}
        for key, value in {"prompt": video.prompt.text, "seed": video.seed, **settings}.items():
            if before.get(key) != value:
                raise ValueError(f"{path}: was made with {key} {before.get(key)!r:.200}, got "
                                 f"{value!r:.200}: use what it was made with, or choose another "
                                 "--out")
        finished[video.file] = line
    return finished


def write_report(record: Path, lines: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write the JSON and the contact sheet of one command's videos next to the record.

    Args: lines, the record's lines of these videos; facts, what else the JSON holds.
    """
    write_json(record.with_suffix(".json"), {**facts, "videos": lines})
    rows = [(f"{line['prompt']} (seed {line['seed']})",
             thumbnail(read_video(record.parent / line["file"]))) for line in lines[:SHEET_ROWS]]
    sizes = dict.fromkeys(f"{line['width']}×{line['height']}" for line in lines[:SHEET_ROWS])
    contact_sheet(record.with_suffix(".png"), rows, title=f"{record.stem}, {', '.join(sizes)}")


def contact_sheet(path: str | Path, rows: list[tuple[str, Tensor]], columns: int = 9,
                  title: str | None = None) -> None:
    """Write a PNG with one row per (label, video): up to `columns` frames from first to last."""
    cells = []
    for label, video in rows:
        frames = to_uint8(video)
        times = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
        cells.append((label, [(frames[t], f"frame {t}") for t in times]))
    picture_sheet(path, cells, 1.1, title)


def timing_table(results: list[dict], cost: dict[str, float]) -> str:
    """Seconds by phase as text: of the slowest rank, and per video; then the DiT's cost."""
    videos = [video for result in results for video in result["videos"]]
    slowest = max(results, key=lambda result: sum(result["seconds"].values()))
    steps = len(videos[0]["seconds"]["steps"])
    lines = [f"{'':<10}{'seconds':>10}{'per video':>11}"]
    for name, seconds in slowest["seconds"].items():
        each = "" if name == "load" else f"{seconds / len(slowest['videos']):11.3f}"
        lines.append(f"{f'{steps} steps' if name == 'steps' else name:<10}{seconds:10.2f}{each}")
    step = sum(sum(v["seconds"]["steps"]) for v in videos) / len(videos) / steps
    peak = max(result["peak_bytes"] for result in results) / 2 ** 30
    mfu = f", {cost['mfu']:.1%} of the peak" if "mfu" in cost else ""
    return "\n".join([
        *lines, f"{len(videos)} videos, {videos[0]['evaluations']} evaluations per video, "
        f"{step:.3f} s per step, peak memory {peak:.2f} GiB per process",
        f"{cost['tokens']} tokens, {cost['tflop_an_evaluation']:.4g} TFLOP and "
        f"{cost['seconds_an_evaluation']:.3f} s per evaluation{mfu}"])
