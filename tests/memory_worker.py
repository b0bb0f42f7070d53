"""What test_memory.py runs in processes of its own, since their peak memory is measured."""

from pathlib import Path

import torch
import torch.distributed as dist

import model
import sample
from artifacts.student import load_student
from common.config import Shared
from common.files import write_json
from common.ranks import Ranks, generator, local_rows, setup_distributed
from model import WanConfig
from tools.networks import random_dit

# Loaded before anything is measured, and what is measured: 4 and 153 MB of fp32.
FEW, MANY = (WanConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=n, text_dim=64, text_len=32)
             for n in (1, 16))


def peak_memory() -> int:
    """Peak memory of this process in bytes since the last call, mapped files included."""
    lines = dict(line.split(":", 1) for line in open("/proc/self/status", encoding="utf-8"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(lines["VmHWM"].split()[0]) * 1024


def load(ranks: Ranks, folder: Path) -> None:
    """Host memory that each rank takes to load a DiT, and the same in bf16."""
    model.PRESETS |= {"few": FEW, "many": MANY}
    for dtype in (torch.float32, torch.bfloat16):
        model.load_dit(folder / "few.safetensors", "few", dtype, "cpu", ranks)
    peak_memory()
    before = peak_memory()
    dit = model.load_dit(folder / "many.safetensors", "many", torch.float32, "cpu", ranks)
    loaded = peak_memory() - before
    teacher = model.load_dit(folder / "many.safetensors", "many", torch.bfloat16, "cpu", ranks)
    both = peak_memory() - before
    assert len(dit.blocks) == len(teacher.blocks)  # both are in memory until here
    write_json(folder / f"out{ranks.rank}", {"loaded": loaded, "both": both})
    dist.barrier()


def share(_: Ranks, folder: Path) -> None:
    """What each rank holds of a DiT that two ranks sample with, and how far their result is."""
    ranks = setup_distributed(Shared(device="cpu"), 2, FEW.num_heads)
    model.PRESETS["few"] = FEW
    cfg = sample.Config(preset="few", weights=str(folder / "few.safetensors"))
    dits = {"teacher": model.load_dit(cfg.weights, "few", ranks=ranks.sp_ranks),
            "student": load_student(cfg, Path(cfg.weights), ranks.device, ranks.sp_ranks),
            "random": random_dit(cfg, ranks.device, ranks.sp_ranks)}
    x = torch.randn(1, 16, 2, 8, 12, generator=generator("x"))
    cond = {"text": torch.randn(1, 8, 64, generator=generator("text"))}
    with torch.no_grad():
        v = {name: model.velocity(dit, x, 0.5, cond) for name, dit in dits.items()}
        expected = model.velocity(model.load_dit(cfg.weights, "few"), x, 0.5, cond)
    held = {name: sum(local_rows(p)[0].numel() for p in dit.parameters())
            for name, dit in dits.items()}
    write_json(folder / f"out{ranks.rank}", {
        "held": held, "noise": float(v["random"].std()),
        "error": max(float((v[name] - expected).abs().max()) for name in ("teacher", "student"))})
    dist.barrier()
