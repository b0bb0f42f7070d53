"""Memory: the plan that distill.py prints, and what loading takes of the host."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomise
from memory_worker import FEW, MANY, load, share
from processes import in_processes

import common.ranks
import distill
import model
import training.memory
from common.config import load_config
from common.files import ROOT
from common.ranks import Ranks, generator
from common.weights import save_tensors
from model import HunyuanConfig, WanConfig, key_times
from tools.bench import allocated
from training.data import Loader
from training.memory import check_resources, host_plan, memory_parts, print_plan, shortage

PEAK = 80 * 2 ** 30
KEY = [0, 2, 4, 6]
SIZES = {"wan": WanConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=4, text_dim=64,
                          text_len=32),
         "hunyuan": HunyuanConfig(dim=384, ffn_dim=1536, num_heads=6, num_double=2, num_single=2,
                                  text_dim=64, text_len=32, pooled_dim=16, rope_dims=(16, 24, 24))}


class FakeSynVid:
    """Random trajectories in memory."""
    manifest = {"shape": [16, 3, 32, 32]}

    def __init__(self, family: str):
        self.t_key, self.family = key_times(family, 6, 5.0, KEY)[::-1], family

    def __len__(self):
        return 8

    def read(self, i, ks):
        g = generator("fake", i)
        x, cond = torch.randn(4, *self.manifest["shape"], generator=g), {"text": torch.zeros(8, 64)}
        if self.family == "hunyuan":
            cond |= {"pooled": torch.zeros(16), "guidance": torch.tensor(6.0)}
        return x[ks], cond, f"prompt {i}"


@pytest.mark.parametrize("checkpointing, dtype", [(False, torch.float32), (True, torch.bfloat16)],
                         ids=["kept in fp32", "recomputed in bf16"])
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_the_plan_is_within_a_tenth_of_what_the_allocator_gives(
        family, checkpointing, dtype, tmp_path, ranks, monkeypatch):
    monkeypatch.setitem(model.PRESETS, "small", SIZES[family])
    for module in (common.ranks, training.memory):  # bf16 as on a GPU
        monkeypatch.setattr(module, "compute_dtype", lambda device: dtype)
    dit = model.build_dit("small")
    randomise(dit, "teacher")
    weights = tmp_path / "teacher.safetensors"
    save_tensors(weights, dit.state_dict(), {})
    del dit
    cfg = distill.Config(family=family, preset="small", weights=str(weights), n=6, key=KEY,
                         batch=2, iterations=1, held_out=1, head_dim=32,
                         checkpointing=checkpointing)
    data = FakeSynVid(family)
    loader = Loader(cfg, data, ranks)
    state, kept, _ = allocated(lambda: distill.build(cfg, data.t_key, ranks))
    peak = allocated(lambda: [log.gather() for _, _, log in
                              distill.algorithm_1(cfg, state, loader)])[2]
    plan = sum(memory_parts(cfg, loader.shape, ranks.device, 1, 1).values())
    print(f"plan / allocated: {plan / (kept + peak):.3f}")
    assert 0.9 < plan / (kept + peak) < 1.1


@pytest.mark.parametrize("family, kind", [("wan", "num_layers"), ("hunyuan", "num_double"),
                                          ("hunyuan", "num_single")])
def test_without_gradient_two_blocks_take_no_more_memory_than_one(family, kind):
    none = {"num_layers": 0} if family == "wan" else {"num_double": 0, "num_single": 0}
    cond = {"text": torch.randn(1, 4, 64), "pooled": torch.randn(1, 16),
            "guidance": torch.tensor([6.0])}
    x = torch.randn(1, 16, 3, 32, 32)

    @torch.no_grad()
    def peak(blocks: int) -> int:
        dit = model.build_dit(replace(SIZES[family], **(none | {kind: blocks})))
        model.velocity(dit, x, 0.5, cond)  # makes what is kept for the next time
        return allocated(lambda: model.velocity(dit, x, 0.5, cond))[2]

    tokens = 3 * 16 * 16 * 384 * 4  # bytes of the stream
    one, two = peak(1), peak(2)
    print(f"{one / tokens:.2f}, {two / tokens:.2f} streams")
    assert two < one + 0.1 * tokens


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_loading_takes_a_rank_s_share_and_one_tensor_of_host_memory(tmp_path):
    for name, sizes in (("few", FEW), ("many", MANY)):
        dit = model.build_dit(sizes)
        randomise(dit, name)
        save_tensors(tmp_path / f"{name}.safetensors", dit.state_dict(), {})
    total = sum(p.numel() for p in dit.parameters()) * 4
    largest = max(p.numel() for p in dit.parameters()) * 4
    in_processes(4, load, tmp_path)
    for rank in range(4):
        found = json.loads((tmp_path / f"out{rank}").read_text())
        share = total / 4
        print(f"share {share / 1e6:.0f} MB, tensor {largest / 1e6:.0f} MB, "
              f"loaded {found['loaded'] / 1e6:.0f} MB, teacher too {found['both'] / 1e6:.0f} MB")
        assert found["loaded"] < share + largest + 0.06 * total    # Python's own objects, too
        assert found["both"] < 1.5 * share + largest + 0.06 * total    # the teacher is bf16


def test_a_team_s_ranks_share_the_weights_of_a_dit_that_only_samples(tmp_path):
    dit = model.build_dit(FEW)
    randomise(dit, "few")
    save_tensors(tmp_path / "few.safetensors", dit.state_dict(), {})
    in_processes(4, share, tmp_path)  # two teams of two ranks
    total = sum(p.numel() for p in dit.parameters())
    found = [json.loads((tmp_path / f"out{rank}").read_text()) for rank in range(4)]
    for name in ("teacher", "student", "random"):
        held = [one["held"][name] for one in found]
        assert held[0] + held[1] == total == held[2] + held[3] and max(held) < 0.51 * total
    assert all(one["error"] < 1e-5 and one["noise"] > 0 for one in found)


@pytest.fixture
def many_ranks(ranks):
    """Ranks(world, sp) that are not there: the plan needs their number alone."""
    return lambda world, sp=1: Ranks(0, world, torch.device("cuda"), ranks.mesh, sp)


def settings(**own):
    values = {"family": "hunyuan", "preset": "hunyuan-t2v", "frames": 93, "height": 544,
              "width": 960, "key": [0, 10, 20, 30, 40, 50]}
    return distill.Config(**values | own)


def test_a_plan_that_does_not_fit_suggests_settings_that_do(many_ranks):
    cfg, shape = settings(), model.latent_shape(129, 720, 1280)
    assert shortage(cfg, model.latent_shape(93, 544, 960), many_ranks(64), PEAK) is None
    assert "in 80 GiB: --sp 2 needs" in shortage(cfg, shape, many_ranks(8), PEAK)
    tight = shortage(cfg, shape, many_ranks(4, 4), PEAK)
    assert "in 80 GiB: --sp" in tight and "--offload true needs" in tight
    alone = shortage(cfg, shape, many_ranks(1), PEAK)
    assert "not even with --sp and --offload: use more GPUs" in alone


def test_the_host_s_plan_is_a_checkpoint_s_copy_moments_and_waiting_latents(many_ranks,
                                                                            monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    shape = model.latent_shape(93, 544, 960)
    waiting = 2 * 4 * 32 * 6 * math.prod(shape)  # two batches of six key latents, fp32
    parameters = [2 ** 30, 0, 2]
    monkeypatch.setattr(training.memory, "student_size", lambda cfg: parameters)
    for offload, copies in ((False, 3), (True, 5)):
        said = host_plan(settings(offload=offload), shape, many_ranks(8))
        assert f"{4 * copies + waiting / 2 ** 30:.2f} GiB per node" in said
    parameters[0] = 1000
    assert "AVAILABLE" not in host_plan(settings(), shape, many_ranks(8))
    if Path("/proc/meminfo").exists():
        parameters[0] = 2 ** 60
        said = host_plan(settings(offload=True), shape, many_ranks(8))
        assert "MORE THAN THE" in said and "leave out --offload" in said


def test_the_disk_must_hold_the_students_that_are_still_to_be_exported(tmp_path, monkeypatch,
                                                                      ranks):
    sizes: list[int] = []
    monkeypatch.setattr(training.memory, "check_disk", lambda *args: sizes.append(args[-1]))
    cfg = distill.Config(run=str(tmp_path), iterations=300)
    for every, done in ((None, 0), (100, 0), (100, 200), (70, 210), (100, 400)):
        cfg.export_every = every
        (tmp_path / f"distill/step_{done:06d}").mkdir(parents=True, exist_ok=True)
        check_resources(cfg, (16, 2, 4, 4), ranks)
    one, *others = sizes
    assert others == [3 * one, one, 2 * one, one]


def test_sequence_parallelism_shrinks_activations_and_offload_the_moments():
    shape, gpu = model.latent_shape(93, 544, 960), torch.device("cuda")
    one, shared = (memory_parts(settings(), shape, gpu, 8, sp) for sp in (1, 8))
    assert shared["activations"] < 1.01 * one["activations"] / 8  # the peak may be at another block
    home = memory_parts(settings(offload=True), shape, gpu, 8, 1)
    assert home["AdamW"] < one["AdamW"] / 100 and home["student"] == one["student"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/[hw]*.yaml")), ids=lambda p: p.stem)
def test_the_first_line_of_each_large_config_is_a_run_that_fits_8_gpus_of_80_gib(path, many_ranks,
                                                                               capsys):
    line = path.read_text().splitlines()[0].partition("   (")[0].split()
    at = line.index("distill.py")
    assert line[at + 1] == f"configs/{path.name}" and line[3] == "8"
    cfg = load_config(distill.Config, "distill", [str(path), *line[at + 2:]])
    shape = model.latent_shape(cfg.frames, cfg.height, cfg.width)
    print_plan(cfg, shape, many_ranks(8, cfg.sp), PEAK)
    assert "fits in 80 GiB" in capsys.readouterr().out
    with pytest.raises(ValueError, match="memory plan: .* in 8 GiB: .* --force_plan true"):
        print_plan(cfg, shape, many_ranks(8, cfg.sp), 2 ** 33)
    print_plan(replace(cfg, force_plan=True), shape, many_ranks(8, cfg.sp), 2 ** 33)
    assert "DOES NOT FIT in 8 GiB" in capsys.readouterr().out
