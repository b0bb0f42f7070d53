"""The HunyuanVideo DiT against the official numbers and against diffusers, and its weight files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import model
from common.config import Shared, load_config
from common.names import OFFICIAL_DITS, fingerprint
from common.names import joined, official_names
from common.ranks import generator
from common.weights import LazyTensor, load_module, open_tensors
from model import PRESETS, HunyuanConfig, build_dit, check_model, load_dit

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = safe_open(FIXTURES / "hunyuan_dit.safetensors", "pt")
MICRO = HunyuanConfig(dim=48, ffn_dim=192, num_heads=2, num_double=2, num_single=3, text_dim=12,
                      text_len=9, pooled_dim=10, rope_dims=(4, 8, 12))


def near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Assert an absolute bound on the difference of two tensors."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max().item()
    print(f"absolute error {error:.1e} (tolerance {tolerance:.0e})")
    assert error <= tolerance


def micro_dit(*key, sizes: HunyuanConfig = MICRO) -> model.HunyuanDiT:
    """A small DiT with every parameter random, so that none is without effect."""
    dit, draw = build_dit(sizes), generator("micro", *key)
    with torch.no_grad():
        for name, p in dit.named_parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * p.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return dit.requires_grad_(False)


def micro_batch(*key, lengths: tuple[int, ...] = (5, 5)) -> tuple[Tensor, Tensor, dict]:
    """Latents, times and a conditioning of prompts of these lengths for `micro_dit`."""
    draw, B = generator("batch", *key), len(lengths)
    x = torch.randn(B, 16, 2, 4, 6, generator=draw)
    t = torch.rand(B, generator=draw, dtype=torch.float64)
    conds = [{"text": torch.randn(n, 12, generator=draw), "pooled": torch.randn(10, generator=draw),
              "guidance": torch.tensor(6.016)} for n in lengths]
    return x, t, model.collate(conds)


@pytest.fixture
def official(monkeypatch):
    """The fixture's network with its official weights, and its inputs.

    The machine that made it had an exp whose 13th and 107th frequency are the next fp32 numbers
    above the right ones; times 6016 that moves the output by 6e-5, so the test takes them, too.
    """
    w = model.frequencies(256, torch.float32).clone()
    w[[12, 106]] = torch.nextafter(w[[12, 106]], torch.tensor(2.0))
    monkeypatch.setattr(model, "frequencies", lambda dim, dtype, device: w)
    c = json.loads(FIXTURE.metadata()["config"])
    sizes = HunyuanConfig(
        dim=c["hidden_size"], ffn_dim=int(c["hidden_size"] * c["mlp_width_ratio"]),
        num_heads=c["heads_num"], num_double=c["mm_double_blocks_depth"],
        num_single=c["mm_single_blocks_depth"], text_dim=c["args"]["text_states_dim"],
        pooled_dim=c["args"]["text_states_dim_2"], rope_dims=tuple(c["rope_dim_list"]))
    tensors = open_tensors(FIXTURES / "hunyuan_dit.safetensors")
    with torch.device("meta"):
        dit = build_dit(sizes)
    load_module(dit, {k.removeprefix("weight."): v for k, v in tensors.items()
                            if k.startswith("weight.")}, "fixture")
    cond = {"text": FIXTURE.get_tensor("in.text_states"),
            "mask": FIXTURE.get_tensor("in.text_mask"),
            "pooled": FIXTURE.get_tensor("in.text_states_2"),
            "guidance": FIXTURE.get_tensor("in.guidance") / 1000}
    t = FIXTURE.get_tensor("in.t").double() / 1000
    return dit.requires_grad_(False), FIXTURE.get_tensor("in.latents"), t, cond


@pytest.fixture
def peer_frequencies(monkeypatch):
    """The frequencies of this CPU's own fp32 exp, as diffusers takes them (see `official`)."""
    monkeypatch.setattr(model, "frequencies", lambda dim, dtype, device: torch.exp(
        -math.log(10000) * torch.arange(dim // 2, dtype=dtype) / (dim // 2)))


# ----------------------------------------------------------------------------------- the DiT

def test_dit_and_its_taps_equal_the_official_network(official, products):
    dit, x, t, cond = official
    v, (double_0, single_1, single_2) = dit(x, t, cond, taps=(0, 3, 4))
    for name, got in (("velocity", v), ("feat_double_0", double_0), ("feat_single_1", single_1),
                      ("feat_single_2", single_2)):
        want = FIXTURE.get_tensor(f"out.{name}")  # features reach 12.6, where fp32 is coarser
        near(got, want, 1e-5 if name == "velocity" else 2e-6 * float(want.abs().max()))
    assert torch.equal(dit(x, t, cond), v)


def test_modulation_vector_refined_text_and_rotary_tables_equal_the_official_ones(official):
    dit, x, t, cond = official
    time = model.sinusoid(t * 1000, 256, torch.float32)
    near(dit.modulation_vector(time, cond), FIXTURE.get_tensor("out.vec"), 1e-5)
    refined = dit.txt_in(cond["text"], time, cond["mask"].bool())
    near(refined, FIXTURE.get_tensor("out.txt_refined"), 1e-5)  # padding, too
    table = model.rope_table(dit.token_grid(*x.shape[2:]), dit.cfg.rope_pairs, 256.0, "cpu")
    cos, sin = table.unbind(-1)
    near(cos[:, 0].repeat_interleave(2, 1), FIXTURE.get_tensor("out.freqs_cos"), 1e-6)
    near(sin[:, 0].repeat_interleave(2, 1), FIXTURE.get_tensor("out.freqs_sin"), 1e-6)


def test_prompts_cut_to_their_length_equal_the_official_padded_ones(official):
    dit, x, t, cond = official
    for i, n in enumerate(cond["mask"].sum(1).tolist()):
        alone = {name: c[i:i + 1] for name, c in cond.items() if name != "mask"}
        alone["text"] = alone["text"][:, :n]
        near(dit(x[i:i + 1], t[i:i + 1], alone)[0], FIXTURE.get_tensor("out.velocity")[i], 1e-5)


def test_what_stands_in_the_padding_never_changes_velocity_or_features(official):
    dit, x, t, cond = official
    other = cond["text"].clone()
    other[cond["mask"] == 0] = 100 * torch.randn(int((cond["mask"] == 0).sum()), other.shape[2])
    assert not torch.equal(other, cond["text"])
    v, (f,) = dit(x, t, cond, taps=(2,))
    v_other, (f_other,) = dit(x, t, cond | {"text": other}, taps=(2,))
    assert torch.equal(v, v_other) and torch.equal(f, f_other)


def test_a_batch_of_unequal_prompts_equals_the_prompts_one_by_one():
    dit, (x, t, cond) = micro_dit(), micro_batch(lengths=(7, 2, 5))
    assert cond["mask"].sum(1).tolist() == [7, 2, 5]
    v = dit(x, t, cond)
    for i, n in enumerate((7, 2, 5)):
        alone = {name: c[i:i + 1] for name, c in cond.items() if name != "mask"}
        alone["text"] = alone["text"][:, :n]
        near(v[i:i + 1], dit(x[i:i + 1], t[i:i + 1], alone), 1e-5)


def test_prompts_of_one_length_need_no_mask_and_a_mask_of_ones_changes_nothing():
    dit, (x, t, cond) = micro_dit(), micro_batch(lengths=(5, 5))
    assert "mask" not in cond
    near(dit(x, t, cond | {"mask": torch.ones(2, 5, dtype=torch.long)}), dit(x, t, cond), 1e-5)


def test_without_velocity_the_forward_stops_at_the_last_tap_with_the_same_features():
    dit, (x, t, cond), calls = micro_dit(), micro_batch(), []
    for b, block in enumerate(dit.blocks):
        block.register_forward_pre_hook(lambda *_, b=b: calls.append(b))
    _, whole = dit(x, t, cond, taps=(3, 1))
    assert calls == [0, 1, 2, 3, 4]
    calls.clear()
    nothing, features = dit(x, t, cond, taps=(3, 1), features_only=True)
    assert nothing is None and calls == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(features, whole, strict=True))
    assert features[0].shape == (2, 2 * 2 * 3, 48)  # image tokens only


@pytest.mark.parametrize("name", ["text", "pooled", "guidance"])
def test_every_part_of_the_conditioning_changes_the_velocity(name):
    dit, (x, t, cond) = micro_dit(), micro_batch()
    assert (dit(x, t, cond | {name: cond[name] * 1.5}) - dit(x, t, cond)).abs().max() > 1e-3


def test_a_conditioning_of_another_width_is_an_error_that_names_both():
    dit, (x, t, cond) = micro_dit(), micro_batch()
    with pytest.raises(ValueError, match=r"expected widths 12 and 10 .*text \(2, 5, 11\)"):
        dit(x, t, cond | {"text": cond["text"][:, :, :11]})


def test_activation_checkpointing_changes_no_gradient():
    dit, (x, t, cond), grads = micro_dit().requires_grad_(True), micro_batch(lengths=(3, 6)), []
    for on in (False, True):
        for block in dit.blocks:
            block.checkpointing = on
        dit.zero_grad()
        dit(x, t, cond).square().mean().backward()
        grads.append([p.grad.clone() for p in dit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_flops_equal_what_torch_counts_in_the_blocks():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    dit, (x, t, cond) = micro_dit(), micro_batch(lengths=(9,))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        dit(x, t, cond)
    counts = {name: sum(c.values()) for name, c in counter.flop_counts.items()}
    blocks = [f"{kind}_blocks.{i}" for kind, n in (("double", 2), ("single", 3)) for i in range(n)]
    modulation = 2 * 48 * 48 * (2 * 12 + 3 * 3)  # one vector a sample: not worth a term
    assert sum(counts[f"HunyuanDiT.{b}"] for b in blocks) - modulation == dit.flops(12)


def test_flops_of_the_full_model_are_those_of_the_cost_table():
    with torch.device("meta"):
        dit = build_dit("hunyuan-t2v")
    for tokens, tera in ((48960, 2455), (118800, 12069)):
        assert dit.flops(tokens) / 1e12 == pytest.approx(tera, rel=2e-4)


# ------------------------------------------------------------------------------- the schedule

def test_times_and_euler_steps_equal_the_official_scheduler():
    tensor = safe_open(FIXTURES / "hunyuan_schedule.safetensors", "pt").get_tensor
    for name, n in (("", 50), ("_few", 5)):
        times = model.time_grid("hunyuan", n, 7.0)
        torch.testing.assert_close(times.float(), tensor(f"out.sigmas{name}"), rtol=1e-6, atol=0)
        x = tensor("in.noise")
        for v, t, t_next, want in zip(tensor(f"in.velocities{name}"), times.tolist(),
                                      times[1:].tolist(), tensor(f"out.trajectory{name}"),
                                      strict=False):
            x = model.euler_step(x, v, t, t_next)
            near(x, want, 1e-5)
    key = model.key_times("hunyuan", 50, 7.0, list(range(0, 51, 10)))
    torch.testing.assert_close(key, model.time_grid("hunyuan", 5, 7.0).tolist())


# --------------------------------------------------------------- weight files, and diffusers

DIFFUSERS = dict(in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=24,
                 num_layers=2, num_single_layers=3, num_refiner_layers=2, mlp_ratio=4.0,
                 patch_size=2, patch_size_t=1, qk_norm="rms_norm", guidance_embeds=True,
                 text_embed_dim=12, pooled_projection_dim=10, rope_theta=256.0,
                 rope_axes_dim=(4, 8, 12))


def diffusers_velocity(network, x: Tensor, t: Tensor, cond: dict) -> Tensor:
    mask = cond.get("mask", torch.ones(cond["text"].shape[:2], dtype=torch.long))
    with torch.no_grad():
        return network(x, t.float() * 1000, cond["text"], mask, cond["pooled"],
                       cond["guidance"] * 1000, return_dict=False)[0]


def test_our_weights_run_in_diffusers_with_equal_output(peer_frequencies):
    from diffusers import HunyuanVideoTransformer3DModel
    ours, theirs = micro_dit("ours"), HunyuanVideoTransformer3DModel(**DIFFUSERS).eval()
    state = official_names(ours.state_dict(), "transformer", reverse=True)
    theirs.load_state_dict(state, strict=True)
    batch = micro_batch(lengths=(4, 7, 7))
    near(ours(*batch), diffusers_velocity(theirs, *batch), 2e-5)


def test_a_folder_saved_by_diffusers_loads_with_equal_output_and_one_fingerprint(
        tmp_path, peer_frequencies):
    from diffusers import HunyuanVideoTransformer3DModel
    torch.manual_seed(5)
    theirs = HunyuanVideoTransformer3DModel(**DIFFUSERS).eval()
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    batch, ours = micro_batch(lengths=(5, 3)), load_dit(tmp_path, MICRO)
    with torch.no_grad():
        near(ours(*batch), diffusers_velocity(theirs, *batch), 2e-5)
    again = official_names(ours.state_dict(), "transformer", reverse=True)
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], p) for name, p in theirs.state_dict().items())
    save_file(ours.state_dict(), tmp_path / "official.safetensors")
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "official.safetensors")


def test_full_size_names_and_shapes_equal_the_published_checkpoints():
    official = json.loads((FIXTURES / "keys/hunyuan_dit.json").read_text())["keys"]
    diffusers = json.loads((FIXTURES / "keys/hunyuan_dit_diffusers.json").read_text())["keys"]
    with torch.device("meta"):
        dit = build_dit("hunyuan-t2v")
        theirs = {name: torch.empty(shape) for name, shape in diffusers.items()}
    lazy = {name: LazyTensor(tuple(p.shape), p.dtype, Path("x"), None)
            for name, p in theirs.items()}
    assert {name: list(p.shape) for name, p in dit.state_dict().items()} == official
    renamed = official_names(lazy, "transformer")
    assert {name: list(p.shape) for name, p in renamed.items()} == official
    exported = official_names(dit.state_dict(), "transformer", reverse=True)
    assert {name: list(p.shape) for name, p in exported.items()} == diffusers


def test_rows_of_a_joined_tensor_are_those_of_the_whole(tmp_path):
    save_file({"a": torch.arange(6.).view(3, 2), "b": -torch.arange(4.).view(2, 2)},
              tmp_path / "x.safetensors")
    parts = open_tensors(tmp_path / "x.safetensors")
    both = joined([parts["a"], parts["b"]])
    whole = torch.cat([parts["a"].read(), parts["b"].read()])
    assert both.shape == (5, 2) and torch.equal(both.read(), whole)
    for start in range(5):
        for stop in range(start + 1, 6):
            assert torch.equal(both.read(slice(start, stop)), whole[start:stop])


@pytest.mark.parametrize("form", ["module", "ema", "bare"])
@pytest.mark.parametrize("place", OFFICIAL_DITS)
def test_official_folders_load_whatever_wraps_their_weights(place, form, tmp_path):
    dit, batch = micro_dit("folders"), micro_batch()
    state = dit.state_dict()
    (tmp_path / place).parent.mkdir(parents=True)
    if place.endswith(".pt"):
        torch.save(state if form == "bare" else {form: state}, tmp_path / place)
    else:
        save_file(state, tmp_path / place)
    assert torch.equal(load_dit(tmp_path, MICRO)(*batch), dit(*batch))


def test_a_preset_of_other_sizes_than_config_json_is_an_error(tmp_path):
    from diffusers import HunyuanVideoTransformer3DModel
    HunyuanVideoTransformer3DModel(**DIFFUSERS).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="num_single_layers is 3, preset .* has 4"):
        load_dit(tmp_path, replace(MICRO, num_single=4))


def test_a_preset_of_the_other_family_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'hunyuan-t2v' is of family hunyuan, got family 'wan'"):
        check_model(load_config(Shared, "sample", ["preset=hunyuan-t2v"]))
    assert all(sizes.family in ("wan", "hunyuan") for sizes in PRESETS.values())
