"""Runs of other scripts, each done once in a folder of its own, and claims about their results.

A run is a command, such as `python distill.py` with options. done.json in its folder records which
command has finished there, so that the same call skips it. A claim compares two arms, which are
kinds of training runs, over the seeds that both have.
"""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.config import load_yaml
from common.files import ROOT, abbreviate, open_own, read_json, write_json
from evaluation.measures import mean_row
from evaluation.page import ALL_TITLES, COLUMN_TITLES, markdown_table, plus_minus
from evaluation.statistics import difference, holm, jackknife_error

# ----------------------------------------------------------------------------------------- runs

@dataclass(frozen=True)
class Arm:
    """A kind of training run: its folder's name, its label, the options that define it."""
    name: str
    label: str
    options: tuple[str, ...]
    seeds: range
    script: str = "distill.py"


@dataclass(frozen=True)
class Run:
    """A command, the folder in which done.json records its end, and a file that it writes there."""
    command: tuple[str, ...]
    folder: Path
    output: str


@dataclass(frozen=True)
class Plan:
    """The folder of all runs and how they are started."""
    config: str
    folder: Path
    options: tuple[str, ...]                      # of every training run
    evaluation: tuple[str, ...]                   # options of every evaluation
    search_evaluation: tuple[str, ...]            # of the search's: other captions and noise
    launch: tuple[str, ...]                       # python, or torchrun with its options
    at_once: int                                  # runs; if several, each process has one thread

    def command(self, script: str, folder: Path, *options: str,
                launch: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The command of a stage, such as evaluate.py, or of a tool, such as tools.baselines."""
        start = (os.path.relpath(ROOT / script),) if script.endswith(".py") else ("-m", script)
        return (*(launch or self.launch), *start, self.config, f"run={folder}", *options)

    def train(self, arm: Arm, seed: int) -> Run:
        """The training run of one arm with one seed."""
        folder = self.folder / arm.name / f"seed{seed}"
        clips = [f"clips={self.folder / 'clips'}"] if arm.script == "tools.baselines" else []
        return Run(self.command(arm.script, folder, f"seed={seed}", *self.options, *clips,
                                *arm.options), folder, "student.safetensors")

    def measure(self, name: str, students: list[Path], names: list[str] | None = None) -> Run:
        """The evaluation of some students in <paper>/<name>, with pictures if they have names."""
        folder = self.folder / name
        options = self.search_evaluation if name == "search" else (
            f"teacher_samples={self.folder / 'teacher.safetensors'}", *self.evaluation)
        pictures = f"names={','.join(names)}" if names else "pictures=false"
        return Run(self.command("evaluate.py", folder, f"students={','.join(map(str, students))}",
                                *options, pictures), folder / "evaluate", "table.json")

    def student(self, arm: Arm, seed: int, iteration: int | None = None) -> Path:
        """The student's file of a training run, at its end or after some iterations."""
        suffix = "" if iteration is None else f"_{iteration:06d}"
        return self.folder / arm.name / f"seed{seed}/student{suffix}.safetensors"


def done_record(run: Run, config: str) -> dict:
    """What done.json holds: the command, and the part of the config file that a run depends on.

    An evaluation's command has all of its settings; the other commands read their own section.
    """
    unrelated = {"teacher", "synvid", "sample", "evaluate", "paper", "lora", "bench"}
    unrelated -= {"synvid"} if run.output == "manifest.json" else set()
    return {"command": list(run.command),
            "settings": {name: value for name, value in (load_yaml(Path(config)) or {}).items()
                         if name not in unrelated}}


def is_done(run: Run, config: str) -> bool:
    """Whether the run has finished and its output exists.

    Raises ValueError if another run has finished in its folder.
    """
    path, expected = run.folder / "done.json", done_record(run, config)
    if not (path.exists() and (run.folder / run.output).exists()):
        return False
    found = read_json(path)
    for name in expected:
        if found.get(name) != expected[name]:
            raise ValueError(f"{path}: expected {name} {abbreviate(expected[name])}, got "
                             f"{abbreviate(found.get(name))}: choose another --run, or remove "
                             f"{run.folder}")
    return True


def start(command: tuple[str, ...], log: Path, one_thread: bool) -> subprocess.Popen:
    """Start a command with this Python; its output is appended to `log`."""
    first = {"python": [sys.executable],
             "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    if one_thread:
        environment["OMP_NUM_THREADS"] = "1"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open_own(log, "a") as file:
        return subprocess.Popen([*first.get(command[0], command[:1]), *command[1:]], stdout=file,
                                stderr=file, stdin=subprocess.DEVNULL, env=environment)


def finish(run: Run, process: subprocess.Popen, config: str) -> None:
    """Record the end of a run. Raises ValueError with the end of its log if it failed."""
    if process.returncode or not (run.folder / run.output).exists():
        log = run.folder / "log.txt"
        raise ValueError(f"{run.folder}: `{shlex.join(run.command)}`: expected exit status 0 and "
                         f"{run.output}, got {process.returncode}: see the end of {log}:\n"
                         f"{log.read_text(encoding='utf-8')[-2000:].strip()}")
    write_json(run.folder / "done.json", done_record(run, config))


def run_all(runs: Iterable[Run], plan: Plan, label: str) -> None:
    """Run what is not done, several at once; each run writes <its folder>/log.txt.

    Raises ValueError for the first that fails and stops the others. Rerunning the same command
    resumes them.
    """
    waiting, running = [run for run in runs if not is_done(run, plan.config)], {}
    bar = tqdm(total=len(waiting), desc=label, unit="run", disable=not waiting or None)
    caught: list[int] = []  # an exception in a handler could lose a process that is being started
    handlers = {number: signal.signal(number, lambda number, _: caught.append(number))
                for number in (signal.SIGTERM, signal.SIGHUP)
                if signal.getsignal(number) != signal.SIG_IGN}  # as nohup ignores SIGHUP
    try:
        while waiting or running:
            while waiting and len(running) < plan.at_once:
                run = waiting.pop(0)
                running[run] = start(run.command, run.folder / "log.txt", plan.at_once > 1)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                finish(run, running.pop(run), plan.config)
                bar.update()
            time.sleep(0.1)
            if caught:
                raise SystemExit(128 + caught[0])
    finally:
        bar.close()
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------- results and statistics

@dataclass
class Measured:
    """An arm's rows of the table, one per seed, with those of teacher@n and teacher@m."""
    label: str
    teacher_n: dict
    teacher_m: dict
    rows: list[dict]
    command: str

    @property
    def all_rows(self) -> list[dict]:
        return [self.teacher_n, self.teacher_m, *self.rows]

    @property
    def mean(self) -> dict:
        """The arm's row: by column (mean over seeds, its standard error or None)."""
        return mean_row(self.rows) | {"label": self.label, "seeds": len(self.rows)}


def read_measured(plan: Plan, name: str, label: str = "") -> Measured:
    """The rows that the evaluation in <paper>/<name> wrote; label, of an arm."""
    table = read_json(plan.folder / name / "evaluate/table.json",
                      {"rows": [{"label": str, "kind": str, "m": int}], "command": str})
    teacher_n, teacher_m, *rows = [row for row in table["rows"] if row["kind"] != "mean"]
    return Measured(label, teacher_n, teacher_m, rows, table["command"])


# What a claim compares: a column, and how far its value is from the teacher's (less is better).
SHORTFALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "endpoint error": ("endpoint", lambda value: value),
    "energy": ("energy", lambda value: value),
    "sliced W": ("sliced", lambda value: value),
    "HF from 1": ("hf", lambda value: abs(1 - value)),
    "edges from 1": ("edges", lambda value: 1 - value),
    "floor from 1": ("floor", lambda value: abs(1 - value)),
    "spread from 1": ("spread", lambda value: abs(1 - value)),
    "C2ST": ("c2st", lambda value: value)}
HOW_TO_READ = (
    "Rows: mean ± standard error over seeds. Claims: paired difference, over the seeds that both "
    "arms have, of how far each is from the teacher, with its 95% interval over seeds and videos "
    "(Student's t): a claim holds where the interval is below 0, does not hold where it is above, "
    "and is undecided where it contains 0. In brackets: the p value after Holm's correction for "
    "all claims and measures of the table; a verdict is bold where it is below .05.")


def compare(ours: Measured, theirs: Measured, name: str) -> dict:
    """Whether our shortfall is smaller, by the 95% interval of the paired difference.

    Returns what evaluation.statistics.difference does and the "verdict".
    """
    column, shortfall = SHORTFALLS[name]
    values = [[shortfall(row[column][0]) for row in arm.rows] for arm in (ours, theirs)]
    if column == "c2st":  # the scatter of the test decisions, of which no replicates are kept
        videos = sum(sum(row[column][1] ** 2 for row in arm.rows) / len(arm.rows)
                     for arm in (ours, theirs)), math.inf
    else:
        pairs = min(map(len, values))
        a, b = (shortfall(torch.tensor([row["left"][column] for row in arm.rows[:pairs]],
                                       dtype=torch.float64)) for arm in (ours, theirs))
        videos = jackknife_error((a - b).mean(0)) ** 2, a.shape[1] - 1
    found = difference(*values, videos)
    half, mean = found["half"], found["difference"]
    return found | {"verdict": "undecided" if half is None or abs(mean) <= half else
                    "holds" if mean < 0 else "does not hold"}


def make_claims(texts: list[tuple[str, Measured, Measured]]) -> list[dict]:
    """Claims that one arm is nearer to the teacher than another, for each measured shortfall.

    Args: texts, the text of each claim, our arm and theirs. p values are corrected over all claims.
    """
    claims = [{"claim": text, **{
        name: compare(ours, theirs, name) for name, (column, _) in SHORTFALLS.items()
        if column in ours.rows[0]}} for text, ours, theirs in texts]
    results = [result for claim in claims for result in claim.values()
               if isinstance(result, dict) and result["p"] is not None]
    for result, p in zip(results, holm([result["p"] for result in results]), strict=True):
        result["holm"] = p
    return claims


def without_errors(row: dict) -> dict:
    """A row without its standard errors over videos; those of an arm are over seeds and stay."""
    return row if "seeds" in row else {
        name: (value[0], None) if name in ALL_TITLES else value for name, value in row.items()}


def table_lines(rows: list[dict]) -> list[str]:
    """A table of teachers, students and arms; of arms, mean ± standard error over seeds."""
    columns = [name for name in (*COLUMN_TITLES, "all") if name in rows[0]]
    return markdown_table(
        ["", "seeds", *(ALL_TITLES[name] for name in columns)],
        [[row["label"], str(row.get("seeds", "")), *(plus_minus(*row[name]) for name in columns)]
         for row in map(without_errors, rows)])


def claim_lines(claims: list[dict]) -> list[str]:
    """Claims with the paired difference of each shortfall, its 95% interval and the verdict."""
    names = [name for name in SHORTFALLS if name in claims[0]]

    def cell(result: dict) -> str:
        bold = "**" if result.get("holm", 1.0) < 0.05 else ""
        corrected = f" ({result['holm']:.2g})" if "holm" in result else ""
        return (f"{plus_minus(result['difference'], result['half'], sign='+')}: "
                f"{bold}{result['verdict']}{bold}{corrected}")

    return markdown_table(["claim: … nearer to the teacher than …", *names],
                          [[claim["claim"], *(cell(claim[name]) for name in names)]
                           for claim in claims])
