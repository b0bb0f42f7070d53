"""Train one small network: Muon and AdamW, a moving average, a training state on disk.

An interrupted `fit` continues with the same bits. Networks, data and losses are in teacher.py.
"""

import copy
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.files import append_log
from common.weights import open_safetensors, safetensors_metadata, save_tensors

# -------------------------------------------------------------------------------- Optimisers


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum: each matrix steps by 0.2 sqrt(longer side) U Vᵀ of its momentum.

    Convolution kernels [out, in, ...] count as matrices [out, in * ...]. The polynomial iteration
    runs on the small Gram matrix, all matrices of one shape at once. Source: Jordan et al., Muon,
    2024 (iteration, Nesterov momentum 0.95); Liu et al., arXiv 2502.16982 (scale). torch.optim.Muon
    takes no kernels, and matrices one by one in bf16: 1.1 to 2.4 times as long for the tiny DiT's.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__([{"params": params}], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(p.flatten(1).shape, []).append(p)
            for shape, params in by_shape.items():
                nesterov = [p.grad.lerp(self.state[p]["momentum"], group["momentum"])
                            for p in params]
                update = orthogonalise(torch.stack([m.flatten(1) for m in nesterov]))
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

NOTE_EVERY = 50  # iterations per line of the log
# A training state belongs to these settings and to those that start with the network's label.
COMMON = ("seed", "height", "width", "frames")
AVERAGE_DECAY = 0.999  # of the moving average of the weights, per iteration


def folder(cfg: Any) -> Path:
    """<run>/teacher."""
    return Path(cfg.run) / "teacher"


def note(cfg: Any, **entry) -> None:
    """Append one line to <run>/teacher/log.jsonl."""
    append_log(folder(cfg) / "log.jsonl", {"time": round(time.time(), 1), **entry})


def state_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of modules and optimisers by name; an optimiser's by index of the parameter."""
    tensors = {}
    for name, of in state.items():
        values = of.state_dict()
        if isinstance(of, torch.optim.Optimizer):
            values = {f"{i}.{key}": value for i, of_parameter in values["state"].items()
                      for key, value in of_parameter.items()}
        tensors |= {f"{name}.{key}": value for key, value in values.items()}
    return tensors


def same_or_longer(stored: dict, settings: dict, label: str) -> bool:
    """Whether a state trained with `stored` may be continued with `settings`, where only iterations
    and pool may have grown: a longer run continues a shorter one."""
    growing = {name: settings[name] for name in (f"{label}_iters", f"{label}_pool")
               if name in settings}
    return (stored | growing == settings
            and all(stored.get(name, 0) <= value for name, value in growing.items()))


def load_state(path: Path, label: str, settings: dict, state: dict[str, Any]) -> tuple[int, float]:
    """Read the file at `path` into `state`; returns the iterations and seconds done so far.

    Raises ValueError if it cannot be read or belongs to other settings.
    """
    if not path.exists():
        return 0, 0.0
    about, tensors = safetensors_metadata(path), open_safetensors(path)
    if not same_or_longer(json.loads(about.get("settings", "{}")), settings, label):
        raise ValueError(f"{path} was trained with {about.get('settings')}, expected "
                         f"{json.dumps(settings)}: choose another --run, or remove the file")
    for name, of in state.items():
        stored = {key.removeprefix(f"{name}."): t.read() for key, t in tensors.items()
                  if key.startswith(f"{name}.")}
        if isinstance(of, torch.optim.Optimizer):
            values: dict[int, dict] = {}
            for key, value in stored.items():
                i, _, what = key.partition(".")
                values.setdefault(int(i), {})[what] = value
            stored = {"state": values, "param_groups": of.state_dict()["param_groups"]}
        of.load_state_dict(stored)
    return int(about["iteration"]), float(about["seconds"])


def fit(cfg: Any, label: str, module: nn.Module, iters: int, lrs: tuple[float, float],
        decay_from: float, loss_of, evaluate=None,
        made_from: dict[str, str] | None = None) -> nn.Module:
    """Train `module` and return the moving average of its weights, in evaluation mode.

    Args: lrs, learning rates of Muon and of AdamW, constant at first, then falling as a cosine from
    the fraction `decay_from` of the iterations on; loss_of(i), the loss of iteration i, whose draws
    are all seeded by i; evaluate(average), figures for the log; made_from, what else the result
    depends on that is not a setting of this network.
    The state is saved every `save_every` seconds. With more `iters` than before, a finished run
    continues at the longer run's rates. Raises ValueError if a loss is not finite.
    """
    path, begun = folder(cfg) / f"{label}_state.safetensors", time.perf_counter()
    settings = {name: value for name, value in asdict(cfg).items()
                if name in COMMON or name.startswith(f"{label}_")} | (made_from or {})
    average = copy.deepcopy(module).requires_grad_(False).eval()
    muon, adam = optimisers(module, *lrs)
    state = {"module": module, "average": average, "muon": muon, "adam": adam}
    first, spent = load_state(path, label, settings, state)
    saved, total, count = begun, 0.0, 0  # the sum and number of the losses to log next
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
        decay = min(AVERAGE_DECAY, (i + 1) / (i + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
        total, count = total + loss.item(), count + 1
        if not math.isfinite(total):
            raise ValueError(f"{label}: loss {loss.item()} at iteration {i}; {path} is the last "
                             f"good state: lower the learning rates of '{label}' in "
                             "small_world/teacher.py")
        done, seconds = i + 1, spent + time.perf_counter() - begun
        if evaluate is not None and (done % cfg.eval_every == 0 or done == iters):
            note(cfg, stage=label, iteration=done, seconds=round(seconds, 1), **evaluate(average))
        if done % NOTE_EVERY == 0 or done == iters:
            note(cfg, stage=label, iteration=done, seconds=round(seconds, 1), loss=total / count)
            bar.set_postfix(loss=f"{total / count:.4f}")
            total, count = 0.0, 0
            if done == iters or time.perf_counter() - saved > cfg.save_every:
                save_tensors(path, state_tensors(state), {
                    "settings": json.dumps(settings), "iteration": str(done),
                    "seconds": str(seconds)})
                saved = time.perf_counter()
    return average
