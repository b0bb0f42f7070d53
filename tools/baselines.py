"""Baselines for stage 2: three ways to distill on data instead of the teacher's trajectories.

    python -m tools.baselines [CONFIG] --method perflow --data matched [--run DIR] [--seed 1]
    torchrun --nproc-per-node 8 -m tools.baselines CONFIG --method dmd --data samples

In:  the teacher's folder; with --data samples also <run>/synvid (or --synvid). The settings are
     distill.py's, as far as the methods have them. A stopped run starts from the beginning.
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
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import distill
from artifacts.student import export_student
from artifacts.trajectories import open_trajectories
from common.config import Shared, announce, field, load_config, settings_to_compare
from common.names import fingerprint
from common.prompts import Prompt
from common.ranks import (
    Ranks, Timer, cli, compute_dtype, generator, lock_run_folder, on_first_rank, prefer_attention,
    progress_bar, setup_distributed)
from common.weights import open_safetensors, safetensors_metadata, save_tensors
from distill import COLLECTIVE_TIMEOUT, build, learning_rate
from frozen.load import encode_prompts, load_conditioner, load_vae
from model import check_model, collate, key_times, load_dit, time_grid
from small_world.clips import SIZE, make_clips
from training.data import epoch_order
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
    fake_updates: int = field(2, "dmd: updates of the fake score per update of the student",
                              "[1, inf)")


# ------------------------------------------------------------------------------------ losses
# x0 data and z noise [B,C,T,H,W]; t times [B]; a window is [t'_k, t'_{k+1}]. Cost per sample and
# iteration, in forwards of the teacher: PeRFlow n/m + 3, PCM 5, DMD 5 + 5 per fake update.

def expand(t: Tensor, x: Tensor) -> Tensor:
    """Times [B] in a shape that broadcasts with x [B, …]."""
    return t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def add_noise(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t z. Eq. 2."""
    return x0 + expand(t, x0) * (z - x0)


def same_time(t: float, x: Tensor) -> Tensor:
    """The time t of every sample of x [B, …]: float64 [B]."""
    return torch.full((len(x),), t, dtype=torch.float64, device=x.device)


@torch.no_grad()
def integrate(v: Velocity, x: Tensor, times: list[float]) -> Tensor:
    """x after Euler steps of v along falling times. Eq. 5."""
    for t, t_next in zip(times, times[1:], strict=False):
        x = x + (t_next - t) * v(x, same_time(t, x))
    return x


def perflow_loss(student: Velocity, teacher: Velocity, x0: Tensor, z: Tensor, times: list[float],
                 u: Tensor) -> Tensor:
    """PeRFlow: the teacher integrates noised data through a window; the student learns the chord.

    Args: times, the teacher's grid in the window, from t'_{k+1} down to t'_k; u [B] in [0, 1],
    where on the chord the student is evaluated. Source: Yan et al., arXiv 2405.07510.
    """
    high = add_noise(x0, z, same_time(times[0], x0))
    slope = (integrate(teacher, high, times) - high) / (times[-1] - times[0])
    t = times[0] + u.double() * (times[-1] - times[0])
    x = high + expand(t - times[0], high) * slope
    return F.mse_loss(student(x, t), slope)


def to_window_end(v: Velocity, x: Tensor, t: float, end: float) -> Tensor:
    """One Euler step of v from t to the window's end; the identity if t is the end."""
    return x + (end - t) * v(x, same_time(t, x))


def pcm_loss(student: Velocity, teacher: Velocity, x0: Tensor, z: Tensor, times: list[float],
             j: int) -> Tensor:
    """PCM: the student's window end from times[j] agrees with that from one teacher step later.

    Without adversarial loss and moving average. Args: times as in perflow_loss; j in
    0 … len(times) - 2. Source: phased consistency, Wang et al., arXiv 2405.18407.
    """
    x = add_noise(x0, z, same_time(times[j], x0))
    with torch.no_grad():
        target = integrate(teacher, x, times[j:j + 2])
        if j + 2 < len(times):
            target = to_window_end(student, target, times[j + 1], times[-1])
    return F.mse_loss(to_window_end(student, x, times[j], times[-1]), target)


def dmd_student_x0(student: Velocity, x0: Tensor, z: Tensor, t: float) -> Tensor:
    """DMD: the student's prediction of x0 from data noised to t."""
    x = add_noise(x0, z, same_time(t, x0))
    return x - t * student(x, same_time(t, x))


def dmd_loss(guess: Tensor, teacher: Velocity, fake: Velocity, noise: Tensor, t: Tensor) -> Tensor:
    """DMD: a loss whose gradient moves `guess`, the student's x0, along the difference of scores.

    The scores are the teacher's and that of a copy, `fake`, trained on the student's outputs, both
    at `guess` noised to t [B]; the gradient is divided by the teacher's distance to the guess.
    Without regression loss and discriminator. Source: Yin et al., arXiv 2311.18828 and 2405.14867.
    """
    with torch.no_grad():
        x = add_noise(guess, noise, t)
        real_x0, fake_x0 = (x - expand(t, x) * v(x, t) for v in (teacher, fake))
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


@torch.no_grad()
def encode_clips(cfg: Shared, radius: tuple[float, float], seed: int, count: int,
                 device: torch.device) -> tuple[Tensor, list[str]]:
    """Latents [count,C,T,H,W] and captions of the small world's clips."""
    vae, latents, captions = load_vae(cfg.weights, device, family=cfg.family), [], []
    for start in tqdm(range(0, count, 32), "encode", mininterval=1, disable=None):
        clips, texts, _ = make_clips(seed, start, min(32, count - start), cfg.height, cfg.frames,
                                     radius=radius)
        latents += [vae.encode(part.to(device)).cpu() for part in clips.split(4)]
        captions += texts
    return torch.cat(latents), captions


def keep_clips(cfg: Shared, path: Path, radius: tuple[float, float], seed: int, count: int,
               device: torch.device) -> None:
    """Encode the small world's clips of a seed and a range of radii, unless `path` holds them."""
    facts = {"weights": str(fingerprint(cfg.weights)), "clips": f"{count} of {seed}, {radius}"}
    if path.exists() and facts.items() <= safetensors_metadata(path).items():
        return
    latents, captions = encode_clips(cfg, radius, seed, count, device)
    save_tensors(path, {"latents": latents}, {**facts, "captions": "\n".join(captions)})


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
    on_first_rank(lambda: keep_clips(cfg, path, radius, 1, cfg.data_count, device))
    prompts = [Prompt(text) for text in safetensors_metadata(path)["captions"].split("\n")]
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
                 k: int, draw: torch.Generator, train_fake: bool) -> Tensor:
    """The loss of one micro-batch in window k: the student's, or that of dmd's fake score."""
    student, teacher, fake = v
    high, low = cfg.key[-2 - k], cfg.key[-1 - k]  # the window in the teacher's grid
    times = grid[high:low + 1]
    z, noise = (torch.randn(x0.shape, generator=draw).to(x0.device) for _ in range(2))
    u = torch.rand(len(x0), generator=draw)
    if cfg.method == "perflow":
        return perflow_loss(student, teacher, x0, z, times, u.to(x0.device))
    if cfg.method == "pcm":
        return pcm_loss(student, teacher, x0, z, times, int(u[0] * (len(times) - 1)))
    inner = torch.tensor(grid[1:-1], dtype=torch.float64)
    t = inner[(u * len(inner)).long()].to(x0.device)
    if train_fake:
        with torch.no_grad():
            guess = dmd_student_x0(student, x0, z, times[0])
        return flow_matching_loss(fake, guess, noise, t)
    return dmd_loss(dmd_student_x0(student, x0, z, times[0]), teacher, fake, noise, t)


def train_baseline(cfg: Config, state: distill.TrainState, data: Data, ranks: Ranks) -> None:
    """Train the student, window by window from noise to data, as distill.py does."""
    device, m = ranks.device, len(state.t_key) - 1
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
        k = m - 1 - step % m
        for name, network, updates in networks:
            for update in range(updates):
                for part in range(each):
                    first = (part * ranks.dp_size + ranks.dp_rank) * cfg.micro_batch
                    positions = [divmod(step * cfg.batch + first + slot, len(data.latents))
                                 for slot in range(cfg.micro_batch)]
                    picked = [epoch_order(cfg.seed, epoch, len(data.latents))[position]
                              for epoch, position in positions]
                    v = velocities(cfg, state, fake, data, picked, device)
                    draw = generator(cfg.method, cfg.seed, step, name, update, first)
                    loss = compute_loss(cfg, v, data.latents[picked].to(device), grid, k, draw,
                                        name == "fake")
                    (loss / each).backward()
                    losses[name] = loss.detach()
                params = [p for p in network.parameters() if p.grad is not None]
                lr = learning_rate(cfg, step, cfg.lr)
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
    ranks = setup_distributed(cfg.device, cfg.sp, sizes.num_heads, COLLECTIVE_TIMEOUT,
                              same=settings_to_compare(cfg, teacher=teacher))
    prefer_attention(cfg.attention, ranks.device)
    distill.check_config(cfg, ranks.dp_size)
    if cfg.data != "samples" and cfg.preset != "tiny":
        raise ValueError(f"data: expected samples for preset {cfg.preset}, got {cfg.data}: only "
                         "the small world can make clips")
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch // ranks.dp_size)
    with lock_run_folder(Path(cfg.run) / "distill"):
        announce(cfg, "distill", ranks.rank)
        data = load_data(cfg, ranks.device)
        state = build(cfg, key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1], ranks)
        train_baseline(cfg, state, data, ranks)
        path = export_student(cfg, state, ranks, {"teacher": teacher})
    if ranks.rank == 0:
        print(f"student: {path}", flush=True)
    dist.barrier()


if __name__ == "__main__":
    cli(main)
