"""Ranks, sequence parallelism and accumulation change no result: Algorithm 1 with all families."""

import re
from pathlib import Path

import pytest
import torch
from processes import run_script
from safetensors.torch import load_file

from common.ranks import setup_distributed

WORKER = Path(__file__).parent / "parallel_worker.py"
# Without query and key norms, the keys' bias shifts all logits of a query by the same amount: its
# gradient is rounding error, which Adam turns into full steps.
WITHOUT_EFFECT = ("txt_in.individual_token_refiner.blocks.0.self_attn_qkv.bias",
                  "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.bias")


def distilled(folder: Path, ranks: int, families: str = "wan,hunyuan,i2v",
              **settings: int) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters and figures by family, after three iterations on `ranks` processes."""
    folder.mkdir()
    overrides = [f"{name}={value}" for name, value in settings.items()]
    done = run_script(WORKER, families, folder, *overrides, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return {family: load_file(folder / family) for family in families.split(",")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The result of one process with the batch in one forward, by family."""
    return distilled(tmp_path_factory.mktemp("alone") / "out", 1, micro_batch=4)


@pytest.mark.parametrize("ranks,settings", [
    (1, {"micro_batch": 1}), (2, {"micro_batch": 2}), (2, {"sp": 2}), (4, {"sp": 4}),
    (4, {"sp": 2, "micro_batch": 2})], ids=str)
def test_any_split_of_the_work_gives_the_parameters_of_one_process(alone, ranks, settings,
                                                                  tmp_path):
    for family, got in distilled(tmp_path / "out", ranks, **settings).items():
        assert_same(got, alone[family])
    assert any("k_img" in name for name in alone["i2v"])


def test_ranks_that_share_tokens_have_the_gradient_of_l_adv_that_one_has(tmp_path):
    """Heads start at zero, and L_adv has no gradient before their first update: here they do not.
    The parameters differ by less than a tenth of a step: Adam takes full steps even for gradients
    close to zero, such as that of a bias before a norm of its channel."""
    one, two = (distilled(tmp_path / str(ranks), ranks, "wan,hunyuan", lively=1, sp=ranks,
                          micro_batch=1) for ranks in (1, 2))
    for family, got in two.items():
        want = one[family]
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


def test_the_three_iterations_move_every_kind_of_parameter(alone, tmp_path):
    others = distilled(tmp_path / "out", 1, micro_batch=4, seed=1)  # other data, same start
    for family, want in alone.items():
        still = [name for name in want if torch.equal(want[name], others[family][name])
                 and not name.startswith("heads")]
        assert not still, family


def test_two_ranks_that_share_tokens_train_the_lora_of_one_process(tmp_path):
    alone = distilled(tmp_path / "one", 1, micro_batch=4, lora=3)
    for family, got in distilled(tmp_path / "two", 2, sp=2, lora=3).items():
        assert any("lora_A" in name for name in got)
        assert_same(got, alone[family])


def test_moments_in_host_memory_change_no_bit(alone, tmp_path):
    for family, got in distilled(tmp_path / "one", 1, micro_batch=4, offload=1).items():
        assert all(torch.equal(got[name], alone[family][name]) for name in got)
    for family, got in distilled(tmp_path / "two", 2, micro_batch=2, offload=1).items():
        assert_same(got, alone[family])


@pytest.mark.parametrize("sp", [0, 3, 5])
def test_sp_that_does_not_divide_ranks_and_heads_is_an_error_that_lists_what_does(sp):
    with pytest.raises(ValueError, match=rf"sp: got {sp} with 1 rank.* 12 attention heads.*: 1$"):
        setup_distributed("cpu", sp, 12)
    torch.distributed.destroy_process_group()
