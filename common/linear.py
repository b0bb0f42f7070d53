"""Linear layers and GELU as in torch, faster on CPUs with AVX-512.

torch multiplies fp32 matrices with MKL, which uses half of the vector width on CPUs that are not
Intel's. oneDNN, which torch includes as well, uses all of it: half the time on an AMD EPYC 9005.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

HAS_ONEDNN = (torch.backends.mkldnn.is_available()
              and hasattr(torch.ops.mkldnn, "_linear_pointwise")
              and torch.backends.cpu.get_cpu_capability() == "AVX512")
WORTH = 2 ** 21  # with fewer multiplications, calling oneDNN takes longer than it saves;
ROWS = 4         # with fewer rows of x, too (a single row: up to twice as long as MKL)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN should multiply: large fp32 tensors on this CPU, of the usual shapes (it does
    not check them), not compiled, no autocast."""
    return (HAS_ONEDNN and x.is_cpu and weight.is_cpu and x.dtype == weight.dtype == torch.float32
            and x.ndim > 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1]
            and (bias is None or bias.is_cpu and bias.is_contiguous()
                 and bias.shape == weight.shape[:1])
            and x.numel() * len(weight) >= WORTH and x.numel() >= ROWS * x.shape[-1]
            and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling())


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the transpose of weight [out, in], plus bias, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """F.linear of x [L,in]; the operator has no backward of its own."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad  # frozen tensors cost no memory
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        to_weight = None
        if of_weight:  # first, at the lowest memory; the narrower matrix is left: it is copied
            wide = grad.shape[1] > x.shape[1]
            to_weight = multiply(x.t(), grad.t()).t() if wide else multiply(grad.t(), x.t())
        return (multiply(grad, weight.t()) if of_x else None, to_weight,
                grad.sum(0) if of_bias else None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x [..., in], weight [out, in], bias [out] -> [..., out]."""
    if not by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return multiply(x, weight, bias)
    return OneDNNLinear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """nn.Linear computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


SLOPE = 2 * math.sqrt(2 / math.pi)  # GELU(x) = x·sigmoid(SLOPE·(x + 0.044715·x³)), its tanh form


class SigmoidGELU(torch.autograd.Function):
    """The tanh form of GELU by a sigmoid, which takes less than half of tanh's time on a CPU."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * x).mul_(0.044715 * SLOPE).add_(SLOPE).mul_(x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        x, = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh"); a GPU has one kernel for it and compilers fuse it."""
    if not x.is_cpu or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return SigmoidGELU.apply(x)


class GELU(nn.Module):
    """nn.GELU(approximate="tanh") computed by `gelu`."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)
