"""What stays frozen: the causal 3D VAEs, text encoders and tokenizers.

Shapes: video [B, 3, T, H, W] float in [-1, 1], latents [B, C, T', H', W'], tokens [B, L, D].
A video of T = 4n + 1 frames has T' = n + 1 latent frames; H' = H / 8, W' = W / 8.
Latents leave `encode` and enter `decode` normalised, as the DiT sees them, in fp32.

Sections: both VAEs · umT5 · LLaMA-3 and CLIP · tokenizers · text states · weight folders.
"""

import html
import itertools
import json
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ftfy
import sentencepiece
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from config import Shared
from model import (
    RMSNorm, collate, load_module, official_names, open_tensors, read_json, reshaped, sizes_of)
from video import Prompt, centre_crop, read_image

# ---------------------------------------------------------------------------------------------
# The Wan 2.1 VAE: causal in time, 4 x 8 x 8 smaller, 16 channels
# ---------------------------------------------------------------------------------------------

# Per-channel statistics of the released VAE's posterior means (Wan 2.1).
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

# Frames that a causal layer has seen in earlier chunks, by layer. None: the clip comes whole.
Past = dict[nn.Module, Tensor]


def check_video(video: Tensor, time: int, space: int) -> None:
    """Raises ValueError unless video is [B, 3, time·n + 1, space·h, space·w]."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"encode: got a video of shape {list(video.shape)}; want [B, 3, T, H, W]")
    T, H, W = video.shape[2:]
    if T % time != 1:
        raise ValueError(f"encode: got {T} frames; want {time}n + 1, such as "
                         f"{max(T - 1, 0) // time * time + 1}: cut the clip")
    if 0 in (H, W) or H % space or W % space:
        raise ValueError(f"encode: got frames of height {H} and width {W}; want multiples of "
                         f"{space}: resize or crop the video")


def check_latents(latents: Tensor, z_dim: int) -> None:
    """Raises ValueError unless latents are [B, z_dim, T', H', W'] and not empty."""
    if latents.ndim != 5 or latents.shape[1] != z_dim or 0 in latents.shape:
        raise ValueError(f"decode: got latents of shape {list(latents.shape)}; "
                         f"want [B, {z_dim}, T', H', W'], nothing empty")


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that sees the past only: zeros, or the chunk before, on the left in time."""

    def __init__(self, dim_in: int, dim_out: int, kernel: tuple[int, int, int]):
        super().__init__(dim_in, dim_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T, H, W]; `past` holds the last frames of earlier chunks."""
        reach = self.kernel_size[0] - 1
        before = None if past is None else past.get(self)
        if before is None:
            x = F.pad(x, (0, 0, 0, 0, reach, 0))
        else:
            x = torch.cat([before, x], dim=2)
        if past is not None:
            past[self] = x[:, :, x.shape[2] - reach:].clone()  # a view would keep the chunk alive
        return super().forward(x)


class ChannelNorm(nn.Module):
    """Scales each position's channel vector to length sqrt(C) times a learned gain (Wan 2.1)."""

    def __init__(self, dim: int, axes: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()  # 1 / max(norm, 1e-12)
        return x * (scale * x.shape[1] ** 0.5) * self.gamma


def run(layers: nn.Sequential, x: Tensor, past: Past | None) -> Tensor:
    """Applies layers in order; those with a memory also get `past`."""
    for layer in layers:
        causal = isinstance(layer, (CausalConv3d, Residual, Down, Up))
        x = layer(x, past) if causal else layer(x)
    return x


class Residual(nn.Module):
    """norm, SiLU, conv, twice, plus the input (through a 1x1x1 conv if the widths differ)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(dim_in, 3), nn.SiLU(), CausalConv3d(dim_in, dim_out, (3, 3, 3)),
            ChannelNorm(dim_out, 3), nn.SiLU(),
            nn.Identity(),  # the official dropout of rate 0, which counts in the names
            CausalConv3d(dim_out, dim_out, (3, 3, 3)))
        self.shortcut = nn.Conv3d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        return self.shortcut(x) + run(self.residual, x, past)


class FrameAttention(nn.Module):
    """One attention head over the H*W positions of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, _, T, H, W = x.shape
        y = x.transpose(1, 2).flatten(0, 1)                      # B*T C H W
        qkv = self.to_qkv(self.norm(y)).flatten(2)               # B*T 3C H*W
        q, k, v = qkv.transpose(1, 2).unsqueeze(1).chunk(3, -1)  # B*T 1 H*W C, three times
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)   # B*T H*W C
        y = self.proj(y.transpose(1, 2).unflatten(2, (H, W)))    # B*T C H W
        return x + y.unflatten(0, (B, T)).transpose(1, 2)        # B C T H W


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a 2D layer to every frame of x [B, C, T, H, W]."""
    B, _, T, _, _ = x.shape
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (B, T)).transpose(1, 2)


class Down(nn.Module):
    """Halves height and width; with `temporal`, T = 2n + 1 frames become n + 1."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        before = None if past is None else past.get(self)
        if past is not None:
            past[self] = x[:, :, -1:].clone()
        if before is not None:
            return self.time_conv(torch.cat([before, x], dim=2))
        first = x[:, :, :1]  # the clip's first frame stays as it is
        return first if x.shape[2] == 1 else torch.cat([first, self.time_conv(x)], dim=2)


class Up(nn.Module):
    """Doubles height and width, halves channels; with `temporal`, 1 + n frames become 1 + 2n."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                      nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        if self.time_conv is not None:
            starts = past is None or self not in past
            if past is not None:
                past[self] = x.new_empty(0)  # a mark: the clip has begun
            first, rest = (x[:, :, :1], x[:, :, 1:]) if starts else (x[:, :, :0], x)
            if rest.shape[2]:  # the time convolution never sees the clip's first frame
                pair = self.time_conv(rest, past).unflatten(1, (2, x.shape[1]))  # B 2 C T H W
                rest = pair.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)              # B C 2T H W
            x = torch.cat([first, rest], dim=2)
        return per_frame(self.resample, x)


class Encoder(nn.Module):
    def __init__(self, dim: int, dim_out: int, mult: tuple, num_res: int, temporal_down: tuple):
        super().__init__()
        dims = [dim, *(dim * m for m in mult)]
        self.conv1 = CausalConv3d(3, dim, (3, 3, 3))
        layers = []
        for i, (a, b) in enumerate(itertools.pairwise(dims)):
            layers += [Residual(a if j == 0 else b, b) for j in range(num_res)]
            layers += [Down(b, temporal_down[i])] if i < len(mult) - 1 else []
        self.downsamples = nn.Sequential(*layers)
        top = dims[-1]
        self.middle = nn.Sequential(Residual(top, top), FrameAttention(top), Residual(top, top))
        self.head = nn.Sequential(ChannelNorm(top, 3), nn.SiLU(),
                                  CausalConv3d(top, dim_out, (3, 3, 3)))

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        """x [B, 3, T, H, W] -> [B, dim_out, T', H/8, W/8]."""
        x = run(self.downsamples, self.conv1(x, past), past)
        return run(self.head, run(self.middle, x, past), past)


class Decoder(nn.Module):
    def __init__(self, dim: int, dim_in: int, mult: tuple, num_res: int, temporal_up: tuple):
        super().__init__()
        dims = [dim * m for m in (mult[-1], *reversed(mult))]
        top = dims[0]
        self.conv1 = CausalConv3d(dim_in, top, (3, 3, 3))
        self.middle = nn.Sequential(Residual(top, top), FrameAttention(top), Residual(top, top))
        layers = []
        for i, (a, b) in enumerate(itertools.pairwise(dims)):
            a = a if i == 0 else a // 2  # the step up before this level has halved the channels
            layers += [Residual(a if j == 0 else b, b) for j in range(num_res + 1)]
            layers += [Up(b, temporal_up[i])] if i < len(mult) - 1 else []
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(ChannelNorm(dims[-1], 3), nn.SiLU(),
                                  CausalConv3d(dims[-1], 3, (3, 3, 3)))

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        """x [B, dim_in, T', H', W'] -> [B, 3, T, 8 H', 8 W']."""
        x = run(self.middle, self.conv1(x, past), past)
        return run(self.head, run(self.upsamples, x, past), past)


class WanVAE(nn.Module):
    """The causal 3D VAE of Wan 2.1, with the official checkpoint's parameter names.

    `encode` / `decode` go through the clip in chunks, so that memory is bounded by the chunk, and
    speak normalised latents; `moments` / `reconstruct` take the clip whole, are differentiable and
    speak raw latents (training). Both are the same function of the clip.

    Args:
        dim: channels of the first level; dim_mult: each level's factor; one step down between two.
        z_dim: latent channels.  num_res_blocks: residual blocks of an encoder level.
        temporal_down: for each step down, whether it also halves time.
        latents_mean, latents_std: z_dim numbers each, the normalisation of latents.
    """

    tiled = False  # chunks follow from each other: no rank can take one by itself

    def __init__(self, dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2,
                 temporal_down=(False, True, True), latents_mean=WAN_MEAN, latents_std=WAN_STD):
        super().__init__()
        if len(temporal_down) != len(dim_mult) - 1 or len(latents_mean) != z_dim \
                or len(latents_std) != z_dim:
            raise ValueError(
                f"VAE config: dim_mult has {len(dim_mult)} levels, temporal_down "
                f"{len(temporal_down)} steps (want one less), latents_mean and latents_std "
                f"{len(latents_mean)} and {len(latents_std)} numbers (want z_dim={z_dim} each)")
        self.latents_mean, self.latents_std = tuple(latents_mean), tuple(latents_std)
        self.z_dim = z_dim
        self.space, self.time = 2 ** (len(dim_mult) - 1), 2 ** sum(map(bool, temporal_down))
        mult, up = tuple(dim_mult), tuple(reversed(temporal_down))
        self.encoder = Encoder(dim, 2 * z_dim, mult, num_res_blocks, tuple(temporal_down))
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim, mult, num_res_blocks, up)

    def moments(self, video: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance [B, z, T', H', W'] of a video, not normalised.

        With `past` the video is the next chunk of a clip: its first frame, or `time` later ones.
        """
        mean, logvar = self.conv1(self.encoder(video, past)).chunk(2, dim=1)
        return mean, logvar

    def reconstruct(self, z: Tensor, past: Past | None = None) -> Tensor:
        """The video [B, 3, T, H, W] of raw latents z, or of a clip's next ones; not clamped."""
        return self.decoder(self.conv2(z), past)

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents, fp32 [B, z, 1 + (T-1)/4, H/8, W/8], of a video in [-1, 1].

        Deterministic: the posterior's mean. One frame, then four at a time.
        Raises ValueError if T != 4n + 1, or H or W is not a multiple of 8. Source: Wan 2.1.
        """
        check_video(video, self.time, self.space)
        past, means = {}, []
        for chunk in (video[:, :, :1], *video[:, :, 1:].split(self.time, dim=2)):
            if chunk.shape[2]:
                means.append(self.moments(chunk.to(self.dtype), past)[0].float())
        mean, std = self.statistics(video.device)
        return (torch.cat(means, dim=2) - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """The video, fp32 [B, 3, 4 (T'-1) + 1, 8 H', 8 W'] in [-1, 1], of normalised latents.

        One latent frame at a time. Raises ValueError on a shape that is not [B, z, T', H', W'].
        Source: Wan 2.1.
        """
        check_latents(latents, self.z_dim)
        mean, std = self.statistics(latents.device)
        z = (latents.float() * std + mean).to(self.dtype)
        past = {}
        frames = [self.reconstruct(frame, past).float() for frame in z.split(1, dim=2)]
        return torch.cat(frames, dim=2).clamp_(-1, 1)

    def statistics(self, device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents, each fp32 [1, z, 1, 1, 1]."""
        both = torch.tensor([self.latents_mean, self.latents_std], device=device)
        mean, std = both.view(2, 1, self.z_dim, 1, 1, 1)
        return mean, std

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype


# ---------------------------------------------------------------------------------------------
# The HunyuanVideo VAE: causal convolutions, 4 x 8 x 8 smaller, 16 channels
# ---------------------------------------------------------------------------------------------

class EdgeConv3d(nn.Module):
    """A 3D convolution that repeats the edges: on both sides in space, on the left in time."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int = 3, stride: tuple | int = 1):
        super().__init__()
        self.conv = nn.Conv3d(dim_in, dim_out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        r = self.conv.kernel_size[0] // 2
        return self.conv(F.pad(x, (r, r, r, r, 2 * r, 0), mode="replicate") if r else x)


def chain(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, under their own names."""
    return nn.Sequential(OrderedDict(layers))


class HunyuanResidual(nn.Module):
    """norm, SiLU, conv, twice, plus the input (through a 1x1x1 conv if the widths differ)."""

    def __init__(self, dim_in: int, dim_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim_in, eps=1e-6)  # over the whole tile, time included
        self.conv1 = EdgeConv3d(dim_in, dim_out)
        self.norm2 = nn.GroupNorm(groups, dim_out, eps=1e-6)
        self.conv2 = EdgeConv3d(dim_out, dim_out)
        self.conv_shortcut = EdgeConv3d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        return y.add_(self.conv_shortcut(x))


class MidBlock(nn.Module):
    """Between two residual blocks, one attention head over a frame and the frames before it."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(HunyuanResidual(dim, dim, groups) for _ in range(2))
        square = (dim, dim)
        self.attentions = nn.ModuleList([nn.ModuleDict({
            "group_norm": nn.GroupNorm(groups, dim, eps=1e-6),
            **linears(True, to_q=square, to_k=square, to_v=square),
            "to_out": nn.Sequential(nn.Linear(dim, dim))})])

    def forward(self, x: Tensor) -> Tensor:
        layers, (T, H, W), x = self.attentions[0], x.shape[2:], self.resnets[0](x)
        y = layers["group_norm"](x).flatten(2).transpose(1, 2).unsqueeze(1)  # B 1 T*H*W C
        q, k, v = (layers[name](y) for name in ("to_q", "to_k", "to_v"))
        ends = range(0, (T + 1) * H * W, H * W)
        y = [F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b])
             for a, b in itertools.pairwise(ends)]  # frame by frame: no mask of (T*H*W)^2 numbers
        y = layers["to_out"](torch.cat(y, dim=2)).squeeze(1)                 # B T*H*W C
        return self.resnets[1](x + y.transpose(1, 2).unflatten(2, (T, H, W)))  # B C T H W


class Enlarge(nn.Module):
    """Doubles height and width, with `temporal` also 1 + n frames to 1 + 2n; then a convolution."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.temporal, self.conv = temporal, EdgeConv3d(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.temporal:
            x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)
        return self.conv(x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4))


def levels(dims: tuple, num_res: int, groups: int, name: str, step: Callable) -> nn.Sequential:
    """Residual blocks to each width in turn; after each but the last a step, at first in space."""
    out = []
    for i, (a, b) in enumerate(itertools.pairwise((dims[0], *dims))):
        blocks = [HunyuanResidual(b if j else a, b, groups) for j in range(num_res)]
        steps = {name: nn.Sequential(step(b, i > 0))} if i < len(dims) - 1 else {}
        out.append(chain(resnets=nn.Sequential(*blocks), **steps))
    return nn.Sequential(*out)


def blend(tile: Tensor, before: Tensor, dim: int) -> None:
    """Fades, in place, from the end of `before` into the start of `tile`, along axis `dim`."""
    n = min(tile.shape[dim], before.shape[dim])
    share = (torch.arange(n, device=tile.device) / n).view(-1, *[1] * (tile.ndim - 1 - dim))
    end = before.narrow(dim, before.shape[dim] - n, n)
    tile.narrow(dim, 0, n).mul_(share).add_(end * (1 - share))


class HunyuanVAE(nn.Module):
    """The causal 3D VAE of HunyuanVideo, with the official checkpoint's parameter names.

    `encode` / `decode` go tile by tile, as the official inference does, and speak normalised
    latents; `moments` / `reconstruct` take the clip whole, are differentiable and speak raw ones.
    They differ: a tile is normalised on its own. Args: channels of the four levels and of latents;
    residual blocks of an encoder level; groups of channels in a norm; normalised latents over raw
    ones; side (pixels) and length (frames) of a tile, a quarter of it shared with the next.
    Ranks that hold the same input may share the tiles: `group`, set from outside.
    """

    time, space, tiled = 4, 8, True
    group: dist.ProcessGroup | None = None

    def __init__(self, dims=(128, 256, 512, 512), z_dim=16, num_res_blocks=2, groups=32,
                 scaling=0.476986, sample_size=256, sample_tsize=64):
        super().__init__()
        fits = sample_size > 0 == sample_size % 32 and sample_tsize > 0 == sample_tsize % 16
        if len(dims) != 4 or not fits:  # a quarter of a tile must be whole latents
            raise ValueError(f"got widths {dims}, sample_size={sample_size}, sample_tsize="
                             f"{sample_tsize}; want 4 widths, multiples of 32 and of 16")
        self.z_dim, self.scaling, dims, (first, *_, top) = z_dim, scaling, tuple(dims), dims
        self.tile, self.tile_time = sample_size // self.space, sample_tsize // self.time
        self.encoder = chain(
            conv_in=EdgeConv3d(3, first),
            down_blocks=levels(dims, num_res_blocks, groups, "downsamplers", lambda dim, temporal:
                               chain(conv=EdgeConv3d(dim, dim, stride=(1 + temporal, 2, 2)))),
            mid_block=MidBlock(top, groups), conv_norm_out=nn.GroupNorm(groups, top, eps=1e-6),
            act=nn.SiLU(inplace=True), conv_out=EdgeConv3d(top, 2 * z_dim))
        self.quant_conv = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = chain(
            conv_in=EdgeConv3d(z_dim, top), mid_block=MidBlock(top, groups),
            up_blocks=levels(dims[::-1], num_res_blocks + 1, groups, "upsamplers", Enlarge),
            conv_norm_out=nn.GroupNorm(groups, first, eps=1e-6), act=nn.SiLU(inplace=True),
            conv_out=EdgeConv3d(first, 3))

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance [B, z, T', H', W'] of a video, raw, without tiles."""
        mean, logvar = self.quant_conv(self.encoder(video)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, z: Tensor) -> Tensor:
        """The video [B, 3, T, H, W] of raw latents z, without tiles; not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents of a video; shapes, range and errors are WanVAE.encode's."""
        check_video(video, self.time, self.space)
        return self.by_tiles(lambda x: self.moments(x.to(self.dtype))[0], video).mul_(self.scaling)

    def decode(self, latents: Tensor) -> Tensor:
        """The video of normalised latents; shapes, range and errors are WanVAE.decode's."""
        check_latents(latents, self.z_dim)
        return self.by_tiles(lambda z: self.reconstruct((z.float() / self.scaling).to(self.dtype)),
                             latents, decode=True).clamp_(-1, 1)

    @torch.no_grad()
    def by_tiles(self, net: Callable[[Tensor], Tensor], x: Tensor, decode: bool = False) -> Tensor:
        """net(x) in fp32, tile by tile, each faded into the next; net is an encoder or a decoder.

        Memory: the result, what one tile needs, and the lower edges of one row of tiles; with a
        group of ranks as many tiles as they are. Each gets the whole result.
        """
        unit, S, N = (self.time, self.space), self.tile_time, self.tile
        (a, b), (c, d) = ((1, 1), unit) if decode else (unit, (1, 1))  # of a latent, in and out
        T, H, W = 1 + (x.shape[2] - 1) // a, x.shape[3] // b, x.shape[4] // b
        channels = 3 if decode else self.z_dim
        out = torch.empty(len(x), channels, 1 + c * (T - 1), d * H, d * W, device=x.device)
        step_time, step = S * 3 // 4 if T > S else S, N * 3 // 4 if max(H, W) > N else N
        edge, keep = d * N // 4, d * step
        starts = range(0, max(T - 1, 1), step_time)
        made = self.made(net, (x[:, :, a * t:a * (t + S) + 1, b * i:b * (i + N), b * j:b * (j + N)]
                               for t in starts for i in range(0, H, step)
                               for j in range(0, W, step)))
        for t in starts:
            late, above, left = int(t > 0), {}, None  # a late tile sees a frame more, before it
            for i, j in itertools.product(range(0, H, step), range(0, W, step)):
                y = next(made)[:, :, late:]
                if i:
                    blend(y, above[j], dim=3)
                if j:
                    blend(y, left, dim=4)
                above[j], left = y[..., -edge:, :].clone(), y[..., -edge:].clone()
                y = y[..., :keep, :keep]
                part = out[:, :, c * t + late:c * (t + S) + 1, d * i:d * i + keep,
                           d * j:d * j + keep]
                if late:  # the part begins with the end of the tile before
                    blend(y, part[:, :, :c * (S - step_time)], dim=2)
                part.copy_(y)
        return out

    def made(self, net: Callable[[Tensor], Tensor], tiles: Iterator[Tensor]) -> Iterator[Tensor]:
        """net of each tile in fp32, in order; a group's ranks make one each and tell the others."""
        if self.group is None:
            yield from (net(tile).float() for tile in tiles)
            return
        rank, size = self.group.rank(), self.group.size()
        while some := list(itertools.islice(tiles, size)):
            mine = net(some[rank]).float().contiguous() if rank < len(some) else None
            shapes: list = [None] * size
            dist.all_gather_object(shapes, None if mine is None else mine.shape, group=self.group)
            for owner, shape in enumerate(shapes[:len(some)]):
                y = mine if owner == rank else torch.empty(shape, device=some[0].device)
                dist.broadcast(y, group=self.group, group_src=owner)
                yield y

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype


# ---------------------------------------------------------------------------------------------
# What the text encoders share
# ---------------------------------------------------------------------------------------------

def linears(bias: bool, **sizes: tuple[int, int]) -> nn.ModuleDict:
    """Linear layers by name, of (inputs, outputs)."""
    return nn.ModuleDict({name: nn.Linear(*size, bias=bias) for name, size in sizes.items()})


def attend(layers: nn.ModuleDict, x: Tensor, width: int, angle: Tensor | None = None,
           bias: Tensor | None = None) -> Tensor:
    """Attention by heads of `width` over x [B, L, D]; layers are those of q, k, v and the output.

    Query heads may share keys and values. angle [L, width/2] rotates pairs (j, j + width/2). bias
    [B, heads, L, L] is added to the logits, which are not scaled (T5); without one it is causal.
    """
    *to_qkv, to_out = layers.values()
    q, k, v = (f(x).unflatten(-1, (-1, width)).transpose(1, 2) for f in to_qkv)  # B heads L width
    if angle is not None:
        cos, sin = angle.cos(), angle.sin()
        pairs = [z.float().chunk(2, dim=-1) for z in (q, k)]
        q, k = (torch.cat([y * cos - z * sin, z * cos + y * sin], -1).to(v.dtype) for y, z in pairs)
    y = F.scaled_dot_product_attention(
        q, k, v, bias, is_causal=bias is None, scale=None if bias is None else 1.0,
        enable_gqa=q.shape[1] != k.shape[1])
    return to_out(y.transpose(1, 2).flatten(2))                                  # B L D


# ---------------------------------------------------------------------------------------------
# umT5: Wan's text encoder
# ---------------------------------------------------------------------------------------------

class RelativeBias(nn.Module):
    """A learned bias on attention logits for each head and bucket of key - query (T5)."""

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int):
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, L: int) -> Tensor:
        """The bias [heads, L, L] (query, key) for L positions."""
        where = torch.arange(L, device=self.embedding.weight.device)
        r = where[None, :] - where[:, None]             # key - query
        half = self.num_buckets // 2                    # keys after the query use the upper half
        exact = half // 2                               # nearer distances have their own bucket
        a = r.abs()
        far = torch.log(a.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
        bucket = half * (r > 0) + torch.where(a < exact, a, far)
        return self.embedding(bucket).permute(2, 0, 1)  # heads L L


class T5Block(nn.Module):
    def __init__(self, dim, dim_attn, num_heads, dim_ffn, num_buckets, max_distance):
        super().__init__()
        self.width, inner = dim_attn // num_heads, (dim, dim_attn)
        self.norm1 = RMSNorm(dim, eps=1e-6)
        self.attn = linears(False, q=inner, k=inner, v=inner, o=(dim_attn, dim))
        self.norm2 = RMSNorm(dim, eps=1e-6)
        gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU("tanh"))
        self.ffn = nn.ModuleDict(
            {"gate": gate, **linears(False, fc1=(dim, dim_ffn), fc2=(dim_ffn, dim))})
        self.pos_embedding = RelativeBias(num_buckets, num_heads, max_distance)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        bias = self.pos_embedding(x.shape[1])                                    # heads L L
        bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(x.dtype).min)  # B heads L L
        x = x + attend(self.attn, self.norm1(x), self.width, bias=bias)
        y = self.norm2(x)
        return x + self.ffn["fc2"](self.ffn["fc1"](y) * self.ffn["gate"](y))


class UMT5Encoder(nn.Module):
    """The encoder of umT5, with the parameter names of Wan's checkpoint. Defaults: umT5-XXL.

    Every block owns its table of relative position biases. Source: umT5, Wan 2.1.
    """

    def __init__(self, vocab_size=256384, dim=4096, dim_attn=4096, num_heads=64, dim_ffn=10240,
                 num_layers=24, num_buckets=32, max_distance=128):
        super().__init__()
        if dim_attn % num_heads:
            raise ValueError(f"text encoder config: dim_attn={dim_attn} is not a multiple of "
                             f"num_heads={num_heads}")
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            T5Block(dim, dim_attn, num_heads, dim_ffn, num_buckets, max_distance)
            for _ in range(num_layers))
        self.norm = RMSNorm(dim, eps=1e-6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text states [B, L, dim] of ids [B, L] int64; mask [B, L] is 1 on tokens, 0 on padding."""
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, mask.bool())
        return self.norm(x)


# ---------------------------------------------------------------------------------------------
# LLaMA-3 and CLIP: HunyuanVideo's text encoders. Both are causal: no padding on the right matters
# ---------------------------------------------------------------------------------------------

class LlamaBlock(nn.Module):
    def __init__(self, dim: int, dim_ffn: int, num_heads: int, num_kv_heads: int, eps: float):
        super().__init__()
        self.width, wide = dim // num_heads, (dim, dim_ffn)
        kv = (dim, num_kv_heads * self.width)
        self.self_attn = linears(False, q_proj=(dim, dim), k_proj=kv, v_proj=kv, o_proj=(dim, dim))
        self.mlp = linears(False, gate_proj=wide, up_proj=wide, down_proj=wide[::-1])
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        x = x + attend(self.self_attn, self.input_layernorm(x), self.width, angle)
        y = self.post_attention_layernorm(x)
        y = F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)
        return x + self.mlp["down_proj"](y)


class Llama(nn.Module):
    """The first 30 of LLaMA-3 8B's layers, without final norm; names as below its `model.`."""

    def __init__(self, vocab_size=128320, dim=4096, dim_ffn=14336, num_layers=30, num_heads=32,
                 num_kv_heads=8, theta=500000.0, eps=1e-5):
        super().__init__()
        pairs = dim // num_heads // 2
        self.freq = [theta ** (-k / pairs) for k in range(pairs)]
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim, dim_ffn, num_heads, num_kv_heads, eps)
                                    for _ in range(num_layers))

    def forward(self, ids: Tensor) -> Tensor:
        """States [B, L, dim] of ids [B, L] int64; shorter rows padded on the right."""
        where = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angle = torch.outer(where, torch.tensor(self.freq, device=ids.device))  # L width/2
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, angle)
        return x


class CLIPBlock(nn.Module):
    def __init__(self, dim: int, dim_ffn: int, num_heads: int):
        super().__init__()
        self.width, square = dim // num_heads, (dim, dim)
        self.self_attn = linears(True, q_proj=square, k_proj=square, v_proj=square, out_proj=square)
        self.mlp = linears(True, fc1=(dim, dim_ffn), fc2=(dim_ffn, dim))
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + attend(self.self_attn, self.layer_norm1(x), self.width)
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))  # CLIP's approximation of GELU


class CLIPText(nn.Module):
    """The text half of CLIP ViT-L/14, without projection; names as below its `text_model.`."""

    def __init__(self, vocab_size=49408, dim=768, dim_ffn=3072, num_layers=12, num_heads=12,
                 max_len=77):
        super().__init__()
        self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(vocab_size, dim),
                                         "position_embedding": nn.Embedding(max_len, dim)})
        self.encoder = chain(layers=nn.Sequential(
            *(CLIPBlock(dim, dim_ffn, num_heads) for _ in range(num_layers))))
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, L, dim] of ids [B, L] int64; and pooled [B, dim], each row's state at its
        largest id, the first <|endoftext|>."""
        places = self.embeddings["position_embedding"].weight[:ids.shape[1]]
        x = self.embeddings["token_embedding"](ids) + places
        x = self.final_layer_norm(self.encoder(x))
        return x, x[torch.arange(len(x), device=x.device), ids.argmax(1)]


# ---------------------------------------------------------------------------------------------
# The tokenizers
# ---------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------
# CLIP ViT-H: what Wan's image-to-video DiT sees of the first frame
# ---------------------------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VisionBlock(nn.Module):
    def __init__(self, dim: int, dim_ffn: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"to_qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.Sequential(nn.Linear(dim, dim_ffn), nn.GELU(), nn.Linear(dim_ffn, dim))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["to_qkv"](self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                       # B N L d each
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)     # B L D
        x = x + self.attn["proj"](y)
        return x + self.mlp(self.norm2(x))


class CLIPVision(nn.Module):
    """The first 31 of 32 layers of CLIP ViT-H/14's image tower; names as below its `visual.`."""

    def __init__(self, dim=1280, dim_ffn=5120, num_layers=31, num_heads=16, patch=14, size=224):
        super().__init__()
        self.size = size
        self.patch_embedding = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, dim))
        self.pre_norm = nn.LayerNorm(dim)
        self.transformer = nn.Sequential(*(VisionBlock(dim, dim_ffn, num_heads)
                                           for _ in range(num_layers)))

    def pixels(self, image: Tensor) -> Tensor:
        """Normalised pixels [B, 3, size, size] of images [B, 3, h, w] in [-1, 1], fp32."""
        x = F.interpolate(image.float(), (self.size, self.size), mode="bicubic")
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return (x * 0.5 + 0.5 - mean) / std

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens [B, 257, dim], the class token first, of normalised pixels. Source: Wan 2.1."""
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return self.transformer(self.pre_norm(x + self.pos_embedding))


@torch.no_grad()
def image_cond(image: Tensor, vae: WanVAE, clip: CLIPVision, frames: int, height: int,
               width: int) -> dict[str, Tensor]:
    """What a first frame adds to a prompt's cond: {"image" [257, D], "frames" [20, T, H, W]}.

    Args: image [3, h, w] in [-1, 1], of any size; the video's frames (4n + 1), height and width in
    pixels. "frames" are 4 mask channels (1 in the first latent frame) and the normalised latents of
    the image followed by grey frames. Source: Wan 2.1.
    """
    first = F.interpolate(image[None].float(), (height, width), mode="bicubic")
    video = torch.cat([first.unsqueeze(2), first.new_zeros(1, 3, frames - 1, height, width)], 2)
    latents = vae.encode(video)[0]                                               # 16 T H W
    mask = latents.new_zeros(4, *latents.shape[1:])
    mask[:, 0] = 1
    return {"image": clip(clip.pixels(image[None]))[0].float(),
            "frames": torch.cat([mask, latents])}


class Conditioner:
    """What a DiT is told of a prompt: its text and, in an image-to-video model, its first frame.

    Args:
        text: the text encoders.
        vae, clip: of an image-to-video model; None of another, whose prompts have no image.
        frames: video frames, 4n + 1.
        crop: cut images to the video's shape; else they are scaled into it, which suits a shape
            that fit_size chose.
    """

    def __init__(self, text: "TextEncoder | HunyuanText", vae: WanVAE | None,
                 clip: CLIPVision | None, frames: int, crop: bool):
        self.text, self.vae, self.clip, self.frames, self.crop = text, vae, clip, frames, crop

    def encode_each(self, prompts: list[Prompt], height: int, width: int,
                    lap: Callable[[str], Any] = lambda name: None) -> list[dict]:
        """The cond of each prompt for a video of height × width; of equal prompts it is one object.

        Args: lap("text") and lap("image") are called as each is done. Raises as the encoders and
        read_image do.
        """
        different = list(dict.fromkeys(prompts))
        conds = self.text.encode_each([prompt.text for prompt in different])
        lap("text")
        for prompt, cond in zip(different, conds, strict=True):
            if self.clip is not None:
                image = read_image(prompt.image)
                if self.crop:
                    image = centre_crop(image, height, width)
                made = self.of_images(image[None], height, width)
                cond |= {name: value[0] for name, value in made.items()}
                lap("image")
        found = dict(zip(different, conds, strict=True))
        return [found[prompt] for prompt in prompts]

    def of_images(self, images: Tensor, height: int, width: int) -> dict[str, Tensor]:
        """What first frames [B, 3, h, w] add to conds, as image_cond has it, one after another."""
        device = next(self.clip.parameters()).device
        conds = [image_cond(image.to(device), self.vae, self.clip, self.frames, height, width)
                 for image in images]
        return {name: torch.stack([cond[name] for cond in conds]) for name in conds[0]}

    def with_text(self, text: str, conds: list[dict]) -> list[dict]:
        """The conds with another text: a negative prompt sees the same image."""
        other = self.text.encode_each([text])[0]
        return [{**cond, **other} for cond in conds]


def fit_size(height: int, width: int, area: int) -> tuple[int, int]:
    """Height and width of about `area` pixels, multiples of 16, in an image's shape. Wan 2.1."""
    sides = math.isqrt(area * height // width), math.isqrt(area * width // height)  # exact
    h, w = (min(max(side // 16 * 16, 16), max(area // 256 * 16, 16)) for side in sides)
    return h, w


def check_prompts(prompts: list[str]) -> None:
    """Raises ValueError unless prompts is a list of at least one string."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"want a list of at least one prompt; got {prompts!r:.80}")


def clean(text: str) -> str:
    """Mends broken encodings and HTML entities, makes every run of whitespace one space (Wan)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """Text to umT5 ids, at most `max_len` with the final </s>, like Wan's.

    Args:
        path: tokenizer.json, spiece.model, or a folder that holds one; of both, the first.
        max_len: the longest row, in tokens.

    The two files give equal ids but for literal special tokens in a text: `</s>` typed by a user
    is one token to tokenizer.json (and so to the official code), plain text to spiece.model.
    Raises FileNotFoundError if there is no such file, ValueError if it cannot be read.
    """

    PAD, END, UNKNOWN = 0, 1, 3  # umT5's ids

    def __init__(self, path: str | Path, max_len: int = 512):
        path = Path(path)
        names = ("tokenizer.json", "spiece.model")
        files = [path / name for name in names] if path.is_dir() else [path]
        self.file = next((file for file in files if file.is_file()), None)
        if self.file is None:
            raise FileNotFoundError(f"no tokenizer at {path}: want {' or '.join(names)} there; "
                                    f"copy it from the checkpoint's google/umt5-xxl or tokenizer")
        self.max_len = max_len
        try:
            if self.file.suffix == ".json":
                self.fast = tokenizers.Tokenizer.from_file(str(self.file))
                self.fast.no_padding()
                self.fast.no_truncation()
                self.size = self.fast.get_vocab_size()
                end = self.fast.token_to_id("</s>")
            else:
                self.fast = None
                self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.file))
                self.size, end = self.sp.vocab_size(), self.sp.eos_id()
        except Exception as error:  # tokenizers raises bare Exception, sentencepiece RuntimeError
            raise ValueError(f"{self.file} is not a tokenizer that can be read ({error}): "
                             f"copy it anew from the checkpoint") from error
        if end != self.END:
            raise ValueError(f"{self.file}: </s> has id {end}; umT5's tokenizer has {self.END}: "
                             f"this is another model's file")

    def pieces(self, text: str) -> list[int]:
        """Ids of a cleaned text, without </s>, however many."""
        if self.fast:
            return self.fast.encode(text, add_special_tokens=False).ids
        ids = []
        for i in self.sp.encode(text):
            i = self.UNKNOWN if self.sp.is_byte(i) else i
            if not (i == self.UNKNOWN and ids[-1:] == [i]):  # a run of raw bytes is one unknown
                ids.append(i)
        return ids

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [B, L], right-padded to the longest text of the batch.

        A text of more than max_len - 1 pieces is cut, with a warning.
        Raises ValueError if texts is not a list of at least one string.
        """
        check_prompts(texts)
        rows = []
        for text in texts:
            ids = self.pieces(clean(text))
            lost = len(ids) - (self.max_len - 1)
            if lost > 0:
                warnings.warn(f"prompt {clean(text)[:40]!r}... has {len(ids)} tokens; the text "
                              f"encoder reads {self.max_len - 1}: the last {lost} are lost",
                              stacklevel=2)
            rows.append(torch.tensor(ids[:self.max_len - 1] + [self.END]))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.PAD)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def clip_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer of its older files: byte-pair encoding of lower-cased words (CLIP)."""
    ends = start, end = "<|startoftext|>", "<|endoftext|>"
    vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    fast = tokenizers.Tokenizer(
        models.BPE.from_file(vocab, merges, unk_token=end, end_of_word_suffix="</w>"))
    fast.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.add_special_tokens(list(ends))
    fast.post_processor = processors.TemplateProcessing(
        f"{start} $A {end}", None, [(token, fast.token_to_id(token)) for token in ends])
    return fast


def read_tokenizer(folder: Path, rows: int, text: str, count: int) -> tokenizers.Tokenizer:
    """The tokenizer of a folder's tokenizer.json, or of CLIP's vocab.json and merges.txt.

    Raises FileNotFoundError if there is none, ValueError if it cannot be read, has more than `rows`
    tokens or does not make `count` of `text`, and so is another model's.
    """
    file = folder / "tokenizer.json"
    if not (file.is_file() or (folder / "vocab.json").is_file()):
        raise FileNotFoundError(f"no tokenizer at {folder}: want tokenizer.json (or CLIP's "
                                f"vocab.json and merges.txt) there; copy it from the checkpoint")
    try:
        fast = (tokenizers.Tokenizer.from_file(str(file)) if file.is_file()
                else clip_tokenizer(folder))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{folder} holds no tokenizer that can be read ({error}): copy it anew "
                         f"from the checkpoint") from error
    fast.no_padding()
    fast.no_truncation()
    size, got = fast.get_vocab_size(), len(fast.encode(text).ids)
    if size > rows or got != count:
        raise ValueError(f"{folder}: the tokenizer has {size} tokens and makes {got} of "
                         f"{text[:40]!r}…; want at most the text encoder's {rows}, and {count}: "
                         f"they belong to different models")
    return fast


# ---------------------------------------------------------------------------------------------
# Prompts to text states
# ---------------------------------------------------------------------------------------------

class TextEncoder:
    """Prompts to the text states that the DiT reads."""

    def __init__(self, encoder: UMT5Encoder, tokenizer: Tokenizer):
        rows = encoder.token_embedding.num_embeddings
        if tokenizer.size > rows:
            raise ValueError(f"{tokenizer.file} has {tokenizer.size} tokens, the text encoder's "
                             f"embedding {rows} rows: they belong to different models")
        self.encoder, self.tokenizer = encoder, tokenizer

    @torch.no_grad()
    def encode_each(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """{"text": fp32 [L_i, D]} of each prompt, </s> included, without padding.

        Prompts go one by one, so that a prompt's states do not depend on its company.
        Raises ValueError if prompts is not a list of at least one string.
        """
        check_prompts(prompts)
        device = self.encoder.token_embedding.weight.device
        conds = []
        for ids, mask in (self.tokenizer([prompt]) for prompt in prompts):
            text = self.encoder(ids.to(device), mask.to(device))[0]
            conds.append({"text": text.float()})
        return conds

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """cond {"text": fp32 [B, L, D]}; rows past a prompt's own length are zero."""
        return collate(self.encode_each(prompts))


# What the LLM reads around a prompt, and how many tokens of it come first, which the DiT does not
# see. Sentences follow each other without a space. Source: HunyuanVideo.
USER = ":<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
DESCRIBE = "<|start_header_id|>system<|end_header_id|>\n\nDescribe the "
TEMPLATES = {
    "video": (95, DESCRIBE + "video by detailing the following aspects: 1. The main content and "
              "theme of the video.2. The color, shape, size, texture, quantity, text, and spatial "
              "relationships of the objects.3. Actions, events, behaviors temporal relationships, "
              "physical movement changes of the objects.4. background environment, light, style "
              "and atmosphere.5. camera angles, movements, and transitions used in the video"
              + USER),
    "image": (36, DESCRIBE + "image by detailing the color, shape, size, texture, quantity, text, "
              "spatial relationships of the objects and background" + USER)}


class HunyuanText:
    """Prompts to the text states and the pooled text that HunyuanVideo's DiT reads.

    Args: the encoders; their tokenizers' folders; tokens that the DiT reads of a video's prompt;
    image, whether prompts are of single frames: more of them fits, after a shorter template;
    guidance, the embedded guidance scale, which the DiT reads beside the text.
    Special tokens that a user types count as such, as in the official code.
    """

    def __init__(self, llm: Llama, clip: CLIPText, llm_folder: Path, clip_folder: Path,
                 text_len: int = 256, image: bool = False, guidance: float = 6.016):
        self.llm, self.clip, self.guidance = llm, clip, guidance
        self.crop, self.template = TEMPLATES["image" if image else "video"]
        places, words = (clip.embeddings[f"{name}_embedding"] for name in ("position", "token"))
        self.llm_len, self.clip_len = text_len + TEMPLATES["video"][0], places.num_embeddings
        self.llm_words = read_tokenizer(llm_folder, llm.embed_tokens.num_embeddings,
                                        self.template.partition("{}")[0], self.crop)
        self.clip_words = read_tokenizer(clip_folder, words.num_embeddings, "", 2)

    def ids(self, prompt: str) -> tuple[Tensor, Tensor]:
        """The LLM's ids of a prompt in its template, and CLIP's of the prompt alone: int64 [L].

        What does not fit the LLM is cut, with a warning. CLIP's row is cut silently and keeps its
        end token: prompts are usually longer than CLIP reads, and the LLM reads them.
        """
        prompt = prompt.encode("utf-8", "replace").decode()  # lone surrogates have no UTF-8
        ids = self.llm_words.encode(self.template.replace("{}", prompt.strip())).ids
        lost, room = len(ids) - self.llm_len, self.llm_len - self.crop
        if lost > 0:
            warnings.warn(f"prompt {prompt[:40]!r}... has {room + lost} tokens; the text encoder "
                          f"reads {room}: the last {lost} are lost", stacklevel=2)
        *pooled, end = self.clip_words.encode(prompt).ids
        return (torch.tensor(ids[:self.llm_len]),
                torch.tensor(pooled[:self.clip_len - 1] + [end]))

    @torch.no_grad()
    def encode_each(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """{"text": fp32 [S_i, D], "pooled": fp32 [D'], "guidance": fp32 []} of each prompt.

        text: of the prompt and the template's end, without padding. Prompts go one by one and
        errors are raised as in TextEncoder. Source: HunyuanVideo.
        """
        check_prompts(prompts)
        device, conds = self.llm.embed_tokens.weight.device, []
        for prompt in prompts:
            ids, pooled = (row[None].to(device) for row in self.ids(prompt))
            text = self.llm(ids)[0, self.crop:].float()
            conds.append({"text": text, "pooled": self.clip(pooled)[1][0].float(),
                          "guidance": torch.tensor(self.guidance, device=device)})
        return conds

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """A batch of them: "text" [B, S, D] with zeros past a prompt's end, "pooled" [B, D'],
        "guidance" [B], and "mask" [B, S], 1 on tokens, if prompts differ in length."""
        return collate(self.encode_each(prompts))


# ---------------------------------------------------------------------------------------------
# Weight folders, official and diffusers
# ---------------------------------------------------------------------------------------------

def find(folder: Path, patterns: list[str]) -> Path | None:
    """The one file in folder that matches the first pattern with any match, or None."""
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            raise ValueError(f"{folder}: {', '.join(f.name for f in files)} all match {pattern}: "
                             f"keep one")
        if files:
            return files[0]
    return None


def official_config(path: Path) -> dict:
    """Constructor arguments that a .safetensors file names in its metadata; {} is full size."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("config", "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: metadata key config is not a JSON object: {text:.80}") from error


def translated(path: Path, names: dict[str, str], fixed: dict) -> dict:
    """Constructor arguments from a diffusers or transformers config.json.

    names: our argument to their key; keys the file lacks keep our default.
    fixed: their key to the only value that this code implements.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: got a {type(config).__name__}; want a JSON object")
    config = config.get("text_config") or config  # of a model that also sees
    config = {**(config.get("rope_parameters") or {}), **config}  # as newer files have it
    for key, want in fixed.items():
        if config.get(key, want) != want:
            raise ValueError(f"{path}: {key} is {config[key]!r}; only {want!r} is implemented: "
                             f"is this the checkpoint of another model?")
    return {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


def built(cls: type, arguments: dict, where: Path, tensors: dict, dtype, device) -> nn.Module:
    """An eval-mode, frozen cls(**arguments) with the weights `tensors`, which came from `where`."""
    try:
        with torch.device("meta"):
            module = cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: its config {arguments} does not describe a {cls.__name__} "
                         f"({error})") from error
    module = load_module(module, tensors, str(where), dtype, device)
    return module.eval().requires_grad_(False)


def component(weights: str | Path, what: str, official: list[str], subfolder: str) -> Path:
    """The official file, or the diffusers subfolder, that holds one network of a weight folder."""
    weights = Path(weights)
    if not weights.is_dir():
        raise FileNotFoundError(f"weights: no folder {weights}: want an official or diffusers one")
    path = find(weights, official) or weights / subfolder
    if not (path.is_file() or (path / "config.json").is_file()):
        raise FileNotFoundError(f"{weights} holds no {what}: want {' or '.join(official)} "
                                f"(official) or {subfolder}/config.json (diffusers)")
    return path


def below(tensors: dict, prefixes: tuple[str, ...], known: str) -> dict:
    """What is below the first prefix that has a tensor `known`, named without it; else all."""
    prefix = next((prefix for prefix in prefixes if prefix + known in tensors), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}


def load_vae(weights: str | Path, device="cpu", dtype=torch.float32,
             family: str = "wan") -> WanVAE | HunyuanVAE:
    """The VAE of an official or diffusers weight folder, frozen, on `device` in `dtype`.

    Raises FileNotFoundError if the folder holds none, ValueError if it does not fit.
    """
    if family == "hunyuan":
        return load_hunyuan_vae(weights, device, dtype)
    if family != "wan":
        raise ValueError(f"family: got {family!r}; want wan or hunyuan")
    path = component(weights, "VAE", ["Wan2.1_VAE.safetensors", "Wan2.1_VAE.pth"], "vae")
    tensors = open_tensors(path)
    if path.is_file():
        return built(WanVAE, official_config(path), path, tensors, dtype, device)
    names = {"dim": "base_dim", "temporal_down": "temperal_downsample"}  # their spelling
    names |= {k: k for k in ("z_dim", "dim_mult", "latents_mean", "latents_std")}
    fixed = {"decoder_base_dim": None, "attn_scales": [], "is_residual": False,
             "num_res_blocks": 2, "in_channels": 3, "out_channels": 3, "patch_size": None}
    arguments = translated(path / "config.json", names, fixed)
    return built(WanVAE, arguments, path, official_names(tensors, "vae"), dtype, device)


def load_text(weights: str | Path, device="cpu", dtype=torch.bfloat16, text_len: int | None = None,
              family: str = "wan", image: bool = False,
              guidance: float = 6.016) -> TextEncoder | HunyuanText:
    """The text encoders and tokenizers of an official or diffusers weight folder, frozen.

    text_len: tokens that the DiT reads; None: as released, 512 (Wan) or 256 (HunyuanVideo).
    image: whether prompts are of single frames, which HunyuanVideo tells its LLM; guidance: its
    embedded guidance scale.
    Raises FileNotFoundError if the folder lacks a file, ValueError if one does not fit.
    """
    if family == "hunyuan":
        return load_hunyuan_text(weights, device, dtype, text_len or 256, image, guidance)
    if family != "wan":
        raise ValueError(f"family: got {family!r}; want wan or hunyuan")
    path = component(weights, "text encoder", ["models_t5*.safetensors", "models_t5*.pth"],
                     "text_encoder")
    official = path.is_file()
    tokenizer = Tokenizer(Path(weights) / ("google/umt5-xxl" if official else "tokenizer"),
                          text_len or 512)
    tensors = open_tensors(path)
    if official:
        arguments = official_config(path)
    else:
        names = {"vocab_size": "vocab_size", "dim": "d_model", "num_heads": "num_heads",
                 "dim_ffn": "d_ff", "num_layers": "num_layers",
                 "num_buckets": "relative_attention_num_buckets",
                 "max_distance": "relative_attention_max_distance", "dim_attn": "d_kv"}
        fixed = {"model_type": "umt5", "feed_forward_proj": "gated-gelu",
                 "layer_norm_epsilon": 1e-6}
        arguments = translated(path / "config.json", names, fixed)
        if "dim_attn" in arguments and "num_heads" in arguments:
            arguments["dim_attn"] *= arguments["num_heads"]  # d_kv is the width of one head
        tensors = official_names(tensors, "text_encoder")
    return TextEncoder(built(UMT5Encoder, arguments, path, tensors, dtype, device), tokenizer)


def load_image_encoder(weights: str | Path, device="cpu", dtype=torch.float32) -> CLIPVision:
    """CLIP's image tower of an official or diffusers image-to-video folder, frozen, as load_vae.

    The text tower, the last layer and the projection are never read.
    """
    path = component(weights, "image encoder", ["models_clip*.safetensors", "models_clip*.pth"],
                     "image_encoder")
    tensors = open_tensors(path)
    if path.is_file():
        arguments = official_config(path)
        layers = arguments.pop("num_layers", 32)
    else:
        names = {"dim": "hidden_size", "dim_ffn": "intermediate_size", "patch": "patch_size",
                 "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
                 "size": "image_size"}
        arguments = translated(path / "config.json", names, {
            "model_type": "clip_vision_model", "hidden_act": "gelu", "layer_norm_eps": 1e-5})
        layers = arguments.pop("num_layers", 32)
        known = ("vision_model.", "visual_projection.")  # newer files leave the first away
        tensors = {n if n.startswith(known) else f"vision_model.{n}": t for n, t in tensors.items()}
        tensors = official_names(tensors, "image_encoder")
        for name in ("visual.cls_embedding", "visual.pos_embedding"):
            if name in tensors:
                tensors[name] = reshaped(tensors[name], (1, *[1] * ("cls" in name),
                                                         *tensors[name].shape))
    unread = re.compile(rf"head|post_norm\..*|transformer\.{layers - 1}\..*|embeddings\..*")
    tensors = {n.removeprefix("visual."): t for n, t in tensors.items() if n.startswith("visual.")}
    tensors = {name: t for name, t in tensors.items() if not unread.fullmatch(name)}
    arguments["num_layers"] = layers - 1  # the features are taken before the last
    return built(CLIPVision, arguments, path, tensors, dtype, device)


def load_conditioner(cfg: Shared, device: torch.device, dtype: torch.dtype,
                     crop: bool) -> Conditioner:
    """The conditioner of a config's model, from its weight folder; dtype of the text encoders."""
    text = load_text(cfg.weights, device, dtype, sizes_of(cfg.preset).text_len, cfg.family,
                     image=cfg.frames == 1, guidance=cfg.embedded_guidance)
    vae = clip = None
    if sizes_of(cfg.preset).takes_image:  # fp32, TF32 on GPUs: bf16 puts 1% noise on it
        vae = load_vae(cfg.weights, device, torch.float32, cfg.family)
        clip = load_image_encoder(cfg.weights, device, torch.float32)
    return Conditioner(text, vae, clip, cfg.frames, crop)


def load_hunyuan_vae(weights: str | Path, device, dtype) -> HunyuanVAE:
    """HunyuanVideo's VAE, as load_vae; the official and the diffusers file have the same names."""
    path = component(weights, "VAE", ["hunyuan-video-t2v-720p/vae"], "vae")
    names = {"dims": "block_out_channels", "z_dim": "latent_channels", "groups": "norm_num_groups",
             "num_res_blocks": "layers_per_block", "scaling": "scaling_factor",
             "sample_size": "sample_size", "sample_tsize": "sample_tsize"}
    fixed = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "mid_block_add_attention": True,
             "spatial_compression_ratio": 8, "time_compression_ratio": 4,
             "temporal_compression_ratio": 4}
    arguments = translated(path / "config.json", names, fixed)
    tensors = below(open_tensors(path), ("vae.", ""), "encoder.conv_in.conv.weight")
    return built(HunyuanVAE, arguments, path, tensors, dtype, device)


def load_hunyuan_text(weights: str | Path, device, dtype, text_len, image,
                      guidance) -> HunyuanText:
    """The LLM, without what HunyuanVideo does not run of it, and CLIP's text half, as load_text."""
    names = {"vocab_size": "vocab_size", "dim": "hidden_size", "dim_ffn": "intermediate_size",
             "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    path = component(weights, "LLM", ["text_encoder"], "text_encoder")
    more = {"num_kv_heads": "num_key_value_heads", "theta": "rope_theta", "eps": "rms_norm_eps"}
    fixed = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False,
             "mlp_bias": False, "rope_scaling": None, "rope_type": "default"}
    sizes = translated(path / "config.json", names | more, fixed)
    layers = sizes.get("num_layers", 32)
    sizes["num_layers"] = layers - 2  # the states are taken before the last two
    prefixes = ("model.", "language_model.model.", "model.language_model.", "")
    unread = re.compile(rf"norm\.weight|layers\.({layers - 2}|{layers - 1})\..*|.*\.inv_freq")
    tensors = below(open_tensors(path), prefixes, "embed_tokens.weight")
    tensors = {name: t for name, t in tensors.items() if not unread.fullmatch(name)}
    llm = built(Llama, sizes, path, tensors, dtype, device)

    path = component(weights, "CLIP", ["text_encoder_2"], "text_encoder_2")
    fixed = {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    sizes = translated(path / "config.json", names | {"max_len": "max_position_embeddings"}, fixed)
    tensors = below(open_tensors(path), ("text_model.", ""), "embeddings.token_embedding.weight")
    tensors.pop("embeddings.position_ids", None)  # a buffer of older files
    clip = built(CLIPText, sizes, path, tensors, dtype, device)
    # diffusers keeps tokenizers in folders of their own, the official tree with the weights.
    folders = [folder if folder.is_dir() else folder.with_name(f"text_encoder{number}")
               for number in ("", "_2") for folder in [Path(weights) / f"tokenizer{number}"]]
    return HunyuanText(llm, clip, *folders, text_len, image, guidance)
