"""Stage 3: prompts to videos, by the distilled student (m steps) or by the teacher (n steps).

    python sample.py [CONFIG] --prompt "…" [--image photo.jpg] [--count 4] [--seed 7] [--teacher]
    torchrun --nproc-per-node 8 sample.py CONFIG --prompt_file prompts.txt  # rerun to resume
    python sample.py --how student.safetensors      # print its settings for other programs

In:  the weight folder `weights` (text encoder and VAE; the DiT for --teacher and --lora), and
     the student that distill.py wrote, <run>/student.safetensors.
Out: in <run>/samples or --out, where <who> is student5, teacher50, lora5, teacher50_unipc, …:
     <who>/*.mp4, named by prompt and seed; <who>.jsonl, a line for each finished video: prompt,
     file, seconds.
"""

import common  # noqa: F401 (before torch, see common)
import itertools
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from tqdm import tqdm

from artifacts.student import exported_path, how_to_use, load_student, student_facts
from artifacts.videos import Video, finished_videos, list_videos, speed_text, video_settings
from common.config import Shared, announce, field, load_config
from common.files import append_log, crc32_of_json
from common.ranks import (
    Ranks, Timer, cli, compile_blocks, draw_noise, gather_values, lock_run_folder,
    on_first_rank, progress_bar, setup_distributed)
from common.video import check_ffmpeg, write_video
from frozen.load import encode_prompts, load_vae
from frozen.unipc import sample_batch, unipc_grid
from model import check_model, latent_shape, load_dit, time_grid


# ---------------------------------------------------------------- sampling: Eq. 5, batch by batch

@torch.no_grad()
def sample_videos(cfg: "Config", videos: list[Video], times: list[float], settings: str,
                  record: Path, ranks: Ranks) -> dict[str, Any]:
    """Sample this rank's videos: noise x at t = 1, x ← x + (t_next − t)·v(x, t) along `times` down
    to the data at t = 0 (Eq. 5, or a step of UniPC), decoded by the VAE.

    Args: settings, the checksum of `video_settings`; record, the file that gets a line for each
    finished video. Returns {"seconds": by phase, "videos": those lines, "peak_bytes"}.
    """
    device, timer, lines = ranks.device, Timer(ranks.device), []
    conds, unconds = encode_prompts(cfg, [v.prompt for v in videos],
                                    [(v.height, v.width) for v in videos], False, device, timer)
    dit, vae = load_networks(cfg, ranks)
    timer.lap("load")
    bar = progress_bar(len(videos) * (len(times) - 1), record.stem, ranks.rank, unit="step")
    for part in batches(videos, cfg.batch):
        batch = videos[part]
        shape = latent_shape(cfg.frames, batch[0].height, batch[0].width)
        noise = draw_noise(shape, [("sample", v.seed, v.index, v.prompt.text) for v in batch])
        timer.lap("noise")
        if cfg.compile and part.start == 0:  # timed separately; another shape is compiled again
            sample_batch(dit, noise, times[:2], conds[part], None, 1.0, Timer(device),
                         tqdm(disable=True), cfg.solver)
            timer.lap("compile")
        timer.laps()
        x = sample_batch(dit, noise, times, conds[part], unconds and unconds[part], cfg.guidance,
                         timer, bar, cfg.solver)                                    # B C T H W
        steps = timer.laps()
        for video, latents in zip(batch, x, strict=True):
            if not (ranks.is_writer or vae.tiled):  # the ranks of a replica share the tiles
                continue
            pixels = vae.decode(latents[None])[0]                                   # 3 T H W
            if not ranks.is_writer:
                continue
            timer.lap("decode")
            write_video(record.parent / video.file, pixels, cfg.fps)
            timer.lap("save")
            seconds = dict(zip(("decode", "save"), timer.laps()[-2:], strict=True))
            lines.append({**video._asdict(), "prompt": video.prompt.text,
                          "image": video.prompt.image and str(video.prompt.image),
                          "bytes": (record.parent / video.file).stat().st_size,
                          "settings": settings,
                          "evaluations": len(steps) * (1 if unconds is None else 2),
                          "seconds": {"steps": [s / len(batch) for s in steps], **seconds}})
            append_log(record, lines[-1])
    bar.close()
    return {"seconds": timer.seconds(), "videos": lines, "peak_bytes": peak_bytes(device)}


def batches(videos: list[Video], size: int) -> Iterator[slice]:
    """Slices of at most `size` consecutive videos of one height and width."""
    start = 0
    for _, group in itertools.groupby(videos, lambda video: (video.height, video.width)):
        stop = start + len(list(group))
        yield from (slice(a, min(a + size, stop)) for a in range(start, stop, size))
        start = stop


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has used: of its GPU if it has one, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------------------------- settings

@dataclass
class Config(Shared):
    """Settings of a sampling run."""
    prompt: str = field("", "one prompt; it takes precedence over prompt_file")
    prompt_file: str | None = field(None, "file of prompts (.txt, .csv, .json, .jsonl); with "
                                    'images its lines are {"prompt": "…", "image": "photo.jpg"}')
    image: str | None = field(None, "first frame for an image-to-video model, with --prompt; the "
                              "video has its aspect ratio and about the config's area")
    teacher: bool = field(False, "sample the teacher, along its grid, instead of the student")
    student: str | None = field(None, "a student's file or folder, sampled at its own times, "
                                "without guidance; none: <run>/student.safetensors")
    lora: str | None = field(None, "any LoRA that makes the DiT of `weights` a student")
    lora_scale: float = field(1.0, "factor of the LoRA's change")
    how: str | None = field(None, "a student's file: print how other programs run it, and exit")
    steps: int | None = field(None, "steps of the teacher's grid; none: n", "[1, 10000]")
    solver: Literal["euler", "unipc"] = field("euler", "unipc is for Wan alone and has its own "
                                              "times, which are not a student's key timesteps")
    count: int = field(1, "videos per prompt, with seeds seed, seed + 1, …", "[1, 100000]")
    batch: int = field(1, "videos denoised at once", "[1, 10000]")
    compile: bool = field(False, "torch.compile every block: takes minutes, timed separately")
    out: str | None = field(None, "folder for the videos; none: <run>/samples")
    sp: int = field(1, "ranks that share each sample's tokens (Ulysses), the DiT's weights and the "
                    "tiles of HunyuanVideo's VAE", "[1, inf)")


def check_options(cfg: Config) -> None:
    """Raise ValueError for settings that cannot be sampled."""
    if cfg.teacher and cfg.student is not None:
        raise ValueError(f"got both --teacher and --student {cfg.student}: give one of them")
    if cfg.lora is not None and (cfg.teacher or cfg.student is not None):
        raise ValueError(f"lora: got {cfg.lora} together with --teacher or --student; a LoRA "
                         "changes the DiT of `weights`: leave the other option out")
    if cfg.lora is None and cfg.lora_scale != 1:
        raise ValueError(f"lora_scale: got {cfg.lora_scale} without a LoRA: give --lora FILE, or "
                         "leave it out")
    if cfg.solver == "unipc" and cfg.family != "wan":
        raise ValueError(f"solver: expected euler for family {cfg.family}, got unipc, which is for "
                         "wan alone: leave --solver out")


def drop_guidance(cfg: Config) -> None:
    """Reset guidance settings that have no effect, so that file names do not depend on them, and
    print which ones were given."""
    none = {"cfg_scale": 1.0, "cfg_scale_low": None, "negative_prompt": ""}
    given = [name for name, value in none.items() if getattr(cfg, name) != value]
    if (cfg.teacher and cfg.guidance != 1) or not given:
        return
    vars(cfg).update(none)
    why = "at cfg_scale 1" if cfg.teacher else "for a student, which has guidance built in"
    if os.environ.get("RANK", "0") == "0":
        print(f"{', '.join(given)}: no effect {why}")


# --------------------------------------------------------------------------- times and networks

def student_path(cfg: Config) -> Path:
    """The file of the config's student: a complete DiT, or a LoRA for the DiT of `weights`."""
    return Path(cfg.lora or cfg.student or exported_path(cfg))


def sampling_times(cfg: Config, takes_image: bool) -> list[float]:
    """The times to sample along, falling to 0; the student's file is checked here.

    Euler takes the teacher's grid or a student's key timesteps. UniPC takes a grid of its own with
    as many steps: Wan's for the teacher, that of AccVideo's published command for a student.
    """
    unipc, n = cfg.solver == "unipc", cfg.steps or cfg.n
    if cfg.teacher:
        grid = unipc_grid(n, cfg.shift) if unipc else time_grid(cfg.family, n, cfg.shift)
        return grid.tolist()
    facts = student_facts(student_path(cfg), cfg, foreign=bool(cfg.student or cfg.lora))
    times = facts["t_key"]
    other = [f"{name} {getattr(cfg, name)}" for name in ("n", "shift", "key")
             if facts.get(name) not in (None, getattr(cfg, name))]
    if other and os.environ.get("RANK", "0") == "0":
        print(f"{student_path(cfg)} is sampled at its own times, not by the config's "
              f"{', '.join(other)}")
    if cfg.steps not in (None, len(times) - 1):
        raise ValueError(f"steps: got {cfg.steps}; {student_path(cfg)} was distilled for "
                         f"{len(times) - 1} steps: leave --steps out, or distill with another key")
    if not unipc:
        return times
    return unipc_grid(len(times) - 1, facts["shift"], twice=not takes_image).tolist()


def load_networks(cfg: Config, ranks: Ranks) -> tuple[nn.Module, nn.Module]:
    """The frozen DiT (the teacher, or the student, which may be a LoRA) and the VAE."""
    dtype, shards = ranks.dtype, ranks.sp_ranks
    if cfg.teacher:
        dit = load_dit(cfg.weights, cfg.preset, dtype, ranks.device, shards).requires_grad_(False)
    else:
        dit = load_student(cfg, student_path(cfg), ranks.device, shards, cfg.lora_scale)
    if cfg.compile:
        compile_blocks(dit)
    vae = load_vae(cfg.weights, ranks.device, dtype, cfg.family)
    if vae.tiled:
        vae.group = ranks.sp_group
    return dit, vae


def main(argv: list[str] | None = None) -> None:
    """Check settings and files, sample each rank's part of the missing videos, report."""
    cfg = load_config(Config, "sample", argv, __doc__)
    if cfg.how is not None:
        return print(how_to_use(Path(cfg.how)))
    sizes = check_model(cfg)
    check_options(cfg)
    drop_guidance(cfg)
    times = sampling_times(cfg, sizes.takes_image)
    who = f"{'teacher' if cfg.teacher else 'lora' if cfg.lora else 'student'}{len(times) - 1}"
    who = who if cfg.solver == "euler" else f"{who}_{cfg.solver}"
    dit = cfg.weights if cfg.teacher or cfg.lora else student_path(cfg)
    settings = video_settings(cfg, who, dit, times)
    checksum = crc32_of_json(settings)
    videos = list_videos(cfg, who, checksum)
    check_ffmpeg()
    ranks = setup_distributed(
        cfg, cfg.sp, sizes.num_heads, **settings,
        videos=crc32_of_json([(v.file, v.seed, v.prompt.text) for v in videos]))
    announce(cfg, "samples", ranks.rank)
    out = Path(cfg.out or Path(cfg.run) / "samples")
    record = out / f"{who}.jsonl"
    with lock_run_folder(out / f".{who}"):  # <who> holds videos alone, as VBench needs it
        finished = on_first_rank(lambda: finished_videos(record, videos, settings))
        missing = [v for v in videos if v.file not in finished][ranks.dp_rank::ranks.dp_size]
        made = sample_videos(cfg, missing, times, checksum, record, ranks) if missing else None
        results = gather_values(made if ranks.is_writer else None)
    if ranks.rank == 0:
        if results := [result for result in results if result is not None]:
            print(speed_text(results))
        print(f"{len(videos) - len(finished)} of {len(videos)} videos were made now; see "
              f"{out / videos[0].file} and {record} (prompts, files, seconds)")


if __name__ == "__main__":
    cli(main)
