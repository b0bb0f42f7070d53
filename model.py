"""The networks that are distilled: schedule and Euler step, Wan's and HunyuanVideo's DiT (Wan 2.2
A14B's two DiTs as one: experts.py). Conventions of the whole project:
  t in [0, 1]; t = 1 is noise, t = 0 is data; x_t = (1 - t) x0 + t x1 and v = x1 - x0 (Eq. 2, 3).
  Many codebases reverse time or scale it by 1000; here only a DiT's forward has the factor 1000.
Shapes: B batch, C channels, T H W latents, L tokens, S text tokens, D width, N heads.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from common.config import Shared, nearest
from common.linear import GELU, Linear, gelu
from common.names import EXPERTS
from common.ranks import Ranks, compute_dtype
from common.sequence_parallel import (
    SequenceShard, gather_sequence, heads_to_tokens, shard_sequence, tokens_to_heads)
from common.weights import load_module
from experts import Experts, expert_at, preset_tensors, shard_dit

# ------------------------------------------------------------------ schedule and Euler step

def shift_time(u: Tensor, shift: float) -> Tensor:
    """Move times u in [0, 1] towards noise: shift·u / (1 + (shift - 1)·u). Source: the releases."""
    return shift * u / (1 + (shift - 1) * u)


def time_grid(family: str, n: int, shift: float) -> Tensor:
    """The teacher's times 1 = t_n > … > t_0 = 0, in the order in which sampling visits them.

    HunyuanVideo shifts an even grid. Wan shifts twice: the end points, then the complete grid.
    Returns float64 [n + 1]; raises ValueError for another family. Source: the releases.
    """
    if family == "wan":
        last = shift_time(torch.tensor(0.001, dtype=torch.float64), shift).item()
        u = torch.linspace(1, last, n, dtype=torch.float64)
        return torch.cat([shift_time(u, shift), torch.zeros(1, dtype=torch.float64)])
    if family == "hunyuan":
        return shift_time(torch.linspace(1, 0, n + 1, dtype=torch.float64), shift)
    raise ValueError(f"family: expected wan or hunyuan, got '{family}'")


def key_times(family: str, n: int, shift: float, key: list[int]) -> list[float]:
    """Times of the key timesteps t'_m = 1 > … > t'_0 = 0, by their indices in the teacher's grid.

    Args: key, indices into the n-step grid, rising from 0 (noise) to n (data).
    Raises ValueError for another list. Source: Alg. 1, line 2; D1.
    """
    if len(key) < 2 or (key[0], key[-1]) != (0, n) or sorted(set(key)) != key:
        raise ValueError(f"key: expected indices rising from 0 to n={n}, got {key!s:.80}")
    return time_grid(family, n, shift)[key].tolist()


def euler_step(x: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
    """One Euler step of the probability-flow ODE from t to t_next; the state stays fp32. Eq. 5."""
    return x + (t_next - t) * v.float()


def velocity(dit: nn.Module, x: Tensor, t: float, cond: dict, uncond: dict | None = None,
             cfg_scale: float | list = 1.0, cfg_group: dist.ProcessGroup | None = None) -> Tensor:
    """Velocity v_θ(x, t) of a batch at one time; with `uncond`, guided by two evaluations.

    Args: x [B,C,T,H,W] fp32; t in [0,1]; cond, uncond from encode_prompts; cfg_scale, where 1
    means no guidance, or a list of two, for high and for low noise; cfg_group, two ranks that
    compute one evaluation each (without gradient). Returns [B,C,T,H,W] fp32. Source: Wan 2.1, 2.2.
    """
    if isinstance(cfg_scale, list):
        cfg_scale = cfg_scale[t < dit.cfg.boundary]
    dit = expert_at(dit, t)
    times = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
    if uncond is None or cfg_scale == 1:
        return dit(x, times, cond)
    if cfg_group is None:
        v, v_uncond = dit(x, times, cond), dit(x, times, uncond)
    else:
        local = dit(x, times, uncond if cfg_group.rank() else cond).contiguous()
        v, v_uncond = torch.empty_like(local), torch.empty_like(local)
        dist.all_gather([v, v_uncond], local, group=cfg_group)
    return v_uncond + cfg_scale * (v - v_uncond)


def sample_euler(dit: nn.Module, x: Tensor, times: list[float], cond: dict,
                 uncond: dict | None = None, cfg_scale: float | list = 1.0) -> Iterator[Tensor]:
    """Denoise x along `times`, yielding the latent after each Euler step. Eq. 5, without gradient.

    Args: x [B,C,T,H,W] fp32 at times[0]; falling times; the others as in `velocity`.
    """
    for t, t_next in itertools.pairwise(times):
        with torch.no_grad():
            x = euler_step(x, velocity(dit, x, t, cond, uncond, cfg_scale), t, t_next)
        yield x


# ----------------------------------------------------------------------- what both DiTs share
# Each DiT has cfg, blocks, token_grid, flops, forward and official parameter names.
def cast_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer in the dtype of its weights."""
    return layer(x.to(layer.weight.dtype))


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer in fp32, whatever the dtype of its weights (embeddings of t, head)."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def silu_mlp(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """A two-layer MLP with SiLU in fp32, given as its layers with or without the activation."""
    layers = list(layers)
    return linear_fp32(layers[-1], F.silu(linear_fp32(layers[0], x)))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters in fp32, then (1 + scale)·x + shift; shift, scale [B,1,D]."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis, with statistics in fp32."""
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def sinusoid(steps: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[cos(s w), sin(s w)] of scalars s [B], w falling from 1 to 1/10000: fp32 [B,dim].

    dtype of the angles: Wan's float64, HunyuanVideo's float32, whose rounding shows at s = 6016."""
    angle = torch.outer(steps.float().to(dtype), frequencies(dim, dtype, str(steps.device)))
    return torch.cat([angle.cos(), angle.sin()], -1).float()


@functools.lru_cache(maxsize=8)  # on the device: a copy in each forward would wait for the GPU
def frequencies(dim: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """w of `sinusoid` [dim/2], correctly rounded: a CPU's exp may be wrong in the last bit."""
    with torch.inference_mode(False):  # as in rope_table
        x = -math.log(10000) * torch.arange(dim // 2, dtype=dtype) / (dim // 2)
        return x.double().exp().to(device, dtype)


@functools.lru_cache(maxsize=8)
def rope_table(grid: tuple[int, int, int], pairs: tuple[int, int, int], theta: float,
               device: str) -> Tensor:
    """Cosines and sines of every token's rotary angles, fp32 [L,1,sum(pairs),2], on the device.

    Args: grid of frames, rows, columns, in row-major order; pairs of channels for each axis; theta,
    base of the frequencies theta^(-k / pairs). Source: both releases.
    """
    with torch.inference_mode(False):  # the cached table must also serve a later backward
        t, h, w = (torch.outer(torch.arange(size, dtype=torch.float64),
                               theta ** (-torch.arange(count, dtype=torch.float64) / count))
                   for size, count in zip(grid, pairs, strict=True))
        axes = t[:, None, None], h[:, None], w
        angle = torch.cat([a.expand(*grid, -1) for a in axes], -1).flatten(0, 2)[:, None]
        return torch.stack((angle.cos(), angle.sin()), -1).float().to(device)


def apply_rope(x: Tensor, seq: SequenceShard) -> Tensor:
    """Rotate adjacent channel pairs of the image tokens of x [B,L,N,head_dim] by their angles."""
    pairs = x[:, :seq.images].float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real numbers only
        (a, b), (cos, sin) = pairs.unbind(-1), seq.rope.unbind(-1)
        y = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        y = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(seq.rope))
    y = y.flatten(-2).to(x.dtype)
    return y if seq.images == x.shape[1] else torch.cat([y, x[:, seq.images:]], 1)


def attention(q: Tensor, k: Tensor, v: Tensor, seq: SequenceShard | None = None,
              mask: Tensor | None = None) -> Tensor:
    """Softmax attention over [B,L,N,head_dim]; returns [B,L,N·head_dim].

    Args: seq, if L are this rank's tokens of a sequence that its group shares (Ulysses); mask, for
    short sequences, bool [B,1,L,keys], where False hides a key. Long sequences have seq.keys and no
    mask, so that flash kernels apply.
    """
    if seq is not None and seq.group is not None:
        q, k, v = tokens_to_heads(q, k, v, seq)                          # B L N/sp d each
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if seq is None or seq.keys is None:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    else:
        out = torch.cat([F.scaled_dot_product_attention(
            q[b:b + 1], k[b:b + 1, :, :n], v[b:b + 1, :, :n]) for b, n in enumerate(seq.keys)])
    out = out.transpose(1, 2)                                            # B L N d
    if seq is not None and seq.group is not None:
        out = heads_to_tokens(out, seq)                                  # B l N d
    return out.flatten(2)


def checkpointed_forward(block: nn.Module, *args: Any) -> Tensor:
    """block._forward(*args), whose activations backward recomputes if block.checkpointing is on."""
    if block.checkpointing and torch.is_grad_enabled():
        return checkpoint(block._forward, *args, use_reentrant=False)
    return block._forward(*args)


def token_grid(dit: nn.Module, T: int, H: int, W: int) -> tuple[int, int, int]:
    """Token grid (frames, rows, columns) of latents T×H×W. Raises ValueError if none fits."""
    pt, ph, pw = dit.cfg.patch_size
    if T % pt or H % ph or W % pw:
        raise ValueError(f"latents of {T}×{H}×{W} cannot be cut into patches of {(pt, ph, pw)}: "
                         "choose a height and width that are multiples of 16")
    return T // pt, H // ph, W // pw


def embed_patches(x: Tensor, proj: nn.Conv3d, grid: tuple[int, int, int]) -> Tensor:
    """Tokens [B,L,D] of latents [B,C,T,H,W], by a linear layer because kernel = stride."""
    pt, ph, pw = proj.kernel_size
    patches = x.reshape(len(x), -1, grid[0], pt, grid[1], ph, grid[2], pw)
    patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)      # B L C·pt·ph·pw
    weight = proj.weight.flatten(1)
    return F.linear(patches.to(weight.dtype), weight, proj.bias)


def run_blocks(blocks: Sequence[nn.Module], h: Tensor, seq: SequenceShard, images: int,
               taps: tuple[int, ...], features_only: bool,
               *context: Any) -> tuple[Tensor | None, list[Tensor]]:
    """The stream h after all blocks, and the sequence's image tokens after the `taps` in fp32.

    features_only stops after the last tap and returns no stream. Raises ValueError for a wrong tap.
    """
    if taps and not 0 <= min(taps) <= max(taps) < len(blocks):
        raise ValueError(f"taps: expected blocks 0 … {len(blocks) - 1}, got {taps}")
    last, features = max(taps) if features_only else len(blocks) - 1, {}
    for b, block in enumerate(itertools.islice(blocks, last + 1)):
        h = block(h, seq, *context)
        if b in taps:
            features[b] = gather_sequence(h, seq)[:, :images].to(torch.float32, copy=True)
    return None if features_only else h, [features[b] for b in taps]


def collate(conds: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack single conditionings [S_i, …] to a batch [B, max S_i, …], padded with zeros.

    If texts differ in length, "mask" [B, max S_i] is 1 on text tokens and 0 on padding.
    """
    out, texts = {}, [c["text"] for c in conds]
    if len({len(text) for text in texts}) > 1:
        ones = [text.new_ones(len(text), dtype=torch.long) for text in texts]
        out["mask"] = pad_sequence(ones, batch_first=True)
    for name, first in conds[0].items():
        values = [c[name] for c in conds]
        out[name] = pad_sequence(values, batch_first=True) if first.ndim else torch.stack(values)
    return out


# ----------------------------------------------------------------------------------- Wan DiT

@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan 2.1 DiT, or of Wan 2.2 A14B's two, under official names (config.json)."""
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    model_type: str = "t2v"
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    image_dim: int = 1280  # width of the image encoder's features, if model_type is "i2v"
    image_len: int = 257   # number of these features; 0: without an image encoder
    boundary: float | None = None  # at this time and above, the expert for high noise computes
    family: ClassVar[str] = "wan"
    diffusers: ClassVar[dict] = {"num_attention_heads": "num_heads", "in_channels": "in_dim",
                                 "out_channels": "out_dim", "boundary_ratio": "boundary"}

    @property
    def takes_image(self) -> bool:
        return self.model_type == "i2v"

    @property
    def has_clip(self) -> bool:
        return self.takes_image and self.image_len > 0

    @property
    def rope_pairs(self) -> tuple[int, int, int]:
        """Channel pairs for time, height, width: height and width get a third, rounded down."""
        third, pairs = self.dim // self.num_heads // 6, self.dim // self.num_heads // 2
        return pairs - 2 * third, third, third


class WanAttention(nn.Module):
    """Self-attention (with rotary positions) or cross-attention (with a context) of a Wan block.

    image: whether the context begins with image tokens, which have separate keys and values; its
    last text_len rows are text.
    """
    def __init__(self, cfg: WanConfig, image: bool = False):
        super().__init__()
        dim, self.num_heads, self.image, self.text_len = cfg.dim, cfg.num_heads, image, cfg.text_len
        for name in ("q", "k", "v", "o", *(("k_img", "v_img") if image else ())):
            self.add_module(name, Linear(dim, dim))
        for name in ("q", "k", *(("k_img",) if image else ())):
            self.add_module(f"norm_{name}", RMSNorm(dim, cfg.eps))  # before the heads are split

    def forward(self, x: Tensor, context: Tensor | None = None,
                seq: SequenceShard | None = None) -> Tensor:
        source = x if context is None else context[:, -self.text_len:]
        heads = (self.num_heads, -1)
        q = self.norm_q(cast_linear(self.q, x)).unflatten(-1, heads)             # B L N d
        k = self.norm_k(cast_linear(self.k, source)).unflatten(-1, heads)        # B S N d
        v = cast_linear(self.v, source).unflatten(-1, heads)                     # B S N d
        if seq is not None:
            q, k = apply_rope(q, seq), apply_rope(k, seq)
        out = attention(q, k, v, seq=seq)                                        # B L D
        if self.image:
            image = context[:, :-self.text_len]
            k = self.norm_k_img(cast_linear(self.k_img, image)).unflatten(-1, heads)
            v = cast_linear(self.v_img, image).unflatten(-1, heads)
            out = out + attention(q, k, v)
        return self.o(out)                                                       # B L D


class WanBlock(nn.Module):
    """Self-attention, text cross-attention and feed-forward, on an fp32 residual stream."""
    forward = checkpointed_forward
    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.eps, self.checkpointing = cfg.eps, False
        self.modulation = nn.Parameter(torch.zeros(1, 6, cfg.dim))
        self.self_attn = WanAttention(cfg)
        self.norm3 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.cross_attn = WanAttention(cfg, image=cfg.has_clip)
        self.ffn = nn.Sequential(Linear(cfg.dim, cfg.ffn_dim), GELU(), Linear(cfg.ffn_dim, cfg.dim))

    def _forward(self, x: Tensor, seq: SequenceShard, e: Tensor, context: Tensor) -> Tensor:
        """x [B,L,D] fp32, e [B,6,D] fp32, context [B,S,D]; returns [B,L,D] fp32."""
        m = (self.modulation.float() + e).unsqueeze(2).unbind(1)          # 6 × [B 1 D]
        y = modulated_norm(x, m[0], m[1], self.eps)
        x = x + m[2] * self.self_attn(y, seq=seq).float()
        affine = self.norm3.weight.float(), self.norm3.bias.float()
        y = F.layer_norm(x, x.shape[-1:], *affine, self.eps)
        x = x + self.cross_attn(y, context=context).float()
        y = modulated_norm(x, m[3], m[4], self.eps)
        return x + m[5] * self.ffn(y.to(self.ffn[0].weight.dtype)).float()


class WanHead(nn.Module):
    """Modulated norm and projection of every token to its patch of velocities, in fp32."""
    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.eps = cfg.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, cfg.dim))
        self.head = Linear(cfg.dim, math.prod(cfg.patch_size) * cfg.out_dim)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + e.unsqueeze(1)).unsqueeze(2).unbind(1)  # B 1 D
        return linear_fp32(self.head, modulated_norm(x, shift, scale, self.eps))


class WanDiT(nn.Module):
    """The Wan 2.1 transformer, text-to-video or image-to-video."""
    token_grid = token_grid
    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.cfg, self.sp, D = cfg, None, cfg.dim  # sp: the group of ranks that share each sample
        self.patch_embedding = nn.Conv3d(cfg.in_dim, D, cfg.patch_size, cfg.patch_size)
        self.text_embedding = nn.Sequential(Linear(cfg.text_dim, D), GELU(), Linear(D, D))
        self.time_embedding = nn.Sequential(Linear(cfg.freq_dim, D), nn.SiLU(), Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(D, 6 * D))
        if cfg.has_clip:
            width = cfg.image_dim
            self.img_emb = nn.ModuleDict({"proj": nn.Sequential(
                nn.LayerNorm(width), Linear(width, width), nn.GELU(), Linear(width, D),
                nn.LayerNorm(D))})
        self.blocks = nn.ModuleList(WanBlock(cfg) for _ in range(cfg.num_layers))
        self.head = WanHead(cfg)

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], taps: tuple[int, ...] = (),
                features_only: bool = False) -> Tensor | tuple[Tensor | None, list[Tensor]]:
        """Velocity of noisy latents, and with taps the features that the discriminator reads.

        Args: x [B,C,T,H,W] fp32; t [B] in [0,1]; cond["text"] [B,S,text_dim], S <= text_len, zero
        past a prompt's end (there is no mask); for I2V also cond["frames"] [B,20,T,H,W], mask and
        latents of the first frame, and with CLIP cond["image"] [B,257,image_dim]; taps, indices of
        blocks whose residual stream is returned; features_only stops after the last tap.
        Returns v [B,C,T,H,W] fp32, or with taps (v or None, features [B,L,D] fp32 of each tap).
        Raises ValueError for sizes that do not fit. Source: Wan 2.1 release; taps: Eq. 8.
        """
        B, _, T, H, W = x.shape
        grid, (pt, ph, pw), c = self.token_grid(T, H, W), self.cfg.patch_size, self.cfg
        text = cond["text"]
        if text.shape[1] > c.text_len or text.shape[2] != c.text_dim:
            raise ValueError(f"cond['text']: expected [B, at most {c.text_len}, {c.text_dim}] for "
                             f"this DiT, got {tuple(text.shape)}")
        if c.takes_image:
            if "frames" not in cond or c.has_clip and "image" not in cond:
                raise ValueError("cond: expected text, image and frames for an image-to-video DiT, "
                                 f"got {', '.join(cond)}: give it an image")
            x = torch.cat([x, cond["frames"].to(x.dtype)], 1)
        h = embed_patches(x, self.patch_embedding, grid).float()                        # B L D
        time = sinusoid(t.double() * 1000, c.freq_dim, torch.float64)
        e = silu_mlp(self.time_embedding, time)                                         # B D
        e6 = linear_fp32(self.time_projection[1], F.silu(e)).unflatten(-1, (6, -1))     # B 6 D
        text = F.pad(text, (0, 0, 0, c.text_len - text.shape[1]))
        context = self.text_embedding(text.to(self.text_embedding[0].weight.dtype))     # B S D
        if c.has_clip:
            image = self.img_emb["proj"](cond["image"].to(context.dtype))
            context = torch.cat([image, context], 1)
        rope = rope_table(grid, c.rope_pairs, 10000.0, str(x.device))
        L = h.shape[1]
        *h, seq = shard_sequence(h, rope, self.sp)  # popped below, so that no reference keeps h
        h, features = run_blocks(self.blocks, h.pop(), seq, L, taps, features_only, e6, context)
        if h is None:
            return None, features
        out = gather_sequence(self.head(h, e), seq).view(B, *grid, pt, ph, pw, -1)  # channels last
        v = out.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(B, -1, T, H, W)                 # B C T H W
        return (v, features) if taps else v

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill with the official initialisation, every draw from `generator`. Source: Wan 2.1."""
        for name, p in self.named_parameters():
            if name.endswith("bias") or name == "head.head.weight":
                nn.init.zeros_(p)
            elif name.startswith(("time_embedding", "text_embedding")):
                nn.init.normal_(p, std=0.02, generator=generator)
            elif name.endswith("modulation"):
                nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=generator)
            elif p.ndim > 1:
                nn.init.xavier_uniform_(p.flatten(1), generator=generator)  # flatten is a view
            else:
                nn.init.ones_(p)

    def flops(self, tokens: int) -> float:
        """FLOPs of one forward of one sample, where a multiply-add counts as two."""
        c = self.cfg
        context = c.text_len + (c.image_len if c.takes_image else 0)
        dense = 2 * tokens * (6 * c.dim ** 2 + 2 * c.dim * c.ffn_dim) + 4 * context * c.dim ** 2
        return float(c.num_layers * (dense + 4 * tokens * (tokens + context) * c.dim))


# -------------------------------------------------------------------------- HunyuanVideo DiT

@dataclass(frozen=True)
class HunyuanConfig:
    """Sizes of a HunyuanVideo DiT."""
    dim: int
    ffn_dim: int
    num_heads: int
    num_double: int
    num_single: int
    num_refiner: int = 2
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 256
    pooled_dim: int = 768
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    family: ClassVar[str] = "hunyuan"
    takes_image: ClassVar[bool] = False
    boundary: ClassVar[None] = None
    diffusers: ClassVar[dict] = {
        "num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim",
        "num_layers": "num_double", "num_single_layers": "num_single",
        "num_refiner_layers": "num_refiner", "text_embed_dim": "text_dim", "patch_size": "",
        "pooled_projection_dim": "pooled_dim", "rope_axes_dim": "rope_dims"}

    @property
    def num_layers(self) -> int:
        return self.num_double + self.num_single

    @property
    def rope_pairs(self) -> tuple[int, ...]:
        return tuple(n // 2 for n in self.rope_dims)


def scalar_embedder(freq_dim: int, dim: int) -> nn.ModuleDict:
    """The two layers that embed a sinusoid, under their official names."""
    return nn.ModuleDict({"mlp": nn.Sequential(Linear(freq_dim, dim), nn.SiLU(), Linear(dim, dim))})


class MLP(nn.Module):
    """fc1, activation, fc2."""
    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.fc1 = Linear(dim, ffn_dim)
        self.fc2 = Linear(ffn_dim, dim)

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        return self.fc2(activation(cast_linear(self.fc1, x)))


class Modulation(nn.Module):
    """`count` vectors [B,1,D] from the conditioning vector: shifts, scales and gates, in fp32."""
    def __init__(self, dim: int, count: int):
        super().__init__()
        self.count = count
        self.linear = Linear(dim, count * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return cast_linear(self.linear, F.silu(vec)).float().unsqueeze(1).chunk(self.count, -1)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k, v, each [B,L,N,d], of a fused projection [B,L,3·D]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)


class RefinerBlock(nn.Module):
    """Self-attention and MLP over text tokens, each with a gate."""
    def __init__(self, cfg: HunyuanConfig):
        super().__init__()
        D, self.num_heads = cfg.dim, cfg.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(D, cfg.eps), nn.LayerNorm(D, cfg.eps)
        self.self_attn_qkv = Linear(D, 3 * D)
        self.self_attn_proj = Linear(D, D)
        self.mlp = MLP(D, 4 * D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(D, 2 * D))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        """x [B,S,D], c [B,D]; mask [B,1,S,S]."""
        g1, g2 = cast_linear(self.adaLN_modulation[1], F.silu(c)).unsqueeze(1).chunk(2, -1)
        q, k, v = split_heads(self.self_attn_qkv(self.norm1(x)), self.num_heads)
        x = x + g1 * self.self_attn_proj(attention(q, k, v, mask=mask))
        return x + g2 * self.mlp(self.norm2(x), F.silu)


class TokenRefiner(nn.Module):
    """Text states to text tokens of the DiT, modulated by the time and the states' mean."""
    def __init__(self, cfg: HunyuanConfig):
        super().__init__()
        self.input_embedder = Linear(cfg.text_dim, cfg.dim)
        self.t_embedder = scalar_embedder(cfg.freq_dim, cfg.dim)
        self.c_embedder = nn.ModuleDict({"linear_1": Linear(cfg.text_dim, cfg.dim),
                                         "linear_2": Linear(cfg.dim, cfg.dim)})
        self.individual_token_refiner = nn.ModuleDict(
            {"blocks": nn.ModuleList(RefinerBlock(cfg) for _ in range(cfg.num_refiner))})

    def forward(self, text: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        """text [B,S,text_dim], time [B,freq_dim] sinusoid, mask bool [B,S] -> [B,S,D]."""
        if mask is None:
            mean, allowed = text.float().mean(1), None
        else:
            weight = mask.float().unsqueeze(-1)
            mean = (text.float() * weight).sum(1) / weight.sum(1)
            allowed = mask[:, None, :, None] & mask[:, None, None, :]  # B 1 S S
            allowed[..., 0] = True  # padding attends to the first token: no empty softmax
        c = silu_mlp(self.t_embedder["mlp"], time) + silu_mlp(self.c_embedder.values(), mean)
        x = cast_linear(self.input_embedder, text)
        for block in self.individual_token_refiner["blocks"]:
            x = block(x, c, allowed)
        return x


class DoubleBlock(nn.Module):
    """Joint attention of image and text tokens; each stream has its own weights."""
    forward = checkpointed_forward
    def __init__(self, cfg: HunyuanConfig):
        super().__init__()
        D, self.num_heads, self.eps, self.checkpointing = cfg.dim, cfg.num_heads, cfg.eps, False
        for s in ("img", "txt"):
            self.add_module(f"{s}_mod", Modulation(D, 6))
            self.add_module(f"{s}_attn_qkv", Linear(D, 3 * D))
            self.add_module(f"{s}_attn_q_norm", RMSNorm(D // cfg.num_heads, cfg.eps))
            self.add_module(f"{s}_attn_k_norm", RMSNorm(D // cfg.num_heads, cfg.eps))
            self.add_module(f"{s}_attn_proj", Linear(D, D))
            self.add_module(f"{s}_mlp", MLP(D, cfg.ffn_dim))

    def _forward(self, x: Tensor, seq: SequenceShard, vec: Tensor) -> Tensor:
        """x [B,L+S,D], image tokens first; vec [B,D]."""
        L = seq.images
        streams, heads = {"img": x[:, :L], "txt": x[:, L:]}, []
        mods = {s: getattr(self, f"{s}_mod")(vec) for s in streams}
        for s, y in streams.items():
            y = modulated_norm(y, *mods[s][:2], self.eps)
            y = cast_linear(getattr(self, f"{s}_attn_qkv"), y)
            q, k, v = split_heads(y, self.num_heads)
            q, k = getattr(self, f"{s}_attn_q_norm")(q), getattr(self, f"{s}_attn_k_norm")(k)
            heads.append((apply_rope(q, seq), apply_rope(k, seq), v) if s == "img" else (q, k, v))
        q, k, v = (torch.cat(pair, 1) for pair in zip(*heads, strict=True))
        y, out = attention(q, k, v, seq), []                                   # B L+S D
        del heads, q, k, v  # free them before the MLP allocates, if there is no gradient
        for (s, z), y_s in zip(streams.items(), (y[:, :L], y[:, L:]), strict=True):
            _, _, gate1, shift2, scale2, gate2 = mods[s]
            z = (z + gate1 * getattr(self, f"{s}_attn_proj")(y_s)).to(z.dtype)
            y = getattr(self, f"{s}_mlp")(modulated_norm(z, shift2, scale2, self.eps), gelu)
            out.append((z + gate2 * y).to(z.dtype))
        return torch.cat(out, 1)


class SingleBlock(nn.Module):
    """Attention and MLP in parallel, over image and text tokens with the same weights."""
    forward = checkpointed_forward
    def __init__(self, cfg: HunyuanConfig):
        super().__init__()
        D, self.num_heads, self.eps, self.checkpointing = cfg.dim, cfg.num_heads, cfg.eps, False
        self.modulation = Modulation(D, 3)
        self.linear1 = Linear(D, 3 * D + cfg.ffn_dim)
        self.linear2 = Linear(D + cfg.ffn_dim, D)
        self.q_norm = RMSNorm(D // cfg.num_heads, cfg.eps)
        self.k_norm = RMSNorm(D // cfg.num_heads, cfg.eps)

    def _forward(self, x: Tensor, seq: SequenceShard, vec: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        y = cast_linear(self.linear1, modulated_norm(x, shift, scale, self.eps))
        q, k, v = split_heads(y[..., :3 * x.shape[-1]], self.num_heads)
        y = gelu(y[..., 3 * x.shape[-1]:])  # here, so that backward needs its large gradient last
        q, k = self.q_norm(q), self.k_norm(k)
        v = v if torch.is_grad_enabled() else v.contiguous()  # a copy frees linear1's output
        q, k = apply_rope(q, seq), apply_rope(k, seq)
        out = attention(q, k, v, seq)                                          # B L+S D
        del q, k, v  # as in DoubleBlock
        y = self.linear2(torch.cat([out, y], -1))
        return (x + gate * y).to(x.dtype)


class HunyuanDiT(nn.Module):
    """The HunyuanVideo transformer with embedded guidance."""
    token_grid = token_grid
    def __init__(self, cfg: HunyuanConfig):
        super().__init__()
        self.cfg, self.sp, D = cfg, None, cfg.dim  # sp as in WanDiT
        self.img_in = nn.ModuleDict(
            {"proj": nn.Conv3d(cfg.in_dim, D, cfg.patch_size, cfg.patch_size)})
        self.txt_in = TokenRefiner(cfg)
        self.time_in = scalar_embedder(cfg.freq_dim, D)
        self.vector_in = nn.ModuleDict({"in_layer": Linear(cfg.pooled_dim, D),
                                        "out_layer": Linear(D, D)})
        self.guidance_in = scalar_embedder(cfg.freq_dim, D)
        self.double_blocks = nn.ModuleList(DoubleBlock(cfg) for _ in range(cfg.num_double))
        self.single_blocks = nn.ModuleList(SingleBlock(cfg) for _ in range(cfg.num_single))
        self.final_layer = nn.ModuleDict({
            "linear": Linear(D, math.prod(cfg.patch_size) * cfg.out_dim),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), Linear(D, 2 * D))})

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in order: taps are indices into them."""
        return [*self.double_blocks, *self.single_blocks]

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], taps: tuple[int, ...] = (),
                features_only: bool = False) -> Tensor | tuple[Tensor | None, list[Tensor]]:
        """Velocity of noisy latents, and with taps the features that the discriminator reads.

        Args: cond["text"] [B,S,text_dim]; cond["mask"] [B,S], nonzero on valid text tokens, which
        come first, absent if all are valid; cond["pooled"] [B,pooled_dim]; cond["guidance"] [B],
        the embedded guidance scale; the rest as in WanDiT.forward. Source: HunyuanVideo release.
        """
        B, _, T, H, W = x.shape
        grid, (pt, ph, pw), c = self.token_grid(T, H, W), self.cfg.patch_size, self.cfg
        text, mask = cond["text"], cond["mask"].bool() if "mask" in cond else None
        if text.shape[2] != c.text_dim or cond["pooled"].shape[1] != c.pooled_dim:
            raise ValueError(f"cond: expected widths {c.text_dim} and {c.pooled_dim} for this DiT, "
                             f"got text {tuple(text.shape)}, pooled {tuple(cond['pooled'].shape)}")
        time = sinusoid(t.double() * 1000, c.freq_dim, torch.float32)
        vec = self.modulation_vector(time, cond)                                # B D
        text = self.txt_in(text, time, mask)                                    # B S D
        h = embed_patches(x, self.img_in["proj"], grid)                         # B L D
        L = h.shape[1]
        h = torch.cat([h, text.to(h.dtype)], 1).to(compute_dtype(x.device))     # B L+S D
        rope = rope_table(grid, c.rope_pairs, 256.0, str(x.device))
        *h, seq = shard_sequence(h, rope, self.sp)  # popped below, so that no reference keeps h
        if mask is not None:
            seq = seq._replace(keys=tuple(L + n for n in mask.sum(1).tolist()))
        h, features = run_blocks(self.blocks, h.pop(), seq, L, taps, features_only, vec)
        if h is None:
            return None, features
        ada, last = self.final_layer["adaLN_modulation"][1], self.final_layer["linear"]
        shift, scale = linear_fp32(ada, F.silu(vec)).unsqueeze(1).chunk(2, -1)
        h = h[:, :seq.images] if seq.group is None else h  # shards are gathered with the text
        out = linear_fp32(last, modulated_norm(h, shift, scale, c.eps))
        out = gather_sequence(out, seq)[:, :L]                                  # B L C·pt·ph·pw
        out = out.view(B, *grid, -1, pt, ph, pw)                                # channels first
        v = out.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(B, -1, T, H, W)         # B C T H W
        return (v, features) if taps else v

    def modulation_vector(self, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The source of shifts, scales and gates: time + guidance + pooled text. [B,D]"""
        guidance = sinusoid(cond["guidance"].double() * 1000, self.cfg.freq_dim, torch.float32)
        return (silu_mlp(self.time_in["mlp"], time) + silu_mlp(self.guidance_in["mlp"], guidance)
                + silu_mlp(self.vector_in.values(), cond["pooled"]))

    def flops(self, tokens: int) -> float:
        """FLOPs of one forward of one sample with a text of full length."""
        c, S = self.cfg, tokens + self.cfg.text_len
        dense = 2 * S * (4 * c.dim ** 2 + 2 * c.dim * c.ffn_dim)
        return float(c.num_layers * (dense + 4 * S ** 2 * c.dim))


# ----------------------------------------------------------------------------------- presets

TINY = {"dim": 128, "ffn_dim": 512, "num_heads": 4, "num_layers": 6, "text_dim": 64, "text_len": 16}
WAN_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
I2V = {"in_dim": 36, "model_type": "i2v"}
PRESETS = {
    "tiny": WanConfig(**TINY), "tiny-i2v": WanConfig(**TINY, **I2V, image_dim=32, image_len=37),
    "wan-t2v-1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan-t2v-14b": WanConfig(**WAN_14B), "wan-i2v-14b": WanConfig(**WAN_14B, **I2V),
    "tiny-experts": WanConfig(**TINY, boundary=0.5),
    "wan22-t2v-a14b": WanConfig(**WAN_14B, boundary=0.875),
    "wan22-i2v-a14b": WanConfig(**WAN_14B, **I2V, image_len=0, boundary=0.9),
    "hunyuan-tiny": HunyuanConfig(dim=48, ffn_dim=192, num_heads=2, num_double=2, num_single=4,
                                  text_dim=32, text_len=24, pooled_dim=24, rope_dims=(4, 10, 10)),
    "hunyuan-t2v": HunyuanConfig(dim=3072, ffn_dim=12288, num_heads=24, num_double=20,
                                 num_single=40)}
Sizes = WanConfig | HunyuanConfig


def sizes_of(preset: str) -> Sizes:
    """The sizes of a preset. Raises ValueError for an unknown one."""
    if preset not in PRESETS:
        raise ValueError(f"preset: expected {' | '.join(PRESETS)}, got '{preset}'"
                         f"{nearest(preset, PRESETS)}; add a line to PRESETS for other sizes")
    return PRESETS[preset]


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Latent shape [C,T,H,W] of a video: time / 4 without the first frame, space / 8.
    Raises ValueError unless frames = 4n + 1, height and width 16n (VAE 8, patch 2)."""
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames: expected 4n + 1, as {max(frames // 4 * 4, 0) + 1}, got {frames}")
    for name, size in (("height", height), ("width", width)):
        if size < 16 or size % 16:
            raise ValueError(f"{name}: expected 16n, as {size & ~15 or 16}, got {size}")
    return 16, 1 + (frames - 1) // 4, height // 8, width // 8


def check_model(cfg: Shared) -> Sizes:
    """The sizes of a config's DiT. Raises ValueError if grid, shape, preset or family are wrong."""
    latent_shape(cfg.frames, cfg.height, cfg.width)
    key_times(cfg.family, cfg.n, cfg.shift, cfg.key)
    sizes = sizes_of(cfg.preset)
    if sizes.family != cfg.family:
        raise ValueError(f"preset: '{cfg.preset}' is of family {sizes.family}, got family "
                         f"'{cfg.family}': change one of them")
    if sizes.boundary is None and cfg.cfg_scale_low is not None:
        raise ValueError(f"cfg_scale_low: got {cfg.cfg_scale_low}; preset '{cfg.preset}' has one "
                         "DiT: leave it out")
    return sizes


# ---------------------------------------------------------------------- building and loading

def build_dit(preset: str | Sizes, experts: str = "both") -> WanDiT | HunyuanDiT | Experts:
    """A DiT by preset name or sizes, with torch's initialisation. experts: both | high | low, for a
    preset with two. Raises as sizes_of."""
    sizes = sizes_of(preset) if isinstance(preset, str) else preset
    if sizes.boundary is not None:
        return Experts({name: WanDiT(sizes) for name in EXPERTS
                        if experts == "both" or name.startswith(experts)})
    return (WanDiT if sizes.family == "wan" else HunyuanDiT)(sizes)


def empty_dit(preset: str, dtype: torch.dtype, ranks: Ranks | None,
              forward_dtype: torch.dtype | None = None, experts: str = "both") -> nn.Module:
    """A DiT on the meta device, sharded if `ranks` is given; arguments as in load_dit."""
    with torch.device("meta"):
        dit = build_dit(preset, experts).to(dtype)
    return dit if ranks is None else shard_dit(dit, ranks, forward_dtype)


def load_dit(weights: str | Path, preset: str, dtype: torch.dtype = torch.float32,
             device: str | torch.device = "cpu", ranks: Ranks | None = None,
             forward_dtype: torch.dtype | None = None, experts: str = "both") -> nn.Module:
    """Build a DiT on the meta device, shard it if `ranks` is given, and read its weights.

    Args: weights, a folder or a file; forward_dtype of the sharded blocks' gathered weights (None:
    dtype); experts, as in build_dit. Raises as common.names and load_module."""
    dit = empty_dit(preset, dtype, ranks, forward_dtype, experts)
    tensors = preset_tensors(weights, dit.cfg, preset, experts)
    return load_module(dit, tensors, f"DiT from {weights}", device=device)
