"""Stage 4: what few steps cost and what distillation wins back, as one table.

    python evaluate.py [CONFIG] [--students a.safetensors,b.safetensors] [--count 96]
    torchrun --nproc-per-node 8 evaluate.py CONFIG [field=value]      # videos split over the ranks

In:   the weight folder, the student (or several, from several seeds), held-out captions.
Out:  <run>/evaluate/: report.html, one page of it all; table.md, table.json, table.png; videos.mp4,
      videos.gif, videos.png: teacher@n, teacher@m and student@m (of several the first) side by side
      on the captions at the .5, .8, .9, .95 and 1 quantile of teacher@m's endpoint error.
Cost: `count` × 2 trajectories of the teacher and a few decodes: a minute for the small world.

Everyone starts from the same noise on the same captions. teacher@m walks the student's own key
timesteps. The columns, N videos, x latents, all in float64:
  endpoint   mean of ‖x − x50‖² / ‖x50‖², x50 what teacher@n makes of the same noise
  energy     2 E|x − y| − E|x − x'| − E|y − y'| over pairs of different videos (unbiased, so that it
             may fall below 0), |·| root mean square over latent elements; y are other teacher@n
             samples of the same captions, with other noise. teacher@n's own value is its zero.
  sliced W   Wasserstein-1 distance to y along fixed random unit directions, their mean
  HF         high-frequency energy (clips.high_frequency) of the videos over that of teacher@n's
  first frame  PSNR of the first frame against the image it was given (image-to-video only)
  oracle     part of the videos that show what their caption says (small world only)
± is a standard error over videos, by jackknife for energy, sliced W and HF; for the two distances
that of the difference from teacher@n's value, since noise and y are shared (in teacher@n's own
row: of the value). In the row of several students' mean it is over students.
"""

import dataclasses
import html
import shlex
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.config import (
    Shared, announce, field, load_config, names_config, read_yaml, settings_to_compare)
from common.files import ROOT, replace_file, write_json, write_text
from common.ranks import (
    Ranks, Timer, cli, compute_dtype, device_name, draw_noise, generator, prefer_attention,
    setup_distributed)
from common.video import (
    Prompt, centre_crop, comparison_sheet, data_uri, digest_texts, heldout_prompts, read_image,
    read_prompts, side_by_side, thumbnail, video_wall, write_video)
from common.weights import fingerprint, fingerprint_files
from frozen.load import encode_prompts, load_vae
from model import check_model, latent_shape, load_dit, time_grid
from sample import load_student, sample_batch, student_facts
from small_world import clips as world


@dataclass
class Config(Shared):
    """Settings of an evaluation."""
    prompts: str | None = field(None, "held-out captions (.jsonl with images for I2V); none: "
                                "<weights>/prompts_heldout.txt or .jsonl")
    students: str | None = field(None, "files, comma between; none: <run>/student.safetensors")
    count: int = field(96, "videos of each model, and of the independent teacher samples")
    batch: int = field(32, "videos denoised at once")
    directions: int = field(128, "random directions of sliced W")


SHOWN_QUANTILES = (0.5, 0.8, 0.9, 0.95, 1.0)  # of teacher@m's endpoint error
LOOP_SECONDS = 4  # that an mp4 lasts at least: players stop at its end


# ----------------------------------------------------------------------------------- metrics

Statistic = Callable[[Tensor], float]  # of the videos whose indices it is given


def endpoint_error(x: Tensor, x50: Tensor) -> Tensor:
    """‖x − x50‖² / ‖x50‖² of each video, float64 [N], for latents [N, …] from the same noise."""
    x, x50 = x.double().flatten(1), x50.double().flatten(1)
    return (x - x50).square().sum(1) / x50.square().sum(1)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square difference of each x [N, …] to each y [M, …], float64 [N, M]."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5


def energy_distance(xx: Tensor, yy: Tensor, xy: Tensor) -> float:
    """2 E|x − y| − E|x − x'| − E|y − y'| from the distance matrices of N videos each.

    x_i and y_i share caption i, so the diagonal of xy is left out like those of xx and yy: all
    three means are over the same pairs of captions, and equal distributions give 0 on average.
    Source: Székely and Rizzo, 2013 (U-statistic).
    """
    off = 1 - torch.eye(len(xx), dtype=xx.dtype)
    return float(((2 * xy - xx - yy) * off).sum() / off.sum())


def projections(x: Tensor, count: int) -> Tensor:
    """x [N, …] along `count` fixed random unit directions, float64 [N, count]."""
    x, g = x.double().flatten(1), generator("sliced Wasserstein")
    out = []
    for _ in range(count):  # one by one: large latents have millions of elements
        u = torch.randn(x.shape[1], generator=g, dtype=torch.float64)
        out.append(x @ (u / u.norm()))
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


def mean_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error, of values [N]."""
    values = values.double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def jackknife(statistic: Statistic, n: int) -> tuple[float, float]:
    """A statistic of n videos, given their indices, and its leave-one-out standard error."""
    every = torch.arange(n)
    left = torch.tensor([statistic(every[every != i]) for i in range(n)], dtype=torch.float64)
    return statistic(every), float(((n - 1) * left.var(correction=0)).sqrt())


# ---------------------------------------------------------------------------------- sampling

@dataclass
class Samples:
    """A model's latents [N,C,T,H,W], and after measure_videos what its videos showed."""
    label: str
    latents: Tensor
    evaluations: int
    seconds: float                                # of the DiT, a video
    hf: Tensor | None = None                      # [N]
    first: Tensor | None = None                   # [N], dB, if the videos start from images
    hits: dict[str, Tensor] | None = None         # [N] bool for each attribute, and "all"
    shown: dict[int, Tensor] | None = None        # by index, small
    decode_seconds: float = 0.0                   # a video


def sample_model(label: str, dit: nn.Module, times: list[float], noise: Tensor, conds: list[dict],
                 unconds: list[dict] | None, cfg: Config, device: torch.device) -> Samples:
    """Denoise noise [N,C,T,H,W] in batches along `times`; unconds None is without guidance."""
    timer, out, steps = Timer(device), [], len(times) - 1
    bar = tqdm(total=len(noise) * steps, desc=label, unit="step", mininterval=1,
               disable=dist.get_rank() > 0 or None)
    for a in range(0, len(noise), cfg.batch):
        b = slice(a, a + cfg.batch)
        out.append(sample_batch(dit, noise[b], times, conds[b], unconds and unconds[b],
                                cfg.cfg_scale, timer, bar).cpu())
    bar.close()
    latents, evaluations = torch.cat(out), steps * (1 if unconds is None else 2)
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(f"{label}: its latents hold NaN or infinity: the weights do not sample; "
                         "distill them again, with a lower lr")
    return Samples(label, latents, evaluations, timer.seconds()["steps"] / len(noise))


@torch.no_grad()
def measure_videos(samples: Samples, mine: range, vae: nn.Module, captions: list[str],
                   images: list[Tensor], shown: dict[int, float], cfg: Config,
                   device: torch.device) -> None:
    """Decode the videos one by one; keep what is measured on them, and those to show.

    Args: mine, the samples' places among all videos; captions of all; images, the first frames
    [3,H,W] that these samples were given, if they were; shown, as `videos_to_show` has it.
    """
    oracle = is_small_world(captions, cfg)
    timer, hf, first, hits, samples.shown = Timer(device), [], [], [], {}
    bar = tqdm(samples.latents, f"decode {samples.label}", disable=mine.start > 0 or None)
    for own, (i, latents) in enumerate(zip(mine, bar, strict=True)):
        timer.lap("other")
        video = vae.decode(latents[None].to(device))[0]
        timer.lap("decode")
        hf.append(world.high_frequency(video[None]))
        if images:
            first.append(float(world.psnr(video[None, :, :1].cpu(), images[own][None, :, None])))
        if oracle:
            hits.append(world.oracle_hits(video[None], captions[i:i + 1]))
        if i in shown:
            samples.shown[i] = thumbnail(video.cpu())
    samples.hf = torch.tensor(hf, dtype=torch.float64)
    samples.first = torch.tensor(first, dtype=torch.float64) if first else None
    samples.decode_seconds = timer.seconds()["decode"] / len(hf)
    if oracle:
        samples.hits = {name: torch.cat([h[name] for h in hits]) for name in hits[0]}


def interleaved(parts: list[Tensor]) -> Tensor:
    """The values of all videos in their order; parts, each rank's: every world-th video."""
    count, world_size = sum(map(len, parts)), len(parts)
    order = torch.cat([torch.arange(rank, count, world_size) for rank in range(world_size)])
    return torch.cat(parts)[order.argsort()]


def gathered(own: Samples, ranks: Ranks) -> Samples | None:
    """All ranks' samples in their order, on the first rank; None on the others."""
    parts = [own] * ranks.world if ranks.rank == 0 else None
    dist.gather_object(own, parts)
    if parts is None:
        return None
    count = sum(len(part.latents) for part in parts)

    def join(values: list[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else interleaved(values)

    mean = {name: sum(getattr(part, name) * len(part.latents) for part in parts) / count
            for name in ("seconds", "decode_seconds")}
    hits = own.hits and {name: join([part.hits[name] for part in parts]) for name in own.hits}
    return Samples(own.label, join([part.latents for part in parts]), own.evaluations, hits=hits,
                   hf=join([part.hf for part in parts]), first=join([p.first for p in parts]),
                   shown={i: x for part in parts for i, x in (part.shown or {}).items()}, **mean)


def videos_to_show(errors: Tensor, captions: list[str]) -> dict[int, float]:
    """The videos to show: the index of the one at each of SHOWN_QUANTILES of errors [N], to that
    quantile, easy ones first. Each caption is shown once, at the highest of its quantiles."""
    order, shown = errors.argsort(stable=True).tolist(), {}
    for quantile in reversed(SHOWN_QUANTILES):
        video = order[round(quantile * (len(order) - 1))]
        if captions[video] not in [captions[i] for i in shown]:
            shown[video] = quantile
    return dict(reversed(shown.items()))


def is_small_world(captions: list[str], cfg: Config) -> bool:
    """Whether every caption names a colour, a shape and a direction that the oracle can read."""
    named = [world.caption_attributes(caption) for caption in captions]
    return cfg.height == cfg.width and all(min(n.values()) >= 0 for n in named)


def first_frames(prompts: list[Prompt], cfg: Config) -> list[Tensor]:
    """The prompts' images [3,H,W] in the videos' shape; none if they have none."""
    size = cfg.height, cfg.width
    return [F.interpolate(centre_crop(read_image(prompt.image), *size)[None], size,
                          mode="bicubic")[0].clamp(-1, 1)
            for prompt in prompts if prompt.image is not None]


# ------------------------------------------------------------------------------------- table

COLUMNS = {"endpoint": "endpoint error ↓", "energy": "energy distance", "sliced": "sliced W ↓",
           "hf": "HF, 1 = teacher's"}


def measure(samples: Samples, best: Samples, reference: Tensor, cfg: Config) -> dict:
    """One row of the table: {"label", "evaluations", "seconds", column: (value, standard error)}.

    Args: best, teacher@n from the same noise; reference, independent teacher@n latents [N,…].
    """
    n = len(samples.latents)
    row = {"label": samples.label, "evaluations": samples.evaluations, "seconds": samples.seconds,
           "decode_seconds": samples.decode_seconds,
           "endpoint": mean_error(endpoint_error(samples.latents, best.latents)),
           "hf": jackknife(lambda i: float(samples.hf[i].sum() / best.hf[i].sum()), n)}
    zero = set_distances(best.latents, reference, cfg.directions)
    for name, distance in set_distances(samples.latents, reference, cfg.directions).items():
        row[name] = jackknife(distance, n)
        if samples is not best:
            gap = jackknife(lambda i, d=distance, z=zero[name]: d(i) - z(i), n)
            row[name] = (row[name][0], gap[1])
    if samples.first is not None:
        row["first"] = mean_error(samples.first)
    for name, hits in (samples.hits or {}).items():
        row[name] = mean_error(hits)
    return row


def mean_row(rows: list[dict]) -> dict:
    """The mean of several students' rows, ± the standard error over students."""
    out = {"label": f"{rows[0]['label'].split(' ')[0]}, mean of {len(rows)}",
           "evaluations": rows[0]["evaluations"]}
    for name in rows[0].keys() - out.keys():
        if isinstance(rows[0][name], tuple):
            out[name] = mean_error(torch.tensor([row[name][0] for row in rows]))
        else:
            out[name] = sum(row[name] for row in rows) / len(rows)
    return out


def gates(best: dict, few: dict, student: dict) -> list[dict]:
    """The small world's gates, from the rows of teacher@n, teacher@m and the (mean) student."""
    near, far = (abs(row["energy"][0] - best["energy"][0]) for row in (student, few))
    if "first" in student:  # the image settles what few steps would blur
        second = world.gate("student's first frame against its image, dB", student["first"][0], 30)
    else:
        second = world.gate(f"{few['label']}: high-frequency energy", few["hf"][0], most=0.85)
    return [
        world.gate(f"{best['label']}: all attributes right", best["all"][0], 0.9), second,
        world.gate(f"student's endpoint error / {few['label']}'s",
                   student["endpoint"][0] / few["endpoint"][0], most=0.5),
        world.gate("student's high-frequency energy", student["hf"][0], 0.95, 1.05),
        world.gate(f"student's energy distance from {best['label']}'s, at most {few['label']}'s",
                   near, most=far)]


def cells(row: dict, columns: dict[str, str]) -> list[str]:
    """A row's table cells as text."""
    def number(name: str) -> str:
        if name not in row:
            return ""
        digits = 2 if name in (*world.ATTRIBUTES, "all", "first") else 4
        return f"{row[name][0]:.{digits}f} ± {row[name][1]:.{digits}f}"

    return [row["label"], *(number(name) for name in columns), str(row["evaluations"]),
            f"{row['seconds']:.3f}"]


def columns_of(rows: list[dict]) -> dict[str, str]:
    """Table columns: key to heading; the oracle's only where it was asked."""
    first = {"first": "first frame, dB"} if "first" in rows[0] else {}
    oracle = {name: f"oracle: {name}" for name in (*world.ATTRIBUTES, "all") if name in rows[0]}
    return COLUMNS | first | oracle


def markdown(rows: list[dict], passed: list[dict], cfg: Config, facts: dict) -> str:
    """The table and the gates as Markdown."""
    columns = columns_of(rows)
    head = ["model", *columns.values(), "evaluations", "DiT s a video"]
    lines = [f"{cfg.count} videos of held-out captions, the same noise for every model, "
             f"{cfg.width}×{cfg.height}×{cfg.frames}, teacher guidance {cfg.cfg_scale}, "
             f"{facts['device']}; ± standard error. Columns: `python evaluate.py --help`.", "",
             "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cells(row, columns)) + " |" for row in rows]
    decode = sum(row["decode_seconds"] for row in rows) / len(rows)
    lines += ["", f"Decoding takes {decode:.3f} s a video on top, for every row."]
    if passed:
        lines += ["", "| gate | got | wanted | |", "|---|---|---|---|"]
        lines += [f"| {g['gate']} | {g['got']:.4f} | {g['wanted']} | "
                  f"{'pass' if g['pass'] else '**FAIL**'} |" for g in passed]
    return "\n".join(lines) + "\n"


def draw_table(path: Path, rows: list[dict], title: str) -> None:
    """Write the table with a bar chart of each main column as a PNG."""
    from matplotlib.figure import Figure  # half a second that only those who draw should pay

    columns = columns_of(rows)
    figure = Figure(figsize=(14, 4.6 + 0.3 * len(rows)), dpi=120, layout="constrained")
    top, bottom = figure.subfigures(2, height_ratios=[1.0 + 0.3 * len(rows), 3.6])
    axes = top.subplots()
    axes.set_axis_off()
    axes.set_title(title, fontsize=11, weight="bold", parse_math=False)
    head = ["model", *(name.replace(": ", ":\n") for name in columns.values()), "evalu-\nations",
            "DiT s\na video"]
    table = axes.table([cells(row, columns) for row in rows], colLabels=head, loc="center",
                       cellLoc="center", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    table.auto_set_column_width(list(range(len(head))))
    table.scale(1, 1.5)
    for column in range(len(head)):
        table[0, column].set_height(0.5 / (1.0 + 0.3 * len(rows)))
    panels = bottom.subplots(1, len(COLUMNS))
    labels = [row["label"].replace(", ", ",\n") for row in rows]
    for axes, (name, heading) in zip(panels, COLUMNS.items(), strict=True):
        shade = ["#8a8f98", "#d98032", *["#2f6db3"] * (len(rows) - 2)]
        values, errors = zip(*(row[name] for row in rows), strict=True)
        axes.bar(range(len(rows)), values, yerr=errors, color=shade, capsize=3)
        axes.set_xticks(range(len(rows)), labels, fontsize=8, rotation=0 if len(rows) < 4 else 40)
        axes.set_title(heading, fontsize=10)
        axes.axhline(values[0], color="#8a8f98", lw=0.8, ls="--")
        axes.spines[["top", "right"]].set_visible(False)
    replace_file(path, lambda aside: figure.savefig(aside, format="png"))


# -------------------------------------------------------------------------------------- page

@dataclass
class Example:
    """A caption that is shown, with the videos of teacher@n, teacher@m and the first student."""
    caption: str                                  # and its quantile
    videos: list[Tensor]
    notes: list[str]                              # of each video: its endpoint error


def html_of(text: str) -> str:
    """Paragraphs and tables of Markdown as HTML: no more than `markdown` writes, escaped."""
    blocks, text = [], html.escape(text.replace("`", "")).replace("**FAIL**", "<mark>FAIL</mark>")
    for block in text.strip().split("\n\n"):
        head, *lines = [line[1:-1].replace("|", "<td>") for line in block.split("\n")]
        rows = "".join(f"<tr><td>{line}" for line in (head, *lines[1:]))
        blocks.append(f'<div class="wide"><table>{rows}</table></div>' if block.startswith("|")
                      else f"<p>{block}</p>")
    return "\n".join(blocks)


def html_example(example: Example, labels: list[str], fps: float) -> str:
    """One video of all models, under their names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, side_by_side(example.videos), fps, LOOP_SECONDS)
        source = data_uri(path)
    heads = "".join(f"<div><b>{html.escape(label)}</b><br>{note}</div>"
                    for label, note in zip(labels, example.notes, strict=True))
    return (f"<figure><figcaption>{html.escape(example.caption)}</figcaption>"
            f'<div class="three">{heads}</div>'
            f'<video autoplay loop muted playsinline src="{source}"></video></figure>')


def write_page(out: Path, examples: list[Example], labels: list[str], rows: list[dict],
               table: str, cfg: Config, facts: dict) -> None:
    """Fill in assets/report.html, which then needs no other file; table as `markdown` has it."""
    texts = {**facts, "n": labels[0].partition("@")[2], "m": labels[1].partition("@")[2],
             "count": cfg.count}
    longest = max(row["endpoint"][0] for row in rows) or 1.0
    for name, row in {"best": rows[0], "few": rows[1], "student": rows[-1]}.items():
        texts |= {f"{name}_label": row["label"], f"{name}_error": f"{row['endpoint'][0]:.3f}",
                  f"{name}_bar": f"{100 * row['endpoint'][0] / longest:.1f}%",
                  f"{name}_cost": f"{row['evaluations']} evaluations, {row['seconds']:.3f} s"}
    curves = Path(cfg.run) / "distill/curves.png"
    words = [f"<li>{name}: {', '.join(values)}" for name, values in world.ATTRIBUTES.items()]
    parts = {
        "videos": "\n".join(html_example(e, labels, cfg.fps) for e in examples),
        "stills": data_uri(out / "videos.png"), "table": html_of(table),
        "curves": curves.is_file() and "<h2>How the student learned</h2><img alt=\"Losses, heads' "
        f'accuracy, gradients, held-out error" src="{data_uri(curves)}">',
        "words": "all" in rows[0] and "<p>The small world knows these words:</p>"
        f"<ul>{''.join(words)}</ul>"}
    template = string.Template((ROOT / "assets/report.html").read_text(encoding="utf-8"))
    write_text(out / "report.html", template.substitute(
        {name: html.escape(str(text)) for name, text in texts.items()},
        **{name: part or "" for name, part in parts.items()}))


def next_command(cfg: Config, argv: list[str], prompt: Prompt) -> str:
    """The command that samples the student, with the evaluation's config and shared overrides."""
    config = argv[0] if names_config(argv) else "configs/tiny.yaml"
    values, shared = dataclasses.asdict(cfg), dataclasses.asdict(Shared())
    path = Path(config) if names_config(argv) else ROOT / config
    plain = shared | read_yaml(path, "evaluate", values)
    options = {name: values[name] for name in shared if values[name] != plain[name]}
    options |= {"student": cfg.students and cfg.students.split(",")[0].strip(),
                "image": prompt.image, "prompt": prompt.text}
    words = ["python", "sample.py", config]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", ",".join(map(str, value)) if name == "key" else str(value)]
    return shlex.join(words)


# -------------------------------------------------------------------------------------- main

def check_config(cfg: Config) -> None:
    """Raise ValueError for settings that cannot be evaluated."""
    for key, least in (("count", 3), ("batch", 1), ("directions", 1)):
        if getattr(cfg, key) < least:
            raise ValueError(f"{key}: got {getattr(cfg, key)}; wanted {least} or more")


def students_of(cfg: Config) -> list[tuple[Path, dict]]:
    """The students' files and facts; ValueError if their teacher or key times are not all alike."""
    names = (cfg.students or str(Path(cfg.run) / "student.safetensors")).split(",")
    found = [(path, student_facts(path, cfg, foreign=cfg.students is not None))
             for path in (Path(name.strip()) for name in names)]
    for path, facts in found:
        wanted = {"n": cfg.n, "shift": cfg.shift, "cfg_scale": cfg.cfg_scale,
                  "t_key": found[0][1]["t_key"]}
        for key, value in wanted.items():
            if facts[key] != value:
                raise ValueError(f"{path}: the student has {key} {facts[key]}, wanted {value}, as "
                                 f"{'the first student' if key == 't_key' else 'the config'} has: "
                                 "evaluate it with the config that it was distilled with")
    return found


def sample_all(cfg: Config, mine: range, prompts: list[Prompt],
               students: list[tuple[Path, dict]],
               device: torch.device) -> tuple[list[Samples], Samples]:
    """Samples of teacher@n, teacher@m and every student from one noise, and those of teacher@n from
    another noise; of the videos `mine` only."""
    prompts = [prompts[i] for i in mine]
    sizes = [(cfg.height, cfg.width)] * len(prompts)
    conds, unconds = encode_prompts(cfg, prompts, sizes, True, device, Timer(device))
    shape = latent_shape(cfg.frames, cfg.height, cfg.width)
    noise, other = (draw_noise(shape, [(name, cfg.seed, i, prompt.text)
                                       for i, prompt in zip(mine, prompts, strict=True)])
                    for name in ("evaluate", "evaluate, reference"))
    grid, t_key = time_grid(cfg.family, cfg.n, cfg.shift).tolist(), students[0][1]["t_key"]
    n, m = len(grid) - 1, len(t_key) - 1
    dit = load_dit(cfg.weights, cfg.preset, compute_dtype(device), device)
    dit.requires_grad_(False)
    models = [sample_model(f"teacher@{n}", dit, grid, noise, conds, unconds, cfg, device),
              sample_model(f"teacher@{m}", dit, t_key, noise, conds, unconds, cfg, device)]
    reference = sample_model(f"teacher@{n}, other noise", dit, grid, other, conds, unconds, cfg,
                             device)
    del dit
    for number, (path, _) in enumerate(students, 1):
        label = f"student@{m}" + (f" #{number}" if len(students) > 1 else "")
        student = load_student(cfg, path, device)
        models.append(sample_model(label, student, t_key, noise, conds, None, cfg, device))
    return models, reference


def commit() -> str | None:
    """The commit of this code, with -dirty if files differ from it; None outside a repository."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, check=False,
                              capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    cfg = load_config(Config, "evaluate", argv, __doc__)
    sizes = check_model(cfg)
    check_config(cfg)
    students = students_of(cfg)
    held_out = read_prompts(cfg.prompts or heldout_prompts(cfg.weights, sizes.takes_image),
                            sizes.takes_image)
    every = max(1, len(held_out) // cfg.count)  # few videos: captions from all over the list
    prompts = [held_out[i * every % len(held_out)] for i in range(cfg.count)]
    ranks = setup_distributed(cfg.device, same=settings_to_compare(
        cfg, teacher=fingerprint(cfg.weights), encoders=fingerprint_files(cfg.weights),
        prompts=digest_texts(prompts), students=[fingerprint(path) for path, _ in students]))
    prefer_attention(cfg.attention, ranks.device)
    if cfg.count < ranks.world:
        raise ValueError(f"count: got {cfg.count}; wanted at least one for each of {ranks.world} "
                         "ranks")
    mine, device = range(ranks.rank, cfg.count, ranks.world), ranks.device
    out = announce(cfg, "evaluate", ranks.rank)

    models, reference = sample_all(cfg, mine, prompts, students, device)
    captions, errors = [prompt.text for prompt in prompts], [None] * ranks.world
    dist.all_gather_object(errors, endpoint_error(models[1].latents, models[0].latents))
    shown = videos_to_show(interleaved(errors), captions)
    vae = load_vae(cfg.weights, device, compute_dtype(device), cfg.family)
    images = first_frames([prompts[i] for i in mine], cfg)
    for model in models:
        measure_videos(model, mine, vae, captions, images, shown, cfg, device)
    *models, reference = [gathered(samples, ranks) for samples in (*models, reference)]
    if ranks.rank == 0:
        start = ["torchrun", f"--nproc-per-node={ranks.world}"] if ranks.world > 1 else ["python"]
        given = sys.argv[1:] if argv is None else argv
        report(cfg, out, models, reference.latents, captions, shown, students, {
            "command": shlex.join([*start, "evaluate.py", *given]), "commit": commit(),
            "next": next_command(cfg, given, prompts[next(iter(shown))]),
            "device": device_name(device), "torch": torch.__version__,
            "seconds": round(time.perf_counter() - started, 1)})
    dist.barrier()


def report(cfg: Config, out: Path, models: list[Samples], reference: Tensor, captions: list[str],
           shown: dict[int, float], students: list[tuple[Path, dict]], facts: dict) -> None:
    """Measure the models, write table, videos and page; reference as in `measure`."""
    best, few, *rest = (measure(model, models[0], reference, cfg) for model in models)
    rows = [best, few, *rest] + ([mean_row(rest)] if len(rest) > 1 else [])
    passed = gates(best, few, rows[-1]) if "all" in best else []
    text = markdown(rows, passed, cfg, facts)
    write_text(out / "table.md", text)
    write_json(out / "table.json", {
        **facts, "config": dataclasses.asdict(cfg), "rows": rows, "gates": passed,
        "students": [{"file": str(path), **known} for path, known in students]})
    draw_table(out / "table.png", rows, f"{cfg.count} held-out captions, the same noise for all")

    labels = [model.label for model in models[:3]]
    errors = [endpoint_error(model.latents, models[0].latents) for model in models[1:3]]
    quantiles = [f"{quantile:g}".lstrip("0") for quantile in shown.values()]
    examples = [Example(f"{captions[i]} ({quantile} quantile)", [m.shown[i] for m in models[:3]],
                        ["the target", *(f"error {float(error[i]):.3f}" for error in errors)])
                for i, quantile in zip(shown, quantiles, strict=True)]
    facts |= {"shown": f"captions at the {', '.join(quantiles)} quantile of {labels[1]}'s "
                       "endpoint error"}
    wall = video_wall([(e.caption, side_by_side(e.videos, labels)) for e in examples])
    write_video(out / "videos.gif", wall, cfg.fps)
    write_video(out / "videos.mp4", wall, cfg.fps, LOOP_SECONDS)
    sheet = [(e.caption, list(zip(e.videos, e.notes, strict=True))) for e in examples]
    comparison_sheet(out / "videos.png", labels, sheet,
                     f"{facts['shown']}: first, middle and last frame")
    write_page(out, examples, labels, rows, text, cfg, facts)
    print(f"\n{text}\nlook at {out / 'report.html'} in a browser: the videos and these numbers\n"
          f"        {out / 'videos.mp4'} (or .gif), videos.png, table.png, table.md, table.json\n"
          f"next:   source .venv/bin/activate\n        {facts['next']}")


if __name__ == "__main__":
    cli(main)
