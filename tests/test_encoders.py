"""The frozen networks against the official outputs and the peers' code; tokenizer; video files.

TOLERANCE is that of the fixtures: largest difference over the tensor's largest value. It leaves
fp32 room for another order of summation, and none for another formula.
"""

import json
import os
import subprocess
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from imageio_ffmpeg import get_ffmpeg_exe
from pixels import read_video
from safetensors import safe_open
from torch import Tensor, nn

import frozen.load
from common.config import Shared
from common.names import official_names
from common.ranks import Timer, generator
from common.video import read_frames, to_uint8, write_video
from common.weights import save_tensors
from evaluation.sheets import stills, video_table
from frozen.load import load_text, load_vae
from frozen.text import TextEncoder, Tokenizer, UMT5Encoder, clean_text
from frozen.vae import HunyuanVAE, WanVAE
from model import collate

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 2e-5
SMALL_VAE = {"dim": 4}
SMALL_T5 = {"vocab_size": 800, "dim": 24, "dim_attn": 20, "num_heads": 5, "dim_ffn": 40,
            "num_layers": 2}


def fixture(name: str) -> tuple[dict[str, Tensor], dict, dict]:
    """Tensors, config and notes of a parity fixture."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    return tensors, json.loads(metadata["config"]), json.loads(metadata["notes"])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Frozen weights of a scale at which every branch counts."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = max(1, p[0].numel()) if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=g) / fan_in ** 0.5)
    return module.eval().requires_grad_(False)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_vae(seed: int = 0) -> WanVAE:
    """A small VAE whose latent statistics are its own, not the released ones."""
    mean, std = (np.linspace(-1, 1, 16) + seed).tolist(), np.linspace(0.5, 2, 16).tolist()
    return randomised(WanVAE(**SMALL_VAE, latents_mean=mean, latents_std=std), seed)


@pytest.fixture(scope="module")
def fixture_vae():
    tensors, config, _ = fixture("wan_vae")
    vae = WanVAE(config["dim"], config["z_dim"], config["dim_mult"], config["num_res_blocks"],
                 config["temperal_downsample"], tensors["in.mean"].tolist(),
                 tensors["in.std"].tolist())
    vae.load_state_dict(part(tensors, "weight."))
    return vae.requires_grad_(False), tensors


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory):
    """Folders with tokenizer.json only, spiece.model only, and both."""
    tensors, _, _ = fixture("wan_tokenizer")
    files = {"tokenizer.json": "in.tokenizer_json", "spiece.model": "in.spiece_model"}
    folders = {}
    for name, kept in (("json", ["tokenizer.json"]), ("spiece", ["spiece.model"]),
                       ("both", ["tokenizer.json", "spiece.model"])):
        folders[name] = tmp_path_factory.mktemp(name)
        for file in kept:
            (folders[name] / file).write_bytes(tensors[files[file]].numpy().tobytes())
    return folders


# ------------------------------------------------------------------------------------- the VAE

@pytest.mark.parametrize("case", ["e1", "e2", "e3"])
def test_vae_encode_equals_the_official_output_chunked_and_whole(fixture_vae, case):
    vae, tensors = fixture_vae
    video, want = tensors[f"in.{case}.video"], tensors[f"out.{case}.latent"]
    assert error(vae.encode(video), want) < TOLERANCE
    mean, std = vae.statistics("cpu")
    assert error((vae.moments(video)[0] - mean) / std, want) < TOLERANCE


@pytest.mark.parametrize("case", ["d1", "d2", "d3"])
def test_vae_decode_equals_the_official_output_chunked_and_whole(fixture_vae, case):
    vae, tensors = fixture_vae
    latent, want = tensors[f"in.{case}.latent"], tensors[f"out.{case}.video"]
    mean, std = vae.statistics("cpu")
    assert error(vae.reconstruct(latent * std + mean), want) < TOLERANCE
    past = {}
    chunks = [vae.reconstruct(z, past) for z in (latent * std + mean).split(1, dim=2)]
    assert error(torch.cat(chunks, dim=2), want) < TOLERANCE
    assert error(vae.decode(latent), want.clamp(-1, 1)) < TOLERANCE  # the stored one is unclamped


@pytest.mark.parametrize("dim_mult,temporal_down", [
    ((1, 2, 4, 4), (False, True, True)), ((1, 2, 2), (True, False)), ((1, 1, 2), (True, True))])
def test_chunks_give_what_the_whole_clip_gives(dim_mult, temporal_down):
    # One definition computed in two orders, in fp64: only rounding may remain.
    vae = randomised(WanVAE(4, 16, dim_mult, 1, temporal_down)).double()
    frames = 3 * vae.time + 1
    video = normal(2, 3, frames, 2 * vae.space, vae.space).double()
    mean, std = (s.double() for s in vae.statistics("cpu"))
    z = vae.moments(video)[0]
    assert z.shape == (2, 16, 4, 2, 1)
    assert error(vae.encode(video).double(), (z - mean) / std) < 1e-6  # encode returns fp32
    past = {}
    chunks = torch.cat([vae.reconstruct(frame, past) for frame in z.split(1, dim=2)], dim=2)
    assert chunks.shape == video.shape
    assert error(chunks, vae.reconstruct(z)) < 1e-12


def test_memory_of_encode_and_decode_is_bounded_by_the_chunk_not_by_the_clip():
    vae, seen = small_vae(), []
    for module in vae.modules():
        if isinstance(module, (nn.Conv3d, nn.Conv2d)):
            module.register_forward_hook(lambda _m, x, y: seen.append(x[0].numel() + y.numel()))
    peaks = {}
    for frames in (5, 33):
        seen.clear()
        vae.decode(vae.encode(normal(1, 3, frames, 16, 16)))
        peaks[frames] = max(seen)
    assert peaks[33] == peaks[5]
    past = {}
    for frame in normal(1, 16, 9, 2, 2).split(1, dim=2):
        vae.reconstruct(frame, past)
        assert all(kept.ndim == 1 or kept.shape[2] <= 2 for kept in past.values())
    storage = [kept.untyped_storage().nbytes() for kept in past.values()]
    assert storage == [4 * kept.numel() for kept in past.values()]  # copies, not views of a chunk


def test_a_frame_of_the_latent_never_depends_on_later_frames():
    vae, video = small_vae(), normal(1, 3, 9, 16, 16)
    later = video.clone()
    later[:, :, 5:] = 0
    a, b = vae.encode(video), vae.encode(later)
    assert torch.equal(a[:, :, :2], b[:, :, :2]) and not torch.equal(a[:, :, 2], b[:, :, 2])


def test_moments_and_reconstruct_are_differentiable_to_every_parameter():
    vae = small_vae().requires_grad_(True)
    mean, logvar = vae.moments(normal(1, 3, 5, 16, 16))
    (vae.reconstruct(mean).square().mean() + logvar.mean()).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_vae_in_bfloat16_keeps_fp32_at_its_ends_and_stays_near_fp32():
    vae, video = small_vae(), normal(1, 3, 5, 16, 16).clamp(-1, 1)
    latents = vae.encode(video)
    decoded = vae.decode(latents)
    low = small_vae().to(torch.bfloat16)
    assert low.encode(video).dtype == low.decode(latents).dtype == torch.float32
    assert error(low.encode(video), latents) < 0.1  # bf16 has 8 bits, the net a few dozen layers
    assert (low.decode(latents) - decoded).square().mean() < 0.01 * decoded.square().mean()


@pytest.mark.parametrize("shape,words", [
    ((1, 3, 4, 16, 16), ["4n + 1", "got [1, 3, 4, 16, 16]"]),
    ((1, 3, 0, 16, 16), ["got [1, 3, 0, 16, 16]"]),
    ((1, 3, 82, 16, 16), ["got [1, 3, 82, 16, 16]"]),
    ((1, 3, 5, 20, 16), ["8h, 8w", "got [1, 3, 5, 20, 16]"]),
    ((1, 3, 5, 16, 0), ["got [1, 3, 5, 16, 0]"]),
    ((1, 4, 5, 16, 16), ["got [1, 4, 5, 16, 16]", "[B, 3, 4n + 1"]),
    ((3, 5, 16, 16), ["[3, 5, 16, 16]"])])
def test_encode_names_what_is_wrong_with_a_video(shape, words):
    with pytest.raises(ValueError) as caught:
        WanVAE(dim=2).encode(torch.zeros(shape))
    assert all(word in str(caught.value) for word in words), caught.value


def peer_vae(vae: WanVAE) -> diffusers.AutoencoderKLWan:
    """A diffusers VAE with a small VAE's shape and latent statistics."""
    peer = diffusers.AutoencoderKLWan(base_dim=4, latents_mean=list(vae.latents_mean),
                                      latents_std=list(vae.latents_std))
    return randomised(peer, seed=5)


def assert_same_vae(vae: WanVAE, peer: diffusers.AutoencoderKLWan) -> None:
    video, latents = normal(1, 3, 9, 24, 16), normal(1, 16, 3, 2, 3)
    mean, std = vae.statistics("cpu")
    theirs = (peer.encode(video).latent_dist.mode() - mean) / std
    assert error(vae.encode(video), theirs) < TOLERANCE
    assert error(vae.decode(latents), peer.decode(latents * std + mean).sample) < TOLERANCE


def test_vae_equals_diffusers_with_our_weights_in_it():
    vae = small_vae()
    peer = peer_vae(vae)
    peer.load_state_dict(official_names(vae.state_dict(), "vae", reverse=True))
    assert_same_vae(vae, peer)


def test_vae_equals_diffusers_with_its_weights_in_ours():
    vae = small_vae()
    peer = peer_vae(vae)
    vae.load_state_dict(official_names(peer.state_dict(), "vae"))
    assert_same_vae(vae, peer)


# -------------------------------------------------------------------------------------- umT5

def test_umt5_equals_the_official_output_on_valid_rows():
    tensors, config, notes = fixture("wan_umt5")
    encoder = UMT5Encoder(config["vocab"], config["dim"], config["dim_attn"], config["num_heads"],
                          config["dim_ffn"], config["num_layers"], config["num_buckets"],
                          notes["max_distance"])
    encoder.load_state_dict(part(tensors, "weight."))
    with torch.no_grad():
        got = encoder(tensors["in.ids"], tensors["in.mask"])
    for i, length in enumerate(notes["lengths"]):
        assert error(got[i, :length], tensors["out.hidden"][i, :length]) < TOLERANCE


def peer_umt5() -> transformers.UMT5EncoderModel:
    config = transformers.UMT5Config(
        vocab_size=800, d_model=24, d_kv=4, d_ff=40, num_layers=2, num_heads=5, dropout_rate=0.0,
        tie_word_embeddings=True)
    return randomised(transformers.UMT5EncoderModel(config), seed=3)


def assert_same_umt5(encoder: UMT5Encoder, peer: transformers.UMT5EncoderModel) -> None:
    # 300 positions pass the last bucket boundary (128) on both sides.
    ids = torch.randint(800, (2, 300), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(300) < torch.tensor([[300], [41]])).long()
    ours, theirs = encoder(ids, mask), peer(ids, attention_mask=mask).last_hidden_state
    for i, length in enumerate(mask.sum(1)):
        assert error(ours[i, :length], theirs[i, :length]) < TOLERANCE


def test_umt5_equals_transformers_with_our_weights_in_it():
    encoder, peer = randomised(UMT5Encoder(**SMALL_T5)), peer_umt5()
    missing, extra = peer.load_state_dict(
        official_names(encoder.state_dict(), "text_encoder", reverse=True), strict=False)
    assert not extra and set(missing) <= {"encoder.embed_tokens.weight"}  # tied to shared.weight
    assert_same_umt5(encoder, peer)


def test_umt5_equals_transformers_with_its_weights_in_ours():
    encoder, peer = randomised(UMT5Encoder(**SMALL_T5)), peer_umt5()
    encoder.load_state_dict(official_names(peer.state_dict(), "text_encoder"))
    assert_same_umt5(encoder, peer)


def test_every_umt5_layer_reads_its_own_bias_table():
    encoder = randomised(UMT5Encoder(**SMALL_T5))
    ids, mask = torch.arange(9)[None], torch.ones(1, 9)
    before = encoder(ids, mask)
    encoder.blocks[1].pos_embedding.embedding.weight[3] += 1
    assert not torch.equal(before, encoder(ids, mask))


def test_umt5_in_bfloat16_is_near_fp32():
    encoder = randomised(UMT5Encoder(**SMALL_T5))
    ids, mask = torch.arange(30)[None], (torch.arange(30) < 20).long()[None]
    want = encoder(ids, mask)[:, :20]
    got = encoder.to(torch.bfloat16)(ids, mask)[:, :20]
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).square().mean() < 1e-3 * want.square().mean()


# --------------------------------------------------------------------- names of real checkpoints

@pytest.mark.parametrize("cls,name,component", [
    (WanVAE, "wan_vae", "vae"), (UMT5Encoder, "wan_umt5_xxl", "text_encoder")])
def test_full_size_names_and_shapes_are_the_checkpoints(cls, name, component):
    with torch.device("meta"):
        ours = {key: list(t.shape) for key, t in cls().state_dict().items()}
    official = json.loads((FIXTURES / f"keys/{name}.json").read_text())["keys"]
    theirs = json.loads((FIXTURES / f"keys/{name}_diffusers.json").read_text())["keys"]
    assert ours == official
    assert ours == official_names(theirs, component)
    back = official_names(ours, component, reverse=True)
    assert back == {k: v for k, v in theirs.items() if k != "encoder.embed_tokens.weight"}


# --------------------------------------------------------------------------------- the tokenizer

def padded(ids: Tensor, mask: Tensor, length: int = 512) -> tuple[Tensor, Tensor]:
    room = (0, length - ids.shape[1])
    return nn.functional.pad(ids, room), nn.functional.pad(mask, room)


def test_cleaning_equals_the_official_cleaning():
    _, _, notes = fixture("wan_tokenizer")
    assert [clean_text(text) for text in notes["texts"]] == notes["cleaned"]


@pytest.mark.filterwarnings("ignore:prompt")
def test_ids_by_tokenizer_json_equal_the_official_ids(tokenizer_folders):
    tensors, _, notes = fixture("wan_tokenizer")
    for folder in ("json", "both"):
        ids, mask = padded(*Tokenizer(tokenizer_folders[folder])(notes["texts"]))
        assert torch.equal(ids, tensors["out.ids"]) and torch.equal(mask, tensors["out.mask"])


@pytest.mark.filterwarnings("ignore:prompt")
def test_ids_by_sentencepiece_equal_the_official_ids_but_for_literal_special_tokens(
        tokenizer_folders):
    tensors, _, notes = fixture("wan_tokenizer")
    ids, mask = padded(*Tokenizer(tokenizer_folders["spiece"])(notes["texts"]))
    different = [text for text, a, b in zip(notes["texts"], ids, tensors["out.ids"], strict=True)
                 if not torch.equal(a, b)]
    assert different == ["</s> plays <pad> waits", "<extra_id_0> a red bird <extra_id_12>."]
    same = [text not in different for text in notes["texts"]]
    assert torch.equal(mask[same], tensors["out.mask"][same])


def test_a_batch_is_padded_to_its_longest_text_and_an_empty_text_is_its_end(tokenizer_folders):
    ids, mask = Tokenizer(tokenizer_folders["both"])(["", "a red circle"])
    assert ids.dtype == mask.dtype == torch.int64
    assert ids[0].tolist() == [1] + [0] * (ids.shape[1] - 1)
    assert mask.sum(1).tolist() == [1, ids.shape[1]] and ids[1, -1] == 1


@pytest.mark.parametrize("kind", ["json", "spiece"])
def test_a_prompt_of_ten_thousand_words_is_cut_with_a_warning(tokenizer_folders, kind):
    prompt = "a cat walks " * 3334
    tokenizer = Tokenizer(tokenizer_folders[kind])
    with pytest.warns(UserWarning, match="prompt 'a cat walks") as caught:
        ids, mask = tokenizer([prompt])
    assert ids.shape == (1, 512) and ids[0, -1] == 1 and mask.all()
    count = len(tokenizer.pieces(clean_text(prompt)))
    assert f"has {count} tokens" in str(caught[0].message)
    assert f"the last {count - 511} are dropped" in str(caught[0].message)


def test_prompts_are_text_whatever_they_look_like(tokenizer_folders):
    tokenizer = Tokenizer(tokenizer_folders["both"])
    hostile = ["--steps 3", "../../etc/passwd", "<b>bold</b>", "a\x00b", "bad \udcff byte", "%s {}"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, mask = tokenizer(hostile)
    assert ids.shape[0] == len(hostile) and (ids < tokenizer.size).all()


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("content", [b"\xff\xfe not it", b"", "cut"])
def test_a_broken_tokenizer_file_is_named(tokenizer_folders, tmp_path, name, content):
    if content == "cut":
        whole = (tokenizer_folders["both"] / name).read_bytes()
        content = whole[:len(whole) // 2]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: is not a readable tokenizer"):
        Tokenizer(tmp_path)


def test_a_missing_tokenizer_names_the_expected_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json or spiece.model"):
        Tokenizer(tmp_path)


# ------------------------------------------------------------------------------- text to states

def test_states_do_not_depend_on_company_and_padding_is_zero(tokenizer_folders):
    text = TextEncoder(randomised(UMT5Encoder(**SMALL_T5)),
                       Tokenizer(tokenizer_folders["both"], max_len=16))
    prompts = ["a red circle", "", "two children run on a beach"]
    each = text.encode_each(prompts)
    together = collate(text.encode_each(prompts))["text"]
    assert together.dtype == torch.float32
    assert together.shape == (3, max(c["text"].shape[0] for c in each), 24)
    ids, mask = text.tokenizer(prompts)
    for i, (prompt, cond) in enumerate(zip(prompts, each, strict=True)):
        length = int(mask[i].sum())
        assert torch.equal(cond["text"], collate(text.encode_each([prompt]))["text"][0])
        assert torch.equal(cond["text"], together[i, :length])
        assert not together[i, length:].any()
    batched = text.encoder(ids, mask)  # and a masked batch gives the same, up to rounding
    assert error(batched[0, :int(mask[0].sum())], each[0]["text"]) < TOLERANCE


def test_a_tokenizer_of_another_model_is_an_error(tokenizer_folders):
    with pytest.raises(ValueError, match="got .*: copy both from one model"):
        TextEncoder(UMT5Encoder(**{**SMALL_T5, "vocab_size": 100}),
                    Tokenizer(tokenizer_folders["both"]))


def test_each_prompt_of_a_size_is_encoded_once_and_waits_in_host_memory(monkeypatch):
    class Conditioner:
        encoded: list[tuple] = []

        def encode_each(self, prompts, height, width, lap):
            assert len(prompts) == 1  # more would be on the GPU at once
            self.encoded.append((prompts[0], height, width))
            return [{"text": torch.full((1,), float(len(self.encoded)))}]

    monkeypatch.setattr(frozen.load, "load_conditioner", lambda *args: Conditioner())
    prompts, sizes = list("abab"), [(16, 16), (16, 16), (16, 16), (32, 16)]
    cpu = torch.device("cpu")
    conds, unconds = frozen.load.encode_prompts(Shared(), prompts, sizes, True, cpu, Timer(cpu))
    assert Conditioner.encoded == [("a", 16, 16), ("b", 16, 16), ("b", 32, 16)]
    assert [float(cond["text"]) for cond in conds] == [1, 2, 1, 3] and unconds is None


# -------------------------------------------------------------------------------- weight folders

def tokenizer_into(folder: Path, source: Path) -> None:
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def make_official(folder: Path, tokenizer: Path, peer_v, peer_t) -> None:
    """An official folder with the weights of two peers; sizes in the files' metadata."""
    tokenizer_into(folder / "google/umt5-xxl", tokenizer)
    config = {**SMALL_VAE, "latents_mean": peer_v.config.latents_mean,
              "latents_std": peer_v.config.latents_std}
    save_tensors(folder / "Wan2.1_VAE.safetensors", official_names(peer_v.state_dict(), "vae"),
                 {"config": json.dumps(config)})
    save_tensors(folder / "models_t5_umt5-small.safetensors",
                 official_names(peer_t.state_dict(), "text_encoder"),
                 {"config": json.dumps(SMALL_T5)})


def make_diffusers(folder: Path, tokenizer: Path, peer_v, peer_t) -> None:
    """A diffusers folder as the peers save it, in shards with an index."""
    tokenizer_into(folder / "tokenizer", tokenizer)
    peer_v.save_pretrained(folder / "vae", max_shard_size="200KB")
    peer_t.save_pretrained(folder / "text_encoder", max_shard_size="30KB")
    assert len(list((folder / "vae").glob("*.safetensors"))) > 1
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    assert len(list(folder.glob("*/*.index.json"))) == 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_folders):
    """An official and a diffusers folder of the same weights, and the peers they came from."""
    root, peers = tmp_path_factory.mktemp("weights"), (peer_vae(small_vae(1)), peer_umt5())
    make_official(root / "official", tokenizer_folders["both"], *peers)
    make_diffusers(root / "diffusers", tokenizer_folders["both"], *peers)
    return root, *peers


def test_official_and_diffusers_folders_load_and_give_equal_outputs(folders):
    root, peer_v, _ = folders
    vaes = [load_vae(root / layout) for layout in ("official", "diffusers")]
    video, latents = normal(1, 3, 5, 16, 16), normal(1, 16, 2, 2, 2)
    assert torch.equal(vaes[0].encode(video), vaes[1].encode(video))
    assert torch.equal(vaes[0].decode(latents), vaes[1].decode(latents))
    assert_same_vae(vaes[1], peer_v)
    assert not any(p.requires_grad for p in vaes[0].parameters())
    prompts = ["a red circle", "一只猫"]
    texts = [load_text(root / layout, dtype=torch.float32, text_len=16)
             for layout in ("official", "diffusers")]
    states = [collate(text.encode_each(prompts))["text"] for text in texts]
    assert torch.equal(*states)
    assert_same_umt5(texts[0].encoder, folders[2])
    assert load_text(root / "official", dtype=torch.bfloat16).encoder.norm.weight.dtype \
        == torch.bfloat16


def test_a_full_size_pth_without_config_is_read_as_the_official_size(tmp_path):
    torch.save(WanVAE(dim=4).state_dict(), tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match=r"\[.*4.*\], expected \[.*96.*\]"):
        load_vae(tmp_path)


def test_a_pth_file_loads_like_the_safetensors_file(folders, tmp_path, monkeypatch):
    whole = load_vae(folders[0] / "official")
    config = {**SMALL_VAE, "latents_mean": whole.latents_mean, "latents_std": whole.latents_std}
    torch.save(whole.state_dict(), tmp_path / "Wan2.1_VAE.pth")
    monkeypatch.setattr(frozen.load, "safetensors_metadata",  # a .pth has none: it is of full size
                        lambda path: {"config": json.dumps(config)})
    latents = normal(1, 16, 2, 2, 2)
    assert torch.equal(load_vae(tmp_path).decode(latents), whole.decode(latents))


def resave(path: Path, change) -> None:
    """Rewrites a safetensors file after change(tensors, metadata)."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())
    change(tensors, metadata)
    save_tensors(path, tensors, metadata)


@pytest.mark.parametrize("change,words", [
    (lambda t, m: t.pop("conv1.weight"), ["conv1.weight"]),
    (lambda t, m: t.update(surplus=torch.zeros(2)), ["surplus"]),
    (lambda t, m: t.update({"conv2.bias": torch.zeros(3)}), ["conv2.bias", "[3]", "[16]"]),
    (lambda t, m: t["conv2.bias"].fill_(float("nan")), ["conv2.bias", "NaN"]),
    (lambda t, m: m.update(config="{oops"), ["metadata key config"]),
    (lambda t, m: m.update(config='{"width": 3}'), ["width", "WanVAE"]),
    (lambda t, m: m.update(config='{"dim": "4"}'), ["config", "dim: expected a number", "got '4'"]),
    (lambda t, m: m.update(config='{"dim": 4, "z_dim": 8}'), ["'z_dim': 8", "not describe a"])])
def test_official_vae_weights_that_do_not_fit_are_named(folders, tmp_path, change, words):
    file = tmp_path / "Wan2.1_VAE.safetensors"
    file.write_bytes((folders[0] / "official/Wan2.1_VAE.safetensors").read_bytes())
    resave(file, change)
    with pytest.raises(ValueError) as caught:
        load_vae(tmp_path)
    message = str(caught.value)
    assert str(file) in message and all(word in message for word in words), message


def test_a_diffusers_config_of_another_model_is_named(folders, tmp_path):
    config = json.loads((folders[0] / "diffusers/vae/config.json").read_text())
    (tmp_path / "vae").mkdir()
    for file in (folders[0] / "diffusers/vae").glob("*.safetensors*"):
        os.link(file, tmp_path / "vae" / file.name)
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "is_residual": True}))
    with pytest.raises(ValueError, match="is_residual: expected False, got True"):
        load_vae(tmp_path)
    (tmp_path / "vae/config.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="vae/config.json"):
        load_vae(tmp_path)


def test_missing_files_of_a_weight_folder_are_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        load_vae(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no VAE: expected Wan2.1_VAE.safetensors or "):
        load_vae(tmp_path)
    (tmp_path / "Wan2.1_VAE.safetensors").symlink_to("blobs/0a")
    with pytest.raises(FileNotFoundError, match="VAE.safetensors: .*only a link to blobs/0a"):
        load_vae(tmp_path)
    (tmp_path / "Wan2.1_VAE.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="contains no text encoder: expected models_t5"):
        load_text(tmp_path)
    save_tensors(tmp_path / "models_t5_a.safetensors", {"token_embedding.weight": torch.ones(2, 2)},
                 {})
    with pytest.raises(FileNotFoundError, match="google/umt5-xxl: contains no tokenizer.json or"):
        load_text(tmp_path)
    (tmp_path / "models_t5_b.safetensors").touch()
    with pytest.raises(ValueError, match="a.safetensors: expected one .*models_t5_b.* too"):
        load_text(tmp_path)
    (tmp_path / "Wan2.1_VAE.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="Wan2.1_VAE.safetensors"):
        load_vae(tmp_path)


# ----------------------------------------------------------------------------------- video files

def moving_square(frames: int = 9, height: int = 48, width: int = 48) -> Tensor:
    """A red square that moves over a smooth ground, [3, T, H, W]."""
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    ground = torch.stack([y[:, None].expand(height, width), x.expand(height, width),
                          torch.zeros(height, width)])
    video = ground[:, None].repeat(1, frames, 1, 1)
    for t in range(frames):
        video[:, t, 8 + 2 * t:20 + 2 * t, 10:22] = torch.tensor([1.0, -1, -1])[:, None, None]
    return video


@pytest.mark.parametrize("suffix,floor", [(".mp4", 36), (".gif", 30)])  # dB; GIF has 256 colours
def test_a_video_file_reads_back_as_it_was_written_with_the_same_bytes(tmp_path, suffix, floor):
    video, path = moving_square(), tmp_path / f"deep/er/clip{suffix}"
    write_video(path, video, fps=8)
    first = path.read_bytes()
    write_video(path, torch.from_numpy(to_uint8(video)), fps=8)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    back = read_video(path)
    assert back.shape == video.shape and back.abs().max() <= 1
    assert -10 * torch.log10((back - video).square().mean() / 4) > floor
    assert (back.mean((1, 2, 3)) - video.mean((1, 2, 3))).abs().max() < 0.02  # no shift of colour


def test_uint8_frames_survive_the_way_to_floats_and_back():
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert np.array_equal(to_uint8(video), frames)


def test_odd_sizes_are_padded_not_rescaled(tmp_path):
    video = moving_square(3, 31, 45)
    write_video(tmp_path / "odd.mp4", video, fps=16)
    back = read_video(tmp_path / "odd.mp4")
    assert back.shape == (3, 3, 32, 46)
    assert (back[:, :, :31, :45] - video).abs().mean() < 0.06
    write_video(tmp_path / "odd.gif", video, fps=16)
    assert read_video(tmp_path / "odd.gif").shape == (3, 3, 31, 45)


def test_every_colour_tag_of_an_mp4_is_bt709_and_a_flat_patch_keeps_its_colour(tmp_path):
    patch = np.broadcast_to(np.array([229, 27, 27], np.uint8), (3, 64, 64, 3))
    write_video(tmp_path / "a.mp4", patch, 8)
    tags = subprocess.run([get_ffmpeg_exe(), "-i", str(tmp_path / "a.mp4")], capture_output=True,
                          text=True, check=False).stderr
    assert "(tv, bt709," in tags  # ffmpeg prints bt709/unknown/unknown where two are missing
    assert np.abs(to_uint8(read_video(tmp_path / "a.mp4")).astype(int) - patch).max() <= 3


def test_a_single_frame_is_a_video(tmp_path):
    write_video(tmp_path / "one.mp4", moving_square(1), fps=16)
    assert read_video(tmp_path / "one.mp4").shape == (3, 1, 48, 48)


def test_a_video_of_nan_is_refused_and_not_written(tmp_path):
    with pytest.raises(ValueError, match="NaN or infinity: check the weights file"):
        write_video(tmp_path / "a.mp4", torch.full((3, 1, 8, 8), float("nan")), 8)
    assert not list(tmp_path.iterdir())


def test_a_video_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "clip.mp4").mkdir()  # the place is taken, for root as well
    with pytest.raises(ValueError, match="clip.mp4: cannot be written"):
        write_video(tmp_path / "clip.mp4", moving_square(1), fps=8)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_a_video_cut_short_by_a_full_disk_is_not_kept(small_disk, name):
    noise = torch.rand(3, 9, 256, 256, generator=generator("noise")) * 2 - 1
    with pytest.raises(ValueError, match=f"{name}: cannot be written .*No space left on device"):
        write_video(small_disk / name, noise, fps=8)
    assert not list(small_disk.iterdir())


def test_corrupt_and_missing_video_files_are_errors(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        read_frames(tmp_path / "none.mp4")
    write_video(tmp_path / "whole.mp4", moving_square(), fps=8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    for name, content in (("empty", b""), ("cut", whole[:len(whole) // 2]), ("text", b"hello\n")):
        (tmp_path / f"{name}.mp4").write_bytes(content)
        with pytest.raises(OSError):
            read_frames(tmp_path / f"{name}.mp4")


def test_stills_are_the_first_the_middle_and_the_last_frame():
    video = moving_square(5)
    frames = to_uint8(stills(video))[0]                                      # H 3W 3
    first, middle, last = np.split(frames, 3, axis=1)
    for picture, t in ((first, 0), (middle, 2), (last, 4)):
        assert np.array_equal(picture[:, :48], to_uint8(video)[t])
        assert (picture[:, 48:] == 255).all()
    assert stills(torch.zeros(3, 2, 480, 832)).shape == (3, 1, 160, 3 * (277 + 5))


def test_a_table_of_videos_has_a_row_a_label_and_a_column_a_heading():
    video, other = moving_square(4), moving_square(4).flip(1)
    out = video_table(["a $square", "the same"], [("teacher\n5 steps", [(video, "the target")] * 2),
                                                 ("student", [(other, "error"), (video, "")])])
    assert out.dtype == np.uint8 and out.shape == (4, 58 + 2 * (144 + 24), 150 + 2 * (144 + 6), 3)
    for y, x, of in ((58, 150, video), (58, 300, video), (226, 150, other), (226, 300, video)):
        assert np.array_equal(out[:, y:y + 144:3, x:x + 144:3], to_uint8(of))
    text = out[0, :, :, 0] < 100
    assert text[:58, 150:294].any() and text[:58, 300:].any()              # headings
    assert text[58:202, :150].any() and text[202:226, 150:294].any()       # a label, a note


@pytest.mark.parametrize("make", [
    lambda: WanVAE(dim=8, num_res_blocks=1),
    lambda: HunyuanVAE(dims=(8, 8, 16, 16), num_res_blocks=1, groups=4)], ids=["wan", "hunyuan"])
def test_a_single_clip_s_convolutions_by_onednn_are_torch_s_own(make, monkeypatch):
    torch.manual_seed(3)
    vae = make().eval().requires_grad_(False)
    latents = torch.randn(1, 16, 3, 4, 4, generator=generator("onednn"))
    called, real = [], torch.mkldnn_convolution
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *a: called.append(1) or real(*a))
    by_onednn = vae.decode(latents)
    assert called
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    count = len(called)
    assert (vae.decode(latents) - by_onednn).abs().max() < 1e-5 and len(called) == count
