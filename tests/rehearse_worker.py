"""What test_rehearse.py runs in processes of its own, since a rehearsal adds a device to torch."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import common.ranks
import distill
import experts
import model
import sample
import synvid
from common.files import write_json
from common.ranks import Ranks, local_rows, on_first_rank
from model import I2V, HunyuanConfig, WanConfig
from tools import rehearse
from tools.bench import allocated
from training.data import Loader

SIZES = {"wan": WanConfig(dim=192, ffn_dim=768, num_heads=4, num_layers=3, text_dim=64,
                          text_len=32),
         "hunyuan": HunyuanConfig(dim=192, ffn_dim=768, num_heads=4, num_double=1, num_single=2,
                                  text_dim=64, text_len=32, pooled_dim=16, rope_dims=(8, 20, 20))}


def settings(family: str, **own: Any) -> distill.Config:
    return distill.Config(**{"family": family, "preset": "small", "n": 2, "key": [0, 2],
                             "height": 128, "width": 128, "frames": 5, "batch": 2, "iterations": 1,
                             "head_dim": 16, **own})


def without_file(module: nn.Module, *_: Any, device: str = "cpu", **__: Any) -> nn.Module:
    module.to_empty(device=device)
    for p in module.parameters():
        local_rows(p)[0].fill_(0.01)
    return module


def kept_until_released(collective: Callable) -> Callable:
    """A method of a process group that keeps its tensors until gloo's thread has released them.

    The profiler does not record what another thread frees, and the last reference may be there.
    """
    def call(*args: Any) -> None:
        work = collective(*args)
        work.wait()
        time.sleep(0.001)  # between its result and its release; measured again if that is too short
    return call


def allocated_really(cfg: distill.Config, ranks: Ranks) -> int:
    """Peak bytes of the tensors that a k-step and what it needs in memory take, on rank 0: of the
    first run that frees all it has allocated."""
    t_key = model.key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1]
    shape = model.latent_shape(cfg.frames, cfg.height, cfg.width)
    loader = Loader(cfg, rehearse.NoTrajectories({"shape": shape}, t_key,
                                                 rehearse.random_states(cfg)), ranks)
    with patch.object(model, "load_module", without_file), patch.multiple(
            experts, check_sizes=lambda *_: None, dit_tensors=lambda _: {}):
        state, kept, _ = allocated(lambda: distill.build(cfg, t_key, ranks))
    methods = {name: kept_until_released(getattr(dist.ProcessGroup, name)) for name in
               ("all_gather_single", "reduce_scatter_single", "_allgather_base",
                "_reduce_scatter_base") if hasattr(dist.ProcessGroup, name)}
    for _ in range(20):
        state.step = 0
        with patch.multiple(dist.ProcessGroup, **methods):
            _, left, peak = allocated(lambda: [log.gather() for _, _, log in
                                               distill.algorithm_1(cfg, state, loader)])
        if on_first_rank(lambda left=left: left < 2 ** 16):
            return kept + peak
    raise AssertionError(f"{left} bytes are left after each of 20 runs")


def measure(ranks: Ranks, folder: Path) -> None:
    """Peak bytes of an iteration in bf16, allocated and rehearsed."""
    for module in (common.ranks, model):
        module.compute_dtype = lambda device: torch.bfloat16
    model.PRESETS |= SIZES
    for family in SIZES:
        size = allocated_really(settings(family, preset=family), ranks)
        if ranks.rank == 0:
            write_json(folder / f"{family}_real", {"bytes": size})
    dist.barrier()
    dist.destroy_process_group()
    for family, sizes in list(SIZES.items())[ranks.rank::2]:  # each rank rehearses one
        figures = rehearse.run_at(settings(family, preset=family), 2, sizes)
        write_json(folder / f"{family}_rehearsed",
                   {"bytes": sum(rehearse.peak_of(figures).values())})


def find_planted_bugs(folder: Path) -> None:
    """What a rehearsal of a small run finds without and with each of some bugs."""
    sizes = WanConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=1, text_dim=16, text_len=8)
    model.PRESETS["small"] = sizes
    velocity, adamw, frequencies = model.velocity, distill.optimizer.adamw, model.frequencies

    def in_fp32(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), layer.weight.float(), layer.bias.float()).bfloat16()

    def waiting(*args: Any) -> torch.Tensor:
        v = velocity(*args)
        return v if bool(torch.isfinite(v).all()) else v * 0

    def not_sharded(cfg: Any, module: nn.Module, offload: bool = False) -> torch.optim.AdamW:
        opt = adamw(cfg, module, offload)
        for p, state in opt.state.items():
            state["exp_avg"] = torch.zeros(p.shape, device=p.device)
        return opt

    def on_cpu(dim: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        return frequencies(dim, dtype)
    on_cpu.cache_clear = frequencies.cache_clear
    bugs = {"clean": (model, "velocity", velocity, 1),
            "a tensor on the CPU": (model, "frequencies", on_cpu, 1),
            "fp32 in a block": (model, "cast_linear", in_fp32, 1),
            "the host waits": (distill, "velocity", waiting, 1),
            "no gather of heads": (model, "heads_to_tokens", lambda out, seq: out, 2),
            "moments that are not sharded": (distill.optimizer, "adamw", not_sharded, 1)}
    found: dict[str, dict] = {name: {} for name in bugs}
    for name, (module, attribute, bug, sp) in bugs.items():
        cfg = settings("wan", height=32, width=32, frames=1, adv=False, sp=sp)
        with patch.object(module, attribute, bug):
            try:
                figures = rehearse.run_at(cfg, 2, sizes)
            except Exception as e:
                found[name]["error"] = str(e)
                continue
        found[name] |= rehearse.by_purpose(rehearse.peak_of(figures))
        for key in figures:
            if key[0] == "finding":
                before = found[name].get(f"finding {key[1]}", "")
                found[name][f"finding {key[1]}"] = f"{before} {key[2]}"
    write_json(folder / "found", found)


def sample_small(folder: Path) -> None:
    """Figures of synvid.py, with each evaluation of guidance on two ranks that share tokens, and of
    sample.py: a small DiT with the released encoders and VAE, then one with small ones."""
    small = WanConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=1)
    model.PRESETS |= {"t2v": small, "i2v": replace(small, **I2V)}
    shared = {"height": 64, "width": 64, "frames": 1, "cfg_scale": 3.0}
    for name, cfg in (
            ("synvid", synvid.Config(**shared, preset="i2v", batch=2, sp=2, cfg_parallel=True)),
            ("sample", sample.Config(**shared, preset="t2v", teacher=True)),
            ("small", synvid.Config(**shared, preset="hunyuan-tiny", family="hunyuan", batch=1))):
        figures = rehearse.run_at(cfg, 4, model.PRESETS[cfg.preset])
        write_json(folder / name, {
            "peak": rehearse.peak_of(figures), **{" ".join(key): n for key, n in figures.items()
                                                  if key[0] != "peak"}})


def measure_all(ranks: Ranks, folder: Path) -> None:
    """All of the above; the last two at the same time, one on each of two ranks."""
    measure(ranks, folder)
    (find_planted_bugs, sample_small)[ranks.rank](folder)
