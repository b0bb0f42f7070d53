"""Networks of noise, in the sizes of a config, for their speed where no files are."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from common.config import Shared
from common.names import official_names
from common.ranks import Ranks, compute_dtype, generator, local_rows
from common.weights import LazyTensor, stream_safetensors
from frozen.image import CLIPVision, image_cond
from frozen.text import CLIPText, Llama, UMT5Encoder
from frozen.vae import HunyuanVAE, WanVAE
from model import HunyuanConfig, WanConfig, build_dit, empty_dit, latent_shape, sizes_of
from tools.timing import Run



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
