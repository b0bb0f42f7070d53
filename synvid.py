"""Stage 1: prompts to denoising trajectories of the teacher on disk (SynVid), and their reader.

    python synvid.py [CONFIG] [--field value]
    torchrun --nproc-per-node 8 synvid.py CONFIG [field=value]

In:   the teacher's folder `weights` (text encoder, DiT; the VAE for videos) and a file of prompts.
Out:  <run>/synvid/manifest.json           what all trajectories share; another one is an error
      <run>/synvid/000/000123.safetensors  trajectory 123: `x` [stored,C,T,H,W] from noise to data,
                                           `cond.*` as the text encoder made it, padding cut
      <run>/synvid/videos/000123.mp4       of the first few
Cost: n evaluations of the teacher a trajectory (2n with guidance), most of the project's bill: for
      the paper's 38,400 on 8 GPUs at 400 TFLOP/s, computed, 17 days and 1.2 TB for HunyuanVideo at
      544p, 84 at 720p, 23 for Wan 14B, 3.9 for Wan 1.3B; distillation takes 4.4, 22, 3.0 and 0.5.
      It prints the bytes before it starts, and seconds, device-hours and ETA after the first batch.

Trajectory i is a function of (seed, i, its prompt) alone: the prompts are taken in turn (with
their images, cut to the videos' shape, if the teacher is image-to-video) and the noise is drawn on
the CPU. Neither ranks, order nor restarts change a byte; another batch size or machine changes the
last bits of a velocity, no more. On CPU a rank computes with one thread.
The same command continues where it was stopped; --verify lists what is missing, cut or changed, and
--repair makes just that again. Several jobs, each with its --start and --count,
may fill one folder at the same time: the manifest holds nothing of a single job (its `count` is the
number of prompts; which trajectories there are is told by their files).

Shapes: B batch, C channels, T H W latent frames, height and width, S stored latents, m steps of the
student, L tokens, D width.
"""

import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from artifacts.trajectories import (
    DTYPES, find_trajectories, make_manifest, open_manifest, read_manifest, read_trajectory,
    trajectory_path, verify, write_trajectory)
from common.config import Shared, announce, field, load_config, settings_to_compare
from common.files import format_bytes, format_seconds
from common.names import fingerprint, fingerprint_files
from common.prompts import Prompt, digest_texts, read_prompts
from common.ranks import (
    Ranks, cli, compile_blocks, compute_dtype, draw_noise, on_first_rank, lock_run_folder, prefer_attention,
    setup_distributed)
from common.video import write_video
from model import build_dit, check_model, collate, load_dit, sample_euler, sizes_of, time_grid



# frozen/ is imported where trajectories are made: the trainer reads SynVid without it.
@dataclass
class Config(Shared):
    """Settings of a job of generation."""
    prompts: str = field("assets/tiny/prompts.txt",
                         "UTF-8 text, a prompt a line; .jsonl of prompt and image for I2V")
    start: int = field(0, "first trajectory of this job", "[0, 1000000000]")
    count: int | None = field(None, "trajectories of this job; none: as far as one for each prompt",
                              "[1, 10000000]")
    keep: Literal["key", "all"] = field("key", "latents stored")
    dtype: Literal["fp16", "fp32"] = field("fp16", "of stored latents; bf16 would put 5% noise on "
                                           "Eq. 6")
    batch: int = field(16, "trajectories denoised at once, those of indices [b·batch, (b+1)·batch)",
                       "[1, 10000]")
    sp: int = field(1, "ranks that share each sample's tokens (Ulysses) and the DiT's weights",
                    "[1, inf)")
    cfg_parallel: bool = field(False, "the two evaluations of guidance on two groups of ranks")
    compile: bool = field(False, "torch.compile every block")
    verify: bool = field(False, "only read this job's trajectories again and list what is wrong")
    repair: bool = field(False, "verify, then make what is missing or damaged anew, and only that")
    videos: int = field(8, "how many of the first trajectories are also decoded to .mp4",
                        "[0, inf)")


def check_config(cfg: Config, prompts: list[Prompt]) -> range:
    """The indices of this job's trajectories. Raises ValueError for settings that cannot work."""
    if cfg.count is None and cfg.start >= len(prompts):
        raise ValueError(f"start: got {cfg.start} with no count; {cfg.prompts} has {len(prompts)} "
                         "prompts: say with --count how many more trajectories you want")
    return range(cfg.start, cfg.start + cfg.count if cfg.count else len(prompts))


# -------------------------------------------------------------------------------- generation

def sample_trajectories(cfg: Config, dit: nn.Module, noise: Tensor, stored: list[int], cond: dict,
                        uncond: dict | None,
                        cfg_group: dist.ProcessGroup | None = None) -> Tensor:
    """Latents [B,S,C,T,H,W], on the CPU, of noise [B,C,T,H,W] down the teacher's grid. Eq. 5."""
    times = time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    steps = sample_euler(dit, noise, times, cond, uncond, cfg.cfg_scale, cfg_group)
    return torch.stack([x.to("cpu", DTYPES[cfg.dtype]) for j, x in enumerate(steps, start=1)
                        if j in stored], 1)


def plan(cfg: Config, folder: Path, wanted: range, manifest: dict, device: torch.device,
         damaged: Iterable[int]) -> list[int]:
    """Indices still to be made; prints their bytes. Removes what killed runs left half-written.

    Only this job's indices are cleared so: other jobs may be writing. Raises ValueError if the
    disk is too small.
    """
    for part in folder.glob("*/.*.part*"):
        index = part.name[1:].partition(".")[0]
        if index.isdecimal() and int(index) in wanted:
            part.unlink(missing_ok=True)
    there = find_trajectories(folder).difference(damaged)
    count = len(wanted) - sum(i in wanted for i in there)
    sizes = sizes_of(cfg.preset)
    latents = len(manifest["stored"]) * math.prod(manifest["shape"]) * DTYPES[cfg.dtype].itemsize
    condition = sizes.text_len * sizes.text_dim * compute_dtype(device).itemsize
    if sizes.takes_image:  # fp32: its features, and 4 mask channels on the 16 of a latent
        frames = math.prod(manifest["shape"]) * 20 // 16
        condition += 4 * (sizes.image_len * sizes.image_dim + frames)
    need = count * (latents + condition + 2000)  # the header with the prompt
    free = shutil.disk_usage(folder).free
    with torch.device("meta"):
        dit = build_dit(cfg.preset)
    evaluations = cfg.n * (1 if cfg.cfg_scale == 1 else 2)
    flop = count * evaluations * dit.flops(math.prod(dit.token_grid(*manifest["shape"][1:])))
    print(f"synvid: {count} trajectories to do, {len(wanted) - count} of {len(wanted)} are "
          f"there; at most {format_bytes(need)} to write, {format_bytes(free)} free at {folder}\n"
          f"synvid: {evaluations} evaluations each, {flop:.3g} FLOP in all: {flop / 1.44e18:.3g} "
          "GPU-hours at 400 TFLOP/s (40% of an H100's peak)", flush=True)
    if need > free:
        raise ValueError(f"{folder}: {count} trajectories need up to {format_bytes(need)}, got "
                         f"{format_bytes(free)}: free some space, choose another --run, or make "
                         "fewer by --count")
    return [i for i in wanted if i not in there]


def decode_video(cfg: Config, folder: Path, manifest: dict, vae: nn.Module, i: int) -> None:
    """Decode trajectory i, as it is stored, to videos/NNNNNN.mp4."""
    x, _, _ = read_trajectory(folder, manifest, i, [manifest["n"]])
    with torch.no_grad():
        video = vae.decode(x.to(vae.dtype).to(next(vae.parameters()).device))
    write_video(folder / f"videos/{i:06d}.mp4", video[0], cfg.fps)


def print_cost(seconds: float, batch: int, rounds: int, chunks: int, ranks: Ranks) -> None:
    """Print what `chunks` batches cost, `rounds` of them a rank, from the first one's seconds."""
    tqdm.write(f"synvid: {format_seconds(seconds / batch)} a trajectory on {ranks.device.type}; in "
               f"all {seconds * chunks * ranks.world / ranks.dp_size / 3600:.3g} device-hours; "
               f"{format_seconds(seconds * (rounds - 1))} to go with {ranks.world} rank(s)")
    sys.stdout.flush()


@contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Compute with one thread a rank inside: matrix products round otherwise with another number.

    torchrun gives each of several ranks one thread and a lone process all; use ranks for cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generate(cfg: Config, prompts: list[Prompt], folder: Path, manifest: dict, wanted: range,
             todo: list[int], ranks: Ranks) -> None:
    """Make this rank's part of the trajectories `todo` and of the videos that are missing."""
    from frozen.load import load_conditioner, load_vae

    chunks: dict[int, list[int]] = {}
    for i in todo:
        chunks.setdefault(i // cfg.batch, []).append(i)
    mine, dtype = list(chunks.items())[ranks.dp_rank::ranks.dp_size], compute_dtype(ranks.device)
    with_video = {i for i in wanted[:max(cfg.videos - cfg.start, 0)]
             if ranks.is_writer and not (folder / f"videos/{i:06d}.mp4").exists()}
    if with_video:
        vae = load_vae(cfg.weights, ranks.device, dtype, cfg.family)
        for i in sorted(with_video.difference(todo))[ranks.dp_rank::ranks.dp_size]:
            decode_video(cfg, folder, manifest, vae, i)
    if not mine:
        return
    dit = load_dit(cfg.weights, cfg.preset, dtype, ranks.device, ranks.sp_ranks)
    dit.requires_grad_(False)
    if cfg.compile:
        compile_blocks(dit)
    conditioner, uncond = load_conditioner(cfg, ranks.device, dtype, crop=True), None

    first = time.perf_counter()
    bar = tqdm(total=sum(len(missing) for _, missing in mine), desc="synvid", unit="trajectory",
               mininterval=1 if sys.stderr.isatty() else 60, disable=ranks.rank != 0)
    for number, (chunk, missing) in enumerate(mine):
        # A chunk is computed whole, even if little of it is missing: same rounding, same bytes.
        indices = range(chunk * cfg.batch, (chunk + 1) * cfg.batch)
        chosen = [prompts[i % len(prompts)] for i in indices]
        conds = conditioner.encode_each(chosen, cfg.height, cfg.width)
        if cfg.cfg_scale != 1:
            uncond = collate(conditioner.with_text(cfg.negative_prompt, conds))
        noise = draw_noise(manifest["shape"], [("synvid", cfg.seed, i, prompt.text)
                                               for i, prompt in zip(indices, chosen, strict=True)])
        x = sample_trajectories(cfg, dit, noise.to(ranks.device), manifest["stored"],
                                collate(conds), uncond, ranks.cfg_group)
        if read_manifest(folder) != manifest:
            raise ValueError(f"{folder}/manifest.json: was changed while this job ran: another job "
                             "with other settings writes there; give each its own --run")
        for i in missing if ranks.is_writer else []:
            b = i - indices.start
            write_trajectory(folder, manifest, i, chosen[b].text, x[b], conds[b])
        if number == 0 and ranks.rank == 0:
            print_cost(time.perf_counter() - first, cfg.batch, len(mine), len(chunks), ranks)
        for i in with_video.intersection(missing):
            decode_video(cfg, folder, manifest, vae, i)
        bar.update(len(missing))
    bar.close()
    if ranks.rank == 0:
        each = trajectory_path(folder, todo[0]).stat().st_size
        print(f"synvid: rank 0 made {bar.n} trajectories of {format_bytes(each)} in "
              f"{format_seconds(time.perf_counter() - first)}: {folder}", flush=True)


def make(cfg: Config) -> None:
    """Make what is missing of a job's trajectories; in all processes that torchrun started."""
    sizes = check_model(cfg)
    prompts = read_prompts(cfg.prompts, sizes.takes_image)
    wanted = check_config(cfg, prompts)
    same = settings_to_compare(cfg, teacher=fingerprint(cfg.weights), prompts=digest_texts(prompts),
                               encoders=fingerprint_files(cfg.weights))
    ranks = setup_distributed(cfg.device, cfg.sp, sizes.num_heads, same=same,
                              cfg_parallel=cfg.cfg_parallel and cfg.cfg_scale != 1)
    prefer_attention(cfg.attention, ranks.device)
    folder = Path(cfg.run) / "synvid"
    only_verify = cfg.verify and not cfg.repair  # nothing is written then
    with lock_run_folder(folder, wanted.start, wanted.stop) if not only_verify else nullcontext():
        manifest = on_first_rank(lambda: open_manifest(folder, make_manifest(cfg, prompts),
                                                       not only_verify, prompts))
        damaged = verify(folder, wanted, manifest, ranks) if cfg.verify or cfg.repair else {}
        if only_verify:
            if damaged:
                raise SystemExit(1)
            return
        announce(cfg, "synvid", ranks.rank)
        todo = on_first_rank(lambda: plan(cfg, folder, wanted, manifest, ranks.device, damaged))
        with one_cpu_thread():
            generate(cfg, prompts, folder, manifest, wanted, todo, ranks)
        # Together: a node that leaves five minutes before others may take torchrun's store along.
        dist.barrier()


def main(argv: list[str] | None = None) -> None:
    make(load_config(Config, "synvid", argv, __doc__))
if __name__ == "__main__":
    cli(main)
