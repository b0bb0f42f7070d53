"""The processes of test_parallel.py: three iterations of Algorithm 1 on random data.

python parallel_worker.py FAMILY,… FOLDER field=value …; rank 0 writes each student's parameters and
figures to FOLDER/FAMILY.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import data as loading
import distill
import model
from common.ranks import cli, generator, setup_distributed
from common.weights import save_tensors
from model import HunyuanConfig, WanConfig, key_times
from training.monitor import held_out_errors

SIZES = {"wan": WanConfig(dim=24, ffn_dim=32, num_heads=4, num_layers=3, text_dim=8, text_len=4,
                          freq_dim=16),
         "i2v": WanConfig(dim=24, ffn_dim=32, num_heads=4, num_layers=2, text_dim=8, text_len=4,
                          freq_dim=16, model_type="i2v", in_dim=36, image_dim=6, image_len=5),
         "hunyuan": HunyuanConfig(dim=24, ffn_dim=96, num_heads=4, num_double=2, num_single=2,
                                  text_dim=8, text_len=6, pooled_dim=4, rope_dims=(2, 2, 2),
                                  freq_dim=16)}
KEY = [0, 2, 4, 6]


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


def main(families: str, folder: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    for family in families.split(","):
        distilled(family, f"{folder}/{family}", *overrides)


def distilled(family: str, out: str, *overrides: str) -> None:
    model.PRESETS["small"] = SIZES[family]
    dit = model.build_dit("small")
    draw = generator("teacher", family)
    with torch.no_grad():
        for name, p in dit.named_parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * p.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    given = dict(pair.split("=") for pair in overrides)
    lively = given.pop("lively", None)  # heads whose last layer is not zero
    more = {k: int(v) for k, v in given.items() if k != "micro_batch"}
    cfg = distill.Config(family=SIZES[family].family, preset="small", run=f"{out}.run", n=6,
                         key=KEY, shift=5.0, batch=4, micro_batch=1, iterations=3, held_out=2,
                         lr=1e-3, lr_heads=1e-2, clip=1.0, head_dim=8, lambda_adv=1.0, **more)
    cfg.micro_batch = int(given.get("micro_batch", 1))
    ranks = setup_distributed("cpu", cfg.sp, SIZES[family].num_heads)
    distill.check_config(cfg, ranks.dp_size)
    weights = Path(f"{out}.teacher{ranks.rank}.safetensors")
    save_tensors(weights, dit.state_dict(), {})
    cfg.weights = str(weights)
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


if __name__ == "__main__":
    cli(lambda: main(*sys.argv[1:]))
