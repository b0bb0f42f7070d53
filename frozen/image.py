"""Conditions of an image-to-video DiT: CLIP ViT-H · the first frame, alone and with its prompt.

Shapes: image [3, h, w] of any size, float in [-1, 1]; B images, L tokens, D width, N heads;
T H W latent frames, height and width.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.prompts import Prompt
from common.video import centre_crop, read_image
from common.weights import lazy_tensor, sample_blocks
from frozen.text import HunyuanText, TextEncoder
from frozen.vae import WanVAE

# -------------------------------------------------------------------------------------- CLIP ViT-H

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
    """The first 31 of 32 layers of CLIP ViT-H/14's image encoder, named as below `visual.`."""

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


# ------------------------------------------------------ the first frame, alone and with its prompt

@torch.no_grad()
def image_cond(image: Tensor, vae: WanVAE, clip: CLIPVision | None, frames: int, height: int,
               width: int) -> dict[str, Tensor]:
    """The part of a cond that a first frame adds: {"image" [257, D], "frames" [20, T, H, W]};
    without "image" if there is no clip, as in Wan 2.2.

    Args: image [3, h, w] in [-1, 1], of any size; the video's frames (4n + 1), height and width in
    pixels. "frames" consists of 4 mask channels (1 in the first latent frame) and the normalised
    latents of the image followed by grey frames. Source: Wan 2.1.
    """
    first = F.interpolate(image[None].float(), (height, width), mode="bicubic")
    video = torch.cat([first.unsqueeze(2), first.new_zeros(1, 3, frames - 1, height, width)], 2)
    latents = vae.encode(video)[0]                                               # 16 T H W
    mask = latents.new_zeros(4, *latents.shape[1:])
    mask[:, 0] = 1
    cond = {} if clip is None else {"image": clip(clip.pixels(image[None]))[0].float()}
    return {**cond, "frames": torch.cat([mask, latents])}


IDENTITY_TEXT = "A Red ü"


class Conditioner:
    """Prompts to the cond of a DiT: text states and, for image-to-video, those of a first frame.

    Args: text, the text encoders; vae, only for image-to-video; clip, for Wan 2.1's; frames of the
    video, 4n + 1; crop, whether images are cropped to the video's shape or scaled, which suits a
    shape that artifacts.videos.fit_size chose.
    """

    def __init__(self, text: TextEncoder | HunyuanText, vae: WanVAE | None,
                 clip: CLIPVision | None, frames: int, crop: bool):
        self.text, self.vae, self.clip, self.frames, self.crop = text, vae, clip, frames, crop

    def identity(self) -> str:
        """A hash over the encoders' weights in bf16, sampled as in common.names.fingerprint, and
        over the token ids of a text. It does not depend on the layout of the files, the device or
        the compute dtype."""
        digest = hashlib.sha256(self.text.token_ids(IDENTITY_TEXT).numpy().tobytes())
        networks = [n for n in vars(self.text).values() if isinstance(n, nn.Module)]
        for network in filter(None, (*networks, self.vae, self.clip)):
            for name, value in sorted(network.state_dict().items()):
                digest.update(f"{name}{list(value.shape)}".encode())
                blocks = sample_blocks(lazy_tensor(value, Path())).cpu().bfloat16()
                digest.update(blocks.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:32]

    def encode_each(self, prompts: list[Prompt], height: int, width: int,
                    lap: Callable[[str], object] = lambda name: None) -> list[dict]:
        """The cond of each prompt for a video of height × width; equal prompts share one object.

        lap("text") and lap("image") are called after each part. Raises as the encoders and
        read_image do.
        """
        unique = list(dict.fromkeys(prompts))
        conds = self.text.encode_each([prompt.text for prompt in unique])
        lap("text")
        for prompt, cond in zip(unique, conds, strict=True):
            if self.vae is not None:
                image = read_image(prompt.image)
                if self.crop:
                    image = centre_crop(image, height, width)
                cond |= self.encode_image(image, height, width)
                lap("image")
        cond_of = dict(zip(unique, conds, strict=True))
        return [cond_of[prompt] for prompt in prompts]

    def encode_image(self, image: Tensor, height: int, width: int) -> dict[str, Tensor]:
        """image_cond of a first frame [3, h, w]."""
        image = image.to(next(self.vae.parameters()).device)
        return image_cond(image, self.vae, self.clip, self.frames, height, width)

    def with_text(self, text: str, conds: list[dict]) -> list[dict]:
        """The conds with another text: a negative prompt keeps the image."""
        other = self.text.encode_each([text])[0]
        return [{**cond, **other} for cond in conds]
