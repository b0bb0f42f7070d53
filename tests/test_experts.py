"""Two experts as one DiT: Wan 2.2's official numbers, its layouts on disk, and all stages on a
small world of two experts."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from test_model import FIXTURES, fixture_file, fixture_weights, near, wan_config
from torch import Tensor

import model
from common.names import EXPERTS, official_names
from common.ranks import generator
from common.weights import load_module
from experts import crossing_note, trained_steps
from frozen.image import fit_size, image_cond
from frozen.unipc import sample_unipc, unipc_grid
from frozen.vae import WanVAE
from model import PRESETS, WanConfig, build_dit

# --------------------------------------------------------------------- the official numbers

TENSOR, CONFIG, NOTES = fixture_file("wan22_a14b_pipeline")
CASES = {case["name"]: case for case in NOTES["cases"]}
WEIGHTS = fixture_weights("wan22_a14b_pipeline")


def of_kind(kind: str) -> dict:
    """The official weights of one model, by names without its own."""
    return {name.removeprefix(f"{kind}."): t for name, t in WEIGHTS.items()
            if name.startswith(f"{kind}.")}


def official_experts(kind: str, boundary: float) -> torch.nn.Module:
    """The two experts of the fixture with the official weights."""
    sizes = replace(wan_config(CONFIG[kind]), boundary=boundary, image_len=0)
    return load_module(build_dit(sizes), of_kind(kind), "fixture").requires_grad_(False)


def conditions(case: dict) -> list[dict]:
    """cond and uncond; an image's by our own VAE and resizing."""
    image = {}
    if case["kind"] == "i2v":
        c = CONFIG["vae"]
        vae = WanVAE(dim=c["dim"], z_dim=c["z_dim"], dim_mult=tuple(c["dim_mult"]),
                     num_res_blocks=c["num_res_blocks"],
                     temporal_down=tuple(c["temperal_downsample"]))
        load_module(vae, of_kind("vae"), "fixture")
        pixels = TENSOR(f"in.{case['name']}.image").permute(2, 0, 1) / 127.5 - 1
        size = fit_size(*case["image_hw"], case["max_area"])
        image = image_cond(pixels, vae, None, case["frames"], *size)
        near(image["frames"], TENSOR(f"out.{case['name']}.y"), 2e-5)
    return [model.collate([{"text": TENSOR(name), **image}])
            for name in ("in.context", "in.context_null")]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_experts_with_two_scales_equal_the_official_pipelines(case):
    dit, name, calls = official_experts(case["kind"], case["boundary"]), case["name"], []
    for number, expert in ((1, dit.high_noise_model), (0, dit.low_noise_model)):
        expert.register_forward_pre_hook(
            lambda _, args, number=number: calls.append((number, args[1][0].item() * 1000)))
    low, high = case["guide"]
    if case["solver"] == "unipc":
        times, solver = unipc_grid(case["steps"], case["shift"]).tolist(), sample_unipc
    else:
        times, solver = model.time_grid("wan", case["steps"], case["shift"]).tolist(), (
            model.sample_euler)
        if case["solver"] == "euler_once":
            even = torch.linspace(1, 0, case["steps"] + 1, dtype=torch.float64)
            times = model.shift_time(even, case["shift"]).tolist()
    steps = list(solver(dit, TENSOR(f"in.{name}.noise")[None], times, *conditions(case),
                        (high, low)))
    for x, expected in zip(steps, TENSOR(f"out.{name}.x"), strict=True):
        near(x[0], expected, 2e-5)
    if low == 1:  # officially two evaluations whose difference counts once
        calls = [call for call in calls for _ in range(2)]
    experts, model_t = zip(*calls, strict=True)
    assert list(experts) == TENSOR(f"out.{name}.expert").int().tolist()
    assert model_t == pytest.approx(TENSOR(f"out.{name}.model_t").tolist(), rel=1e-6)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_full_size_names_and_shapes_equal_the_published_checkpoints(kind):
    official, diffusers = (
        json.loads((FIXTURES / f"keys/wan22_{kind}_a14b{s}.json").read_text())["keys"]
        for s in ("", "_diffusers"))
    with torch.device("meta"):
        dit = build_dit(f"wan22-{kind}-a14b")
    for name in EXPERTS:
        state = dit.get_submodule(name).state_dict()
        assert {name: list(p.shape) for name, p in state.items()} == official
    assert official_names(diffusers, "transformer") == official
    assert official_names(official, "transformer", reverse=True) == diffusers


# -------------------------------------------------------------- which expert computes, and when

def two_experts(sizes: WanConfig = PRESETS["tiny-experts"]) -> torch.nn.Module:
    """Two experts with different random weights."""
    dit = build_dit(sizes)
    dit.init_weights(generator("experts"))
    with torch.no_grad():
        for expert in dit.children():
            expert.head.head.weight.normal_(std=0.1, generator=generator("head"))
    return dit.requires_grad_(False)


def cond_of(batch: int = 1) -> dict[str, Tensor]:
    return {"text": torch.randn(batch, 6, 64, generator=generator("text"))}


def test_the_boundary_itself_belongs_to_the_expert_for_high_noise():
    dit, x = two_experts(), torch.randn(2, 16, 2, 2, 4, generator=generator("x"))
    for t, name in ((1.0, 0), (0.5, 0), (0.49999, 1), (0.0, 1)):
        times, expert = torch.full((2,), t), dit.get_submodule(EXPERTS[name])
        assert dit.at(t) is expert
        v = expert(x, times, cond_of(2))
        assert torch.equal(dit(x, times, cond_of(2)), v)
        assert torch.equal(model.velocity(dit, x, t, cond_of(2)), v)
    with pytest.raises(ValueError, match="t: expected times on one side of 0.5, got"):
        dit(x, torch.tensor([0.6, 0.4]), cond_of(2))


def test_a_time_is_not_rounded_before_it_meets_the_boundary():
    """Wan 2.2 I2V's grid of 40 steps has 0.89998, which its boundary of 0.9 makes low noise."""
    grid = model.time_grid("wan", 40, 5.0)
    assert round(1000 * grid[14].item()) == 900 and grid[14] < PRESETS["wan22-i2v-a14b"].boundary


def test_two_experts_have_the_interface_of_one_dit():
    dit, one = build_dit("tiny-experts"), build_dit("tiny")
    assert len(dit.blocks) == 2 * len(one.blocks) and dit.cfg.num_layers == len(one.blocks)
    assert dit.token_grid(3, 4, 6) == one.token_grid(3, 4, 6) and dit.flops(9) == one.flops(9)
    names = list(one.state_dict())
    assert list(dit.state_dict()) == [f"{e}.{name}" for e in EXPERTS for name in names]


TABLE = json.loads((FIXTURES / "wan22_key_timesteps.json").read_text())


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r['model']}-{r['n']}-{r['m']}-{r['kind']}")
def test_no_step_of_aligned_key_timesteps_crosses_the_boundary(row):
    grid, key, boundary = (model.time_grid("wan", row["n"], row["shift"]).tolist(), row["key"],
                           row["boundary"])
    t_key = [grid[j] for j in key][::-1]
    assert [round(1000 * t, 2) for t in t_key[::-1]] == row["t"]
    note = crossing_note(grid, key, boundary)
    assert bool(note) == (row["first_low_index"] not in key)
    assert not note or f"with {row['first_low_index']} as a key timestep none does" in note
    assert not crossing_note(grid, key, None)
    high, low = (trained_steps(t_key, boundary, experts) for experts in ("high", "low"))
    assert high + low == trained_steps(t_key, boundary, "both")
    assert "H" * len(high) + "L" * len(low) == row["start"]
    assert row["features"] == "".join("HL"[t < boundary] for t in t_key[-2::-1])


@pytest.mark.parametrize("config", ["wan22-t2v-a14b-480p", "wan22-t2v-a14b-720p",
                                    "wan22-i2v-a14b-480p"])
def test_shipped_configs_have_aligned_key_timesteps(config):
    from common.config import Shared, load_yaml
    from common.files import ROOT
    values = load_yaml(ROOT / f"configs/{config}.yaml")
    cfg = Shared(**{key: values[key] for key in ("n", "shift", "key", "preset")})
    boundary, grid = PRESETS[cfg.preset].boundary, model.time_grid("wan", cfg.n, cfg.shift).tolist()
    assert crossing_note(grid, cfg.key, boundary) == ""
    assert {"n": cfg.n, "shift": cfg.shift, "key": cfg.key}.items() <= next(
        row for row in TABLE if row["kind"] == "aligned" and row["key"] == cfg.key
        and row["boundary"] == boundary).items() or cfg.shift == 3.0
    assert all(a < b for a, b in itertools.pairwise(cfg.key))
