"""Stage 1: denoising trajectories of the teacher (the paper's SynVid), stored on disk.

    python synvid.py [CONFIG] [--field value]
    torchrun --nproc-per-node 8 synvid.py CONFIG [field=value]

In:  the teacher's folder `weights` and a file of prompts (with images for image-to-video).
Out: <run>/synvid: a manifest and one file per trajectory (artifacts/trajectories.py), a few videos.

Trajectory i depends only on the config, i and its prompt: ranks, order, restarts and jobs give
identical bytes; another batch size or machine may change the last bits. The same command resumes;
--verify lists damaged and missing files, --repair makes them again. Jobs with their own --start
and --count may fill one folder at the same time, and prompts may be appended to the file.
"""

import common  # noqa: F401 (before torch, see common)
import itertools
import math
import shutil
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from artifacts.trajectories import (
    check_other_jobs, decode_trajectory, find_trajectories, first_gap, first_header,
    initial_noise, open_manifest, verify, write_trajectory)
from common.config import Shared, announce, field, load_config
from common.prompts import Prompt, fingerprints, read_prompts
from common.ranks import (
    Ranks, cli, compile_blocks, lock_run_folder, on_first_rank, progress_bar, setup_distributed,
    shared_queue)
from common.video import check_ffmpeg
from experts import crossing_note
from frozen.load import load_conditioner, load_vae
from model import build_dit, check_model, collate, euler_step, load_dit, time_grid, velocity


# ------------------------------------------------------------------------------ trajectories

@torch.no_grad()
def sample_trajectories(cfg: "Config", teacher: nn.Module, noise: Tensor, stored: list[int],
                        cond: dict, uncond: dict | None = None,
                        cfg_group: dist.ProcessGroup | None = None) -> Tensor:
    """Denoise along the teacher's grid 1 = t_n > … > t_0 = 0 and keep the stored latents. Eq. 5.

    Args: noise [B,C,T,H,W]; stored, indices into the grid; cond, uncond and cfg_group as in
    model.velocity. Returns fp32 [B,S,C,T,H,W] on the CPU, S = len(stored).
    """
    times = time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    x, latents = noise, []
    for j, (t, t_next) in enumerate(itertools.pairwise(times), start=1):
        v = velocity(teacher, x, t, cond, uncond, cfg.guidance, cfg_group)      # v_θ(l_t, t)
        x = euler_step(x, v, t, t_next)                                         # Eq. 5
        if j in stored:
            latents.append(x.cpu())
    return torch.stack(latents, 1)


# ---------------------------------------------------------------------------------- settings

@dataclass
class Config(Shared):
    """Settings of one job of stage 1."""
    prompts: str = field("assets/tiny/prompts.txt",
                         "UTF-8 text, one prompt per line; .jsonl of prompt and image for I2V")
    start: int = field(0, "first trajectory of this job", "[0, 1000000000]")
    count: int | None = field(None, "number of trajectories of this job; none: one for each prompt "
                              "from start on", "[1, 10000000]")
    keep: Literal["key", "all"] = field("key", "latents to store: at key timesteps, or at all")
    dtype: Literal["fp16", "fp32"] = field("fp16", "dtype of stored latents (bf16 would put 5% "
                                           "noise on the target of Eq. 6)")
    batch: int = field(16, "trajectories denoised at once: batch b has the indices from b·batch to "
                       "(b+1)·batch - 1", "[1, 10000]")
    sp: int = field(1, "ranks that share each sample's tokens (Ulysses) and the DiT's weights",
                    "[1, inf)")
    cfg_parallel: bool = field(False, "compute guidance's two evaluations on two groups of ranks")
    compile: bool = field(False, "torch.compile every block")
    verify: bool = field(False, "only read this job's trajectories and list the faulty ones")
    repair: bool = field(False, "verify, then make only missing and damaged trajectories again")
    videos: int = field(8, "number of the first trajectories that are also decoded to .mp4",
                        "[0, inf)")


def job_indices(cfg: Config, prompts: list[Prompt]) -> range:
    """The indices of this job's trajectories. Raises ValueError if there are none."""
    if cfg.count is None and cfg.start >= len(prompts):
        raise ValueError(f"start: expected less than {len(prompts)}, the number of prompts in "
                         f"{cfg.prompts}, got {cfg.start}: to repeat prompts, give --count")
    return range(cfg.start, cfg.start + cfg.count if cfg.count else len(prompts))


# ---------------------------------------------------------------------------------- planning

def plan(cfg: Config, prompts: list[Prompt], folder: Path, indices: range, manifest: dict,
         dtype: torch.dtype, damaged: Iterable[int]) -> list[int]:
    """The indices of trajectories to make; prints their bytes and FLOPs, and what the user may not
    expect: a gap before them, other prompts, a setting without effect.

    Raises ValueError if the disk is too small.
    """
    existing = find_trajectories(folder).difference(damaged)
    todo = [i for i in indices if i not in existing]
    with torch.device("meta"):
        dit = build_dit(cfg.preset)
    sizes, shape = dit.cfg, manifest["shape"]
    latents = len(manifest["stored"]) * math.prod(shape) * (2 if cfg.dtype == "fp16" else 4)
    condition = sizes.text_len * sizes.text_dim * dtype.itemsize
    if sizes.takes_image:  # fp32: image features; 4 mask channels and the latent's 16
        condition += 4 * (sizes.image_len * sizes.image_dim + math.prod(shape) * 20 // 16)
    need = len(todo) * (latents + condition + 2000)  # the header with the prompt
    free = shutil.disk_usage(folder).free
    evaluations = cfg.n * (1 if cfg.guidance == 1 else 2)
    flop = len(todo) * evaluations * dit.flops(math.prod(dit.token_grid(*shape[1:])))
    print(f"synvid: {len(todo)} trajectories to make, {len(indices) - len(todo)} of {len(indices)} "
          f"exist; at most {need / 1e9:.3g} GB to write, {free / 1e9:.3g} GB free at {folder}\n"
          f"synvid: {evaluations} evaluations each, {flop:.3g} FLOP in all: {flop / 1.44e18:.3g} "
          "GPU-hours at 400 TFLOP/s (40% of an H100's peak)")
    if gap := first_gap(existing.union(indices)):
        print(f"synvid: trajectories {gap[0]} to {gap[-1]} do not exist and are not of this job: "
              f"distill.py needs them too: make them with --start {gap[0]} --count {len(gap)}, "
              "unless another job does")
    if (first := first_header(folder)) and (
            first["prompt"] != prompts[first["index"] % len(prompts)].text):
        print(f"synvid: trajectory {first['index']} exists and was made from another prompt than "
              f"the one in {cfg.prompts}: existing trajectories keep their prompts; to make all "
              "of them from this file, choose another --run")
    if cfg.negative_prompt and cfg.guidance == 1:
        print("synvid: negative_prompt has no effect at cfg_scale 1")
    times = time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    if note := crossing_note(times, cfg.key, sizes.boundary):
        print(f"synvid: {note}")
    if need > free:
        raise ValueError(f"{folder}: {len(todo)} trajectories need up to {need / 1e9:.3g} GB, got "
                         f"{free / 1e9:.3g} GB: free some space, or choose another --run")
    return todo


def print_cost(seconds: float, batch: int, batches: int, ranks: Ranks) -> None:
    """Print the cost of all batches from the time of the first one."""
    left = seconds * max(batches / ranks.dp_size - 1, 0)
    tqdm.write(f"synvid: {seconds / batch:.2g} s per trajectory on {ranks.device.type}; "
               f"{seconds * batches * ranks.world / ranks.dp_size / 3600:.3g} device-hours in all; "
               f"{tqdm.format_interval(left)} left with {ranks.world} rank(s)")


# -------------------------------------------------------------------------------- generation

def generate(cfg: Config, prompts: list[Prompt], folder: Path, manifest: dict, indices: range,
             todo: list[int], ranks: Ranks) -> None:
    """Make the trajectories `todo`, whose batches all replicas share, and missing videos."""
    missing: dict[int, list[int]] = {}  # indices by the number of their batch
    for i in todo:
        missing.setdefault(i // cfg.batch, []).append(i)
    with_video = {i for i in indices[:max(cfg.videos - cfg.start, 0)]
                  if ranks.is_writer and not (folder / f"videos/{i:06d}.mp4").exists()}
    if with_video:
        vae = load_vae(cfg.weights, ranks.device, ranks.dtype, cfg.family)
        for i in sorted(with_video.difference(todo))[ranks.dp_rank::ranks.dp_size]:
            decode_trajectory(folder, manifest, i, vae, cfg.fps)
    if not todo:
        return
    conditioner, uncond = load_conditioner(cfg, ranks.device, ranks.dtype, crop=True), None
    encoders = conditioner.identity()
    on_first_rank(lambda: check_other_jobs(folder, manifest, encoders))
    batches, turns = list(missing), shared_queue(len(missing), ranks)
    if ranks.dp_rank >= len(batches):
        return
    teacher = load_dit(cfg.weights, cfg.preset, ranks.dtype, ranks.device, ranks.sp_ranks)
    teacher.requires_grad_(False)
    if cfg.compile:
        compile_blocks(teacher)

    bar = progress_bar(len(batches), "synvid", ranks.rank, unit="batch")
    for number in turns:
        b, started = batches[number], time.perf_counter()
        # The complete batch is computed, even if little of it is missing: a batch of another size
        # would round differently.
        batch = range(b * cfg.batch, (b + 1) * cfg.batch)
        chosen = [prompts[i % len(prompts)] for i in batch]
        conds = conditioner.encode_each(chosen, cfg.height, cfg.width)
        if cfg.guidance != 1:
            uncond = collate(conditioner.with_text(cfg.negative_prompt, conds))
        noise = torch.stack([initial_noise(cfg.seed, i, prompt.text, manifest["shape"])
                             for i, prompt in zip(batch, chosen, strict=True)])
        x = sample_trajectories(cfg, teacher, noise.to(ranks.device), manifest["stored"],
                                collate(conds), uncond, ranks.cfg_group)
        check_other_jobs(folder, manifest, encoders)
        for i, (prompt, image), latents, cond in zip(batch, chosen, x, conds, strict=True):
            if i in missing[b] and ranks.is_writer:
                write_trajectory(folder, manifest, i, prompt, latents, cond, encoders, image)
        if bar.n == 0 and ranks.rank == 0:
            print_cost(time.perf_counter() - started, cfg.batch, len(batches), ranks)
        for i in with_video.intersection(missing[b]):
            decode_trajectory(folder, manifest, i, vae, cfg.fps)
        bar.update(number + 1 - bar.n)  # the other replicas take batches from the same queue
    bar.close()


def main(argv: list[str] | None = None) -> None:
    """Make the missing trajectories of a job, or verify it, in all processes of torchrun."""
    cfg = load_config(Config, "synvid", argv, __doc__)
    sizes = check_model(cfg)
    prompts = read_prompts(cfg.prompts, sizes.takes_image)
    indices = job_indices(cfg, prompts)
    writes = cfg.repair or not cfg.verify
    if cfg.videos > cfg.start and writes:
        check_ffmpeg()
    ranks = setup_distributed(
        cfg, cfg.sp, sizes.num_heads, cfg_parallel=cfg.cfg_parallel and cfg.guidance != 1,
        **fingerprints(cfg.weights, prompts))
    folder = Path(cfg.run) / "synvid"
    with lock_run_folder(folder, indices.start, indices.stop) if writes else nullcontext():
        manifest = on_first_rank(lambda: open_manifest(folder, cfg, writes))
        damaged = verify(folder, indices, manifest, ranks) if cfg.verify or cfg.repair else {}
        if not writes:
            if damaged:
                raise SystemExit(1)
            return
        announce(cfg, "synvid", ranks.rank)
        todo = on_first_rank(lambda: plan(cfg, prompts, folder, indices, manifest,
                                          ranks.dtype, damaged))
        torch.set_num_threads(1)  # with more, matrix products round differently; start more ranks
        started = time.perf_counter()
        generate(cfg, prompts, folder, manifest, indices, todo, ranks)
        # All ranks leave together: torchrun's store may end with the node that hosts it.
        dist.barrier()
    if todo and ranks.rank == 0:
        print(f"synvid: made {len(todo)} trajectories in "
              f"{tqdm.format_interval(time.perf_counter() - started)}: {folder}")


if __name__ == "__main__":
    cli(main)
