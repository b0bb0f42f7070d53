"""AdamW on sharded weights. It treats each element independently, so every rank updates its rows as
plain tensors: for many small tensors, DTensor's dispatch would take longer than the update."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as adamw_step


def local_part(x: Tensor) -> Tensor:
    """This rank's rows of a tensor, or all of one that is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def adamw(cfg: Any, module: nn.Module, offload: bool = False) -> torch.optim.AdamW:
    """AdamW over a module's trainable parameters.

    Its state is allocated here, so that a checkpoint can be loaded into it.
    Args: offload, whether the moments of a sharded module are kept in host memory.
    """
    def zeros(p: nn.Parameter) -> Tensor:
        if not offload:
            return torch.zeros_like(p.detach())
        local = torch.zeros(p.to_local().shape)  # pinned memory could take twice as much
        return DTensor.from_local(local, hosts, p.placements, shape=p.shape, stride=p.stride())

    hosts = init_device_mesh("cpu", (dist.get_world_size(),)) if offload else None
    trainable = [p for p in module.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trainable, cfg.lr, (cfg.beta1, cfg.beta2),
                            weight_decay=cfg.weight_decay)
    for p in trainable:
        opt.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": zeros(p),
                        "exp_avg_sq": zeros(p)}
    return opt


@torch.no_grad()
def step(opt: torch.optim.AdamW) -> None:
    """opt.step() with torch's fused kernel. With offloaded moments it updates one parameter after
    the other and copies its moments to the device and back."""
    (group,) = opt.param_groups
    params = [p for p in group["params"] if p.grad is not None]
    offloaded = any(opt.state[p]["exp_avg"].device != p.device for p in params)
    for part in [[p] for p in params] if offloaded else [params]:
        rows, count = [local_part(p) for p in part], len(part)
        moments = [local_part(opt.state[p][name]) for name in ("exp_avg", "exp_avg_sq")
                   for p in part]
        on_device = [x.to(rows[0].device) for x in moments]  # the same tensors if not offloaded
        adamw_step(rows, [local_part(p.grad) for p in part], on_device[:count], on_device[count:],
                   [], [opt.state[p]["step"] for p in part], foreach=False, fused=True,
                   amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                   weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
        if offloaded:
            for x, value in zip(moments, on_device, strict=True):
                x.copy_(value)
            del on_device, value  # free them before the next ones are copied in


def norm_of(gradients: list[Tensor]) -> Tensor:
    """Gradient norm over all ranks."""
    square = nn.utils.get_total_norm([local_part(g) for g in gradients]).square()
    if isinstance(gradients[0], DTensor):
        dist.all_reduce(square)
    return square.sqrt()


def apply_update(opt: torch.optim.AdamW, params: list[nn.Parameter], lr: float,
                 limit: float | None) -> Tensor:
    """Clip the gradients' norm to a limit, update, and clear them; returns the unclipped norm."""
    gradients = [p.grad for p in params]
    norm = norm_of(gradients)
    if limit is not None:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local_part(gradient).mul_(scale)
    opt.param_groups[0]["lr"] = lr
    step(opt)
    opt.zero_grad()
    return norm
