"""Baselines for stage 2: three ways to distill on data instead of the teacher's trajectories.

    python -m tools.baselines [CONFIG] --method perflow --data matched [--run DIR] [--seed 1]
    torchrun --nproc-per-node 8 -m tools.baselines CONFIG --method dmd --data samples

In:  the teacher's folder; with --data samples also <run>/synvid (or --synvid). The settings are
     distill.py's, as far as the methods use them. A stopped run starts from iteration 0.
Out: student.safetensors in --run, by default <run of the config>/baselines/perflow-matched-seed0
     and so on, next to distill.py's student; sample.py and evaluate.py read it like any student.
They start from noised data, which are useless where no trajectory of the teacher passes (Sec. 3.2,
Eq. 4). The small world's data are known, so `python -m tools.paper` measures this (Table 3).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import distill
from artifacts.student import export_student
from artifacts.trajectories import open_trajectories
from common.config import Shared, announce, field, load_config
from common.names import fingerprint
from common.prompts import Prompt
from common.ranks import (
    Ranks, Timer, cli, compute_dtype, generator, lock_run_folder, on_first_rank, progress_bar,
    setup_distributed)
from common.weights import open_safetensors, safetensors_metadata, save_tensors
from frozen.load import encode_prompts, load_conditioner, load_vae
from model import check_model, collate, key_times, latent_shape, load_dit, time_grid
from small_world.clips import SIZE, make_captions, make_clips
from training.data import trajectories_of
from training.optimizer import adamw, apply_update

Velocity = Callable[[Tensor, Tensor], Tensor]  # v(x, t), t [B]


@dataclass
class Config(distill.Config):
    """Settings of distill.py, the method, and the data that it learns from."""
    method: Literal["perflow", "pcm", "dmd"] = field("perflow", "how the student learns")
    data: Literal["matched", "mismatched", "samples"] = field(
        "matched", "clips like the teacher's own, clips of smaller objects, or SynVid's l_0")
    data_count: int = field(1024, "videos to learn from", "[1, inf)")
    clips: str | None = field(None, "folder for encoded clips; default <run>/clips")
    fake_updates: int = field(5, "dmd: updates of the fake score per update of the student",
                              "[1, inf)")
    simulate: bool = field(True, "dmd: the student's inputs come from its own steps from noise, so "
                           "that only the captions of the data are used; else from noised data")


# ------------------------------------------------------------------------------------ losses
# x0 data and z noise [B,C,T,H,W]; t times [B]. times [B,S+1] are the teacher's in each sample's own
# window, from t'_{k+1} down to t'_k. Forwards of the teacher's size per sample and iteration:
# PeRFlow n/m + 3, PCM 5, DMD m + 4 and m + 3 more per fake update.

def expand(t: Tensor, x: Tensor) -> Tensor:
    """Times [B] in a shape that broadcasts with x [B, …]."""
    return t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def add_noise(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t z. Eq. 2."""
    return x0 + expand(t, x0) * (z - x0)


def window_times(grid: list[float], key: list[int], k: Tensor) -> Tensor:
    """The teacher's times in window k of each sample: float64 [B,S+1], S steps at most.

    Args: grid, the teacher's falling times; key, its key indices; k [B], 0 the window at the data.
    A shorter window repeats its end, where steps have length 0.
    """
    windows = [grid[high:low + 1] for high, low in zip(key, key[1:], strict=False)][::-1]
    longest = max(map(len, windows))
    padded = [window + window[-1:] * (longest - len(window)) for window in windows]
    return torch.tensor(padded, dtype=torch.float64, device=k.device)[k]


def to_time(v: Velocity, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """One Euler step of v from times t to times `end`; the identity where they are equal. Eq. 5."""
    return x + expand(end - t, x) * v(x, t)


@torch.no_grad()
def integrate(v: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """x after Euler steps of v along each sample's falling times. Eq. 5."""
    for t, t_next in zip(times.T, times.T[1:], strict=False):
        x = to_time(v, x, t, t_next)
    return x


def perflow_loss(student: Velocity, teacher: Velocity, x0: Tensor, z: Tensor, times: Tensor,
                 u: Tensor) -> Tensor:
    """PeRFlow: the teacher integrates noised data through a window; the student learns the chord.

    Args: u [B] in [0, 1], where on the chord the student is evaluated. Source: Yan et al.,
    arXiv 2405.07510.
    """
    start, length = times[:, 0], times[:, -1] - times[:, 0]
    high = add_noise(x0, z, start)
    slope = (integrate(teacher, high, times) - high) / expand(length, high)
    x = high + expand(u * length, high) * slope
    return F.mse_loss(student(x, start + u * length), slope)


def pcm_loss(student: Velocity, teacher: Velocity, x0: Tensor, z: Tensor, times: Tensor,
             j: Tensor) -> Tensor:
    """PCM: the student's window end from times[j] agrees with that from one teacher step later.

    Without adversarial loss and moving average. Args: j [B], each sample's index into its times.
    Source: phased consistency, Wang et al., arXiv 2405.18407.
    """
    t, t_next = (times.gather(1, index[:, None])[:, 0] for index in (j, j + 1))
    x, end = add_noise(x0, z, t), times[:, -1]
    with torch.no_grad():
        target = to_time(student, to_time(teacher, x, t, t_next), t_next, end)
    return F.mse_loss(to_time(student, x, t, end), target)


@torch.no_grad()
def rollout(student: Velocity, z: Tensor, t_key: Tensor, k: Tensor) -> Tensor:
    """DMD's backward simulation: each sample at its t'_{k+1}, by the student's steps from noise.

    Args: z noise [B, …]; t_key [m+1], ascending; k [B]. Source: Yin et al., arXiv 2405.14867, whose
    steps add fresh noise; here they are the Euler steps by which the student is sampled.
    """
    x = z
    for step in range(len(t_key) - 2, 0, -1):  # from t'_{step+1} to t'_step
        t, t_next = (t_key[i].expand(len(z)) for i in (step + 1, step))
        x = torch.where(expand(k, x) < step, to_time(student, x, t, t_next), x)
    return x


def predict_x0(v: Velocity, x: Tensor, t: Tensor) -> Tensor:
    """The data that v predicts from x at times t."""
    return x - expand(t, x) * v(x, t)


def dmd_loss(guess: Tensor, teacher: Velocity, fake: Velocity, noise: Tensor, t: Tensor) -> Tensor:
    """DMD: a loss whose gradient moves `guess`, the student's x0, along the difference of scores.

    The scores are the teacher's and that of a copy, `fake`, trained on the student's outputs, both
    at `guess` noised to t [B]; the gradient is divided by the teacher's distance to the guess.
    Without regression loss and discriminator. Source: Yin et al., arXiv 2311.18828 and 2405.14867.
    """
    with torch.no_grad():
        x = add_noise(guess, noise, t)
        real_x0, fake_x0 = (predict_x0(v, x, t) for v in (teacher, fake))
        scale = (guess - real_x0).abs().flatten(1).mean(1).clamp(min=1e-6)
        gradient = (fake_x0 - real_x0) / expand(scale, x)
    return 0.5 * F.mse_loss(guess, guess.detach() - gradient)


def flow_matching_loss(v: Velocity, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """E ‖v(x_t, t) - (z - x0)‖². Eq. 3."""
    return F.mse_loss(v(add_noise(x0, z, t), t), z - x0)


# -------------------------------------------------------------------------------------- data

@dataclass
class Data:
    """What a method learns from: latents [N,C,T,H,W] in fp32 and their conditioning."""
    latents: Tensor
    conds: list[dict]
    unconds: list[dict] | None     # of the negative prompt; None without guidance


SMALLER = (0.30, 0.40)  # radii of the mismatched clips' objects, below all of the teacher's
CLIPS_SEED = 1          # of the clips to learn from; the teacher learned from those of seed 0


@torch.no_grad()
def keep_clips(cfg: Shared, path: Path, radius: tuple[float, float], seed: int, count: int,
               device: torch.device) -> None:
    """Encode the small world's clips of a seed and a range of radii, unless `path` has them."""
    facts = {"weights": fingerprint(cfg.weights), "clips": f"{count} of {seed}, {radius}"}
    shape = (count, *latent_shape(cfg.frames, cfg.height, cfg.width))
    if (path.exists() and facts.items() <= safetensors_metadata(path).items()
            and open_safetensors(path)["latents"].shape == shape):
        return
    vae, latents = load_vae(cfg.weights, device, family=cfg.family), []
    for start in tqdm(range(0, count, 32), "encode", mininterval=1, disable=None):
        clips, _, _ = make_clips(seed, start, min(32, count - start), cfg.height, cfg.frames,
                                 radius=radius)
        latents += [vae.encode(part.to(device)).cpu() for part in clips.split(4)]
    save_tensors(path, {"latents": torch.cat(latents)}, facts)


def load_data(cfg: Config, device: torch.device) -> Data:
    """The videos that cfg.data names, as latents with their conditioning."""
    if cfg.data == "samples":
        store = open_trajectories(Path(cfg.synvid or f"{cfg.run}/synvid"), cfg)
        items = [store.read(i, [0]) for i in range(min(cfg.data_count, len(store)))]
        conds = [cond for _, cond, _ in items]
        unconds = None if cfg.cfg_scale == 1 else load_conditioner(
            cfg, device, compute_dtype(device), False).with_text(cfg.negative_prompt, conds)
        return Data(torch.cat([x for x, _, _ in items]), conds, unconds)
    path = Path(cfg.clips or Path(cfg.run) / "clips") / f"{cfg.data}.safetensors"
    radius = SMALLER if cfg.data == "mismatched" else SIZE
    on_first_rank(lambda: keep_clips(cfg, path, radius, CLIPS_SEED, cfg.data_count, device))
    prompts = [Prompt(text) for text in make_captions(CLIPS_SEED, 0, cfg.data_count)]
    sizes = [(cfg.height, cfg.width)] * len(prompts)
    return Data(open_safetensors(path)["latents"].read(),
                *encode_prompts(cfg, prompts, sizes, True, device, Timer(device)))


# ---------------------------------------------------------------------------------- training

def velocities(cfg: Config, state: distill.TrainState, fake: nn.Module | None, data: Data,
               picked: list[int], device: torch.device) -> tuple[Velocity, Velocity, Velocity]:
    """Student, guided teacher and fake score as functions v(x, t), for the picked videos."""
    def collated(conds: list[dict]) -> dict:
        return {name: c.to(device) for name, c in collate([conds[i] for i in picked]).items()}

    cond = collated(data.conds)
    uncond = None if data.unconds is None else collated(data.unconds)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        v = state.teacher(x, t, cond)
        return v if uncond is None else v + (cfg.cfg_scale - 1) * (v - state.teacher(x, t, uncond))

    return (lambda x, t: state.student(x, t, cond)), teacher, (lambda x, t: fake(x, t, cond))


def compute_loss(cfg: Config, v: tuple[Velocity, Velocity, Velocity], x0: Tensor, grid: list[float],
                 draw: torch.Generator, train_fake: bool) -> Tensor:
    """The loss of one micro-batch, the student's or that of dmd's fake score.

    Each sample has its own window and its own times, as the methods' authors draw them.
    """
    student, teacher, fake = v
    z, noise = (torch.randn(x0.shape, generator=draw).to(x0.device) for _ in range(2))
    k = torch.randint(len(cfg.key) - 1, (len(x0),), generator=draw).to(x0.device)
    u = torch.rand(len(x0), generator=draw, dtype=torch.float64).to(x0.device)
    times = window_times(grid, cfg.key, k)
    if cfg.method == "perflow":
        return perflow_loss(student, teacher, x0, z, times, u)
    if cfg.method == "pcm":
        steps = (times.diff(dim=1) != 0).sum(1)
        return pcm_loss(student, teacher, x0, z, times, (u * steps).long())
    every = torch.tensor(grid, dtype=torch.float64, device=x0.device)
    inner, t_key, start = every[1:-1], every[cfg.key].flip(0), times[:, 0]
    t = inner[(u * len(inner)).long()]
    x = rollout(student, z, t_key, k) if cfg.simulate else add_noise(x0, z, start)
    with torch.set_grad_enabled(not train_fake):
        guess = predict_x0(student, x, start)
    if train_fake:
        return flow_matching_loss(fake, guess, noise, t)
    return dmd_loss(guess, teacher, fake, noise, t)


def train_baseline(cfg: Config, state: distill.TrainState, data: Data, ranks: Ranks) -> None:
    """Train the student, for dmd after each update of the fake score."""
    device = ranks.device
    grid = time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    networks = [("student", state.student, 1)]
    fake = None
    if cfg.method == "dmd":
        fake = load_dit(cfg.weights, cfg.preset, torch.float32, device, ranks,
                        compute_dtype(device))
        networks.insert(0, ("fake", fake, cfg.fake_updates))
        state.opts["fake"] = adamw(cfg, fake, cfg.offload)
    state.opts["student"] = state.opts["traj"]
    each, losses = cfg.batch // (cfg.micro_batch * ranks.dp_size), {}
    bar = progress_bar(cfg.iterations, f"{cfg.method}, {cfg.data}", ranks.rank)
    for step in range(cfg.iterations):
        for name, network, updates in networks:
            for update in range(updates):
                for part in range(each):
                    first = (part * ranks.dp_size + ranks.dp_rank) * cfg.micro_batch
                    slots = range(first, first + cfg.micro_batch)
                    picked = trajectories_of(cfg, step, slots, len(data.latents))
                    v = velocities(cfg, state, fake, data, picked, device)
                    draw = generator(cfg.method, cfg.seed, step, name, update, first)
                    loss = compute_loss(cfg, v, data.latents[picked].to(device), grid, draw,
                                        name == "fake")
                    (loss / each).backward()
                    losses[name] = loss.detach()
                params = [p for p in network.parameters() if p.grad is not None]
                lr = distill.learning_rate(cfg, step, cfg.lr)
                apply_update(state.opts[name], params, lr, cfg.clip)
        state.step = step + 1
        bar.update()
        if step % 10 == 9:
            values = {name: float(loss) for name, loss in losses.items()}
            if not all(math.isfinite(value) for value in values.values()):
                raise ValueError(f"{cfg.method}: iteration {step + 1}: losses are {values}: "
                                 "stopping. Lower lr")
            bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()}, refresh=False)
    bar.close()


def main(argv: list[str] | None = None) -> None:
    """Read the config, load or encode the data, train, export."""
    cfg = load_config(Config, "distill", argv, __doc__, "-m tools.baselines")
    if "run" not in cfg.given:  # <run> is that of the config, whose student is distill.py's
        cfg.synvid, cfg.clips = cfg.synvid or f"{cfg.run}/synvid", cfg.clips or f"{cfg.run}/clips"
        cfg.run = f"{cfg.run}/baselines/{cfg.method}-{cfg.data}-seed{cfg.seed}"
    sizes, teacher = check_model(cfg), fingerprint(cfg.weights)
    if sizes.boundary is not None:
        raise ValueError(f"preset: expected one with a single DiT, got {cfg.preset}: the baselines "
                         "draw a time per sample, and two experts need one for the batch")
    if cfg.data != "samples" and cfg.preset != "tiny":
        raise ValueError(f"data: expected samples for preset {cfg.preset}, got {cfg.data}: only "
                         "the small world can make clips")
    ranks = setup_distributed(cfg, cfg.sp, sizes.num_heads, distill.COLLECTIVE_TIMEOUT,
                              teacher=teacher)
    distill.check_config(cfg, ranks.dp_size)
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch // ranks.dp_size)
    with lock_run_folder(Path(cfg.run) / "distill"):
        announce(cfg, "distill", ranks.rank)
        data = load_data(cfg, ranks.device)
        state = distill.build(cfg, key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1], ranks)
        train_baseline(cfg, state, data, ranks)
        path = export_student(cfg, state, ranks, {"teacher": teacher})
    if ranks.rank == 0:
        print(f"student: {path}")
    dist.barrier()


if __name__ == "__main__":
    cli(main)
