"""Files for people to look at: videos, curves, images; and images as input.

Shapes: video float [3, T, H, W] in [-1, 1], or frames uint8 [T, H, W, 3]; image [3, H, W].
"""

import re
import subprocess
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.files import error_summary, replace_file

# ------------------------------------------------------------------------------------- video files

def to_uint8(video: Tensor | np.ndarray) -> np.ndarray:
    """uint8 frames [T, H, W, 3] of a video: float [3, T, H, W] in [-1, 1], clipped, or such frames.

    Values are rounded, so that reading frames from a file and writing them changes nothing.
    Raises ValueError on non-finite values.
    """
    video = torch.as_tensor(video)
    if video.dtype != torch.uint8:
        if not torch.isfinite(video).all():
            raise ValueError("the video contains NaN or infinity: check the weights file")
        video = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
        video = video.permute(1, 2, 3, 0)
    return np.ascontiguousarray(video.cpu().numpy())


def run_ffmpeg(*arguments: str, pixels: bytes = b"") -> bytes:
    """What ffmpeg prints, given pixels as its input. Raises OSError with its first complaint."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", *arguments]
    done = subprocess.run(command, input=pixels, capture_output=True, check=False)
    if done.returncode:
        complaint = re.sub(r"\[[^]]*\] *", "", done.stderr.decode(errors="replace")).strip()
        raise OSError(complaint.partition("\n")[0] or f"it ended with status {done.returncode}")
    return done.stdout


def decode_video(path: Path, *output: str) -> bytes:
    """What ffmpeg prints of a video's frames by its options `output`. Raises OSError for half a
    file too. A playlist can open no other file; no frame is dropped or repeated."""
    decoded = run_ffmpeg("-protocol_whitelist", "file,pipe", "-err_detect", "explode", "-i",
                         f"file:{path}", "-map", "0:v:0", "-fps_mode", "passthrough", *output, "-")
    if not decoded:
        raise OSError("it contains no frame")
    return decoded


def read_frames(path: Path, indices: Iterable[int] | None = None) -> np.ndarray:
    """Frames of a video file, uint8 [T, H, W, 3]: all, or those of increasing indices.

    Raises OSError if it cannot be decoded to its end.
    """
    select = [] if indices is None else [
        "-vf", f"select='{'+'.join(f'eq(n,{index})' for index in indices)}'"]
    pixels = decode_video(path, *select, "-f", "image2pipe", "-c:v", "ppm")
    header = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", pixels)  # before each frame's pixels
    width, height = map(int, header.groups())
    frames = np.frombuffer(pixels, np.uint8).reshape(-1, header.end() + 3 * height * width)
    return frames[:, header.end():].reshape(-1, height, width, 3).copy()


def write_video(path: str | Path, video: Tensor | np.ndarray, fps: float,
                seconds: float = 0) -> None:
    """Write a video as .mp4 (H.264) or looping .gif; the same frames give the same bytes.

    Args: video, float [3, T, H, W] in [-1, 1] or uint8 [T, H, W, 3]; seconds, the duration to reach
    by repeating the frames, rounded, since players stop at the end of an .mp4. An odd height or
    width of an .mp4 grows by one repeated row or column, since 4:2:0 colour needs even sizes.
    Raises ValueError on a bad video, or if the file cannot be written.
    """
    frames, mp4 = to_uint8(video), Path(path).suffix == ".mp4"
    frames = np.concatenate([frames] * max(1, round(seconds * fps / len(frames))))
    if mp4:
        frames = np.pad(frames, [(0, 0), *((0, n % 2) for n in frames.shape[1:3]), (0, 0)], "edge")
        # Converted to BT.709 and tagged so, or a player shows other colours. ffmpeg 8 and newer
        # leaves out the primaries and the transfer, which only x264 itself still writes.
        flags = ("-c:v libx264 -pix_fmt yuv420p -crf 14 -movflags +faststart "
                 "-vf scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd -colorspace "
                 "bt709 -x264-params colorprim=bt709:transfer=bt709:colormatrix=bt709")
    else:
        flags = ("-c:v gif -pix_fmt pal8 -loop 0 -vf "
                 "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=bayer:bayer_scale=4")
    size, rate = f"{frames.shape[2]}x{frames.shape[1]}", Fraction(fps).limit_denominator()
    # One thread and bitexact: bytes that do not depend on the machine's cores.
    replace_file(path, lambda aside: run_ffmpeg(
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(rate), "-i", "-",
        *flags.split(), "-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact",
        f"file:{aside}", pixels=frames.tobytes()))


def check_ffmpeg() -> None:
    """Encode a small video, so that a missing or unsuitable ffmpeg is reported before hours of
    sampling. Raises ValueError."""
    try:
        run_ffmpeg(*"-f rawvideo -pix_fmt rgb24 -s 16x16 -i - -c:v libx264 -f null -".split(),
                   pixels=bytes(16 * 16 * 3))
    except (OSError, RuntimeError) as e:  # imageio-ffmpeg raises the last
        raise ValueError(f"ffmpeg: cannot write a video ({error_summary(e)}): install imageio-"
                         "ffmpeg again, or set IMAGEIO_FFMPEG_EXE to one with libx264") from e


# ------------------------------------------------------------------------------------ curves

def draw_panels(path: Path, panels: dict[str, list[tuple]], x: str, linear: tuple[str, ...] = (),
                colours: int = 10) -> None:
    """Draw the curves of a log as one PNG of panels, two per row.

    Args: panels, {title: [(key, label or None, log lines, line style), …]}; x, the key on the
    horizontal axis; linear, starts of the titles whose vertical axis is linear, not logarithmic;
    colours, the number of curves in a panel whose colours the curves without a label repeat.
    """
    from matplotlib.figure import Figure

    rows = (len(panels) + 1) // 2
    fig = Figure(figsize=(12, 3.5 * rows))  # a computed layout would draw all panels twice
    fig.subplots_adjust(0.065, 0.143 / rows, 0.985, 1 - 0.114 / rows, wspace=0.15, hspace=0.4)
    axes = fig.subplots(rows, 2, squeeze=False)
    for ax, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, label, lines, style) in enumerate(curves):
            if points := [(line[x], line[name]) for line in lines if name in line]:
                ax.plot(*zip(*points, strict=True), style, lw=1, label=label,
                        color=f"C{i if label else i % colours}")
        ax.set(title=title, xlabel=x, yscale="linear" if title.startswith(linear) else "log")
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8)
    replace_file(path, lambda aside: fig.savefig(aside, dpi=90, format="png"))


# -------------------------------------------------------------------------------------- images

MAX_PIXELS = 1 << 26  # of an image: a small file may decode to more than the memory
Image.MAX_IMAGE_PIXELS = None  # PIL would only warn
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def decode_image(path: str | Path) -> np.ndarray:
    """uint8 [H, W, 3] of an image as a person sees it.

    It is turned by its EXIF orientation; grey becomes RGB; transparent parts become white; of
    several frames the first is used. Raises FileNotFoundError, or ValueError if it is broken.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such image")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels are more than {MAX_PIXELS}: "
                                 "make it smaller")
            if image.mode.startswith(("I", "F")):  # whose white is not known
                raise ValueError("it has more than 8 bits of grey: convert it to 8 bits")
            image.getexif()  # cached; without the raw tags exif_transpose accepts broken ones
            image.info.pop("exif", None)
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except Exception as e:  # PIL raises many types for a broken file
        raise ValueError(f"{path} cannot be read as an image ({e}): save it again as "
                         f"{' or '.join(FORMATS)}") from e


def read_image(path: str | Path) -> Tensor:
    """An image as decode_image returns it, float [3, H, W] in [-1, 1]."""
    return torch.from_numpy(decode_image(path)).permute(2, 0, 1).float() / 127.5 - 1


def write_image(path: str | Path, image: Tensor | np.ndarray) -> None:
    """Write an image, [3, H, W] in [-1, 1] or uint8 [H, W, 3], as a PNG. Raises ValueError if it
    cannot be written."""
    pixels = Image.fromarray(to_uint8(image.unsqueeze(1))[0] if torch.is_tensor(image) else image)
    replace_file(path, lambda aside: pixels.save(aside, "PNG"))


def centre_crop(image: Tensor, height: int, width: int) -> Tensor:
    """The largest centred part of an image [3, h, w] with aspect ratio height : width."""
    h, w = image.shape[1:]
    rows = min(h, max(1, round(w * height / width)))
    columns = min(w, max(1, round(h * width / height)))
    top, left = (h - rows) // 2, (w - columns) // 2
    return image[:, top:top + rows, left:left + columns]
