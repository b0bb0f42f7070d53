"""What test_memory.py runs in processes of its own, since memory once taken stays visible.

python memory_worker.py plan FAMILY CHECKPOINTING DTYPE OUT    the plan's bytes, the allocator's
python memory_worker.py load WEIGHTS OUT                 host memory while a DiT is loaded
python memory_worker.py share WEIGHTS OUT                what each rank of sp=2 holds to sample
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import data as loading
from artifacts import student as student_file
from common import ranks as processes

if "bfloat16" in sys.argv:  # as on a GPU
    processes.compute_dtype = lambda device: torch.bfloat16

import distill
import model
import sample
from common.files import write_json
from tools.bench import allocated
from common.ranks import cli, generator, local_rows, setup_distributed
from common.weights import save_tensors
from tools.networks import random_dit
from model import HunyuanConfig, WanConfig, key_times
from training.memory import memory_parts

KEY = [0, 2, 4, 6]
SIZES = {"wan": WanConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=4, text_dim=64,
                          text_len=32),
         "hunyuan": HunyuanConfig(dim=384, ffn_dim=1536, num_heads=6, num_double=2, num_single=2,
                                  text_dim=64, text_len=32, pooled_dim=16, rope_dims=(16, 24, 24))}
# Loaded before anything is measured, and what is measured: 4 and 153 MB of fp32.
FEW, MANY = (WanConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=n, text_dim=64, text_len=32)
             for n in (1, 16))


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


def plan(family: str, checkpointing: str, _: str, out: str) -> None:
    model.PRESETS["small"] = SIZES[family]
    dit = model.build_dit("small")
    dit.init_weights(generator("teacher"))
    save_tensors(f"{out}.safetensors", dit.state_dict(), {})
    del dit
    cfg = distill.Config(family=family, preset="small", weights=f"{out}.safetensors", n=6, key=KEY,
                         batch=2, iterations=1, held_out=1, head_dim=32,
                         checkpointing=checkpointing == "True")
    ranks = setup_distributed("cpu")
    data = FakeSynVid(family)
    loader = loading.Loader(cfg, data, ranks)
    state, kept, _ = allocated(lambda: distill.build(cfg, data.t_key, ranks))
    most = allocated(lambda: [log.gather() for _, _, log in
                              distill.algorithm_1(cfg, state, loader)])[2]
    write_json(out, {"parts": memory_parts(cfg, loader.shape, ranks.device, 1, 1),
                     "allocated": kept + most})


def highest() -> int:
    """Most memory this process has held since the last call, in bytes; files mapped included."""
    lines = dict(line.split(":", 1) for line in open("/proc/self/status", encoding="utf-8"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(lines["VmHWM"].split()[0]) * 1024


def load(weights: str, out: str) -> None:
    ranks = setup_distributed("cpu")
    model.PRESETS |= {"few": FEW, "many": MANY}
    few = model.load_dit(f"{weights}/few.safetensors", "few", torch.float32, "cpu", ranks)
    model.frozen_copy(few, "few", torch.bfloat16, ranks)
    highest()
    before = highest()
    dit = model.load_dit(f"{weights}/many.safetensors", "many", torch.float32, "cpu", ranks)
    loaded = highest() - before
    model.frozen_copy(dit, "many", torch.bfloat16, ranks)
    both = highest() - before
    write_json(f"{out}{ranks.rank}", {"loaded": loaded, "both": both})
    dist.barrier()


def share(weights: str, out: str) -> None:
    ranks = setup_distributed("cpu", 2, FEW.num_heads)
    model.PRESETS["few"] = FEW
    cfg = sample.Config(preset="few", weights=f"{weights}/few.safetensors")
    dits = {"teacher": model.load_dit(cfg.weights, "few", ranks=ranks.sp_ranks),
            "student": student_file.load_student(
                cfg, Path(cfg.weights), ranks.device, ranks.sp_ranks),
            "random": random_dit(cfg, ranks.device, ranks.sp_ranks)}
    x = torch.randn(1, 16, 2, 8, 12, generator=generator("x"))
    cond = {"text": torch.randn(1, 8, 64, generator=generator("text"))}
    with torch.no_grad():
        v = {name: model.velocity(dit, x, 0.5, cond) for name, dit in dits.items()}
        want = model.velocity(model.load_dit(cfg.weights, "few"), x, 0.5, cond)
    held = {name: sum(local_rows(p)[0].numel() for p in dit.parameters())
            for name, dit in dits.items()}
    write_json(f"{out}{ranks.rank}", {
        "held": held, "noise": float(v["random"].std()),
        "error": max(float((v[name] - want).abs().max()) for name in ("teacher", "student"))})
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    cli(lambda: {"plan": plan, "load": load, "share": share}[sys.argv[1]](*sys.argv[2:]))
