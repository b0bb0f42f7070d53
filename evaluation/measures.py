"""How far a model's videos are from the teacher's: the columns of the table, in float64.

All models start from the same noise on the same captions. N videos have latents x, teacher@n's are
x50; y are the reference, other teacher@n samples of the same captions, with other noise.

  endpoint     mean of ‖x − x50‖² / ‖x50‖²
  energy       2 E|x − y| − E|x − x'| − E|y − y'| over pairs of different videos, |·| root mean
               square over latent elements, minus the same for teacher@n
  sliced W     mean over fixed random unit directions of the Wasserstein-1 distance of x to y, minus
               the same for teacher@n, since the mean itself is above 0 for equal distributions
  HF           power of the videos above half the Nyquist frequency, divided by teacher@n's
  edges        correlation of the videos' spatial gradients with teacher@n's: HF measures how
               strong edges are, this measures whether they are in their places
  floor        detail of the checkered floor, divided by teacher@n's (small world only)
  spread       variance of the latents over videos, summed over elements, divided by teacher@n's
  C2ST         accuracy of a small classifier that is trained to separate x from y; 0.5 is chance,
               and with 144 videos a side everything between .44 and .56 may be chance
  first frame  PSNR of the first frame against the given image (image-to-video only)
  oracle       fraction of videos that show what their captions state (small world only)

± is a standard error over videos, by jackknife; for C2ST it is that of the test decisions. In the
mean row of several students it is over students.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Shared
from common.prompts import Prompt
from common.ranks import Timer, generator, progress_bar
from common.video import centre_crop, read_image
from evaluation.sheets import thumbnail
from evaluation.statistics import Statistic, jackknife_error, leave_one_out, mean_and_error
from small_world.oracle import (
    caption_attributes, floor_detail, gate, high_frequency, oracle_hits, psnr)

# --------------------------------------------------------------------------- distances of latents

BLOCK = 64  # videos whose latents are in float64 at once; all of many large videos take 100 GB


def endpoint_error(x: Tensor, x50: Tensor) -> Tensor:
    """‖x − x50‖² / ‖x50‖² of each video, float64 [N], for latents [N, …] from the same noise."""
    return torch.stack([(a.double() - b).square().sum() / b.double().square().sum()
                        for a, b in zip(x.flatten(1), x50.flatten(1), strict=True)])


def by_blocks(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """f(x, y) [N, M] for x [N, …] and y [M, …], flattened per video, in float64 and by blocks."""
    return torch.cat([torch.cat([f(a, b.double()) for b in y.flatten(1).split(BLOCK)], 1)
                      for a in map(Tensor.double, x.flatten(1).split(BLOCK))])


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square difference of each x [N, …] to each y [M, …], float64 [N, M]."""
    return by_blocks(partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist"),
                     x, y) / x[0].numel() ** 0.5


def energy_distance(xx: Tensor, yy: Tensor, xy: Tensor) -> float:
    """2 E|x − y| − E|x − x'| − E|y − y'| from the distance matrices of N videos each.

    x_i and y_i share caption i, so the diagonal of xy is left out like those of xx and yy: all
    three means are over the same pairs of captions, and equal distributions give 0 on average.
    Source: Székely and Rizzo, 2013 (U-statistic).
    """
    off = 1 - torch.eye(len(xx), dtype=xx.dtype)
    return float(((2 * xy - xx - yy) * off).sum() / off.sum())


def projections(x: Tensor, count: int) -> Tensor:
    """x [N, …] projected onto `count` fixed random unit directions, float64 [N, count]."""
    blocks, g, out = x.flatten(1).split(BLOCK), generator("sliced Wasserstein"), []
    for _ in range(count):  # one by one: large latents have millions of elements
        u = torch.randn(x[0].numel(), generator=g, dtype=torch.float64)
        u /= u.norm()
        out.append(torch.cat([block.double() @ u for block in blocks]))
    return torch.stack(out, 1)


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Mean over directions of the Wasserstein-1 distance of projections x, y [N, directions]."""
    return float((x.sort(0).values - y.sort(0).values).abs().mean())


def set_distances(x: Tensor, y: Tensor, directions: int) -> dict[str, Statistic]:
    """Energy and sliced Wasserstein distance of latents x, y [N, …] as functions of indices."""
    xx, yy, xy = distances(x, x), distances(y, y), distances(x, y)
    p, q = projections(x, directions), projections(y, directions)
    return {"energy": lambda i: energy_distance(xx[i][:, i], yy[i][:, i], xy[i][:, i]),
            "sliced": lambda i: sliced_wasserstein(p[i], q[i])}


def spread(x: Tensor, reference: Tensor) -> Statistic:
    """Variance of x [N, …] over videos, summed over elements, divided by reference's [N, …]."""
    def variance(z: Tensor) -> Statistic:
        gram = by_blocks(lambda a, b: a @ b.T, z, z)
        return lambda i: float(gram.diagonal()[i].sum() - gram[i][:, i].sum() / len(i))

    numerator, denominator = variance(x), variance(reference)
    return lambda i: numerator(i) / denominator(i)


C2ST_FITS, C2ST_BATCH = 3, 16  # initialisations; videos of each kind in an iteration


def c2st(x: Tensor, y: Tensor, steps: int, device: torch.device) -> tuple[float, float]:
    """Accuracy of a classifier that is trained to separate x from y [N,C,T,H,W]; 0.5 is chance.

    Half of the videos train it and the other half test it, then the other way round. Returns the
    mean over C2ST_FITS initialisations and the standard error of 2 N test decisions.
    Source: the classifier two-sample test, Lopez-Paz and Oquab, 2017.
    """
    halves, accuracies = [[x[fold::2], y[fold::2]] for fold in (0, 1)], []
    for fit in range(C2ST_FITS):
        hits = [classifier_hits(halves[fold], halves[1 - fold], steps, fit, device)
                for fold in (0, 1)]
        accuracies.append(sum(hits) / (2 * len(x)))
    mean = sum(accuracies) / C2ST_FITS
    return mean, (mean * (1 - mean) / (2 * len(x))) ** 0.5


def classifier_hits(train: list[Tensor], test: list[Tensor], steps: int, fit: int,
                    device: torch.device) -> int:
    """Number of `test` videos, [M,C,T,H,W] from x and as many from y, that a small network assigns
    to the right one of the two after `steps` iterations on `train`. `fit` seeds its initialisation
    and the order of videos."""
    count, channels = train[0].shape[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit)
        net = nn.Sequential(
            nn.Conv3d(channels, 32, 3, padding=1), nn.SiLU(),
            nn.Conv3d(32, 64, 3, stride=(1, 2, 2), padding=1), nn.SiLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 1))
    net, g = net.to(device), generator("classifier", fit)
    opt = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    signs = torch.tensor([1.0, -1.0], device=device)[:, None]
    for _ in range(steps):
        pick = torch.randint(count, (min(C2ST_BATCH, count),), generator=g)
        logits = net(torch.cat([z[pick] for z in train]).float().to(device)).view(2, -1)
        F.softplus(-signs * logits).mean().backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    with torch.no_grad():
        videos = [*test[0], *test[1]]
        logits = torch.cat([net(torch.stack(videos[i:i + C2ST_BATCH]).float().to(device))
                            for i in range(0, len(videos), C2ST_BATCH)])
    return int((signs * logits.view(2, -1) > 0).sum())


# ------------------------------------------------------------------------------ decoded videos

@dataclass
class Samples:
    """Latents [N,C,T,H,W] that one model made, and what measure_videos found in their videos.

    kind: "teacher_n", "teacher_m", "student", or "teacher_steps" for a row of that setting.
    """
    label: str
    kind: str
    m: int                                        # steps
    latents: Tensor
    evaluations: int                              # of the network per video
    seconds: float                                # of the network per video
    values: dict[str, Tensor] = field(default_factory=dict)  # [N] by column: HF, PSNR, oracle
    examples: dict[int, Tensor] = field(default_factory=dict)  # small videos to show, by index
    decode_seconds: float = 0.0                   # per video


def is_small_world(captions: list[str], cfg: Shared) -> bool:
    """Whether every caption names a colour, a shape and a direction that the oracle can read."""
    named = [caption_attributes(caption) for caption in captions]
    return cfg.height == cfg.width and all(min(n.values()) >= 0 for n in named)


def first_frames(prompts: list[Prompt], cfg: Shared) -> list[Tensor]:
    """The prompts' images [3,H,W] in the videos' shape; empty for text-to-video."""
    size = cfg.height, cfg.width
    return [F.interpolate(centre_crop(read_image(prompt.image), *size)[None], size,
                          mode="bicubic")[0].clamp(-1, 1)
            for prompt in prompts if prompt.image is not None]


def edge_correlation(video: Tensor, target: Tensor) -> float:
    """Correlation of the spatial gradients of two videos [3,T,H,W], without their means."""
    both = [torch.cat([grey.diff(dim=-1).flatten(), grey.diff(dim=-2).flatten()])
            for grey in (video.mean(0), target.mean(0))]
    return float(F.cosine_similarity(both[0], both[1], dim=0))


@torch.no_grad()
def measure_videos(models: list[Samples], vae: nn.Module, indices: range, captions: list[str],
                   images: list[Tensor], oracle: bool, examples: set[int],
                   device: torch.device) -> None:
    """Decode the videos one by one; fill in each model's values and examples.

    Args: models, of which the first is the target; indices and captions of these videos; images,
    the first frames [3,H,W] that they were given, if any; oracle, whether they are of the small
    world; examples, indices to keep.
    """
    timer, values = Timer(device), [[] for _ in models]
    bar = progress_bar(len(indices) * len(models), "decode", dist.get_rank(), unit="video")
    for j, i in enumerate(indices):
        for number, samples in enumerate(models):
            timer.lap("other")
            video = vae.decode(samples.latents[j:j + 1].to(device))[0]
            timer.lap(str(number))
            if number == 0:
                target = video
            value = {"hf": high_frequency(video[None]), "edges": edge_correlation(video, target)}
            if images:
                value["first"] = float(psnr(video[None, :, :1].cpu(), images[j][None, :, None]))
            if oracle:
                hits = oracle_hits(video[None], captions[j:j + 1])
                value |= {"floor": float(floor_detail(video[None]))}
                value |= {name: float(hit) for name, hit in hits.items()}
            values[number].append(value)
            if i in examples:
                samples.examples[i] = thumbnail(video.cpu())
            bar.update()
    bar.close()
    for number, samples in enumerate(models):
        samples.values = {name: torch.tensor([value[name] for value in values[number]],
                                             dtype=torch.float64) for name in values[number][0]}
        samples.decode_seconds = timer.seconds()[str(number)] / len(indices)


# ------------------------------------------------------------------------------------ the table

def table_row(samples: Samples, teacher_n: Samples, reference: Tensor, directions: int,
              c2st_steps: int, device: torch.device) -> dict:
    """One row of the table: text and numbers, and by column (value, standard error).

    Args: teacher_n from the same noise; reference, teacher@n's latents [N, …] from other noise.
    """
    n, ratios = len(samples.latents), {"hf", "floor"}  # a sum over videos divided by teacher@n's
    row = {"label": samples.label, "kind": samples.kind, "m": samples.m,
           "evaluations": samples.evaluations, "seconds": samples.seconds,
           "decode_seconds": samples.decode_seconds}
    distances_of = set_distances(samples.latents, reference, directions)
    zeros = set_distances(teacher_n.latents, reference, directions)
    means = {"endpoint": endpoint_error(samples.latents, teacher_n.latents),
             **{name: value for name, value in samples.values.items() if name not in ratios}}
    pairs = {name: (samples.values[name], value) for name, value in teacher_n.values.items()
             if name in ratios and value.sum() > 0}
    statistics: dict[str, Statistic] = {
        **{name: lambda i, v=value: float(v[i].mean()) for name, value in means.items()},
        **{name: lambda i, v=both: float(v[0][i].sum() / v[1][i].sum())
           for name, both in pairs.items()},
        **{name: lambda i, d=distances_of[name], z=zeros[name]: d(i) - z(i) for name in zeros},
        "spread": spread(samples.latents, teacher_n.latents)}
    left = {name: leave_one_out(statistic, n) for name, statistic in statistics.items()}
    row |= {name: (statistic(torch.arange(n)), jackknife_error(left[name]))
            for name, statistic in statistics.items()}
    row["c2st"] = c2st(samples.latents, reference, c2st_steps, device)
    return row | {"left": {name: values.tolist() for name, values in left.items()}}


def mean_row(rows: list[dict]) -> dict:
    """The mean of students' rows, ± the standard error over students (None for one student)."""
    one = {name: value for name, value in rows[0].items() if name != "left"}  # leave-one-out values
    out = {**one, "kind": "mean",
           "label": f"{rows[0]['label'].removesuffix(' #1')}, mean of {len(rows)}"}
    for name, value in one.items():
        if isinstance(value, tuple | list):  # (value, its error); a list if read from JSON
            out[name] = mean_and_error([row[name][0] for row in rows])
        elif isinstance(value, float):
            out[name] = sum(row[name] for row in rows) / len(rows)
    return out


def gates(teacher_n: dict, teacher_m: dict, student: dict) -> list[dict]:
    """The small world's gates, from the rows of teacher@n, teacher@m and the (mean) student."""
    gap, gap_m = (abs(row["energy"][0]) for row in (student, teacher_m))
    if "first" in student:  # the image fixes the details that few steps would blur
        second = gate("student's first frame against its image, dB", student["first"][0], 30)
    else:
        second = gate(f"{teacher_m['label']}: high-frequency energy", teacher_m["hf"][0],
                      most=0.85)
    return [
        gate(f"{teacher_n['label']}: all attributes right", teacher_n["all"][0], 0.9), second,
        gate(f"student's endpoint error / {teacher_m['label']}'s",
             student["endpoint"][0] / teacher_m["endpoint"][0], most=0.5),
        gate("student's high-frequency energy", student["hf"][0], 0.95, 1.05),
        gate(f"student's energy distance from {teacher_n['label']}'s, at most "
             f"{teacher_m['label']}'s", gap, most=gap_m)]
