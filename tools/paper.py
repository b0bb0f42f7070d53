"""The paper's tables and figures for any teacher: runs over seeds, means, verdicts on claims.

    python -m tools.paper [CONFIG] [--tables table3,fig9] [--seeds 8] [--jobs 2]
    python -m tools.paper CONFIG --launch "torchrun --nproc-per-node 8"

In:  the weight folder and the prompts of stages 1 and 4.
Out: <run>/paper/: report.html, and paper.json with the numbers of every seed;
     <arm>/seed<s>/, a training run; <arm>/evaluate/, all seeds of an arm on the same captions
     and noise. The same command resumes: finished runs are skipped.
"""

import os
import shlex
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import distill
import evaluate
import synvid
from common.config import Shared, as_options, field, load_config
from common.files import lock_folder, parse_json
from common.prompts import read_prompts
from common.ranks import cli, pick_device
from common.weights import open_safetensors, safetensors_metadata
from evaluation.measures import distances
from evaluation.statistics import mean_and_error
from evaluation.page import environment, markdown_table, plus_minus
from model import check_model, sizes_of, time_grid
from small_world.clips import SIZE
from tools import tables
from tools.baselines import keep_clips
from tools.runs import Plan, Run, run_all


@dataclass
class Config(Shared):
    """Settings of a set of tables."""
    tables: str = field("all", "all, or some of ladder, table3, table4, methods, fig5, fig6, fig8, "
                        "fig9, separated by commas; or search, which compares settings")
    m: int | None = field(None, "steps of all tables but table4 and the ladder; defaults to the "
                          "number that the config's key has", "[1, inf)")
    steps: list[int] = field([5, 3, 2, 1], "numbers of steps of the ladder", "[1, 10000]")
    seeds: int = field(8, "runs of each arm of table3", "[1, 1000]")
    other_seeds: int = field(5, "runs of each arm of table4, fig9 and methods; at most seeds",
                             "[1, inf)")
    traj_lr: float | None = field(None, "learning rate that suits L_traj alone, for the controls "
                                  "of table3; defaults to lr", "(0, inf)")
    shared_lambda: float | None = field(None, "lambda_adv with which one shared head's weighted "
                                        "gradient is as large as that of separate heads; defaults "
                                        "to lambda_adv", "[0, inf)")
    perflow: list[float] | None = field(None, "learning rate and iterations of PeRFlow; defaults "
                                        "to lr and iterations", "(0, inf)")
    pcm: list[float] | None = field(None, "the same for phased consistency", "(0, inf)")
    dmd: list[float] | None = field(None, "the same for distribution matching", "(0, inf)")
    jobs: int = field(1, "runs at once; if several, each process has one CPU thread", "[1, inf)")
    synvid: str | None = field(None, "trajectories for the runs, made with --keep all; by default "
                               "they are made in <run>/paper/synvid")
    launch: str = field("python", "command that starts each run, such as `torchrun "
                        "--nproc-per-node 8`; only on the command line")
    options: str = field("", "options of every training run, such as `lr=1e-5 iterations=600`; "
                         "only on the command line")
    prompts: str | None = field(None, "held-out captions, as in evaluate.py; default: the config's;"
                                " with --tables fig5 alone, the prompts of the figure")
    count: int | None = field(None, "videos per model, as in evaluate.py; default: the config's")


# Settings that the command of each evaluation contains, whether they were given or not.
EVALUATION = ("seed", "prompts", "count", "batch", "directions", "c2st_steps")


def read_settings(cfg: Config) -> tuple[list[str], evaluate.Config, tables.Settings]:
    """The shared settings of the command line, as options of every run; the settings of an
    evaluation; and what the arms depend on. Raises ValueError for what cannot be run."""
    for name in ("launch", "options"):
        if name not in cfg.given and getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"{cfg.path}: paper.{name}: expected on the command line only, since "
                             f"a config file must not start programs: pass --{name} instead")
    shared = as_options({f.name: getattr(cfg, f.name) for f in fields(Shared)
                         if f.name in cfg.given and f.name not in ("run", "seed", "key")})
    evaluation = load_config(evaluate.Config, "evaluate", [str(cfg.path), *shared, *as_options(
        {"seed": cfg.seed, "prompts": cfg.prompts, "count": cfg.count})])
    m_config = len(cfg.key) - 1
    for m in (cfg.m or m_config, *cfg.steps):
        if not 1 <= m <= cfg.n:
            raise ValueError(f"m, steps: expected 1 … {cfg.n}, the teacher's steps, got {m}: "
                             "correct --m or --steps")
    if "key" in cfg.given and cfg.key != (even := tables.even_key(cfg.n, m_config)):
        raise ValueError(f"key: expected {even}, as the tables space key timesteps evenly, got "
                         f"{cfg.key}: leave --key out, and give the number of steps by --m")
    training = load_config(distill.Config, "distill", [str(cfg.path), *shlex.split(cfg.options)])
    methods = {name: getattr(cfg, name) or [training.lr, training.iterations]
               for name in tables.METHODS}
    for name, values in methods.items():
        if len(values) != 2 or values[1] != int(values[1]):
            raise ValueError(f"{name}: expected a learning rate and a number of iterations, got "
                             f"{values}: correct --{name}")
    shared_lambda = training.lambda_adv if cfg.shared_lambda is None else cfg.shared_lambda
    return shared, evaluation, tables.Settings(
        n=cfg.n, times=time_grid(cfg.family, cfg.n, cfg.shift).tolist(), m=cfg.m or m_config,
        m_config=m_config, ladder=cfg.steps, seeds=range(cfg.seeds),
        other_seeds=range(min(cfg.other_seeds, cfg.seeds)), iterations=training.iterations,
        lr=training.lr, lambda_adv=training.lambda_adv, clips=cfg.preset == "tiny",
        traj_lr=cfg.traj_lr or training.lr, shared_lambda=shared_lambda, methods=methods)


def main(argv: list[str] | None = None) -> None:
    """Run what the chosen tables and figures need and what is not done yet; write their page."""
    started, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    cfg = load_config(Config, "paper", argv, __doc__, "-m tools.paper")
    check_model(cfg)
    chosen = tables.TABLES if cfg.tables == "all" else tuple(cfg.tables.split(","))
    known = (*tables.TABLES, "search")
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"tables: expected all, or some of {', '.join(known)}, got "
                         f"'{unknown[0]}': correct --tables")
    shared, evaluation, s = read_settings(cfg)
    out = Path(cfg.run) / "paper"
    trajectories = Path(cfg.synvid or out / "synvid")
    measured = {name: getattr(evaluation, name) for name in EVALUATION}
    training_prompts = load_config(synvid.Config, "synvid", [str(cfg.path), *shared]).prompts
    others = measured | {"prompts": training_prompts, "seed": cfg.seed + 1}
    plan = Plan(os.path.relpath(cfg.path), out,
                (f"synvid={trajectories}", *shared, *shlex.split(cfg.options)),
                (*shared, *as_options(measured)), (*shared, *as_options(others)),
                tuple(shlex.split(cfg.launch)), cfg.jobs)
    with lock_folder(out):
        if cfg.synvid is None and chosen != ("fig5",):
            launch = plan.launch if cfg.jobs == 1 else (
                "torchrun", "--standalone", f"--nproc-per-node={cfg.jobs}")
            command = plan.command("synvid.py", out, "keep=all", *shared, launch=launch)
            run_all([Run(command, trajectories, "manifest.json")], plan, "SynVid")
        training = [plan.train(arm, seed) for table in chosen for arm in tables.arms_of(table, s)
                    for seed in arm.seeds]
        run_all(dict.fromkeys(training), plan, "training runs")  # once: tables share arms
        evaluations = list(dict.fromkeys(run for table in chosen
                                         for run in tables.evaluations_of(table, s, plan)))
        run_all(evaluations[:1], plan, "first evaluation")  # stores the teacher's samples
        run_all(evaluations[1:], plan, "evaluations")
        if "fig6" in chosen:
            command = plan.command("tools.taps", out / "fig6", *plan.options, s.key)
            run_all([Run(command, out / "fig6", "taps/taps.json")], plan, "fig6")
        # Fig. 5 shows SynVid's prompts; alone, it may show those of any file and needs no SynVid.
        file = cfg.prompts if chosen == ("fig5",) else None
        if not any(trajectories.glob("*/*.safetensors")):
            file = file or training_prompts
        sections = {name: make_section(cfg, name, plan, s, trajectories, file) for name in chosen}
        page = tables.write_paper(plan, sections, {
            "command": shlex.join(["python", "-m", "tools.paper", *argv]),
            **environment(pick_device(cfg.device)),
            "seconds": round(time.perf_counter() - started, 1)})
    print(f"results: {page}; numbers of every seed: {out / 'paper.json'}")


def make_section(cfg: Config, name: str, plan: Plan, s: tables.Settings, trajectories: Path,
                 file: str | None) -> tables.Section:
    """One table or figure, from what was measured.

    Args: file, the prompts of fig5; by default they are those of the trajectories.
    """
    if name == "fig5" and file is None:
        files = sorted(trajectories.glob("*/*.safetensors"))
        return tables.fig5(plan, [stored_prompt(path) for path in files])
    if name == "fig5":
        prompts = read_prompts(file, sizes_of(cfg.preset).takes_image)
        return tables.fig5(plan, [prompt.text for prompt in prompts])
    if name not in ("table3", "table4", "methods"):
        return {"search": tables.search_table, "fig6": tables.fig6, "fig8": tables.fig8,
                "fig9": tables.fig9, "ladder": tables.ladder}[name](plan, s)
    section = tables.arms_table(plan, s, name)
    if name == "methods" and s.clips:
        found, shares = mismatches(cfg, plan, trajectories), tables.data_shares(
            section.numbers["arms"], s)
        section.numbers |= {"mismatch": found, "shares": shares}
        section.lines += ["", *mismatch_lines(found), "", *tables.share_lines(shares)]
    return section


def stored_prompt(path: Path) -> str:
    """The prompt of a trajectory's file. Raises ValueError if the file is damaged."""
    text = safetensors_metadata(path).get("synvid", "{}")
    return parse_json(text, str(path), {"trajectory": {"prompt": str}})["trajectory"]["prompt"]


# --------------------------------------------------------------------------- Eq. 4: the mismatch M

TEACHER_CLIPS, COMPARED_CLIPS = 2048, 256


def mismatches(cfg: Config, plan: Plan, trajectories: Path) -> dict[str, tuple[float, float]]:
    """M of Eq. 4 for each set that a method learned from: mean and standard error over videos."""
    def clips(name: str) -> torch.Tensor:
        return open_safetensors(folder / f"{name}.safetensors")["latents"].read()

    folder = plan.folder / "clips"  # which the baselines share
    keep_clips(cfg, folder / "training.safetensors", SIZE, 0, TEACHER_CLIPS,
               pick_device(cfg.device))
    files = sorted(trajectories.glob("*/*.safetensors"))[:COMPARED_CLIPS]
    sets = {name: clips(name)[:COMPARED_CLIPS] for name in ("matched", "mismatched")}
    sets["samples"] = torch.stack([open_safetensors(file)["x"].read()[-1] for file in files])
    training = clips("training")
    return {name: mean_and_error(distances(x, training).min(1).values) for name, x in sets.items()}


def mismatch_lines(measured: dict[str, tuple[float, float]]) -> list[str]:
    """M as Markdown."""
    return ["M (Eq. 4, a video's root mean square distance in latents to the nearest of "
            f"{TEACHER_CLIPS} of the teacher's training clips; fresh clips of the same kind show "
            "the distance that this number of clips leaves):", "",
            *markdown_table(["set", "M"], [[tables.DATA[name], plus_minus(mean, error)]
                                           for name, (mean, error) in measured.items()])]


if __name__ == "__main__":
    cli(main)
