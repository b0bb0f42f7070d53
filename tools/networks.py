"""What tools/bench.py times: networks with random weights, and diffusers' networks to compare with.
"""

import importlib.metadata
import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.student import transformer_config
from common.config import Shared
from common.names import official_names
from common.ranks import Ranks, compute_dtype, generator, local_rows
from common.weights import LazyTensor
from frozen.image import CLIPVision, image_cond
from frozen.text import CLIPText, Llama, UMT5Encoder
from frozen.vae import HunyuanVAE, WanVAE
from model import HunyuanConfig, WanConfig, build_dit, empty_dit, latent_shape, sizes_of
from training.memory import meta_student

Call = Callable[[], object]


# ------------------------------------------------------------------ networks of a config's sizes

def random_network(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """The network that `make` builds, in its default initialisation, frozen, in compute_dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(compute_dtype(device))
    try:
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def tokens_of(cfg: Shared) -> tuple[nn.Module, int]:
    """The config's DiT on the meta device, and its tokens of a sample."""
    dit = meta_student(sizes_of(cfg.preset), None)
    return dit, math.prod(dit.token_grid(*latent_shape(cfg.frames, cfg.height, cfg.width)[1:]))


def random_dit(cfg: Shared, device: torch.device, ranks: Ranks | None) -> nn.Module:
    """A frozen DiT with random weights, built on its device; with `ranks` each holds its shard."""
    dit = empty_dit(cfg.preset, compute_dtype(device), ranks).requires_grad_(False)
    for p in dit.to_empty(device=device).parameters():
        local_rows(p)[0].normal_(std=0.02)
    return dit


def random_tensors(dit: nn.Module) -> dict[str, LazyTensor]:
    """A DiT's tensors as a file would hold them: random values, drawn when they are read."""
    def draw(shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        return torch.randn((rows.stop - rows.start, *shape[1:]) if rows else shape).mul_(0.02)

    return {name: LazyTensor(tuple(p.shape), torch.float32, Path("random"), partial(draw, p.shape))
            for name, p in dit.named_parameters()}


def is_small(cfg: Shared) -> bool:
    """Whether a config's DiT is one of the small ones: then its VAE and encoders are small too."""
    return sizes_of(cfg.preset).text_dim < 1024


# Constructor arguments of small VAEs; without arguments they have the released sizes.
SMALL_VAES = {WanVAE: {"dim": 16}, HunyuanVAE: {"dims": (16, 32, 64, 64), "groups": 8}}


def make_vae(family: str, small: bool) -> WanVAE | HunyuanVAE:
    """The VAE of a family, in the released sizes or small."""
    cls = WanVAE if family == "wan" else HunyuanVAE
    return cls(**SMALL_VAES[cls] if small else {})


def frozen_arguments(cfg: Shared) -> dict[type, dict[str, Any]]:
    """Constructor arguments of the VAEs and encoders that fit a config's DiT, by class: none for
    the released sizes and, next to a small DiT, those of small networks."""
    sizes = sizes_of(cfg.preset)
    if not is_small(cfg):
        return defaultdict(dict)
    layers = {"dim_ffn": 64, "num_heads": 2, "num_layers": 2}
    text = {**layers, "dim": sizes.text_dim, "vocab_size": 256}
    if sizes.family == "hunyuan":
        return SMALL_VAES | {Llama: text | {"num_kv_heads": 2},
                             CLIPText: text | {"dim": sizes.pooled_dim}}
    patch = 48 // math.isqrt(sizes.image_len - 1) if sizes.has_clip else 1
    return SMALL_VAES | {UMT5Encoder: text | {"dim_attn": sizes.text_dim},
                         CLIPVision: {**layers, "dim": sizes.image_dim, "size": 48, "patch": patch}}


def vae_shape(way: str, frames: int, height: int, width: int) -> tuple[int, ...]:
    """Shape of what a VAE encodes or decodes, for one video."""
    return 1, *(latent_shape(frames, height, width) if way == "decode" else
                (3, frames, height, width))


def random_states(cfg: Shared) -> dict[str, Tensor]:
    """Random values in place of a full-length prompt's conditioning, made without encoders."""
    sizes, draw = sizes_of(cfg.preset), generator("cond", cfg.seed)
    shapes = {"text": (sizes.text_len, sizes.text_dim)}
    if sizes.takes_image:
        _, T, H, W = latent_shape(cfg.frames, cfg.height, cfg.width)
        shapes |= {"image": (sizes.image_len, sizes.image_dim)} if sizes.has_clip else {}
        shapes["frames"] = 20, T, H, W
    states = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    if cfg.family == "hunyuan":
        states["pooled"] = torch.randn(sizes.pooled_dim, generator=draw)
        states["guidance"] = torch.tensor(cfg.embedded_guidance)
    return states


def vae_run(way: str, frames: int, height: int, width: int) -> Callable[[nn.Module], Tensor]:
    """A function that lets a VAE encode or decode noise, made on torch's current device."""
    return lambda vae: getattr(vae, way)(torch.randn(vae_shape(way, frames, height, width)))


def ids(length: int) -> Tensor:
    """Token ids of one prompt, [1, length]."""
    return torch.zeros(1, length, dtype=torch.long)


def frozen_parts(cfg: Shared) -> dict[str, tuple[Callable[[], nn.Module], Callable]]:
    """VAE and encoders by the name of their row, as (make, run): make() builds a network, and
    run(network) encodes or decodes a random video, or encodes a full-length prompt or an image of
    zeros."""
    sizes, arguments = sizes_of(cfg.preset), frozen_arguments(cfg)
    vae, size = partial(make_vae, cfg.family, is_small(cfg)), (cfg.frames, cfg.height, cfg.width)
    parts = {f"VAE {way}": (vae, vae_run(way, *size)) for way in ("decode", "encode")}

    def image_networks() -> nn.ModuleDict:
        clip = {"clip": CLIPVision(**arguments[CLIPVision])} if sizes.has_clip else {}
        return nn.ModuleDict({"vae": vae(), **clip})

    def first_frame(networks: nn.ModuleDict) -> dict:
        clip = networks["clip"] if sizes.has_clip else None
        return image_cond(torch.zeros(3, *size[1:]), networks["vae"], clip, *size)

    if cfg.family == "hunyuan":
        return parts | {
            "prompt: LLaMA": (partial(Llama, **arguments[Llama]),
                              lambda llama: llama(ids(95 + sizes.text_len))),  # 95 of the template
            "prompt: CLIP text": (partial(CLIPText, **arguments[CLIPText]),
                                  lambda clip: clip(ids(77)))}
    parts["prompt: umT5"] = (partial(UMT5Encoder, **arguments[UMT5Encoder]),
                             lambda t5: t5(ids(sizes.text_len), ids(sizes.text_len) + 1))
    if sizes.takes_image:
        parts["prompt: first frame"] = image_networks, first_frame
    return parts


# ------------------------------------------------------------- small networks and diffusers' peers

VIDEO_SIZE = (64, 64)  # height and width of the videos that the VAEs encode and decode


def diffusers_version() -> str | None:
    """The version of diffusers, or None if it is not installed."""
    return (importlib.metadata.version("diffusers")
            if importlib.util.find_spec("diffusers") else None)


def peer_sizes(family: str, dim: int, heads: int, layers: int) -> WanConfig | HunyuanConfig:
    """Sizes of a small DiT of a family."""
    same = {"dim": dim, "ffn_dim": 4 * dim, "num_heads": heads, "text_dim": 64, "text_len": 16}
    if family == "wan":
        return WanConfig(**same, num_layers=layers)
    third = dim // heads // 2 // 3
    return HunyuanConfig(**same, num_double=layers // 2, num_single=layers // 2, pooled_dim=32,
                         rope_dims=(dim // heads - 4 * third, 2 * third, 2 * third))


def peer_dits(sizes: WanConfig | HunyuanConfig, batch: int, latents: tuple[int, int, int],
              backward: bool) -> list[Call]:
    """Runs of our DiT and of diffusers' with the same weights and inputs: a forward without
    gradient or, with `backward`, a forward and a backward to all weights."""
    draw = generator("peer")
    ours = build_dit(sizes)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.02, generator=draw)
    x, t = torch.randn(batch, 16, *latents, generator=draw), torch.full((batch,), 0.7)
    text = torch.randn(batch, sizes.text_len, sizes.text_dim, generator=draw)
    cond, args = {"text": text}, (x, t * 1000, text)
    if sizes.family == "hunyuan":
        pooled = torch.randn(batch, sizes.pooled_dim, generator=draw)
        guidance, mask = torch.full((batch,), 6.0), torch.ones(text.shape[:2], dtype=torch.long)
        cond |= {"pooled": pooled, "guidance": guidance}
        args = (*args, mask, pooled, guidance * 1000)
    calls = [(ours, lambda: ours(x, t, cond))]
    if diffusers_version():
        import diffusers
        config = transformer_config(sizes)
        theirs = getattr(diffusers, config.pop("_class_name"))(**config)
        theirs.load_state_dict(official_names(ours.state_dict(), "transformer", reverse=True))
        calls.append((theirs, lambda: theirs(*args, return_dict=False)[0]))
    if not backward:
        return [torch.no_grad()(call) for _, call in calls]
    return [lambda net=net, call=call: (call().square().mean().backward(), net.zero_grad())
            for net, call in calls]


def peer_vaes(family: str, way: str, frames: int) -> list[Call]:
    """Runs of our VAE and of diffusers' with the same weights that encode or decode noise."""
    ours = make_vae(family, small=True).eval()
    x = torch.randn(vae_shape(way, frames, *VIDEO_SIZE), generator=generator("peer"))
    runs = [lambda: getattr(ours, way)(x)]
    if diffusers_version():
        from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
        theirs = AutoencoderKLWan(base_dim=16) if family == "wan" else AutoencoderKLHunyuanVideo(
            block_out_channels=(16, 32, 64, 64), layers_per_block=2, norm_num_groups=8)
        theirs.load_state_dict(official_names(ours.state_dict(), "vae", reverse=True))
        theirs.eval()
        runs.append(lambda: theirs.encode(x).latent_dist.mode() if way == "encode"
                    else theirs.decode(x).sample)
    return [torch.no_grad()(run) for run in runs]
