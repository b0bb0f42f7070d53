"""The videos of a sample.py command: prompts, file names, their record.

<who>/<slug>_<checksum>_seed<seed>.mp4   a video; the checksum covers all that it is made from
<who>.jsonl                              the record: a line for each finished video, and one for
                                         each set of settings, which the others name by checksum
FILE.jsonl                               a prompt file whose lines give prompt, seed and file name,
                                         as `python -m tools.vbench` writes it
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from common.files import (
    append_log, crc32_of_file, crc32_of_json, parse_json, read_log, read_text, remove_leftovers)
from common.names import fingerprint, fingerprint_files
from common.prompts import LARGEST, Prompt, heldout_prompts, read_prompts
from common.video import decode_image
from model import sizes_of

# The bytes of a file name that leave room for what replace_file adds while it writes.
NAME_BYTES = 255 - len(".." + "4194304-01234567" + ".part.mp4")


class Video(NamedTuple):
    """One video to make."""
    index: int                                    # of its prompt
    prompt: Prompt
    seed: int
    height: int                                   # pixels
    width: int
    file: str                                     # relative to the record's folder
    image_checksum: str | None = None             # of the file of the prompt's image


def video_name(index: int, text: str, image: str | None, seed: int, settings: str) -> str:
    """The name of a video's file; with another prompt, image or settings it is another one.

    Args: index, of the prompt, by which its noise is drawn; image and settings, checksums of the
    prompt's image and of all other settings.
    """
    slug = re.sub(r"\W+", "-", text.lower())[:40].strip("-") or "video"
    return f"{slug}_{crc32_of_json([settings, index, text, image])}_seed{seed}.mp4"


# ------------------------------------------------------------------ prompt files that name videos

def name_error(name: str) -> str:
    """Why a text cannot be the name of a video's file; "" if it can."""
    if "/" in name or "\0" in name or not name.endswith(".mp4"):
        return "a slash or NUL in it, or no .mp4 at its end"
    size = len(name.encode(errors="replace"))
    return f"{size} bytes, more than {NAME_BYTES}" if size > NAME_BYTES else ""


def read_named_videos(path: Path) -> list[dict[str, Any]]:
    """Seed and file of each prompt of a file whose first line has both; [] for other prompt files.

    Raises ValueError for another line without either, and for a name that is unusable or repeated.
    """
    text = read_text(path, LARGEST) if path.suffix == ".jsonl" else ""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines or '"file":' not in lines[0] or '"seed":' not in lines[0]:
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


# ------------------------------------------------------------------------- the videos of a command

def collect_prompts(cfg: Any) -> list[Prompt]:
    """The prompt of --prompt with --image, or else those of prompt_file.

    Raises ValueError if there is neither, or if an image is missing, broken or not used.
    """
    images = sizes_of(cfg.preset).takes_image
    if cfg.image is not None and (not images or not cfg.prompt.strip()):
        why = "needs --prompt" if images else f"is not read: preset {cfg.preset} takes none"
        raise ValueError(f"image: got {cfg.image}; it {why}")
    if cfg.prompt.strip():
        if images and cfg.image is None:
            raise ValueError(f"image: got none; preset {cfg.preset} starts from one: give --image "
                             "photo.jpg")
        if images:
            decode_image(cfg.image)  # a broken image is reported before networks are loaded
        return [Prompt(cfg.prompt.strip(), Path(cfg.image) if images else None)]
    if cfg.prompt_file is not None:
        return read_prompts(cfg.prompt_file, images)
    shipped = heldout_prompts(cfg.weights, images)
    hint = f", as --prompt_file {shipped}" if shipped.exists() else ""
    raise ValueError(f'prompt: got none; give --prompt "…" or --prompt_file FILE{hint}')


def list_videos(cfg: Any, who: str, settings: str) -> list[Video]:
    """All videos of a run, each with a file name of its own.

    A prompt file of tools.vbench gives names and seeds; all its prompts draw the noise of index 0.
    """
    prompts = collect_prompts(cfg)
    named = [] if cfg.prompt.strip() else read_named_videos(Path(cfg.prompt_file))
    if named and cfg.count != 1:
        raise ValueError(f"count: got {cfg.count}; {cfg.prompt_file} names each video: leave "
                         "--count out")
    images = {None: (None, cfg.height, cfg.width)} | {
        image: (crc32_of_file(image),
                *fit_size(*decode_image(image).shape[:2], cfg.height * cfg.width))
        for image in dict.fromkeys(p.image for p in prompts if p.image)}  # each is read once
    videos = []
    for i, prompt in enumerate(prompts):
        checksum, *size = images[prompt.image]
        if named:
            seed, name = named[i]["seed"], named[i]["file"]
            videos.append(Video(0, prompt, seed, *size, f"{who}/{name}", checksum))
            continue
        for seed in range(cfg.seed, cfg.seed + cfg.count):
            name = video_name(i, prompt.text, checksum, seed, settings)
            videos.append(Video(i, prompt, seed, *size, f"{who}/{name}", checksum))
    return videos


def fit_size(height: int, width: int, area: int) -> tuple[int, int]:
    """Height and width, multiples of 16, of about `area` pixels in an image's shape. Wan 2.1."""
    sides = math.isqrt(area * height // width), math.isqrt(area * width // height)  # exact
    h, w = (min(max(side // 16 * 16, 16), max(area // 256 * 16, 16)) for side in sides)
    return h, w


# -------------------------------------------------------------------------------- the record

def video_settings(cfg: Any, who: str, dit: str | Path, times: list[float]) -> dict[str, Any]:
    """What all videos of a run share: identities of the networks, and settings that change videos.

    Args: dit, the folder or file of the DiT that is sampled, without its LoRA.
    """
    lora = {} if cfg.lora is None else {"lora": fingerprint_files(cfg.lora),
                                        "lora_scale": cfg.lora_scale}
    names = ("solver", "height", "width", "frames", "negative_prompt", "embedded_guidance")
    return {"who": who, "dit": fingerprint(dit), **lora, "encoders": fingerprint_files(cfg.weights),
            "times": times, "fps": float(cfg.fps), "cfg_scale": cfg.guidance,
            **{name: getattr(cfg, name) for name in names}}


def finished_videos(record: Path, videos: list[Video], settings: dict[str, Any]) -> set[str]:
    """The files of those videos that exist with their recorded size.

    Args: settings, what all of them share: JSON values; their line is added to the record. Files
    that killed processes left half-written are removed.
    Raises ValueError naming a file that was made from another prompt, image, seed or setting.
    """
    remove_leftovers(record.with_suffix(""))
    lines, checksum, finished = read_log(record), crc32_of_json(settings), set()
    stored = {line.get("settings"): line["values"] for line in lines if "values" in line}
    recorded = {line["file"]: line for line in lines if "file" in line}
    if checksum not in stored:
        append_log(record, {"settings": checksum, "values": settings})
    for video in videos:
        path, line = record.parent / video.file, recorded.get(video.file)
        if line is None or not path.exists() or path.stat().st_size != line.get("bytes"):
            continue
        # Earlier versions recorded no checksum of the image.
        before = {"image_checksum": video.image_checksum, **line,
                  **stored.get(line.get("settings"), {})}
        now = {"prompt": video.prompt.text, "image_checksum": video.image_checksum,
               "seed": video.seed, **settings}
        for key, value in now.items():
            if before.get(key) != value:
                raise ValueError(f"{path}: was made with {key} {before.get(key)!r:.200}, got "
                                 f"{value!r:.200}: use what it was made with, or another --out")
        finished.add(video.file)
    return finished


def speed_text(results: list[dict]) -> str:
    """Seconds of the slowest process by phase, and the most memory of one, in what
    sample.sample_videos returned on each rank."""
    videos = [video for result in results for video in result["videos"]]
    slowest = max(results, key=lambda result: sum(result["seconds"].values()))
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in slowest["seconds"].items())
    peak = max(result["peak_bytes"] for result in results) / 2 ** 30
    return (f"{len(videos)} videos, {videos[0]['evaluations']} evaluations per video; the slowest "
            f"process: {phases} for {len(slowest['videos'])} videos; peak memory {peak:.2f} GiB")
