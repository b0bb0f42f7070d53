"""Stage 4: measure what few steps lose and what distillation restores, as one table.

    python evaluate.py [CONFIG] [--students a.safetensors,b.safetensors] [--count 96]
    torchrun --nproc-per-node 8 evaluate.py CONFIG [field=value]   # ranks share the videos

In:   the weight folder, one or more students (each may be a LoRA), held-out captions.
Out:  <run>/evaluate/: report.html, one page with everything; table.md, table.json, table.png;
      videos.mp4, .gif, .png with a row for teacher@n and each teacher@m and student@m;
      teacher.safetensors, the teacher's latents, which the next evaluation reads instead of
      sampling them again.
Cost: 2 · `count` trajectories of the teacher (target and reference), and decoding all videos.
"""

import common  # noqa: F401 (before torch, see common)
import itertools
import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from artifacts.student import exported_path, facts_in, load_student, student_facts
from common.config import Shared, announce, field, load_config
from common.files import crc32_of_json
from common.names import fingerprint_files
from common.prompts import Prompt, fingerprints, heldout_prompts, read_prompts
from common.ranks import (
    Ranks, Timer, cli, draw_noise, gather_values, on_first_rank, progress_bar,
    setup_distributed)
from common.video import check_ffmpeg
from common.weights import open_safetensors, save_tensors
from evaluation import measures, page
from frozen.load import encode_prompts, load_vae
from frozen.unipc import sample_batch, unipc_grid
from model import check_model, latent_shape, load_dit, time_grid


# -------------------------------------------------- what is compared with what, from which noise

def sample_all(cfg: "Config", indices: range, prompts: list[Prompt], groups: list[tuple],
               identity: dict, ranks: Ranks) -> tuple[list[measures.Samples], measures.Samples]:
    """Sample every model from the same noise on the same captions; this rank's videos only.

    Args: groups, of students as read_students returns them. Returns the models in the order of the
    table and the reference, teacher@n from other noise.
    """
    prompts, device = [prompts[i] for i in indices], ranks.device
    sizes = [(cfg.height, cfg.width)] * len(prompts)
    conds, unconds = encode_prompts(cfg, prompts, sizes, True, device, Timer(device))
    shape = latent_shape(cfg.frames, cfg.height, cfg.width)
    noise, other_noise = (draw_noise(shape, [(name, cfg.seed, i, prompt.text)
                                             for i, prompt in zip(indices, prompts, strict=True)])
                          for name in ("evaluate", "evaluate, reference"))
    dit = load_dit(cfg.weights, cfg.preset, ranks.dtype, device)
    dit.requires_grad_(False)
    sample = partial(sample_model, cfg, noise=noise, conds=conds, unconds=unconds, device=device)

    # The target takes all n steps. The reference, from other noise, is what distributions are
    # compared with.
    teacher_n, reference = sample_teacher(cfg, indices, dit, [noise, other_noise], conds, unconds,
                                          identity, ranks)
    # The same teacher along each student's key timesteps t'_m … t'_0, with its own guidance.
    teachers_m = [sample(f"teacher{suffix}", "teacher_m", dit, students[0]["t_key"])
                  for suffix, students in groups]
    # The same teacher with other numbers of steps: what a better solver gains without training.
    others = []
    for n in cfg.teacher_steps or ():
        solvers = {"euler": time_grid(cfg.family, n, cfg.shift)}
        if cfg.family == "wan":
            solvers["unipc"] = unipc_grid(n, cfg.shift)
        others += [sample(f"teacher@{n} by {solver}", "teacher_steps", dit, grid.tolist(),
                          solver=solver) for solver, grid in solvers.items()]
    del dit  # a student takes its place
    # Each student along its key timesteps, without guidance: it learned the guided trajectories.
    models = [teacher_n]
    for teacher_m, (_, students) in zip(teachers_m, groups, strict=True):
        models.append(teacher_m)
        for facts in students:
            student = load_student(cfg, Path(facts["file"]), device)
            models.append(sample(facts["label"], "student", student, facts["t_key"], unconds=None))
            del student  # before the next one is loaded
    return [*models, *others], reference


# ------------------------------------------------------------------------------------- settings

@dataclass
class Config(Shared):
    """Settings of an evaluation."""
    prompts: str | None = field(None, "held-out captions (.jsonl with images for I2V); defaults to "
                                "<weights>/prompts_heldout.txt or .jsonl")
    students: str | None = field(None, "files, separated by commas; defaults to "
                                 "<run>/student.safetensors")
    names: str | None = field(None, "names of the students, separated by commas; with names the "
                              "pictures show every student and the mean row is left out")
    teacher_steps: list[int] | None = field(None, "further rows: the teacher with these numbers of "
                                            "steps, by Euler and, for Wan, by UniPC", "[1, 10000]")
    count: int = field(96, "videos of each model, and of the independent teacher samples",
                       "[3, 100000]")
    batch: int = field(32, "videos denoised at once", "[1, 10000]")
    directions: int = field(128, "random directions of sliced W", "[1, 1000000]")
    c2st_steps: int = field(100, "training iterations of the classifier of C2ST", "[1, inf)")
    pictures: bool = field(True, "also write videos, pictures and the page")
    teacher_samples: str | None = field(None, "file that keeps teacher@n's latents; defaults to "
                                        "<run>/evaluate/teacher.safetensors")


# What teacher@n's latents depend on besides weights, prompts and device.
SAMPLE_SETTINGS = ("family", "preset", "height", "width", "frames", "n", "shift",
                   "embedded_guidance", "negative_prompt", "seed", "count", "attention")


# ------------------------------------------------------------------------------------- students

def read_students(cfg: Config) -> list[tuple[str, list[dict]]]:
    """The students in groups of the same key timesteps: the facts in each one's file, with "file",
    "name" and "label".

    Returns (suffix, students) by group; the suffix ends the group's labels: "@5", or "@5 at 1, 0.9,
    …" where two groups have the same number of steps. Raises ValueError for a student of another
    teacher or another grid than the config's.
    """
    files = (cfg.students or str(exported_path(cfg))).split(",")
    students = [{"file": file, **student_facts(Path(file), cfg, cfg.students is not None,
                                               same_teacher=True)}
                for file in map(str.strip, files)]
    names = [None] * len(students) if cfg.names is None else cfg.names.split(",")
    if len(names) != len(students):
        raise ValueError(f"names: expected {len(students)}, one for each student, got "
                         f"{len(names)}: correct --names")
    for student, name in zip(students, names, strict=True):
        student["name"] = name
        for key in ("n", "shift", "cfg_scale", "cfg_scale_low", "negative_prompt"):
            if student.get(key, value := getattr(cfg, key)) != value:
                raise ValueError(f"{student['file']}: {key}: expected the config's {value!r}, got "
                                 f"{student[key]!r}: evaluate it with the config that it was "
                                 "distilled with")
    by_times: dict[tuple[float, ...], list[dict]] = {}
    for student in students:
        by_times.setdefault(tuple(student["t_key"]), []).append(student)
    lengths, groups = [len(t_key) for t_key in by_times], []
    for t_key, group in by_times.items():
        times = f" at {', '.join(f'{t:.2g}' for t in t_key)}"
        suffix = f"@{len(t_key) - 1}{times if lengths.count(len(t_key)) > 1 else ''}"
        for number, student in enumerate(group, 1):
            numbered = f" #{number}" if len(group) > 1 and student["name"] is None else ""
            student["label"] = f"{student['name'] or 'student'}{suffix}{numbered}"
        groups.append((suffix, group))
    return groups


# ------------------------------------------------------------------------------------- sampling

def sample_model(cfg: Config, label: str, kind: str, dit: nn.Module, times: list[float],
                 noise: Tensor, conds: list[dict], unconds: list[dict] | None,
                 device: torch.device, solver: str = "euler",
                 keep: Path | None = None) -> measures.Samples:
    """Denoise noise [N,C,T,H,W] in batches along `times`; unconds None means no guidance.

    keep: a folder for finished batches, which are read from there instead of sampled again.
    Raises ValueError if the latents are not finite.
    """
    timer, latents, seconds, steps = Timer(device), [], 0.0, len(times) - 1
    bar = progress_bar(len(noise) * steps, label, dist.get_rank(), unit="step")
    for start in range(0, len(noise), cfg.batch):
        b = slice(start, start + cfg.batch)
        # A batch is identified by a part of its noise, whatever the number of ranks.
        file = keep and keep / f"{crc32_of_json(noise[b, :, 0, 0, 0].tolist())}.safetensors"
        if file and file.exists():
            latents.append(open_safetensors(file)["x"].read())
            seconds += facts_in(file)["seconds"]
            bar.update(len(latents[-1]) * steps)
            continue
        timer.lap("other")
        latents.append(sample_batch(dit, noise[b], times, conds[b], unconds and unconds[b],
                                    cfg.guidance, timer, bar, solver).cpu())
        _, *laps = timer.laps()
        seconds += sum(laps)
        if file:
            save_tensors(file, {"x": latents[-1]}, {"accvideo": json.dumps({"seconds": sum(laps)})})
    bar.close()
    latents, evaluations = torch.cat(latents), steps * (1 if unconds is None else 2)
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(f"{label}: the latents contain NaN or infinity: check the weights' file; "
                         "if it is a student's, distill it again with a lower lr")
    return measures.Samples(label, kind, steps, latents, evaluations, seconds / len(noise))


def teacher_file(cfg: Config) -> tuple[Path, dict]:
    """The path of the file that keeps teacher@n's latents, and its metadata ({"about": None} if
    there is no file yet). Raises ValueError if another kind of file is at the path."""
    path = Path(cfg.teacher_samples or Path(cfg.run) / "evaluate/teacher.safetensors")
    facts = facts_in(path) if path.exists() else {"about": None}
    if "about" not in facts:
        raise ValueError(f"{path}: expected latents of teacher@{cfg.n}, or no such file, got "
                         "weights: choose another --teacher_samples; it is not replaced")
    return path, facts


def sample_teacher(cfg: Config, indices: range, dit: nn.Module, noises: list[Tensor],
                   conds: list[dict], unconds: list[dict] | None, identity: dict,
                   ranks: Ranks) -> list[measures.Samples]:
    """teacher@n from each of two noises [N,C,T,H,W], this rank's videos only.

    All ranks' latents are stored in one file, which a later evaluation reads if it has the same
    settings and the same `identity` of weights and prompts. Until it is written each batch has a
    file of its own, so that an interrupted evaluation continues.
    """
    path, stored = on_first_rank(lambda: teacher_file(cfg))
    labels = [f"teacher@{cfg.n}", f"teacher@{cfg.n}, other noise"]
    made_from = {**identity, "labels": labels, "batch": cfg.batch, "device": ranks.device.type,
                 "cfg_scale": cfg.guidance,
                 **{name: getattr(cfg, name) for name in SAMPLE_SETTINGS}}

    if stored["about"] == json.loads(json.dumps(made_from)):
        evaluations, file = cfg.n * (1 if unconds is None else 2), open_safetensors(path)
        return [measures.Samples(label, "teacher_n", cfg.n,
                                 file[label].read(slice(indices.start, indices.stop)),
                                 evaluations, seconds)
                for label, seconds in zip(labels, stored["seconds"], strict=True)]
    grid = time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    keep = path.with_name(f".{path.stem}_{crc32_of_json(made_from)}")
    samples = [sample_model(cfg, label, "teacher_n", dit, grid, noise, conds, unconds,
                            ranks.device, keep=keep)
               for label, noise in zip(labels, noises, strict=True)]
    gathered = [gather(part) for part in samples]
    if ranks.rank == 0:
        facts = {"about": made_from, "seconds": [part.seconds for part in gathered]}
        save_tensors(path, {part.label: part.latents for part in gathered},
                     {"accvideo": json.dumps(facts)})
        shutil.rmtree(keep, ignore_errors=True)
    return samples


def gather(samples: measures.Samples) -> measures.Samples:
    """All ranks' samples, in the order of the videos."""
    parts = gather_values(samples)
    count = sum(len(part.latents) for part in parts)
    means = {name: sum(getattr(part, name) * len(part.latents) for part in parts) / count
             for name in ("seconds", "decode_seconds")}
    return replace(
        samples, latents=torch.cat([part.latents for part in parts]),
        values={name: torch.cat([part.values[name] for part in parts]) for name in samples.values},
        examples={i: video for part in parts for i, video in part.examples.items()}, **means)


# ------------------------------------------------------------------------------------- measuring

def measured_here(ranks: Ranks, count: int) -> range:
    """The models, by index out of `count`, whose videos this rank measures as a set. The first rank
    has the fewest, since it draws the pictures."""
    return range(ranks.world - 1 - ranks.rank, count, ranks.world)


def table_rows(cfg: Config, models: list[measures.Samples], reference: Tensor,
               ranks: Ranks) -> list[dict]:
    """The table: a row for each model, and after several unnamed students the row of their mean."""
    parts = gather_values({i: measures.table_row(models[i], models[0], reference, cfg.directions,
                                                 cfg.c2st_steps, ranks.device)
                           for i in measured_here(ranks, len(models))})
    measured, rows = {i: row for part in parts for i, row in part.items()}, []
    ordered = (measured[i] for i in range(len(models)))
    for kind, group in itertools.groupby(ordered, key=lambda row: row["kind"]):
        block = list(group)
        rows += block
        if kind == "student" and len(block) > 1 and cfg.names is None:
            rows.append(measures.mean_row(block))
    return rows


# ------------------------------------------------------------------------------------------ main

def main(argv: list[str] | None = None) -> None:
    """Sample all models, decode and measure their videos, write the report."""
    started, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    cfg = load_config(Config, "evaluate", argv, f"{__doc__}\n{measures.__doc__}")
    takes_image = check_model(cfg).takes_image
    groups = read_students(cfg)
    students = [student for _, group in groups for student in group]
    teacher_file(cfg)  # raises its error before anything is loaded
    held_out = read_prompts(cfg.prompts or heldout_prompts(cfg.weights, takes_image), takes_image)
    stride = max(1, len(held_out) // cfg.count)  # few videos: captions from the complete list
    prompts = [held_out[i * stride % len(held_out)] for i in range(cfg.count)]
    if cfg.pictures:
        check_ffmpeg()
    identity = fingerprints(cfg.weights, prompts)
    ranks = setup_distributed(
        cfg, **identity, students=[fingerprint_files(student["file"]) for student in students])
    if cfg.count < ranks.world:
        error = (f"count: expected at least one video for each of {ranks.world} ranks, got "
                 f"{cfg.count}: start fewer ranks or raise --count")
        raise ValueError(error if ranks.rank == 0 else "")  # all ranks have it: one prints it
    first, stop = (cfg.count * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1))
    indices, device = range(first, stop), ranks.device  # of this rank's videos
    out = announce(cfg, "evaluate", ranks.rank)

    models, reference = sample_all(cfg, indices, prompts, groups, identity, ranks)

    captions = [prompt.text for prompt in prompts]
    errors = gather_values(measures.endpoint_error(models[1].latents, models[0].latents))
    examples = page.choose_examples(torch.cat(errors), captions)
    vae = load_vae(cfg.weights, device, ranks.dtype, cfg.family)
    images = measures.first_frames(prompts[first:stop], cfg)
    oracle = measures.is_small_world(captions, cfg)
    measures.measure_videos(models, vae, indices, captions[first:stop], images, oracle, examples,
                            device)

    # All latents are gathered; ranks other than the first keep those that table_rows needs there.
    needed = {0, len(models), *measured_here(ranks, len(models))}
    *models, reference = [samples if ranks.rank == 0 or i in needed else None
                          for i, samples in enumerate(map(gather, (*models, reference)))]
    rows = table_rows(cfg, models, reference.latents, ranks)
    if ranks.rank == 0:
        launch = ["torchrun", f"--nproc-per-node={ranks.world}"] if ranks.world > 1 else ["python"]
        page.write_report(cfg, out, models, rows, captions, examples, students, {
            "command": shlex.join([*launch, "evaluate.py", *argv]), **page.environment(device),
            "seconds": round(time.perf_counter() - started, 1)})
    dist.barrier()


if __name__ == "__main__":
    cli(main)
