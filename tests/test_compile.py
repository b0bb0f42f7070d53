"""torch.compile: a block is compiled a few times, not again for every prompt's length."""

import functools
from pathlib import Path

import pytest
import torch._dynamo
from processes import in_processes
from torch import nn
from torch._dynamo.utils import counters

import model
from common.config import Shared
from common.files import read_json, write_json
from common.ranks import Ranks, compile_blocks, generator, setup_distributed
from model import HunyuanConfig, WanConfig

SIZES = {"wan": WanConfig(dim=48, ffn_dim=32, num_heads=4, num_layers=2, text_dim=8, text_len=16),
         "hunyuan": HunyuanConfig(dim=64, ffn_dim=32, num_heads=4, num_double=2, num_single=2,
                                  text_dim=8, pooled_dim=10, rope_dims=(4, 6, 6))}
LENGTHS = (3, 4, 5, 8, 9)  # of prompts


def count_graphs(ranks: Ranks, folder: Path) -> None:
    """How many graphs Dynamo has made on rank 0, by family, after each length: as in training, with
    gradients of the weights, with none, and with those of the latents only."""
    ranks = setup_distributed(Shared(device="cpu"), ranks.world, 4)
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="eager")  # Dynamo alone
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    graphs = {}
    for family, sizes in SIZES.items():
        before = counters["stats"]["unique_graphs"]
        dit = model.build_dit(sizes)
        dit.sp, graphs[family] = ranks.sp_group, []
        for block in dit.blocks:
            block.checkpointing = True  # as distill.py has it
        if ranks.rank == 0:  # the others only take part in its collectives
            compile_blocks(dit)
        for length in LENGTHS:
            cond = {"text": torch.randn(length, 8)}
            if family == "hunyuan":
                cond |= {"pooled": torch.randn(10), "guidance": torch.tensor(6.016)}
            for learns, latents in ((True, False), (False, False), (False, True)):
                dit.requires_grad_(learns)
                x = torch.randn(1, 16, 2, 8, 12, generator=generator(length), requires_grad=latents)
                with torch.set_grad_enabled(learns or latents):
                    v = model.velocity(dit, x, 0.5, model.collate([cond]))
                if learns or latents:
                    v.sum().backward()
            graphs[family].append(counters["stats"]["unique_graphs"] - before)
    if ranks.rank == 0:
        write_json(folder / "graphs.json", graphs)


@pytest.mark.parametrize("sp", [1, 2])
def test_a_block_is_not_compiled_again_for_every_length_of_a_prompt(sp, tmp_path):
    in_processes(sp, count_graphs, tmp_path)  # ends if a block exceeds the limit
    for family, graphs in read_json(tmp_path / "graphs.json").items():
        print(family, graphs)
        assert graphs[0] >= 3 and graphs[-1] == graphs[2]
