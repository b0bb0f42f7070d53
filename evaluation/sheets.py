"""Videos next to each other: sheets of stills, walls of videos, and files inside a page.

Shapes: video float [3, T, H, W] in [-1, 1], or frames uint8 [T, H, W, 3].
"""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.video import picture_sheet, to_uint8


def comparison_sheet(path: str | Path, headings: list[str],
                     rows: list[tuple[str, list[tuple[Tensor, str]]]],
                     title: str | None = None) -> None:
    """Write a PNG with one column per heading and one row per label: first, middle and last frame
    of each video over its note.

    rows: (label, [(video, note), …, one for each heading]).
    """
    picture_sheet(path, [(label, [(still_strip(video), note) for video, note in cells])
                         for label, cells in rows], 3.6, title, headings)


def still_strip(video: Tensor | np.ndarray) -> np.ndarray:
    """First, middle and last frame of a video next to each other, uint8 [H, W, 3]."""
    frames = to_uint8(video)
    times = dict.fromkeys((0, len(frames) // 2, len(frames) - 1))
    gap = max(1, frames.shape[2] // 48)
    padded = [np.pad(frames[t], ((0, 0), (0, gap), (0, 0)), constant_values=255) for t in times]
    return np.concatenate(padded, axis=1)[:, :-gap]


def side_by_side(videos: list[Tensor], labels: list[str] | None = None,
                 scale: int | None = None) -> np.ndarray:
    """One video of several, uint8 [T, H, W, 3], left to right, each under its label, if any.

    Args: videos of one shape; scale, integer enlargement by nearest neighbour (None: the least that
    makes frames 192 pixels high). Raises ValueError if shapes or counts differ.
    """
    frames = [to_uint8(video) for video in videos]
    shapes = [list(f.shape) for f in frames]
    count = len(frames) if labels is None else len(labels)
    if not frames or count != len(frames) or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"side_by_side: expected one label a video and one shape, got {count} "
                         f"labels for videos of shapes {shapes}")
    scale = scale or max(1, -(-192 // shapes[0][1]))
    frames = [video.repeat(scale, axis=1).repeat(scale, axis=2) for video in frames]
    return tile(frames, labels or [None] * count, count, 4)[:, :-4, :-4]


def video_wall(tiles: list[tuple[str, np.ndarray]], width: int = 1300) -> np.ndarray:
    """One video of several, uint8 [T, H, W, 3], each under its caption, as many per line as fit.

    tiles: (caption, frames uint8 [T, h, w, 3] of one shape). width: of a line, in pixels.
    """
    captions, videos = zip(*tiles, strict=True)
    return tile(videos, captions, max(1, min(len(tiles), width // (videos[0].shape[2] + 12))), 12)


def tile(videos: Sequence[np.ndarray], captions: Sequence[str | None], columns: int,
         gap: int) -> np.ndarray:
    """Frames uint8 [T, h, w, 3] of one shape in lines of `columns`, each under its caption, with a
    white gap to the right and below."""
    cells = []
    for frames, caption in zip(videos, captions, strict=True):
        if caption is not None:
            strip = label_strip(caption, frames.shape[2], 22)                     # 22 w 3
            strip = np.broadcast_to(strip, (len(frames), *strip.shape))
            frames = np.concatenate([strip, frames], axis=1)                      # T 22+h w 3
        cells.append(np.pad(frames, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    lines = [np.concatenate(cells[a:a + columns], axis=2) for a in range(0, len(cells), columns)]
    return np.concatenate(lines, axis=1)


def video_table(headings: list[str], rows: list[tuple[str, list[tuple[Tensor, str]]]],
                ) -> np.ndarray:
    """One video, uint8 [T, H, W, 3], with a row of videos per label and a column per heading.

    rows: (label, [(video [3, T, h, w], note under it), …, one for each heading]). Lines of a label
    are separated by line breaks. The text is large enough to be read on a phone.
    """
    scale = max(1, -(-128 // rows[0][1][0][0].shape[2]))
    frames = [[to_uint8(video).repeat(scale, 1).repeat(scale, 2) for video, _ in cells]
              for _, cells in rows]
    T, h, w, _ = frames[0][0].shape
    left, top, line, gap = 150, 58, 24, 6
    canvas = Image.new("RGB", (left + (w + gap) * len(headings),
                               top + (h + line) * len(rows)), "white")
    draw, large, small = ImageDraw.Draw(canvas), *(ImageFont.load_default(n) for n in (24, 17))
    for j, heading in enumerate(headings):
        draw.multiline_text((left + j * (w + gap) + w / 2, top - 6), heading, "black", small, "md",
                            align="center")
    for i, (label, cells) in enumerate(rows):
        y = top + i * (h + line)
        draw.multiline_text((6, y + h / 2), label, "black", large, "lm", spacing=6)
        for j, (_, note) in enumerate(cells):
            draw.text((left + j * (w + gap) + w / 2, y + h + 3), note, "#5c6470", small, "mt")
    video = np.repeat(np.asarray(canvas)[None], T, 0)
    for i, row in enumerate(frames):
        for j, cell in enumerate(row):
            y, x = top + i * (h + line), left + j * (w + gap)
            video[:, y:y + h, x:x + w] = cell
    return video


def label_strip(text: str, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: text in black on white, cut to fit."""
    strip, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(12)
    text = re.sub(r"[^\x20-\u017f\u2010-\u2026]+", "…", " ".join(text.split()))
    while len(text) > 1 and font.getlength(text) > width - 4:
        text = text.rstrip("…")[:-1] + "…"
    ImageDraw.Draw(strip).text((2, height // 2), text, "black", font, anchor="lm")
    return np.asarray(strip)


def data_uri(path: Path) -> str:
    """A .png, .gif or .mp4 as an address that contains the complete file."""
    kind = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
