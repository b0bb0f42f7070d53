"""What a training run logs: figures per iteration, log.jsonl, curves.png and held-out errors."""

import json
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.files import append_log, error_summary, read_log, write_text
from common.ranks import Ranks, Timer, end_all, errors_on_all_ranks, on_first_rank, print_line
from common.video import draw_panels
from model import sample_euler, sizes_of, velocity
from training.memory import meta_student


class Log:
    """Figures of one iteration: kept on the device and gathered once, at its end."""

    def __init__(self, student: nn.Module):
        self.timer, self.values = Timer(next(student.parameters()).device), {}
        self.lap = self.timer.lap

    def add(self, **figures: Tensor) -> None:
        """Add one micro-batch's figures; the mean over micro-batches and ranks is logged."""
        for name, value in figures.items():
            self.values.setdefault(name, []).append(value.detach().float().to(self.timer.device))

    def gather(self, **flags: bool) -> dict[str, float]:
        """Means over micro-batches and ranks, and the seconds of each part.

        A flag is > 0 if it is set on any rank.
        """
        self.add(**{name: torch.tensor(float(flag)) for name, flag in flags.items()})
        names = sorted(self.values)
        means = torch.stack([torch.stack(self.values[n]).mean() for n in names])
        dist.all_reduce(means)
        out = dict(zip(names, (means / dist.get_world_size()).tolist(), strict=True))
        return out | {f"s_{name}": seconds for name, seconds in self.timer.seconds().items()}


def log_line(cfg: Any, state: Any, ranks: Ranks, k: int, lr: float, tokens: int,
             figures: dict[str, float]) -> dict:
    """One iteration's line of log.jsonl, from its gathered figures and the tokens of a sample."""
    seconds = sum(value for name, value in figures.items() if name.startswith("s_"))
    line = {"step": state.step, "k": k, **figures, "lr": lr, "seconds": seconds,
            "tokens_per_s": cfg.batch * tokens / seconds}
    if "grad_adv" in line and "grad_traj" in line:
        line["grad_ratio"] = line["grad_adv"] / max(line["grad_traj"], 1e-30)
    if cfg.peak_tflops is not None:
        peak = cfg.peak_tflops * 1e12 * ranks.world
        line["mfu"] = step_flops(cfg, state.student, state.taps[k], tokens) / seconds / peak
    if ranks.device.type == "cuda":  # to compare with the memory plan
        line["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    return line


def short_form(line: dict) -> str:
    """The figures of a line that the progress bar shows."""
    return " ".join(f"{name}={line[name]:.3g}" for name in
                    ("loss_traj", "loss_adv", "acc_fake", "mfu") if name in line)


def step_flops(cfg: Any, dit: nn.Module, tap: int, tokens: int, recomputed: bool = False) -> float:
    """Floating-point operations of an iteration that reads the teacher's features after block
    `tap`; if `recomputed`, with what checkpointing computes again, which MFU does not count.

    Student: forward and backward (3 forwards' worth, 2 with a LoRA) for each loss; teacher: two
    forwards and a backward to its input, up to the tap.
    """
    tapped = (tap + 1) / dit.cfg.num_layers
    student = 3 if cfg.lora is None else 2
    forwards = student * (cfg.traj + cfg.adv) + 3 * cfg.adv * tapped
    if recomputed and cfg.checkpointing:
        forwards += cfg.traj + cfg.adv * (2 + tapped)
    return forwards * cfg.batch * dit.flops(tokens)


def print_bill(cfg: Any, taps: list[int], shape: tuple[int, ...]) -> None:
    """Print the work of all iterations on latents of `shape` [C,T,H,W], computed from shapes."""
    dit = meta_student(sizes_of(cfg.preset), cfg.lora)
    tokens = math.prod(dit.token_grid(*shape[1:]))
    flop = cfg.iterations * mean(step_flops(cfg, dit, tap, tokens, True) for tap in taps)
    print(f"distill: {cfg.iterations} iterations of {cfg.batch} samples, {flop:.3g} FLOP in all: "
          f"{flop / 1.44e18:.3g} GPU-hours at 400 TFLOP/s (40% of an H100's peak)")


def check_finite(line: dict, folder: Path) -> None:
    """Raise ValueError if a figure is not finite; all ranks have the same line and stop."""
    bad = [name for name, value in line.items() if not math.isfinite(value)]
    if bad:
        end_all(f"iteration {line['step']}, k={line['k']}: {bad[0]} is {line[bad[0]]}: rerun the "
                f"same command to resume from the last good checkpoint in {folder}; if it comes "
                "again, lower lr or set clip in another --run")


class Journal:
    """log.jsonl, one line per iteration, and curves.png; the first rank writes both.

    Neither ends a run: if one cannot be written, a warning is printed, and training continues. A
    line that is missing from the file is written with the next held-out errors.
    Args: folder that holds them; step, the last iteration to keep: later ones will be repeated.
    """

    def __init__(self, folder: Path, step: int, ranks: Ranks):
        self.path, self.writes, self.lines = folder / "log.jsonl", ranks.rank == 0, []
        if self.writes:
            self.lines = [x for x in read_log(self.path, "step", "k") if x["step"] <= step]
            self.rewrite()

    def attempt(self, write: Callable[..., None], *args: Any) -> None:
        """write(*args), or print why that failed."""
        try:
            write(*args)
        except Exception as e:  # matplotlib raises many kinds
            print_line(f"warning: {error_summary(e)}; training continues")

    def rewrite(self) -> None:
        """Replace the file by the lines."""
        self.attempt(write_text, self.path, "".join(json.dumps(x) + "\n" for x in self.lines))

    def append(self, line: dict) -> None:
        """Log an iteration with the time of day."""
        if self.writes:
            self.lines.append({"time": datetime.now().astimezone().isoformat(timespec="seconds"),
                               **line})
            self.attempt(append_log, self.path, self.lines[-1])

    def extend(self, errors: dict) -> None:
        """Add held-out errors to the last iteration's line, and redraw the curves."""
        if self.writes:
            self.lines[-1] |= errors
            self.rewrite()
            self.attempt(draw_curves, self.path.with_name("curves.png"), self.lines)


def print_result(cfg: Any, lines: list[dict]) -> None:
    """Print the last held-out errors of student and teacher."""
    for last in [x for x in lines if "endpoint" in x][-1:]:
        how = "at the same steps" + (", without guidance" if cfg.guidance != 1 else "")
        print(f"held-out endpoint error: student {last['endpoint']:.4f}, teacher {how} "
              f"{last['endpoint_teacher']:.4f} (ratio "
              f"{last['endpoint'] / last['endpoint_teacher']:.2f})")


def relative_error(x: Tensor, y: Tensor) -> Tensor:
    """‖x − y‖² / ‖y‖² of every sample: [B]."""
    return (x - y).flatten(1).square().sum(1) / y.flatten(1).square().sum(1)


@torch.no_grad()
def held_out_errors(cfg: Any, dit: nn.Module, loader: Any, ranks: Ranks) -> dict:
    """How far a network at the key timesteps is from held-out trajectories of the teacher.

    Returns endpoint, ‖its m-step result − l_0‖² / ‖l_0‖² from the stored noise, and velocity, that
    ratio for the slope of Eq. 6, by k; means over the held-out trajectories of all ranks. A run
    that trains one expert compares the stored latents around that one's steps, and velocity is None
    at the others' k. Raises AgreedError naming a damaged trajectory.
    """
    t_key, size, ks = loader.data.t_key, cfg.micro_batch, sorted(loader.ks)
    m, first, end = len(t_key) - 1, ks[-1] + 1, ks[0]
    sums = torch.zeros(len(ks) + 2, device=ranks.device)
    for start in range(0, cfg.held_out, size * ranks.dp_size):  # every rank runs as many forwards
        rows = [start + ranks.dp_rank * size + j for j in range(size)]
        real = torch.tensor([float(r < cfg.held_out) for r in rows], device=ranks.device)
        with errors_on_all_ranks():
            b = loader.batch([loader.count + min(r, cfg.held_out - 1) for r in rows], rows,
                             list(range(m + 1)))
        *_, x = sample_euler(dit, b.x_key[first], t_key[end:first + 1][::-1], b.cond)
        errors = [relative_error(x, b.x_key[end])]
        for k in ks:
            slope = (b.x_key[k] - b.x_key[k + 1]) / (t_key[k] - t_key[k + 1])
            v = velocity(dit, b.x_key[k + 1], t_key[k + 1], b.cond)
            errors.append(relative_error(v, slope))
        sums += torch.cat([(torch.stack(errors) * real).sum(1), real.sum()[None]])
    dist.all_reduce(sums)
    endpoint, *by_k = (sums[:-1] / sums[-1]).tolist()
    found = dict(zip(ks, by_k, strict=True))
    return {"endpoint": endpoint, "velocity": [found.get(k) for k in range(m)]}


def teacher_errors(cfg: Any, teacher: nn.Module, loader: Any, ranks: Ranks,
                   journal: Journal) -> dict:
    """The teacher's held-out errors, named *_teacher; read from the log if an earlier start wrote
    them."""
    logged = on_first_rank(lambda: next((
        {name: x[name] for name in x if name.endswith("_teacher")}
        for x in journal.lines if "endpoint_teacher" in x), None))
    return logged or {f"{name}_teacher": error for name, error in
                      held_out_errors(cfg, teacher, loader, ranks).items()}


def draw_curves(path: Path, lines: list[dict]) -> None:
    """Losses, head accuracy, gradient norms and held-out error from the log, as one PNG."""
    m = len(lines[-1]["velocity"])
    by_k = [(f"k={k}", [x for x in lines if x["k"] == k]) for k in range(m)]
    norms = [(f"grad_{name}", name, lines, "-") for name in ("traj", "adv", "sum", "head")]
    draw_panels(path, {
        "L_traj (Eq. 6)": [("loss_traj", label, of_k, "-") for label, of_k in by_k],
        "head accuracy: real (solid), generated (dashed)":
            [("acc_real", label, of_k, "-") for label, of_k in by_k]
            + [("acc_fake", None, of_k, "--") for _, of_k in by_k],
        "gradient norms before clipping": norms,
        "held-out endpoint error": [("endpoint", "student", lines, "o-"),
                                    ("endpoint_teacher", "teacher, no CFG", lines, "--")]},
        x="step", linear=("head accuracy",), colours=m)
