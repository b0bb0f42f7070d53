"""Stage 2: distill the teacher into a student of m steps, Algorithm 1 of AccVideo.

    python distill.py [CONFIG]        torchrun --nproc-per-node 8 distill.py CONFIG

In:  the teacher's weights and <run>/synvid (for the small world, made by stage 1 if missing).
Out: <run>/student.safetensors (for a teacher with two experts, student_high_noise.safetensors
     and student_low_noise.safetensors) and student.md, which explains how other programs run it;
     <run>/distill/ with log.jsonl, curves.png and checkpoints. The same command resumes.

v_θ teacher · s_β student · H_k heads[k] · t'_k t_key[k] · l_{t'_k} x_key[k] · l^gen x_gen · Q_k
queues[k] · λ_adv lambda_adv · m steps of the student, n of the teacher; k = m noise, k = 0 data.
Tags D1 … D16: departures from the paper and open points, decided in docs/decisions.md.
"""

from __future__ import annotations

import common  # noqa: F401 (before torch, see common)
import math
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from artifacts.lora import load_lora_student
from artifacts.student import (
    check_replaceable, export_student, exported_path, high_checksum, load_high_student)
from common.config import Shared, announce, field, load_config
from common.names import fingerprint
from common.ranks import (
    Ranks, cli, compile_blocks, generator, limit_waiting, lock_run_folder, on_first_rank,
    print_line, progress_bar, setup_distributed)
from experts import expert_at
from model import check_model, euler_step, load_dit, sample_euler, sizes_of, velocity
from training import checkpoint, data, monitor, optimizer
from training.memory import check_resources

# ----------------------------------------------------------------------------------- losses
# Latents are [B,C,T,H,W], normalised as the DiT sees them; cond is the prompt's conditioning.

def traj_loss(student: nn.Module, x_key: dict[int, Tensor], t_key: list[float], k: int,
              cond: dict) -> Tensor:
    """Mean squared error of s_β(l_{t'_{k+1}}) against the slope to l_{t'_k}. Eq. 6, D8."""
    x, start = x_key[k], x_key[k + 1]
    slope = (x - start) / (t_key[k] - t_key[k + 1])
    return F.mse_loss(velocity(student, start, t_key[k + 1], cond), slope)


def student_step(student: nn.Module, x: Tensor, t_key: list[float], k: int, cond: dict) -> Tensor:
    """One Euler step of the student, from x at t'_{k+1} to t'_k. Alg. 1, line 16; Eq. 5."""
    v = velocity(student, x, t_key[k + 1], cond)
    return euler_step(x, v, t_key[k + 1], t_key[k])


def features(teacher: nn.Module, x: Tensor, t: float, cond: dict, tap: int) -> Tensor:
    """The teacher's features of x at time t after block `tap`: [B·T,D,h,w]. Eq. 8; D10, D12."""
    times = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
    _, [f] = expert_at(teacher, t)(x, times, cond, taps=(tap,), features_only=True)  # B L D
    f = F.layer_norm(f, f.shape[-1:]).unflatten(1, teacher.token_grid(*x.shape[2:]))
    return f.permute(0, 1, 4, 2, 3).flatten(0, 1)                      # (B T) D h w


def make_heads(cfg: Config, dim: int) -> nn.ModuleList:
    """H_0 … H_{m-1}, or one head for all k: 2D convolutions over a frame's features.

    A head maps [B·T,D,h,w] to one logit per patch [B·T,1,h,w] (D9), which is 0 at the start (D11).
    It has few channels, so that it is small compared with v_θ. Source: Eq. 8; the paper states only
    that a head is a 2D convolutional network.
    """
    count, c = len(cfg.key) - 1 if cfg.heads == "per_timestep" else 1, cfg.head_dim
    heads = nn.ModuleList(nn.Sequential(
        nn.Conv2d(dim, c, 1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(min(8, c), c),
        nn.SiLU(), nn.Conv2d(c, 1, 3, padding=1)) for _ in range(count))
    for name, p in heads.named_parameters():
        if p.ndim > 1 and not name.endswith(".5.weight"):  # the last layer starts at 0, D11
            nn.init.kaiming_uniform_(p, 5 ** 0.5, generator=generator("head", cfg.seed, name))
        elif not name.endswith("3.weight"):  # the GroupNorm's weight stays at 1
            nn.init.zeros_(p)
    return heads


def student_adv_loss(fake: Tensor, form: str) -> Tensor:
    """The student's side of L_adv, from the logits of generated latents. Eq. 7, D5."""
    if form == "nonsaturating":
        return F.softplus(-fake).mean()          # -log D
    if form == "printed":
        return -F.softplus(fake).mean()          # log(1 - D)
    return -fake.mean()                          # hinge


def head_loss(real: Tensor, fake: Tensor, form: str) -> Tensor:
    """The head's side of L_adv: -log D(real) - log(1 - D(fake)), or the hinge form. Eq. 7."""
    if form == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def adv_losses(head: nn.Module, teacher: nn.Module, x_gen: Tensor, x_real: Tensor, t: float,
               cond: dict, tap: int, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_adv for β (through frozen H_k and v_θ) and for H_k (features detached). Eq. 7, 8; D6.

    Returns (loss of β, loss of H_k, and the fractions of real and of generated patches that H_k
    judges correctly).
    """
    f_gen = features(teacher, x_gen, t, cond, tap)
    with torch.no_grad():
        f_real = features(teacher, x_real, t, cond, tap)
    frozen = {name: p.detach() for name, p in head.named_parameters()}
    loss_student = student_adv_loss(functional_call(head, frozen, (f_gen,)), form)
    real, fake = head(f_real), head(f_gen.detach())
    correct = [(logits.detach() > 0).float().mean() for logits in (real, -fake)]
    return loss_student, head_loss(real, fake, form), *correct


# ------------------------------------------------------------------------------- Algorithm 1

def algorithm_1(cfg: Config, state: TrainState, loader: Callable[[int], list[data.Batch]]
                ) -> Iterator[tuple[int, int, monitor.Log]]:
    """Distill, in the paper's order and symbols; yields (step, k, log) after each k-step.

    loader(step) returns the micro-batches of an iteration. The first column of tags is the line
    of Algorithm 1; build() has lines 1 and 3, model.key_times line 2.
    """
    student, teacher, heads, queues = state.student, state.teacher, state.heads, state.queues
    t_key, ks = state.t_key, data.trained_steps(cfg, state.t_key)        # m-1 … 0, or one expert's
    for step in range(state.step, cfg.iterations):                       # 4  while train       D2
        k, log = ks[step % len(ks)], monitor.Log(student)                # 5  for k = m-1 … 0
        batches = loader(step)                                           # 7  {l_t'} ~ SynVid
        log.lap("data")
        if cfg.traj:
            for b in batches:
                loss = traj_loss(student, b.x_key, t_key, k, b.cond)     # 9  L_traj         Eq. 6
                (loss / len(batches)).backward()
                log.add(loss_traj=loss)
            update_student(cfg, state, "traj", step, log)                # 10 β ← Update        D6
        if cfg.adv:
            for b in batches:
                if k == ks[0]:
                    z = data.fresh_noise(cfg, step, b)                   # 11 z ~ N(0, I)       D4
                    x = first_latent(student, z, t_key, k, b.cond)       #    z if k = m-1
                    queues[k + 1].append((x, b.x_key, b.cond))           # 12 Q_m.push
                x, x_key, cond = queues[k + 1].popleft()                 # 15 Q_{k+1}.pop
                with torch.set_grad_enabled(not cfg.checkpointing):
                    x_gen = student_step(student, x, t_key, k, cond)     # 16 Solver         Eq. 5
                if k > ks[-1]:
                    queues[k].append((x_gen.detach(), x_key, cond))      # 17 Q_k.push          D3
                loss, loss_head, real, fake = adv_losses(                # 20 L_adv       Eq. 7, 8
                    heads[k % len(heads)], teacher, x_gen.requires_grad_(), x_key[k], t_key[k],
                    cond, state.taps[k], cfg.adv_form)
                (cfg.lambda_adv * (loss + loss_head) / len(batches)).backward()
                if cfg.checkpointing:  # recompute, now that the teacher's activations are freed
                    student_step(student, x, t_key, k, cond).backward(x_gen.grad)
                log.add(loss_adv=loss, loss_head=loss_head, acc_real=real, acc_fake=fake)
            update_student(cfg, state, "adv", step, log)                 # 21 β ← Update        D6
            update_heads(cfg, state, step, log)                          # 22 H_k ← Update
        state.step = step + 1
        yield step, k, log


def first_latent(student: nn.Module, z: Tensor, t_key: list[float], k: int,
                 cond: dict) -> Tensor:
    """The student's x at t'_{k+1} from noise z: z itself if k = m-1. In a run that trains only the
    low-noise expert k is smaller, and the frozen high-noise expert takes the steps from z."""
    return [z, *sample_euler(student, z, t_key[k + 1:][::-1], cond)][-1]


def update_student(cfg: Config, state: TrainState, loss: str, step: int,
                   log: monitor.Log) -> None:
    """Update β after the backward passes of one loss, "traj" or "adv". D6."""
    log.lap(loss)
    params = [p for p in state.student.parameters() if p.grad is not None]
    if cfg.updates == "combined" and cfg.adv and cfg.traj:
        if loss == "traj":  # keep these gradients apart: both norms are logged
            state.traj_grads = [p.grad for p in params]
            return state.opts["traj"].zero_grad()
        norms = [optimizer.norm_of(g) for g in (state.traj_grads, [p.grad for p in params])]
        log.add(grad_traj=norms[0], grad_adv=norms[1])
        for p, grad in zip(params, state.traj_grads, strict=True):
            optimizer.local_part(p.grad).add_(optimizer.local_part(grad))
        state.traj_grads, loss = None, "sum"
    opt = state.opts[loss if loss in state.opts else "traj"]
    lr = learning_rate(cfg, step, cfg.lr)
    log.add(**{f"grad_{loss}": optimizer.apply_update(opt, params, lr, cfg.clip)})
    log.lap("optimizer")


def update_heads(cfg: Config, state: TrainState, step: int, log: monitor.Log) -> None:
    """Update H_k. Heads are small, so every rank keeps all of them and averages the gradients."""
    params = [p for p in state.heads.parameters() if p.grad is not None]
    for p in params:
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    lr = learning_rate(cfg, step, cfg.lr_heads or cfg.lr)
    log.add(grad_head=optimizer.apply_update(state.opts["heads"], params, lr, cfg.clip))
    log.lap("optimizer")


def learning_rate(cfg: Config, step: int, base: float) -> float:
    """Linear from `base` to lr_final · base at the last iteration. D15."""
    return base * (1 + (cfg.lr_final - 1) * step / max(cfg.iterations - 1, 1))


# ---------------------------------------------------------------------------------- settings

@dataclass
class Config(Shared):
    """Settings of a distillation; the defaults are the paper's where it states them."""
    synvid: str | None = field(None, "folder of trajectories; default <run>/synvid")
    iterations: int = field(1200, "k-steps (D2); the paper's 1200", "[1, inf)")
    batch: int = field(32, "samples per iteration over all ranks; the paper's 32", "[1, 1000000]")
    micro_batch: int = field(1, "most samples in one forward; gradients accumulate to batch",
                             "[1, inf)")
    lr: float = field(5e-6, "AdamW learning rate of the student; the paper's 5e-6", "(0, inf)")
    lr_final: float = field(1.0, "fraction of lr at the last iteration, reached linearly (D15); "
                            "other than 1 it fixes iterations", "[0, inf)")
    lr_heads: float | None = field(None, "learning rate of the heads; default lr", "(0, inf)")
    beta1: float = field(0.0, "AdamW first moment decay (not stated in the paper; D16)", "[0, 1)")
    beta2: float = field(0.999, "AdamW second moment decay (not stated)", "[0, 1)")
    weight_decay: float = field(0.0, "AdamW weight decay (not stated)", "[0, inf)")
    clip: float | None = field(1.0, "largest gradient norm of an update (not stated), or none",
                               "(0, inf)")
    lambda_adv: float = field(0.1, "weight of L_adv; the paper's 0.1", "[0, inf)")
    traj: bool = field(True, "train on L_traj, Eq. 6")
    adv: bool = field(True, "train on L_adv, Eq. 7")
    heads: Literal["per_timestep", "shared"] = field("per_timestep", "for each k, or all (Table 3)")
    head_dim: int = field(128, "channels inside a head", "[1, 65536]")
    adv_form: Literal["nonsaturating", "printed", "hinge"] = field("nonsaturating", "of L_adv (D5)")
    updates: Literal["literal", "separate", "combined"] = field("combined", "of the student (D6)")
    tap: int | None = field(None, "feature block for t'_k > 0, 0-based; default the last (D7)",
                            "[0, inf)")
    tap_data: int | None = field(None, "feature block for t'_0; default at 2/3 of the depth (D7)",
                                 "[0, inf)")
    experts: Literal["both", "high", "low"] = field(
        "both", "experts of Wan 2.2 A14B that this run trains (in two runs: first high, then low)")
    high_student: str | None = field(None, "with --experts low: the student of the high run; "
                                     "default <run>/student_high_noise.safetensors")
    held_out: int = field(32, "number of trajectories, the last ones, that are kept from training "
                          "for evaluation", "[1, 1000000]")
    eval_every: int = field(100, "iterations between evaluations", "[1, inf)")
    save_every: int = field(50, "iterations between checkpoints", "[1, inf)")
    keep: int = field(2, "checkpoints kept", "[1, inf)")
    checkpointing: bool = field(True, "recompute each block's activations in backward, and the "
                                "student's step of L_adv after the teacher's backward")
    compile: bool = field(False, "torch.compile every block")
    lora: int | None = field(None, "train a LoRA of this rank, which needs a larger lr, and write "
                             "student_lora.safetensors too; default: train all weights", "[1, inf)")
    offload: bool = field(False, "keep AdamW's moments in host memory, 8 bytes per parameter")
    sp: int = field(1, "ranks that share each sample's tokens (Ulysses sequence parallelism)",
                    "[1, inf)")
    force_plan: bool = field(False, "start even if the memory plan does not fit the GPU")
    export: Literal["official", "diffusers"] = field("official", "with diffusers, also write a "
                                                     "folder for it next to student.safetensors")
    export_dtype: Literal["bf16", "fp16", "fp32"] = field("bf16", "dtype of the student's file")
    export_every: int | None = field(None, "iterations between exports such as "
                                     "student_000100.safetensors, or none", "[1, inf)")
    peak_tflops: float | None = field(None, "device's dense peak for MFU, such as 989; default: "
                                      "MFU is not logged", "(0, inf)")


def check_config(cfg: Config, replicas: int) -> None:
    """Raise ValueError for settings that cannot work together.

    Args: replicas, the number of data-parallel replicas (Ranks.dp_size).
    """
    size = min(cfg.micro_batch, max(cfg.batch // replicas, 1))
    if cfg.batch % (size * replicas):
        raise ValueError(f"batch: expected a multiple of {size * replicas} (micro_batch {size} × "
                         f"{replicas} replica(s)), got {cfg.batch}: start another number of ranks, "
                         "or change micro_batch or, in a new run, batch")
    if not (cfg.traj or cfg.adv):
        raise ValueError("traj and adv are both off: nothing to train; switch one on")
    sizes = sizes_of(cfg.preset)
    last, D = sizes.num_layers - 1, sizes.dim
    for key, valid, expected in (
            ("experts", cfg.experts == "both" or sizes.boundary is not None,
             f"both, since preset '{cfg.preset}' has one DiT"),
            ("head_dim", cfg.head_dim % min(8, cfg.head_dim) == 0, "a multiple of 8, or fewer"),
            ("tap", cfg.tap is None or cfg.tap <= last, f"a block 0 … {last}"),
            ("tap_data", cfg.tap_data is None or cfg.tap_data <= last, f"a block 0 … {last}"),
            ("lora", cfg.lora is None or cfg.lora <= D, f"a rank 1 … {D}, or none")):
        if not valid:
            raise ValueError(f"{key}: expected {expected}, got {getattr(cfg, key)}")


# ------------------------------------------------------------------------------------- build

@dataclass
class TrainState:
    """The networks, optimizers and queues of a run, and its position."""
    student: nn.Module
    teacher: nn.Module
    heads: nn.ModuleList
    opts: dict[str, torch.optim.Optimizer]   # traj, heads, and adv if updates is separate (D6)
    t_key: list[float]
    taps: list[int]                          # by k
    queues: list[deque]                      # by k, of (x_gen, x_key, cond)
    step: int = 0
    traj_grads: list[Tensor] | None = None   # L_traj's, kept until L_adv's exist (D6, combined)


def build(cfg: Config, t_key: list[float], ranks: Ranks) -> TrainState:
    """β ← θ, frozen teacher, heads, optimizers, empty queues. Alg. 1, lines 1-3; D13."""
    dtype = ranks.dtype
    student = (load_dit(cfg.weights, cfg.preset, torch.float32, ranks.device, ranks, dtype,
                        cfg.experts)
               if cfg.lora is None else load_lora_student(cfg, ranks, dtype))
    # The high-noise expert's last step ends in the range of the low-noise expert, whose features
    # L_adv reads there: so both are loaded where only the high-noise expert is trained.
    teacher = load_dit(cfg.weights, cfg.preset, dtype, ranks.device, ranks,
                       experts="low" if cfg.experts == "low" else "both").requires_grad_(False)
    if cfg.experts == "low":
        student.high_noise_model = load_high_student(cfg, fingerprint(cfg.weights), dtype, ranks)
    for block in [*student.blocks, *teacher.blocks]:
        block.checkpointing = cfg.checkpointing
    for dit in (student, teacher) if cfg.compile else ():
        compile_blocks(dit)
    heads = make_heads(cfg, student.cfg.dim).to(ranks.device)
    opts = {"traj": optimizer.adamw(cfg, student, cfg.offload),
            "heads": optimizer.adamw(cfg, heads)}
    if cfg.updates == "separate":
        opts["adv"] = optimizer.adamw(cfg, student, cfg.offload)
    return TrainState(student, teacher, heads, opts, t_key,
                      tap_blocks(cfg, teacher.cfg.num_layers), [deque() for _ in t_key])


def tap_blocks(cfg: Config, depth: int) -> list[int]:
    """By k, the teacher's block, out of `depth`, whose features H_k reads. D7."""
    tap_data = math.ceil(depth * 2 / 3) - 1 if cfg.tap_data is None else cfg.tap_data
    return [tap_data] + [depth - 1 if cfg.tap is None else cfg.tap] * (len(cfg.key) - 2)


# ------------------------------------------------------------------------------------- train

def catch_signals() -> list[int]:
    """A list that collects the signals to stop, so that the current iteration can finish.

    SIGUSR1 and SIGUSR2 are SLURM's usual warnings. A second Ctrl-C ends the process at once.
    SIGHUP stays ignored where it already is, as under nohup.
    """
    caught: list[int] = []

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, catch)
    return caught


def is_export_step(cfg: Config, step: int) -> bool:
    """Whether the student is exported after `step` iterations, which are not the last."""
    return bool(cfg.export_every) and step % cfg.export_every == 0 and 0 < step < cfg.iterations


def train(cfg: Config, state: TrainState, loader: data.Loader, ranks: Ranks,
          meta: dict, folder: Path) -> None:
    """Run Algorithm 1 until its last iteration or a signal, then export the student.

    Args: meta, what checkpoints store besides tensors; folder, <run>/distill.
    """
    tokens = math.prod(state.student.token_grid(*loader.shape[1:]))
    journal = monitor.Journal(folder, state.step, ranks)
    teacher = monitor.teacher_errors(cfg, state.teacher, loader, ranks, journal)
    if is_export_step(cfg, state.step) and on_first_rank(  # failed, before the checkpoint was saved
            lambda: not exported_path(cfg, f"student_{state.step:06d}", cfg.experts).exists()):
        export_student(cfg, state, ranks, meta, f"student_{state.step:06d}")
    limit_waiting(ranks, COLLECTIVE_TIMEOUT)
    caught, saver = catch_signals(), checkpoint.Saver(folder, ranks, cfg.keep, state.step)
    with checkpoint.saving(saver, state, loader, meta), progress_bar(
            cfg.iterations, "distill", ranks.rank, state.step) as bar:
        for step, k, log in algorithm_1(cfg, state, loader):                     # load, step
            last = state.step == cfg.iterations
            figures = log.gather(stop=bool(caught), retry=saver.error is not None)
            stop, retry = figures.pop("stop") > 0, figures.pop("retry") > 0      # on any rank
            lr = learning_rate(cfg, step, cfg.lr)
            line = monitor.log_line(cfg, state, ranks, k, lr, tokens, figures)
            monitor.check_finite(line, folder)
            journal.append(line)                                                 # log
            if state.step % cfg.eval_every == 0 or last:                         # evaluate
                errors = monitor.held_out_errors(cfg, state.student, loader, ranks)
                journal.extend(errors | teacher)
            if is_export_step(cfg, state.step):
                export_student(cfg, state, ranks, meta, f"student_{state.step:06d}")
            if state.step % cfg.save_every == 0 or last or stop or retry:        # save
                checkpoint.save_state(saver, state, loader, meta)
            bar.set_postfix_str(monitor.short_form(line), refresh=False)
            bar.update()
            if stop:
                break
    if state.step < cfg.iterations:
        if ranks.rank == 0:  # lr_final fixes the number of iterations
            export = f", or with iterations={state.step} to export the student"
            print_line(f"stopped by a signal after iteration {state.step}: rerun the same command "
                       f"to resume{export if cfg.lr_final == 1 else ''}")
        return
    path = export_student(cfg, state, ranks, meta)
    if ranks.rank == 0:
        print_line(f"student: {path}  curves: {folder / 'curves.png'}")
        monitor.print_result(cfg, journal.lines)


# How long a rank waits for the others: first while they read weights and checkpoints, where some
# ranks may have more to read; then in the iterations, so that a lost node is noticed.
STARTUP_TIMEOUT, COLLECTIVE_TIMEOUT = timedelta(hours=2), timedelta(minutes=10)


def main(argv: list[str] | None = None) -> None:
    """Read the config, make a missing small SynVid, train or resume, export."""
    cfg = load_config(Config, "distill", argv, __doc__)
    sizes, teacher = check_model(cfg), fingerprint(cfg.weights)
    ranks = setup_distributed(cfg, cfg.sp, sizes.num_heads, STARTUP_TIMEOUT, teacher=teacher)
    on_first_rank(lambda: check_config(cfg, ranks.dp_size))
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch // ranks.dp_size)
    with lock_run_folder(checkpoint.run_folder(cfg)):
        on_first_rank(lambda: check_replaceable(exported_path(cfg, experts=cfg.experts)))
        trajectories = data.open_synvid(cfg)
        loader = data.Loader(cfg, trajectories, ranks)
        meta = {"config": asdict(cfg), "teacher": teacher, "count": loader.count,
                "synvid": trajectories.checksum}
        if cfg.experts == "low":
            meta["high"] = on_first_rank(lambda: high_checksum(cfg))
        if ranks.rank == 0:
            monitor.print_bill(cfg, tap_blocks(cfg, sizes.num_layers), loader.shape)
        check_resources(cfg, loader.shape, ranks)
        state = build(cfg, trajectories.t_key, ranks)
        checkpoint.resume(cfg, state, loader, ranks, meta)
        train(cfg, state, loader, ranks, meta, announce(cfg, checkpoint.run_folder(cfg).name,
                                                        ranks.rank))
    dist.barrier()


if __name__ == "__main__":
    cli(main)
