"""Stage 4: what few steps cost and what distillation wins back, as one table.

    python evaluate.py [CONFIG] [--students a.safetensors,b.safetensors] [--count 96]
    torchrun --nproc-per-node 8 evaluate.py CONFIG [field=value]      # videos split over the ranks
    python evaluate.py [CONFIG] --paper all [--jobs 2]    # the paper's tables and figures
    python evaluate.py --vbench_scores DIR                # VBench's results as Table 1

In:   the weight folder, the student (or several, of several seeds or numbers of steps), held-out
      captions. A student may be a LoRA.
Out:  <run>/evaluate/: report.html, one page of it all; table.md, table.json, table.png; videos.mp4,
      videos.gif, videos.png: teacher@n, teacher@m and student@m (of several the first) side by side
      on the captions at the .5, .8, .9, .95 and 1 quantile of teacher@m's endpoint error; of
      students with unlike steps also ladder.png and ladder.gif; teacher.safetensors, the teacher's
      latents, which the next evaluation reads.
Cost: `count` × 2 trajectories of the teacher and a few decodes: a minute for the small world.

Everyone starts from the same noise on the same captions. teacher@m walks the student's own key
timesteps. The columns, N videos, x latents, all in float64:
  endpoint   mean of ‖x − x50‖² / ‖x50‖², x50 what teacher@n makes of the same noise
  energy     2 E|x − y| − E|x − x'| − E|y − y'| over pairs of different videos (unbiased, so that it
             may fall below 0), |·| root mean square over latent elements; y are other teacher@n
             samples of the same captions, with other noise. teacher@n's own value is its zero.
  sliced W   Wasserstein-1 distance to y along fixed random unit directions, their mean
  HF         high-frequency energy (clips.high_frequency) of the videos over that of teacher@n's
  spread     variance of the latents over videos, summed over elements, over that of teacher@n's
  C2ST       accuracy of a small classifier, trained for it, that tells x from y; 0.5: it cannot
  first frame  PSNR of the first frame against the image it was given (image-to-video only)
  oracle     part of the videos that show what their caption says (small world only)
± is a standard error over videos, by jackknife for energy, sliced W, HF and spread; for the two
distances that of the difference from teacher@n's value, since noise and y are shared (in
teacher@n's own row: of the value); for C2ST over three initialisations of the classifier. In the
row of several students' mean it is over students.
"""

import dataclasses
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from artifacts.lora import is_lora
from artifacts.student import facts_in, load_student, student_facts
from common.config import (
    Shared, announce, field, load_config, names_config, read_yaml, settings_to_compare)
from common.files import commit, write_json, write_text
from common.names import fingerprint, fingerprint_files
from common.prompts import Prompt, digest_texts, heldout_prompts, read_prompts
from common.ranks import (
    Ranks, Timer, cli, compute_dtype, device_name, draw_noise, on_first_rank, prefer_attention,
    setup_distributed)
from common.video import centre_crop, read_image, thumbnail, write_video
from common.weights import open_safetensors, open_tensors, save_tensors
from evaluation.measures import Samples, endpoint_error, gates, mean_row, measure
from evaluation.page import LOOP_SECONDS, Example, draw_table, markdown, write_ladder, write_page
from evaluation.sheets import comparison_sheet, side_by_side, video_wall
from frozen.load import encode_prompts, load_vae
from frozen.unipc import sample_batch, unipc_grid
from model import check_model, latent_shape, load_dit, time_grid
from small_world import clips as world



@dataclass
class Config(Shared):
    """Settings of an evaluation."""
    prompts: str | None = field(None, "held-out captions (.jsonl with images for I2V); none: "
                                "<weights>/prompts_heldout.txt or .jsonl")
    students: str | None = field(None, "files, comma between; none: <run>/student.safetensors")
    names: str | None = field(None, "names of the students, comma between; all of them are shown")
    teacher_steps: list[int] | None = field(None, "further rows: the teacher on grids of so many "
                                            "steps, by Euler and, for Wan, by UniPC", "[1, 10000]")
    count: int = field(96, "videos of each model, and of the independent teacher samples",
                       "[3, 100000]")
    batch: int = field(32, "videos denoised at once", "[1, 10000]")
    directions: int = field(128, "random directions of sliced W", "[1, 1000000]")
    c2st_steps: int = field(100, "training iterations of the classifier of C2ST", "[1, inf)")
    pictures: bool = field(True, "videos, pictures and the page beside the table")
    teacher_samples: str | None = field(None, "file that keeps teacher@n's latents for the next "
                                        "evaluation; none: <run>/evaluate/teacher.safetensors")
# Of `Shared`: what teacher@n's latents depend on, beside weights, prompts and device.
SAMPLE_SETTINGS = ("family", "preset", "height", "width", "frames", "n", "shift", "cfg_scale",
                   "embedded_guidance", "negative_prompt", "seed", "count", "attention")
SHOWN_QUANTILES = (0.5, 0.8, 0.9, 0.95, 1.0)  # of teacher@m's endpoint error


# ---------------------------------------------------------------------------------- sampling

def sample_model(label: str, dit: nn.Module, times: list[float], noise: Tensor, conds: list[dict],
                 unconds: list[dict] | None, cfg: Config, device: torch.device,
                 solver: str = "euler") -> Samples:
    """Denoise noise [N,C,T,H,W] in batches along `times`; unconds None is without guidance."""
    timer, out, steps = Timer(device), [], len(times) - 1
    bar = tqdm(total=len(noise) * steps, desc=label, unit="step", mininterval=1,
               disable=dist.get_rank() > 0 or None)
    for a in range(0, len(noise), cfg.batch):
        b = slice(a, a + cfg.batch)
        out.append(sample_batch(dit, noise[b], times, conds[b], unconds and unconds[b],
                                cfg.cfg_scale, timer, bar, solver).cpu())
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


# ------------------------------------------------------------------------------ the next command

def shared_overrides(cfg: Config) -> dict:
    """The shared settings in which an evaluation differs from its config file."""
    values, shared = dataclasses.asdict(cfg), dataclasses.asdict(Shared())
    plain = shared | read_yaml(cfg.path, "evaluate", values)
    return {name: values[name] for name in shared if values[name] != plain[name]}


def as_options(values: dict) -> dict[str, str]:
    """Settings as a command line has them; those that are None are left out."""
    return {name: ",".join(map(str, value)) if name == "key" else str(value)
            for name, value in values.items() if value is not None}


def next_command(cfg: Config, argv: list[str], prompt: Prompt) -> str:
    """The command that samples the student, with the evaluation's config and shared overrides."""
    config = argv[0] if names_config(argv) else "configs/tiny.yaml"
    options = as_options(shared_overrides(cfg) | {
        "student": cfg.students and cfg.students.split(",")[0].strip(), "image": prompt.image,
        "prompt": prompt.text})
    return shlex.join(["python", "sample.py", config, *(
        word for name, value in options.items() for word in (f"--{name}", value))])


# -------------------------------------------------------------------------------------- main

def students_of(cfg: Config) -> list[tuple[Path, dict]]:
    """The students' files and facts, those of the same key times together; ValueError if one has
    another teacher or another grid than the config."""
    files = (cfg.students or str(Path(cfg.run) / "student.safetensors")).split(",")
    found = [(path, student_facts(path, cfg, cfg.students is not None, same_teacher=True))
             for path in (Path(name.strip()) for name in files)]
    names = [None] * len(found) if cfg.names is None else cfg.names.split(",")
    if len(names) != len(found):
        raise ValueError(f"names: got {len(names)}; wanted {len(found)}, one for each student")
    for (path, facts), name in zip(found, names, strict=True):
        facts["name"] = name
        for key in ("n", "shift", "cfg_scale"):
            if facts[key] != getattr(cfg, key):
                raise ValueError(f"{path}: the student has {key} {facts[key]}, wanted "
                                 f"{getattr(cfg, key)}, as the config has: evaluate it with the "
                                 "config that it was distilled with")
    grids = list(dict.fromkeys(tuple(facts["t_key"]) for _, facts in found))
    return sorted(found, key=lambda pair: grids.index(tuple(pair[1]["t_key"])))


def sample_teacher(cfg: Config, mine: range, dit: nn.Module, noises: list[Tensor],
                   conds: list[dict], unconds: list[dict] | None, ranks: Ranks,
                   about: dict) -> list[Samples]:
    """Samples of teacher@n from each of two noises [N,C,T,H,W]; of the videos `mine` only.

    They are kept in a file; those that an earlier evaluation with the same `about` left there are
    read instead.
    """
    path = Path(cfg.teacher_samples or Path(cfg.run) / "evaluate/teacher.safetensors")
    grid = time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    labels = [f"teacher@{cfg.n}", f"teacher@{cfg.n}, other noise"]
    about = {**about, "labels": labels, "batch": cfg.batch, "device": ranks.device.type,
             **{name: getattr(cfg, name) for name in SAMPLE_SETTINGS}}

    def stored() -> dict | None:
        known = facts_in(path) if path.exists() else {}
        return known if known.get("about") == json.loads(json.dumps(about)) else None

    known = on_first_rank(stored)
    if known:
        latents = [open_safetensors(path)[label].read()[mine.start::mine.step] for label in labels]
        evaluations = cfg.n * (1 if unconds is None else 2)
        return [Samples(label, x, evaluations, seconds) for label, x, seconds
                in zip(labels, latents, known["seconds"], strict=True)]
    made = [sample_model(label, dit, grid, noise, conds, unconds, cfg, ranks.device)
            for label, noise in zip(labels, noises, strict=True)]
    whole = [gathered(samples, ranks) for samples in made]
    if ranks.rank == 0:
        about = {"about": about, "seconds": [samples.seconds for samples in whole]}
        save_tensors(path, {samples.label: samples.latents for samples in whole},
                     {"accvideo": json.dumps(about)})
    return made


def sample_all(cfg: Config, mine: range, prompts: list[Prompt], students: list[tuple[Path, dict]],
               ranks: Ranks, about: dict) -> tuple[list[Samples], Samples]:
    """Samples of teacher@n; of teacher@m and its students, for each set of key times; those of
    `teacher_steps`; and teacher@n's from another noise. Of the videos `mine` only."""
    prompts, device = [prompts[i] for i in mine], ranks.device
    sizes = [(cfg.height, cfg.width)] * len(prompts)
    conds, unconds = encode_prompts(cfg, prompts, sizes, True, device, Timer(device))
    shape = latent_shape(cfg.frames, cfg.height, cfg.width)
    noises = [draw_noise(shape, [(name, cfg.seed, i, prompt.text)
                                 for i, prompt in zip(mine, prompts, strict=True)])
              for name in ("evaluate", "evaluate, reference")]
    dit = load_dit(cfg.weights, cfg.preset, compute_dtype(device), device)
    dit.requires_grad_(False)
    best, reference = sample_teacher(cfg, mine, dit, noises, conds, unconds, ranks, about)
    by_grid = {t_key: [sample_model(f"teacher{name}", dit, list(t_key), noises[0], conds, unconds,
                                    cfg, device)]
               for t_key, name in grid_names(students).items()}
    walks = [(n, solver, grid) for n in cfg.teacher_steps or () for solver, grid in (
        ("euler", time_grid(cfg.family, n, cfg.shift)), ("unipc", unipc_grid(n, cfg.shift)))
        if cfg.family == "wan" or solver == "euler"]
    more = [sample_model(f"teacher@{n} by {solver}", dit, grid.tolist(), noises[0], conds, unconds,
                         cfg, device, solver) for n, solver, grid in walks]
    del dit
    for t_key, name in grid_names(students).items():
        files = [(path, facts["name"]) for path, facts in students
                 if tuple(facts["t_key"]) == t_key]
        for number, (path, own) in enumerate(files, 1):
            label = f"student{name}" + (f" #{number}" if len(files) > 1 else "")
            label = label if own is None else f"{own}{name}"
            student = load_student(cfg, path, device)
            by_grid[t_key].append(sample_model(label, student, list(t_key), noises[0], conds, None,
                                               cfg, device))
    return [best, *(model for models in by_grid.values() for model in models), *more], reference


def is_further(label: str) -> bool:
    """Whether a row is one of `teacher_steps`."""
    return label.startswith("teacher@") and label.endswith((" by euler", " by unipc"))


def grid_names(students: list[tuple[Path, dict]]) -> dict[tuple[float, ...], str]:
    """Each set of key times and its name: @5, or with the times where two have as many steps."""
    grids = dict.fromkeys(tuple(facts["t_key"]) for _, facts in students)
    lengths = [len(t_key) for t_key in grids]
    return {t_key: f"@{len(t_key) - 1}" + (
        "" if lengths.count(len(t_key)) == 1 else
        f" at {', '.join(f'{t:.2g}' for t in t_key)}") for t_key in grids}


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    cfg = load_config(Config, "evaluate", argv, __doc__)
    sizes = check_model(cfg)
    students = students_of(cfg)
    held_out = read_prompts(cfg.prompts or heldout_prompts(cfg.weights, sizes.takes_image),
                            sizes.takes_image)
    every = max(1, len(held_out) // cfg.count)  # few videos: captions from all over the list
    prompts = [held_out[i * every % len(held_out)] for i in range(cfg.count)]
    about = {"teacher": fingerprint(cfg.weights), "encoders": fingerprint_files(cfg.weights),
             "prompts": digest_texts(prompts)}
    ranks = setup_distributed(cfg.device, same=settings_to_compare(
        cfg, **about, students=[fingerprint_files(path) if is_lora(open_tensors(path)) else
                                fingerprint(path) for path, _ in students]))
    prefer_attention(cfg.attention, ranks.device)
    if cfg.count < ranks.world:
        raise ValueError(f"count: got {cfg.count}; wanted at least one for each of {ranks.world} "
                         "ranks")
    mine, device = range(ranks.rank, cfg.count, ranks.world), ranks.device
    out = announce(cfg, "evaluate", ranks.rank)

    models, reference = sample_all(cfg, mine, prompts, students, ranks, about)
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
            "seconds": round(time.perf_counter() - started, 1)}, device)
    dist.barrier()


def report(cfg: Config, out: Path, models: list[Samples], reference: Tensor, captions: list[str],
           shown: dict[int, float], students: list[tuple[Path, dict]], facts: dict,
           device: torch.device) -> None:
    """Measure the models, write table, videos and page; reference as in `measure`."""
    best, *rest = [measure(model, models[0], reference, cfg.directions, cfg.c2st_steps, device)
                   for model in models]
    names, blocks = grid_names(students).values(), []
    for name in names:
        few, *own = [row for row in rest if row["label"].split(" #")[0].endswith(name)]
        blocks.append([few, *own] + ([mean_row(own)] if len(own) > 1 and cfg.names is None
                                   else []))
    rows = [best, *(row for block in blocks for row in block),
            *(row for row in rest if is_further(row["label"]))]
    passed = gates(best, blocks[0][0], blocks[0][-1]) if "all" in best else []
    text = markdown(rows, passed, cfg, facts)
    write_text(out / "table.md", text)
    write_json(out / "table.json", {
        **facts, "config": dataclasses.asdict(cfg), "rows": rows, "gates": passed,
        "students": [{"file": str(path), **known} for path, known in students]})
    if cfg.pictures:
        write_pictures(cfg, out, models, [best, *blocks[0]], rows, captions, shown, text, facts)
    else:
        print(f"\n{text}\ntable.md and table.json are in {out}")


def write_pictures(cfg: Config, out: Path, models: list[Samples], first: list[dict],
                   rows: list[dict], captions: list[str], shown: dict[int, float], text: str,
                   facts: dict) -> None:
    """Table as a picture, videos side by side, sheet and page; first, the rows of the first set of
    key times and teacher@n's; rows, all; text, the table as Markdown."""
    draw_table(out / "table.png", rows, f"{cfg.count} held-out captions, the same noise for all")
    picked = [model for model in models if not is_further(model.label) and (
        cfg.names is not None or " #" not in model.label or model.label.endswith(" #1"))]
    labels = [model.label.removesuffix(" #1") for model in picked]
    quantiles = [f"{quantile:g}".lstrip("0") for quantile in shown.values()]
    errors = [endpoint_error(model.latents, models[0].latents) for model in picked[1:]]
    examples = [Example(f"{captions[i]} ({quantile} quantile)", [m.shown[i] for m in picked],
                        ["the target", *(f"error {float(error[i]):.3f}" for error in errors)])
                for i, quantile in zip(shown, quantiles, strict=True)]
    facts |= {"shown": f"captions at the {', '.join(quantiles)} quantile of {labels[1]}'s "
                       "endpoint error"}
    ladder = None if len(picked) <= 3 else write_ladder(out, examples, labels, facts["shown"],
                                                        cfg.fps)
    for example in examples:
        example.videos, example.notes = example.videos[:3], example.notes[:3]
    wall = video_wall([(e.caption, side_by_side(e.videos, labels[:3])) for e in examples])
    write_video(out / "videos.gif", wall, cfg.fps)
    write_video(out / "videos.mp4", wall, cfg.fps, LOOP_SECONDS)
    sheet = [(e.caption, list(zip(e.videos, e.notes, strict=True))) for e in examples]
    comparison_sheet(out / "videos.png", labels[:3], sheet,
                     f"{facts['shown']}: first, middle and last frame")
    write_page(out, examples, labels[:3], first, rows, ladder, text, cfg, facts)
    print(f"\n{text}\nlook at {out / 'report.html'} in a browser: the videos and these numbers\n"
          f"        {out / 'videos.mp4'} (or .gif), videos.png, table.png, table.md, table.json\n"
          f"next:   source .venv/bin/activate\n        {facts['next']}")
if __name__ == "__main__":
    cli(main)
