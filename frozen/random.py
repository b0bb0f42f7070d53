"""Networks of noise, in the sizes of a config, for their speed where no files are."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from common.config import Shared
from common.ranks import Ranks, compute_dtype, generator, local_rows
from common.weights import LazyTensor, stream_safetensors
from frozen.image import CLIPVision, image_cond
from frozen.text import CLIPText, Llama, UMT5Encoder
from frozen.vae import HunyuanVAE, WanVAE
from model import build_dit, empty_dit, latent_shape, sizes_of


def random_network(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """What `make` builds, with its default initialisation, frozen, built where and as it runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(compute_dtype(device))
    try:
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def random_dit(cfg: Shared, device: torch.device, ranks: Ranks | None) -> nn.Module:
    """A DiT of noise, frozen, sharded if `ranks` is given: no more of it is ever on a device."""
    dit = empty_dit(cfg.preset, compute_dtype(device), ranks).requires_grad_(False)
    for p in dit.to_empty(device=device).parameters():
        local_rows(p)[0].normal_(std=0.02)
    return dit


def make_vae(cfg: Shared) -> WanVAE | HunyuanVAE:
    """A VAE of the released sizes; beside a DiT of few text channels a small one."""
    small = sizes_of(cfg.preset).text_dim < 1024
    if cfg.family == "wan":
        return WanVAE(**{"dim": 16, "num_res_blocks": 1} if small else {})
    return HunyuanVAE(**{"dims": (16, 32, 64, 64), "num_res_blocks": 1, "groups": 8}
                      if small else {})


def random_states(cfg: Shared) -> dict[str, Tensor]:
    """The conditioning of a full-length prompt without its encoders: noise of its shapes."""
    sizes, draw = sizes_of(cfg.preset), generator("cond", cfg.seed)
    shapes = {"text": (sizes.text_len, sizes.text_dim)}
    if sizes.takes_image:
        _, T, H, W = latent_shape(cfg.frames, cfg.height, cfg.width)
        shapes |= {"image": (sizes.image_len, sizes.image_dim), "frames": (20, T, H, W)}
    if cfg.family == "hunyuan":
        shapes["pooled"] = (sizes.pooled_dim,)
    cond = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return cond | ({"guidance": torch.tensor(cfg.embedded_guidance)} if cfg.family == "hunyuan"
                   else {})


def random_encoders(cfg: Shared) -> Iterator[tuple[str, Callable, Callable]]:
    """Each encoder of a prompt: its name, what makes it, and run(network) of a full-length prompt.

    They have the released sizes, or a DiT of few text channels' own. run gives a part of the cond,
    a dict, on the network's device.
    """
    sizes, small = sizes_of(cfg.preset), {}
    if sizes.text_dim < 1024:
        small = {"vocab_size": 256, "dim": sizes.text_dim, "dim_ffn": 64, "num_heads": 2,
                 "num_layers": 2}

    def tokens(length: int, network: nn.Module) -> Tensor:
        ids = torch.randint(256, (1, length), generator=generator("ids", cfg.seed))
        return ids.to(next(network.parameters()).device)

    def run_t5(t5: nn.Module) -> dict:
        ids = tokens(sizes.text_len, t5)
        return {"text": t5(ids, torch.ones_like(ids)).float()[0]}

    def run_vision(both: nn.ModuleDict) -> dict:
        image = torch.zeros(3, cfg.height, cfg.width, device=next(both.parameters()).device)
        return image_cond(image, both["vae"], both["clip"], cfg.frames, cfg.height, cfg.width)

    def run_llama(llama: nn.Module) -> dict:
        crop = 95  # of the template's tokens
        return {"text": llama(tokens(sizes.text_len + crop, llama))[:, crop:].float()[0]}

    def run_clip(clip: nn.Module) -> dict:
        return {"pooled": clip(tokens(77, clip))[1].float()[0]}

    if cfg.family == "wan":
        attn = {"dim_attn": sizes.text_dim} if small else {}
        yield "umT5", lambda: UMT5Encoder(**small, **attn), run_t5
        if sizes.takes_image:
            tower = {"dim": sizes.image_dim, "dim_ffn": 64, "num_layers": 2, "num_heads": 2,
                     "size": 48, "patch": 48 // math.isqrt(sizes.image_len - 1)}
            yield "first frame", lambda: nn.ModuleDict({
                "clip": CLIPVision(**tower if sizes.image_dim < 1024 else {}),
                "vae": make_vae(cfg)}), run_vision
        return
    yield "LLaMA", lambda: Llama(**small, **{"num_kv_heads": 2} if small else {}), run_llama
    yield ("CLIP text", lambda: CLIPText(**{**small, "dim": sizes.pooled_dim} if small else {}),
           run_clip)


def write_random_dit(cfg: Shared, path: Path, dtype: torch.dtype) -> int:
    """Write a DiT of noise as a safetensors file of official names; returns its bytes.

    Noise is drawn once and repeated: drawing 14 billion numbers would take minutes.
    """
    noise = torch.randn(1 << 20, generator=generator("dit", cfg.seed)).mul_(0.02).to(dtype)

    def tensor(shape: torch.Size) -> LazyTensor:
        count = shape.numel()
        return LazyTensor(tuple(shape), dtype, path, lambda rows=None: noise.repeat(
            -(-count // len(noise)))[:count].view(shape))

    with torch.device("meta"):
        dit = build_dit(cfg.preset)
    stream_safetensors(path, {name: tensor(p.shape) for name, p in dit.named_parameters()}, {})
    return path.stat().st_size
