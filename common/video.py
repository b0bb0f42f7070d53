"""Files that people look at or write: videos, pictures of videos, images.

Shapes: video float [3, T, H, W] in [-1, 1], or frames uint8 [T, H, W, 3]; image [3, H, W].
"""

import base64
import re
import subprocess
import textwrap
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.files import replace_file

# ---------------------------------------------------------------------------------------------
# Video files, and pictures of videos
# ---------------------------------------------------------------------------------------------

def to_uint8(video: Tensor | np.ndarray) -> np.ndarray:
    """uint8 frames [T, H, W, 3] of a video: float [3, T, H, W] in [-1, 1], clipped, or such frames.

    Values are rounded, so that frames read from a file come out as they were.
    Raises ValueError on another shape, an empty video or non-finite values.
    """
    video = torch.as_tensor(video)
    frames = video.dtype == torch.uint8
    if video.ndim != 4 or video.shape[-1 if frames else 0] != 3 or 0 in video.shape:
        raise ValueError(f"got a {video.dtype} video of shape {list(video.shape)}; want float "
                         f"[3, T, H, W] or uint8 [T, H, W, 3], nothing empty")
    if not frames:
        if not torch.isfinite(video).all():
            raise ValueError("the video holds NaN or infinite values: the network or its weights "
                             "overflowed; check the weights file")
        video = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
        video = video.permute(1, 2, 3, 0)
    return np.ascontiguousarray(video.cpu().numpy())


ONE_FILE = ["-protocol_whitelist", "file,pipe"]  # a playlist opens no other file
EACH_FRAME = ["-map", "0:v:0", "-fps_mode", "passthrough"]  # none dropped, none repeated


def count_frames(path: Path) -> int:
    """How many frames ffmpeg decodes from a file. Raises OSError with its first complaint."""
    # By hand, since imageio drops ffmpeg's exit status: half a file would pass as a short video.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", *ONE_FILE, "-err_detect",
               "explode", "-i", f"file:{path}", *EACH_FRAME, "-f", "framecrc", "-"]
    done = subprocess.run(command, input=b"", capture_output=True, check=False)
    if done.returncode:
        complaint = re.sub(r"\[[^]]*\] *", "", done.stderr.decode(errors="replace")).strip()
        raise OSError((complaint or "no reason given").splitlines()[0])
    return sum(not line.startswith(b"#") for line in done.stdout.splitlines())


def write_video(path: str | Path, video: Tensor | np.ndarray, fps: float,
                seconds: float = 0) -> None:
    """Writes a video as .mp4 (H.264) or .gif, looping; the same frames give the same bytes.

    video: float [3, T, H, W] in [-1, 1] or uint8 [T, H, W, 3]. seconds: the frames come again and
    again until it lasts about so long, since players stop at the end of an .mp4. An odd height or
    width of an .mp4 grows by one repeated row or column, since 4:2:0 colour needs even sizes.
    Raises ValueError on a bad video, fps or suffix, or if the file cannot be written.
    """
    def write(aside: Path) -> None:
        try:
            imageio.imwrite(aside.resolve(), frames, plugin="FFMPEG", extension=".mp4",  # or .gif
                            fps=float(fps), quality=None, macro_block_size=1,
                            ffmpeg_log_level="error", **encode)
        except OSError as error:  # its other lines are the whole command
            raise OSError(str(error).partition("\n")[0]) from error
        if (written := count_frames(aside)) != len(frames):
            raise OSError(f"ffmpeg wrote {written} of {len(frames)} frames")

    path, frames = Path(path), to_uint8(video)
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"{path}: got suffix {path.suffix!r}; videos are written as .mp4 or .gif")
    if not 0 < fps < float("inf"):
        raise ValueError(f"{path}: got fps={fps}; want a positive number")
    frames = np.concatenate([frames] * max(1, round(seconds * fps / len(frames))))
    # One thread and bitexact: bytes that do not depend on the machine's cores.
    flags = "-xerror -threads 1 -fflags +bitexact -flags:v +bitexact "
    if path.suffix == ".mp4":
        frames = np.pad(frames, [(0, 0), *((0, n % 2) for n in frames.shape[1:3]), (0, 0)], "edge")
        # The BT.709 conversion is done and said, so that every player shows the same colours.
        flags += ("-vf scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd -colorspace "
                  "bt709 -color_primaries bt709 -color_trc bt709 -crf 14 -movflags +faststart")
        encode = {"codec": "libx264", "pixelformat": "yuv420p", "output_params": flags.split()}
    else:
        flags += "-vf split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none -loop 0"
        encode = {"codec": "gif", "pixelformat": "pal8", "output_params": flags.split()}
    replace_file(path, write)


def data_uri(path: Path) -> str:
    """A .png, .gif or .mp4 as an address that holds the whole file."""
    kind = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def read_video(path: str | Path) -> Tensor:
    """All frames of a video file, float [3, T, H, W] in [-1, 1].

    Raises FileNotFoundError if there is none, ValueError if it is corrupt or holds no frame.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video file {path}")
    try:
        if not count_frames(path):
            raise ValueError("it holds no frame")
        frames = imageio.imread(path.resolve(), plugin="FFMPEG", extension=".mp4",
                                input_params=ONE_FILE, output_params=EACH_FRAME)
    except Exception as error:  # imageio has many kinds for a broken file
        raise ValueError(f"{path} cannot be read as a video ({error}): make it anew, or convert it "
                         f"to H.264 .mp4") from error
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def drawable(text: str) -> str:
    """A text with "…" for what the figures' font lacks, which would be drawn as boxes."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    text = unicodedata.normalize("NFC", text)
    return re.sub("\0+", "…", "".join(c if c == "\n" or ord(c) in known else "\0" for c in text))


def contact_sheet(path: str | Path, rows: list[tuple[str, Tensor]], columns: int = 9,
                  title: str | None = None) -> None:
    """Writes a PNG with one row a video: its label, then frames from first to last.

    rows: (label, video as write_video takes it). columns: frames shown of each video at most.
    Raises ValueError if there are no rows or a video is bad.
    """
    from matplotlib.figure import Figure  # half a second that only those who draw should pay

    if not rows or columns < 1:
        raise ValueError(f"{path}: got {len(rows)} videos and columns={columns}; want at least one")
    videos = [to_uint8(video) for _, video in rows]
    columns = min(columns, max(map(len, videos)))
    tall = sum(max(video.shape[1] / video.shape[2], 0.4) for video in videos)
    figure = Figure((2 + 1.1 * columns, 0.6 + 1.15 * tall), dpi=160, layout="constrained")  # inches
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (label, _), video, line in zip(rows, videos, grid, strict=True):
        shown = np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)
        line[0].set_ylabel(textwrap.fill(drawable(label), 26, max_lines=6), rotation=0, ha="right",
                           va="center", fontsize=9, parse_math=False)
        for axes in line:
            axes.set(xticks=[], yticks=[], frame_on=False)
        for axes, t in zip(line, shown, strict=False):  # a short video leaves places free
            axes.imshow(video[t], interpolation="nearest")
            axes.set_title(f"frame {t}", fontsize=7, pad=2)
    if title:
        figure.suptitle(drawable(title), fontsize=11, weight="bold", parse_math=False)
    replace_file(path, lambda aside: figure.savefig(aside, metadata={"Software": None}))


def draw_panels(path: Path, panels: dict[str, list[tuple]], x: str, linear: tuple[str, ...] = (),
                colours: int = 10) -> None:
    """Draw figures of a log as one PNG of panels, two in a row.

    Args: panels, {title: [(figure, label or None, log lines, line style), …]}; x, the figure on the
    horizontal axis; titles that start with one of `linear` have a linear vertical axis, others a
    logarithmic one; colours, after how many curves of a panel the colours start again.
    """
    from matplotlib.figure import Figure  # half a second that only those who draw should pay

    rows = (len(panels) + 1) // 2
    fig = Figure(figsize=(12, 3.5 * rows), layout="constrained")
    axes = fig.subplots(rows, 2, squeeze=False)
    for ax, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, label, lines, style) in enumerate(curves):
            points = [(line[x], line[name]) for line in lines if name in line]
            if points:
                ax.plot(*zip(*points, strict=True), style, lw=1, color=f"C{i % colours}",
                        label=label)
        ax.set(title=title, xlabel=x, yscale="linear" if title.startswith(linear) else "log")
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8)
    replace_file(path, lambda aside: fig.savefig(aside, dpi=90, format="png"))


def comparison_sheet(path: str | Path, headings: list[str],
                     rows: list[tuple[str, list[tuple[Tensor, str]]]],
                     title: str | None = None) -> None:
    """Writes a PNG with a column a heading and a row a label: first, middle and last frame of each
    video over its note.

    rows: (label, [(video as write_video takes it, note), …, one for each heading]).
    """
    from matplotlib.figure import Figure  # half a second that only those who draw should pay

    strips = [[still_strip(video) for video, _ in cells] for _, cells in rows]
    tall = sum(line[0].shape[0] / line[0].shape[1] for line in strips)  # in widths of a strip
    size = 1.5 + 3.6 * len(headings), 0.9 + 3.6 * tall + 0.3 * len(rows)  # inches
    figure = Figure(size, dpi=130, layout="constrained")
    grid = figure.subplots(len(rows), len(headings), squeeze=False)
    for heading, axes in zip(headings, grid[0], strict=True):
        axes.set_title(textwrap.fill(heading, 34), fontsize=13, weight="bold", parse_math=False)
    for (label, cells), line, pictures in zip(rows, grid, strips, strict=True):
        wrapped = [textwrap.fill(part, 22, max_lines=5) for part in drawable(label).split("\n")]
        line[0].set_ylabel("\n".join(wrapped), rotation=0, ha="right", va="center", fontsize=10,
                           parse_math=False)
        for axes, picture, (_, note) in zip(line, pictures, cells, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[], frame_on=False)
            axes.set_xlabel(drawable(note), fontsize=10, parse_math=False)
    if title:
        figure.suptitle(drawable(title), fontsize=12, parse_math=False)
    replace_file(path, lambda aside: figure.savefig(aside, format="png",
                                                    metadata={"Software": None}))


def still_strip(video: Tensor | np.ndarray) -> np.ndarray:
    """First, middle and last frame of a video next to each other, uint8 [H, W, 3]."""
    frames = to_uint8(video)
    gap = np.full((frames.shape[1], max(1, frames.shape[2] // 48), 3), 255, np.uint8)
    first, *others = (frames[t] for t in dict.fromkeys((0, len(frames) // 2, len(frames) - 1)))
    return np.concatenate([first, *(part for frame in others for part in (gap, frame))], axis=1)


def side_by_side(videos: list[Tensor], labels: list[str] | None = None,
                 scale: int | None = None) -> np.ndarray:
    """One video of several, uint8 [T, H, W, 3], each under its label, if any, left to right.

    videos: of one shape, as write_video takes them. scale: integer enlargement, nearest
    neighbour; None: the least that makes frames 192 pixels high.
    Raises ValueError if shapes or counts differ.
    """
    frames = [to_uint8(video) for video in videos]
    shapes = [list(f.shape) for f in frames]
    count = len(frames) if labels is None else len(labels)
    if not frames or count != len(frames) or any(s != shapes[0] for s in shapes):
        raise ValueError(f"side_by_side: got {count} labels for videos of shapes {shapes}; "
                         f"want one label a video and one shape")
    scale = scale or max(1, -(-192 // shapes[0][1]))
    gap, bar = 4, 22                                                              # pixels
    cells = []
    for video, text in zip(frames, labels or [None] * len(frames), strict=True):
        cell = video.repeat(scale, axis=1).repeat(scale, axis=2)                  # T H W 3
        if text is not None:
            strip = np.broadcast_to(label_strip(text, cell.shape[2], bar), (len(cell), bar,
                                                                           cell.shape[2], 3))
            cell = np.concatenate([strip, cell], axis=1)                          # T bar+H W 3
        cells.append(np.pad(cell, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255))
    return np.concatenate(cells, axis=2)[:, :, :-gap]


def thumbnail(video: Tensor, height: int = 256) -> Tensor:
    """Video [3,T,H,W] made smaller by a whole factor, to at most about `height` pixels."""
    factor = max(1, video.shape[-2] // height)
    return F.avg_pool2d(video.transpose(0, 1), factor).transpose(0, 1)


def video_wall(tiles: list[tuple[str, np.ndarray]], width: int = 1300) -> np.ndarray:
    """One video of several, uint8 [T, H, W, 3], each under its caption, as many in a line as fit.

    tiles: (caption, frames uint8 [T, h, w, 3] of one shape). width: of a line, in pixels.
    """
    cells = []
    for caption, frames in tiles:
        strip = np.broadcast_to(label_strip(caption, frames.shape[2], 24),
                                (len(frames), 24, frames.shape[2], 3))
        cell = np.concatenate([strip, frames], axis=1)
        cells.append(np.pad(cell, ((0, 0), (0, 8), (0, 16), (0, 0)), constant_values=255))
    columns = max(1, min(len(cells), width // cells[0].shape[2]))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    lines = [np.concatenate(cells[a:a + columns], axis=2) for a in range(0, len(cells), columns)]
    return np.concatenate(lines, axis=1)


def label_strip(text: str, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: text in black on white, smaller and then cut if it must be."""
    strip = Image.new("RGB", (width, height), "white")
    text, room = re.sub(r"[^\x20-\u017f\u2010-\u2026]+", "…", " ".join(text.split())), width - 4
    for size in (14, 13, 12, 11, 10, 9):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= room:
            break
    while text and font.getlength(text) > room:
        text = text.rstrip("…")[:-1] + "…" if len(text) > 2 else ""
    ImageDraw.Draw(strip).text((2, height // 2), text, "black", font, anchor="lm")
    return np.asarray(strip)


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------

MOST_PIXELS = 1 << 26  # of an image; a small file may hold more than memory does
Image.MAX_IMAGE_PIXELS = None  # PIL would warn at more, and go on
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}  # by EXIF orientation


def open_image(path: str | Path, use: Callable[[Image.Image, int], Any]) -> Any:
    """use(image, its EXIF orientation). Raises FileNotFoundError, or ValueError naming the file."""
    path = Path(path)
    try:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width}×{image.height} pixels; wanted "
                                 f"{MOST_PIXELS} at most: make it smaller")
            return use(image, image.getexif().get(0x0112, 1))
    except FileNotFoundError:
        raise
    except Exception as error:  # PIL has many kinds for a broken file
        raise ValueError(f"{str(path):.200} cannot be read as an image ({error}); wanted "
                         f"{', '.join(FORMATS)}: save it anew") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image as a person sees it, without decoding it."""
    width, height = open_image(path, lambda image, turn: image.size[::-1 if turn in (5, 6, 7, 8)
                                                                    else 1])
    return height, width


def decode_image(path: str | Path) -> np.ndarray:
    """uint8 [H, W, 3] of an image as a person sees it.

    It is turned as its EXIF orientation says; grey becomes RGB; what is transparent shows white; of
    several frames the first counts. Raises FileNotFoundError, or ValueError if it is broken.
    """
    def pixels(image: Image.Image, turn: int) -> np.ndarray:
        if image.mode == "F":
            raise ValueError("it holds floating-point numbers of unknown range")
        if image.mode.startswith("I"):  # more than 8 bits of grey, which PIL would clip at 255
            grey, white = np.asarray(image).astype(np.float64), 65535
            if image.format == "TIFF":  # which may hold 12 bits in 16, or 32: the least that fit
                white = (1 << max(8, int(grey.max()).bit_length())) - 1
            image = Image.fromarray((grey * 255 / white).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        return np.array(image.transpose(Image.Transpose[TURNS[turn]]) if turn in TURNS else image)

    return open_image(path, pixels)


def read_image(path: str | Path) -> Tensor:
    """An image as decode_image has it, float [3, H, W] in [-1, 1]."""
    return torch.from_numpy(decode_image(path)).permute(2, 0, 1).float() / 127.5 - 1


def write_image(path: str | Path, image: Tensor) -> None:
    """Write an image [3, H, W] in [-1, 1] as a PNG. Raises ValueError if it cannot be written."""
    pixels = Image.fromarray(to_uint8(image.unsqueeze(1))[0])
    replace_file(path, lambda aside: pixels.save(aside, "PNG"))


def centre_crop(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of an image [3, h, w] in the shape height : width, as much of it as there is."""
    h, w = image.shape[1:]
    rows = min(h, max(1, round(w * height / width)))
    columns = min(w, max(1, round(h * width / height)))
    top, left = (h - rows) // 2, (w - columns) // 2
    return image[:, top:top + rows, left:left + columns]
