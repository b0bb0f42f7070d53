"""Encoders and VAEs of noise, for their speed where no files are."""

import math
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from common.config import Shared
from common.ranks import Timer, compute_dtype, generator
from frozen.image import CLIPVision, image_cond
from frozen.text import CLIPText, Llama, UMT5Encoder
from frozen.vae import WanVAE
from model import sizes_of


def random_network(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """What `make` builds, with its default initialisation, frozen, built where and as it runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(compute_dtype(device))
    try:
        with torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def random_cond(cfg: Shared, device: torch.device, timer: Timer) -> dict:
    """The conditioning of a full-length prompt of random tokens, by text encoders of noise.

    They have the released sizes, or a DiT of few text channels' own.
    """
    sizes, small = sizes_of(cfg.preset), {}
    if sizes.text_dim < 1024:
        small = {"vocab_size": 256, "dim": sizes.text_dim, "dim_ffn": 64, "num_heads": 2,
                 "num_layers": 2}

    def timed(make: Callable[[], nn.Module], length: int, run: Callable) -> Tensor:
        network = random_network(make, device)
        ids = torch.randint(256, (1, length), generator=generator("ids", cfg.seed)).to(device)
        timer.lap("load")
        with torch.no_grad():
            out = run(network, ids).float()[0]
        timer.lap("text")
        return out

    if cfg.family == "wan":
        attn = {"dim_attn": sizes.text_dim} if small else {}
        text = timed(lambda: UMT5Encoder(**small, **attn), sizes.text_len,
                     lambda t5, ids: t5(ids, torch.ones_like(ids)))
        if not sizes.takes_image:
            return {"text": text}
        small = {"dim": sizes.image_dim, "dim_ffn": 64, "num_layers": 2, "num_heads": 2,
                 "size": 48, "patch": 48 // math.isqrt(sizes.image_len - 1)}
        clip = random_network(lambda: CLIPVision(**small if sizes.image_dim < 1024 else {}), device)
        vae = random_network(WanVAE, device)
        image = torch.rand(3, cfg.height, cfg.width, device=device) * 2 - 1
        timer.lap("load")
        cond = {"text": text, **image_cond(image, vae, clip, cfg.frames, cfg.height, cfg.width)}
        timer.lap("image")
        return cond
    kv = {"num_kv_heads": 2} if small else {}
    clip = {**small, "dim": sizes.pooled_dim} if small else {}
    crop = 95  # of the template's tokens
    return {"text": timed(lambda: Llama(**small, **kv), sizes.text_len + crop,
                          lambda llm, ids: llm(ids)[:, crop:]),
            "pooled": timed(lambda: CLIPText(**clip), 77, lambda clip, ids: clip(ids)[1]),
            "guidance": torch.tensor(cfg.embedded_guidance, device=device)}
