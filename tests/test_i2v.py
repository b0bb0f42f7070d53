"""Image-to-video: the DiT's image path against the official numbers and against diffusers."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import model
from model import WanConfig, build_dit, generator

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = safe_open(FIXTURES / "wan_i2v_dit.safetensors", "pt")
MICRO = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, text_dim=12, text_len=512,
                  model_type="i2v", in_dim=36, image_dim=20)


def near(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    """Assert that two tensors differ by at most a part of the wanted one's largest value."""
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
    tensors = model.open_tensors(FIXTURES / "wan_i2v_dit.safetensors")
    with torch.device("meta"):
        dit = build_dit(WanConfig(**sizes, image_dim=clip_dim))
    return model.load_module(dit, {k.removeprefix("weight."): v for k, v in tensors.items()
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
def test_a_conditioning_without_its_image_is_an_error_that_says_so(official, name):
    cond = model.collate([fixture_cond("a", 0)])
    del cond[name]
    x, t = FIXTURE.get_tensor("in.a.x.0")[None], FIXTURE.get_tensor("in.a.t").double() / 1000
    with pytest.raises(ValueError, match=f"cond: got .*; an image-to-video DiT wants .*{name}"):
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
    state = model.official_names(ours.state_dict(), "transformer", reverse=True)
    theirs.load_state_dict(state, strict=True)
    x, frames = (torch.randn(2, c, 2, 4, 6, generator=draw) for c in (16, 20))
    text, image = torch.randn(2, 512, 12, generator=draw), torch.randn(2, 257, 20, generator=draw)
    t = torch.rand(2, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        want = theirs(torch.cat([x, frames], 1), t.float() * 1000, text,
                      encoder_hidden_states_image=image, return_dict=False)[0]
    near(ours(x, t, {"text": text, "image": image, "frames": frames}), want)
    back = model.official_names(theirs.state_dict(), "transformer")
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], p) for name, p in ours.state_dict().items())


def test_full_size_names_and_shapes_equal_the_published_checkpoints():
    official, diffusers = (json.loads((FIXTURES / f"keys/wan_i2v_14b{s}.json").read_text())["keys"]
                           for s in ("", "_diffusers"))
    with torch.device("meta"):
        dit = build_dit("wan-i2v-14b")
    assert {name: list(p.shape) for name, p in dit.state_dict().items()} == official
    assert model.official_names(diffusers, "transformer") == official
    assert model.official_names(official, "transformer", reverse=True) == diffusers
