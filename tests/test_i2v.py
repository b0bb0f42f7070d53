"""Image-to-video: DiT, image encoder and conditioning against the official numbers and peers."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import model
from artifacts.videos import fit_size
from common.names import official_names
from common.ranks import generator
from common.weights import LazyTensor, load_module, open_tensors, save_tensors
from frozen.image import CLIPVision, image_cond
from frozen.load import load_image_encoder
from frozen.vae import WanVAE
from model import WanConfig, build_dit

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = safe_open(FIXTURES / "wan_i2v_dit.safetensors", "pt")
MICRO = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, text_dim=12, text_len=512,
                  model_type="i2v", in_dim=36, image_dim=20)


def near(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    """Assert that two tensors differ by at most a part of the expected one's largest value."""
    assert got.shape == want.shape
    error = ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
    print(f"relative error {error:.1e} (tolerance {tolerance:.0e})")
    assert error <= tolerance


@pytest.fixture(scope="module")
def official() -> model.WanDiT:
    """The DiT of the fixture, with its official weights."""
    names = {f.name for f in dataclasses.fields(WanConfig)}
    config = json.loads(FIXTURE.metadata()["config"])
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
    clip_dim = json.loads(FIXTURE.metadata()["notes"])["clip_dim"]
    tensors = open_tensors(FIXTURES / "wan_i2v_dit.safetensors")
    with torch.device("meta"):
        dit = build_dit(WanConfig(**sizes, image_dim=clip_dim))
    return load_module(dit, {k.removeprefix("weight."): v for k, v in tensors.items()
                                   if k.startswith("weight.")}, "fixture").requires_grad_(False)


def fixture_cond(name: str, i: int) -> dict[str, Tensor]:
    return {"text": FIXTURE.get_tensor(f"in.{name}.context.{i}"),
            "image": FIXTURE.get_tensor(f"in.{name}.clip_fea")[i],
            "frames": FIXTURE.get_tensor(f"in.{name}.y.{i}")}


CASES = json.loads(FIXTURE.metadata()["notes"])["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_dit_and_its_taps_equal_the_official_network(official, case):
    name, blocks = case["name"], tuple(case["feature_blocks"])
    for i in range(case["batch"]):
        x = FIXTURE.get_tensor(f"in.{name}.x.{i}")[None]
        t = FIXTURE.get_tensor(f"in.{name}.t")[i:i + 1].double() / 1000
        v, features = official(x, t, model.collate([fixture_cond(name, i)]), taps=blocks)
        near(v[0], FIXTURE.get_tensor(f"out.{name}.v.{i}"))
        for b, feature in zip(blocks, features, strict=True):
            near(feature[0], FIXTURE.get_tensor(f"out.{name}.feat{b}.{i}"))


def test_a_batch_of_images_and_prompts_equals_them_one_by_one(official):
    cond = model.collate([fixture_cond("b", i) for i in range(2)])
    x = torch.stack([FIXTURE.get_tensor(f"in.b.x.{i}") for i in range(2)])
    v = official(x, FIXTURE.get_tensor("in.b.t").double() / 1000, cond)
    for i in range(2):
        near(v[i], FIXTURE.get_tensor(f"out.b.v.{i}"))


@pytest.mark.parametrize("name", ["text", "image", "frames"])
def test_every_part_of_the_conditioning_changes_the_velocity(official, name):
    cond = model.collate([fixture_cond("a", 0)])
    x, t = FIXTURE.get_tensor("in.a.x.0")[None], FIXTURE.get_tensor("in.a.t").double() / 1000
    other = official(x, t, cond | {name: cond[name] * 1.5})
    assert (other - official(x, t, cond)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["image", "frames"])
def test_a_conditioning_without_its_image_is_an_error(official, name):
    cond = model.collate([fixture_cond("a", 0)])
    del cond[name]
    x, t = FIXTURE.get_tensor("in.a.x.0")[None], FIXTURE.get_tensor("in.a.t").double() / 1000
    with pytest.raises(ValueError, match=f"cond: expected .*{name}.* for an image-to-video DiT"):
        official(x, t, cond)


def test_our_weights_run_in_diffusers_with_equal_output():
    from diffusers import WanTransformer3DModel
    ours, draw = build_dit(MICRO).requires_grad_(False), generator("i2v")
    for name, p in ours.named_parameters():
        p.copy_(torch.randn(p.shape, generator=draw) * p.shape[-1] ** -0.5)
        if "norm" in name and name.endswith("weight"):
            p.add_(1)
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=36, out_channels=16, text_dim=12,
        freq_dim=256, ffn_dim=64, num_layers=3, cross_attn_norm=True, image_dim=20,
        added_kv_proj_dim=48, qk_norm="rms_norm_across_heads", eps=1e-6)
    state = official_names(ours.state_dict(), "transformer", reverse=True)
    theirs.load_state_dict(state, strict=True)
    x, frames = (torch.randn(2, c, 2, 4, 6, generator=draw) for c in (16, 20))
    text, image = torch.randn(2, 512, 12, generator=draw), torch.randn(2, 257, 20, generator=draw)
    t = torch.rand(2, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        want = theirs(torch.cat([x, frames], 1), t.float() * 1000, text,
                      encoder_hidden_states_image=image, return_dict=False)[0]
    near(ours(x, t, {"text": text, "image": image, "frames": frames}), want)
    back = official_names(theirs.state_dict(), "transformer")
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], p) for name, p in ours.state_dict().items())


def test_full_size_names_and_shapes_equal_the_published_checkpoints():
    official, diffusers = (json.loads((FIXTURES / f"keys/wan_i2v_14b{s}.json").read_text())["keys"]
                           for s in ("", "_diffusers"))
    with torch.device("meta"):
        dit = build_dit("wan-i2v-14b")
    assert {name: list(p.shape) for name, p in dit.state_dict().items()} == official
    assert official_names(diffusers, "transformer") == official
    assert official_names(official, "transformer", reverse=True) == diffusers


# ------------------------------------------------------------- image encoder and conditioning

CLIP = safe_open(FIXTURES / "wan_clip.safetensors", "pt")
PIPELINE = safe_open(FIXTURES / "wan_i2v_pipeline.safetensors", "pt")


def fixture_weights(name: str, prefix: str = "") -> dict:
    tensors = open_tensors(FIXTURES / f"{name}.safetensors")
    start = f"weight.{prefix}"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


@pytest.fixture(scope="module")
def clip() -> CLIPVision:
    """The fixture's image tower without its last layer, with the official weights."""
    c = json.loads(CLIP.metadata()["config"])
    net = CLIPVision(c["vision_dim"], c["vision_dim"] * c["vision_mlp_ratio"],
                     c["vision_layers"] - 1, c["vision_heads"], c["patch_size"], c["image_size"])
    last = f"transformer.{c['vision_layers'] - 1}."
    weights = {n: t for n, t in fixture_weights("wan_clip", "visual.").items()
               if n != "head" and not n.startswith(("post_norm", last))}
    return load_module(net, weights, "fixture").requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    c = json.loads(safe_open(FIXTURES / "wan_vae.safetensors", "pt").metadata()["config"])
    names = {"dim": "dim", "z_dim": "z_dim", "dim_mult": "dim_mult",
             "num_res_blocks": "num_res_blocks", "temporal_down": "temperal_downsample"}
    net = WanVAE(**{ours: c[theirs] for ours, theirs in names.items() if theirs in c})
    return load_module(net, fixture_weights("wan_vae"), "fixture").requires_grad_(False)


def test_image_features_equal_the_official_tower(clip):
    near(clip(CLIP.get_tensor("in.a.pixels")), CLIP.get_tensor("out.a.hidden"))


@pytest.mark.parametrize("i", [0, 1])
def test_images_of_any_shape_are_resized_and_normalised_as_officially(clip, i):
    pixels = clip.pixels(CLIP.get_tensor(f"in.pre{i}.image")[None])
    near(pixels, CLIP.get_tensor(f"out.pre{i}.pixels"))
    near(clip(pixels), CLIP.get_tensor(f"out.pre{i}.hidden"))


CASES_I2V = json.loads(PIPELINE.metadata()["notes"])["cases"]


@pytest.mark.parametrize("case", CASES_I2V, ids=lambda case: case["name"])
def test_conditioning_of_an_image_equals_the_official_pipeline_s(clip, vae, case):
    image = PIPELINE.get_tensor(f"in.{case['name']}.image").permute(2, 0, 1) / 127.5 - 1
    height, width = fit_size(*case["image_hw"], case["max_area"])
    cond = image_cond(image, vae, clip, case["frames"], height, width)
    near(cond["frames"], PIPELINE.get_tensor(f"out.{case['name']}.y"))
    near(cond["image"], PIPELINE.get_tensor(f"out.{case['name']}.clip_fea")[0])


def test_few_step_sampling_from_an_image_equals_the_official_pipeline(official, clip, vae):
    case = next(case for case in CASES_I2V if case["name"] == "few_euler")
    image = PIPELINE.get_tensor("in.few_euler.image").permute(2, 0, 1) / 127.5 - 1
    height, width = fit_size(*case["image_hw"], case["max_area"])
    cond = {"text": PIPELINE.get_tensor("in.context"),
            **image_cond(image, vae, clip, case["frames"], height, width)}
    times = model.key_times("wan", case["steps"], case["shift"], list(range(0, 41, 4)))
    noise = PIPELINE.get_tensor("in.few_euler.noise")[None]
    *_, x = model.sample_euler(official, noise, times, model.collate([cond]))
    near(x[0], PIPELINE.get_tensor("out.few_euler.latent"), 2e-4)
    near(vae.decode(x)[0], PIPELINE.get_tensor("out.few_euler.video"), 2e-4)


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_any_number_of_frames_is_conditioned_on_the_first_alone(clip, vae, frames):
    image = torch.rand(3, 20, 30, generator=generator("image")) * 2 - 1
    cond = image_cond(image, vae, clip, frames, 32, 48)
    mask, latents = cond["frames"].split([4, 16])
    assert latents.shape == (16, 1 + (frames - 1) // 4, 4, 6)
    assert mask[:, 0].eq(1).all() and not mask[:, 1:].any()
    near(latents[:, :1], image_cond(image, vae, clip, 1, 32, 48)["frames"][4:])


@pytest.mark.parametrize("height, width, area, want", [
    (720, 1280, 480 * 832, (464, 832)), (1280, 720, 480 * 832, (832, 464)),
    (480, 832, 480 * 832, (480, 832)), (1000, 1000, 480 * 832, (624, 624)),
    (9, 4000, 512, (16, 32))])
def test_a_size_keeps_the_image_s_shape_within_the_area(height, width, area, want):
    assert fit_size(height, width, area) == want


def test_our_image_tower_equals_transformers_and_loads_both_layouts(clip, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel
    torch.manual_seed(3)
    theirs = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        image_size=32, patch_size=8, hidden_act="gelu", projection_dim=16)).eval()
    theirs.save_pretrained(tmp_path / "diffusers/image_encoder")
    ours = load_image_encoder(tmp_path / "diffusers")
    pixels = torch.randn(2, 3, 32, 32, generator=generator("pixels"))
    with torch.no_grad():
        near(ours(pixels), theirs(pixels, output_hidden_states=True).hidden_states[-2])
    state = {f"visual.{name}": p for name, p in ours.state_dict().items()}
    state |= {"visual.head": torch.zeros(32, 16), "log_scale": torch.zeros(()),
              "visual.transformer.2.norm1.weight": torch.zeros(32),
              "textual.token_embedding.weight": torch.zeros(4, 4)}
    config = {"dim": 32, "dim_ffn": 128, "num_layers": 3, "num_heads": 4, "patch": 8, "size": 32}
    (tmp_path / "official").mkdir()
    save_tensors(tmp_path / "official/models_clip_tiny.safetensors", state,
                       {"config": json.dumps(config)})
    assert torch.equal(load_image_encoder(tmp_path / "official")(pixels), ours(pixels))
    with pytest.raises(FileNotFoundError, match="no image encoder: expected models_clip"):
        load_image_encoder(FIXTURES)


def test_full_size_image_tower_has_the_published_names_and_shapes():
    keys, theirs = (json.loads((FIXTURES / f"keys/wan_clip_vit_h{s}.json").read_text())["keys"]
                    for s in ("", "_diffusers"))
    with torch.device("meta"):
        ours = CLIPVision()
    want = {name.removeprefix("visual."): shape for name, shape in keys.items()
            if name.startswith("visual.") and "transformer.31." not in name
            and not name.startswith(("visual.post_norm", "visual.head"))}
    assert {name: list(p.shape) for name, p in ours.state_dict().items()} == want
    lazy = {name: LazyTensor(tuple(shape), torch.float32, Path("x"), None)
            for name, shape in theirs.items()}
    renamed = {name.removeprefix("visual."): list(t.shape) for name, t in
               official_names(lazy, "image_encoder").items() if name.startswith("visual.")}
    for name, shape in want.items():  # the two embeddings lack leading ones
        assert [1] * (len(shape) - len(renamed[name])) + renamed[name] == shape
