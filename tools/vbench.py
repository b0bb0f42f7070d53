"""VBench: the videos it asks for, and its scores as Table 1."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from common.files import read_json, abbreviate, write_json, write_text
from common.prompts import read_prompts
from common.ranks import seed_of

VIDEOS, FLICKERING_VIDEOS = 5, 25  # a prompt
PART = re.compile(r"\..*\.\d+-[0-9a-f]+\.part\.mp4", re.DOTALL)  # as files.replace_file names it
NAME_BYTES = 255 - len(".." + "4194304-01234567" + ".part.mp4")  # what that leaves of a name


class Video(NamedTuple):
    """One video that VBench wants."""
    file: str
    prompt: str                                   # VBench's own
    made_from: str                                # the augmented one, or the same
    i: int
    seed: int


def wanted_videos(original: str | Path, augmented: str | Path | None,
                  flickering: str | Path | None, seed: int) -> list[Video]:
    """All videos that VBench wants for its prompts, those of a repeated prompt once.

    Args: original, its all_dimension.txt; augmented, a file of as many prompts in the same order,
    to sample from; flickering, its temporal_flickering.txt; seed, of which with prompt and i a
    video's own is a function: sample.py makes the same video of `made_from` and that seed.
    Raises as read_prompts does, and ValueError if the files do not fit together, or if a prompt
    cannot be a file name.
    """
    prompts = [prompt.text for prompt in read_prompts(original)]
    sources = prompts if augmented is None else [p.text for p in read_prompts(augmented)]
    if len(sources) != len(prompts):
        raise ValueError(f"{augmented}: got {len(sources)} prompts; wanted {len(prompts)}, one for "
                         f"each of {original}, line by line")
    still = [] if flickering is None else [prompt.text for prompt in read_prompts(flickering)]
    if absent := set(still) - set(prompts):
        absent = next(prompt for prompt in still if prompt in absent)
        raise ValueError(f"{flickering}: got the prompt {absent!r:.90}; wanted prompts of "
                         f"{original} only: take both files from the same VBench")
    made_from: dict[str, str] = {}
    for prompt, source in zip(prompts, sources, strict=True):
        made_from.setdefault(prompt, source)
    counts = dict.fromkeys(made_from, VIDEOS) | dict.fromkeys(still, FLICKERING_VIDEOS)
    for prompt, count in counts.items():
        size = len(f"{prompt}-{count - 1}.mp4".encode())
        if "/" in prompt or size > NAME_BYTES:
            got = "a slash in it" if "/" in prompt else f"{size} bytes as a file name"
            raise ValueError(f"{original}: the prompt {prompt!r:.90} cannot be a file name: got "
                             f"{got}; wanted none and at most {NAME_BYTES}: VBench's own prompts "
                             "fit; give longer ones with --vbench_prompts")
    return [Video(f"{prompt}-{i}.mp4", prompt, made_from[prompt], i,
                  seed_of("vbench", seed, prompt, i))
            for prompt, count in counts.items() for i in range(count)]


def record_folder(folder: Path) -> Path:
    """Where the record of a folder of videos lies, and all else that must not lie in it."""
    return folder.absolute().with_name(f"{folder.absolute().name}.record")


def open_record(folder: Path, videos: list[Video], about: dict[str, Any]) -> list[int]:
    """Begin or go on: write the record of what the folder's videos are, say which are to be made.

    Args: about, what they share: JSON values. Files cut off by a crash are removed.
    Returns indices of videos. Raises ValueError if the folder has files that its record does not
    know, or videos made with another `about`, seed or prompt.
    """
    path, wanted = record_folder(folder) / "videos.json", {v.file: v._asdict() for v in videos}
    about = json.loads(json.dumps(about))
    shape = {"about": dict, "videos": [{"file": str, "made_from": str}]}
    known = read_json(path, shape) if path.exists() else {"about": about, "videos": []}
    there = {file.name for file in folder.iterdir()} if folder.exists() else set()
    before = {v["file"]: v for v in known["videos"] if v["file"] in there}
    for name in sorted(there - before.keys()):
        if not PART.fullmatch(name):
            raise ValueError(f"{folder}: got {name:.90}, which {path} does not know; wanted only "
                             "the videos made for VBench: move it, or choose another --out")
        (folder / name).unlink()
    for key in about if before else ():
        if known["about"].get(key) != about[key]:
            raise ValueError(f"{folder}: has {len(before)} videos of {key} "
                             f"{known['about'].get(key)!r:.200}; got {about[key]!r:.200}: go on "
                             "with the settings they were made with, or choose another --out")
    for name in wanted:
        if name in before and wanted[name] != before[name]:
            raise ValueError(f"{folder / name}: was made from {before[name]['made_from']!r:.200}; "
                             f"got {wanted[name]['made_from']!r:.200}: give the same files, or "
                             "choose another --out")
    write_json(path, {"about": about, "videos": list((before | wanted).values())})
    return [i for i, video in enumerate(videos) if video.file not in before]


class Dimension(NamedTuple):
    """VBench's constants of one dimension, and the scores that the paper prints for it."""
    least: float
    most: float
    paper: float                                  # AccVideo, 544 × 960 × 93, percent (Table 1)
    weight: float = 1.0
QUALITY = {
    "subject_consistency": Dimension(0.1462, 1, 94.46),
    "background_consistency": Dimension(0.2615, 1, 97.45),
    "temporal_flickering": Dimension(0.6293, 1, 99.18),
    "motion_smoothness": Dimension(0.706, 0.9975, 98.79),
    "dynamic_degree": Dimension(0, 1, 75.00, 0.5),
    "aesthetic_quality": Dimension(0, 1, 62.08),
    "imaging_quality": Dimension(0, 1, 65.64)}
SEMANTIC = {
    "object_class": Dimension(0, 1, 92.99),
    "multiple_objects": Dimension(0, 1, 67.33),
    "human_action": Dimension(0, 1, 95.60),
    "color": Dimension(0, 1, 94.11),
    "spatial_relationship": Dimension(0, 1, 75.70),
    "scene": Dimension(0, 0.8222, 54.72),
    "appearance_style": Dimension(0.0009, 0.2855, 19.87),
    "temporal_style": Dimension(0, 0.364, 23.71),
    "overall_consistency": Dimension(0, 0.364, 27.21)}
DIMENSIONS = QUALITY | SEMANTIC
TOTALS = {"total": 83.26, "quality": 84.58, "semantic": 77.96}  # of the paper, as above


def read_scores(folder: Path) -> tuple[dict[str, float], list[Path]]:
    """The score of each dimension found in a folder and those below it, from 0 to 1; the files.

    Raises FileNotFoundError if there is no result file, ValueError naming one that is not as
    VBench writes it, has an unknown dimension, or one that another file has too.
    """
    files = sorted(folder.rglob("*_eval_results.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: no …_eval_results.json there: give the folder that "
                                "`vbench evaluate` wrote, its --output_path")
    scores: dict[str, float] = {}
    source: dict[str, Path] = {}
    for file in files:
        results = read_json(file, remedy="wanted {dimension: [score, …]}, as VBench "
                            "writes it")
        for name, entry in results.items():
            score = entry[0] if isinstance(entry, list) and entry else None
            if name not in DIMENSIONS:
                raise ValueError(f"{file}: got the dimension {name:.80}; wanted one of "
                                 f"{', '.join(DIMENSIONS)}")
            if name in source:
                raise ValueError(f"{name}: got it in {source[name]} and in {file}; wanted it once: "
                                 "move the file that is not meant")
            if isinstance(score, bool) or not isinstance(score, int | float) or not (
                    math.isfinite(score) and 0 <= score <= 1):
                raise ValueError(f"{file}: {name}: got {abbreviate(entry)}; wanted [score, …] "
                                 "with a score from 0 to 1: evaluate this dimension again")
            scores[name], source[name] = float(score), file
    return scores, files


def normalised(scores: dict[str, float]) -> dict[str, float]:
    """Scores as VBench adds them up."""
    return {name: (score - DIMENSIONS[name].least) / (DIMENSIONS[name].most
                                                      - DIMENSIONS[name].least)
            for name, score in scores.items()}


def totals(scores: dict[str, float]) -> dict[str, float | None]:
    """Total, quality and semantic score from 0 to 1; None for one that lacks a dimension."""
    known = normalised(scores)

    def mean(group: dict[str, Dimension]) -> float | None:
        if not group.keys() <= known.keys():
            return None
        return (sum(known[name] * dimension.weight for name, dimension in group.items())
                / sum(dimension.weight for dimension in group.values()))

    quality, semantic = mean(QUALITY), mean(SEMANTIC)
    total = None if quality is None or semantic is None else (4 * quality + semantic) / 5
    return {"total": total, "quality": quality, "semantic": semantic}


def vbench_table(scores: dict[str, float]) -> str:
    """Table 1's columns as rows of Markdown, in percent."""
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.2f}"

    known = normalised(scores)
    lines = ["| VBench, % | score | normalised | AccVideo 544p (Table 1) |", "|---|---|---|---|"]
    for name, value in totals(scores).items():
        lines.append(f"| **{name} score** | **{percent(value)}** | | {TOTALS[name]:.2f} |")
    for name, dimension in DIMENSIONS.items():
        lines.append(f"| {name.replace('_', ' ')} | {percent(scores.get(name))} | "
                     f"{percent(known.get(name))} | {dimension.paper:.2f} |")
    if missing := [name for name in DIMENSIONS if name not in scores]:
        lines += ["", f"Missing, so that there is no total: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def report_vbench(folder: Path, out: Path) -> None:
    """Print Table 1's columns for VBench's results in `folder`; write vbench.md and vbench.json."""
    scores, files = read_scores(folder)
    known, text = normalised(scores), vbench_table(scores)
    write_text(out / "vbench.md", text)
    results: dict[str, Any] = {**totals(scores), "dimensions": {
        name: {"score": scores[name], "normalised": known[name]} for name in scores}}
    results["missing"] = [name for name in DIMENSIONS if name not in scores]
    write_json(out / "vbench.json", {**results, "files": [str(file) for file in files]})
    print(f"{text}\nvbench.md and vbench.json are in {out}")
