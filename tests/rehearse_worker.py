"""What test_rehearse.py runs in processes of its own, since a rehearsal adds a device to torch."""

import dataclasses
import gc
from pathlib import Path

import torch
import torch.distributed as dist

import common.ranks
import distill
import model
import training.memory
from common.files import write_json
from common.ranks import Ranks
from model import HunyuanConfig, WanConfig
from tools import rehearse
from tools.bench import allocated
from training.data import Loader

SIZES = {"wan": WanConfig(dim=192, ffn_dim=768, num_heads=4, num_layers=3, text_dim=64,
                          text_len=32),
         "hunyuan": HunyuanConfig(dim=192, ffn_dim=768, num_heads=4, num_double=1, num_single=2,
                                  text_dim=64, text_len=32, pooled_dim=16, rope_dims=(8, 20, 20))}


def settings(family: str) -> distill.Config:
    return distill.Config(family=family, preset="small", n=4, key=[0, 2, 4], height=256, width=256,
                          frames=5, batch=2, iterations=1, held_out=1, head_dim=16)


def measure(ranks: Ranks, folder: Path) -> None:
    """Peak bytes of tensors of one iteration in bf16, real and rehearsed."""
    bf16 = torch.bfloat16
    for module in (distill, model):
        module.compute_dtype = lambda device: bf16
    for family, sizes in SIZES.items():
        model.PRESETS["small"] = sizes
        cfg = settings(family)
        t_key = model.key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1]
        data = rehearse.NoTrajectories(
            {"shape": model.latent_shape(cfg.frames, cfg.height, cfg.width)}, t_key,
            rehearse.random_states(cfg))
        loader = Loader(cfg, data, ranks)

        def empty(module, *_, device="cpu", **__):
            module.to_empty(device=device)
            for p in module.parameters():
                common.ranks.local_rows(p)[0].fill_(0.01)
            return module
        loading = model.load_module, model.check_sizes, model.dit_tensors
        model.load_module, model.check_sizes, model.dit_tensors = empty, lambda *_: None, lambda _: {}
        state, kept, _ = allocated(lambda: distill.build(cfg, t_key, ranks))
        peak = allocated(lambda: [log.gather() for _, _, log in
                                  distill.algorithm_1(cfg, state, loader)])[2]
        model.load_module, model.check_sizes, model.dit_tensors = loading
        print(family, "kept", kept, "peak", peak, flush=True)
        if ranks.rank == 0:
            write_json(folder / f"{family}_real", kept + peak)
        del state, loader
        gc.collect()
    if ranks.rank == 0:
        dist.barrier()
    else:
        dist.barrier()
    dist.destroy_process_group()
    if ranks.rank == 0:
        for family, sizes in SIZES.items():
            model.PRESETS["small"] = sizes
            figures = rehearse.run_at(settings(family), "distill", 2, sizes)
            parts = rehearse.peak_of(figures)
            print(rehearse.report(figures, rehearse.plan_of(settings(family), 2, 1), 1))
            write_json(folder / f"{family}_rehearsed", sum(parts.values()))


def plant():
    pass
