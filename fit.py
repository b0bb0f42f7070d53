"""How the small networks are trained: Muon with AdamW, a moving average, a state on disk.

`fit` trains one network; interrupted, the same command continues with the same bits. What is
trained and on what is teacher.py's.
"""

import copy
import json
import math
import pickle
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import model

# -------------------------------------------------------------------------------- Optimisers


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: each matrix steps by 0.2 sqrt(longer side) U Vᵀ of its momentum.

    Convolution kernels [out, in, ...] count as matrices [out, in * ...]. The polynomial iteration
    runs on the small Gram matrix, all matrices of one shape at once. Source: Jordan et al., Muon,
    2024 (iteration, Nesterov momentum 0.95); Liu et al., arXiv 2502.16982 (scale).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__([{"params": params}], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                alike.setdefault(p.flatten(1).shape, []).append(p)
            for shape, params in alike.items():
                ahead = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params]
                update = orthogonalise(torch.stack([m.flatten(1) for m in ahead]))
                for p, u in zip(params, update, strict=True):
                    p.add_(u.view_as(p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalise(x: Tensor) -> Tensor:
    """Roughly U Vᵀ of each matrix x [n, rows, columns] = U S Vᵀ, by five quintic iterations."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1)
    gram, identity = x @ x.mT, torch.eye(x.shape[1], device=x.device)
    total = identity.expand_as(gram)
    for _ in range(5):
        p = 3.4445 * identity - 4.7750 * gram + 2.0315 * (gram @ gram)
        total, gram = p @ total, p @ gram @ p
    return total @ x


def optimisers(module: nn.Module, muon_lr: float, adam_lr: float) -> tuple:
    """Muon for the weight matrices and kernels of the blocks, AdamW for everything else."""
    matrices, rest = [], []
    for name, p in module.named_parameters():
        inner = name.startswith(("blocks.", "encoder.", "decoder."))
        matrix = inner and p.ndim > 1 and min(p.flatten(1).shape) >= 16
        (matrices if matrix else rest).append(p)
    return Muon(matrices, muon_lr), torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.99),
                                                      weight_decay=0.0)


# ---------------------------------------------------------------------------------- Training

NOTE_EVERY = 50  # iterations of one line of the log
# Settings of every training; those named after one of them belong to it.
COMMON = ("seed", "height", "width", "frames", "ema")


def folder(cfg: Any) -> Path:
    """<run>/teacher, made if it is missing."""
    path = Path(cfg.run) / "teacher"
    path.mkdir(parents=True, exist_ok=True)
    return path


def note(cfg: Any, **entry) -> None:
    """Append one line to <run>/teacher/log.jsonl."""
    with open(folder(cfg) / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"time": round(time.time(), 1), **entry}) + "\n")


def log_lines(cfg: Any) -> list[dict]:
    """The lines of <run>/teacher/log.jsonl."""
    text = (folder(cfg) / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def resume(path: Path, settings: str, loaded: dict) -> tuple[int, float]:
    """Iterations and seconds done according to the state at `path`, which is read into `loaded`.

    Raises ValueError if it cannot be read, or belongs to other settings.
    """
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and train anew") from error
    if state["settings"] != settings:
        raise ValueError(f"{path} was trained with {state['settings']}, this run wants {settings}: "
                         "choose another --run, or remove the file")
    for name, target in loaded.items():
        target.load_state_dict(state[name])
    return state["iteration"], state["seconds"]


def fit(cfg: Any, label: str, module: nn.Module, iters: int, lrs: tuple[float, float],
        decay_from: float, loss_of, look=None,
        made_from: dict[str, str] | None = None) -> nn.Module:
    """Train `module` and return the moving average of its weights, in evaluation mode.

    `lrs` are those of Muon and of AdamW, constant at first and falling as a cosine from the part
    `decay_from` of the iterations on; `loss_of(i)` is the loss of iteration i, all its draws
    seeded by i; `look(average)` returns figures for the log; `made_from` names what else decides
    the result and is no setting of this training. The state is saved every `save_every`
    seconds: the same command continues with the same bits. Raises ValueError if a loss is not
    finite.
    """
    path, begun = folder(cfg) / f"{label}.pt", time.perf_counter()
    settings = json.dumps({name: value for name, value in asdict(cfg).items()
                           if name in COMMON or name.startswith(f"{label}_")}
                          | (made_from or {}))
    average = copy.deepcopy(module).requires_grad_(False).eval()
    muon, adam = optimisers(module, *lrs)
    state = {"module": module, "average": average, "muon": muon, "adam": adam}
    first, spent = resume(path, settings, state)
    saved, total = begun, 0.0
    bar = tqdm(range(first, iters), label, iters, initial=first, disable=None, mininterval=1)
    for i in bar:
        part = max(0.0, (i / iters - decay_from) / (1 - decay_from))
        scale = min(1.0, (i + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * part))
        loss = loss_of(i)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for stepper, lr in zip((muon, adam), lrs, strict=True):
            for group in stepper.param_groups:
                group["lr"] = lr * scale
            stepper.step()
            stepper.zero_grad()
        decay = min(cfg.ema, (i + 1) / (i + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
        total += loss.item()
        if not math.isfinite(total):
            raise ValueError(f"{label}: loss {loss.item()} at iteration {i}; {path} is the last "
                             f"good state: lower {label}_muon_lr or {label}_adam_lr")
        done, seconds = i + 1, spent + time.perf_counter() - begun
        if look is not None and (done % cfg.eval_every == 0 or done == iters):
            note(cfg, stage=label, iteration=done, seconds=round(seconds, 1), **look(average))
        if done % NOTE_EVERY == 0 or done == iters:
            total /= done % NOTE_EVERY or NOTE_EVERY
            note(cfg, stage=label, iteration=done, seconds=round(seconds, 1), loss=total)
            bar.set_postfix(loss=f"{total:.4f}")
            total = 0.0
            if done == iters or time.perf_counter() - saved > cfg.save_every:
                values = {name: target.state_dict() for name, target in state.items()}
                values |= {"settings": settings, "iteration": done, "seconds": seconds}
                model.replace_file(path, lambda aside, values=values: torch.save(values, aside))
                saved = time.perf_counter()
    return average
