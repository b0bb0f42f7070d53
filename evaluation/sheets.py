"""Videos next to each other: stills, tables of videos, and files inside a page.

Shapes: video float [3, T, H, W] in [-1, 1], or frames uint8 [T, H, W, 3].
"""

import base64
import mimetypes
import re
import textwrap
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.video import to_uint8

Rows = list[tuple[str, list[tuple[Tensor, str]]]]  # (label, [(video, note), …, one per heading])


def thumbnail(video: Tensor, height: int = 256) -> Tensor:
    """Video [3,T,H,W] made smaller by an integer factor, to about `height` at most."""
    factor = max(1, video.shape[-2] // height)
    return F.avg_pool2d(video.transpose(0, 1), factor).transpose(0, 1)


def stills(video: Tensor) -> Tensor:
    """First, middle and last frame of a video [3,T,H,W], at most about 128 pixels high, next to
    each other: a video of one frame."""
    video = thumbnail(video, 128)
    frames = video[:, [0, video.shape[1] // 2, -1]]                          # 3 3 H W
    frames = F.pad(frames, (0, max(1, video.shape[3] // 48)), value=1.0)     # with a white gap
    return frames.transpose(1, 2).flatten(2).unsqueeze(1)                    # 3 1 H 3W


def enlarge(video: Tensor, height: int) -> np.ndarray:
    """A video's frames, uint8 [T, H, W, 3], in whole pixels enlarged to at least `height`."""
    scale = max(1, -(-height // video.shape[2]))
    return to_uint8(video).repeat(scale, axis=1).repeat(scale, axis=2)


def video_table(headings: list[str], rows: Rows) -> np.ndarray:
    """One video, uint8 [T, H, W, 3], with a row of videos of one shape per label and a column per
    heading; each video is over its note. The text is large enough to be read on a phone."""
    frames = [[enlarge(video, 128) for video, _ in cells] for _, cells in rows]
    T, h, w, _ = frames[0][0].shape
    left, top, line, gap = 150, 58, 24, 6
    canvas = Image.new("RGB", (left + (w + gap) * len(headings),
                               top + (h + line) * len(rows)), "white")
    draw, large, small = ImageDraw.Draw(canvas), *(ImageFont.load_default(n) for n in (24, 17))
    for j, heading in enumerate(headings):
        heading = re.sub(r"[^\x20-\u017f\u2010-\u2026]+", "…", heading)  # not in the font
        heading = textwrap.fill(heading, w // 8, max_lines=2)
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


def data_uri(path: Path) -> str:
    """A .png, .gif or .mp4 as an address that contains the complete file."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"data:{mimetypes.guess_type(path.name)[0]};base64,{data}"
