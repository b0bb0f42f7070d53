"""Stage 2: distill the teacher into a student of m steps, Algorithm 1 of AccVideo.

    python distill.py [CONFIG]        torchrun --nproc-per-node 8 distill.py CONFIG

Input: <run>/synvid (made first if the config is the small world's), the teacher's weights.
Output: <run>/student.safetensors, and student.md that says how other programs run it; with --lora
RANK also student_lora.safetensors, which is all that learned;
<run>/distill/ with log.jsonl, curves.png and checkpoints.
The same command resumes. Cost: per sample and iteration about 9 forwards of the teacher's size
without recomputation (two forwards and backwards of the student, 3 forwards' worth of the teacher);
with it 13, and less memory (docs/scaling.md).

The paper's symbols: v_θ teacher · s_β student · H_k heads[k] · t'_k t_key[k] · l_{t'_k} x_key[k] ·
l^gen x_gen · Q_k queues[k] · λ_adv lambda_adv · m, n.  k = m is noise, k = 0 is data.

Departures from the paper and open points, as decided here:
  D1 key timesteps are indices into the teacher's grid, computed, never typed.
  D2 an iteration is one k-step; m iterations are one pass over k.
  D3 Q_0 is never popped, so it is not kept; entries carry their conditioning and are detached.
  D4 the generated and the real latent share the prompt, not the noise: z is fresh. The real one is
     of the trajectory that was pushed with z (line 20 may also mean the one sampled in line 7).
  D5 the student's adversarial loss is -log D by default; log(1 - D) as printed or hinge by choice.
  D6 β is updated twice through one AdamW (literal), by an AdamW for each loss (separate) or once on
     L_traj + λ_adv L_adv (combined, the default). An Adam step does not scale a lone loss, so λ_adv
     means little in the first two. x_gen's features are computed once for β and H_k.
  D7 features: the last block for t'_k > 0, the block at 2/3 of the depth for t'_k = 0.
  D8 Eq. 6 is a mean over a latent's elements, as L_adv is over patches. So λ_adv weighs two means;
     against a sum it would be smaller by the number of elements, 3 million at 544×960×93.
  D9 a head gives a verdict for each patch of each frame; L_adv is their mean.
  D10 features pass a LayerNorm without weights before a head: blocks differ in scale.
  D11 a head's last layer starts at zero, so that its first verdict is 0.5; lr_heads is its own
     setting, where the paper names one learning rate for all.
  D12 features come from the conditional branch, with embedded guidance and without CFG.
  D13 on GPUs the teacher is bf16; the student has fp32 weights and computes in bf16.
  D14 Wan's key timesteps are every 5th (T2V) or 4th (I2V) index: the authors' release, not the
     paper.
  D15 the learning rate may fall linearly (lr_final); the paper names a constant one.
  D16 AdamW has no first moment (beta1 0), which the paper does not state: k changes from iteration
     to iteration, and a moment carries one k's gradient into the next k's step. docs/results.md
     has the measurement.
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field as attribute, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from artifacts.lora import load_lora_student
from artifacts.student import bytes_a_parameter, export_student
from artifacts.trajectories import SynVid, find_trajectories, read_manifest
from common.config import (
    Shared, announce, field, load_config, load_yaml, settings_to_compare)
from common.files import ROOT, append_log, path_hint, crc32_of_json, read_log, write_text
from common.names import fingerprint
from common.ranks import (
    AgreedError, Ranks, cli, compile_blocks, compute_dtype, generator, on_first_rank, lock_run_folder,
    prefer_attention, require_same, setup_distributed)
from model import check_model, euler_step, frozen_copy, load_dit, sizes_of, velocity
from training.checkpoint import Saver, check_disk, resume, save_state
from training.data import Batch, Loader, fresh_noise
from training.memory import print_plans
from training.monitor import Log, draw_curves, held_out_errors, log_line, print_result
from training.optimizer import adamw, clip, norm_of, own_rows, step as step_adamw



@dataclass
class Config(Shared):
    """Settings of a distillation; the paper's where it states them."""
    synvid: str | None = field(None, "folder of trajectories; none: <run>/synvid")
    iterations: int = field(1200, "k-steps (D2); the paper's 1200", "[1, inf)")
    batch: int = field(32, "samples an iteration over all ranks; the paper's 32", "[1, 1000000]")
    micro_batch: int = field(1, "samples a forward at most; the rest is gradient accumulation",
                             "[1, inf)")
    lr: float = field(5e-6, "AdamW learning rate of the student; the paper's 5e-6", "(0, inf)")
    lr_final: float = field(1.0, "share of lr left at the last iteration, reached linearly",
                            "[0, inf)")
    lr_heads: float | None = field(None, "learning rate of the heads; none: lr", "(0, inf)")
    beta1: float = field(0.0, "AdamW first moment decay (not stated in the paper; D16)", "[0, 1)")
    beta2: float = field(0.999, "AdamW second moment decay (not stated)", "[0, 1)")
    weight_decay: float = field(0.0, "AdamW weight decay (not stated)", "[0, inf)")
    clip: float | None = field(1.0, "largest gradient norm of an update (not stated), or none",
                               "(0, inf)")
    lambda_adv: float = field(0.1, "weight of L_adv; the paper's 0.1", "[0, inf)")
    traj: bool = field(True, "train on L_traj, Eq. 6")
    adv: bool = field(True, "train on L_adv, Eq. 7")
    heads: Literal["per_timestep", "shared"] = field("per_timestep", "or one for all k (Table 3)")
    head_dim: int = field(128, "channels inside a head", "[1, 65536]")
    adv_form: Literal["nonsaturating", "printed", "hinge"] = field("nonsaturating", "see D5")
    updates: Literal["literal", "separate", "combined"] = field("combined", "see D6")
    tap: int | None = field(None, "feature block for t'_k > 0, 0-based; none: the last (D7)",
                            "[0, inf)")
    tap_data: int | None = field(None, "feature block for t'_0; none: at 2/3 of the depth (D7)",
                                 "[0, inf)")
    held_out: int = field(32, "last trajectories kept from training, for evaluation",
                          "[1, 1000000]")
    eval_every: int = field(100, "iterations between evaluations", "[1, inf)")
    save_every: int = field(50, "iterations between checkpoints", "[1, inf)")
    keep: int = field(2, "checkpoints kept", "[1, inf)")
    checkpointing: bool = field(True, "recompute in backward each block's activations, and the "
                                "student's step of L_adv after the teacher's backward")
    compile: bool = field(False, "torch.compile every block")
    lora: int | None = field(None, "rank of a LoRA that learns, at a larger lr; none: all weights",
                             "[1, inf)")
    offload: bool = field(False, "keep AdamW's moments in host memory, 8 bytes a parameter")
    sp: int = field(1, "ranks that share each sample's tokens (Ulysses sequence parallelism)",
                    "[1, inf)")
    force_plan: bool = field(False, "start although the memory plan does not fit the GPU")
    export: Literal["official", "diffusers"] = field("official", "diffusers: beside "
                                                     "student.safetensors a folder for it")
    export_dtype: Literal["bf16", "fp16", "fp32"] = field("bf16", "of the student's file")
    export_every: int | None = field(None, "iterations between student_000100.safetensors, or none",
                                     "[1, inf)")
    peak_tflops: float | None = field(None, "device's dense peak for MFU, as 989; none: no MFU",
                                      "(0, inf)")


def check_config(cfg: Config, replicas: int) -> None:
    """Raise ValueError for settings that cannot work together; replicas, Ranks.dp_size."""
    size = min(cfg.micro_batch, max(cfg.batch // replicas, 1))
    if cfg.batch % (size * replicas):
        raise ValueError(f"batch: got {cfg.batch}; wanted a multiple of micro_batch {size} × "
                         f"{replicas} rank(s) = {size * replicas}")
    if not (cfg.traj or cfg.adv):
        raise ValueError("traj and adv are both off: nothing to train; switch one on")
    depth, width, D = sizes_of(cfg.preset).num_layers, cfg.head_dim, sizes_of(cfg.preset).dim
    for key, good, wanted in (
            ("head_dim", width % min(8, width) == 0, "a multiple of 8, or fewer"),
            ("tap", cfg.tap is None or cfg.tap < depth, f"a block 0 … {depth - 1}"),
            ("tap_data", cfg.tap_data is None or cfg.tap_data < depth, f"0 … {depth - 1}"),
            ("lora", cfg.lora is None or cfg.lora <= D, f"a rank 1 … {D}, or none")):
        if not good:
            raise ValueError(f"{key}: got {getattr(cfg, key)}; wanted {wanted}")
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # of a rank whose others do not come


# ------------------------------------------------------------------------- heads and losses

def make_heads(cfg: Config, dim: int) -> nn.ModuleList:
    """H_0 … H_{m-1}, or one head for all k: 2D convolutions over a frame's grid of features.

    [B·T,D,h,w] -> logits [B·T,1,h,w], a verdict a patch (D9); zero at first, by the seed (D11).
    Few channels from the first layer on keep a head small beside v_θ. Source: Eq. 8; the paper says
    no more than "2D convolutional".
    """
    count, c = len(cfg.key) - 1 if cfg.heads == "per_timestep" else 1, cfg.head_dim
    heads = nn.ModuleList(nn.Sequential(
        nn.Conv2d(dim, c, 1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(min(8, c), c),
        nn.SiLU(), nn.Conv2d(c, 1, 3, padding=1)) for _ in range(count))
    for name, p in heads.named_parameters():
        if p.ndim > 1 and p.shape[0] > 1:
            nn.init.kaiming_uniform_(p, 5 ** 0.5, generator=generator("head", cfg.seed, name))
        elif not name.endswith("3.weight"):  # the norm's stays at 1
            nn.init.zeros_(p)
    return heads


def tap_blocks(cfg: Config, depth: int) -> list[int]:
    """The teacher's block whose features H_k reads, by k, of `depth` blocks. D7."""
    data = math.ceil(depth * 2 / 3) - 1 if cfg.tap_data is None else cfg.tap_data
    return [data] + [depth - 1 if cfg.tap is None else cfg.tap] * (len(cfg.key) - 2)


def traj_loss(student: nn.Module, x_key: dict[int, Tensor], t_key: list[float], k: int,
              cond: dict) -> Tensor:
    """Mean squared error between s_β(l_{t'_{k+1}}) and the slope to l_{t'_k}. Eq. 6, D8."""
    x, start = x_key[k], x_key[k + 1]
    slope = (x - start) / (t_key[k] - t_key[k + 1])
    return F.mse_loss(velocity(student, start, t_key[k + 1], cond), slope)


def student_step(student: nn.Module, x: Tensor, t_key: list[float], k: int, cond: dict) -> Tensor:
    """The student's latents at t'_k from x, those at t'_{k+1}. Alg. 1, line 16; Eq. 5."""
    v = velocity(student, x, t_key[k + 1], cond)
    return euler_step(x, v, t_key[k + 1], t_key[k])


def features(teacher: nn.Module, x: Tensor, t: float, cond: dict, tap: int) -> Tensor:
    """Features of latents x at time t after the teacher's block `tap`, by frame: [B·T,D,h,w].
    Eq. 8; D10, D12."""
    times = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
    _, [f] = teacher(x, times, cond, taps=(tap,), features_only=True)  # B L D
    f = F.layer_norm(f, f.shape[-1:]).unflatten(1, teacher.token_grid(*x.shape[2:]))
    return f.permute(0, 1, 4, 2, 3).flatten(0, 1)                      # (B T) D h w


def student_adv_loss(fake: Tensor, form: str) -> Tensor:
    """What β minimises, from the logits of generated latents. Eq. 7, D5."""
    if form == "nonsaturating":
        return F.softplus(-fake).mean()          # -log D
    if form == "printed":
        return -F.softplus(fake).mean()          # log(1 - D)
    return -fake.mean()                          # hinge


def head_loss(real: Tensor, fake: Tensor, form: str) -> Tensor:
    """What H_k minimises: -log D(real) - log(1 - D(fake)), or the hinge form. Eq. 7."""
    if form == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def adv_losses(head: nn.Module, teacher: nn.Module, x_gen: Tensor, x_real: Tensor, t: float,
               cond: dict, tap: int, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_adv for β (through frozen H_k and v_θ) and for H_k (features detached). Eq. 7, 8; D6.

    Returns (loss for β, loss for H_k, share of real judged real, share of generated judged so).
    """
    f_gen = features(teacher, x_gen, t, cond, tap)
    with torch.no_grad():
        f_real = features(teacher, x_real, t, cond, tap)
    frozen = {name: p.detach() for name, p in head.named_parameters()}
    loss_student = student_adv_loss(functional_call(head, frozen, (f_gen,)), form)
    real, fake = head(f_real), head(f_gen.detach())
    right = [(logits.detach() > 0).float().mean() for logits in (real, -fake)]
    return loss_student, head_loss(real, fake, form), *right


# ------------------------------------------------------------------------------- Algorithm 1

@dataclass
class TrainState:
    """Everything a run's state consists of; `queues` holds (x_gen, x_key, cond) by k."""
    student: nn.Module
    teacher: nn.Module
    heads: nn.ModuleList
    opts: dict[str, torch.optim.Optimizer]   # traj, heads, and adv if D6 separates them
    t_key: list[float]
    taps: list[int]                          # by k
    queues: list[deque]
    step: int = 0
    traj_grads: list[Tensor] = attribute(default_factory=list)  # waiting for L_adv's (D6, combined)


def algorithm_1(cfg: Config, state: TrainState,
                loader: Callable[[int], list[Batch]]) -> Iterator[tuple[int, int, Log]]:
    """Distill, in the paper's order and symbols; yields (step, k, figures) after each k-step.

    Args: loader(step) gives the micro-batches of an iteration. The tags are Algorithm 1's lines;
    build() has lines 1 to 3.
    """
    student, teacher, heads, queues = state.student, state.teacher, state.heads, state.queues
    t_key, m = state.t_key, len(state.t_key) - 1
    for step in range(state.step, cfg.iterations):                       # 4  while train       D2
        k, log = m - 1 - step % m, Log(student)                          # 5  for k = m-1 … 0
        batches = loader(step)                                           # 7  {l_t'} ~ SynVid
        log.lap("data")
        if cfg.traj:
            for b in batches:
                loss = traj_loss(student, b.x_key, t_key, k, b.cond)     # 9  L_traj         Eq. 6
                (loss / len(batches)).backward()
                log.add(loss_traj=loss)
            log.lap("traj")
            update_student(cfg, state, "traj", step, log)                # 10 β ← Update        D6
        if cfg.adv:
            for b in batches:
                if k == m - 1:
                    z = fresh_noise(cfg, step, b)                        # 11 z ~ N(0, I)       D4
                    queues[m].append((z, b.x_key, b.cond))               # 12 Q_m.push
                x, x_key, cond = queues[k + 1].popleft()                 # 15 Q_{k+1}.pop
                with torch.set_grad_enabled(not cfg.checkpointing):
                    x_gen = student_step(student, x, t_key, k, cond)     # 16 Solver         Eq. 5
                if k > 0:
                    queues[k].append((x_gen.detach(), x_key, cond))      # 17 Q_k.push          D3
                loss, loss_head, real, fake = adv_losses(                # 20 L_adv       Eq. 7, 8
                    heads[k % len(heads)], teacher, x_gen.requires_grad_(), x_key[k], t_key[k],
                    cond, state.taps[k], cfg.adv_form)
                (cfg.lambda_adv * (loss + loss_head) / len(batches)).backward()
                if cfg.checkpointing:  # anew, now that the teacher's activations are gone
                    student_step(student, x, t_key, k, cond).backward(x_gen.grad)
                log.add(loss_adv=loss, loss_head=loss_head, acc_real=real, acc_fake=fake)
            log.lap("adv")
            update_student(cfg, state, "adv", step, log)                 # 21 β ← Update        D6
            update_heads(cfg, state, step, log)                          # 22 H_k ← Update
        state.step = step + 1
        yield step, k, log


def learning_rate(cfg: Config, step: int, base: float) -> float:
    """Linear from `base` to lr_final of it at the last iteration. D15."""
    return base * (1 + (cfg.lr_final - 1) * step / max(cfg.iterations - 1, 1))


def apply_update(cfg: Config, opt: torch.optim.Optimizer, params: list, lr: float) -> Tensor:
    """Clip, step and clear the gradients; returns the gradient norm before clipping."""
    gradients = [p.grad for p in params]
    norm = norm_of(gradients)
    if cfg.clip is not None:
        clip(gradients, cfg.clip, norm)
    for group in opt.param_groups:
        group["lr"] = lr
    step_adamw(opt)
    opt.zero_grad()
    return norm


def update_student(cfg: Config, state: TrainState, loss: str, step: int, log: Log) -> None:
    """Update β after the backward passes of one loss, "traj" or "adv", as D6 has it."""
    params = [p for p in state.student.parameters() if p.grad is not None]
    if cfg.updates == "combined" and cfg.adv and cfg.traj:
        if loss == "traj":  # set aside, so that both norms are seen; one step for both
            state.traj_grads = [p.grad for p in params]
            return state.opts["traj"].zero_grad()
        norms = norm_of(state.traj_grads), norm_of([p.grad for p in params])
        log.add(grad_traj=norms[0], grad_adv=norms[1])
        for p, grad in zip(params, state.traj_grads, strict=True):
            own_rows(p.grad).add_(own_rows(grad))
        state.traj_grads, loss = [], "sum"
    opt = state.opts[loss if loss in state.opts else "traj"]
    log.add(**{f"grad_{loss}": apply_update(cfg, opt, params, learning_rate(cfg, step, cfg.lr))})
    log.lap("optimizer")


def update_heads(cfg: Config, state: TrainState, step: int, log: Log) -> None:
    """Update H_k; heads are small, so every rank keeps all of them and gradients are averaged."""
    params = [p for p in state.heads.parameters() if p.grad is not None]
    for p in params:
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    lr = learning_rate(cfg, step, cfg.lr if cfg.lr_heads is None else cfg.lr_heads)
    log.add(grad_head=apply_update(cfg, state.opts["heads"], params, lr))
    log.lap("optimizer")


# --------------------------------------------------------------------------- build, train

def build(cfg: Config, t_key: list[float], ranks: Ranks) -> TrainState:
    """β ← θ, frozen teacher, heads, optimizers, empty queues. Alg. 1, lines 1-3; D13."""
    dtype, m = compute_dtype(ranks.device), len(t_key) - 1
    student = (load_dit(cfg.weights, cfg.preset, torch.float32, ranks.device, ranks, dtype)
               if cfg.lora is None else load_lora_student(cfg, ranks, dtype))
    teacher = frozen_copy(student, cfg.preset, dtype, ranks)
    for block in [*student.blocks, *teacher.blocks]:
        block.checkpointing = cfg.checkpointing
    for dit in (student, teacher) if cfg.compile else ():
        compile_blocks(dit)
    heads = make_heads(cfg, student.cfg.dim).to(ranks.device)
    opts = {"traj": adamw(cfg, student, cfg.offload), "heads": adamw(cfg, heads)}
    if cfg.updates == "separate":
        opts["adv"] = adamw(cfg, student, cfg.offload)
    return TrainState(student, teacher, heads, opts, t_key, tap_blocks(cfg, len(teacher.blocks)),
                [deque() for _ in range(m + 1)])


def open_synvid(cfg: Config) -> SynVid:
    """The trajectories of this run; the small world's are made first if some are missing."""
    folder = Path(cfg.synvid) if cfg.synvid is not None else Path(cfg.run) / "synvid"
    if cfg.preset == "tiny" and cfg.synvid is None:
        on_first_rank(lambda: make_small_synvid(cfg, folder))
    if not (folder / "manifest.json").exists():
        raise FileNotFoundError(f"{folder}: no SynVid here{path_hint(folder)}: make it by `python "
                                f"synvid.py {cfg.path}`")
    return SynVid(folder, cfg)


def make_small_synvid(cfg: Config, folder: Path) -> None:
    """Run stage 1 of the small world unless all trajectories of its config are there."""
    if len(find_trajectories(folder)) >= load_yaml(cfg.path)["synvid"]["count"]:
        return
    shared = {f.name: getattr(cfg, f.name) for f in fields(Shared)}
    if (folder / "manifest.json").exists():  # another seed, the same data
        shared["seed"] = read_manifest(folder)["seed"]
    options = [f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
               for name, value in shared.items() if value is not None]
    one = {name: value for name, value in os.environ.items()
           if not name.startswith(("TORCHELASTIC", "MASTER_")) and not name.endswith("RANK")
           and not name.endswith("WORLD_SIZE")}
    command = [sys.executable, str(ROOT / "synvid.py"), str(cfg.path), *options]
    if subprocess.run(command, env=one).returncode:
        raise ValueError(f"{folder}: stage 1 failed: see the messages above")


def catch_signals() -> list[int]:
    """Signals that ask for an end, as they come: the iteration is finished first."""
    caught: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: caught.append(number))
    return caught


def main(argv: list[str] | None = None) -> None:
    """Read the config, make a missing small SynVid, train or resume, export."""
    cfg = load_config(Config, "distill", argv, __doc__)
    sizes, teacher = check_model(cfg), fingerprint(cfg.weights)
    ranks = setup_distributed(cfg.device, cfg.sp, sizes.num_heads, COLLECTIVE_TIMEOUT,
                              same=settings_to_compare(cfg, teacher=teacher))
    prefer_attention(cfg.attention, ranks.device)
    check_config(cfg, ranks.dp_size)
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch // ranks.dp_size)
    with lock_run_folder(Path(cfg.run) / "distill"):
        data = open_synvid(cfg)
        contents = crc32_of_json(data.manifest)
        require_same({"synvid": contents})
        loader = Loader(cfg, data, ranks)
        meta = {"config": asdict(cfg), "teacher": teacher, "count": loader.count,
                "synvid": contents}
        on_first_rank(lambda: check_resources(cfg, loader.shape, ranks))
        state = build(cfg, data.t_key, ranks)
        resume(cfg, state, loader, ranks, meta)
        folder = announce(cfg, "distill", ranks.rank)
        train(cfg, state, loader, ranks, meta, folder)
    dist.barrier()


def train(cfg: Config, state: TrainState, loader: Loader, ranks: Ranks, meta: dict,
          folder: Path) -> None:
    """Run Algorithm 1 to its end or to a signal: log, evaluate, save; then export."""
    first, m = ranks.rank == 0, len(state.t_key) - 1
    tokens = math.prod(state.student.token_grid(*loader.shape[1:]))
    lines = [x for x in read_log(folder / "log.jsonl", "step", "k") if x["step"] <= state.step]
    if first:  # what a crash cut off, or will be repeated, goes
        write_text(folder / "log.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    base = teacher_errors(cfg, state.teacher, loader, ranks, lines)
    stop, saver = catch_signals(), Saver(folder, ranks, cfg.keep, state.step)

    def save() -> None:
        save_state(saver, state, loader, meta)

    bar = tqdm(total=cfg.iterations, initial=state.step, desc="distill", disable=not first,
               mininterval=0.5 if sys.stderr.isatty() else 60)
    try:
        for step, k, log in algorithm_1(cfg, state, loader):
            line, flags = log_line(cfg, state, ranks, log, k, learning_rate(cfg, step, cfg.lr),
                                   tokens, stop=bool(stop), retry=saver.error is not None)
            check_finite(line, saver, folder)
            last = state.step == cfg.iterations
            try:
                if state.step % cfg.eval_every == 0 or last:
                    line |= held_out_errors(cfg, state.student, loader, ranks) | base
            finally:
                lines.append(line)
                if first:  # before the checkpoint: a line too many is dropped on resuming
                    append_log(folder / "log.jsonl", line)
            if state.step % cfg.save_every == 0 or last or flags["stop"] or flags["retry"]:
                save()
            if cfg.export_every and state.step % cfg.export_every == 0 and not last:
                export_student(cfg, state, ranks, meta, f"student_{state.step:06d}")
            if first and "endpoint" in line:
                draw_curves(folder / "curves.png", lines, m)
            bar.set_postfix_str(" ".join(f"{name}={line[name]:.3g}" for name in
                                         ("loss_traj", "loss_adv", "acc_fake", "mfu")
                                         if name in line), refresh=False)
            bar.update()
            if flags["stop"]:
                break
        bar.close()
        saver.finish(save)
    except AgreedError:  # of all ranks, between two iterations: what is done is kept
        bar.close()
        if state.step > saver.step:
            save()
        saver.finish(save)
        raise
    except BaseException:
        saver.let_finish()
        raise
    if state.step < cfg.iterations:
        if first:
            print(f"stopped by a signal after iteration {state.step}: the same command goes on")
        return
    path = export_student(cfg, state, ranks, meta)
    if first:
        print(f"student: {path}  curves: {folder / 'curves.png'}", flush=True)
        print_result(cfg, lines)


def check_finite(line: dict, saver: Saver, folder: Path) -> None:
    """Raise ValueError on all ranks if a figure is not finite, when the last save is complete."""
    bad = [name for name, value in line.items() if not math.isfinite(value)]
    if bad:
        saver.wait()
        error = ValueError(f"iteration {line['step']}, k={line['k']}: {bad[0]} is {line[bad[0]]}: "
                           f"stop; the last good checkpoint stays in {folder}. Lower lr, or set "
                           "clip")
        raise error if dist.get_rank() == 0 else SystemExit(1)


def check_resources(cfg: Config, shape: tuple[int, ...], ranks: Ranks) -> None:
    """Print the memory plan; ValueError if the run will not fit on the disk."""
    learning, frozen, moments = print_plans(cfg, shape, ranks)
    check_disk(Path(cfg.run) / "distill", learning, moments, cfg.keep,
               bytes_a_parameter(cfg) * (learning + frozen))


def teacher_errors(cfg: Config, teacher: nn.Module, loader: Loader, ranks: Ranks,
                   lines: list[dict]) -> dict:
    """The teacher's held-out errors as figures of the log, where an earlier start may have them."""
    earlier = on_first_rank(lambda: next((
        {name: x[name] for name in x if name.endswith("_teacher")}
        for x in lines if "endpoint_teacher" in x), None))
    return earlier or {f"{name}_teacher": error for name, error in
                       held_out_errors(cfg, teacher, loader, ranks).items()}
if __name__ == "__main__":
    cli(main)
