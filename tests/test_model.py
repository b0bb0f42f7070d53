"""model.py against the official numbers, against diffusers, and against everything users break."""

import ast
import dataclasses
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from conftest import Evil
from processes import in_processes
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend

import model
from common.config import STAGES, Shared, announce, field, load_config, settings_to_compare
from common.files import ROOT, read_json, replace_file, write_json, write_text
from common.names import dit_tensors, fingerprint
from common.names import official_names
from common.ranks import (
    SDPA_ORDER, Ranks, cli, generator, local_rows, pick_device, prefer_attention, seed_of)
from common.weights import load_module, open_tensors, save_tensors
from experts import shard_dit
from model import WanConfig, build_dit, load_dit
from training.checkpoint import Saver, latest_checkpoint, load_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
MICRO = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, text_dim=12, text_len=8)
KEYS_50 = list(range(0, 51, 5))


def near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Assert that two tensors differ by at most a part of the expected one's largest value."""
    assert got.shape == want.shape
    error = ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
    print(f"relative error {error:.1e} (tolerance {tolerance:.0e})")
    assert error <= tolerance


def fixture_file(name: str):
    """A parity fixture: tensor by name, its config and its notes."""
    f = safe_open(FIXTURES / f"{name}.safetensors", "pt")
    meta = {key: json.loads(f.metadata()[key]) for key in ("config", "notes")}
    return f.get_tensor, meta["config"], meta["notes"]


def fixture_weights(name: str) -> dict:
    tensors = open_tensors(FIXTURES / f"{name}.safetensors")
    return {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}


def wan_config(official: dict) -> WanConfig:
    """The sizes in an official constructor's arguments."""
    names = {f.name for f in dataclasses.fields(WanConfig)}
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in official.items() if k in names}
    return WanConfig(**sizes)


@pytest.fixture(scope="module")
def official_dit():
    """The DiT of the parity fixtures, with its official weights."""
    with torch.device("meta"):
        dit = build_dit(wan_config(fixture_file("wan_t2v_dit")[1]))
    return load_module(dit, fixture_weights("wan_t2v_dit"), "fixture")


def micro_dit(*key, preset: WanConfig = MICRO) -> model.WanDiT:
    """A small DiT with every parameter random, so that none is without effect."""
    dit = build_dit(preset)
    draw = generator("micro", *key)
    with torch.no_grad():
        for name, p in dit.named_parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * p.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return dit


def micro_batch(*key, B: int = 2, text_dim: int = 12) -> tuple[Tensor, Tensor, dict]:
    """Latents, times and a conditioning for `micro_dit`."""
    draw = generator("batch", *key)
    x = torch.randn(B, 16, 2, 4, 6, generator=draw)
    t = torch.rand(B, generator=draw, dtype=torch.float64)
    return x, t, {"text": torch.randn(B, 5, text_dim, generator=draw)}


# ----------------------------------------------------------------------------------- the DiT

@pytest.mark.parametrize("case", fixture_file("wan_t2v_dit")[2]["cases"], ids=lambda c: c["name"])
def test_dit_and_its_taps_equal_the_official_network(official_dit, case, products):
    tensor, name = fixture_file("wan_t2v_dit")[0], case["name"]
    blocks = tuple(case["feature_blocks"])
    for i in range(case["batch"]):
        x, t = tensor(f"in.{name}.x.{i}")[None], tensor(f"in.{name}.t")[i:i + 1].double() / 1000
        cond = {"text": tensor(f"in.{name}.context.{i}")[None]}
        with torch.no_grad():
            v, features = official_dit(x, t, cond, taps=blocks)
            assert torch.equal(official_dit(x, t, cond), v)
        near(v[0], tensor(f"out.{name}.v.{i}"), 2e-5)
        for b, feature in zip(blocks, features, strict=True):
            near(feature[0], tensor(f"out.{name}.feat{b}.{i}"), 2e-5)


def test_a_batch_equals_its_samples_one_by_one(official_dit):
    tensor = fixture_file("wan_t2v_dit")[0]
    x = torch.stack([tensor("in.b.x.0"), tensor("in.b.x.1")])
    cond = model.collate([{"text": tensor(f"in.b.context.{i}")} for i in range(2)])
    assert cond["text"].shape == (2, 24, 40) and not cond["text"][1, 3:].any()
    with torch.no_grad():
        v, (feature,) = official_dit(x, tensor("in.b.t").double() / 1000, cond, taps=(1,))
    for i in range(2):
        near(v[i], tensor(f"out.b.v.{i}"), 2e-5)
        near(feature[i], tensor(f"out.b.feat1.{i}"), 2e-5)


def test_without_velocity_the_forward_stops_at_the_last_tap_with_the_same_features():
    dit, (x, t, cond), calls = micro_dit(), micro_batch(), []
    for b, block in enumerate(dit.blocks):
        block.register_forward_pre_hook(lambda *_, b=b: calls.append(b))
    dit.head.register_forward_pre_hook(lambda *_: calls.append("head"))
    v, whole = dit(x, t, cond, taps=(1, 0))
    assert calls == [0, 1, 2, "head"] and v.shape == x.shape
    calls.clear()
    nothing, features = dit(x, t, cond, taps=(1, 0), features_only=True)
    assert nothing is None and calls == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(features, whole, strict=True))
    assert not torch.equal(features[0], features[1])  # in the order asked for


@pytest.mark.parametrize("taps", [(3,), (-1,), (0, 7)])
def test_a_tap_out_of_range_is_an_error_that_names_the_blocks(taps):
    with pytest.raises(ValueError, match=r"taps: expected blocks 0 … 2, got"):
        micro_dit()(*micro_batch(), taps=taps)


def test_latents_and_texts_that_do_not_fit_are_errors_that_name_sizes():
    dit, (x, t, cond) = micro_dit(), micro_batch()
    with pytest.raises(ValueError, match="2×3×6.*multiples of 16"):
        dit(x[:, :, :, :3], t, cond)
    with pytest.raises(ValueError, match=r"cond\['text'\].*at most 8, 12.*got \(2, 9, 12\)"):
        dit(x, t, {"text": torch.zeros(2, 9, 12)})


def test_weights_in_bf16_keep_the_residual_stream_and_the_velocity_fp32():
    x, t, cond = micro_batch()
    with torch.no_grad():
        v, (feature,) = micro_dit().bfloat16()(x, t, cond, taps=(2,))
        near(v, micro_dit()(x, t, cond), 3e-2)
    assert v.dtype == feature.dtype == torch.float32


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        dit, (x, t, cond) = micro_dit(), micro_batch()
        for block in dit.blocks:
            block.checkpointing = checkpointing
        dit(x.requires_grad_(), t, cond).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in dit.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_forward_in_inference_mode_does_not_spoil_a_later_backward():
    model.rope_table.cache_clear()
    dit, batch = micro_dit(), micro_batch()
    with torch.inference_mode():
        dit(*batch)
    dit(*batch).sum().backward()


def test_initialisation_is_a_function_of_its_generator_and_starts_at_zero_velocity():
    dits = [build_dit(MICRO) for _ in range(2)]
    for dit in dits:
        dit.init_weights(generator("init", 3))
    for a, b in zip(dits[0].parameters(), dits[1].parameters(), strict=True):
        assert torch.equal(a, b)
    state = dits[0].state_dict()
    bound = (6 / (MICRO.dim + MICRO.ffn_dim)) ** 0.5  # Xavier, uniform
    assert 0.95 * bound < state["blocks.0.ffn.0.weight"].abs().max() <= bound
    assert state["time_embedding.0.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert state["blocks.0.modulation"].std() == pytest.approx(MICRO.dim ** -0.5, rel=0.15)
    assert not dits[0](*micro_batch()).any()


def test_flops_equal_what_torch_counts_in_the_blocks():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    dit, (x, t, cond) = micro_dit(), micro_batch(B=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        dit(x, t, cond)
    blocks = [sum(counter.flop_counts[f"WanDiT.blocks.{b}"].values()) for b in range(3)]
    assert dit.flops(tokens=2 * 2 * 3) == sum(blocks)


# --------------------------------------------------------------------- live against diffusers

DIFFUSERS = dict(num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16,
                 text_dim=12, freq_dim=256, ffn_dim=64, num_layers=3, cross_attn_norm=True,
                 qk_norm="rms_norm_across_heads", eps=1e-6)


def diffusers_velocity(network, x: Tensor, t: Tensor, cond: dict) -> Tensor:
    text = torch.nn.functional.pad(cond["text"], (0, 0, 0, MICRO.text_len - 5))
    with torch.no_grad():
        return network(x, t.float() * 1000, text, return_dict=False)[0]


def test_our_weights_run_in_diffusers_with_equal_output():
    from diffusers import WanTransformer3DModel
    ours, theirs = micro_dit("ours"), WanTransformer3DModel(**DIFFUSERS)
    state = official_names(ours.state_dict(), "transformer", reverse=True)
    theirs.load_state_dict(state, strict=True)
    batch = micro_batch(B=3)
    with torch.no_grad():
        near(ours(*batch), diffusers_velocity(theirs, *batch), 2e-5)


def test_a_folder_saved_by_diffusers_loads_with_equal_output(tmp_path):
    from diffusers import WanTransformer3DModel
    torch.manual_seed(5)
    theirs = WanTransformer3DModel(**DIFFUSERS)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    batch = micro_batch(B=3)
    for weights in (tmp_path, tmp_path / "transformer"):
        with torch.no_grad():
            near(load_dit(weights, MICRO)(*batch), diffusers_velocity(theirs, *batch), 2e-5)


@pytest.mark.parametrize("preset,keys", [("wan-t2v-1.3b", "wan_t2v_1_3b"),
                                         ("wan-t2v-14b", "wan_t2v_14b")])
def test_full_size_names_and_shapes_equal_the_published_checkpoints(preset, keys):
    official = json.loads((FIXTURES / f"keys/{keys}.json").read_text())["keys"]
    diffusers = json.loads((FIXTURES / f"keys/{keys}_diffusers.json").read_text())["keys"]
    with torch.device("meta"):
        dit = build_dit(preset)
    assert {name: list(p.shape) for name, p in dit.state_dict().items()} == official
    assert official_names(diffusers, "transformer") == official
    assert official_names(official, "transformer") == official
    assert official_names(official, "transformer", reverse=True) == diffusers


# ---------------------------------------------------------------- schedules and the pipeline

def euler_times(name: str) -> list[float]:
    s = next(s for s in fixture_file("wan_schedule")[1]["schedules"] if s["name"] == name)
    key = s.get("subset", list(range(s["steps"] + 1)))
    return model.key_times("wan", s["steps"], s["shift"], key)


@pytest.mark.parametrize("name", ["euler_t2v_50", "euler_t2v_few", "euler_i2v_40",
                                  "euler_i2v_few"])
def test_times_equal_the_official_euler_schedule(name):
    tensor, times = fixture_file("wan_schedule")[0], torch.tensor(euler_times(name)).double()
    torch.testing.assert_close(times.float(), tensor(f"out.{name}.sigmas"), rtol=1e-6, atol=0)
    steps = (times[:-1] * 1000).float()
    torch.testing.assert_close(steps, tensor(f"out.{name}.timesteps"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["euler_t2v_50", "euler_t2v_few", "euler_i2v_few"])
def test_euler_step_reproduces_a_stored_trajectory(name):
    tensor, times = fixture_file("wan_schedule")[0], euler_times(name)
    x, velocities = tensor(f"in.{name}.x"), tensor(f"in.{name}.v")
    for k, wanted in enumerate(tensor(f"out.{name}.x")):
        x = model.euler_step(x, velocities[k], times[k], times[k + 1])
        near(x, wanted, 1e-6)


@pytest.mark.parametrize("n,m,shift", [(50, 5, 7.0), (50, 10, 5.0), (40, 10, 3.0), (48, 1, 9.0)])
def test_m_step_key_times_are_every_n_over_m_th_of_the_grid(n, m, shift):
    grid = model.time_grid("wan", n, shift)
    assert grid.dtype == torch.float64 and len(grid) == n + 1
    assert grid[0] == 1 and grid[-1] == 0 and bool((grid.diff() < 0).all())
    key = list(range(0, n + 1, n // m))
    assert model.key_times("wan", n, shift, key) == grid[::n // m].tolist()


@pytest.mark.parametrize("key", [[], [0], [0, 10], [1, 50], [0, 30, 20, 50], [0, 0, 50],
                                 [0, 20, 60]])
def test_key_indices_that_do_not_rise_from_0_to_n_are_an_error(key):
    with pytest.raises(ValueError, match="key: expected indices rising from 0 to n=50, got"):
        model.key_times("wan", 50, 5.0, key)


def test_a_grid_of_another_family_is_an_error():
    with pytest.raises(ValueError, match="family: expected wan or hunyuan, got 'won'"):
        model.time_grid("won", 10, 5.0)


def recording(dit) -> tuple:
    """A DiT that notes the official timestep of each call."""
    steps = []

    def call(x, t, cond):
        steps.append(t[0].item() * 1000)
        return dit(x, t, cond)
    return call, steps


def decoded(latent: Tensor) -> Tensor:
    """A latent [C,T,H,W] through the VAE of the parity fixtures."""
    from frozen.vae import WanVAE
    config = fixture_file("wan_vae")[1]
    vae = WanVAE(dim=config["dim"], z_dim=config["z_dim"], dim_mult=tuple(config["dim_mult"]),
                 num_res_blocks=config["num_res_blocks"],
                 temporal_down=tuple(config["temperal_downsample"]))
    load_module(vae, fixture_weights("wan_vae"), "fixture")
    with torch.no_grad():
        return vae.decode(latent[None])[0]


def test_few_step_sampling_equals_the_official_pipeline(official_dit):
    tensor = fixture_file("wan_t2v_pipeline")[0]
    dit, steps = recording(official_dit)
    times = model.key_times("wan", 50, 5.0, KEYS_50)
    *_, x = model.sample_euler(dit, tensor("in.few_euler.noise")[None], times,
                       {"text": tensor("in.context")[None]})
    assert steps == pytest.approx(tensor("out.few_euler.model_t").tolist(), rel=1e-6)
    near(x[0], tensor("out.few_euler.latent"), 2e-5)
    near(decoded(x[0]), tensor("out.few_euler.video"), 2e-5)


def test_guidance_is_the_formula_and_scale_1_asks_the_network_once(official_dit):
    tensor, (dit, steps) = fixture_file("wan_t2v_pipeline")[0], recording(official_dit)
    cond, uncond = ({"text": tensor(n)[None]} for n in ("in.context", "in.context_null"))
    x, times = tensor("in.cfg_unipc.noise")[None], model.key_times("wan", 50, 5.0, [0, 20, 50])
    wanted = x.double()
    with torch.no_grad():
        for t, t_next in ((times[0], times[1]), (times[1], times[2])):
            both = [official_dit(wanted.float(), torch.tensor([t]), c).double()
                    for c in (cond, uncond)]
            wanted = wanted + (t_next - t) * (both[1] + 6 * (both[0] - both[1]))
    *_, got = model.sample_euler(dit, x, times, cond, uncond, cfg_scale=6.0)
    near(got, wanted, 2e-5)
    assert len(steps) == 4
    once = model.velocity(dit, x, 0.5, cond, uncond, cfg_scale=1.0)
    assert len(steps) == 5 and torch.equal(once, model.velocity(dit, x, 0.5, cond))


# -------------------------------------------------------------------------- reading weights

def shards(folder: Path, state: dict, config: dict, parts: int = 3) -> Path:
    """Write a folder as the releases are: shards, their index, config.json."""
    folder.mkdir(parents=True)
    weight_map, names = {}, sorted(state)
    for part in range(parts):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = names[part::parts]
        save_file({n: state[n] for n in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


OFFICIAL_CONFIG = {"_class_name": "WanModel", "dim": 48, "eps": 1e-6, "ffn_dim": 64,
                   "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 2,
                   "num_layers": 3, "out_dim": 16, "text_len": 8}
FORMS = ["official", "official single", "diffusers", "safetensors", "pth", "module", "ema",
         "state_dict"]


def written(form: str, folder: Path, state: dict) -> Path:
    """Write a state dict in one of the layouts that users have."""
    if form == "official":
        root = shards(folder / form, state, OFFICIAL_CONFIG)
        save_file({"other": torch.ones(2)}, root / "Wan2.1_VAE.safetensors")
        return root
    if form == "official single":
        (folder / form).mkdir()
        save_file(state, folder / form / "diffusion_pytorch_model.safetensors")
        (folder / form / "config.json").write_text(json.dumps(OFFICIAL_CONFIG))
        return folder / form
    if form == "diffusers":
        theirs = official_names(state, "transformer", reverse=True)
        shards(folder / form / "transformer", theirs, {"_class_name": "WanTransformer3DModel",
                                                       **DIFFUSERS, "patch_size": [1, 2, 2]})
        (folder / form / "vae").mkdir()
        return folder / form
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    torch.save(state if form == "pth" else {form: state, "step": 7}, folder / f"{form}.pth")
    return folder / f"{form}.pth"


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_loads_to_equal_outputs_and_one_fingerprint(form, tmp_path):
    dit, batch = micro_dit("layouts"), micro_batch()
    weights = written(form, tmp_path, dit.state_dict())
    loaded = load_dit(weights, MICRO)
    assert torch.equal(loaded(*batch), dit(*batch))
    plain = written("safetensors", tmp_path, dit.state_dict())
    assert fingerprint(weights) == fingerprint(plain)
    assert load_dit(weights, MICRO, dtype=torch.bfloat16).head.head.weight.dtype == torch.bfloat16


def test_fingerprints_of_different_models_differ(tmp_path):
    prints = []
    for seed in range(2):
        save_tensors(tmp_path / f"{seed}.safetensors", micro_dit(seed).state_dict(), {})
        prints.append(fingerprint(tmp_path / f"{seed}.safetensors"))
    assert prints[0] != prints[1]


def test_saved_tensors_come_back_with_their_metadata(tmp_path):
    path = tmp_path / "new" / "student.safetensors"
    save_tensors(path, {"a": torch.arange(6.).view(2, 3).T, "b": torch.ones(3, 0)},
                 {"accvideo": "{}"})
    assert safe_open(path, "pt").metadata() == {"accvideo": "{}"}
    lazy = open_tensors(path)["a"]
    assert lazy.shape == (3, 2) and lazy.dtype == torch.float32
    assert lazy.read(slice(1, 2)).tolist() == [[1.0, 4.0]]
    assert open_tensors(path)["b"].read().shape == (3, 0)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("form", ["official", "diffusers", "safetensors", "pth"])
@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen", "nan"])
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(form, fault, tmp_path):
    state, name = micro_dit().state_dict(), "blocks.1.self_attn.q.weight"
    if fault == "missing":
        del state[name]
    elif fault == "extra":
        name = "blocks.1.self_attn.lora.weight"
        state[name] = torch.ones(2)
    elif fault == "misshapen":
        state[name] = state[name][:40].clone()
    else:
        state[name][3, 5] = float("nan")
    says = {"missing": "misses 1 tensor", "extra": "has unknown 1 tensor",
            "misshapen": r"float32 \[40, 48\], expected \[48, 48\]",
            "nan": "NaN or infinity"}[fault]
    with pytest.raises(ValueError, match=says) as e:
        load_dit(written(form, tmp_path, state), MICRO)
    assert name in str(e.value) and str(tmp_path) in str(e.value)


def test_a_value_too_large_for_the_dtype_asked_for_is_an_error(tmp_path):
    state = micro_dit().state_dict()
    state["blocks.0.ffn.0.bias"][0] = 1e6
    path = written("safetensors", tmp_path, state)
    load_dit(path, MICRO, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="blocks.0.ffn.0.bias.*infinity as torch.float16"):
        load_dit(path, MICRO, dtype=torch.float16)


@pytest.mark.parametrize("form", ["safetensors", "pth", "official"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(form, kept, tmp_path):
    path = written(form, tmp_path, micro_dit().state_dict())
    file = path if path.is_file() else sorted(path.glob("*00002-of-*.safetensors"))[0]
    os.truncate(file, int(file.stat().st_size * kept))
    says = "not a complete safetensors|cannot be read as weights"
    with pytest.raises(ValueError, match=says) as e:
        load_dit(path, MICRO)
    assert str(file) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pth_is_never_run(zipped, tmp_path):
    target = tmp_path / "run"
    state = {**micro_dit().state_dict(), "evil": Evil(str(target))}
    torch.save(state, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="evil.pth: cannot be read as weights .*code.*never read"):
        load_dit(tmp_path / "evil.pth", MICRO)
    assert not target.exists()


@pytest.mark.parametrize("content", [{"a": 3}, [1, 2], {"state_dict": {"a": "b"}}])
def test_a_pth_of_other_things_than_tensors_is_an_error(content, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth: expected tensors by name"):
        load_dit(tmp_path / "odd.pth", MICRO)


def test_a_missing_shard_is_an_error_that_names_it(tmp_path):
    path = written("official", tmp_path, micro_dit().state_dict())
    (path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors: no such"):
        load_dit(path, MICRO)


def test_a_shard_without_what_its_index_promises_is_an_error(tmp_path):
    path = written("official", tmp_path, micro_dit().state_dict())
    save_file({"x": torch.ones(1)}, path / "diffusion_pytorch_model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match="index.json: .*should be in .*00002.*and is not"):
        load_dit(path, MICRO)


@pytest.mark.parametrize("form,key", [("official", "num_layers is 3"),
                                      ("official single", "num_layers is 3"),
                                      ("diffusers", "num_layers is 3")])
def test_a_preset_of_other_sizes_than_config_json_is_an_error(form, key, tmp_path, monkeypatch):
    monkeypatch.setitem(model.PRESETS, "deep", replace(MICRO, num_layers=4))
    path = written(form, tmp_path, micro_dit().state_dict())
    with pytest.raises(ValueError, match=f"config.json: {key}, preset 'deep' has 4"):
        load_dit(path, "deep")


def test_a_folder_without_weights_and_an_unknown_preset_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected one .safetensors file, or shards"):
        load_dit(tmp_path, MICRO)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_dit(tmp_path / "nowhere", MICRO)
    with pytest.raises(ValueError, match="preset: .*got 'wan-t2v-1.3'; did you mean '.*-1.3b'"):
        build_dit("wan-t2v-1.3")


# ------------------------------------------------------------------- processes and sharding

def gradients(dit) -> dict[str, Tensor]:
    """A network's gradients by name (a process's part of each, if sharded), then none are left."""
    grads = {n: p.grad for n, p in dit.named_parameters() if p.grad is not None}
    dit.zero_grad()
    return grads


def worst(got: dict, want: dict) -> float:
    """The largest relative difference of tensors by name; of sharded ones, this process's part."""
    assert got.keys() == want.keys()
    errors = [0.0]
    for name, whole in want.items():
        part, rows = local_rows(got[name])
        if part.numel():
            difference = part - (whole if rows is None else whole[rows])
            errors.append((difference.abs().max() / whole.abs().max().clamp_min(1e-12)).item())
    return max(errors)


def trained_through(student, teacher, batch) -> dict[str, Tensor]:
    """The student's gradient by way of a frozen teacher's features of what it generates."""
    x, t, cond = batch
    teacher.requires_grad_(False)
    x_gen = x + student(x, t, cond)
    _, features = teacher(x_gen, t, cond, taps=(0, 1), features_only=True)
    sum(f.square().mean() for f in features).backward()
    return gradients(student)


def sharded_process(ranks: Ranks, folder: Path) -> None:
    """What each of several processes measures, for the tests below; writes rank<r>.json."""
    x, t, cond = micro_batch()
    plain, rows = load_dit(folder, MICRO), {}
    with torch.device("meta"):
        dit = shard_dit(build_dit(MICRO), ranks)
    tensors = {}
    for name, lazy in dit_tensors(folder).items():
        def read(part=None, name=name, lazy=lazy):
            value = lazy.read(part)
            rows[name] = rows.get(name, 0) + len(value)
            return value
        tensors[name] = replace(lazy, read=read)
    load_module(dit, tensors, "test")
    out = {"world": ranks.world, "rank": ranks.rank, "rows": rows}

    v, features = dit(x, t, cond, taps=(0, 2))
    v_plain, features_plain = plain(x, t, cond, taps=(0, 2))
    out["forward"] = worst({"v": v, "0": features[0], "2": features[1]},
                           {"v": v_plain, "0": features_plain[0], "2": features_plain[1]})
    (v * x).sum().backward()
    (v_plain * x).sum().backward()
    wanted = gradients(plain)
    out["gradient"] = worst(gradients(dit), wanted)
    for block in dit.blocks:
        block.checkpointing = True
    (dit(x, t, cond) * x).sum().backward()
    out["checkpointed"] = worst(gradients(dit), wanted)

    teacher = load_dit(folder, MICRO, ranks=ranks)
    got = trained_through(dit, teacher, (x, t, cond))
    want = trained_through(plain, load_dit(folder, MICRO), (x, t, cond))
    out["early stop"] = worst(got, want)

    state = dit.state_dict()
    saver = Saver(folder / "run", ranks, keep=2)
    saver.save(3, state, {"loss": 0.5})
    saver.wait()
    path = saver.path
    with torch.no_grad():
        for p in dit.parameters():
            p.zero_()
    load_checkpoint(path, state)
    out["checkpoint"] = worst(dit.state_dict(), plain.state_dict())
    write_json(folder / f"rank{ranks.rank}.json", out)
    dist.barrier()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with a DiT, and what two processes measured with it."""
    folder = tmp_path_factory.mktemp("fsdp")
    save_file(micro_dit("fsdp").state_dict(), folder / "diffusion_pytorch_model.safetensors")
    in_processes(2, sharded_process, folder)
    return folder, [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)]


@pytest.mark.parametrize("what", ["forward", "gradient", "checkpointed", "early stop",
                                  "checkpoint"])
def test_two_sharded_processes_equal_one_plain_network(what, two_processes):
    for rank, out in enumerate(two_processes[1]):
        assert (out["rank"], out["world"]) == (rank, 2)
        print(f"relative error {out[what]:.1e}")
        assert out[what] <= (1e-5 if what == "early stop" else 1e-6)  # it is two networks deep


def test_each_process_reads_only_the_rows_it_keeps(two_processes):
    shapes = {name: p.shape for name, p in micro_dit().state_dict().items()}
    for name, shape in shapes.items():
        read = [out["rows"].get(name, 0) for out in two_processes[1]]
        assert sum(read) == shape[0] and max(read) <= (shape[0] + 1) // 2, name


def test_a_checkpoint_of_two_processes_loads_in_one(two_processes, ranks):
    folder, _ = two_processes
    path, meta = latest_checkpoint(folder / "run", ranks)
    state = {n: torch.zeros_like(p) for n, p in micro_dit().state_dict().items()}
    load_checkpoint(path, state)
    want = micro_dit("fsdp").state_dict()
    assert meta["step"] == 3 and meta["loss"] == 0.5
    assert all(torch.equal(state[n], want[n]) for n in want)


def test_one_process_alone_takes_the_same_sharded_path(ranks, tmp_path):
    save_file(micro_dit().state_dict(), tmp_path / "one.safetensors")
    dit = load_dit(tmp_path / "one.safetensors", MICRO, ranks=ranks)
    assert ranks.world == 1 and isinstance(dit.head.modulation, DTensor)
    assert torch.equal(dit(*micro_batch()), micro_dit()(*micro_batch()))


def test_an_unknown_device_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="device: expected .*, got 'gpu'"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: .*, got 'cuda' with 0 GPU"):
            pick_device("cuda")


# ------------------------------------------------------------- run checkpoints, writing files

def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_full_disk_leaves_nothing_and_the_old_file_whole(small_disk):
    save_tensors(small_disk / "a.safetensors", {"w": torch.ones(10)}, {})
    for write in (lambda: save_tensors(small_disk / "a.safetensors",
                                             {"w": torch.ones(100_000)}, {}),
                  lambda: write_text(small_disk / "b.txt", "x" * 300_000)):
        with pytest.raises(ValueError, match="cannot be written .*space.*another folder"):
            write()
    assert names_in(small_disk) == ["a.safetensors"]
    assert open_tensors(small_disk / "a.safetensors")["w"].read().sum() == 10


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/log.json: cannot be written"):
        write_json(tmp_path / "file" / "log.json", {})


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def write(path):
        path.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "a.txt", write)
    assert names_in(tmp_path) == []


def test_broken_json_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="a.json: is not valid JSON"):
        read_json(tmp_path / "a.json")


# ------------------------------------------------------------------------- seeding and shapes

def test_a_draw_is_a_function_of_its_key_alone():
    torch.manual_seed(1)
    first = torch.randn(4, generator=generator("noise", 0, 7))
    torch.manual_seed(2)
    torch.randn(3)
    state = torch.get_rng_state()
    assert torch.equal(first, torch.randn(4, generator=generator("noise", 0, 7)))
    assert torch.equal(state, torch.get_rng_state())
    others = [("noise", 0, 8), ("noise", 1, 7), ("noise", "0", 7), ("noise", 7, 0), ("noise", 0),
              ("noise", 0, 7, ""), ("noise0", 7)]
    seeds = {seed_of(*key) for key in [("noise", 0, 7), *others]}
    assert len(seeds) == 8 and all(0 <= s < 2 ** 63 for s in seeds)


def test_seeds_never_change_between_versions():
    """Stored trajectories are identified by them."""
    assert seed_of("synvid", 0, 3, "a red circle · 圆") == 467499558069157233


def test_latent_sizes_follow_the_video_and_others_are_errors_with_the_nearest():
    assert model.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert model.latent_shape(1, 16, 16) == (16, 1, 2, 2)
    for sizes, says in (((80, 480, 832), "frames: expected 4n [+] 1, as 81, got 80"),
                        ((0, 48, 48), "frames: expected 4n [+] 1, as 1, got 0"),
                        ((9, 40, 48), "height: expected 16n, as 32, got 40"),
                        ((9, 48, 8), "width: expected 16n, as 16, got 8")):
        with pytest.raises(ValueError, match=says):
            model.latent_shape(*sizes)


# ------------------------------------------------------------------------------------- config

@dataclass
class Config(Shared):
    lr: float = field(5e-6, "learning rate")
    steps: int = field(10, "iterations")
    heads: str = field("shared", "heads")
    adv: bool = field(True, "adversarial loss")
    queue: int | None = field(None, "length; none: no queue")
    scales: list[float] = field([1.0], "scales")
    form: Literal["hinge", "printed"] = field("hinge", "loss")


def config(tmp_path: Path, text: str, *argv: str) -> Config:
    (tmp_path / "c.yaml").write_text(text)
    return load_config(Config, "distill", [str(tmp_path / "c.yaml"), *argv], "Doc.")


def test_a_config_is_its_defaults_its_file_and_its_command_line_in_this_order(tmp_path):
    cfg = config(tmp_path, "n: 40\nkey: [0, 20, 40]\ndistill:\n  lr: 5e-6\n  steps: 1e3\n"
                 "  adv: no\n  scales: [1, 2.5]\nsynvid: {count: 3}\n",
                 "--n=20", "--key", "0,10,20", "--steps", "7", "--adv", "--queue=12",
                 "--negative-prompt", "--a 'b' <c>")
    assert (cfg.n, cfg.key, cfg.lr, cfg.steps, cfg.adv) == (20, [0, 10, 20], 5e-6, 7, True)
    assert (cfg.scales, cfg.queue, cfg.negative_prompt) == ([1.0, 2.5], 12, "--a 'b' <c>")
    assert (cfg.heads, cfg.width) == ("shared", 48)


@pytest.mark.parametrize("argv,key,value", [
    (["--adv"], "adv", True), (["--adv", "--steps", "3"], "adv", True),
    (["--adv", "steps=3"], "adv", True), (["--adv", "negative-prompt=a"], "adv", True),
    (["--negative-prompt", "steps=3"], "negative_prompt", "steps=3"),
    (["--adv=false"], "adv", False), (["--adv", "off"], "adv", False),
    (["--queue", "none"], "queue", None), (["--queue", "3"], "queue", 3),
    (["--lr", "5e-6"], "lr", 5e-6), (["--lr", "1"], "lr", 1.0), (["--steps", "1e3"], "steps", 1000),
    (["--scales", "1 2"], "scales", [1.0, 2.0]), (["--scales=0.5,2"], "scales", [0.5, 2.0]),
    (["--scales=[0.5, 2]"], "scales", [0.5, 2.0]), (["--queue", "None"], "queue", None),
    (["--seed", str(2 ** 62 + 1)], "seed", 2 ** 62 + 1), (["--heads="], "heads", ""),
    (["--shift", "3"], "shift", 3.0), (["--shift", ".5e1"], "shift", 5.0),
    (["--form=printed"], "form", "printed"),
    (["--heads", "-1"], "heads", "-1")])
def test_command_line_values_get_their_fields_type(tmp_path, argv, key, value):
    got = getattr(config(tmp_path, "", *argv), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("yaml,says", [
    ("heigth: 48", "unknown key 'heigth'; did you mean 'height'"),
    ("distill: {stepz: 3}", "unknown key 'distill.stepz'; did you mean 'steps'"),
    ("destill: {steps: 3}", "unknown key 'destill'; did you mean 'distill'"),
    ("lr: 1e-5", "lr: is a setting of one stage: indent it under distill:"),
    ("distill: 3", "distill: expected keys"), ("- a", r"expected keys with values, got \['a'\]"),
    ("n: true", "n: expected int, got True"), ("n: 3.5", "n: expected int, got 3.5"),
    ("n: '3.5'", "n: expected int, got '3.5'"), ("n: null", "n: expected int, got None"),
    ("n: [1]", r"n: expected int, got \[1\]"), ("n: x", "n: expected int, got 'x'"),
    ("n: .inf", "n: expected int, got '.inf'"), ("n: 1/0", "n: expected int, got '1/0'"),
    ("shift: .nan", "shift: expected float, got"), ("shift: abc", "shift: expected float, got"),
    ("shift: 1/0", "shift: expected float, got '1/0'"), ("shift: 1e999", "float, got inf"),
    ("shift: .inf", "shift: expected float, got"), ("shift: true", "shift: expected float"),
    ("shift: 1_0", "shift: expected float, got '1_0'"), ("fps: 010", "fps: expected float, got"),
    ("run: true", "run: expected str, got True"), ("distill: {adv: maybe}", "adv: expected bool"),
    ("key: 3", r"key: expected list\[int\], got 3"), ("key: [0, x]", "key: expected int, got 'x'"),
    ("key: [0, 20]", r"key: expected indices rising from 0 to n=50, got \[0, 20\]"),
    ("frames: 8", "frames: expected 4n .*got 8"), ("height: 50", "height: .*got 50"),
    ("distill: {form: hinges}", r"form: expected hinge \| printed, got"),
    ("n: 010", "n: expected int, got '010'"), ("n: 1:30", "n: expected int, got '1:30'"),
    ("n: 2026-01-01", "n: expected int, got '2026"), ("n: 1e999999999", "n: expected int"),
    ("n: 4\nn: 5", "key 'n' is given twice: keep one"),
    ("n: 0", r"n: expected a number in \[1, 10000\]"),
    ("n: " + "9" * 5000, "is not valid YAML"), ("fps: 0", r"fps: expected a number in \(0, 1000\]"),
    ("distill: {adv: true, adv: false}", "key 'adv' is given twice"),
    ("distill: {adv: [true]}", r"adv: expected bool, got \['?[Tt]rue"),
    ("run: " + "[" * 5000, "is not valid YAML"),
    ("n: [" + "7," * 9999 + "7]", r"n: expected int, got \[7, (7, )+\.\.\.\]"),
    ("a: b: c", "is not valid YAML"), ("family: wam", "family: expected wan \\| hunyuan")])
def test_a_wrong_config_is_an_error_that_names_file_key_and_value(tmp_path, yaml, says):
    with pytest.raises(ValueError, match=says):
        model.check_model(config(tmp_path, yaml))


@pytest.mark.parametrize("argv,says", [
    (["--stepz", "3"], "unknown option '--stepz'; did you mean 'steps'"),
    (["steps", "3"], "unknown option 'steps'"), (["-n", "3"], "unknown option '-n'"),
    (["--steps"], "'--steps': expected a value"),
    (["--steps", "many"], "command line: steps: expected int, got 'many'"),
    (["--steps", "1/0"], "command line: steps: expected int, got '1/0'"),
    (["--adv=perhaps"], "command line: adv: expected bool, got")])
def test_a_wrong_command_line_is_an_error_that_names_the_option(tmp_path, argv, says):
    with pytest.raises(ValueError, match=says):
        config(tmp_path, "", *argv)


def test_a_config_file_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match="configs/tinny.yaml: no such config"):
        load_config(Config, "distill", ["configs/tinny.yaml"])


def test_help_lists_every_field_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as e:
        load_config(Config, "lora", ["--help"], "What it does.")
    said = capsys.readouterr().out
    assert e.value.code == 0 and "What it does." in said and "python lora.py" in said
    assert "at the end of each line is that of" in said and "configs/tiny.yaml" in said
    assert re.search(r"--shift .*\[2.0\]", said)  # the file's, which a command takes
    for f in dataclasses.fields(Config):
        assert f"--{f.name} " in said and f.metadata["help"] in said
    assert "[5e-06]" in said and "[none]" in said


def test_help_after_a_config_shows_that_file_s_values(tmp_path, capsys):
    with pytest.raises(SystemExit):
        config(tmp_path, "height: 80\ndistill: {lr: 7e-3}", "--steps", "3", "--help")
    said = capsys.readouterr().out
    assert f"is that of {tmp_path}" in said and "[80]" in said and "[0.007]" in said
    assert re.search(r"--steps .*\[3\]", said)


def test_the_resolved_config_is_printed_and_saved_with_the_run(tmp_path, capsys):
    cfg = config(tmp_path, "", "--run", str(tmp_path / "run"), "--negative-prompt", "模糊")
    folder = announce(cfg, "distill")
    said = capsys.readouterr().out  # what differs from the file, and where all of it is
    assert f"run={tmp_path / 'run'}  negative_prompt=模糊; all settings: {folder}" in said
    assert "lr" not in said.split() and folder == tmp_path / "run/distill"
    saved = (folder / "config.yaml").read_text(encoding="utf-8")
    assert "negative_prompt: 模糊" in saved and "lr: 5.0e-06" in saved
    again = "".join(f"  {line}\n" for line in saved.splitlines())
    assert config(tmp_path, "distill:\n" + again) == cfg


def test_what_a_user_can_cause_ends_in_one_line_and_status_1(no_ranks, capsys):
    def main():
        raise ValueError("runs/x: wrong")
    with pytest.raises(SystemExit) as e:
        cli(main)
    assert e.value.code == 1 and capsys.readouterr().err == "error: runs/x: wrong\n"


@pytest.mark.parametrize("raised, code, error", [
    (PermissionError(13, "denied", "runs/x"), 1, "error: runs/x: denied\n"),
    (OSError("no space"), 1, "error: no space\n"),
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n")])
def test_what_the_system_refuses_and_ctrl_c_end_in_one_line(raised, code, error, no_ranks, capsys):
    def main():
        raise raised
    with pytest.raises(SystemExit) as e:
        cli(main)
    assert e.value.code == code and capsys.readouterr().err == error


def test_a_closed_pipe_and_a_terminal_without_utf_8_cause_no_traceback():
    command = f"{sys.executable} {ROOT / 'evaluate.py'} --help | head -1"
    done = subprocess.run(f"LC_ALL=C PYTHONIOENCODING=ascii {command}", shell=True,
                          capture_output=True, text=True, check=True)
    assert done.stdout and done.stderr == ""


@pytest.mark.parametrize("device", ["mps", "cuda:-1", "cuda:x", "gpu", "cpu:0:0", ""])
def test_what_is_not_a_device_is_refused(device):
    with pytest.raises(ValueError, match=f"device: expected cpu, cuda, cuda:0, .*got '{device}'"):
        pick_device(device)


MODULES = {"teacher": "small_world.teacher", "paper": "tools.paper", "bench": "tools.bench",
           "lora": "tools.extract_lora"}  # the module of a stage that is not a file in front


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads_in_every_stage(path, stage):
    argv = [str(path), "weights=assets/tiny"]  # tiny-i2v's weights are not shipped
    cfg = load_config(importlib.import_module(MODULES.get(stage, stage)).Config, stage, argv)
    assert model.check_model(cfg) is model.PRESETS[cfg.preset]


def test_a_path_may_start_with_a_tilde_and_differ_from_rank_to_rank_but_a_number_may_not():
    import distill
    import sample
    cfg = load_config(sample.Config, "sample", ["lora=~/a.safetensors", "--image", "~/b,c.png"])
    home = os.path.expanduser("~")
    assert (cfg.lora, cfg.image) == (f"{home}/a.safetensors", f"{home}/b,c.png")
    assert "lora" not in settings_to_compare(cfg)
    rank = load_config(distill.Config, "distill", ["lora=8"])
    assert settings_to_compare(rank)["lora"] == 8


def test_pyproject_holds_settings_of_tools_and_nothing_that_cannot_be_installed():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text()).keys() == {"tool"}


ARROWS = {"common": {"common"}, "toy1d": set(),
          "model": {"model", "experts", "common"},
          "experts": {"experts", "common"},
          "artifacts": {"artifacts", "model", "experts", "common"},
          "frozen": {"frozen", "model", "common"},
          "training": {"training", "artifacts", "model", "experts", "common"},
          "small_world": {"small_world", "frozen", "model", "common"},
          "evaluation": {"evaluation", "small_world", "common"},
          "synvid": {"artifacts", "frozen", "model", "experts", "common"},
          "distill": {"artifacts", "training", "model", "experts", "common"},
          "sample": {"artifacts", "frozen", "model", "common"},
          "evaluate": {"artifacts", "frozen", "evaluation", "small_world", "model", "common"}}
ARROWS["tools"] = {"tools", *ARROWS}


def test_imports_run_one_way_and_stages_never_import_each_other():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        wing = path.parent.name if path.parent != ROOT else path.stem
        if wing == "tests":
            continue
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
        assert imported & ARROWS.keys() <= ARROWS[wing], path


# --------------------------------------------------------------------------- attention kernels

@pytest.mark.parametrize("kernels, capability, first", [
    ("auto", (9, 0), "CUDNN_ATTENTION"), ("auto", (8, 0), "FLASH_ATTENTION"),
    ("flash", (9, 0), "FLASH_ATTENTION"), ("cudnn", (8, 0), "CUDNN_ATTENTION")])
def test_a_gpu_tries_the_preferred_attention_kernels_first_and_has_the_others(
        kernels, capability, first, monkeypatch):
    before = torch._C._get_sdp_priority_order()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    try:
        prefer_attention(kernels, torch.device("cuda"))
        gc.collect()
        order = [SDPBackend(int(x)).name for x in torch._C._get_sdp_priority_order()]
        assert order[0] == first and len(set(order[:4])) == 4
        assert torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    finally:
        SDPA_ORDER.close()
    assert torch._C._get_sdp_priority_order() == before
    prefer_attention("cudnn", torch.device("cpu"))
    assert torch._C._get_sdp_priority_order() == before
