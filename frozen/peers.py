"""Small networks of both families beside diffusers' own, with the same weights and inputs: what
bench.py times by turns. diffusers is imported only when one of its networks is made.
"""

import importlib.util

import torch
import torch.nn as nn

from common.measure import Run
from common.names import official_names
from common.ranks import generator
from frozen.vae import HunyuanVAE, WanVAE
from model import HunyuanConfig, WanConfig, build_dit, latent_shape

VIDEO_SIZE = (64, 64)  # height, width of what the VAEs are given


def has_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def peer_sizes(family: str, dim: int, heads: int, layers: int) -> WanConfig | HunyuanConfig:
    """Sizes of a small DiT of a family."""
    if family == "wan":
        return WanConfig(dim=dim, ffn_dim=4 * dim, num_heads=heads, num_layers=layers,
                         text_dim=64, text_len=16)
    pairs = dim // heads // 2
    rope = (2 * (pairs - 2 * (pairs // 3)), 2 * (pairs // 3), 2 * (pairs // 3))
    return HunyuanConfig(dim=dim, ffn_dim=4 * dim, num_heads=heads, num_double=layers // 2,
                         num_single=layers // 2, text_dim=64, text_len=16, pooled_dim=32,
                         rope_dims=rope)


def diffusers_dit(sizes: WanConfig | HunyuanConfig) -> nn.Module:
    """diffusers' own DiT of these sizes."""
    from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
    common = {"in_channels": 16, "out_channels": 16, "num_attention_heads": sizes.num_heads,
              "attention_head_dim": sizes.dim // sizes.num_heads}
    if sizes.family == "wan":
        return WanTransformer3DModel(
            **common, text_dim=sizes.text_dim, freq_dim=sizes.freq_dim, ffn_dim=sizes.ffn_dim,
            num_layers=sizes.num_layers, cross_attn_norm=True, eps=sizes.eps,
            qk_norm="rms_norm_across_heads")
    return HunyuanVideoTransformer3DModel(
        **common, num_layers=sizes.num_double, num_single_layers=sizes.num_single,
        num_refiner_layers=sizes.num_refiner, mlp_ratio=4.0, patch_size=2, patch_size_t=1,
        qk_norm="rms_norm", guidance_embeds=True, text_embed_dim=sizes.text_dim,
        pooled_projection_dim=sizes.pooled_dim, rope_theta=256.0, rope_axes_dim=sizes.rope_dims)


def peer_dits(sizes: WanConfig | HunyuanConfig, batch: int, latents: tuple[int, int, int],
              learn: bool) -> list[Run]:
    """A DiT of ours and of diffusers with the same weights and inputs; with `learn`, forward and
    backward to all weights."""
    draw = generator("peer")
    ours = build_dit(sizes)
    ours.init_weights(draw)
    x, t = torch.randn(batch, 16, *latents, generator=draw), torch.full((batch,), 0.7)
    text = torch.randn(batch, sizes.text_len, sizes.text_dim, generator=draw)
    cond, args = {"text": text}, (x, t * 1000, text)
    if sizes.family == "hunyuan":
        pooled = torch.randn(batch, sizes.pooled_dim, generator=draw)
        guidance, mask = torch.full((batch,), 6.0), torch.ones(text.shape[:2], dtype=torch.long)
        cond |= {"pooled": pooled, "guidance": guidance}
        args = (*args, mask, pooled, guidance * 1000)
    calls = [(ours, lambda: ours(x, t, cond))]
    if has_diffusers():
        theirs = diffusers_dit(sizes)
        theirs.load_state_dict(official_names(ours.state_dict(), "transformer", reverse=True))
        calls.append((theirs, lambda: theirs(*args, return_dict=False)[0]))
    if not learn:
        return [torch.no_grad()(call) for _, call in calls]
    return [lambda net=net, call=call: (call().square().mean().backward(), net.zero_grad())
            for net, call in calls]


def small_vae(family: str) -> WanVAE | HunyuanVAE:
    return WanVAE(dim=16) if family == "wan" else HunyuanVAE((16, 32, 64, 64), 16, 2, 8)


def peer_vaes(family: str, way: str, frames: int) -> list[Run]:
    """A VAE of ours and of diffusers that encode or decode a video of noise."""
    ours, draw = small_vae(family).eval(), generator("peer")
    video = torch.rand(1, 3, frames, *VIDEO_SIZE, generator=draw) * 2 - 1
    latents = torch.randn(1, *latent_shape(frames, *VIDEO_SIZE), generator=draw)
    runs = [lambda: ours.encode(video) if way == "encode" else ours.decode(latents)]
    if has_diffusers():
        from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
        theirs = AutoencoderKLWan(base_dim=16) if family == "wan" else AutoencoderKLHunyuanVideo(
            block_out_channels=(16, 32, 64, 64), layers_per_block=2, norm_num_groups=8)
        theirs.load_state_dict(official_names(ours.state_dict(), "vae", reverse=True))
        theirs.eval()
        runs.append(lambda: theirs.encode(video).latent_dist.mode() if way == "encode"
                    else theirs.decode(latents).sample)
    return [torch.no_grad()(run) for run in runs]
