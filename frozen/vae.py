"""The causal 3D VAEs: shared parts · Wan 2.1 · HunyuanVideo.

Shapes: video [B, 3, T, H, W] float in [-1, 1], latents [B, z, T', H', W'], layers [B, C, T, H, W].
A video of T = 4n + 1 frames has T' = n + 1 latent frames; H' = H / 8, W' = W / 8.
Latents leave `encode` and enter `decode` normalised, as the DiT sees them, in fp32.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------ shared parts

def check_video(video: Tensor, time: int, space: int) -> None:
    """Raises ValueError unless video is [B, 3, time·n + 1, space·h, space·w]."""
    if (video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % time != 1
            or any(size % space or size == 0 for size in video.shape[3:])):
        raise ValueError(f"encode: expected a video [B, 3, {time}n + 1, {space}h, {space}w], got "
                         f"{list(video.shape)}: cut or resize it")


# ----------------------------------------- Wan 2.1: causal in time, 4 x 8 x 8 smaller, 16 channels

# Per-channel statistics of the released VAE's posterior means (Wan 2.1).
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

# The last frames of earlier chunks, by causal layer. None: the complete clip comes at once.
Past = dict[nn.Module, Tensor]


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x), on a CPU always by oneDNN: for a single clip torch unfolds the input and multiplies
    matrices, which takes 3 to 4 times as long."""
    if (x.device.type != "cpu" or x.dtype != torch.float32 or len(x) > 1
            or not torch.backends.mkldnn.is_available()):
        return nn.Conv3d.forward(conv, x)
    return torch.mkldnn_convolution(x, conv.weight, conv.bias, conv.padding, conv.stride,
                                    conv.dilation, conv.groups)


class CausalConv3d(nn.Conv3d):
    """A 3D convolution over the past only: zeros, or the previous chunk, on the left in time."""

    def __init__(self, dim_in: int, dim_out: int, kernel: tuple[int, int, int]):
        super().__init__(dim_in, dim_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T, H, W]; `past` holds the last frames of earlier chunks."""
        reach = self.kernel_size[0] - 1
        before = None if past is None else past.get(self)
        x = F.pad(x, (0, 0, 0, 0, reach, 0)) if before is None else torch.cat([before, x], dim=2)
        if past is not None:
            past[self] = x[:, :, x.shape[2] - reach:].clone()  # a view would keep the chunk alive
        return convolve(self, x)


class ChannelNorm(nn.Module):
    """Scale each position's channel vector to length sqrt(C) times a learned gain (Wan 2.1)."""

    def __init__(self, dim: int, axes: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()  # 1 / max(norm, 1e-12)
        return x * (scale * x.shape[1] ** 0.5) * self.gamma


def run(layers: nn.Sequential, x: Tensor, past: Past | None) -> Tensor:
    """Apply layers in order; causal layers also get `past`."""
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


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a 2D layer to every frame of x [B, C, T, H, W]."""
    B, _, T, _, _ = x.shape
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (B, T)).transpose(1, 2)


class FrameAttention(nn.Module):
    """One attention head over the H*W positions of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def attention(self, x: Tensor) -> Tensor:
        """x [B*T, C, H, W] -> the same shape."""
        qkv = self.to_qkv(self.norm(x)).flatten(2)               # B*T 3C H*W
        q, k, v = qkv.transpose(1, 2).unsqueeze(1).chunk(3, -1)  # B*T 1 H*W C, three times
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)   # B*T H*W C
        return self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:]))

    def forward(self, x: Tensor) -> Tensor:
        return x + per_frame(self.attention, x)


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
        first = x[:, :, :1]  # the clip's first frame is not convolved in time
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
                past[self] = x.new_empty(0)  # marks that the clip has begun
            first, rest = (x[:, :, :1], x[:, :, 1:]) if starts else (x[:, :, :0], x)
            if rest.shape[2]:  # the clip's first frame is not convolved in time
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
        for (a, b), temporal in zip(itertools.pairwise(dims), (*temporal_down, None), strict=True):
            layers += [Residual(a if j == 0 else b, b) for j in range(num_res)]
            layers += [] if temporal is None else [Down(b, temporal)]
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
            a = a if i == 0 else a // 2  # Up has halved the channels
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

    `encode` and `decode` process chunks, which bounds memory, and use normalised latents; `moments`
    and `reconstruct` process the complete clip, are differentiable and use raw latents (for
    training). Both are the same function of the clip.

    Args: dim, channels of the first level; z_dim, latent channels; dim_mult, factor of each level;
    num_res_blocks of an encoder level; temporal_down, whether each step down also halves time;
    latents_mean and latents_std, z_dim numbers each.
    """

    tiled = False  # each chunk depends on the one before, so that ranks cannot share them

    def __init__(self, dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2,
                 temporal_down=(False, True, True), latents_mean=WAN_MEAN, latents_std=WAN_STD):
        super().__init__()
        self.latents_mean, self.latents_std = tuple(latents_mean), tuple(latents_std)
        self.z_dim = z_dim
        self.statistics("meta")  # raises an error if these are not z_dim numbers
        self.space, self.time = 2 ** (len(dim_mult) - 1), 2 ** sum(map(bool, temporal_down))
        mult, up = tuple(dim_mult), tuple(reversed(temporal_down))
        self.encoder = Encoder(dim, 2 * z_dim, mult, num_res_blocks, tuple(temporal_down))
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim, mult, num_res_blocks, up)

    def moments(self, video: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance [B, z, T', H', W'] of a video, not normalised.

        With `past` the video is the next chunk of a clip: its first frame, or `time` later frames.
        """
        return self.conv1(self.encoder(video, past)).chunk(2, dim=1)

    def reconstruct(self, z: Tensor, past: Past | None = None) -> Tensor:
        """The video [B, 3, T, H, W] of raw latents z, or of a clip's next latents; not clamped."""
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
        Source: Wan 2.1."""
        mean, std = self.statistics(latents.device)
        z = (latents.float() * std + mean).to(self.dtype)
        past = {}
        frames = [self.reconstruct(frame, past).float() for frame in z.split(1, dim=2)]
        return torch.cat(frames, dim=2).clamp_(-1, 1)

    def statistics(self, device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents, each fp32 [1, z, 1, 1, 1]."""
        both = torch.tensor([self.latents_mean, self.latents_std], device=device)
        return both.view(2, 1, self.z_dim, 1, 1, 1).unbind()

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype


# ------------------------------- HunyuanVideo: causal convolutions, 4 x 8 x 8 smaller, 16 channels

class EdgeConv3d(nn.Module):
    """A 3D convolution that repeats the edges: on both sides in space, on the left in time."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int = 3, stride: tuple | int = 1):
        super().__init__()
        self.conv = nn.Conv3d(dim_in, dim_out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        r = self.conv.kernel_size[0] // 2
        return convolve(self.conv, F.pad(x, (r, r, r, r, 2 * r, 0), mode="replicate")
                        if r else x)


def named_sequential(**layers: nn.Module) -> nn.Sequential:
    """An nn.Sequential whose layers have names."""
    return nn.Sequential(OrderedDict(layers))


class HunyuanResidual(nn.Module):
    """norm, SiLU, conv, twice, plus the input (through a 1x1x1 conv if the widths differ)."""

    def __init__(self, dim_in: int, dim_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim_in, eps=1e-6)  # over the tile, including time
        self.conv1 = EdgeConv3d(dim_in, dim_out)
        self.norm2 = nn.GroupNorm(groups, dim_out, eps=1e-6)
        self.conv2 = EdgeConv3d(dim_out, dim_out)
        self.conv_shortcut = EdgeConv3d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        return y.add_(self.conv_shortcut(x))


class MidBlock(nn.Module):
    """One attention head over each frame and the frames before it, between residual blocks."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(HunyuanResidual(dim, dim, groups) for _ in range(2))
        self.attentions = nn.ModuleList([nn.ModuleDict({
            "group_norm": nn.GroupNorm(groups, dim, eps=1e-6),
            **{name: nn.Linear(dim, dim) for name in ("to_q", "to_k", "to_v")},
            "to_out": nn.Sequential(nn.Linear(dim, dim))})])

    def forward(self, x: Tensor) -> Tensor:
        layers, (T, H, W), x = self.attentions[0], x.shape[2:], self.resnets[0](x)
        y = layers["group_norm"](x).flatten(2).transpose(1, 2).unsqueeze(1)  # B 1 T*H*W C
        q, k, v = (layers[name](y) for name in ("to_q", "to_k", "to_v"))
        ends = range(0, (T + 1) * H * W, H * W)
        y = [F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b])
             for a, b in itertools.pairwise(ends)]  # by frame, which avoids a mask of (T*H*W)^2
        y = layers["to_out"](torch.cat(y, dim=2)).squeeze(1)                 # B T*H*W C
        return self.resnets[1](x + y.transpose(1, 2).unflatten(2, (T, H, W)))  # B C T H W


class Upsample3d(nn.Module):
    """Doubles height and width, with `temporal` also 1 + n frames to 1 + 2n; then a convolution."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.temporal, self.conv = temporal, EdgeConv3d(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.temporal:
            x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)
        return self.conv(x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4))


def levels(dims: tuple, num_res: int, groups: int, name: str, step: Callable) -> nn.Sequential:
    """Residual blocks of each width, and a step after each but the last; the first not in time."""
    out = []
    for i, (a, b) in enumerate(itertools.pairwise((dims[0], *dims))):
        blocks = [HunyuanResidual(b if j else a, b, groups) for j in range(num_res)]
        steps = {name: nn.Sequential(step(b, i > 0))} if i < len(dims) - 1 else {}
        out.append(named_sequential(resnets=nn.Sequential(*blocks), **steps))
    return nn.Sequential(*out)


def blend(tile: Tensor, before: Tensor, dim: int) -> None:
    """Fade in place from the end of `before` into the start of `tile` along axis `dim`."""
    n = min(tile.shape[dim], before.shape[dim])
    weight = (torch.arange(n, device=tile.device) / n).view(-1, *[1] * (tile.ndim - 1 - dim))
    end = before.narrow(dim, before.shape[dim] - n, n)
    tile.narrow(dim, 0, n).mul_(weight).add_(end * (1 - weight))


class HunyuanVAE(nn.Module):
    """The causal 3D VAE of HunyuanVideo, with the official checkpoint's parameter names.

    `encode` and `decode` process tiles, as the official inference does, and use normalised latents;
    `moments` and `reconstruct` process the complete clip, are differentiable and use raw latents.
    The results differ, because GroupNorm takes its statistics per tile. Ranks with the same input
    share the tiles if the attribute `group` is set.

    Args: dims, channels of the four levels; z_dim, latent channels; num_res_blocks of an encoder
    level; groups of channels in a norm; scaling, normalised latents over raw ones; sample_size
    (pixels) and sample_tsize (frames) of a tile, of which the next one overlaps a quarter.
    """

    time, space, tiled = 4, 8, True
    group: dist.ProcessGroup | None = None

    def __init__(self, dims=(128, 256, 512, 512), z_dim=16, num_res_blocks=2, groups=32,
                 scaling=0.476986, sample_size=256, sample_tsize=64):
        super().__init__()
        fits = sample_size > 0 == sample_size % 32 and sample_tsize > 0 == sample_tsize % 16
        if len(dims) != 4 or not fits:  # a quarter of a tile must be a whole number of latents
            raise ValueError("VAE config: expected 4 widths, multiples of 32 and of 16, got "
                             f"{dims}, sample_size={sample_size}, sample_tsize={sample_tsize}")
        self.z_dim, self.scaling, dims, (first, *_, top) = z_dim, scaling, tuple(dims), dims
        self.tile, self.tile_time = sample_size // self.space, sample_tsize // self.time
        self.encoder = named_sequential(
            conv_in=EdgeConv3d(3, first),
            down_blocks=levels(
                dims, num_res_blocks, groups, "downsamplers", lambda dim, temporal:
                named_sequential(conv=EdgeConv3d(dim, dim, stride=(1 + temporal, 2, 2)))),
            mid_block=MidBlock(top, groups), conv_norm_out=nn.GroupNorm(groups, top, eps=1e-6),
            act=nn.SiLU(inplace=True), conv_out=EdgeConv3d(top, 2 * z_dim))
        self.quant_conv = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = named_sequential(
            conv_in=EdgeConv3d(z_dim, top), mid_block=MidBlock(top, groups),
            up_blocks=levels(dims[::-1], num_res_blocks + 1, groups, "upsamplers", Upsample3d),
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
        """The video of normalised latents; shapes and range are WanVAE.decode's."""
        return self.by_tiles(lambda z: self.reconstruct((z.float() / self.scaling).to(self.dtype)),
                             latents, decode=True).clamp_(-1, 1)

    @torch.no_grad()
    def by_tiles(self, net: Callable[[Tensor], Tensor], x: Tensor, decode: bool = False) -> Tensor:
        """net(x) in fp32 by tiles that fade into each other; net is an encoder or a decoder.

        Memory: the result, the activations of one tile, and the lower edges of one row of tiles
        (with a group of ranks, a result of each). Every rank gets the complete result.
        """
        unit, S, N = (self.time, self.space), self.tile_time, self.tile
        (a, b), (c, d) = ((1, 1), unit) if decode else (unit, (1, 1))  # of a latent, in and out
        T, H, W = 1 + (x.shape[2] - 1) // a, x.shape[3] // b, x.shape[4] // b

        def empty_result(tile: Tensor) -> Tensor:
            T, H, W = 1 + (tile.shape[2] - 1) // a, tile.shape[3] // b, tile.shape[4] // b
            return torch.empty(len(x), 3 if decode else self.z_dim, 1 + c * (T - 1), d * H, d * W,
                               device=x.device)

        out = empty_result(x)
        step_time, step = S * 3 // 4 if T > S else S, N * 3 // 4 if max(H, W) > N else N
        edge, keep = d * N // 4, d * step
        starts = range(0, max(T - 1, 1), step_time)
        tiles = (x[:, :, a * t:a * (t + S) + 1, b * i:b * (i + N), b * j:b * (j + N)]
                 for t in starts for i in range(0, H, step) for j in range(0, W, step))
        results = self.run_tiles(net, tiles, empty_result)
        for t in starts:
            late, above, left = int(t > 0), {}, None  # late tiles have one more frame in front
            for i, j in itertools.product(range(0, H, step), range(0, W, step)):
                y = next(results)[:, :, late:]
                if i:
                    blend(y, above[j], dim=3)
                if j:
                    blend(y, left, dim=4)
                above[j], left = y[..., -edge:, :].clone(), y[..., -edge:].clone()
                y = y[..., :keep, :keep]
                part = out[:, :, c * t + late:c * (t + S) + 1, d * i:d * i + keep,
                           d * j:d * j + keep]
                if late:  # the part begins with the end of the previous tile
                    blend(y, part[:, :, :c * (S - step_time)], dim=2)
                part.copy_(y)
        return out

    def run_tiles(self, net: Callable, tiles: Iterator[Tensor],
                  empty_result: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """net of each tile in fp32, in order. In a group each rank computes a tile and shares its
        result, which the others receive into empty_result(tile)."""
        if self.group is None:
            yield from (net(tile).float() for tile in tiles)
            return
        rank, size = self.group.rank(), self.group.size()
        while batch := list(itertools.islice(tiles, size)):
            local = net(batch[rank]).float().contiguous() if rank < len(batch) else None
            for owner, tile in enumerate(batch):
                y = local if owner == rank else empty_result(tile)
                dist.broadcast(y, group=self.group, group_src=owner)
                yield y

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype
