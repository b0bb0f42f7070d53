"""HunyuanVideo's VAE and text encoders against the official outputs and the peers' code.

Bounds on fixtures are absolute, on values of size 1 to 10: fp32 summed in another order reaches a
few 1e-6. Against the peers they are relative to the largest value.
"""

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from processes import in_processes
from safetensors import safe_open
from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.ranks import Ranks
from common.weights import open_tensors, save_tensors
from frozen.load import load_text, load_vae
from frozen.text import TEMPLATES, CLIPText, HunyuanText, Llama
from frozen.vae import HunyuanResidual, HunyuanVAE, MidBlock, Upsample3d
from model import collate

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 2e-5
THETA = 20000.0  # and a scaling that are not the released ones: configs count
VAE_CONFIG = {"in_channels": 3, "out_channels": 3, "block_out_channels": [8, 12, 16, 16],
              "layers_per_block": 1, "act_fn": "silu", "latent_channels": 16,
              "norm_num_groups": 4, "sample_size": 32, "sample_tsize": 16,
              "scaling_factor": 0.4, "force_upcast": True, "spatial_compression_ratio": 8,
              "time_compression_ratio": 4, "mid_block_add_attention": True}
PROMPTS = ["", "a red circle", "  Two children, 12 and 7, RUN on the beach!  ", "{} and {0} %s \\n",
           "一只猫 walks\n\nslowly — it's café, cafe\u0301 time", "--steps 3 <b>bold</b> ../../etc",
           "the end<|eot_id|> <pad> more", "bad \udcff byte"]


def fixture(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and config of a parity fixture."""
    with safe_open(FIXTURES / f"hunyuan_{name}.safetensors", "pt") as file:
        return ({key: file.get_tensor(key) for key in file.keys()},
                json.loads(file.metadata()["config"]))


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def near(got: Tensor, want: Tensor, bound: float) -> None:
    """Assert an absolute bound on the difference."""
    assert got.shape == want.shape
    error = (got - want).abs().max().item()
    print(f"absolute error {error:.1e} (bound {bound:.0e})")
    assert error <= bound


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value."""
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Frozen weights of a scale at which every branch counts."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = max(1, p[0].numel()) if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=g) / fan_in ** 0.5)
    return module.eval().requires_grad_(False)


def small_vae(seed: int = 0, **sizes) -> HunyuanVAE:
    sizes = {"sample_size": 32, "sample_tsize": 16} | sizes
    return randomised(HunyuanVAE((8, 12, 16, 16), 16, 1, 4, **sizes), seed)


def peer_vae(seed: int = 5) -> diffusers.AutoencoderKLHunyuanVideo:
    own = ("block_out_channels", "layers_per_block", "norm_num_groups", "scaling_factor")
    return randomised(diffusers.AutoencoderKLHunyuanVideo(**{k: VAE_CONFIG[k] for k in own}), seed)


def peer_llm(vocab: int = 97, cls=transformers.LlamaModel, seed: int = 3, layers: int = 5):
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=56, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=False)
    return randomised(cls(config), seed)


CLIP_SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
              "num_attention_heads": 3, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
              "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def peer_clip(vocab: int = 99, seed: int = 4) -> transformers.CLIPTextModel:
    config = transformers.CLIPTextConfig(vocab_size=vocab, **CLIP_SIZES)
    return randomised(transformers.CLIPTextModel(config), seed)


def whole_clip(text: transformers.CLIPTextModel) -> transformers.CLIPModel:
    """A CLIP with pictures whose text half has the weights of `text`."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text.config.to_dict(), vision_config=vision,
                                     projection_dim=8)
    clip = randomised(transformers.CLIPModel(config), seed=9)
    own = {k.removeprefix("text_model."): v for k, v in text.state_dict().items()}
    clip.text_model.load_state_dict({k: own[k.removeprefix("text_model.")]
                                     for k in clip.text_model.state_dict()})
    return clip


# ------------------------------------------------------------------------------- tokenizer files

def make_llm_tokenizer(folder: Path, begin: bool = True) -> Tokenizer:
    """Writes a tokenizer.json that cuts like LLaMA-3's and knows every word of the templates."""
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
             r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in [*names, "<pad>"]]
    trainer = trainers.BpeTrainer(
        vocab_size=5000, min_frequency=1, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = [template for _, template in TEMPLATES.values()]
    for name in names:
        text = [piece for whole in text for piece in whole.split(name)]
    fast.train_from_iterator([*text, "a red circle moves left"], trainer)
    fast.add_special_tokens(special)
    if begin:
        fast.post_processor = processors.TemplateProcessing(
            f"{names[0]} $A", None, [(names[0], fast.token_to_id(names[0]))])
    fast.enable_padding(pad_id=fast.token_to_id("<pad>"), pad_token="<pad>", length=400)
    fast.enable_truncation(5)  # what a file says of padding and length must not count
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    return fast


def make_clip_tokenizer(folder: Path) -> transformers.CLIPTokenizerFast:
    """Writes vocab.json and merges.txt in CLIP's form; returns transformers' tokenizer of them."""
    fast = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.train_from_iterator(["a red circle moves left, the children run on the beach"] * 3,
                             trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                                 end_of_word_suffix="</w>"))
    merges = [tuple(pair) for pair in json.loads(fast.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return transformers.CLIPTokenizerFast(vocab=json.loads((folder / "vocab.json").read_text()),
                                          merges=merges)


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory):
    """Folders llm, clip (tokenizer.json), clip_old (vocab.json, merges.txt); transformers' CLIP."""
    root = tmp_path_factory.mktemp("tokenizers")
    make_llm_tokenizer(root / "llm")
    peer = make_clip_tokenizer(root / "clip_old")
    peer.save_pretrained(root / "saved")
    (root / "clip").mkdir()
    shutil.copy(root / "saved/tokenizer.json", root / "clip")
    return root, peer


def llm_rows(root: Path) -> int:
    return Tokenizer.from_file(str(root / "llm/tokenizer.json")).get_vocab_size()


@pytest.fixture(scope="module")
def peers(tokenizer_folders):
    """LlamaForCausalLM and CLIPTextModel with the vocabularies of the tokenizers."""
    root, peer = tokenizer_folders
    return (peer_llm(llm_rows(root), transformers.LlamaForCausalLM), peer_clip(len(peer)))


def ours_of(llm: nn.Module, clip: nn.Module) -> tuple[Llama, CLIPText]:
    """Our encoders with the weights of transformers' LlamaForCausalLM and CLIPTextModel."""
    ours = Llama(llm.config.vocab_size, 32, 56, 3, 4, 2, THETA).eval().requires_grad_(False)
    theirs = part(llm.state_dict(), "model.")
    ours.load_state_dict({name: theirs[name] for name in ours.state_dict()})
    text = CLIPText(clip.config.vocab_size, 24, 40, 2, 3).eval().requires_grad_(False)
    text.load_state_dict({name.removeprefix("text_model."): t
                          for name, t in clip.state_dict().items()})
    return ours, text


@pytest.fixture(scope="module")
def text(peers, tokenizer_folders) -> HunyuanText:
    root, _ = tokenizer_folders
    return HunyuanText(*ours_of(*peers), root / "llm", root / "clip")


# ------------------------------------------------------------------------------------- the VAE

@pytest.fixture(scope="module")
def official_vae():
    """The fixture's VAE with its official weights, and its tensors."""
    tensors, c = fixture("vae")
    vae = HunyuanVAE(c["block_out_channels"], c["latent_channels"], c["layers_per_block"],
                     c["norm_num_groups"], c["scaling_factor"], c["sample_size"], c["sample_tsize"])
    vae.load_state_dict(part(tensors, "weight."))
    return vae.eval().requires_grad_(False), tensors


@pytest.mark.parametrize("given,name", [("video", "encode"), ("image", "encode_image")])
def test_moments_equal_the_official_ones(official_vae, given, name):
    vae, tensors = official_vae
    mean, logvar = vae.moments(tensors[f"in.{given}"])
    near(mean, tensors[f"out.{name}_mean"], 1e-5)
    near(logvar, tensors[f"out.{name}_logvar"], 1e-5)


@pytest.mark.parametrize("given,name", [("latent", "decode"), ("latent_image", "decode_image")])
def test_reconstruction_equals_the_official_one(official_vae, given, name):
    vae, tensors = official_vae
    near(vae.reconstruct(tensors[f"in.{given}"]), tensors[f"out.{name}"], 1e-5)


def test_mid_block_and_its_attention_equal_the_official_ones(official_vae, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # the official kernel
    vae, tensors = official_vae
    seen, block = [], vae.decoder.mid_block
    hooks = [block.resnets[1].register_forward_hook(lambda _m, x, y: seen.extend([*x, y]))]
    vae.reconstruct(tensors["in.latent"])
    hooks[0].remove()
    tokens = seen[0].flatten(2).transpose(1, 2)
    near(tokens, tensors["out.decoder_mid_attn_tokens"], 1e-5)
    near(seen[1], tensors["out.decoder_mid"], 1e-5)


def test_tiled_decode_equals_the_official_one_in_space_and_time(official_vae):
    vae, tensors = official_vae
    raw = tensors["in.latent_tiled"]
    near(vae.by_tiles(vae.reconstruct, raw, decode=True), tensors["out.decode_tiled"], 1e-5)
    near(vae.by_tiles(vae.reconstruct, raw[:, :, :2], decode=True),
         tensors["out.decode_tiled_spatial_only"], 1e-5)
    near(vae.decode(raw * vae.scaling), tensors["out.decode_tiled"].clamp(-1, 1), 1e-5)
    assert error(vae.reconstruct(raw), tensors["out.decode_tiled"]) > 0.01  # tiles do count


def test_tiled_encode_equals_the_official_one(official_vae):
    vae, tensors = official_vae
    video = tensors["out.decode_tiled"]
    near(vae.encode(video) / vae.scaling, tensors["out.encode_tiled_mean"], 1e-5)
    near(vae.by_tiles(lambda x: vae.moments(x)[1], video), tensors["out.encode_tiled_logvar"], 1e-5)


def test_encode_and_decode_of_one_tile_are_scaled_moments_and_clamped_reconstruction():
    vae, video, raw = small_vae(), normal(2, 3, 13, 24, 32), normal(2, 16, 4, 3, 4)
    assert error(vae.encode(video), 0.476986 * vae.moments(video)[0]) < 1e-6
    assert error(vae.decode(raw), vae.reconstruct(raw / 0.476986).clamp(-1, 1)) < 1e-6
    assert vae.decode(raw).abs().max() == 1


def join(tiles: list[Tensor], dim: int, overlap: int, keep: list[int]) -> Tensor:
    """The official order in one dimension: fade the tile before into each, cut it, concatenate."""
    for a, b in zip(tiles, tiles[1:], strict=False):
        e = min(a.shape[dim], b.shape[dim], overlap)
        for y in range(e):
            new = (a.select(dim, a.shape[dim] - e + y) * (1 - y / e)
                   + b.select(dim, y) * (y / e))
            b.select(dim, y).copy_(new)
    return torch.cat([t.narrow(dim, 0, min(n, t.shape[dim]))
                      for t, n in zip(tiles, keep, strict=True)], dim)


def spatial_reference(net, x: Tensor, tile: int, out_tile: int) -> Tensor:
    """Spatial tiles as the release has them: a row-major grid, all of it kept until the end."""
    if max(x.shape[3:]) <= tile:
        return net(x)
    step, blend, keep = int(tile * 0.75), int(out_tile * 0.25), out_tile - int(out_tile * 0.25)
    rows = [[net(x[..., i:i + tile, j:j + tile]) for j in range(0, x.shape[4], step)]
            for i in range(0, x.shape[3], step)]

    def fade(a: Tensor, b: Tensor, dim: int) -> None:
        join([a, b], dim, blend, [1, 1])  # b is changed in place

    for i, row in enumerate(rows):
        for j, tile_ in enumerate(row):
            if i:
                fade(rows[i - 1][j], tile_, 3)
            if j:
                fade(row[j - 1], tile_, 4)
    return torch.cat([torch.cat([t[..., :keep, :keep] for t in row], 4) for row in rows], 3)


def tiled_reference(net, x: Tensor, size: int, tsize: int, decode: bool) -> Tensor:
    """Temporal tiles around spatial ones as the release has them, in pixels or in latents."""
    tile, out_tile = (size // 8, size) if decode else (size, size // 8)
    time, out_time = (tsize // 4, tsize) if decode else (tsize, tsize // 4)
    if x.shape[2] <= time:
        return spatial_reference(net, x, tile, out_tile)
    tiles = []
    for i in range(0, x.shape[2], int(time * 0.75)):
        y = spatial_reference(net, x[:, :, i:i + time + 1], tile, out_tile)
        tiles.append(y[:, :, 1:] if i else y)
    keep = out_time - int(out_time * 0.25)
    return join(tiles, 2, int(out_time * 0.25), [keep + 1] + [keep] * (len(tiles) - 1))


def toy_decoder(z: Tensor) -> Tensor:
    """[B, 16, T, H, W] -> [B, 3, 4T - 3, 8H, 8W], which depends on the whole tile."""
    x = z[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)
    x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(4, 2)], 2)
    t, h, w = (torch.linspace(0, 1, n) for n in x.shape[2:])
    return x + t[:, None, None] + h[:, None] + 2 * w + z.mean()


def toy_encoder(x: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> [B, 16, (T + 3) / 4, H/8, W/8], which depends on the whole tile."""
    z = x[:, :, ::4, ::8, ::8].repeat(1, 6, 1, 1, 1)[:, :16]
    t, h, w = (torch.linspace(0, 1, n) for n in z.shape[2:])
    return z + t[:, None, None] + h[:, None] + 2 * w + x.mean()


# Latent sizes about the tile's (16 frames, 32 x 32) and about a step's end (12, 24 x 24).
@pytest.mark.parametrize("T,H,W", [
    (1, 33, 1), (16, 24, 25), (17, 3, 3), (18, 32, 33), (24, 2, 32), (25, 1, 49), (26, 34, 2),
    (2, 48, 73), (37, 2, 2), (5, 32, 32)])
def test_tiles_of_the_released_size_are_the_release_s_whatever_the_size_of_the_clip(T, H, W):
    with torch.device("meta"):
        vae = HunyuanVAE()
    z = normal(1, 16, T, H, W)
    got = vae.by_tiles(toy_decoder, z, decode=True)
    assert got.shape == (1, 3, 4 * T - 3, 8 * H, 8 * W)
    near(got, tiled_reference(toy_decoder, z, 256, 64, True), 1e-5)
    video = normal(1, 3, 4 * T - 3, 8 * H, 8 * W)
    near(vae.by_tiles(toy_encoder, video), tiled_reference(toy_encoder, video, 256, 64, False),
         1e-5)


@pytest.mark.parametrize("dims", [1, 2])
def test_attention_is_causal_by_frames_and_full_inside_one(dims):
    block = randomised(MidBlock(8, 4)).double()
    seen, x = [], normal(dims, 8, 4, 3, 2).double()
    block.resnets[0].register_forward_hook(lambda _m, _x, y: seen.append(y))
    block.resnets[1].register_forward_hook(lambda _m, x, _y: seen.append(x[0]))
    block(x)
    before, after = seen
    a = block.attentions[0]
    y = F.group_norm(before, 4, a["group_norm"].weight, a["group_norm"].bias, 1e-6)
    y = y.flatten(2).transpose(1, 2)
    logits = a["to_q"](y) @ a["to_k"](y).transpose(1, 2) / 8 ** 0.5
    frame = torch.arange(4 * 3 * 2) // 6
    logits = logits.masked_fill(frame[:, None] < frame, -torch.inf)
    y = a["to_out"](logits.softmax(-1) @ a["to_v"](y))
    want = before + y.transpose(1, 2).unflatten(2, (4, 3, 2))
    assert error(after, want) < 1e-12


class Live(TorchDispatchMode):
    """Bytes alive of what is made inside: the most at any time, and the largest tensors."""

    def __enter__(self):
        self.alive, self.peak, self.sizes = {}, 0, set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.sizes.add(storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def measured(call, *args) -> tuple[int, list[int], Tensor]:
    """Peak bytes alive, sizes of storages from the largest on, and the result."""
    with Live() as live:
        out = call(*args)
    return live.peak, sorted(live.sizes, reverse=True), out


@pytest.mark.parametrize("T,H,W", [(6, 6, 6), (15, 6, 6), (6, 20, 6), (6, 6, 20), (9, 10, 13)])
def test_memory_of_tiled_decode_is_the_output_a_tile_and_a_row_of_edges(T, H, W):
    vae = small_vae()
    one, largest, tile = measured(vae.reconstruct, normal(1, 16, 5, 4, 4))
    peak, sizes, video = measured(vae.decode, normal(1, 16, T, H, W))
    assert max(size for size in sizes if size != video.nbytes) == largest[0]  # that of a tile
    edges = 3 * 17 * 8 * 32 * 4 * (len(range(0, W, 3)) + 1)  # below each column, and to the left
    assert peak <= video.nbytes + one + 3 * tile.nbytes + edges
    assert peak >= video.nbytes + one


def tiles_of_three(ranks: Ranks, folder: Path) -> None:
    """One of three ranks that share the tiles of an encoding and a decoding."""
    vae, video, latents = (torch.load(folder / f"{name}.pt", weights_only=name != "vae")
                           for name in ("vae", "video", "latents"))
    vae.group, calls, real = dist.group.WORLD, [], vae.reconstruct
    vae.reconstruct = lambda z: (calls.append(1), real(z))[1]
    torch.save({"video": vae.decode(latents), "latents": vae.encode(video), "calls": len(calls)},
               folder / f"out{ranks.rank}.pt")
    dist.barrier()


def test_ranks_share_the_tiles_and_each_gets_the_bits_of_one(tmp_path):
    vae = HunyuanVAE(dims=(8, 8, 16, 16), groups=4, sample_size=32, sample_tsize=16).eval()
    video, latents = normal(1, 3, 21, 56, 40).clamp(-1, 1), normal(1, 16, 6, 7, 5)
    for name, value in (("vae", vae), ("video", video), ("latents", latents)):
        torch.save(value, tmp_path / f"{name}.pt")
    calls, real = [], vae.reconstruct
    vae.reconstruct = lambda z: (calls.append(1), real(z))[1]
    with torch.no_grad():
        want = {"video": vae.decode(latents), "latents": vae.encode(video)}
    in_processes(3, tiles_of_three, tmp_path)
    got = [torch.load(tmp_path / f"out{rank}.pt", weights_only=True) for rank in range(3)]
    for found in got:
        assert all(torch.equal(found[name], want[name]) for name in want)
    assert len(calls) > 6 and sum(found["calls"] for found in got) == len(calls)
    assert max(found["calls"] for found in got) == -(-len(calls) // 3)


def test_memory_of_tiled_encode_is_the_latents_and_a_tile():
    vae = small_vae()
    one, largest, mean = measured(lambda x: vae.moments(x)[0], normal(1, 3, 17, 32, 32))
    video = normal(1, 3, 57, 112, 64)  # its storage is seen, through the slices
    peak, sizes, latents = measured(vae.encode, video)
    assert max(size for size in sizes if size != video.nbytes) == largest[0]
    assert peak <= video.nbytes + one + latents.nbytes + 20 * mean.nbytes


def test_attention_makes_no_tensor_of_all_queries_by_all_keys():
    block = randomised(MidBlock(8, 4))
    tokens = 6 * 8 * 8
    _, sizes, _ = measured(block, normal(1, 8, 6, 8, 8))
    assert sizes[0] < tokens ** 2


@pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_vae_in_half_precision_is_finite_fp32_at_its_ends_and_near_fp32(dtype, bound):
    video, latents = normal(1, 3, 21, 40, 40).clamp(-1, 1), 0.5 * normal(1, 16, 6, 5, 5)
    vae, low = small_vae(), small_vae().to(dtype)
    for got, want in ((low.encode(video), vae.encode(video)),
                      (low.decode(latents), vae.decode(latents))):
        assert got.dtype == torch.float32 and torch.isfinite(got).all()
        assert (got - want).square().mean().sqrt() < bound * want.square().mean().sqrt() * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_norms_are_fp32_in_half_precision(dtype):
    # A mean of 30 and a deviation of 1: in half precision sums of squares would lose it, or be inf.
    norm = HunyuanResidual(8, 8, 4).norm1.to(dtype).requires_grad_(False)
    x = (30 + normal(1, 8, 9, 32, 32)).to(dtype)
    got, want = norm(x).float(), F.group_norm(x.float(), 4, eps=1e-6)
    assert (got - want).abs().max() < 0.02 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_enlarging_copies_and_leaves_the_first_frame_single(dtype):
    layer = Upsample3d(4, temporal=True)
    layer.conv = nn.Identity()
    x = normal(1, 4, 3, 2, 2).to(dtype)
    y = layer(x)
    assert y.shape == (1, 4, 5, 4, 4) and y.dtype == dtype
    for t, source in enumerate((0, 1, 1, 2, 2)):
        assert torch.equal(y[:, :, t, 1::2, ::2], x[:, :, source])
    assert layer(x[:, :, :1]).shape[2] == 1


def test_moments_and_reconstruct_are_differentiable_to_every_parameter():
    vae = small_vae().requires_grad_(True)
    mean, logvar = vae.moments(normal(1, 3, 5, 16, 16))
    (vae.reconstruct(mean).square().mean() + logvar.square().mean()).backward()
    silent = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert not vae.decode(normal(1, 16, 2, 2, 2)).requires_grad


@pytest.mark.parametrize("shape,words", [
    ((1, 3, 4, 16, 16), ["4n + 1", "got [1, 3, 4, 16, 16]"]),
    ((1, 3, 130, 16, 16), ["got [1, 3, 130, 16, 16]"]),
    ((1, 3, 5, 20, 16), ["8h, 8w", "got [1, 3, 5, 20, 16]"]),
    ((1, 3, 5, 16, 0), ["got [1, 3, 5, 16, 0]"]),
    ((1, 4, 5, 16, 16), ["got [1, 4, 5, 16, 16]", "[B, 3, 4n + 1"])])
def test_encode_names_what_is_wrong_with_a_video(shape, words):
    with torch.device("meta"):
        vae = HunyuanVAE()
    with pytest.raises(ValueError) as caught:
        vae.encode(torch.zeros(shape))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("sizes", [{"sample_size": 40}, {"sample_tsize": 8}, {"sample_size": 0},
                                   {"dims": (8, 8, 8)}])
def test_a_vae_of_impossible_sizes_is_an_error(sizes):
    with pytest.raises(ValueError, match="expected 4 widths, multiples of 32 and of 16"):
        HunyuanVAE(**{"dims": (32,) * 4, "num_res_blocks": 1, **sizes})


def assert_same_vae(vae: HunyuanVAE, peer: diffusers.AutoencoderKLHunyuanVideo) -> None:
    """Without tiles: the peer's have other sizes."""
    video, z = normal(2, 3, 9, 24, 40), normal(2, 16, 3, 3, 5)
    theirs = peer.encode(video).latent_dist
    mean, logvar = vae.moments(video)
    assert error(mean, theirs.mean) < TOLERANCE and error(logvar, theirs.logvar) < TOLERANCE
    assert error(vae.reconstruct(z), peer.decode(z).sample) < TOLERANCE


def test_vae_equals_diffusers_with_our_weights_in_it():
    vae, peer = small_vae(), peer_vae()
    peer.load_state_dict(vae.state_dict())
    assert_same_vae(vae, peer)


def test_vae_equals_diffusers_with_its_weights_in_ours():
    vae, peer = small_vae(), peer_vae()
    vae.load_state_dict(peer.state_dict())
    assert_same_vae(vae, peer)


# ------------------------------------------------------------------------------ LLaMA-3 and CLIP

def test_llm_equals_the_official_states_on_valid_rows():
    tensors, c = fixture("llm")
    llm = Llama(c["vocab_size"], c["hidden_size"], c["intermediate_size"],
                c["num_hidden_layers"] - 2, c["num_attention_heads"], c["num_key_value_heads"],
                c["rope_theta"], c["rms_norm_eps"])
    weights = part(tensors, "weight.model.")
    llm.load_state_dict({name: weights[name] for name in llm.state_dict()})
    want, mask = tensors["out.hidden_state"], tensors["out.attention_mask"].bool()
    crop = tensors["in.input_ids"].shape[1] - mask.shape[1]
    with torch.no_grad():
        near(llm(tensors["in.input_ids"])[:, crop:][mask], want[mask], 5e-5)
        for i, valid in enumerate(tensors["in.attention_mask"].sum(1)):  # and without any padding
            alone = llm(tensors["in.input_ids"][i:i + 1, :valid])[0, crop:]
            near(alone, want[i, :valid - crop], 5e-5)


def test_clip_equals_the_official_states_and_pooled_output():
    tensors, c = fixture("clip")
    clip = CLIPText(c["vocab_size"], c["hidden_size"], c["intermediate_size"],
                    c["num_hidden_layers"], c["num_attention_heads"], c["max_position_embeddings"])
    clip.load_state_dict(part(tensors, "weight.text_model."))
    mask = tensors["in.attention_mask"].bool()
    with torch.no_grad():
        states, pooled = clip(tensors["in.input_ids"])
        near(states[mask], tensors["out.last_hidden_state"][mask], 1e-5)
        near(pooled, tensors["out.pooler_output"], 1e-5)
        for i, valid in enumerate(mask.sum(1)):
            near(clip(tensors["in.input_ids"][i:i + 1, :valid])[1],
                 tensors["out.pooler_output"][i:i + 1], 1e-5)


def assert_same_llm(llm: Llama, peer: transformers.LlamaModel) -> None:
    ids = torch.randint(97, (2, 351), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(351) < torch.tensor([[351], [120]])).long()
    theirs = peer(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
    assert error(llm(ids)[mask.bool()], theirs[mask.bool()]) < TOLERANCE


def test_llm_equals_transformers_with_weights_carried_both_ways():
    peer, llm = peer_llm(), randomised(Llama(97, 32, 56, 3, 4, 2, THETA), seed=8)
    _, extra = peer.load_state_dict(llm.state_dict(), strict=False)
    assert not extra
    assert_same_llm(llm, peer)
    peer, theirs = peer_llm(seed=11), peer_llm(seed=11).state_dict()
    llm.load_state_dict({name: theirs[name] for name in llm.state_dict()})
    assert_same_llm(llm, peer)


def assert_same_clip(clip: CLIPText, peer: transformers.CLIPTextModel) -> None:
    ids = torch.randint(97, (3, 77), generator=torch.Generator().manual_seed(0))
    ids[0, -1] = ids[1, 20:] = ids[2, 5] = ids[2, 9:] = 98  # the end token, once before the end
    mask = (torch.arange(77) < torch.tensor([[77], [21], [10]])).long()
    theirs = peer(ids, attention_mask=mask)
    states, pooled = clip(ids)
    assert error(states[mask.bool()], theirs.last_hidden_state[mask.bool()]) < TOLERANCE
    assert error(pooled, theirs.pooler_output) < TOLERANCE


def test_clip_equals_transformers_with_weights_carried_both_ways():
    peer, clip = peer_clip(), randomised(CLIPText(99, 24, 40, 2, 3), seed=8)
    names = {name.removeprefix("text_model."): name for name in peer.state_dict()}
    peer.load_state_dict({names[name]: t for name, t in clip.state_dict().items()})
    assert_same_clip(clip, peer)
    peer = peer_clip(seed=11)
    clip.load_state_dict({name: peer.state_dict()[names[name]] for name in clip.state_dict()})
    assert_same_clip(clip, peer)


@pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_text_encoders_in_half_precision_are_near_fp32(peers, tokenizer_folders, dtype, bound):
    root, _ = tokenizer_folders
    llm, clip = ours_of(*peers)
    folders = root / "llm", root / "clip"
    want = HunyuanText(llm, clip, *folders).encode_each(["a red circle"])[0]
    got = HunyuanText(llm.to(dtype), clip.to(dtype), *folders).encode_each(["a red circle"])[0]
    for key in ("text", "pooled"):
        assert got[key].dtype == torch.float32 and torch.isfinite(got[key]).all()
        assert (got[key] - want[key]).norm() < bound * want[key].norm()


# --------------------------------------------------------------------- names of real checkpoints

def shapes(module: nn.Module, prefix: str) -> dict[str, list[int]]:
    return {prefix + name: list(t.shape) for name, t in module.state_dict().items()}


def test_full_size_names_and_shapes_are_the_checkpoints():
    keys = {name: json.loads((FIXTURES / f"keys/hunyuan_{name}.json").read_text())["keys"]
            for name in ("vae", "vae_diffusers", "llm", "clip")}
    with torch.device("meta"):
        vae, llm, clip = HunyuanVAE(), Llama(), CLIPText()
    assert shapes(vae, "") == keys["vae"] == keys["vae_diffusers"]
    assert shapes(clip, "text_model.") == keys["clip"]
    unread = ("model.norm.", "lm_head.", "model.layers.30.", "model.layers.31.")
    assert shapes(llm, "model.") == {name: shape for name, shape in keys["llm"].items()
                                     if not name.startswith(unread)}


# ------------------------------------------------------------------------------------ the tokens

@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("clip_folder", ["clip", "clip_old"])
def test_ids_equal_transformers_with_padding_and_truncation(tokenizer_folders, peers, clip_folder,
                                                            image):
    root, clip_peer = tokenizer_folders
    text = HunyuanText(*ours_of(*peers), root / "llm", root / clip_folder, image=image)
    llm_peer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(root / "llm/tokenizer.json"), pad_token="<pad>", padding_side="right")
    template = TEMPLATES["image" if image else "video"][1]
    long = "a red circle, the children's beach 2024 " * 60
    for prompt in [*PROMPTS, long]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids, pooled = text.ids(prompt)
        prompt = prompt.replace("\udcff", "?")
        for got, peer, given, length in (
                (ids, llm_peer, template.format(prompt.strip()), 351),
                (pooled, clip_peer, prompt, 77)):
            want = peer(given, padding="max_length", truncation=True, max_length=length,
                        return_tensors="pt")
            assert want["input_ids"].shape == (1, length)
            assert got.tolist() == want["input_ids"][want["attention_mask"].bool()].tolist()
    assert len(ids) == 351 and len(pooled) == 77 and pooled[-1] == len(clip_peer) - 1


def test_both_clip_tokenizer_forms_give_equal_ids(tokenizer_folders, peers):
    root, _ = tokenizer_folders
    new, old = (HunyuanText(*ours_of(*peers), root / "llm", root / name)
                for name in ("clip", "clip_old"))
    for prompt in PROMPTS:
        assert torch.equal(new.ids(prompt)[1], old.ids(prompt)[1])


def test_the_templates_make_so_many_tokens_before_the_prompt(text):
    # With LLaMA-3's way of cutting, and its words being single tokens: the sheet's 95 and 36.
    for crop, template in TEMPLATES.values():
        before, _, after = template.partition("{}")
        assert len(text.llm_tokenizer.encode(before).ids) == crop
        ids = text.llm_tokenizer.encode(template.replace("{}", "a red circle")).tokens
        assert ids[0] == "<|begin_of_text|>" and ids[crop - 1] == "ĊĊ" and ids[crop] == "a"
        assert ids[-1] == after == "<|eot_id|>"


def test_a_prompt_of_ten_thousand_words_is_cut_with_a_warning(peers, tokenizer_folders):
    root, _ = tokenizer_folders
    prompt = "a red circle moves left " * 2000
    for text_len, image, rows in ((256, False, 256), (256, True, 315), (10, False, 10)):
        text = HunyuanText(*ours_of(*peers), root / "llm", root / "clip", text_len, image)
        with pytest.warns(UserWarning, match="prompt 'a red circle") as caught:
            cond = text.encode_each([prompt])[0]
        assert len(caught) == 1
        count = 10000 + 1  # each word is a token; and the template's end
        assert f"has {count} tokens; the text encoder reads {rows}" in str(caught[0].message)
        assert f"the last {count - rows} are dropped" in str(caught[0].message)
        assert cond["text"].shape == (rows, 32)


# ------------------------------------------------------------------------------- text to states

def test_states_are_the_padded_official_formula_s_valid_rows(text, peers, tokenizer_folders):
    llm, clip = peers
    _, clip_peer = tokenizer_folders
    pad = text.llm_tokenizer.token_to_id("<pad>")
    for prompt, cond in zip(PROMPTS, text.encode_each(PROMPTS), strict=True):
        ids, pooled = text.ids(prompt)
        row = torch.full((1, 351), pad)
        row[0, :len(ids)] = ids
        mask = (torch.arange(351) < len(ids)).long()[None]
        states = llm.model(row, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
        states, valid = states[:, 95:], mask[:, 95:].bool()
        assert error(cond["text"], states[valid]) < TOLERANCE
        assert len(cond["text"]) == valid.sum() and "mask" not in cond  # all of it is valid
        row = torch.full((1, 77), len(clip_peer) - 1)  # CLIP pads with its end token
        row[0, :len(pooled)] = pooled
        mask = (torch.arange(77) < len(pooled)).long()[None]
        assert error(cond["pooled"], clip(row, attention_mask=mask).pooler_output[0]) < TOLERANCE


def test_states_do_not_depend_on_company_and_padding_is_zero(text):
    prompts = ["a red circle", "", "a red circle moves left"]
    each, together = text.encode_each(prompts), collate(text.encode_each(prompts))
    assert [len(cond["text"]) for cond in each] == [4, 1, 6]  # with the template's end
    assert {key: tuple(t.shape) for key, t in together.items()} == {
        "text": (3, 6, 32), "mask": (3, 6), "pooled": (3, 24), "guidance": (3,)}
    assert together["mask"].tolist() == [[1] * n + [0] * (6 - n) for n in (4, 1, 6)]
    for i, (prompt, cond) in enumerate(zip(prompts, each, strict=True)):
        n = len(cond["text"])
        assert torch.equal(cond["text"], collate(text.encode_each([prompt]))["text"][0])
        assert torch.equal(cond["text"], together["text"][i, :n])
        assert not together["text"][i, n:].any()
        assert torch.equal(cond["pooled"], together["pooled"][i])


def test_right_padding_of_a_batch_changes_no_valid_row(text):
    rows = [text.ids(prompt)[0] for prompt in PROMPTS]
    batch = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)
    states = text.llm(batch)
    for i, row in enumerate(rows):
        assert error(states[i, :len(row)], text.llm(row[None])[0]) < TOLERANCE


# -------------------------------------------------------------------------------- weight folders

def make_official(root: Path, tokenizers: Path, vae: nn.Module, llm: nn.Module, clip) -> None:
    """HunyuanVideo's own tree: a wrapped VAE .pt, a causal LLM in shards, a whole CLIP."""
    folder = root / "hunyuan-video-t2v-720p/vae"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(VAE_CONFIG))
    state = {"vae." + name: t for name, t in vae.state_dict().items()}
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(1)}, },
               folder / "pytorch_model.pt")
    llm.save_pretrained(root / "text_encoder", max_shard_size="30KB")
    assert len(list((root / "text_encoder").glob("*.safetensors"))) > 1
    whole_clip(clip).save_pretrained(root / "text_encoder_2")
    shutil.copy(tokenizers / "llm/tokenizer.json", root / "text_encoder")
    shutil.copy(tokenizers / "clip/tokenizer.json", root / "text_encoder_2")


def make_diffusers(root: Path, tokenizers: Path, vae: nn.Module, llm: nn.Module, clip) -> None:
    """The diffusers tree: a bare LLM and text half, and tokenizers in folders of their own."""
    vae.save_pretrained(root / "vae", max_shard_size="200KB")
    llm.model.save_pretrained(root / "text_encoder", max_shard_size="30KB")
    clip.save_pretrained(root / "text_encoder_2")
    assert len(list(root.glob("*/*.index.json"))) == 2
    shutil.copytree(tokenizers / "llm", root / "tokenizer")
    shutil.copytree(tokenizers / "clip_old", root / "tokenizer_2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_folders, peers):
    """An official and a diffusers folder of the same weights, and the VAE they came from."""
    root, vae = tmp_path_factory.mktemp("weights"), peer_vae()
    make_official(root / "official", tokenizer_folders[0], vae, *peers)
    make_diffusers(root / "diffusers", tokenizer_folders[0], vae, *peers)
    return root, vae


def load(folder: Path, **options) -> HunyuanText:
    return load_text(folder, dtype=torch.float32, family="hunyuan", **options)


def test_official_and_diffusers_folders_load_and_give_equal_outputs(folders, text):
    root, peer = folders
    vaes = [load_vae(root / layout, family="hunyuan") for layout in ("official", "diffusers")]
    video, latents = normal(1, 3, 5, 16, 16), normal(1, 16, 2, 2, 2)
    assert torch.equal(vaes[0].encode(video), vaes[1].encode(video))
    assert torch.equal(vaes[0].decode(latents), vaes[1].decode(latents))
    assert_same_vae(vaes[0], peer)
    assert [(vae.tile, vae.tile_time) for vae in vaes] == [(4, 4), (32, 16)]  # one config says so
    assert [vae.scaling for vae in vaes] == [0.4, 0.4]
    want = collate(text.encode_each(PROMPTS))
    for layout in ("official", "diffusers"):
        got = collate(load(root / layout).encode_each(PROMPTS))
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_loaded_networks_are_frozen_and_of_the_dtype_asked_for(folders):
    root, _ = folders
    vae = load_vae(root / "official", "cpu", torch.float16, "hunyuan")
    text = load_text(root / "official", "cpu", torch.float16, 7, "hunyuan", True)
    assert text.llm_len == 7 + 95 and text.crop == 36
    for module in (vae, text.llm, text.clip):
        assert {p.dtype for p in module.parameters()} == {torch.float16}
        assert not any(p.requires_grad for p in module.parameters()) and not module.training
    assert load(root / "official").llm_len == 256 + 95


def rewritten(source: Path, folder: Path, change=None, config=None) -> Path:
    """A copy of a component's folder with one weight file, after change(tensors)."""
    tensors = {name: t.read() for name, t in open_tensors(source).items()}
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    if change:
        tensors = change(tensors) or tensors
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    if config is not None:
        own = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config(own) or own))
    return folder


def without(name: str):
    """A change that drops a tensor."""
    def change(tensors):
        del tensors[name]
    return change


def filled(name: str, value: float):
    """A change that fills a tensor."""
    def change(tensors):
        tensors[name].fill_(value)
    return change


def renamed(prefix: str):
    """From a causal model's names to another layout of the same LLM."""
    def change(tensors):
        head = prefix.removesuffix("model.") if prefix == "language_model.model." else ""
        return {(head + name if name.startswith("lm_head")
                 else prefix + name.removeprefix("model.")): t for name, t in tensors.items()
                if prefix or not name.startswith("lm_head")}
    return change


LAYOUTS = ["model.", "language_model.model.", "model.language_model.", ""]


@pytest.mark.parametrize("prefix", LAYOUTS)
def test_every_layout_of_the_llm_s_names_loads_with_a_llava_s_config(folders, tmp_path, text,
                                                                     prefix):
    def with_pictures(tensors):
        return renamed(prefix)(tensors) | {"multi_modal_projector.linear_1.bias": torch.ones(3),
                                           "vision_tower.post.weight": torch.ones(3)}

    llava = "language_model" in prefix
    source = folders[0] / "official"
    rewritten(source / "text_encoder", tmp_path / "text_encoder",
              with_pictures if llava else renamed(prefix),
              (lambda own: {"model_type": "llava", "text_config": own}) if llava else None)
    shutil.copytree(source / "text_encoder_2", tmp_path / "text_encoder_2")
    assert torch.equal(collate(load(tmp_path).encode_each(PROMPTS))["text"],
                       collate(text.encode_each(PROMPTS))["text"])


def test_configs_of_older_transformers_load_the_same(folders, tmp_path, text):
    def older(own):
        theta = own.pop("rope_parameters")["rope_theta"]
        return own | {"rope_theta": theta, "rope_scaling": None}

    source = folders[0] / "official"
    frequencies = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewritten(source / "text_encoder", tmp_path / "text_encoder", lambda t: t | frequencies, older)
    buffer = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rewritten(source / "text_encoder_2", tmp_path / "text_encoder_2", lambda t: t | buffer)
    assert torch.equal(collate(load(tmp_path).encode_each(PROMPTS))["text"],
                       collate(text.encode_each(PROMPTS))["text"])
    theta = json.loads((tmp_path / "text_encoder/config.json").read_text())
    (tmp_path / "text_encoder/config.json").write_text(json.dumps(theta | {"rope_theta": 1e4}))
    assert not torch.equal(collate(load(tmp_path).encode_each(PROMPTS))["text"],
                           collate(text.encode_each(PROMPTS))["text"])


def test_what_hunyuanvideo_does_not_run_of_the_llm_is_never_read(folders, tmp_path):
    def spoil(tensors):  # a tensor that is read must be finite
        for name, t in tensors.items():
            if name.startswith(("model.layers.3.", "model.layers.4.", "model.norm", "lm_head")):
                t.fill_(float("nan"))

    source = folders[0] / "official"
    rewritten(source / "text_encoder", tmp_path / "text_encoder", spoil)
    shutil.copytree(source / "text_encoder_2", tmp_path / "text_encoder_2")
    assert len(load(tmp_path).llm.layers) == 3


@pytest.mark.parametrize("component,change,words", [
    ("text_encoder", without("model.layers.2.mlp.up_proj.weight"),
     ["misses 1", "layers.2.mlp.up_proj.weight"]),
    ("text_encoder", lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}),
     ["unknown 1", "layers.1.self_attn.q_proj.bias"]),
    ("text_encoder", lambda t: t.update({"model.layers.5.input_layernorm.weight": torch.ones(32)}),
     ["unknown 1", "layers.5.input_layernorm.weight"]),
    ("text_encoder", lambda t: t.update({"model.embed_tokens.weight": torch.ones(9, 32)}),
     ["embed_tokens.weight", "[9, 32]"]),
    ("text_encoder", filled("model.layers.0.mlp.up_proj.weight", torch.inf),
     ["layers.0.mlp.up_proj.weight", "NaN or infinity"]),
    ("text_encoder_2", without("text_model.final_layer_norm.bias"),
     ["misses 1", "final_layer_norm.bias"]),
    ("text_encoder_2", lambda t: t.update({"text_model.extra": torch.ones(2)}),
     ["unknown 1", "extra"]),
    ("text_encoder_2", lambda t: t.update(
        {"text_model.embeddings.position_embedding.weight": torch.ones(20, 24)}),
     ["position_embedding.weight", "[20, 24]", "[77, 24]"])])
def test_text_weights_that_do_not_fit_are_named(folders, tmp_path, component, change, words):
    source = folders[0] / "official"
    for name in ("text_encoder", "text_encoder_2"):
        rewritten(source / name, tmp_path / name, change if name == component else None)
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / component) in message and all(w in message for w in words), message


@pytest.mark.parametrize("change,words", [
    (without("vae.quant_conv.bias"), ["misses 1", "quant_conv.bias"]),
    (lambda t: t.update({"vae.surplus": torch.ones(1)}), ["unknown 1", "surplus"]),
    (lambda t: t.update({"vae.quant_conv.bias": torch.ones(3)}), ["quant_conv.bias", "[3]"]),
    (filled("vae.quant_conv.bias", torch.nan), ["quant_conv.bias", "NaN"])])
def test_vae_weights_that_do_not_fit_are_named(folders, tmp_path, change, words):
    source, folder = folders[0] / "official/hunyuan-video-t2v-720p/vae", tmp_path / "vae"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    state = torch.load(source / "pytorch_model.pt", weights_only=True)["state_dict"]
    change(state)
    torch.save(state, folder / "pytorch_model.pt")  # without the wrapper as well
    with pytest.raises(ValueError) as caught:
        load_vae(tmp_path, family="hunyuan")
    message = str(caught.value)
    assert str(folder) in message and all(word in message for word in words), message


@pytest.mark.parametrize("component,key,value", [
    ("vae", "mid_block_add_attention", False), ("vae", "temporal_compression_ratio", 8),
    ("vae", "sample_size", 100), ("text_encoder", "model_type", "gemma"),
    ("text_encoder", "rope_scaling", {"factor": 8}), ("text_encoder_2", "hidden_act", "gelu")])
def test_a_config_of_another_model_is_named(folders, tmp_path, component, key, value):
    shutil.copytree(folders[0] / "diffusers", tmp_path / "w")
    file = tmp_path / "w" / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"{component}.*{key}"):
        load_vae(tmp_path / "w", family="hunyuan") if component == "vae" else load(tmp_path / "w")


def test_missing_files_of_a_weight_folder_are_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        load_vae(tmp_path / "absent", family="hunyuan")
    with pytest.raises(FileNotFoundError, match="no VAE: expected hunyuan-video-.*/vae .* vae/"):
        load_vae(tmp_path, family="hunyuan")
    with pytest.raises(FileNotFoundError, match="no LLM: expected .*text_encoder/config.json"):
        load(tmp_path)
    source = folders[0] / "diffusers"
    shutil.copytree(source / "text_encoder", tmp_path / "text_encoder")
    with pytest.raises(FileNotFoundError, match="no CLIP: expected .*text_encoder_2/config.json"):
        load(tmp_path)
    shutil.copytree(source / "text_encoder_2", tmp_path / "text_encoder_2")
    with pytest.raises(FileNotFoundError, match="text_encoder: contains no tokenizer.json"):
        load(tmp_path)
    shutil.copytree(source / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer_2").mkdir()
    with pytest.raises(FileNotFoundError, match="tokenizer_2: contains no tokenizer.json"):
        load(tmp_path)
    shutil.copy(source / "tokenizer_2/vocab.json", tmp_path / "tokenizer_2")
    with pytest.raises(ValueError, match="tokenizer_2: is not a readable tokenizer"):
        load(tmp_path)
    (tmp_path / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer: is not a readable tokenizer"):
        load(tmp_path)
    for file in (tmp_path / "text_encoder").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="text_encoder/model-00001"):
        load(tmp_path)


def test_tokenizers_of_other_models_are_named(peers, tokenizer_folders, tmp_path):
    root, clip_peer = tokenizer_folders
    llm, clip = ours_of(*peers)
    make_llm_tokenizer(tmp_path / "bare", begin=False)
    with pytest.raises(ValueError, match="bare: .*into 95, got .*and 94: copy both from"):
        HunyuanText(llm, clip, tmp_path / "bare", root / "clip")
    with pytest.raises(ValueError, match=f"llm: .* encoder's 20 .*got {llm_rows(root)} tokens"):
        HunyuanText(Llama(20, 32, 56, 1, 4, 2), clip, root / "llm", root / "clip")
    with pytest.raises(ValueError, match=f"clip: .* 30 .*got {len(clip_peer)} tokens"):
        HunyuanText(llm, CLIPText(30, 24, 40, 1, 3), root / "llm", root / "clip")
    with pytest.raises(ValueError, match="llm: .*splits ''.* into 2, got .*and 1:"):
        HunyuanText(llm, CLIPText(5000, 24, 40, 1, 3), root / "llm", root / "llm")
