"""Fig. 6 for your teacher: which of its features separate generated latents from real ones; D7.

    python -m tools.taps [CONFIG] [--videos 128]
    torchrun --nproc-per-node 8 -m tools.taps CONFIG    # the teacher is sharded over the ranks

In:  <run>/synvid (or --synvid) and the teacher's folder; settings as in distill.py's section.
Out: <run>/taps/taps.json and taps.png: by key timestep t'_k and block of the teacher, the accuracy
     of a linear probe and of a head as in distill.py.
Generated latents are made by the teacher itself in as few steps as `key` has. Where both accuracies
are high, a head can learn what to repair: use that block as `tap` (t'_k > 0) or `tap_data` (t'_0).
Half of the videos are for training, the others for testing.
"""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import distill
from artifacts.trajectories import SynVid, open_trajectories
from common.config import announce, field, load_config
from common.files import write_json
from common.names import fingerprint
from common.ranks import (
    Ranks, cli, compute_dtype, draw_noise, generator, lock_run_folder, setup_distributed)
from common.video import draw_panels
from model import check_model, collate, load_dit, sample_euler

# N videos, F frames kept of each, D channels, h w the grid of features. Cost: two forwards of the
# teacher per video, block and key timestep; a minute for the small world.


@dataclass
class Config(distill.Config):
    """Settings of distill.py, and which features to examine."""
    videos: int | None = field(None, "last trajectories to use; default 128, or all if fewer",
                               "[8, inf)")
    blocks: list[int] | None = field(None, "blocks of the teacher, 0-based; default: 8 "
                                     "spread evenly")
    frames_kept: int = field(2, "latent frames per video whose features are kept", "[1, inf)")
    updates: int = field(64, "updates of a head, with lr_heads", "[1, inf)")


# ------------------------------------------------------------------------------- classifiers

def probe_accuracy(real: Tensor, fake: Tensor) -> float:
    """Accuracy of a logistic regression that separates real from fake by mean features [N,D]; it is
    trained on the first half of each and tested on the second."""
    half = len(real) // 2
    train, test = torch.cat((real[:half], fake[:half])), torch.cat((real[half:], fake[half:]))
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    signs = torch.cat((torch.ones(half), -torch.ones(half))).to(real)
    weights = torch.zeros(train.shape[1] + 1, device=real.device, requires_grad=True)
    opt = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        opt.zero_grad()
        logits = train @ weights[:-1] + weights[-1]
        out = F.softplus(-signs * logits).mean() + 0.01 * weights[:-1].square().sum()
        out.backward()
        return out

    opt.step(loss)
    with torch.no_grad():
        logits = test @ weights[:-1] + weights[-1]
    rest = len(real) - half
    return float(torch.cat((logits[:rest] > 0, logits[rest:] < 0)).float().mean())


def head_accuracy(cfg: Config, real: Tensor, fake: Tensor, key: tuple) -> float:
    """Accuracy of a head, by its mean logit over a video's patches: it is trained for cfg.updates
    on the first half of the videos and tested on the second. real, fake [N,F,D,h,w]."""
    half, g = len(real) // 2, generator("taps", *key)
    head = distill.make_heads(cfg, real.shape[2])[0].to(real.device)
    lr = cfg.lr if cfg.lr_heads is None else cfg.lr_heads
    opt = torch.optim.AdamW(head.parameters(), lr, (cfg.beta1, cfg.beta2), weight_decay=0.0)
    for _ in range(cfg.updates):
        pick = torch.randint(half, (min(cfg.batch, half),), generator=g)
        loss = distill.head_loss(head(real[pick].float().flatten(0, 1)),
                                 head(fake[pick].float().flatten(0, 1)), cfg.adv_form)
        loss.backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        logits = [torch.stack([head(x.float()).mean() for x in kind[half:]])
                    for kind in (real, fake)]
    return float(torch.cat((logits[0] > 0, logits[1] < 0)).float().mean())


# ---------------------------------------------------------------------------------- features

@torch.no_grad()
def frame_features(cfg: Config, teacher: nn.Module, x: Tensor, t: float, cond: dict,
                  block: int) -> Tensor:
    """Features of latents x [B,C,T,H,W] in a few evenly spaced frames: [B,F,D,h,w] on the CPU."""
    f = distill.features(teacher, x, t, cond, block).unflatten(0, (len(x), -1))
    frames = torch.linspace(0, f.shape[1] - 1, min(cfg.frames_kept, f.shape[1])).round().long()
    return f[:, frames].to("cpu", compute_dtype(f.device))


def examine(cfg: Config, data: SynVid, ranks: Ranks, blocks: list[int]) -> list[dict]:
    """For each block and k: accuracies of probe and head."""
    device = ranks.device
    teacher = load_dit(cfg.weights, cfg.preset, compute_dtype(device), device, ranks)
    teacher.requires_grad_(False)
    t_key, batches, found = data.t_key, [], []  # batches: real x_key, generated x_key, cond
    starts = range(len(data) - cfg.videos, len(data), cfg.micro_batch)
    for start in tqdm(starts, "generate", disable=ranks.rank > 0 or None):
        rows = range(start, min(start + cfg.micro_batch, len(data)))
        items = [data.read(i) for i in rows]
        x_key = torch.stack([x for x, _, _ in items], 1)                     # m+1 B C T H W
        noise = draw_noise(x_key.shape[2:], [("taps", cfg.seed, i) for i in rows])
        cond = {name: c.to(device) for name, c in collate([c for _, c, _ in items]).items()}
        states = sample_euler(teacher, noise.to(device), t_key[::-1], cond)
        batches.append((x_key, [noise, *(x.cpu() for x in states)][::-1], cond))
    pairs = list(itertools.product(range(len(t_key) - 1), blocks))
    for k, block in tqdm(pairs, "blocks", disable=ranks.rank > 0 or None):
        real, fake = (torch.cat([
            frame_features(cfg, teacher, batch[i][k].to(device), t_key[k], batch[2], block)
            for batch in batches]) for i in (0, 1))
        means = [x.float().mean((1, 3, 4)).to(device) for x in (real, fake)]
        found.append({"k": k, "t": t_key[k], "block": block, "probe": probe_accuracy(*means),
                      "head": head_accuracy(cfg, real.to(device), fake.to(device), (k, block))})
    return found


def draw(path: Path, found: list[dict], taps: list[int], title: str) -> None:
    """Plot the accuracies over the blocks, a curve for each k."""
    curves = [(f"t'_{k}, D7: block {tap}", [entry for entry in found if entry["k"] == k])
              for k, tap in enumerate(taps)]
    draw_panels(path, {
        f"{title}, {name}": [(name, label, entries, "o-") for label, entries in curves]
        for name in ("probe", "head")}, x="block", linear=(title,))


def main(argv: list[str] | None = None) -> None:
    """Read the config, examine the features, write the table and the figure."""
    cfg = load_config(Config, "distill", argv, __doc__, "-m tools.taps")
    sizes, teacher = check_model(cfg), fingerprint(cfg.weights)
    ranks = setup_distributed(cfg, teacher=teacher)
    distill.check_config(cfg, 1)
    data = open_trajectories(Path(cfg.synvid or f"{cfg.run}/synvid"), cfg)
    depth, count = sizes.num_layers, min(8, sizes.num_layers)
    cfg.videos = cfg.videos or min(128, len(data))
    if not 8 <= cfg.videos <= len(data):
        raise ValueError(f"videos: expected at least 8 and at most SynVid's {len(data)}, got "
                         f"{cfg.videos}: correct --videos, or make more trajectories")
    if not set(cfg.blocks or ()) <= set(range(depth)):
        raise ValueError(f"blocks: expected some of 0 … {depth - 1}, got {cfg.blocks}: correct "
                         "--blocks")
    blocks = cfg.blocks or [round((i + 1) * depth / count) - 1 for i in range(count)]
    with lock_run_folder(Path(cfg.run) / "taps"):
        out = announce(cfg, "taps", ranks.rank)
        found, taps = examine(cfg, data, ranks, blocks), distill.tap_blocks(cfg, depth)
        if ranks.rank == 0:
            write_json(out / "taps.json", {"config": asdict(cfg), "D7": taps, "found": found})
            draw(out / "taps.png", found, taps,
                 f"accuracy on teacher@{len(cfg.key) - 1} against teacher@{cfg.n}")
            for k in range(len(taps)):
                heads = {entry["block"]: entry["head"] for entry in found if entry["k"] == k}
                block = max(heads, key=heads.get)
                chosen = f", D7's block {taps[k]} {heads[taps[k]]:.2f}" if taps[k] in heads else ""
                print(f"t'_{k} = {data.t_key[k]:.3g}: a head is best at block {block}: "
                      f"{heads[block]:.2f}{chosen}")
            print(f"figure: {out / 'taps.png'}")
    dist.barrier()


if __name__ == "__main__":
    cli(main)
