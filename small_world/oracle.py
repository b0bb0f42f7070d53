"""The oracle: reads colour, shape and direction of a small-world clip back from its pixels."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from small_world.clips import (
    ATTRIBUTES, EYE, HEADINGS, PALETTE, SHAPES, SIZE, silhouette, view_rays)

FOUND = 0.75  # least mean overlap of a solid with the silhouette that fits it best


def caption_attributes(text: str) -> dict[str, int]:
    """Indices into ATTRIBUTES of the words of a caption; -1 where it contains none."""
    words = [word.strip(",.;:!?").lower() for word in text.split()]
    return {name: next((values.index(w) for w in words if w in values), -1)
            for name, values in ATTRIBUTES.items()}


def coverage(rgb: Tensor) -> Tensor:
    """Coverage [N, T, H, W] of the coloured solid in frames rgb [N, 3, T, H, W] in [0, 1].

    The saturation (max - min) / max does not depend on the brightness, so that shaded sides count
    as lit ones do; floor and shadow are nearly grey.
    """
    largest = rgb.amax(1)
    saturation = (largest - rgb.amin(1)) / largest.clamp(min=0.05)
    return ((saturation - 0.25) / 0.2).clamp(0, 1)


def moments(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid [..., 2] as (x, y) in [-1, 1] and area in parts of the frame [...] of masks."""
    at = (torch.arange(mask.shape[-1], device=mask.device) + 0.5) / mask.shape[-1] * 2 - 1
    weight = mask.sum((-2, -1)).clamp(min=1e-6)
    x = (mask.sum(-2) * at).sum(-1) / weight
    y = (mask.sum(-1) * at).sum(-1) / weight
    return torch.stack((x, y), -1), weight / mask.shape[-1] / mask.shape[-2]


def canonical(mask: Tensor) -> Tensor:
    """Masks [M, H, W] moved to the middle of 32 × 32 and scaled to an equal area."""
    centre, area = moments(mask)
    scale = 1.8 * area.clamp(min=1e-4).sqrt()
    theta = torch.zeros(len(mask), 2, 3, device=mask.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, [len(mask), 1, 32, 32], align_corners=False)
    return F.grid_sample(mask[:, None], grid, align_corners=False)[:, 0]


@functools.lru_cache(maxsize=1)
def templates() -> tuple[Tensor, Tensor]:
    """Canonical silhouettes [K, 32, 32] of all solids, seen at several places, and their shapes."""
    masks, shapes = [], []
    places = torch.tensor([[x, y] for x in (-0.5, 0.0, 0.5) for y in (-0.4, 0.2, 0.8)])
    for shape, name in enumerate(SHAPES):
        for yaw in torch.arange(0, math.pi / 2, math.pi / 36).tolist() if name == "cube" else (0,):
            masks.append(silhouette(shape, places, sum(SIZE) / 2, yaw, 64))
            shapes += [shape] * len(places)
    return canonical(torch.cat(masks)), torch.tensor(shapes)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Soft intersection over union [M, K] of masks [M, P] and [K, P]."""
    both = torch.stack([torch.minimum(a, row).sum(1) for row in b], 1)
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1e-6)


def floor_path(mask: Tensor) -> Tensor:
    """Places [N, T, 2] on the floor below the centroids of masks [N, T, H, W]."""
    centre, _ = moments(mask)
    rays = torch.stack(view_rays(64), -1).view(64, 64, 3)  # linear in the place on the screen
    right, down = rays[0, -1] - rays[0, 0], rays[-1, 0] - rays[0, 0]
    middle = (rays[0, 0] + rays[-1, -1]) / 2
    ray = middle + (centre[..., :1] * right + centre[..., 1:] * down) / 2 * 64 / 63
    return torch.tensor(EYE)[:2] - ray[..., :2] / ray[..., 2:] * (EYE[2] - 0.4)


def read_clip(video: Tensor) -> dict[str, Tensor]:
    """Read the attributes of video [N, 3, T, H, W] in [-1, 1] back.

    Saturation separates the solid from the floor; its mean hue is the colour, the silhouettes that
    overlap best with it over all frames are the shape, a straight line through its places on the
    floor is the direction. Returns tensors [N]: "colour", "shape", "direction" (indices into
    ATTRIBUTES; -1 where there is no such solid: a mean overlap under FOUND, or hardly any motion),
    "iou" (mean over the frames of the overlap with the fitted solid) and "worst_iou" (the least).
    """
    rgb = video.float().clamp(-1, 1) / 2 + 0.5
    count, _, frames = rgb.shape[:3]
    mask = coverage(rgb)
    area = mask.flatten(1).sum(1).clamp(min=1e-6)
    colour = (rgb * mask[:, None]).flatten(2).sum(2) / area[:, None]              # N 3
    hue = F.normalize(colour - colour.mean(1, keepdim=True), dim=1)
    named = F.normalize(PALETTE - PALETTE.mean(1, keepdim=True), dim=1)
    silhouettes, shapes = templates()
    fits = overlap(canonical(mask.flatten(0, 1)).flatten(1), silhouettes.flatten(1))
    by_shape = torch.stack([fits[:, shapes == i].amax(1) for i in range(len(SHAPES))], 1)
    by_shape = by_shape.unflatten(0, (count, frames))                             # N T shapes
    iou, shape = by_shape.mean(1).max(1)
    worst = by_shape.gather(2, shape.view(-1, 1, 1).expand(-1, frames, 1)).amin((1, 2))
    path = floor_path(mask)                                                       # N T 2
    when = torch.linspace(-0.5, 0.5, frames)
    step = (path * when[:, None]).sum(1) / when.square().sum().clamp(min=1e-6)    # N 2
    part = mask.flatten(1).mean(1)
    found = (iou >= FOUND) & (part > 0.01) & (part < 0.3)  # noise saturates the complete frame
    moved, absent = step.norm(dim=1) >= 0.2, torch.full_like(shape, -1)
    return {"colour": torch.where(found, (hue @ named.T).argmax(1), absent),
            "shape": torch.where(found, shape, absent),
            "direction": torch.where(found & moved, (step @ HEADINGS.T).argmax(1), absent),
            "iou": iou, "worst_iou": worst}


def oracle_hits(video: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Which clips [N, 3, T, H, W] show what their captions say: bool [N] by attribute and "all"."""
    seen, named = read_clip(video.cpu()), [caption_attributes(text) for text in captions]
    hits = {name: seen[name] == torch.tensor([n[name] for n in named]) for name in ATTRIBUTES}
    return hits | {"all": torch.stack(list(hits.values())).all(0)}


def agreement(video: Tensor, captions: list[str]) -> dict[str, float]:
    """Part of the clips [N, 3, T, H, W] that show what their captions say, by attribute and all."""
    return {name: float(hits.float().mean()) for name, hits in oracle_hits(video, captions).items()}


def gate(name: str, measured: float | Tensor, least: float = -math.inf,
         most: float = math.inf) -> dict:
    """A bound on a figure, and whether it is kept."""
    measured = float(measured)
    required = (f"{least:g} … {most:g}" if math.inf not in (-least, most) else
                f"≥ {least:g}" if most == math.inf else f"≤ {most:.4g}")
    return {"gate": name, "measured": measured, "required": required,
            "pass": least <= measured <= most}


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip [N, 3, T, H, W] in [-1, 1]."""
    return 10 * (4 / (video - reference).square().flatten(1).mean(1).clamp(min=1e-10)).log10()


def floor_detail(video: Tensor) -> Tensor:
    """Energy of the floor's edges [N] in video [N, 3, T, H, W]: what a 5 × 5 mean takes away.

    Grey values in [0, 1], away from the solid; few-step samples lose the checkers first.
    """
    rgb = video.float().clamp(-1, 1) / 2 + 0.5
    grey = rgb.mean(1)                                                            # N T H W
    solid = F.max_pool2d((coverage(rgb) > 0.05).float(), 9, 1, 4)
    edges = grey - F.avg_pool2d(grey, 5, 1, 2, count_include_pad=False)
    floor = 1 - solid
    return (edges.square() * floor).flatten(1).sum(1) / floor.flatten(1).sum(1).clamp(min=1)


def high_frequency(video: Tensor) -> float:
    """Mean power of video [N, 3, T, H, W] above half the Nyquist frequency, in space."""
    height, width = video.shape[-2:]
    spectrum = torch.fft.fft2(video.float(), norm="ortho").abs().square()
    rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    high = torch.maximum(rows[:, None], columns[None]).to(spectrum.device) >= 0.25
    return float(spectrum[..., high].mean())
