"""Ranks, sequence parallelism and accumulation change no result: Algorithm 1 with all families."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from safetensors.torch import load_file

import distill
import model
from common.config import Shared
from common.ranks import Ranks, generator, setup_distributed
from common.weights import save_tensors
from experts import by_expert, with_level
from model import HunyuanConfig, WanConfig, key_times
from training import data as loading
from training.monitor import held_out_errors

SIZES = {"wan": WanConfig(dim=24, ffn_dim=32, num_heads=4, num_layers=3, text_dim=8, text_len=4,
                          freq_dim=16),
         "i2v": WanConfig(dim=24, ffn_dim=32, num_heads=4, num_layers=2, text_dim=8, text_len=4,
                          freq_dim=16, model_type="i2v", in_dim=36, image_dim=6, image_len=5),
         "experts": WanConfig(dim=24, ffn_dim=32, num_heads=4, num_layers=2, text_dim=8, text_len=4,
                              freq_dim=16, boundary=0.9),
         "hunyuan": HunyuanConfig(dim=24, ffn_dim=96, num_heads=4, num_double=2, num_single=1,
                                  text_dim=8, text_len=6, pooled_dim=4, rope_dims=(2, 2, 2),
                                  freq_dim=16)}
KEY = [0, 2, 4, 6]
ALL, MOST = tuple(SIZES), ("i2v", "experts", "hunyuan")  # each expert is a network of "wan"
# What is distilled, by the number of processes: settings of distill.py, `lively` for heads whose
# last layer is not zero, and the families, if not MOST: how AdamW's state is kept does not depend
# on the network, and four processes share the tokens of every family. The processes of one number
# do their cases one after the other.
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {"alone": {"micro_batch": 4, "families": ALL}, "micro-batches": {"micro_batch": 1},
        "other data": {"micro_batch": 4, "seed": 1}, "lora": {"micro_batch": 4, "lora": 3},
        "lora, offload": {"micro_batch": 4, "lora": 3, "offload": 1, "checkpointing": 0,
                          "families": ("hunyuan",)},
        "offload": {"micro_batch": 4, "offload": 1, "families": ("experts",)},
        "lively": {"micro_batch": 4, "lively": 1, "families": ("wan", "hunyuan")}},
    2: {"replicas": {"micro_batch": 2, "families": ALL},
        "sp": {"sp": 2, "micro_batch": 2, "families": ("experts", "hunyuan")},
        "lora": {"sp": 2, "micro_batch": 4, "lora": 3},
        "offload": {"micro_batch": 2, "offload": 1, "families": ("experts",)},
        "lively": {"sp": 2, "micro_batch": 4, "lively": 1, "families": ("wan", "hunyuan")}},
    4: {"sp": {"sp": 4, "micro_batch": 4},
        "sp and replicas": {"sp": 2, "micro_batch": 2, "families": ("hunyuan",)}}}
# Without query and key norms, the keys' bias shifts all logits of a query by the same amount: its
# gradient is rounding error, which Adam turns into full steps.
WITHOUT_EFFECT = ("txt_in.individual_token_refiner.blocks.0.self_attn_qkv.bias",
                  "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.bias")
# The expert for low noise takes one step: Adam's first, which is full even for gradients near zero.
BOUNDS = {"experts": 1e-4}


class FakeSynVid:
    """Random trajectories in memory; 3 × 2 × 3 tokens and texts of 1 to 4 divide by nothing."""
    manifest = {"shape": [16, 3, 4, 6]}

    def __init__(self, family: str):
        self.t_key, self.family = key_times(SIZES[family].family, 6, 5.0, KEY)[::-1], family

    def __len__(self):
        return 12

    def read(self, i, ks):
        g = generator("fake", i)
        x = torch.randn(4, *self.manifest["shape"], generator=g)
        cond = {"text": torch.randn(1 + i % 4, 8, generator=g)}
        if self.family == "i2v":
            cond |= {"image": torch.randn(5, 6, generator=g),
                     "frames": torch.randn(20, *self.manifest["shape"][1:], generator=g)}
        if self.family == "hunyuan":
            cond |= {"pooled": torch.randn(4, generator=g), "guidance": torch.tensor(6.016)}
        return x[ks], cond, f"prompt {i}"


def distill_cases(ranks: Ranks, folder: Path) -> None:
    """One of the processes: all cases of their number, with every family."""
    for case, settings in CASES[ranks.world].items():
        settings = dict(settings)
        for family in settings.pop("families", MOST):
            distill_case(family, folder / case / family, **settings)


def distill_case(family: str, out: Path, lively: int = 0, **settings: int) -> None:
    """Three iterations of Algorithm 1 on random data; rank 0 writes the student's parameters, the
    heads' and the figures to `out`."""
    model.PRESETS["small"] = SIZES[family]
    dit = model.build_dit("small")
    draw = generator("teacher", family)
    with torch.no_grad():
        for name, p in dit.named_parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * p.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    cfg = distill.Config(family=SIZES[family].family, preset="small", run=f"{out}.run", n=6,
                         key=KEY, shift=5.0, batch=4, iterations=3, held_out=2, lr=1e-3,
                         lr_heads=1e-2, clip=1.0, head_dim=8, lambda_adv=1.0, **settings)
    ranks = setup_distributed(Shared(device="cpu"), cfg.sp, SIZES[family].num_heads)
    distill.check_config(cfg, ranks.dp_size)
    for level, tensors in by_expert(dit.state_dict()).items():
        cfg.weights = str(out.with_name(with_level(f"{family}{ranks.rank}.safetensors", level)))
        save_tensors(Path(cfg.weights), tensors, {})
    loader = loading.Loader(cfg, FakeSynVid(family), ranks)
    state = distill.build(cfg, loader.data.t_key, ranks)
    for k, head in enumerate(state.heads if lively else ()):
        torch.nn.init.normal_(head[-1].weight, generator=generator("head", k))
    lines = [log.gather() for _, _, log in distill.algorithm_1(cfg, state, loader)]
    errors = held_out_errors(cfg, state.student, loader, ranks)
    tensors = {name: p.detach().full_tensor() for name, p in state.student.named_parameters()}
    if ranks.rank == 0:
        heads = {f"heads.{name}": p for name, p in state.heads.state_dict().items()}
        figures = torch.tensor([line[name] for line in lines for name in
                                ("loss_traj", "loss_adv", "loss_head", "grad_sum", "grad_adv",
                                 "grad_head")]
                               + [errors["endpoint"], *errors["velocity"]])
        save_tensors(out, {**tensors, **heads, "figures": figures}, {})
    dist.barrier()


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Callable[[int, str], dict[str, dict[str, torch.Tensor]]]:
    """distilled(number of processes, case): parameters and figures by family."""
    @functools.cache
    def run(world: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        in_processes(world, distill_cases, folder)
        return folder

    def read(world: int, case: str) -> dict[str, dict[str, torch.Tensor]]:
        return {family: load_file(run(world) / case / family)
                for family in CASES[world][case].get("families", MOST)}
    return read


@pytest.mark.parametrize("world,case", [(1, "micro-batches"), (2, "replicas"), (2, "sp"), (4, "sp"),
                                        (4, "sp and replicas")])
def test_any_split_of_the_work_gives_the_parameters_of_one_process(distilled, world, case):
    alone, got = distilled(1, "alone"), distilled(world, case)
    assert any("k_img" in name for name in alone["i2v"])
    assert any(name.startswith("low_noise_model.") for name in alone["experts"])
    for family in got:
        assert_same(got[family], alone[family], BOUNDS.get(family, 1e-5))


def test_ranks_that_share_tokens_have_the_gradient_of_l_adv_that_one_has(distilled):
    """Heads start at zero, and L_adv has no gradient before their first update: here they do not.
    The parameters differ by less than a tenth of a step: Adam takes full steps even for gradients
    close to zero, such as that of a bias before a norm of its channel."""
    for family in ("wan", "hunyuan"):
        want, got = distilled(1, "lively")[family], distilled(2, "lively")[family]
        for parameters in (got, want):
            for name in [n for n in parameters if re.fullmatch(r"heads\.\d\.2\.bias", n)]:
                del parameters[name]
        assert_same(got, want, 1e-4)


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor],
                bound: float = 1e-5) -> None:
    """Figures differ by less than 1e-5, parameters by less than the bound."""
    assert got.keys() == want.keys()
    apart = {name: (got[name] - want[name]).abs().max().item() for name in want}
    figures = apart.pop("figures") / want["figures"].abs().max().item()
    apart = {name: value for name, value in apart.items() if name not in WITHOUT_EFFECT}
    worst = max(apart, key=apart.get)
    print(f"{worst}: {apart[worst]:.1e}; figures {figures:.1e}")
    assert apart[worst] < bound and figures < 1e-5


def test_the_three_iterations_move_every_kind_of_parameter(distilled):
    for family, other in distilled(1, "other data").items():
        want = distilled(1, "alone")[family]  # from the same start
        still = [name for name in want if torch.equal(want[name], other[name])
                 and not name.startswith("heads")]
        assert not still, family


@pytest.mark.parametrize("world,case", [(1, "lora, offload"), (2, "lora")])
def test_any_split_of_the_work_trains_the_same_lora(distilled, world, case):
    for family, got in distilled(world, case).items():
        assert any("lora_A" in name for name in got)
        assert_same(got, distilled(1, "lora")[family], BOUNDS.get(family, 1e-5))


def test_moments_in_host_memory_change_no_bit(distilled):
    for family, got in distilled(1, "offload").items():
        want = distilled(1, "alone")[family]
        assert all(torch.equal(got[name], want[name]) for name in got)
        assert_same(distilled(2, "offload")[family], want, BOUNDS.get(family, 1e-5))


@pytest.mark.parametrize("sp", [2, 5])  # 2 divides the heads alone, 5 neither
def test_sp_that_does_not_divide_ranks_and_heads_is_an_error_that_names_both(sp):
    message = rf"replicas of {sp} rank\(s\) to divide the 1 rank\(s\), and sp={sp} the 12 attention"
    with pytest.raises(ValueError, match=message):
        setup_distributed(Shared(device="cpu"), sp, 12)
    dist.destroy_process_group()
