"""Table 1 from VBench's result files: its 16 dimensions, quality, semantic and total score.

VBench writes <name>_eval_results.json, {dimension: [score, results of each video]}, one dimension
or several a file. Score s of a dimension is normalised as (s - least) / (most - least). Quality and
semantic score are weighted means over their dimensions, total = (4 quality + semantic) / 5.
Which videos it wants: common/vbench.py. Source: VBench's scripts/constant.py and
scripts/cal_final_score.py (Huang et al. 2024), whose missing dimensions count as 0: here they give
no total.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from common.files import read_json, shown, write_json, write_text


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
                raise ValueError(f"{file}: {name}: got {shown(entry)}; wanted [score, …] "
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
