"""The paper's 1D experiment (Sec. 3.1, 3.2, A.1, Fig. 2), redrawn with real numbers and controls.

    python toy1d.py [--quick] [--seeds N] [--out toy1d]    (--help lists all options)

Reads nothing. Writes OUT.png, OUT.pdf and OUT.json (config, every number that the figure draws,
claims, CPU seconds) and prints which claims hold. docs/toy1d.md lists what the paper leaves open.

t = 1 is noise, t = 0 is data; p are the training points, p_d the points used for distillation.
A point x_t, diffused from x_d, is useful if and only if some teacher trajectory passes within
epsilon of it at t and ends at the training point nearest to x_d. A useless point is off every
trajectory (dataset mismatch), or only on trajectories that end elsewhere (noise mismatch).
"""

import argparse
import hashlib
import json
import math
import os
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from matplotlib import colors, rc_context, ticker
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

WAYS = ("outward", "inward", "one-sided")
CLASSES = ("useful", "dataset", "noise")  # labels 0, 1, 2


@dataclass(frozen=True)
class Config:
    data: tuple = (-3.0, 3.0)  # p (A.1)
    mismatch: tuple = WAYS     # the first is used for panels a–d, f, g and the controls
    M: tuple = (0.0, 2.0, 4.0, 6.0)
    epsilon: float = 0.05
    seeds: int = 1
    iterations: int = 10_000   # of the teacher (A.1)
    batch: int = 2048          # of the teacher (A.1)
    lr: float = 1e-4           # of the teacher (A.1)
    trajectories: int = 5000   # teacher trajectories, and diffused points per time
    n: int = 50                # Euler steps per trajectory
    K: int = 5                 # PeRFlow's windows and AccVideo's m
    shift: float = 7.0         # AccVideo: every (n / K)-th time of this grid is a key timestep
    pairs: int = 40_000        # training pairs per student
    student_iterations: int = 1500
    student_batch: int = 512
    student_lr: float = 1e-3
    repeats: int = 3           # trainings per student, on different batches; samples are pooled
    samples: int = 8000        # samples per student and training
    far: float = 0.5           # "far" is the share of samples farther than this from p


QUICK = dict(iterations=2000, lr=1e-3, pairs=10_000, student_iterations=500, student_batch=256,
             repeats=1)


def generator(seed: int, purpose: str) -> torch.Generator:
    """A separate random stream for each purpose, so that no draw depends on another."""
    key = hashlib.sha256(f"{seed} {purpose}".encode()).hexdigest()
    return torch.Generator().manual_seed(int(key[:15], 16))


# ---------------------------------------------------------------- Sec. 3.2: the data
def distance_to(x: Tensor, p: Tensor) -> Tensor:
    """Distance of each x to the nearest point of p."""
    return (x[..., None] - p).abs().amin(-1)


def mismatch(p_d: Tensor, p: Tensor) -> Tensor:
    """M = Σ_{x_d ∈ p_d} min {|x_d − x| for x ∈ p}. Eq. 4."""
    return distance_to(p_d, p).sum()


def nearest(x: Tensor, p: Tensor) -> Tensor:
    """Index of the training point nearest to x; a tie goes to the lower point."""
    return (x[..., None] - p).abs().argmin(-1)


def shift_data(p: Tensor, way: str, M: float) -> Tensor:
    """A p_d of mismatch M: the outermost points of p (sorted) are moved, the others are kept."""
    low, high = {"outward": (-M / 2, M / 2), "inward": (M / 2, -M / 2), "one-sided": (0, M)}[way]
    return torch.cat([p[:1] + low, p[1:-1], p[-1:] + high])


# ---------------------------------------------------------------- Sec. 3.1: flow matching
def forward_diffusion(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """x_t = μ_t(x_0) + σ_t x_1 with μ_t = (1−t) x_0 and σ_t = t. Eq. 1, 2."""
    return (1 - t) * x_0 + t * x_1


def velocity_target(x_0: Tensor, x_1: Tensor) -> Tensor:
    """u_t(x|x_0) = x_1 − x_0. Sec. 3.1."""
    return x_1 - x_0


def flow_matching_loss(v, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """E ‖v(x_t, t) − u_t(x|x_0)‖². Eq. 3."""
    return (v(forward_diffusion(x_0, x_1, t), t) - velocity_target(x_0, x_1)).square().mean()


def posterior(x_t: Tensor, t: Tensor, p: Tensor) -> Tensor:
    """P(x_0 = p_i | x_t), [..., len(p)], for equally likely points p. Bayes on Eq. 1."""
    distance = x_t[..., None] - (1 - t[..., None]) * p
    return torch.softmax(-distance.square() / (2 * t[..., None].square()), dim=-1)


def exact_velocity(x_t: Tensor, t: Tensor, p: Tensor) -> Tensor:
    """The minimiser of Eq. 3: v(x_t, t) = E[x_1 − x_0 | x_t] = (x_t − E[x_0 | x_t]) / t, t > 0."""
    return (x_t - posterior(x_t, t, p) @ p) / t


def bayes_floor(p: Tensor, times: int = 1000) -> float:
    """The minimum of Eq. 3: E Var(x_0 | x_t) / t², by quadrature over t and x_1."""
    p = p.double()
    t = (torch.arange(times, dtype=p.dtype)[:, None] + 0.5) / times
    x_1 = torch.linspace(-6, 6, 241, dtype=p.dtype)
    weight = torch.softmax(-x_1.square() / 2, 0) / len(p) / times
    q = posterior(forward_diffusion(p[:, None, None], x_1, t), t, p)  # [len(p), times, 241, len(p)]
    variance = q @ p.square() - (q @ p).square()
    return (variance / t.square() @ weight).sum().item()


def euler_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """l_{t_{j−1}} = l_{t_j} + (t_{j−1} − t_j) v_θ(l_{t_j}, t_j). Eq. 5."""
    return x + (t_next - t) * v


def time_grid(n: int, shift: float = 1.0) -> Tensor:
    """t_n = 1 … t_0 = 0, [n+1]: uniform u mapped to shift·u / (1 + (shift−1) u)."""
    u = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def euler_trajectory(v, x: Tensor, times: Tensor) -> Tensor:
    """All states of the denoising trajectories from x [...] at times[0]: [len(times), ...]."""
    states = [x]
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        states.append(euler_step(states[-1], v(states[-1], t.expand_as(x)), t, t_next))
    return torch.stack(states)


# ---------------------------------------------------------------- Fig. 13: the network
class ResNet(nn.Module):
    """`nets` independent velocity networks in one (grouped convolutions over the batch axis)."""

    def __init__(self, nets: int = 1, width: int = 32, blocks: int = 3, rng=None):
        super().__init__()
        def conv(c_in: int, c_out: int) -> nn.Conv1d:
            layer = nn.Conv1d(c_in * nets, c_out * nets, 1, groups=nets)
            for w in layer.parameters():
                nn.init.uniform_(w, -c_in ** -0.5, c_in ** -0.5, generator=rng)
            return layer

        self.conv_in = conv(2, width)
        self.blocks = nn.ModuleList(nn.Sequential(
            conv(width, width), nn.BatchNorm1d(width * nets), nn.ReLU(),
            conv(width, width), nn.BatchNorm1d(width * nets)) for _ in range(blocks))
        self.conv_out = conv(width, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:                 # x, t [nets, B]
        h = self.conv_in(torch.stack([x, t], 1).flatten(0, 1)[None])   # [1, nets * width, B]
        for block in self.blocks:
            h = torch.relu(h + block(h))
        return self.conv_out(h)[0]                                     # [nets, B]

    def replicate(self, nets: int) -> "ResNet":
        """`nets` copies of this network, as one network."""
        copies = ResNet(nets)
        copies.load_state_dict({name: torch.cat([w] * nets) if w.ndim else w
                                for name, w in self.state_dict().items()})
        return copies


def train(net: ResNet, loss_fn, iterations: int, lr: float, cosine_decay: bool, label: str) -> None:
    """Minimise loss_fn() by Adam. Raises ValueError if the last loss is not finite."""
    adam = torch.optim.Adam(net.parameters(), lr, fused=True)
    for i in tqdm(range(iterations), label, disable=None):
        if cosine_decay:
            adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * i / iterations)) / 2
        loss = loss_fn()
        adam.zero_grad()
        loss.backward()
        adam.step()
    if not torch.isfinite(loss):
        raise ValueError(f"{label}: expected a finite loss, got {loss.item()}: lower lr ({lr})")


def train_teacher(cfg: Config, p: Tensor, seed: int):
    """Train v_θ by Eq. 3; a batch is p, repeated (A.1). Returns the network and v(x, t)."""
    rng = generator(seed, "teacher")
    net = ResNet(rng=rng)
    x_0 = p.repeat(math.ceil(cfg.batch / len(p)))[None, :cfg.batch]
    def loss():
        x_1 = torch.randn(1, cfg.batch, generator=rng)
        return flow_matching_loss(net, x_0, x_1, 1 - torch.rand(1, cfg.batch, generator=rng))
    @torch.no_grad()
    def v(x: Tensor, t: Tensor) -> Tensor:
        return net(x.reshape(1, -1), t.reshape(1, -1)).view_as(x)

    train(net, loss, cfg.iterations, cfg.lr, False, f"seed {seed}: teacher")
    return net.eval(), v


# ---------------------------------------------------------------- Fig. 2 f: distillation
@dataclass
class Student:
    """A student of K steps at `times`. It learns from `pairs` (x_high, x_low, t_high, t_low, each
    [N]) at a uniform t between them (PeRFlow), or at t_high only (Eq. 6)."""
    name: str
    p_d: Tensor
    pairs: tuple
    times: Tensor
    interpolate: bool = True


def segment_velocity(x_high: Tensor, x_low: Tensor, t_high: Tensor, t_low: Tensor) -> Tensor:
    """(l_{t'_k} − l_{t'_{k+1}}) / (t'_k − t'_{k+1}): the target of Eq. 6 and of PeRFlow."""
    return (x_low - x_high) / (t_low - t_high)


def perflow_pairs(v, x: Tensor, window: Tensor, K: int, n: int) -> tuple:
    """PeRFlow: solve v from x [N] at the start of its window (of K, from t = 1) to its end."""
    t_high = 1 - window / K
    x_low, t = x, t_high
    for _ in range(n // K):
        x_low, t = euler_step(x_low, v(x_low, t), t, t - 1 / n), t - 1 / n
    return x, x_low, t_high, t_high - 1 / K


def make_students(cfg: Config, p: Tensor, v, paths: Tensor, key_paths: Tensor, seed: int) -> list:
    """All students of a seed, in the order of M. They share windows, trajectories and noise."""
    rng, N, stride = generator(seed, "pairs"), cfg.pairs, cfg.n // cfg.K
    window = torch.randint(cfg.K, (N,), generator=rng)
    row = torch.randint(cfg.trajectories, (N,), generator=rng)
    source = torch.randint(len(p), (N,), generator=rng)
    x_1, half = torch.randn(N, generator=rng), torch.rand(N, generator=rng) < 0.5
    on = paths[::stride][window, row]  # window starts on teacher trajectories
    key = time_grid(cfg.n, cfg.shift)[::stride]
    eq6 = key_paths[window, row], key_paths[window + 1, row], key[window], key[window + 1]
    students = [Student("AccVideo", p, eq6, key, interpolate=False)]
    def add_perflow(name, p_d, start, field=v, interpolate=True):
        pairs = perflow_pairs(field, start, window, cfg.K, cfg.n)
        students.append(Student(name, p_d, pairs, time_grid(cfg.K), interpolate))

    add_perflow("all on trajectories", p, on)
    for way in cfg.mismatch:
        for M in cfg.M if way == cfg.mismatch[0] else cfg.M[1:]:  # M = 0 is the same for all
            p_d = shift_data(p, way, M)
            start = forward_diffusion(p_d[source], x_1, 1 - window / cfg.K)
            add_perflow(way, p_d, start)
            if way == cfg.mismatch[0]:
                add_perflow("exact guidance", p_d, start, lambda x, t: exact_velocity(x, t, p))
                add_perflow("half on trajectories", p_d, torch.where(half, on, start))
                if M == 0:
                    add_perflow("window starts only", p_d, start, interpolate=False)
    return students


def distill(cfg: Config, teacher: ResNet, students: list, x_1: Tensor, seed: int, repeat: int):
    """Train all students at once, each from the teacher's weights. Returns their few-step samples
    [students, N] from the noise x_1 [N]."""
    rng = generator(seed, f"distill {repeat}")
    net = teacher.replicate(len(students)).eval()  # eval: keep the teacher's batch statistics
    pairs = torch.stack([torch.stack(student.pairs) for student in students], 1)  # [4, S, N]
    interpolate = torch.tensor([[student.interpolate] for student in students])
    def loss():
        batch = torch.randint(cfg.pairs, (cfg.student_batch,), generator=rng)
        x_high, x_low, t_high, t_low = pairs[:, :, batch]
        share = torch.where(interpolate, torch.rand(cfg.student_batch, generator=rng), 0.0)
        x_t, t = torch.lerp(x_high, x_low, share), torch.lerp(t_high, t_low, share)
        target = segment_velocity(x_high, x_low, t_high, t_low)
        return (net(x_t, t) - target).square().mean(1).sum()  # a sum keeps the students independent

    train(net, loss, cfg.student_iterations, cfg.student_lr, True,
          f"seed {seed}: students, {repeat + 1} of {cfg.repeats}")
    times = torch.stack([student.times for student in students], 1)[..., None]  # [K+1, students, 1]
    with torch.no_grad():
        return euler_trajectory(net, x_1.expand(len(students), -1), times)[-1]


# ---------------------------------------------------------------- Sec. 3.2: useless data points
def classify(x_t: Tensor, x_d: Tensor, states: Tensor, ends: Tensor, p: Tensor, epsilon: float):
    """Label points x_t [N], diffused from x_d [N], by the teacher's trajectories, which are at
    states [R] at this t and end at ends [R]. Returns indices into CLASSES, [N]."""
    states, order = states.sort()
    arrivals = nn.functional.one_hot(nearest(ends[order], p), len(p)).cumsum(0)
    arrivals = nn.functional.pad(arrivals, (0, 0, 1, 0))  # [R+1, len(p)]: arrivals before a state
    first = torch.searchsorted(states, x_t - epsilon)
    last = torch.searchsorted(states, x_t + epsilon, right=True)
    target = nearest(x_d, p)
    reaches = arrivals[last, target] > arrivals[first, target]
    return torch.where(first == last, 1, torch.where(reaches, 0, 2))


def crossing_probability(x_d: Tensor, t: Tensor, p: Tensor) -> Tensor:
    """P(x_t is on the other point's side) = Φ(−|x_d − μ| (1−t) / t), [len(x_d), len(t)]: with two
    points of mean μ the exact flow never crosses (1−t) μ, by symmetry."""
    return torch.special.ndtr(-(x_d[:, None] - p.mean()).abs() * (1 - t) / t)


def endpoints(v, x_t: Tensor, times: Tensor) -> Tensor:
    """Endpoints at t = 0 of v from x_t [n−1, N]; row i starts at times[i+1]."""
    x = x_t.clone()
    for i in range(1, len(times) - 1):
        x[:i] = euler_step(x[:i], v(x[:i], times[i].expand_as(x[:i])), times[i], times[i + 1])
    return x


def measure_teacher(v, p: Tensor, seed: int) -> dict:
    """Compare the teacher with the exact field on random points."""
    rng = generator(seed, "evaluate")
    x_0 = p[torch.randint(len(p), (1 << 18,), generator=rng)]
    x_1, t = torch.randn(x_0.shape, generator=rng), 1 - torch.rand(x_0.shape, generator=rng)
    exact = exact_velocity(x_t := forward_diffusion(x_0, x_1, t), t, p)
    return {"loss": flow_matching_loss(v, x_0, x_1, t), "Bayes floor": bayes_floor(p),
            "velocity rms": exact.square().mean().sqrt(),
            "velocity rms error": (v(x_t, t) - exact).square().mean().sqrt()}


def measure_useless(cfg: Config, v, paths: Tensor, times: Tensor, p: Tensor, seed: int):
    """Shares of useless points at the times inside (0, 1), by way and M (Fig. 2 e). For the first
    way also the teacher's guidance by class (the error t |v_θ − v| of the data point it predicts,
    and the distance from p at which its trajectories end), and the points and labels of each M."""
    x_1 = torch.randn(cfg.n - 1, cfg.trajectories, generator=generator(seed, "diffusion"))
    t, useless, measured = times[1:-1, None], {}, []
    for way in cfg.mismatch:
        rows = []
        for M in cfg.M:
            p_d = shift_data(p, way, M)
            x_d = p_d.repeat(math.ceil(cfg.trajectories / len(p)))[:cfg.trajectories]
            x_t = forward_diffusion(x_d, x_1, t)
            label = torch.stack([classify(x, x_d, states, paths[-1], p, cfg.epsilon)
                                 for x, states in zip(x_t, paths[1:-1], strict=True)])
            dataset, noise, both = (x.double().mean() for x in (label == 1, label == 2, label > 0))
            crossing = crossing_probability(p_d, t[:, 0], p).mean() if len(p) == 2 else None
            rows.append({"M": mismatch(p_d, p), "dataset": dataset, "noise": noise, "useless": both,
                         "crossing": crossing})
            if way == cfg.mismatch[0]:
                x, label, s = x_t[:, :1000], label[:, :1000], t.expand_as(x_t)[:, :1000]
                error = s * (v(x, s) - exact_velocity(x, s, p)).abs()
                measured.append((x, label, error, distance_to(endpoints(v, x, times), p)))
        useless[way] = {key: [row[key] for row in rows] for key in rows[0]}
    x, label, error, end = (torch.stack(x) for x in zip(*measured, strict=True))
    guidance = {name: {"error": error[label == i].mean(), "end": end[label == i].mean()}
                for i, name in enumerate(CLASSES) if (label == i).any()}
    return useless, guidance, list(zip(x, label, strict=True))


def measure_deviation(cfg: Config, samples: list, p: Tensor) -> dict:
    """Distance of every model's samples (name, p_d, x) to p, and to the nearer of p and p_d."""
    deviation = {name: {"to p": [], "to either": [], "far": []} for name, *_ in samples}
    for name, p_d, x in samples:
        to_p, to_either = distance_to(x, p), distance_to(x, torch.cat([p, p_d]))
        measured = to_p, to_either, (to_p > cfg.far).float()
        for values, value in zip(deviation[name].values(), measured, strict=True):
            values.append(value.mean())
    for way in cfg.mismatch[1:]:  # M = 0 is the same for all
        for key, values in deviation[way].items():
            values.insert(0, deviation[cfg.mismatch[0]][key][0])
    return deviation


# ---------------------------------------------------------------- the main experiment
def run_seed(cfg: Config, seed: int) -> tuple[dict, dict]:
    """All numbers of a seed (lists are over cfg.M), and the data that the figure draws."""
    p, times, stride = torch.tensor(cfg.data), time_grid(cfg.n), cfg.n // cfg.K
    net, v = train_teacher(cfg, p, seed)
    noise = torch.randn(cfg.trajectories, generator=generator(seed, "trajectories"))
    paths, key_grid = euler_trajectory(v, noise, times), time_grid(cfg.n, cfg.shift)
    key_paths = euler_trajectory(v, noise, key_grid)[::stride]
    useless, guidance, points = measure_useless(cfg, v, paths, times, p, seed)
    students = make_students(cfg, p, v, paths, key_paths, seed)
    x_1 = torch.randn(cfg.repeats, cfg.samples, generator=generator(seed, "samples"))
    x_0 = torch.cat([distill(cfg, net, students, x, seed, i) for i, x in enumerate(x_1)], 1)
    samples = [(s.name, s.p_d, x) for s, x in zip(students, x_0, strict=True)]
    for steps, grid in (("n", times), ("K", time_grid(cfg.K)), ("key", key_grid[::stride])):
        samples.append((f"teacher, {steps} steps", p, euler_trajectory(v, x_1.flatten(), grid)[-1]))
    numbers = {"teacher": measure_teacher(v, p, seed), "useless": useless, "guidance": guidance,
               "deviation": measure_deviation(cfg, samples, p)}
    return to_json(numbers, 6), to_json(figure_data(cfg, v, p, paths, times, points, samples), 4)


def figure_data(cfg: Config, v, p, paths, times, points: list, samples: list) -> dict:
    """Data of panels a–d and f: trajectories, diffused points and the teacher's paths from them,
    its error on a grid, histograms. Panels a–d show M = 0 and the second largest M."""
    way, panels = cfg.mismatch[0], (0, max(1, len(cfg.M) - 2))
    widest, p_d = (shift_data(p, way, cfg.M[i]) for i in (-1, panels[1]))
    edges = torch.linspace(float(widest.min()) - 1.5, float(widest.max()) + 1.5, 121)
    x, t = torch.linspace(float(p_d.min()) - 2, float(p_d.max()) + 2, 81), times[:-1]
    grid = torch.meshgrid(x, t, indexing="xy")  # [n, 81] each
    error = (grid[1] * (v(*grid) - exact_velocity(*grid, p)).abs()).T
    starts = range(cfg.n // cfg.K - 1, cfg.n - 1, cfg.n // cfg.K)  # of PeRFlow's windows
    points = [points[i] for i in panels]
    rollouts = [[{"class": label[i, j], "t": times[i + 1:],
                  "x": euler_trajectory(v, x_t[i, j], times[i + 1:])}
                 for i in starts for j in range(0, 1000, 127)] for x_t, label in points]
    cloud = [{"t": times[1:-1, None].expand(-1, 4).flatten(), "x": x_t[:, :1000:251].flatten(),
              "class": label[:, :1000:251].flatten()} for x_t, label in points]
    share = {name: [torch.histogram(x.clamp(edges[0], edges[-1]), edges).hist / len(x)
                    for other, _, x in samples if other == name] for name in (way, "AccVideo")}
    return {"M": [cfg.M[i] for i in panels], "t": times, "trajectories": paths[:, :40].T,
            "rollouts": rollouts, "points": cloud, "edges": edges, "share": share,
            "p_d": [shift_data(p, way, M) for M in cfg.M], "error": {"t": t, "x": x, "abs": error}}


def to_json(tree, digits: int):
    """`tree` after a round trip through JSON: tensors become lists, floats are rounded."""
    return json.loads(json.dumps(tree, default=Tensor.tolist),
                      parse_float=lambda number: round(float(number), digits))


def summarise(trees: list):
    """Mean, minimum and maximum over seeds of every number in `trees`, which have one shape."""
    if None in trees:
        return None
    if isinstance(trees[0], dict):
        return {key: summarise([tree.get(key) for tree in trees]) for key in trees[0]}
    if isinstance(trees[0], list):
        return [summarise(list(items)) for items in zip(*trees, strict=True)]
    return {"mean": sum(trees) / len(trees), "min": min(trees), "max": max(trees)}


def check_claims(cfg: Config, seeds: list) -> list[dict]:
    """Claims of Sec. 3.2 and controls: numbers (mean over seeds), in how many seeds each holds."""
    def get(*keys):  # [seeds] or [seeds, len(cfg.M)]
        return np.array([reduce(lambda d, key: (d or {}).get(key), keys, s) for s in seeds], float)
    def text(values, digits=2):
        return " ".join(f"{x:.{digits}f}" for x in np.atleast_1d(values.mean(0)))
    def grows(values):
        return (np.diff(values) > 0).all(1)

    way, largest = cfg.mismatch[0], f"of PeRFlow's at M = {cfg.M[-1]:.3g}"
    distance = {name: get("deviation", name, "to p") for name in seeds[0]["deviation"]}
    share = {w: get("useless", w, "useless") for w in cfg.mismatch}
    error, end = ({c: get("guidance", c, key) for c in CLASSES} for key in ("error", "end"))
    first, accvideo = distance[way][:, 0], distance["AccVideo"][:, 0]
    loss, floor, rms, rms_error = (get("teacher", key) for key in (
        "loss", "Bayes floor", "velocity rms", "velocity rms error"))
    ratio = {name: x / distance[way] for name, x in distance.items()}
    exact, half = ratio["exact guidance"][:, -1], ratio["half on trajectories"][:, -1]
    every, starts = ratio["all on trajectories"][:, 0], ratio["window starts only"][:, 0]
    to_either, off = get("deviation", way, "to either"), get("useless", way, "dataset")[:, 0]
    key_steps, K_steps = distance["teacher, key steps"], distance["teacher, K steps"]
    by_class = "useful {}, off every trajectory {}, on trajectories to another point {}"
    table = [
        ("   The teacher has learned the velocity field: its loss is within 5% of the Bayes floor",
         f"{text(loss)}, floor {text(floor)}; rms error of the velocity {text(rms_error)} of "
         f"{text(rms)}", loss < 1.05 * floor),
        ("e  Useless points exist at M = 0 (their share is above 0.02)",
         f"{text(share[way][:, 0])}; off every trajectory {text(off, 3)}", share[way][:, 0] > 0.02),
        ("e  Their share grows with M, whichever way the data moves",
         "; ".join(f"{w} {text(x)}" for w, x in share.items()),
         np.all([grows(x) for x in share.values()], axis=0)),
        ("b  Off every trajectory the teacher ends over twice as far from p as from useful points",
         by_class.format(*map(text, end.values())), end["dataset"] > 2 * end["useful"]),
        ("b  On paths to another point, too", "as above", end["noise"] > 2 * end["useful"]),
        ("d  Off every trajectory the teacher's guidance has over twice the error at useful points",
         by_class.format(*map(text, error.values())), error["dataset"] > 2 * error["useful"]),
        ("d  On paths to another point, too", "as above", error["noise"] > 2 * error["useful"]),
        *[(f"f  PeRFlow's samples are farther from p the larger M is, {w}", text(distance[w]),
           grows(distance[w])) for w in cfg.mismatch],
        (f"f  They do not move to p_d: the distance to the nearer of p and p_d grows, too, {way}",
         text(to_either), grows(to_either)),
        ("f  Wrong guidance is the cause: the exact field as teacher more than halves the distance",
         f"{text(exact)} {largest}", exact < 0.5),
        ("g  Lost coverage is the cause: half of the starts on trajectories more than halve it",
         f"{text(half)} {largest}", half < 0.5),
        ("f  Useless points do harm at M = 0: without them the distance is over a fifth smaller",
         f"{text(every)} of PeRFlow's at M = 0", every < 0.8),
        ("g  AccVideo's student, which needs no p_d (flat by construction), is nearer to p",
         f"{text(accvideo, 3)}; PeRFlow {text(distance[way], 3)}",
         np.all([accvideo[:, None] < distance[w] for w in cfg.mismatch], axis=(0, 2))),
        ("g  One reason: Eq. 6 does not interpolate; without it PeRFlow is over a fifth nearer",
         f"{text(starts)} of PeRFlow's at M = 0", starts < 0.8),
        ("g  The undistilled teacher at AccVideo's steps is farther from p than AccVideo's student",
         text(key_steps), key_steps[:, 0] > accvideo),
        ("g  The undistilled teacher at PeRFlow's steps is farther from p than PeRFlow at M = 0",
         text(K_steps, 3), K_steps[:, 0] > first)]
    return [{"claim": claim, "numbers": numbers, "holds": int(holds.sum()), "of": len(seeds)}
            for claim, numbers, holds in table]


def figure_caption(cfg: Config, mean: dict) -> str:
    """The figure's caption, for a reader without the paper."""
    way, useless = cfg.mismatch[0], mean["useless"][cfg.mismatch[0]]["useless"][0]["mean"]
    first, last, exact, half = (f"{mean['deviation'][name]['to p'][i]['mean']:.2f}" for name, i in (
        (way, 0), (way, -1), ("exact guidance", -1), ("half on trajectories", -1)))
    why = ("So wrong guidance harms the student less than missing training points on the paths "
           "that it samples along." if 2 * float(half) < float(last) < 2 * float(exact) else "")
    seeds = f"Mean of {cfg.seeds} seeds, bands: least to largest" if cfg.seeds > 1 else "One seed"
    return " ".join(f"""
        A small network (the teacher; grey paths) turns noise into the training data p. To distil it
        into fewer steps, most methods diffuse data they have to a time t and evaluate the teacher
        there (a, c). If that data is not p, many of these points are off every path of the teacher,
        and its guidance there is wrong (b, d). (e) The share of useless points against the mismatch
        M. At M = 0 it is {useless:.2f}, because noise can move a point onto paths that end at
        another training point. (f) Samples of a student that learned as PeRFlow does, in {cfg.K}
        windows, and of one that learned as AccVideo does, from the teacher's own paths. (g) Their
        mean distance from p: PeRFlow's is {first} at M = 0 and {last} at M = {cfg.M[-1]:.3g}; there
        it is {exact} if the exact field is the teacher, and {half} if half of the starting points
        are moved onto paths. {why} {seeds}; a–d and the histograms show seed 0.""".split())


def analyse(cfg: Config) -> dict:
    """The content of OUT.json without command and CPU seconds: a function of cfg alone."""
    torch.set_num_threads(1)  # a fixed order of summation gives the same numbers each time
    seeds, data = zip(*(run_seed(cfg, seed) for seed in range(cfg.seeds)), strict=True)
    mean = summarise(seeds)
    return {"format": 1, "config": json.loads(json.dumps(asdict(cfg))), "seeds": seeds,
            "summary": mean, "claims": check_claims(cfg, seeds),
            "caption": figure_caption(cfg, mean), "drawn": data[0]}


# ---------------------------------------------------------------- the figure, from the JSON alone
INK, GREY, BLUE, ORANGE, GREEN = "#222222", "#9a9a9a", "#0072B2", "#D55E00", "#009E73"
COLOR = {"useful": BLUE, "dataset": ORANGE, "noise": "#F0C000"}  # after Okabe and Ito
MARK = {"useful": "o", "dataset": "X", "noise": "^"}
MEANING = {"useful": "useful: on a trajectory to the right point",
           "dataset": "useless, dataset mismatch: off every trajectory",
           "noise": "useless, noise mismatch: on trajectories\nto another point"}
SHIFT = {"outward": "outermost points moved apart", "inward": "outermost points moved inward",
         "one-sided": "one outermost point moved"}
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "text.color": INK,
         "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
         "legend.frameon": False, "legend.fontsize": 8.5, "hatch.linewidth": 0.6}
TITLES = ("Setup: the teacher's paths take\nnoise to the training data",
          "a)  knowledge distillation: the teacher\ndenoises diffused data, here its own (M = 0)",
          "b)  with other data (M = {M:.3g}) it starts\nwhere none of its paths pass",
          "c)  distribution distillation: the teacher\nguides at diffused samples (M = 0)",
          "d)  with other samples (M = {M:.3g}) it is\nevaluated off its paths (dark: large error)")


def band(values: list) -> list:
    """Mean, minimum and maximum of each of `values`, as three arrays."""
    return [np.array([value[key] for value in values]) for key in ("mean", "min", "max")]


@rc_context(STYLE)
def draw_figure(report: dict, out: str) -> None:
    """Draw OUT.png (1200 px wide) and OUT.pdf from the content of OUT.json."""
    cfg, data, mean = report["config"], report["drawn"], report["summary"]
    Ms, ways = cfg["M"], cfg["mismatch"]
    fig = Figure(figsize=(12, 16), dpi=100)
    rows = fig.add_gridspec(5, 1, left=0.055, right=0.985, top=0.935, bottom=0.112, hspace=0.45,
                            height_ratios=[1, 1, 0.85, 0.7, 1.1])
    def panels(row: int, n: int, **space) -> list:
        return [fig.add_subplot(cell) for cell in rows[row].subgridspec(1, n, **space)]

    *guidance, key = panels(1, 3, wspace=0.14)
    draw_key(key, cfg, draw_paths(panels(0, 3, wspace=0.14), guidance, cfg, data))
    for i, ax in enumerate(panels(2, len(ways), wspace=0.1)):
        draw_useless(ax, Ms, ways[i], mean["useless"][ways[i]], i)
    for i, ax in enumerate(panels(3, len(Ms), wspace=0.08)):
        draw_samples(ax, cfg, data, i, mean["deviation"][ways[0]])
    drift = fig.add_subplot(rows[4].subgridspec(1, 2, wspace=0, width_ratios=[1.1, 1])[0])
    draw_drift(drift, Ms, ways[0], mean["deviation"])
    fig.text(0.055, 0.987, "Useless data points in distillation, in one dimension", size=15,
             weight="bold", va="top")
    fig.text(0.055, 0.008, textwrap.fill(report["caption"], 165).replace("p_d", "$p_d$"),
             va="bottom", linespacing=1.3)
    for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
        fig.savefig(f"{out}.tmp.{kind}", metadata=metadata)
        os.replace(f"{out}.tmp.{kind}", f"{out}.{kind}")


def draw_paths(upper: list, guidance: list, cfg: dict, data: dict):
    """The setup, the teacher's paths from diffused points (a, b), and its error there (c, d)."""
    error, (setup, *rollouts) = data["error"], upper
    for ax, title in zip((*upper, *guidance), TITLES, strict=True):
        ax.set(title=title.format(M=data["M"][1]), xlabel="t", ylim=(error["x"][0], error["x"][-1]),
               xlim=(1.02, -0.03), ylabel="x" if ax in (setup, guidance[0]) else "")
    for ax in upper:
        ax.plot(data["t"], np.transpose(data["trajectories"]), color=GREY, lw=0.6, alpha=0.55,
                zorder=1)
        ax.plot([0] * len(cfg["data"]), cfg["data"], "s", ms=7, color=INK, zorder=5, clip_on=False)
    x = np.linspace(-3.2, 3.2, 100)
    setup.fill_betweenx(x, 1.0, 1.0 - 0.16 * np.exp(-x ** 2 / 2), color=GREY, alpha=0.7, lw=0)
    low, high = 0.95 * np.array(setup.get_ylim())
    setup.text(0.99, low, "noise at t = 1:\nx$_1$ from N(0, 1)", va="bottom")
    setup.text(0.0, high, "data at t = 0:\ntraining points p", ha="right", va="top")
    for ax, paths in zip(rollouts, data["rollouts"], strict=True):
        for path in paths:
            c, t, x = CLASSES[path["class"]], path["t"], path["x"]
            front = int(c != "useful")
            ax.plot(t, x, color=COLOR[c], lw=1.1, zorder=2 + front)
            ax.plot(t[0], x[0], MARK[c], color=COLOR[c], ms=6.5, mec=INK, mew=0.5, zorder=4 + front)
    for ax, points in zip(guidance, data["points"], strict=True):
        image = ax.pcolormesh(error["t"], error["x"], error["abs"], cmap="Greys", shading="nearest",
                              rasterized=True, norm=colors.LogNorm(0.02, 4))
        t, x, label = (np.array(points[key]) for key in ("t", "x", "class"))
        for i, c in enumerate(CLASSES):
            ax.plot(t[label == i], x[label == i], MARK[c], color=COLOR[c], ms=5, mec="w", mew=0.4)
    return image


def draw_key(ax, cfg: dict, image) -> None:
    ax.axis("off")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    for y, c in zip((1.0, 0.89, 0.78), CLASSES, strict=True):
        ax.plot(0.03, y, MARK[c], color=COLOR[c], ms=8, mec=INK, mew=0.5, clip_on=False)
        ax.text(0.08, y + 0.035, MEANING[c], va="top")
    text = ("A point is x_t = (1 - t) x_d + t noise, with x_d from the data used for "
            f"distillation, p_d. It is on a trajectory if one of {cfg['trajectories']} is within "
            f"{cfg['epsilon']:g} of it at t. The right point is the training point nearest to x_d. "
            "M (Eq. 4) adds up how far the points of p_d are from p.")
    ax.text(0.0, 0.63, textwrap.fill(text, 55).replace("_d", "$_d$").replace("x_t", "x$_t$"),
            va="top", linespacing=1.3)
    ax.figure.colorbar(image, cax=ax.inset_axes([0.0, 0.08, 0.9, 0.05]), orientation="horizontal",
                       label="c, d: error of the data point that the teacher predicts")


def draw_useless(ax, Ms: list, way: str, useless: dict, i: int) -> None:
    total, low, high = band(useless["useless"])
    noise, dataset = (band(useless[c])[0] for c in ("noise", "dataset"))
    for c, height, base, hatch in (("noise", noise, 0, "//"), ("dataset", dataset, noise, "")):
        ax.bar(Ms, height, 0.62 * min(np.diff(Ms)), base, color=COLOR[c], hatch=hatch, ec="white",
               lw=0, label=f"{c} mismatch")
    ax.errorbar(Ms, total, (total - low, high - total), color=INK, ls="", capsize=3, lw=1)
    for M, y, top in zip(Ms, total, high, strict=True):
        ax.text(M, top + 0.035, f"{y:.2f}", ha="center", weight="bold")
    if None not in useless["crossing"]:
        ax.plot(Ms, band(useless["crossing"])[0], "D--", color=INK, ms=4, lw=1, mec="white",
                label="noise moved it to the other\nside (closed form)")
    ax.set(title=f"{'e)  ' * (i == 0)}{way} mismatch:\n{SHIFT[way]}", xlabel="M", xticks=Ms,
           ylim=(0, 1), ylabel="" if i else "useless share of points")
    if i == 0:
        ax.legend(loc="upper left")


def draw_samples(ax, cfg: dict, data: dict, i: int, deviation: dict) -> None:
    way, edges = cfg["mismatch"][0], np.array(data["edges"])
    perflow, accvideo = np.clip([data["share"][way][i], data["share"]["AccVideo"][0]], 1e-4, None)
    ax.stairs(perflow, edges, baseline=1e-4, fill=True, color=ORANGE, alpha=0.7,
              label="PeRFlow-style student")
    ax.stairs(accvideo, edges, baseline=None, color=GREEN, lw=1.3, label="AccVideo's student")
    for x, mark, height, fill, label in ((cfg["data"], "s", 2.5, INK, "p"),
                                         (data["p_d"][i], "v", 0.9, "white", "p$_d$")):
        ax.plot(x, [height] * len(x), mark, color=INK, ms=6, mfc=fill, label=label, clip_on=False)
    ax.set(title=f"{'f)  ' * (i == 0)}M = {cfg['M'][i]:.3g}: mean distance to p "
                 f"{deviation['to p'][i]['mean']:.2f}", xlabel="x", xlim=edges[[0, -1]],
           yscale="log", ylim=(1e-4, 3), yticks=[1e-4, 1e-2, 1])
    ax.minorticks_off()
    ax.xaxis.set_major_locator(ticker.MaxNLocator(6, prune="both"))
    ax.tick_params(labelleft=i == 0)
    if i == 0:
        ax.set_ylabel("share of samples, log")
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.13), ncol=4)


def draw_drift(ax, Ms: list, way: str, deviation: dict) -> None:
    for name, color, style, label in (
            ("teacher, key steps", "#555555", "-.", "undistilled teacher at AccVideo's steps"),
            ("exact guidance", "#CC79A7", "P--", "control: PeRFlow's, but the exact field is its "
             "teacher\n(no wrong guidance)"),
            (way, ORANGE, "X-", "PeRFlow-style student, as in the paper"),
            ("half on trajectories", BLUE, "o-", "control: PeRFlow's, but half of its starts on "
             "trajectories\n(it learns where it samples)"),
            ("teacher, K steps", GREY, ":", "undistilled teacher at PeRFlow's steps"),
            ("AccVideo", GREEN, "-", "AccVideo's student (Eq. 6, the paper's key timesteps):\n"
             "needs no such data, so flat by construction")):
        y, low, high = band(deviation[name]["to p"] * (len(Ms) // len(deviation[name]["to p"])))
        ax.plot(Ms, y, style, color=color, lw=2, ms=8, mec="white", label=label)
        ax.fill_between(Ms, low, high, color=color, alpha=0.15, lw=0)
    ax.set(yscale="log", xlabel="M", xticks=Ms, ylabel="mean distance of samples from p",
           title=f"g)  samples of 5 steps: their distance from the training data, {way} mismatch")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9, handlelength=4,
              labelspacing=1)


# ---------------------------------------------------------------- command line
def parse_args(argv=None) -> tuple[Config, str]:
    """The configuration and OUT. A bad value ends with a message that names its option."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer iterations: rough numbers in 20 seconds")
    add("--seeds", type=int, default=1, metavar="N", help="average over seeds 0 to N - 1")
    add("--data", type=float, nargs="+", default=Config.data, metavar="X", help="training points")
    add("--mismatch", nargs="+", default=WAYS, choices=WAYS,
        help="how p_d is moved; the first way is used for panels a–d, f and g")
    add("--M", type=float, nargs="+", help="increasing from 0; default: four that suit every way")
    add("--epsilon", type=float, default=Config.epsilon, help="radius of a trajectory")
    add("--out", default="toy1d", help="the path of the three files, without suffix")
    args = parser.parse_args(argv)
    def check(ok: bool, option: str, value, expected: str) -> None:
        if not ok:
            parser.error(f"{option}: expected {expected}, got {value}")

    p, ways, out = sorted(args.data), tuple(dict.fromkeys(args.mismatch)), Path(args.out)
    check(all(map(math.isfinite, p)) and len(set(p)) == len(p) >= 2, "--data", args.data,
          "two or more different numbers")
    limit = min(p[1] - p[0], p[-1] - p[-2])
    Ms = [limit * i / 3 for i in range(4)] if args.M is None else args.M
    check(len(Ms) > 1 and Ms[0] == 0 and Ms[-1] < math.inf and min(np.diff(Ms)) > 0, "--M", Ms,
          "two or more increasing numbers, the first of them 0")
    check("inward" not in ways or Ms[-1] <= limit, "--M", Ms[-1], f"at most {limit:g} for inward")
    check(0 < args.epsilon < math.inf, "--epsilon", args.epsilon, "a number above 0")
    check(args.seeds >= 1, "--seeds", args.seeds, "1 or more")
    check(bool(out.name) and not out.is_dir(), "--out", out, "a file's path without suffix")
    cfg = Config(tuple(p), ways, tuple(Ms), args.epsilon, args.seeds)
    return (replace(cfg, **QUICK) if args.quick else cfg), args.out


def main(argv=None) -> None:
    cfg, out = parse_args(argv)
    command = " ".join(["python toy1d.py", *(sys.argv[1:] if argv is None else argv)])
    report = {"command": command, "torch": torch.__version__, **analyse(cfg)}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    report["cpu_seconds"] = round(time.process_time(), 1)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items())
    Path(f"{out}.tmp.json").write_text(f"{{\n{lines}\n}}\n")
    os.replace(f"{out}.tmp.json", f"{out}.json")
    draw_figure(report, out)
    print(f"\nMean of {cfg.seeds} seed(s), over M =", *(f"{M:.3g}" for M in cfg.M))
    for c in report["claims"]:
        verdict = {0: "does not hold", c["of"]: "holds"}.get(
            c["holds"], f"{c['holds']} of {c['of']} seeds")
        print(f"{verdict:>13}  {c['claim']}\n{'':18}{c['numbers']}")
    print(f"{out}.png  {out}.pdf  {out}.json   {time.process_time():.0f} CPU seconds")


if __name__ == "__main__":
    main()
