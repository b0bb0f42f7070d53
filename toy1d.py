"""The paper's 1D experiment (Sec. 3.1, 3.2, A.1, Fig. 2), redrawn with real numbers and controls.

    python toy1d.py [--quick] [--seeds N] [--data -3 3] [--mismatch WAY ...] [--M 0 2 4 6]
                    [--epsilon 0.05] [--out toy1d]

Writes OUT.png, OUT.pdf and OUT.json (config, every number drawn, claims, CPU seconds) and prints
which claims hold. Cost: about two minutes of one core a seed, half a minute with --quick.

t is in [0, 1]: t = 1 is noise, t = 0 is data. p are the training points, p_d the distillation ones.
A point x_t diffused from x_d is useful iff a teacher trajectory within epsilon of it at t ends at
the training point nearest to x_d (a tie goes to the lower point). A useless point is either off
every trajectory (dataset mismatch) or on trajectories that end elsewhere (noise mismatch). If a tie
(x_d = 0, both points moved inward by 3) went to either point, noise mismatch would be zero there.

Open in the paper, decided here: how p_d is shifted (three ways); n = 50 Euler steps, uniform for
the analysis and of shift 7 for AccVideo's key timesteps; students use Adam with cosine decay and
keep the teacher's batch statistics, so that only what they learn from differs. AccVideo's student
has Eq. 6 only. Distribution distillation is not trained: its guidance is measured (c, d).
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

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

WAYS = ("outward", "inward", "one-sided")
CLASSES = ("useful", "dataset", "noise")  # labels 0, 1, 2


@dataclass(frozen=True)
class Config:
    data: tuple = (-3.0, 3.0)  # p (A.1)
    mismatch: tuple = WAYS     # the first gets the panels a–d, f, g and the controls
    M: tuple = (0.0, 2.0, 4.0, 6.0)
    epsilon: float = 0.05
    seeds: int = 1
    iterations: int = 10_000   # teacher; batch and lr too (A.1)
    batch: int = 2048
    lr: float = 1e-4
    trajectories: int = 5000   # and diffused points a time
    n: int = 50                # Euler steps of a trajectory
    K: int = 5                 # PeRFlow's windows and AccVideo's m
    shift: float = 7.0         # AccVideo: every (n / K)-th time of this grid is a key timestep
    pairs: int = 40_000        # that a student learns from
    student_iterations: int = 1500
    student_batch: int = 512
    student_lr: float = 1e-3
    repeats: int = 3           # students of each kind, other batches: their samples are pooled
    samples: int = 8000        # drawn from each student
    far: float = 0.5           # "far" is the share of samples farther than this from p


QUICK = dict(iterations=2000, lr=1e-3, pairs=10_000, student_iterations=500, student_batch=256,
             repeats=1)


def generator(seed: int, use: str) -> torch.Generator:
    """A stream of its own for each use, so that no draw depends on another."""
    key = hashlib.sha256(f"{seed} {use}".encode()).hexdigest()
    return torch.Generator().manual_seed(int(key[:15], 16))


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
    """The least value of Eq. 3: E Var(x_0 | x_t) / t², by quadrature over t and x_1."""
    p = p.double()
    t = (torch.arange(times, dtype=p.dtype)[:, None] + 0.5) / times
    x_1 = torch.linspace(-6, 6, 241, dtype=p.dtype)
    weight = torch.softmax(-x_1.square() / 2, 0) / len(p) / times
    floor = 0.0
    for x_0 in p:
        q = posterior(forward_diffusion(x_0, x_1, t), t, p)  # [times, 241, len(p)]
        variance = q @ p.square() - (q @ p).square()
        floor += (variance / t.square() @ weight).sum().item()
    return floor


def euler_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """l_{t_{j−1}} = l_{t_j} + (t_{j−1} − t_j) v_θ(l_{t_j}, t_j). Eq. 5."""
    return x + (t_next - t) * v


def time_grid(n: int, shift: float = 1.0) -> Tensor:
    """t_n = 1 … t_0 = 0, [n+1]: uniform u bent to shift·u / (1 + (shift−1) u)."""
    u = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def trajectory(v, x: Tensor, times: Tensor) -> Tensor:
    """All states of the denoising trajectories from x [...] at times[0]: [len(times), ...]."""
    states = [x]
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        states.append(euler_step(states[-1], v(states[-1], t.expand_as(x)), t, t_next))
    return torch.stack(states)


# ---------------------------------------------------------------- Fig. 13: the network
class Block(nn.Module):
    def __init__(self, width: int, nets: int):
        super().__init__()
        self.conv1 = nn.Conv1d(width * nets, width * nets, 1, groups=nets)
        self.norm1 = nn.BatchNorm1d(width * nets)
        self.conv2 = nn.Conv1d(width * nets, width * nets, 1, groups=nets)
        self.norm2 = nn.BatchNorm1d(width * nets)

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(h + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(h))))))


class ResNet(nn.Module):
    """`nets` independent velocity networks side by side (groups); the batch is the length axis."""

    def __init__(self, nets: int = 1, width: int = 32, blocks: int = 3):
        super().__init__()
        self.conv_in = nn.Conv1d(2 * nets, width * nets, 1, groups=nets)
        self.blocks = nn.Sequential(*[Block(width, nets) for _ in range(blocks)])
        self.conv_out = nn.Conv1d(width * nets, nets, 1, groups=nets)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:          # x, t [nets, B]
        h = torch.stack([x, t], 1).flatten(0, 1)[None]          # [1, 2 nets, B]
        return self.conv_out(self.blocks(self.conv_in(h)))[0]   # [nets, B]

    def init_weights(self, rng: torch.Generator) -> "ResNet":
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv1d)):
            bound = conv.weight.shape[1] ** -0.5
            for parameter in (conv.weight, conv.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=rng)
        return self

    def copies(self, nets: int) -> "ResNet":
        """`nets` students, each of which starts as this network."""
        students = ResNet(nets)
        students.load_state_dict({name: w.repeat(nets, *[1] * (w.ndim - 1)) if w.ndim else w
                                  for name, w in self.state_dict().items()})
        return students


def optimise(net: ResNet, loss_of_step, iterations: int, lr: float, decay: bool, bar, label: str):
    """Adam on loss_of_step(); a loss that is not finite stops the run."""
    adam = torch.optim.Adam(net.parameters(), lr, fused=True)
    for i in range(iterations):
        if decay:
            adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * i / iterations)) / 2
        loss = loss_of_step()
        adam.zero_grad()
        loss.backward()
        adam.step()
        bar(label)
    if not torch.isfinite(loss):
        raise ValueError(f"{label}: the loss became {loss.item()}; got lr {lr}, wanted a lower one")


def train_teacher(cfg: Config, p: Tensor, seed: int, bar):
    """v_θ by Eq. 3 on p, a batch being the points of p repeated (A.1): the network and v(x, t)."""
    rng = generator(seed, "teacher")
    net = ResNet().init_weights(rng)
    x_0 = p.repeat(math.ceil(cfg.batch / len(p)))[None, :cfg.batch]

    def loss():
        x_1 = torch.randn(1, cfg.batch, generator=rng)
        t = 1 - torch.rand(1, cfg.batch, generator=rng)  # in (0, 1]
        return flow_matching_loss(net, x_0, x_1, t)

    @torch.no_grad()
    def v(x: Tensor, t: Tensor) -> Tensor:
        return net(x.reshape(1, -1), t.reshape(1, -1)).view_as(x)

    optimise(net, loss, cfg.iterations, cfg.lr, False, bar, f"seed {seed}: teacher")
    net.eval()
    return net, v


# ---------------------------------------------------------------- Sec. 3.2: useless data points
def distance_to(x: Tensor, p: Tensor) -> Tensor:
    return (x[..., None] - p).abs().amin(-1)


def mismatch(p_d: Tensor, p: Tensor) -> Tensor:
    """M = Σ_{x_d ∈ p_d} min {|x_d − x| for x ∈ p}. Eq. 4."""
    return distance_to(p_d, p).sum()


def nearest(x: Tensor, p: Tensor) -> Tensor:
    """Index of the training point nearest to x; a tie goes to the lower point."""
    return (x[..., None] - p).abs().argmin(-1)


def shifted(p: Tensor, way: str, M: float) -> Tensor:
    """A p_d of mismatch M: the outermost points of p (sorted) move, the others stay."""
    low, high = {"outward": (-M / 2, M / 2), "inward": (M / 2, -M / 2), "one-sided": (0, M)}[way]
    return torch.cat([p[:1] + low, p[1:-1], p[-1:] + high])


def classify(x_t: Tensor, x_d: Tensor, states: Tensor, ends: Tensor, p: Tensor, epsilon: float):
    """Labels (CLASSES) of points x_t [N] diffused from x_d [N], by the teacher's trajectories,
    which are at states [R] at this t and end at ends [R]."""
    states, order = states.sort()
    arrivals = nn.functional.one_hot(nearest(ends[order], p), len(p)).cumsum(0)
    arrivals = nn.functional.pad(arrivals, (0, 0, 1, 0))  # [R+1, len(p)]: arrivals before a state
    first = torch.searchsorted(states, x_t - epsilon)
    last = torch.searchsorted(states, x_t + epsilon, right=True)
    target = nearest(x_d, p)
    reaches = arrivals[last, target] > arrivals[first, target]
    return torch.where(first == last, 1, torch.where(reaches, 0, 2))


def crossing(x_d: Tensor, t: Tensor, p: Tensor) -> Tensor:
    """P(x_t lies on the other point's side) = Φ(−|x_d − μ| (1−t) / t), [len(x_d), len(t)]: with two
    points of mean μ the exact flow never crosses (1−t) μ, by symmetry."""
    return torch.special.ndtr(-(x_d[:, None] - p.mean()).abs() * (1 - t) / t)


def landing(v, x_t: Tensor, times: Tensor) -> Tensor:
    """Where v takes x_t [n−1, N], row i of which starts at times[i+1], at t = 0."""
    x = x_t.clone()
    for i in range(1, len(times) - 1):
        x[:i] = euler_step(x[:i], v(x[:i], times[i].expand_as(x[:i])), times[i], times[i + 1])
    return x


# ---------------------------------------------------------------- Fig. 2 f: distillation
@dataclass
class Student:
    """A student of K steps at `times` and the pairs it learns from: states x_high at t_high and
    x_low at t_low, each [N]; at a uniform t between them (PeRFlow) or at t_high only (Eq. 6)."""
    name: str
    p_d: Tensor
    pairs: tuple
    times: Tensor
    interpolate: bool = True


def segment_velocity(x_high: Tensor, x_low: Tensor, t_high: Tensor, t_low: Tensor) -> Tensor:
    """(l_{t'_k} − l_{t'_{k+1}}) / (t'_k − t'_{k+1}): the target of Eq. 6 and of PeRFlow."""
    return (x_low - x_high) / (t_low - t_high)


def window_pairs(v, x: Tensor, window: Tensor, K: int, n: int) -> tuple:
    """PeRFlow: v carries x [N] from the top of its window (k-th of K, from t = 1) to its end."""
    t_high = 1 - window / K
    x_low, t = x, t_high
    for _ in range(n // K):
        x_low, t = euler_step(x_low, v(x_low, t), t, t - 1 / n), t - 1 / n
    return x, x_low, t_high, t_high - 1 / K


def make_students(cfg: Config, p: Tensor, v, paths: Tensor, key_paths: Tensor, seed: int) -> list:
    """Every student of one seed, in the order of M; all share windows, rows and noises."""
    rng, N = generator(seed, "pairs"), cfg.pairs
    window = torch.randint(cfg.K, (N,), generator=rng)
    row = torch.randint(cfg.trajectories, (N,), generator=rng)
    source = torch.randint(len(p), (N,), generator=rng)
    x_1, half = torch.randn(N, generator=rng), torch.rand(N, generator=rng) < 0.5
    on = paths[::cfg.n // cfg.K][window, row]  # starts on trajectories
    uniform, key = time_grid(cfg.K), time_grid(cfg.n, cfg.shift)[::cfg.n // cfg.K]

    def perflow(name, p_d, start, guide=v, **options):
        pairs = window_pairs(guide, start, window, cfg.K, cfg.n)
        students.append(Student(name, p_d, pairs, uniform, **options))

    eq6 = key_paths[window, row], key_paths[window + 1, row], key[window], key[window + 1]
    students = [Student("AccVideo", p, eq6, key, interpolate=False)]
    perflow("all on trajectories", p, on)
    for way in cfg.mismatch:
        for M in cfg.M if way == cfg.mismatch[0] else cfg.M[1:]:  # M = 0 is the same for all
            p_d = shifted(p, way, M)
            start = forward_diffusion(p_d[source], x_1, 1 - window / cfg.K)
            perflow(way, p_d, start)
            if way == cfg.mismatch[0]:
                perflow("exact guidance", p_d, start, lambda x, t: exact_velocity(x, t, p))
                perflow("half on trajectories", p_d, torch.where(half, on, start))
                if M == 0:
                    perflow("window starts only", p_d, start, interpolate=False)
    return students


def distill(cfg: Config, teacher: ResNet, students: list, seed: int, repeat: int, bar) -> ResNet:
    """All students at once, side by side; each starts as the teacher."""
    rng = generator(seed, f"distill {repeat}")
    net = teacher.copies(len(students)).eval()  # the batch statistics stay the teacher's
    pairs = torch.stack([torch.stack(student.pairs) for student in students], 1)  # [4, S, N]
    interpolate = torch.tensor([[student.interpolate] for student in students])

    def loss():
        batch = torch.randint(cfg.pairs, (cfg.student_batch,), generator=rng)
        x_high, x_low, t_high, t_low = pairs[:, :, batch]
        share = torch.where(interpolate, torch.rand(cfg.student_batch, generator=rng), 0.0)
        x_t, t = torch.lerp(x_high, x_low, share), torch.lerp(t_high, t_low, share)
        target = segment_velocity(x_high, x_low, t_high, t_low)
        return (net(x_t, t) - target).square().mean(1).sum()  # a sum: no student sees another

    optimise(net, loss, cfg.student_iterations, cfg.student_lr, True, bar,
             f"seed {seed}: students, {repeat + 1} of {cfg.repeats}")
    return net


@torch.no_grad()
def generate(net: ResNet, students: list, x_1: Tensor) -> Tensor:
    """Few-step samples [students, N] from the noises x_1 [N], each student on its own times."""
    x = x_1.expand(len(students), -1)
    times = torch.stack([student.times for student in students], 1)[..., None]  # [K+1, students, 1]
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x = euler_step(x, net(x, t.expand_as(x)), t, t_next)
    return x


# ---------------------------------------------------------------- one seed, all its numbers
def run_seed(cfg: Config, seed: int, bar) -> tuple[dict, dict]:
    """Every number of one seed (lists are over cfg.M), and what the figure draws of it."""
    p, times = torch.tensor(cfg.data), time_grid(cfg.n)
    net, v = train_teacher(cfg, p, seed, bar)
    rng = generator(seed, "evaluate")
    x_0 = p[torch.randint(len(p), (1 << 18,), generator=rng)]
    x_1, t = torch.randn(x_0.shape, generator=rng), 1 - torch.rand(x_0.shape, generator=rng)
    exact = exact_velocity(x_t := forward_diffusion(x_0, x_1, t), t, p)
    teacher = {"loss": flow_matching_loss(v, x_0, x_1, t), "Bayes floor": bayes_floor(p),
               "velocity rms": exact.square().mean().sqrt(),
               "velocity rms error": (v(x_t, t) - exact).square().mean().sqrt()}

    noise = torch.randn(cfg.trajectories, generator=generator(seed, "trajectories"))
    paths, key_grid = trajectory(v, noise, times), time_grid(cfg.n, cfg.shift)
    useless, guidance, points = count_useless(cfg, v, paths, times, p, seed)

    key_paths = trajectory(v, noise, key_grid)[::cfg.n // cfg.K]
    students = make_students(cfg, p, v, paths, key_paths, seed)
    x_1 = torch.randn(cfg.repeats, cfg.samples, generator=generator(seed, "samples"))
    x_0 = torch.cat([generate(distill(cfg, net, students, seed, i, bar), students, x_1[i])
                     for i in range(cfg.repeats)], 1)
    samples = [(s.name, s.p_d, x) for s, x in zip(students, x_0, strict=True)]
    for name, grid in (("teacher, n steps", times), ("teacher, K steps", time_grid(cfg.K)),
                       ("teacher, key steps", key_grid[::cfg.n // cfg.K])):
        samples.append((name, p, trajectory(v, x_1.flatten(), grid)[-1]))
    deviation = {name: {"to p": [], "to either": [], "far": []} for name, *_ in samples}
    for name, p_d, x in samples:
        deviation[name]["to p"].append(distance_to(x, p).mean())
        deviation[name]["to either"].append(distance_to(x, torch.cat([p, p_d])).mean())
        deviation[name]["far"].append((distance_to(x, p) > cfg.far).float().mean())
    for way in cfg.mismatch[1:]:  # M = 0 is the same for all
        for key, values in deviation[way].items():
            values.insert(0, deviation[cfg.mismatch[0]][key][0])
    numbers = {"teacher": teacher, "useless": useless, "guidance": guidance, "deviation": deviation}
    return plain(numbers, 6), plain(drawn(cfg, v, p, paths, times, points, samples), 4)


def count_useless(cfg: Config, v, paths: Tensor, times: Tensor, p: Tensor, seed: int):
    """Fig. 2 e for every way and M, at the times strictly inside (0, 1). For the first way also the
    teacher's guidance by class: the error t |v_θ − v| of the data point it points to, and the
    distance from p at which its trajectories end."""
    x_1 = torch.randn(cfg.n - 1, cfg.trajectories, generator=generator(seed, "diffusion"))
    t, few = times[1:-1, None], slice(1000)
    useless, found, points = {}, [], []
    for way in cfg.mismatch:
        rows = useless[way] = {"M": [], "dataset": [], "noise": [], "useless": [], "crossing": []}
        for M in cfg.M:
            p_d = shifted(p, way, M)
            x_d = p_d.repeat(math.ceil(cfg.trajectories / len(p)))[:cfg.trajectories]
            x_t = forward_diffusion(x_d, x_1, t)
            label = torch.stack([classify(x, x_d, states, paths[-1], p, cfg.epsilon)
                                 for x, states in zip(x_t, paths[1:-1], strict=True)])
            rows["M"].append(mismatch(p_d, p))
            rows["useless"].append((label > 0).double().mean())
            for kind in (1, 2):
                rows[CLASSES[kind]].append((label == kind).double().mean())
            rows["crossing"].append(crossing(p_d, times[1:-1], p).mean() if len(p) == 2 else None)
            if way == cfg.mismatch[0]:
                x, s = x_t[:, few], t.expand_as(x_t)[:, few]
                error = s * (v(x, s) - exact_velocity(x, s, p)).abs()
                found.append((label[:, few], error, distance_to(landing(v, x, times), p)))
                points.append((x, label[:, few]))
    label, error, end = (torch.stack(x) for x in zip(*found, strict=True))
    guidance = {name: {"error": error[label == i].mean(), "end": end[label == i].mean()}
                for i, name in enumerate(CLASSES) if (label == i).any()}
    return useless, guidance, points


def drawn(cfg: Config, v, p: Tensor, paths: Tensor, times: Tensor, points: list, samples) -> dict:
    """What panels a–d and f draw: trajectories, diffused points and where the teacher takes them,
    its error on a grid, histograms. Without mismatch, and at the last M but one."""
    way, shown = cfg.mismatch[0], (0, max(1, len(cfg.M) - 2))
    reach = shifted(p, way, cfg.M[-1])
    edges = torch.linspace(float(reach.min()) - 1.5, float(reach.max()) + 1.5, 121)
    reach = shifted(p, way, cfg.M[shown[1]])
    x, t = torch.linspace(float(reach.min()) - 2, float(reach.max()) + 2, 81), time_grid(cfg.n)[:-1]
    grid = torch.meshgrid(x, t, indexing="xy")  # [n, 81] each
    error = grid[1] * (v(*grid) - exact_velocity(*grid, p)).abs()
    tops = range(cfg.n // cfg.K - 1, cfg.n - 1, cfg.n // cfg.K)  # of PeRFlow's windows
    rollouts, cloud = [], []
    for x_t, label in (points[i] for i in shown):
        rollouts.append([{"class": label[i, j], "t": times[i + 1:],
                          "x": trajectory(v, x_t[i, j], times[i + 1:])}
                         for i in tops for j in range(0, 1000, 127)])
        cloud.append({"t": times[1:-1, None].expand(-1, 4).flatten(),
                      "x": x_t[:, :1000:251].flatten(), "class": label[:, :1000:251].flatten()})
    share = {name: [torch.histogram(x.clamp(edges[0], edges[-1]), edges).hist / len(x)
                    for other, _, x in samples if other == name] for name in (way, "AccVideo")}
    return {"M": [cfg.M[i] for i in shown], "t": times, "trajectories": paths[:, :40].T,
            "rollouts": rollouts, "points": cloud, "edges": edges, "share": share,
            "p_d": [shifted(p, way, M) for M in cfg.M],
            "error": {"t": t, "x": x, "abs": error.T}}


def plain(tree, digits: int):
    """`tree` as JSON holds it: tensors become rounded numbers and lists."""
    if isinstance(tree, dict):
        return {key: plain(value, digits) for key, value in tree.items()}
    if isinstance(tree, Tensor):
        tree = tree.tolist()
    if isinstance(tree, list):
        return [plain(value, digits) for value in tree]
    return round(tree, digits) if isinstance(tree, float) else tree


def summarise(trees: list):
    """Mean, least and largest over seeds of every number of the same-shaped `trees`."""
    if None in trees:
        return None
    if isinstance(trees[0], dict):
        return {key: summarise([tree.get(key) for tree in trees]) for key in trees[0]}
    if isinstance(trees[0], list):
        return [summarise(list(items)) for items in zip(*trees, strict=True)]
    return {"mean": sum(trees) / len(trees), "min": min(trees), "max": max(trees)}


# ---------------------------------------------------------------- what holds
def claims(cfg: Config, seeds: list) -> list[dict]:
    """Claims of Sec. 3.2 and controls: numbers (mean over seeds), in how many seeds each holds."""
    def get(*keys):  # [seeds] or [seeds, len(cfg.M)]
        return np.array([reduce(lambda tree, key: (tree or {}).get(key), keys, s) for s in seeds],
                        dtype=float)

    def text(values, digits=2):
        return " ".join(f"{x:.{digits}f}" for x in np.atleast_1d(values.mean(0)))

    def grows(values):
        return (np.diff(values) > 0).all(1)

    way, end = cfg.mismatch[0], f"at M = {cfg.M[-1]:.3g}"
    drift = {name: get("deviation", name, "to p") for name in seeds[0]["deviation"]}
    share = {w: get("useless", w, "useless") for w in cfg.mismatch}
    error, landed = ({c: get("guidance", c, key) for c in CLASSES} for key in ("error", "end"))
    first, own = drift[way][:, 0], drift["AccVideo"][:, 0]
    loss, floor = get("teacher", "loss"), get("teacher", "Bayes floor")
    exact, half = (drift[name][:, -1] / drift[way][:, -1] for name in
                   ("exact guidance", "half on trajectories"))
    every, starts = (drift[name][:, 0] / first for name in
                     ("all on trajectories", "window starts only"))
    kinds = "useful {}, off every trajectory {}, on wrong ones {}"
    table = [
        ("   The teacher has learned the field: loss within 5% of the Bayes floor",
         f"{text(loss)}, floor {text(floor)}; rms error of the velocity "
         f"{text(get('teacher', 'velocity rms error'))} of {text(get('teacher', 'velocity rms'))}",
         loss < 1.05 * floor),
        ("e  Useless points exist at M = 0 (their share is above 0.02)",
         f"{text(share[way][:, 0])}; off every trajectory "
         f"{text(get('useless', way, 'dataset')[:, 0], 3)}", share[way][:, 0] > 0.02),
        ("e  Their share grows with M, whichever way the data moves",
         "; ".join(f"{w} {text(x)}" for w, x in share.items()),
         np.all([grows(x) for x in share.values()], axis=0)),
        ("b  From points off every trajectory the teacher ends away from p (twice as far)",
         kinds.format(*map(text, landed.values())), landed["dataset"] > 2 * landed["useful"]),
        ("b  From points on wrong trajectories too", "as above",
         landed["noise"] > 2 * landed["useful"]),
        ("d  Off every trajectory the teacher's guidance is wrong (twice the error)",
         kinds.format(*map(text, error.values())), error["dataset"] > 2 * error["useful"]),
        ("d  On wrong trajectories too", "as above", error["noise"] > 2 * error["useful"])]
    table += [(f"f  PeRFlow's samples drift off p as M grows, {w}", text(drift[w]), grows(drift[w]))
              for w in cfg.mismatch]
    table += [
        (f"f  They do not drift to p_d: distance to the nearer of p and p_d, {way}",
         text(get("deviation", way, "to either")), grows(get("deviation", way, "to either"))),
        ("f  Wrong guidance is the cause: the exact field as teacher would halve the drift",
         f"{text(exact)} of PeRFlow's {end}", exact < 0.5),
        ("g  Lost coverage is the cause: half of the starts on trajectories would halve it",
         f"{text(half)} of PeRFlow's {end}", half < 0.5),
        ("f  Useless points do harm at M = 0: all starts on trajectories would take off a fifth",
         f"{text(every)} of PeRFlow's at M = 0", every < 0.8),
        ("g  AccVideo's student, which needs no p_d (flat by construction), is below PeRFlow",
         f"{text(own, 3)}; PeRFlow {text(drift[way], 3)}",
         np.all([own[:, None] < drift[w] for w in cfg.mismatch], axis=(0, 2))),
        ("g  Part of that at M = 0 is not interpolating: PeRFlow without it would lose a fifth",
         f"{text(starts)} of PeRFlow's at M = 0", starts < 0.8),
        ("g  The undistilled teacher is worse than AccVideo at the same steps",
         f"{text(drift['teacher, key steps'])}", drift["teacher, key steps"][:, 0] > own),
        ("g  The undistilled teacher is worse than PeRFlow at the same steps, M = 0",
         f"{text(drift['teacher, K steps'], 3)}", drift["teacher, K steps"][:, 0] > first)]
    return [{"claim": claim, "numbers": numbers, "holds": int(held.sum()), "of": len(seeds)}
            for claim, numbers, held in table]


def caption(cfg: Config, mean: dict) -> str:
    """The figure's caption, for a reader without the paper."""
    way, d = cfg.mismatch[0], mean["deviation"]

    def drift(name, i=-1):
        return f"{d[name]['to p'][i]['mean']:.2f}"

    exact, half, last = (drift(name) for name in ("exact guidance", "half on trajectories", way))
    why = ("So the student suffers less from wrong answers than from not being taught where it "
           "passes when it samples." if 2 * float(half) < float(last) < 2 * float(exact) else "")
    seeds = f"Mean of {cfg.seeds} seeds, bands: least to largest" if cfg.seeds > 1 else "One seed"
    return " ".join(f"""
        A small network (the teacher; grey paths) turns noise into the training data p. To distil it
        into fewer steps, most methods diffuse data they have to a time t and ask the teacher there
        (a, c). If that data is not p, many of these points lie off every path of the teacher, and
        its answers there are wrong (b, d). (e) The share of useless points against the mismatch M.
        At M = 0 it is {mean["useless"][way]["useless"][0]["mean"]:.2f}, because noise can carry a
        point over to paths that end elsewhere. (f) Samples of a student that learned as PeRFlow
        does, in {cfg.K} windows, and of one that learned as AccVideo does, from the teacher's own
        paths. (g) Their mean distance from p: PeRFlow's is {drift(way, 0)} at M = 0 and {last} at
        M = {cfg.M[-1]:.3g}; there it is {exact} if the exact field is the teacher, and {half} if
        half of the starting points are put back on paths. {why} {seeds}; a–d and the histograms are
        of seed 0.""".split())


# ---------------------------------------------------------------- the figure, from the JSON alone
INK, GREY = "#222222", "#9a9a9a"
COLOR = {"useful": "#0072B2", "dataset": "#D55E00", "noise": "#F0C000"}  # after Okabe and Ito;
MARK = {"useful": "o", "dataset": "X", "noise": "^"}                     # the marks say it again
MEANING = {"useful": "useful: on a trajectory to the right point",
           "dataset": "useless, dataset mismatch: off every trajectory",
           "noise": "useless, noise mismatch: on trajectories\nto another point"}
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "text.color": INK,
         "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
         "legend.frameon": False, "legend.fontsize": 8.5, "hatch.linewidth": 0.6}


def band(values: list) -> list:
    return [np.array([value[key] for value in values]) for key in ("mean", "min", "max")]


def figure(report: dict, out: str) -> None:
    """OUT.png (1200 px wide) and OUT.pdf, from what OUT.json holds."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    cfg, data, mean = report["config"], report["drawn"], report["summary"]
    Ms, way = cfg["M"], cfg["mismatch"][0]
    with plt.rc_context(STYLE):
        page = plt.figure(figsize=(12, 16), dpi=100)
        rows = page.add_gridspec(5, 1, left=0.055, right=0.985, top=0.935, bottom=0.112,
                                 hspace=0.45, height_ratios=[1, 1, 0.85, 0.7, 1.1])
        cells = [[page.add_subplot(cell) for cell in rows[i].subgridspec(1, width, **space)]
                 for i, (width, space) in enumerate((
                     (3, {"wspace": 0.14}), (3, {"wspace": 0.14}),
                     (len(cfg["mismatch"]), {"wspace": 0.1}), (len(Ms), {"wspace": 0.08}),
                     (2, {"wspace": 0, "width_ratios": [1.1, 1]})))]
        draw_setup(cells[0][0], cfg, data)
        for i in (0, 1):
            draw_rollouts(cells[0][1 + i], cfg, data, i)
            image = draw_guidance(cells[1][i], data, i)
        draw_key(cells[1][2], cfg, page, image)
        for i, (ax, name) in enumerate(zip(cells[2], cfg["mismatch"], strict=True)):
            draw_useless(ax, Ms, name, mean["useless"][name], i)
        for i, ax in enumerate(cells[3]):
            draw_samples(ax, cfg, data, i, mean["deviation"][way])
        draw_drift(cells[4][0], Ms, way, mean["deviation"])
        cells[4][1].axis("off")
        page.text(0.055, 0.987, "Useless data points in distillation, in one dimension", size=15,
                  weight="bold", va="top")
        page.text(0.055, 0.008, textwrap.fill(report["caption"], 165).replace("p_d", "$p_d$"),
                  size=9, va="bottom", linespacing=1.3)
        for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
            page.savefig(f"{out}.tmp.{kind}", metadata=metadata)
            os.replace(f"{out}.tmp.{kind}", f"{out}.{kind}")
        plt.close(page)


def axes_of_paths(ax, cfg: dict, data: dict, title: str) -> None:
    """Noise on the left, data on the right; grey trajectories, black training points."""
    ax.set(title=title, xlim=(1.02, -0.03), xlabel="t",
           ylim=(data["error"]["x"][0], data["error"]["x"][-1]))
    for x in data["trajectories"]:
        ax.plot(data["t"], x, color=GREY, lw=0.6, alpha=0.55, zorder=1)
    ax.plot([0] * len(cfg["data"]), cfg["data"], "s", ms=7, color=INK, zorder=5, clip_on=False)


def draw_setup(ax, cfg: dict, data: dict) -> None:
    axes_of_paths(ax, cfg, data, "Setup: the teacher's paths take\nnoise to the training data")
    x = np.linspace(-3.2, 3.2, 100)
    ax.fill_betweenx(x, 1.0, 1.0 - 0.16 * np.exp(-x ** 2 / 2), color=GREY, alpha=0.7, lw=0)
    ax.text(0.99, ax.get_ylim()[0] * 0.95, "noise at t = 1:\nx$_1$ from N(0, 1)", va="bottom")
    ax.text(0.0, ax.get_ylim()[1] * 0.95, "data at t = 0:\ntraining points p", ha="right", va="top")
    ax.set_ylabel("x")


def draw_rollouts(ax, cfg: dict, data: dict, i: int) -> None:
    axes_of_paths(ax, cfg, data, [
        "a)  knowledge distillation: the teacher\ndenoises diffused data, here its own (M = 0)",
        f"b)  with other data (M = {data['M'][1]:.3g}) it starts\nwhere none of its paths go"][i])
    for r in data["rollouts"][i]:
        c = CLASSES[r["class"]]
        ax.plot(r["t"], r["x"], color=COLOR[c], lw=1.1, zorder=2 + (c != "useful"))
        ax.plot(r["t"][0], r["x"][0], MARK[c], color=COLOR[c], ms=6.5, mec=INK, mew=0.5,
                zorder=4 + (c != "useful"))


def draw_guidance(ax, data: dict, i: int):
    e, points = data["error"], data["points"][i]
    image = ax.pcolormesh(e["t"], e["x"], e["abs"], cmap="Greys", shading="nearest",
                          rasterized=True, norm=matplotlib.colors.LogNorm(0.02, 4))
    for label, c in enumerate(CLASSES):
        of = np.array(points["class"]) == label
        ax.plot(np.array(points["t"])[of], np.array(points["x"])[of], MARK[c], color=COLOR[c], ms=5,
                mec="white", mew=0.4)
    ax.set(xlim=(1.02, -0.03), ylim=(e["x"][0], e["x"][-1]), xlabel="t", ylabel="" if i else "x",
           title=["c)  distribution distillation: the teacher\nguides at diffused samples (M = 0)",
                  f"d)  with other samples (M = {data['M'][1]:.3g}) it is\nasked off its paths "
                  "(dark: it is wrong)"][i])
    return image


def draw_key(ax, cfg: dict, page, image) -> None:
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
    bar = page.colorbar(image, cax=ax.inset_axes([0.0, 0.08, 0.9, 0.05]), orientation="horizontal")
    bar.set_label("c, d: error of the data point the teacher points to")


def draw_useless(ax, Ms: list, way: str, useless: dict, i: int) -> None:
    base = np.zeros(len(Ms))
    for c, hatch in (("noise", "//"), ("dataset", "")):
        height = band(useless[c])[0]
        ax.bar(Ms, height, 0.62 * min(np.diff(Ms)), base, color=COLOR[c], hatch=hatch, ec="white",
               lw=0, label=f"{c} mismatch")
        base = base + height
    total, low, high = band(useless["useless"])
    ax.errorbar(Ms, total, (total - low, high - total), color=INK, ls="", capsize=3, lw=1)
    for M, y, h in zip(Ms, total, high, strict=True):
        ax.text(M, h + 0.035, f"{y:.2f}", ha="center", weight="bold")
    if None not in useless["crossing"]:
        ax.plot(Ms, band(useless["crossing"])[0], "D--", color=INK, ms=4, lw=1, mec="white",
                label="noise carried it to the other\nside (closed form)")
    moved = {"outward": "outermost points moved apart", "inward": "outermost points moved inward",
             "one-sided": "one outermost point moved"}
    ax.set(title=f"{'e)  ' * (i == 0)}{way} mismatch:\n{moved[way]}", xlabel="M", xticks=Ms,
           ylim=(0, 1), ylabel="" if i else "useless share of points")
    if i == 0:
        ax.legend(loc="upper left")


def draw_samples(ax, cfg: dict, data: dict, i: int, deviation: dict) -> None:
    way, edges = cfg["mismatch"][0], np.array(data["edges"])
    y, own = np.clip([data["share"][way][i], data["share"]["AccVideo"][0]], 1e-4, None)
    ax.stairs(y, edges, baseline=1e-4, fill=True, color=COLOR["dataset"], alpha=0.7,
              label="PeRFlow-style student")
    ax.stairs(own, edges, baseline=None, color="#009E73", lw=1.3, label="AccVideo's student")
    for points, mark, height, fill, label in ((cfg["data"], "s", 2.5, INK, "p"),
                                              (data["p_d"][i], "v", 0.9, "white", "p$_d$")):
        ax.plot(points, [height] * len(points), mark, color=INK, ms=6, mfc=fill, label=label,
                clip_on=False)
    ax.set(yscale="log", ylim=(1e-4, 3), xlabel="x", yticks=[1e-4, 1e-2, 1], xlim=edges[[0, -1]],
           title=f"{'f)  ' * (not i)}M = {cfg['M'][i]:.3g}: mean distance to p "
                 f"{deviation['to p'][i]['mean']:.2f}", ylabel="" if i else "share of samples, log")
    ax.minorticks_off()
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, prune="both"))
    if i:
        ax.set_yticklabels([])
    else:
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.13), ncol=4)


def draw_drift(ax, Ms: list, way: str, deviation: dict) -> None:
    ends = []
    for name, color, style, label in (
            (way, COLOR["dataset"], "X-", "PeRFlow-style student, as in the paper"),
            ("exact guidance", "#CC79A7", "P--",
             "control: the same, but the exact field is its teacher\n"
             "(no wrong answers left)"),
            ("half on trajectories", "#0072B2", "o-",
             "control: the same, but half of its starts on trajectories\n"
             "(it is taught where it passes)"),
            ("AccVideo", "#009E73", "-", "AccVideo's student (Eq. 6, the paper's key timesteps):\n"
             "needs no such data, so flat by construction"),
            ("teacher, K steps", GREY, ":", "undistilled teacher at PeRFlow's steps"),
            ("teacher, key steps", "#555555", "-.", "undistilled teacher at AccVideo's steps")):
        y, low, high = band(deviation[name]["to p"] * (len(Ms) // len(deviation[name]["to p"])))
        ax.plot(Ms, y, style, color=color, lw=2, ms=8, mec="white")
        ax.fill_between(Ms, low, high, color=color, alpha=0.15, lw=0)
        ends.append((y[-1], color, label))
    ax.set(yscale="log", xlabel="M", xticks=Ms, ylabel="mean distance of samples from p",
           title=f"g)  samples of 5 steps: their distance from the training data, {way} mismatch")
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    low, high = np.log(ax.get_ylim())
    heights = [2.0 if "\n" in label else 1.2 for _, _, label in sorted(ends, reverse=True)]
    room, at = 1.0 / sum(heights), 1.02
    for (y, color, label), height in zip(sorted(ends, reverse=True), heights, strict=True):
        ax.annotate(label, (Ms[-1], y), (1.09, at - 0.5 * height * room), va="center",
                    textcoords="axes fraction", color=INK,
                    arrowprops={"arrowstyle": "-", "color": color, "lw": 1.5, "relpos": (0, 0.5)})
        at -= height * room


# ---------------------------------------------------------------- command line
def progress(total: int):
    """bar(label), to be called `total` times; silent unless stderr is a terminal."""
    done = 0

    def bar(label: str) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty() and done % max(1, total // 200) == 0:
            share = done / total
            print(f"\r{'█' * int(25 * share):·<25} {share:4.0%}  {label:24s}", end="",
                  file=sys.stderr, flush=True)
    return bar


def settings(argv=None) -> tuple[Config, str]:
    """The configuration and OUT; a bad value ends with a message that names its option."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer iterations: rough numbers in half a minute")
    add("--seeds", type=int, default=1, metavar="N", help="average over seeds 0 to N - 1")
    add("--data", type=float, nargs="+", default=Config.data, metavar="X", help="training points")
    add("--mismatch", nargs="+", default=WAYS, choices=WAYS, metavar="WAY",
        help=f"how the data shifts, of {', '.join(WAYS)}; the first gets the distillation panels")
    add("--M", type=float, nargs="+", help="mismatches from 0 up; default: four, to the largest M "
        "that moves no point beyond the middle between it and the next")
    add("--epsilon", type=float, default=Config.epsilon, help="how near a trajectory must pass")
    add("--out", default="toy1d", help="the path of the three files, without suffix")
    a = parser.parse_args(argv)

    def check(fine: bool, option: str, got, wanted: str) -> None:
        if not fine:
            parser.error(f"{option}: got {got}; wanted {wanted}")

    check(all(map(math.isfinite, a.data)) and len(set(a.data)) == len(a.data) >= 2, "--data",
          a.data, "two or more different numbers")
    p = sorted(a.data)
    most = min(p[1] - p[0], p[-1] - p[-2])
    Ms = [most * i / 3 for i in range(4)] if a.M is None else a.M
    check(len(Ms) > 1 and Ms[0] == 0 and Ms[-1] < math.inf and min(np.diff(Ms)) > 0, "--M", Ms,
          "two or more increasing numbers, the first of them 0 (what the others are compared with)")
    check("inward" not in a.mismatch or Ms[-1] <= most, "--M", Ms[-1], f"at most {most:g}, where a "
          "point moved inward is half-way to the next, or a --mismatch without inward")
    check(len(set(a.mismatch)) == len(a.mismatch), "--mismatch", a.mismatch, "each way once")
    check(0 < a.epsilon < math.inf, "--epsilon", a.epsilon, "a number above 0")
    check(a.seeds >= 1, "--seeds", a.seeds, "1 or more")
    check(bool(Path(a.out).name) and not Path(a.out).is_dir(), "--out", a.out,
          "a file's path without suffix, such as runs/toy1d")
    cfg = Config(data=tuple(p), mismatch=tuple(a.mismatch), M=tuple(Ms), epsilon=a.epsilon,
                 seeds=a.seeds)
    return (replace(cfg, **QUICK) if a.quick else cfg), a.out


def analyse(cfg: Config) -> dict:
    """What OUT.json holds, but for the CPU seconds: a function of cfg alone."""
    torch.set_num_threads(1)  # one order of summation, so the same numbers each time
    bar = progress(cfg.seeds * (cfg.iterations + cfg.repeats * cfg.student_iterations))
    runs = [run_seed(cfg, seed, bar) for seed in range(cfg.seeds)]
    seeds = [numbers for numbers, _ in runs]
    mean = summarise(seeds)
    return {"format": 1, "config": json.loads(json.dumps(asdict(cfg))), "seeds": seeds,
            "summary": mean, "claims": claims(cfg, seeds), "caption": caption(cfg, mean),
            "drawn": runs[0][1]}


def main(argv=None) -> None:
    cfg, out = settings(argv)
    command = " ".join(["python toy1d.py", *(sys.argv[1:] if argv is None else argv)])
    report = {"command": command, "torch": torch.__version__, **analyse(cfg)}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    report["cpu_seconds"] = round(time.process_time(), 1)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items())
    Path(f"{out}.tmp.json").write_text(f"{{\n{lines}\n}}\n")
    os.replace(f"{out}.tmp.json", f"{out}.json")
    figure(report, out)
    Ms = " ".join(f"{M:.3g}" for M in cfg.M)
    print(f"\nMean of {cfg.seeds} seed(s), over M = {Ms}. A tie of x_d goes to the lower point.")
    for c in report["claims"]:
        verdict = {0: "does not hold", c["of"]: "holds"}.get(
            c["holds"], f"{c['holds']} of {c['of']} seeds")
        print(f"{verdict:>13}  {c['claim']}\n{'':18}{c['numbers']}")
    print(f"{out}.png  {out}.pdf  {out}.json   {time.process_time():.0f} CPU seconds")


if __name__ == "__main__":
    main()
