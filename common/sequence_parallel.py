"""Sequence parallelism (`--sp`): the ranks of a group share the tokens of each sample.

Between attention layers a rank has a part of the tokens with all heads, within attention all tokens
with a part of the heads. Shapes: B batch, L tokens, l those of one rank, D width, N heads, d width
of a head. Source: Jacobs et al., DeepSpeed-Ulysses, 2023.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class SequenceShard(NamedTuple):
    """The tokens of a sequence on this rank: all, or one of `sp` equal parts in order."""
    rope: Tensor                          # cos, sin of its image tokens, [images,1,head_dim/2,2]
    images: int                           # number of its image tokens, which come first
    total: int                            # tokens of the full sequence, without padding
    group: dist.ProcessGroup | None       # of the ranks that share the sequence; None: only this
    keys: tuple[int, ...] | None = None   # tokens attended to, per sample; None: all


def shard_sequence(h: Tensor, rope: Tensor,
                   group: dist.ProcessGroup | None) -> tuple[Tensor, SequenceShard]:
    """This rank's tokens of h [B,L,D]: len(rope) patches of the video, then (HunyuanVideo) text.

    The sequence is padded with zeros to equal parts; attention never sees the padding. The part is
    a copy: a view would keep the full sequence in memory until the end of backward.
    """
    images, total = len(rope), h.shape[1]
    if group is None:
        return h, SequenceShard(rope, images, total, None)
    size = -(-total // group.size())
    start = group.rank() * size
    h = F.pad(h, (0, 0, 0, size * group.size() - total))[:, start:start + size].clone()
    rope = rope[start:start + size]
    return h, SequenceShard(rope, len(rope), total, group)


class AllToAll(torch.autograd.Function):
    """All-to-all of x [sp, …]: part j goes to rank j. It is its own inverse and transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, x = group, x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return AllToAll.apply(grad, ctx.group), None


def tokens_to_heads(q: Tensor, k: Tensor, v: Tensor, seq: SequenceShard) -> tuple[Tensor, ...]:
    """All tokens of N / sp heads, [B,L,N/sp,d] each, for this rank's tokens of all heads.

    Source: Jacobs et al., DeepSpeed-Ulysses, 2023.
    """
    x = torch.stack([q, k, v]).unflatten(3, (seq.group.size(), -1))      # 3 B l sp N/sp d
    x = AllToAll.apply(x.movedim(3, 0), seq.group)                       # sp 3 B l N/sp d
    return x.movedim(0, 2).flatten(2, 3)[:, :, :seq.total].unbind(0)


def heads_to_tokens(out: Tensor, seq: SequenceShard) -> Tensor:
    """The inverse: this rank's tokens of all heads, [B,l,N,d], from [B,L,N/sp,d]."""
    sp = seq.group.size()
    out = F.pad(out, (0, 0, 0, 0, 0, -seq.total % sp))
    out = AllToAll.apply(out.unflatten(1, (sp, -1)).movedim(1, 0), seq.group)
    return out.movedim(0, 2).flatten(2, 3)


class AllGather(torch.autograd.Function):
    """All ranks' parts x [B,l,…] concatenated: [B,sp·l,…]. Backward sums over the ranks.

    Every rank computes the loss of the full sequence, so this sum is sp times its gradient; FSDP's
    mean over all ranks then is the mean over samples, as without sequence parallelism.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, x = group, x.contiguous()
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sp, B = ctx.group.size(), len(grad)
        parts = torch.cat(grad.chunk(sp, 1))                                     # sp·B l …
        out = torch.empty_like(parts[:B])
        # torch 2.13 renames the function and warns about the old name.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(out, parts, group=ctx.group)
        return out, None


def gather_sequence(x: Tensor, seq: SequenceShard) -> Tensor:
    """The full sequence, without padding, from this rank's part x [B,l,…]."""
    return x if seq.group is None else AllGather.apply(x, seq.group)[:, :seq.total]
