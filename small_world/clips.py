"""The small world: captioned clips drawn by formula, and the exact oracle that reads them back.

One object on a grey ground: a caption names its colour, its shape and the direction in which it
moves; size, place, speed, shade and a slight slope stay undecided, so that a caption has many
videos and the denoising paths curve: that is what few steps get wrong and what distillation
repairs. The oracle (`read_clip`) reads the three attributes back from any video.

Held-out: each of the 72 combinations of attributes has four wordings; one of the four (which one
depends on the combination) never occurs in training.

Legend: N clips, T frames, H W height and width.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ranks import generator

# ------------------------------------------------------------------------------------- Clips

COLOURS = {"red": (0.9, 0.1, 0.1), "yellow": (0.9, 0.9, 0.1), "green": (0.1, 0.9, 0.1),
           "cyan": (0.1, 0.9, 0.9), "blue": (0.1, 0.1, 0.9), "pink": (0.9, 0.1, 0.9)}
SHAPES = ("disc", "pillar", "plank")  # a disc, a tall bar, a wide bar, of equal area
DIRECTIONS = {"right": (1.0, 0.0), "down": (0.0, 1.0), "left": (-1.0, 0.0), "up": (0.0, -1.0)}
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "direction": tuple(DIRECTIONS)}
WORDINGS = ("a {colour} {shape} moves {direction}", "{colour} {shape} moving {direction}",
            "a {shape}, {colour}, goes {direction}", "the {colour} {shape} drifts {direction}")
COMBINATIONS = tuple(itertools.product(*(range(len(v)) for v in ATTRIBUTES.values())))
RADIUS = (0.15, 0.21)  # least and largest, of a disc of an object's area, in sides
BAR = 2.5  # long side of a bar, in short sides
PALETTE = torch.tensor(tuple(COLOURS.values()))  # [colours, 3] in [0, 1]
HEADINGS = torch.tensor(tuple(DIRECTIONS.values()))  # [directions, 2] as (x right, y down)


def caption(combination: int, wording: int) -> str:
    """The text of one combination of attributes in one wording."""
    picked = zip(ATTRIBUTES, COMBINATIONS[combination], strict=True)
    return WORDINGS[wording].format(**{name: ATTRIBUTES[name][index] for name, index in picked})


def draw(seed: int, index: int, held_out: bool) -> tuple[int, int, Tensor]:
    """Combination, wording and 7 uniform numbers of clip `index`: a function of its arguments."""
    g = generator(seed, "held-out clip" if held_out else "clip", index)
    u = torch.rand(9, generator=g, dtype=torch.float64)
    total, ways = len(COMBINATIONS), len(WORDINGS)
    if held_out:  # every 72 indices show each combination once
        combination = index % total
        return combination, combination % ways, u[2:]
    combination = int(u[0] * total)
    return combination, (combination + 1 + int(u[1] * (ways - 1))) % ways, u[2:]


def make_captions(seed: int, start: int, count: int, held_out: bool = False) -> list[str]:
    """Captions of clips `start` ... `start + count - 1`, the same as `make_clips` returns."""
    drawn = (draw(seed, i, held_out)[:2] for i in range(start, start + count))
    return [caption(combination, wording) for combination, wording in drawn]


def make_clips(seed: int, start: int, count: int, size: int = 48, frames: int = 9,
               held_out: bool = False, radius: tuple[float, float] = RADIUS,
               ) -> tuple[Tensor, list[str], dict[str, Tensor]]:
    """Draw clips by signed distance; clip i depends on (seed, i, held_out) alone.

    Returns video [N, 3, T, size, size] fp32 in [-1, 1], N captions, and for each of "colour",
    "shape", "direction" the indices [N] into ATTRIBUTES. `held_out` draws the held-out wordings;
    radius is the range of sizes.
    """
    drawn = [draw(seed, i, held_out) for i in range(start, start + count)]
    captions = [caption(combination, wording) for combination, wording, _ in drawn]
    chosen = torch.tensor([COMBINATIONS[combination] for combination, _, _ in drawn]).view(-1, 3)
    attributes = dict(zip(ATTRIBUTES, chosen.unbind(1), strict=True))
    u = torch.stack([u for _, _, u in drawn]).float()  # [N, 7]
    radius = radius[0] + (radius[1] - radius[0]) * u[:, 0]  # of a disc of the same area, in sides
    travel = 0.20 + 0.14 * u[:, 1]  # way of the centre in the whole clip, in sides
    slope = 0.25 * (2 * u[:, 2] - 1)  # sideways per forward
    forward = HEADINGS[attributes["direction"]]
    sideways = forward.flip(1) * torch.tensor([-1.0, 1.0])
    step = travel[:, None] * (forward + slope[:, None] * sideways)  # [N, 2]
    room = 0.5 - half_sizes(attributes["shape"], radius) - step.abs() / 2  # never cut by the frame
    middle = 0.5 + room.clamp(min=0) * (2 * u[:, 3:5] - 1)
    when = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    centre = middle[:, None] + when[:, None] * step[:, None]  # [N, T, 2]
    shade = 0.05 + 0.90 * u[:, 5]
    mask = render(attributes["shape"], centre, radius[:, None].expand(-1, frames), size)
    video = paint(mask, PALETTE[attributes["colour"]], shade[:, None].expand(-1, 3))
    return video, captions, attributes


def half_sizes(shape: Tensor, radius: Tensor) -> Tensor:
    """Half width and half height [..., 2] of shapes whose area is that of a disc of `radius`."""
    short = radius * math.sqrt(math.pi / 4 / BAR)
    tall, wide = torch.stack((short, BAR * short), -1), torch.stack((BAR * short, short), -1)
    disc = torch.stack((radius, radius), -1)
    kind = shape.view(shape.shape + (1,) * (disc.ndim - shape.ndim))
    return torch.where(kind == 0, disc, torch.where(kind == 1, tall, wide))


def render(shape: Tensor, centre: Tensor, radius: Tensor, size: int) -> Tensor:
    """Coverage [N, T, size, size] of shapes [N] at centre [N, T, 2], radius [N, T], in sides."""
    at = (torch.arange(size, device=centre.device) + 0.5) / size
    dx = (at - centre[..., :1])[..., None, :]  # [N, T, 1, W]
    dy = (at - centre[..., 1:])[..., :, None]  # [N, T, H, 1]
    half = half_sizes(shape, radius)[..., None, None, :]
    disc = (dx.square() + dy.square()).sqrt() - radius[..., None, None]
    bar = torch.maximum(dx.abs() - half[..., 0], dy.abs() - half[..., 1])
    distance = torch.where(shape.view(-1, 1, 1, 1) == 0, disc, bar)
    return (0.5 - distance * size).clamp(0, 1)


def paint(mask: Tensor, colour: Tensor, ground: Tensor) -> Tensor:
    """Video [N, 3, T, H, W] of coverage [N, T, H, W]; colour and ground [N, 3] in [0, 1]."""
    colour, ground = colour.view(-1, 3, 1, 1, 1), ground.reshape(-1, 3, 1, 1, 1)
    return (ground + mask[:, None] * (colour - ground)) * 2 - 1


# ------------------------------------------------------------------------------------ Oracle


def caption_attributes(text: str) -> dict[str, int]:
    """Indices into ATTRIBUTES of the words of a caption; -1 where it names none."""
    words = [word.strip(",.;:!?").lower() for word in text.split()]
    return {name: next((values.index(w) for w in words if w in values), -1)
            for name, values in ATTRIBUTES.items()}


def read_clip(video: Tensor) -> dict[str, Tensor]:
    """Read the attributes of video [N, 3, T, H, W] in [-1, 1] back, by fitting a clip to it.

    Saturation gives the object's coverage, its mean hue the colour, moments the place and the area
    in each frame, the best soft overlap with a shape of that area the shape, a straight line
    through the places the direction. Returns tensors [N]: "colour", "shape", "direction" (indices
    into ATTRIBUTES; -1 where there is no such object: overlap under 0.5 or hardly any motion),
    "psnr" (dB, of the video against the drawn fit) and "iou" (soft overlap with the fit).
    """
    rgb = video.float().clamp(-1, 1) / 2 + 0.5
    count, _, frames, size, _ = rgb.shape
    saturation = rgb.amax(1) - rgb.amin(1)  # [N, T, H, W]
    full = saturation.flatten(1).quantile(0.97, dim=1).clamp(min=0.2)
    mask = ((saturation / full.view(-1, 1, 1, 1) - 0.15) / 0.7).clamp(0, 1)
    weight = mask.flatten(2).sum(2).clamp(min=1e-6)  # [N, T] pixels
    colour, ground = mean_colour(rgb, mask > 0.9), mean_colour(rgb, mask < 0.02)
    hue = F.normalize(colour - colour.mean(1, keepdim=True), dim=1)
    named = F.normalize(PALETTE - PALETTE.mean(1, keepdim=True), dim=1).to(hue)
    at = (torch.arange(size, device=rgb.device) + 0.5) / size
    centre = torch.stack(((mask.sum(2) * at).sum(-1), (mask.sum(3) * at).sum(-1)), -1)
    centre = centre / weight[..., None]  # [N, T, 2]
    when = torch.linspace(-0.5, 0.5, frames, device=rgb.device)
    step = (centre * when[:, None]).sum(1) / when.square().sum().clamp(min=1e-6)  # [N, 2]
    line = centre.mean(1, keepdim=True) + when[:, None] * step[:, None]  # [N, T, 2]
    radius = (weight.mean(1, keepdim=True) / math.pi).sqrt().expand(-1, frames) / size
    kinds = torch.arange(len(SHAPES), device=rgb.device).view(-1, 1).expand(-1, count)
    fits = torch.stack([render(kind, line, radius, size) for kind in kinds])  # [shapes, N, T, H, W]
    union = torch.maximum(fits, mask).flatten(2).sum(2).clamp(min=1e-6)
    iou, shape = (torch.minimum(fits, mask).flatten(2).sum(2) / union).max(0)  # [N]
    fit = fits[shape, torch.arange(count, device=rgb.device)]
    error = (paint(fit, colour, ground) - video.float().clamp(-1, 1)).square().flatten(1).mean(1)
    found, moved = iou >= 0.5, step.norm(dim=1) >= 0.05
    absent = torch.full_like(shape, -1)
    return {"colour": torch.where(found, (hue @ named.T).argmax(1), absent),
            "shape": torch.where(found, shape, absent),
            "direction": torch.where(found & moved, (step @ HEADINGS.to(step).T).argmax(1), absent),
            "psnr": 10 * (4 / error.clamp(min=1e-10)).log10(), "iou": iou}


def mean_colour(rgb: Tensor, where: Tensor) -> Tensor:
    """Mean [N, 3] of rgb [N, 3, T, H, W] over the pixels of `where` [N, T, H, W]."""
    area = where.flatten(1).sum(1).clamp(min=1)
    return (rgb * where[:, None]).flatten(2).sum(2) / area[:, None]


def oracle_hits(video: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Which clips [N, 3, T, H, W] show what their captions say: bool [N] by attribute and "all"."""
    seen, named = read_clip(video.cpu()), [caption_attributes(text) for text in captions]
    hits = {name: seen[name] == torch.tensor([n[name] for n in named]) for name in ATTRIBUTES}
    return hits | {"all": torch.stack(list(hits.values())).all(0)}


def agreement(video: Tensor, captions: list[str]) -> dict[str, float]:
    """Part of the clips [N, 3, T, H, W] that show what their captions say, by attribute and all."""
    return {name: float(hits.float().mean()) for name, hits in oracle_hits(video, captions).items()}


def gate(name: str, got: float, least: float = -math.inf, most: float = math.inf) -> dict:
    """A bound on a figure, and whether it is kept."""
    wanted = (f"{least:g} … {most:g}" if math.inf not in (-least, most) else
              f"≥ {least:g}" if most == math.inf else f"≤ {most:.4g}")
    return {"gate": name, "got": got, "wanted": wanted, "pass": least <= got <= most}


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip [N, 3, T, H, W] in [-1, 1]."""
    return 10 * (4 / (video - reference).square().flatten(1).mean(1).clamp(min=1e-10)).log10()


def high_frequency(video: Tensor) -> float:
    """Mean power of video [N, 3, T, H, W] above half the Nyquist frequency, in space."""
    height, width = video.shape[-2:]
    spectrum = torch.fft.fft2(video.float(), norm="ortho").abs().square()
    rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    high = torch.maximum(rows[:, None], columns[None]).to(spectrum.device) >= 0.25
    return float(spectrum[..., high].mean())
