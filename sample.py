"""Stage 3: prompts to videos, by the distilled student (m steps) or by the teacher (n steps).

    python sample.py [CONFIG] --prompt "…" [--image photo.jpg] [--count 4] [--seed 7] [--teacher]
    torchrun --nproc-per-node 8 sample.py CONFIG --prompt_file prompts.txt
    python sample.py [CONFIG] --prompt "…" --lora FILE [--lora_scale 1.0]
    torchrun … sample.py CONFIG --vbench all_dimension.txt     # VBench's videos; resumes
    python sample.py --how student.safetensors                 # its settings in other programs

In:   the weight folder `weights` (text encoder, VAE, and the DiT with --teacher), and the student
      that distill.py wrote, <run>/student.safetensors.
Out:  <run>/samples (or --out): an .mp4 for each prompt and seed, a contact sheet and a .json with
      prompts, seeds, files and seconds; names begin with who and steps: student5_, teacher50_,
      teacher50_unipc_ by that solver, and lora5_ with --lora.
Cost: small world: 1 s and 10 ms a student's video; the table it prints says it for any model.

The student walks its own key timesteps, stored in its file, without guidance: that is built in.
The teacher walks its grid of `n` steps, or with --steps its own grid of so many steps (evaluate.py
compares at the student's key timesteps instead). Noise is a function of (seed, prompt's number,
prompt), so the same seed gives student and teacher the same noise. Under torchrun every rank takes
its part of the videos; with --sp N, N ranks share each video's tokens, the DiT's weights and the
tiles of HunyuanVideo's VAE.

--lora FILE puts a LoRA, ours or another program's, on the DiT of `weights` and walks it as a
student: the key timesteps that its file tells, or else the config's, without guidance.

--solver unipc, for Wan, walks another grid: it asks teacher and student at whole thousandths, a
student of m steps not at its key timesteps but at the m times of AccVideo's published command.

An image-to-video model starts from --image, or from the images that a prompt file pairs with its
prompts. A video then has about the config's area in the shape of its image.

--vbench writes <run>/vbench/<who>, a flat folder as VBench reads it (common/vbench.py), and beside
it <who>.record: videos.json with prompt and seed of each, sheet.png. A finished video is not made
again. The videos score by `vbench evaluate` and `python evaluate.py --vbench_scores`.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from artifacts.lora import changes
from artifacts.student import how_to_use, load_student, student_facts
from common.config import Shared, announce, field, load_config, settings_to_compare
from common.files import write_json
from common.names import dit_tensors, fingerprint, fingerprint_files
from common.prompts import Prompt, digest_texts, heldout_prompts, read_prompts
from common.ranks import (
    Ranks, Timer, cli, compile_blocks, compute_dtype, device_name, draw_noise, on_first_rank, lock_run_folder,
    peak_bytes, prefer_attention, setup_distributed)
from common.video import contact_sheet, decode_image, image_size, read_video, thumbnail, write_video
from frozen.image import fit_size
from frozen.load import encode_prompts, load_vae
from frozen.unipc import sample_batch, unipc_grid
from model import (
    build_dit, check_model, latent_shape, load_dit, sizes_of, time_grid)
from tools.vbench import VIDEOS, Video, open_record, record_folder, wanted_videos



@dataclass
class Config(Shared):
    """Settings of a sampling run."""
    prompt: str = field("", "one prompt; it goes before prompt_file")
    prompt_file: str | None = field(None, "text, a prompt a line, or any form of "
                                    'common/prompts.py; for I2V with images, as .jsonl of lines '
                                    '{"prompt": "…", "image": "photo.jpg"}')
    image: str | None = field(None, "first frame of an image-to-video model, beside --prompt")
    teacher: bool = field(False, "sample the teacher instead of the student")
    student: str | None = field(None, "the student's file or folder; none: "
                               "<run>/student.safetensors")
    lora: str | None = field(None, "file of a LoRA that makes the DiT of `weights` a student")
    lora_scale: float = field(1.0, "what all of it is multiplied by")
    how: str | None = field(None, "a student's file: print how other programs run it, and end")
    steps: int | None = field(None, "the teacher's steps, on its grid of so many; none: n",
                              "[1, 10000]")
    solver: Literal["euler", "unipc"] = field("euler", "unipc, for Wan, walks other times "
                                              "than a student's key timesteps; see above")
    count: int = field(1, "videos a prompt, with seeds seed, seed + 1, …", "[1, 100000]")
    vbench: str | None = field(None, "VBench's all_dimension.txt: its videos instead, 5 a prompt")
    vbench_prompts: str | None = field(None, "augmented prompts for them, line by line; names stay")
    vbench_flickering: str | None = field(None, "VBench's temporal_flickering.txt: 25 videos each")
    batch: int = field(1, "videos denoised at once", "[1, 10000]")
    peak_tflops: float | None = field(None, "device's dense peak for MFU, as 989; none: no MFU",
                                      "(0, inf)")
    compile: bool = field(False, "torch.compile every block; minutes, counted apart")
    out: str | None = field(None, "folder for the videos; none: <run>/samples, <run>/vbench/<who>")
    sp: int = field(1, "ranks that share each sample's tokens (Ulysses) and the DiT's weights",
                    "[1, inf)")
SHEET_ROWS = 12  # videos shown on the contact sheet, the first ones


def check_config(cfg: Config) -> None:
    """Raise ValueError for settings that cannot be sampled."""
    if cfg.teacher and cfg.student is not None:
        raise ValueError(f"got both --teacher and --student {cfg.student}: give one of them")
    if cfg.lora is not None and (cfg.teacher or cfg.student is not None):
        raise ValueError(f"lora: got {cfg.lora} beside --teacher or --student; it goes on the DiT "
                         "of `weights` alone: leave the other out")
    if cfg.lora is not None and not Path(cfg.lora).is_file():
        raise FileNotFoundError(f"lora: {cfg.lora}: no such file; make one of a student by `python "
                                "lora.py CONFIG`, or give another program's")
    if cfg.solver == "unipc" and cfg.family != "wan":
        raise ValueError(f"solver: got unipc; family {cfg.family} has no grid for it, wan has: "
                         "leave --solver out")
    for key in ("vbench_prompts", "vbench_flickering"):
        if cfg.vbench is None and getattr(cfg, key) is not None:
            raise ValueError(f"{key}: got {getattr(cfg, key)} without --vbench all_dimension.txt")
    if cfg.vbench is not None and (cfg.prompt.strip() or cfg.count != 1):
        raise ValueError("vbench: got --prompt or --count beside it; wanted neither: VBench says "
                         "which prompts and how many videos")
    if cfg.vbench is not None and sizes_of(cfg.preset).takes_image:
        raise ValueError(f"vbench: got preset {cfg.preset}, which starts from images; wanted a "
                         "text-to-video model, for which VBench's prompts are")


def wanted_prompts(cfg: Config) -> list[Prompt]:
    """The prompt of --prompt with --image, or else those of prompt_file.

    Raises ValueError if there is neither, or an image is missing, broken or not wanted.
    """
    images = sizes_of(cfg.preset).takes_image
    if cfg.image is not None and (not images or not cfg.prompt.strip()):
        why = "goes with --prompt" if images else f"is not read: preset {cfg.preset} takes none"
        raise ValueError(f"image: got {cfg.image}; it {why}")
    if cfg.prompt.strip():
        if images and cfg.image is None:
            raise ValueError(f"image: got none; preset {cfg.preset} starts from one: give --image "
                             "photo.jpg")
        if images:
            decode_image(cfg.image)  # a broken one is told before networks are loaded
        return [Prompt(cfg.prompt.strip(), Path(cfg.image) if images else None)]
    if cfg.prompt_file is not None:
        return read_prompts(cfg.prompt_file, images)
    own = heldout_prompts(cfg.weights, images)
    hint = f", as --prompt_file {own}" if own.exists() else ""
    raise ValueError(f'prompt: got none; give --prompt "…" or --prompt_file FILE{hint}')


class Job(NamedTuple):
    """One video to make."""
    index: int                                    # of its prompt
    prompt: Prompt
    seed: int
    height: int                                   # pixels
    width: int
    file: str | None = None                       # its name; none: who, index and seed


def make_jobs(cfg: Config) -> list[Job]:
    """All videos of a run; one with an image has about the config's area in the image's shape."""
    if cfg.vbench is not None:
        return [Job(0, Prompt(video.made_from), video.seed, cfg.height, cfg.width, video.file)
                for video in vbench_videos(cfg)]
    jobs = []
    for i, prompt in enumerate(wanted_prompts(cfg)):
        size = cfg.height, cfg.width
        if prompt.image is not None:
            size = fit_size(*image_size(prompt.image), cfg.height * cfg.width)
        jobs += [Job(i, prompt, cfg.seed + j, *size) for j in range(cfg.count)]
    return jobs


def student_path(cfg: Config) -> Path:
    """The file that the config means as its student: a DiT, or a LoRA on the one of `weights`."""
    return Path(cfg.lora or cfg.student or Path(cfg.run) / "student.safetensors")


def sampling_times(cfg: Config) -> list[float]:
    """The times to walk, falling to 0; checks the student's file, so that errors come first.

    Euler walks the teacher's grid or a student's key timesteps. UniPC walks a grid of its own of as
    many steps: the teacher Wan's, a student that of AccVideo's script for such a model.
    """
    unipc, n = cfg.solver == "unipc", cfg.steps or cfg.n
    if cfg.teacher:
        grid = unipc_grid(n, cfg.shift) if unipc else time_grid(cfg.family, n, cfg.shift)
        return grid.tolist()
    facts = student_facts(student_path(cfg), cfg, foreign=bool(cfg.student or cfg.lora))
    if cfg.lora is not None:
        check_lora(cfg, facts)
    times = facts["t_key"]
    if cfg.steps not in (None, len(times) - 1):
        raise ValueError(f"steps: got {cfg.steps}; {student_path(cfg)} was distilled for "
                         f"{len(times) - 1} steps: leave --steps out, or distill with another "
                         "`key`")
    if not unipc:
        return times
    text_to_video = not sizes_of(cfg.preset).takes_image
    return unipc_grid(len(times) - 1, facts["shift"], twice=text_to_video).tolist()


def check_lora(cfg: Config, facts: dict) -> None:
    """Raise ValueError if a LoRA does not fit the DiT of `weights`; say so if it was made on
    another one, or on the same one in another dtype."""
    changes(Path(cfg.lora), {name: t.shape for name, t in dit_tensors(cfg.weights).items()})
    base = facts["teacher"]
    if base and base != (own := fingerprint(cfg.weights)) and os.environ.get("RANK", "0") == "0":
        print(f"{cfg.lora} was made on the DiT {base}; {cfg.weights} has {own}: the same in "
              "another dtype is as good, another model is not", flush=True)


def make_dit(cfg: Config, device: torch.device, ranks: Ranks | None) -> nn.Module:
    """The DiT that is sampled, frozen: the teacher, the teacher with a LoRA, or the student."""
    if cfg.teacher:
        return load_dit(cfg.weights, cfg.preset, compute_dtype(device), device,
                        ranks).requires_grad_(False)
    return load_student(cfg, student_path(cfg), device, ranks, cfg.lora_scale)


# ---------------------------------------------------------------------------------- sampling

@torch.no_grad()
def sample(cfg: Config, jobs: list[Job], times: list[float], who: str, out: Path,
           ranks: Ranks) -> dict:
    """Sample this rank's videos and write them.

    Returns {"seconds": by phase, "videos": a record of each, "peak_bytes"}.
    """
    timer, device = Timer(ranks.device), ranks.device
    conds, unconds = encode_prompts(cfg, [job.prompt for job in jobs],
                                    [(job.height, job.width) for job in jobs], False, device,
                                    timer)
    dit = make_dit(cfg, device, ranks.sp_ranks)
    vae = load_vae(cfg.weights, device, compute_dtype(device), cfg.family)
    unconds = unconds if cfg.teacher else None  # guidance is built into a student
    if cfg.compile:
        compile_blocks(dit)
    if vae.tiled:
        vae.group = ranks.sp_group
    timer.lap("load")
    records = []
    bar = tqdm(total=len(jobs) * (len(times) - 1), desc=who, unit="step", mininterval=1,
               disable=None if ranks.rank == 0 else True)
    for batch in batches(jobs, cfg.batch):
        first, last = batch[0], batch[-1] + 1
        shape = latent_shape(cfg.frames, jobs[first].height, jobs[first].width)
        noise = draw_noise(shape, [("sample", job.seed, job.index, job.prompt.text)
                                   for job in jobs[first:last]])
        timer.lap("noise")
        if cfg.compile and first == 0:  # beside the steps' time; another shape compiles again
            sample_batch(dit, noise, times[:2], conds[:last], None, 1.0, Timer(device),
                         tqdm(disable=True), cfg.solver)
            timer.lap("compile")
        timer.laps()
        x = sample_batch(dit, noise, times, conds[first:last], unconds and unconds[first:last],
                         cfg.cfg_scale, timer, bar, cfg.solver)
        steps = timer.laps()
        for job, latents in zip(jobs[first:last], x, strict=True):
            if not (ranks.is_writer or vae.tiled):
                continue
            video = vae.decode(latents[None])[0]
            file = job.file or f"{who}_{job.index:04d}_seed{job.seed}.mp4"
            if not ranks.is_writer:
                continue
            timer.lap("decode")
            write_video(out / file, video, cfg.fps)
            timer.lap("save")
            seconds = {"steps": [s / len(batch) for s in steps],
                       **dict(zip(("decode", "save"), timer.laps()[-2:], strict=True))}
            records.append({"file": file, "index": job.index, "prompt": job.prompt.text,
                            "image": job.prompt.image and str(job.prompt.image), "seed": job.seed,
                            "height": job.height, "width": job.width,
                            "evaluations": len(steps) * (1 if unconds is None else 2),
                            "seconds": seconds})
    bar.close()
    return {"seconds": timer.seconds(), "videos": records, "peak_bytes": peak_bytes(device)}


def batches(jobs: list[Job], most: int) -> Iterator[range]:
    """Indices of neighbours of one size, at most so many."""
    start = 0
    for _, alike in itertools.groupby(jobs, lambda job: (job.height, job.width)):
        end = start + len(list(alike))
        yield from (range(a, min(a + most, end)) for a in range(start, end, most))
        start = end


# ------------------------------------------------------------------------------------ report

def work(cfg: Config, records: list[dict], ranks: Ranks) -> dict:
    """Tokens, TFLOP and seconds of one evaluation, means over videos, and the part of the peak."""
    with torch.device("meta"):
        dit = build_dit(cfg.preset)
    sizes = [math.prod(dit.token_grid(*latent_shape(cfg.frames, v["height"], v["width"])[1:]))
             for v in records]
    count, tokens = sum(v["evaluations"] for v in records), round(sum(sizes) / len(sizes))
    tflop = sum(map(dit.flops, sizes)) / len(sizes) / 1e12
    each = sum(sum(v["seconds"]["steps"]) for v in records) / count
    facts = {"tokens": tokens, "tflop_an_evaluation": tflop, "seconds_an_evaluation": each}
    if cfg.peak_tflops is not None:
        facts["mfu"] = tflop / each / cfg.peak_tflops / ranks.sp
    return facts


def timing_table(results: list[dict], facts: dict) -> str:
    """Seconds by phase as text: in all (of the slowest rank) and for each video; the DiT's work."""
    videos = [record for result in results for record in result["videos"]]
    slowest = max(results, key=lambda result: sum(result["seconds"].values()))
    steps = len(videos[0]["seconds"]["steps"])
    lines = [f"{'':<10}{'seconds':>10}{'a video':>10}"]
    for name, seconds in slowest["seconds"].items():
        each = "" if name == "load" else f"{seconds / len(slowest['videos']):10.3f}"
        lines.append(f"{f'{steps} steps' if name == 'steps' else name:<10}{seconds:10.2f}{each}")
    step = sum(sum(v["seconds"]["steps"]) for v in videos) / len(videos) / steps
    peak = max(result["peak_bytes"] for result in results) / 2 ** 30
    lines.append(f"{len(videos)} videos, {videos[0]['evaluations']} evaluations a video, "
                 f"{step:.3f} s a step, peak memory {peak:.2f} GiB a process")
    mfu = f", {facts['mfu']:.1%} of the peak" if "mfu" in facts else ""
    lines.append(f"{facts['tokens']} tokens, {facts['tflop_an_evaluation']:.4g} TFLOP and "
                 f"{facts['seconds_an_evaluation']:.3f} s an evaluation{mfu}")
    return "\n".join(lines)


def write_report(cfg: Config, who: str, facts: dict, out: Path, results: list[dict]) -> None:
    """Write the contact sheet and the JSON of all ranks' videos; print timings and file names."""
    videos = [v for result in results for v in result["videos"]]
    videos.sort(key=lambda v: (v["index"], v["seed"]))
    rows = [(f"{v['prompt']} (seed {v['seed']})", thumbnail(read_video(out / v["file"])))
            for v in videos[:SHEET_ROWS]]
    sizes = ", ".join(dict.fromkeys(f"{v['width']}×{v['height']}" for v in videos[:SHEET_ROWS]))
    contact_sheet(out / f"{who}.png", rows, title=f"{who}, {sizes}, {cfg.frames} frames")
    ranks = [{"seconds": r["seconds"], "peak_bytes": r["peak_bytes"]} for r in results]
    write_json(out / f"{who}.json",
               {**facts, "videos": videos, "ranks": ranks, "config": dataclasses.asdict(cfg)})
    print(timing_table(results, facts))
    shown = f"{videos[0]['file']} … {videos[-1]['file']}" if len(videos) > 1 else videos[0]["file"]
    print(f"look at {out / f'{who}.png'} (contact sheet), {out / f'{who}.json'} (seconds), "
          f"and the videos {out}/{shown}")


# ------------------------------------------------------------------------------------ VBench

# What does not change a video, or is told of each in the record.
FREE = ("batch", "sp", "compile", "attention", "peak_tflops", "prompts", "files")


def vbench_videos(cfg: Config) -> list[Video]:
    """The videos that VBench wants, with their names, prompts and seeds."""
    return wanted_videos(cfg.vbench, cfg.vbench_prompts, cfg.vbench_flickering, cfg.seed)


def sample_vbench(cfg: Config, jobs: list[Job], times: list[float], who: str,
                  ranks: Ranks) -> None:
    """Sample this rank's part of the videos that VBench's folder lacks, and report."""
    announce(cfg, "vbench", ranks.rank)
    out = Path(cfg.out or Path(cfg.run) / "vbench" / who)
    about = {"who": who, "times": times, **settings_to_compare(cfg, **contents(cfg, jobs))}
    about = {name: value for name, value in about.items() if name not in FREE}
    results = [None] * ranks.world
    with lock_run_folder(record_folder(out)):
        lacking = on_first_rank(lambda: open_record(out, vbench_videos(cfg), about))
        mine = [jobs[i] for i in lacking][ranks.dp_rank::ranks.dp_size]
        own = sample(cfg, mine, times, who, out, ranks) if mine else None
        dist.all_gather_object(results, own if ranks.is_writer else None)
    if ranks.rank == 0:
        done = [result for result in results if result is not None]
        if done:
            made = [video for result in done for video in result["videos"]]
            print(timing_table(done, work(cfg, made, ranks)))
        rows = [(job.file.removesuffix(".mp4"), thumbnail(read_video(out / job.file)))
                for job in jobs[::VIDEOS][:SHEET_ROWS]]
        contact_sheet(record_folder(out) / "sheet.png", rows, title=f"{who}, for VBench")
        print(f"{len(jobs)} videos for VBench are in {out}, {len(lacking)} of them made now; their "
              f"record: {record_folder(out)}")


def main(argv: list[str] | None = None) -> None:
    """Check settings and files, sample each rank's videos, report."""
    cfg = load_config(Config, "sample", argv, __doc__)
    if cfg.how is not None:
        return print(how_to_use(Path(cfg.how)))
    sizes = check_model(cfg)
    check_config(cfg)
    jobs = make_jobs(cfg)
    times = sampling_times(cfg)
    who = "teacher" if cfg.teacher else "student" if cfg.lora is None else "lora"
    who = f"{who}{len(times) - 1}"
    who = who if cfg.solver == "euler" else f"{who}_{cfg.solver}"
    ranks = setup_distributed(cfg.device, cfg.sp, sizes.num_heads,
                              same=settings_to_compare(cfg, **contents(cfg, jobs)))
    prefer_attention(cfg.attention, ranks.device)
    if cfg.vbench is not None:
        return sample_vbench(cfg, jobs, times, who, ranks)
    announce(cfg, "samples", ranks.rank)
    out = Path(cfg.out or Path(cfg.run) / "samples")
    mine = jobs[ranks.dp_rank::ranks.dp_size]
    results = [None] * ranks.world
    own = sample(cfg, mine, times, who, out, ranks) if mine else None
    dist.all_gather_object(results, own if ranks.is_writer else None)
    if ranks.rank == 0:
        done = [result for result in results if result is not None]
        facts = {"who": who, "times": times, "device": device_name(ranks.device),
                 **work(cfg, [video for result in done for video in result["videos"]], ranks)}
        write_report(cfg, who, facts, out, done)


def contents(cfg: Config, jobs: list[Job]) -> dict[str, str]:
    """Identities of the files that a run reads, which are the same on all ranks."""
    dit = student_path(cfg) if not cfg.teacher and cfg.lora is None else cfg.weights
    own = {} if cfg.lora is None else {"lora": fingerprint_files(cfg.lora)}
    return {"dit": fingerprint(dit), "encoders": fingerprint_files(cfg.weights), **own,
            "prompts": digest_texts([job.prompt for job in jobs]),
            "files": digest_texts([Prompt(job.file or "") for job in jobs])}
if __name__ == "__main__":
    cli(main)
