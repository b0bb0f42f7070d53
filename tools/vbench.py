"""VBench: a prompt file with every video it expects, and its scores in the form of Table 1.

    python -m tools.vbench --info all_dimension.txt [--prompts augmented.txt]
        [--flickering temporal_flickering.txt] [--seed 0] --out vbench.jsonl
    torchrun --nproc-per-node 8 sample.py CONFIG --prompt_file vbench.jsonl --out DIR
    vbench evaluate --videos_path DIR/student5 --output_path SCORES …
    python -m tools.vbench --scores SCORES

In:  VBench's files of prompts; then the …_eval_results.json that it wrote.
Out: vbench.jsonl, one line per video with prompt, seed and file name: 5 videos per prompt, 25 for
     flickering; then the table, as Markdown on the terminal.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from artifacts.videos import name_error, read_named_videos
from common.files import NUMBER, abbreviate, read_json, shape_error, write_json_lines
from common.prompts import read_prompts
from common.ranks import cli, seed_of

VIDEOS, FLICKERING_VIDEOS = 5, 25  # per prompt


def expected_videos(original: str | Path, augmented: str | Path | None = None,
                    flickering: str | Path | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Prompt, seed and file name of every video that VBench expects; a repeated prompt counts once.

    Args: original, its all_dimension.txt, whose prompts name the files; augmented, a file with as
    many prompts in the same order, from which the videos are sampled; flickering, its
    temporal_flickering.txt; seed: each video's seed depends on it, the prompt and a number.
    Raises as read_prompts does, and ValueError if the files do not fit together, or if a prompt
    cannot be a file name.
    """
    prompts = [prompt.text for prompt in read_prompts(original)]
    sources = prompts if augmented is None else [p.text for p in read_prompts(augmented)]
    if len(sources) != len(prompts):
        raise ValueError(f"{augmented}: expected {len(prompts)} prompts, one for each line of "
                         f"{original}, got {len(sources)}: give the file that was made from it")
    still = [] if flickering is None else [prompt.text for prompt in read_prompts(flickering)]
    source: dict[str, str] = {}
    for prompt, text in zip(prompts, sources, strict=True):
        source.setdefault(prompt, text)
    if unknown := [prompt for prompt in still if prompt not in source]:
        raise ValueError(f"{flickering}: expected prompts of {original} only, got "
                         f"{unknown[0]!r:.90}: take both files from the same VBench")
    counts = dict.fromkeys(source, VIDEOS) | dict.fromkeys(still, FLICKERING_VIDEOS)
    for prompt, count in counts.items():
        if error := name_error(f"{prompt}-{count - 1}.mp4"):
            raise ValueError(f"{original}: expected prompts that can be file names, got "
                             f"{prompt!r:.90} with {error}: VBench's own prompts fit; give longer "
                             "ones as augmented prompts (--prompts)")
    return [{"prompt": source[prompt], "seed": seed_of("vbench", seed, prompt, i),
             "file": f"{prompt}-{i}.mp4"} for prompt, count in counts.items() for i in range(count)]


# ------------------------------------------------------------------------------------ scores

class Dimension(NamedTuple):
    """VBench's constants of one dimension, and the score that the paper prints for it."""
    least: float
    most: float
    paper: float                                  # AccVideo, 544 × 960 × 93, percent (Table 1)
    weight: float = 1.0

    def normalise(self, score: float) -> float:
        """The score as VBench normalises it before it averages."""
        return (score - self.least) / (self.most - self.least)


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
PAPER_TOTALS = {"total": 83.26, "quality": 84.58, "semantic": 77.96}


def read_scores(folder: Path) -> dict[str, float]:
    """The score of each dimension found in a folder and the folders below it, from 0 to 1.

    Raises FileNotFoundError if there is no result file; ValueError naming a file that is not as
    VBench writes it, or that has an unknown dimension, or one that another file has too.
    """
    files = sorted(folder.rglob("*_eval_results.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: no …_eval_results.json there: give the folder that "
                                "`vbench evaluate` wrote, its --output_path")
    scores: dict[str, float] = {}
    for file in files:
        results = read_json(file, {str: list}, "evaluate again: VBench writes {dimension: [score, "
                            "…]}")
        for name, entry in results.items():
            if name not in DIMENSIONS or name in scores:
                raise ValueError(f"{file}: expected dimensions of VBench, each in one file only, "
                                 f"got {name:.80}: remove other files; keep one per dimension")
            score = entry[0] if entry else None
            if shape_error(score, NUMBER) or not 0 <= score <= 1:
                raise ValueError(f"{file}: {name}: expected [score, …] with a score from 0 to 1, "
                                 f"got {abbreviate(entry)}: evaluate this dimension again")
            scores[name] = float(score)
    return scores


def score_totals(scores: dict[str, float]) -> dict[str, float | None]:
    """Total, quality and semantic score from 0 to 1; None for one that lacks a dimension."""
    def mean(group: dict[str, Dimension]) -> float | None:
        if not group.keys() <= scores.keys():
            return None
        return (sum(d.normalise(scores[name]) * d.weight for name, d in group.items())
                / sum(d.weight for d in group.values()))

    quality, semantic = mean(QUALITY), mean(SEMANTIC)
    total = None if quality is None or semantic is None else (4 * quality + semantic) / 5
    return {"total": total, "quality": quality, "semantic": semantic}


def vbench_table(scores: dict[str, float]) -> str:
    """Table 1's columns as rows of Markdown, in percent."""
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.2f}"

    lines = ["| VBench, % | score | normalised | AccVideo 544p (Table 1) |", "|---|---|---|---|"]
    for name, value in score_totals(scores).items():
        lines.append(f"| **{name} score** | **{percent(value)}** | | {PAPER_TOTALS[name]:.2f} |")
    for name, dimension in DIMENSIONS.items():
        score = scores.get(name)
        normalised = None if score is None else dimension.normalise(score)
        lines.append(f"| {name.replace('_', ' ')} | {percent(score)} | {percent(normalised)} | "
                     f"{dimension.paper:.2f} |")
    if missing := [name for name in DIMENSIONS if name not in scores]:
        lines += ["", f"Missing, so that there is no total: {', '.join(missing)}."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Write the prompt file, or print the scores."""
    parser = argparse.ArgumentParser("python -m tools.vbench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--info", type=Path, help="VBench's all_dimension.txt or full_info.json")
    parser.add_argument("--prompts", type=Path, help="augmented prompts, line by line; the names "
                        "stay those of --info")
    parser.add_argument("--flickering", type=Path, help="VBench's temporal_flickering.txt")
    parser.add_argument("--seed", type=int, default=0, help="base seed of all videos")
    parser.add_argument("--out", type=Path, help="the prompt file to write, a .jsonl")
    parser.add_argument("--scores", type=Path, help="folder of VBench's results to print")
    args = parser.parse_args(argv)
    if args.scores is not None:
        return print(vbench_table(read_scores(args.scores)))
    if args.info is None or args.out is None or args.out.suffix != ".jsonl":
        parser.error("give --info FILE and --out FILE.jsonl, or --scores DIR")
    videos = expected_videos(args.info, args.prompts, args.flickering, args.seed)
    if args.out.exists() and not read_named_videos(args.out):
        raise ValueError(f"{args.out}: exists, and is not a file of VBench's prompts: choose "
                         "another name by --out")
    write_json_lines(args.out, videos)
    print(f"{args.out} has {len(videos)} videos; make them by `python sample.py CONFIG "
          f"--prompt_file {args.out} --out DIR`")


if __name__ == "__main__":
    cli(main)
