"""The small world: captioned clips of a solid that slides over a checkered floor.

A caption contains the solid's colour, its shape and the direction in which it slides. Its size,
place, speed and heading, the light, and the floor's phase, greys and tint stay undecided, so that
a caption has many videos and the denoising paths curve: few Euler steps get these wrong, and
distillation repairs them. `small_world/oracle.py` reads the three attributes back from a video.

Held-out: each of the 72 combinations of attributes has four wordings; one of the four (which one
depends on the combination) never occurs in training.

Legend: N clips, T frames, P samples (rays) of a frame, H W height and width. World coordinates are
x right, y away from the camera, z up; the floor is z = 0.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ranks import generator

# --------------------------------------------------------------------------------- attributes

COLOURS = {"red": (0.90, 0.10, 0.08), "yellow": (0.95, 0.80, 0.06), "green": (0.10, 0.75, 0.16),
           "cyan": (0.08, 0.78, 0.85), "blue": (0.12, 0.22, 0.95), "pink": (0.95, 0.15, 0.75)}
SHAPES = ("ball", "cube", "cone")
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "away": (0.0, 1.0), "near": (0.0, -1.0)}
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "direction": tuple(DIRECTIONS)}
WORDINGS = ("a {colour} {shape} slides {direction}", "{colour} {shape} sliding {direction}",
            "a {shape}, {colour}, moves {direction}", "the {colour} {shape} drifts {direction}")
COMBINATIONS = tuple(itertools.product(*(range(len(v)) for v in ATTRIBUTES.values())))
SIZE = (0.48, 0.64)  # least and largest radius of a ball; the other solids look equally large
PALETTE = torch.tensor(tuple(COLOURS.values()))  # [colours, 3] in [0, 1]
HEADINGS = torch.tensor(tuple(DIRECTIONS.values()))  # [directions, 2] as (x, y)


def caption(combination: int, wording: int) -> str:
    """The text of one combination of attributes in one wording."""
    picked = zip(ATTRIBUTES, COMBINATIONS[combination], strict=True)
    return WORDINGS[wording].format(**{name: ATTRIBUTES[name][index] for name, index in picked})


def draw_scene(seed: int, index: int, held_out: bool) -> tuple[int, int, Tensor]:
    """Combination, wording and 14 uniform numbers of clip `index`: a function of its arguments."""
    g = generator(seed, "held-out clip" if held_out else "clip", index)
    u = torch.rand(16, generator=g, dtype=torch.float64)
    total, ways = len(COMBINATIONS), len(WORDINGS)
    if held_out:  # every 72 indices show each combination once
        combination = index % total
        return combination, combination % ways, u[2:]
    combination = int(u[0] * total)
    return combination, (combination + 1 + int(u[1] * (ways - 1))) % ways, u[2:]


def make_captions(seed: int, start: int, count: int, held_out: bool = False) -> list[str]:
    """Captions of clips `start` ... `start + count - 1`, the same as `make_clips` returns."""
    drawn = (draw_scene(seed, i, held_out)[:2] for i in range(start, start + count))
    return [caption(combination, wording) for combination, wording in drawn]


# ------------------------------------------------------------------------------------- solids
# A ray is origin + s·direction, each a tuple of three tensors (x, y, z) that broadcast, relative to
# the centre of the solid's base. Each function returns the ray's s at its first intersection
# (infinity where there is none) and the outward normal there, which is not normalised.

Vector = tuple[Tensor, Tensor, Tensor]


def dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def along(origin: Vector, direction: Vector, s: Tensor) -> Vector:
    return tuple(o + s * d for o, d in zip(origin, direction, strict=True))


def unit(v: Vector) -> Vector:
    length = dot(v, v).sqrt()
    return tuple(part / length for part in v)


def hit_ball(origin: Vector, direction: Vector, size: float) -> tuple[Tensor, Vector]:
    """A ball of radius `size` that touches the floor."""
    o = (origin[0], origin[1], origin[2] - size)
    a, b = dot(direction, direction), dot(o, direction)
    inside = b * b - a * (dot(o, o) - size * size)
    s = torch.where(inside > 0, (-b - inside.clamp(min=0).sqrt()) / a, math.inf)
    return torch.where(s > 0, s, math.inf), along(o, direction, s.nan_to_num(posinf=0))


def hit_cube(origin: Vector, direction: Vector, size: float) -> tuple[Tensor, Vector]:
    """A cube whose sides are 1.6·size, parallel to x and y, on the floor."""
    half = 0.8 * size
    o = (origin[0], origin[1], origin[2] - half)
    faces = [((-half - p) / d, (half - p) / d) for p, d in zip(o, direction, strict=True)]
    enter = [torch.minimum(a, b) for a, b in faces]
    leave = [torch.maximum(a, b) for a, b in faces]
    s = torch.maximum(torch.maximum(enter[0], enter[1]), enter[2])
    out = torch.minimum(torch.minimum(leave[0], leave[1]), leave[2])
    normal = tuple(-torch.sign(d) * (e == s) for d, e in zip(direction, enter, strict=True))
    return torch.where((s < out) & (s > 0), s, math.inf), normal


def hit_cone(origin: Vector, direction: Vector, size: float) -> tuple[Tensor, Vector]:
    """A cone on the floor, 2.2·size high, whose base has a radius of 1.1·size."""
    height, slope = 2.2 * size, 0.5  # slope: radius per height
    (x, y, z), (dx, dy, dz) = origin, direction
    w = height - z  # below the apex
    a = dx * dx + dy * dy - slope ** 2 * dz * dz
    b = x * dx + y * dy + slope ** 2 * w * dz
    inside = b * b - a * (x * x + y * y - slope ** 2 * w * w)
    root, s = inside.clamp(min=0).sqrt(), torch.tensor(math.inf)
    for sign in (-1, 1):  # the double cone has two intersections; that below the apex counts
        t = (-b + sign * root) / a
        on = (inside > 0) & (t > 0) & ((w - t * dz - height / 2).abs() <= height / 2)
        s = torch.where(on & (t < s), t, s)
    px, py, pz = along(origin, direction, s.nan_to_num(posinf=0))
    return s, (px, py, slope ** 2 * (height - pz))


HITS = (hit_ball, hit_cube, hit_cone)  # in the order of SHAPES


def turn(v: Vector, yaw: float) -> Vector:
    """A vector turned about the z axis by `yaw` radians."""
    c, s = math.cos(yaw), math.sin(yaw)
    return c * v[0] - s * v[1], s * v[0] + c * v[1], v[2]


def hit(shape: int, origin: Vector, direction: Vector, size: float, yaw: float,
        ) -> tuple[Tensor, Vector]:
    """Intersections with a solid that is turned by `yaw`, which only a cube shows."""
    if SHAPES[shape] != "cube":
        return HITS[shape](origin, direction, size)
    s, normal = hit_cube(turn(origin, -yaw), turn(direction, -yaw), size)
    return s, turn(normal, yaw)


# ------------------------------------------------------------------------------------- camera

EYE, TARGET, HALF_VIEW = (0.0, -4.2, 3.6), (0.0, 0.15, 0.25), 0.26  # HALF_VIEW: a tangent
OVERSAMPLE = 2  # rays for a pixel's side
AMBIENT, SHADOW, SHINE = 0.42, 0.52, 0.35  # parts of light: everywhere, in shadow, of a highlight


def view_rays(side: int) -> Vector:
    """Directions [side²] of the rays through a square grid of side × side, by row."""
    forward = F.normalize(torch.tensor(TARGET) - torch.tensor(EYE), dim=0)
    right = torch.tensor((1.0, 0.0, 0.0))
    up = torch.linalg.cross(right, forward)
    at = ((torch.arange(side) + 0.5) / side * 2 - 1) * HALF_VIEW
    rays = forward + at.view(1, -1, 1) * right - at.view(-1, 1, 1) * up  # H W 3
    return rays.flatten(0, 1).unbind(1)


def origins(centre: Tensor) -> Vector:
    """The eye relative to each centre [T, 2] of a solid's base, as [T, 1] each."""
    x, y = centre.unbind(1)
    return EYE[0] - x[:, None], EYE[1] - y[:, None], torch.full_like(x, EYE[2])[:, None]


def downsample(samples: Tensor, size: int) -> Tensor:
    """[…, T, P] samples of OVERSAMPLE² a pixel, averaged to […, T, size, size]."""
    side = size * OVERSAMPLE
    return F.avg_pool2d(samples.unflatten(-1, (side, side)), OVERSAMPLE)


def silhouette(shape: int, centre: Tensor, size: float, yaw: float, pixels: int) -> Tensor:
    """Coverage [T, pixels, pixels] of a solid at centre [T, 2] of its base."""
    s, _ = hit(shape, origins(centre), view_rays(pixels * OVERSAMPLE), size, yaw)
    return downsample(s.isfinite().float(), pixels)


def render(shape: int, colour: Tensor, centre: Tensor, size: float, yaw: float, light: Vector,
           greys: tuple[Tensor, Tensor], phase: tuple[float, float], tile: float,
           pixels: int) -> Tensor:
    """Ray-cast one clip: a shaded solid, its shadow and a checkered floor.

    Args: shape, an index into SHAPES; colour [3] in [0, 1]; centre [T, 2] of the solid's base in
    each frame; light, a unit vector towards the light; greys, the two colours [3] of the floor's
    tiles; phase, the floor's offset in tiles; tile, their side; pixels, the frames' side.
    Returns [3, T, pixels, pixels] in [0, 1].
    """
    rays, origin = view_rays(pixels * OVERSAMPLE), origins(centre)
    s, normal = hit(shape, origin, rays, size, yaw)                               # T P
    seen = s.isfinite()
    # the floor, its coordinates relative to the world's origin and to the solid
    down = -EYE[2] / rays[2]                                                      # P
    x, y = EYE[0] + down * rays[0], EYE[1] + down * rays[1]
    odd = ((x / tile + phase[0]).floor() + (y / tile + phase[1]).floor()) % 2     # P
    local = (x - centre[:, :1], y - centre[:, 1:], torch.full_like(s, 1e-4))      # T P
    shaded = hit(shape, local, light, size, yaw)[0].isfinite()
    dim = torch.where(shaded, SHADOW, 1.0)                                        # T P
    image = torch.stack([(greys[0][c] + odd * (greys[1][c] - greys[0][c])) * dim
                         for c in range(3)])                                      # 3 T P
    # the solid: ambient and diffuse light, a highlight half-way between light and eye
    n, ray = (unit(tuple(part.expand_as(s)[seen] for part in v)) for v in (normal, rays))
    diffuse = dot(n, light).clamp(min=0)                                          # K samples seen
    half = unit(tuple(toward - part for toward, part in zip(light, ray, strict=True)))
    shine = SHINE * dot(n, half).clamp(min=0) ** 24 * (diffuse > 0)
    lit = AMBIENT + (1 - AMBIENT) * diffuse
    image[:, seen] = (colour[:, None] * lit + shine).clamp(max=1)
    return downsample(image, pixels)


# -------------------------------------------------------------------------------------- clips


def make_clip(shape: int, colour: int, direction: int, u: list[float], size: int, frames: int,
              radius: tuple[float, float]) -> Tensor:
    """One clip [3, T, size, size] in [0, 1] of attributes and 14 uniform numbers u."""
    r = radius[0] + (radius[1] - radius[0]) * u[0]
    travel, slope = 0.7 + 0.35 * u[1], 0.25 * (2 * u[2] - 1)
    heading = HEADINGS[direction]
    step = travel * (heading + slope * heading.flip(0) * torch.tensor([-1.0, 1.0]))
    nearest, farthest = -0.62 + step[1].abs() / 2, 0.9 - step[1].abs() / 2  # so that the frame
    y = nearest + (farthest - nearest) * u[3]                               # never cuts the solid
    room = (1.2 + 0.2 * (y - step[1].abs() / 2) - 1.15 * r - step[0].abs() / 2).clamp(min=0)
    when = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    centre = torch.stack((room * (2 * u[4] - 1), y)) + when[:, None] * step       # T 2
    azimuth, elevation = 0.6 + 1.9 * u[5], 0.85 + 0.2 * u[6]
    light = tuple(torch.tensor(v) for v in (math.cos(azimuth) * math.cos(elevation),
                                            -math.sin(azimuth) * math.cos(elevation),
                                            math.sin(elevation)))
    grey, contrast = 0.48 + 0.22 * u[7], 0.22 + 0.08 * u[8]
    tint = 1 + 0.05 * (2 * torch.tensor(u[9:12]) - 1)
    greys = ((grey - contrast / 2) * tint, (grey + contrast / 2) * tint)
    return render(shape, PALETTE[colour], centre, r, math.pi / 2 * u[12], light, greys,
                  (u[13], (u[13] * 7.31) % 1), 1.2, size)


def make_clips(seed: int, start: int, count: int, size: int = 64, frames: int = 9,
               held_out: bool = False, radius: tuple[float, float] = SIZE,
               ) -> tuple[Tensor, list[str], dict[str, Tensor]]:
    """Ray-cast one or more clips; clip i depends on (seed, i, held_out) and the sizes alone.

    Returns video [N, 3, T, size, size] fp32 in [-1, 1], N captions, and for each of "colour",
    "shape", "direction" the indices [N] into ATTRIBUTES. `held_out` draws the held-out wordings;
    radius is the range of the solids' sizes.
    """
    drawn = [draw_scene(seed, i, held_out) for i in range(start, start + count)]
    captions = [caption(combination, wording) for combination, wording, _ in drawn]
    chosen = torch.tensor([COMBINATIONS[combination] for combination, _, _ in drawn])
    clips = [make_clip(shape, colour, direction, u.tolist(), size, frames, radius)
             for (colour, shape, direction), (_, _, u) in zip(chosen.tolist(), drawn, strict=True)]
    return torch.stack(clips) * 2 - 1, captions, dict(
        zip(ATTRIBUTES, chosen.unbind(1), strict=True))
