"""The paper's tables and figures on any teacher: runs, their means over seeds, verdicts.

A run is a command, `python distill.py` or `python baselines.py` with options, in a folder of its
own, <paper>/<arm>/seed<s>; `python evaluate.py` then measures all seeds of an arm together, on the
same held-out captions and noise. What is finished is not done again: done.json says by which
command a folder was made. A claim compares two arms over the seeds that both have.
"""

import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import distill
import evaluate
from common.config import field, load_config
from common.files import commit, lock_folder, parse_json
from common.prompts import read_prompts
from common.ranks import cli, device_name, pick_device
from common.weights import open_safetensors, safetensors_metadata
from evaluate import as_options, shared_overrides
from evaluation.measures import distances
from model import check_model, time_grid
from small_world import clips as world
from tools import baselines
from tools import tables
from tools.runs import (
    Job, Plan, clips_folder, command_job, evaluate_job, mean_error, run_jobs, script, train_job)


@dataclass
class Config(evaluate.Config):
    """Settings of a set of tables."""
    tables: str = field("all", "all, or of table3, table4, fig5, fig6, fig8, fig9, ladder, comma "
                        "between")
    m: int | None = field(None, "steps of table3, fig6, fig8 and fig9; none: the config's",
                                "[1, inf)")
    steps: list[int] = field([5, 3, 2, 1], "numbers of steps of the ladder", "[1, 10000]")
    seeds: int = field(5, "runs of each arm of a table", "[1, 1000]")
    baseline_seeds: int = field(3, "runs of each other method, on each set of data", "[1, inf)")
    jobs: int = field(1, "runs at once; then each process has one CPU thread", "[1, inf)")
    launch: str = field("python", "starts a run, as `torchrun --nproc-per-node 8`")
    options: str = field("", "options of every run, as `lr=1e-5 iterations=600`")
    synvid: str | None = field(None, "trajectories for the runs, made with --keep all; none: made "
                               "in <run>/paper/synvid")


# ------------------------------------------------------------------- the paper, table by table

def paper_settings(cfg: Config) -> tables.Settings:
    """What the tables' arms depend on; ValueError for what cannot be run."""
    times = time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    m_config = len(cfg.key) - 1
    for m in (cfg.m or m_config, *cfg.steps):
        if not 1 <= m <= cfg.n:
            raise ValueError(f"m, steps: got {m}; wanted 1 … {cfg.n}, the teacher's steps")
    run = load_config(distill.Config, "distill", [str(cfg.path), *shlex.split(cfg.options)])
    return tables.Settings(cfg.n, times, cfg.m or m_config, m_config, cfg.steps, cfg.seeds,
                           cfg.baseline_seeds, run.iterations, clips=cfg.preset == "tiny")
MEASURED_WITH = ("seed", "count", "batch", "directions", "c2st_steps", "prompts")


def main(argv: list[str] | None = None) -> None:
    """Run what the wanted tables and figures need, unless it is there; then write their page."""
    started, given = time.perf_counter(), sys.argv[1:] if argv is None else argv
    cfg = load_config(Config, "paper", argv, __doc__, "-m tools.paper")
    check_model(cfg)
    wanted = tables.TABLES if cfg.tables == "all" else tuple(cfg.tables.split(","))
    unknown = [name for name in wanted if name not in tables.TABLES]
    if unknown:
        raise ValueError(f"tables: got '{unknown[0]}'; wanted all, or of "
                         f"{', '.join(tables.TABLES)}")
    s, out = paper_settings(cfg), Path(cfg.run) / "paper"
    store = Path(cfg.synvid or out / "synvid")
    shared, measured = ([f"{name}={value}" for name, value in as_options(values).items()]
                        for values in (
                            shared_overrides(cfg) | {"run": None, "seed": None, "key": None},
                            {name: getattr(cfg, name) for name in MEASURED_WITH}))
    plan = Plan(os.path.relpath(cfg.path), out,
                (f"synvid={store}", *shared, *shlex.split(cfg.options)), (*shared, *measured),
                tuple(shlex.split(cfg.launch)), cfg.jobs, 1 if cfg.jobs > 1 else None)
    with lock_folder(out):
        if cfg.synvid is None and (wanted != ("fig5",) or cfg.prompts is None):
            together = plan.launch if cfg.jobs == 1 else (
                "torchrun", "--standalone", f"--nproc-per-node={cfg.jobs}")
            run_jobs([Job("SynVid", (*together, *script("synvid.py"), plan.config, f"run={out}",
                                     "keep=all", *shared), store, plan.config, "manifest.json")],
                     plan, "SynVid")
        runs = {(arm.name, seed): train_job(plan, arm, seed) for name in wanted
                for arm in tables.arms_of(name, s) for seed in range(arm.seeds)}
        run_jobs(runs.values(), plan, "runs")
        looks = {name: evaluate_job(plan, name, *what) for table in wanted
                 for name, what in tables.evaluations_of(table, s, plan).items()}
        first, *others = looks.values() or [None]
        run_jobs([first] if first else [], plan, "the teacher's samples, and the first evaluation")
        run_jobs(others, plan, "evaluations")
        if "fig6" in wanted:
            run_jobs([command_job(plan, "fig6", "features", "tools.taps",
                                  "taps/taps.json", *plan.options,
                                  tables.key_option(tables.even_key(s.n, s.m)))], plan, "fig6")
        sections = {name: paper_section(cfg, name, plan, s, store) for name in wanted}
        page = tables.write_report(plan, sections, {
            "command": shlex.join(["python", "-m", "tools.paper", *given]), "commit": commit(),
            "device": device_name(pick_device(cfg.device)), "torch": torch.__version__,
            "seconds": round(time.perf_counter() - started, 1)})
    print(f"look at {page}; numbers of every seed: {page.parent / 'paper.json'}")


def stored_prompt(path: Path) -> str:
    """The prompt of a trajectory's file. Raises ValueError if the file is damaged."""
    text = safetensors_metadata(path).get("synvid", "{}")
    return parse_json(text, str(path), {"trajectory": {"prompt": str}})["trajectory"]["prompt"]


def paper_section(cfg: Config, name: str, plan: Plan, s: tables.Settings,
                  store: Path) -> tables.Section:
    """One table or figure, from what was measured."""
    if name == "fig5":
        if cfg.prompts is not None and not (store / "manifest.json").exists():
            return tables.fig5(plan, [prompt.text for prompt in read_prompts(cfg.prompts)])
        return tables.fig5(plan, list(map(stored_prompt, sorted(store.glob("*/*.safetensors")))))
    if name == "fig6":
        return tables.fig6(plan)
    section = getattr(tables, name)(plan, s)
    if name == "table3" and s.clips:
        section.numbers["mismatch"] = mismatches(cfg, plan, store)
        section.lines += ["", *mismatch_lines(section.numbers["mismatch"])]
    return section
CLIPS_OF_TEACHER, CLIPS_ASKED = 2048, 256


def mismatches(cfg: Config, plan: Plan, store: Path) -> dict[str, tuple[float, float]]:
    """M of Eq. 4 for each set that a method learned from: mean and standard error over videos."""
    clips = clips_folder(plan)
    baselines.keep_clips(cfg, clips / "training.safetensors", world.RADIUS, 0, CLIPS_OF_TEACHER,
                         pick_device(cfg.device))
    known = open_safetensors(clips / "training.safetensors")["latents"].read()
    files = sorted(store.glob("*/*.safetensors"))[:CLIPS_ASKED]
    sets = {name: open_safetensors(clips / f"{name}.safetensors")["latents"].read()[:CLIPS_ASKED]
            for name in ("matched", "mismatched")}
    sets["samples"] = torch.stack([open_safetensors(file)["x"].read()[-1] for file in files])
    return {name: mean_error(distances(x, known).min(1).values) for name, x in sets.items()}


def mismatch_lines(found: dict[str, tuple[float, float]]) -> list[str]:
    """M as Markdown."""
    return ["M (Eq. 4, a video's root mean square distance to the nearest of "
            f"{CLIPS_OF_TEACHER} of the teacher's training clips, in latents; fresh clips of the "
            "same kind show what so few of them leave):", "",
            "| set | M |", "|---|---|",
            *(f"| {tables.DATA[name]} | {mean:.4f} ± {error:.4f} |"
              for name, (mean, error) in found.items())]


if __name__ == "__main__":
    cli(main)
