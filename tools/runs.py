"""The paper's tables and figures on any teacher: runs, their means over seeds, verdicts.

A run is a command, `python distill.py` or `python baselines.py` with options, in a folder of its
own, <paper>/<arm>/seed<s>; `python evaluate.py` then measures all seeds of an arm together, on the
same held-out captions and noise. What is finished is not done again: done.json says by which
command a folder was made. A claim compares two arms over the seeds that both have.
"""

import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.config import load_yaml
from common.files import ROOT, read_json, abbreviate, write_json


# -------------------------------------------------------------------------------------- runs

@dataclass(frozen=True)
class Arm:
    """A kind of run: its folder's name, what it is, the options that make it so."""
    name: str
    label: str
    m: int
    options: tuple[str, ...]
    seeds: int
    script: str = "distill.py"


@dataclass(frozen=True)
class Plan:
    """Where the runs lie and how they are started."""
    config: str
    folder: Path
    options: tuple[str, ...]                      # of every run
    evaluate: tuple[str, ...]                     # of every evaluation
    launch: tuple[str, ...]                       # what starts a script: python, torchrun …
    at_once: int
    threads: int | None                           # of each process; None: torch's choice


def even_key(n: int, m: int) -> list[int]:
    """m + 1 indices into the teacher's grid of n steps, evenly spaced: what the paper chose."""
    return [round(j * n / m) for j in range(m + 1)]


def uniform_key(times: list[float], m: int) -> list[int]:
    """The points of the teacher's grid (times, falling) nearest to m + 1 evenly spaced times.
    Table 4, which has .811 where .797 of the grid is nearer to .8."""
    wanted = [1 - j / m for j in range(m + 1)]
    key = [min(range(len(times)), key=lambda i, t=t: abs(times[i] - t)) for t in wanted]
    if sorted(set(key)) != key:
        raise ValueError(f"the uniform grid of {m} steps falls on {key} of the teacher's "
                         f"{len(times)} times: wanted different points; take fewer steps")
    return key


def key_option(key: list[int]) -> str:
    """An option of a command."""
    return f"key={','.join(map(str, key))}"


def settings_of(config: str) -> dict:
    """What a config file says that a run depends on."""
    values = load_yaml(Path(config)) or {}
    others = ("teacher", "synvid", "sample", "evaluate")
    return {name: value for name, value in values.items() if name not in others}


def is_done(folder: Path, command: list[str], config: str) -> bool:
    """Whether `command` has finished in `folder`. Raises ValueError if another one has."""
    path, wanted = folder / "done.json", {"command": command, "settings": settings_of(config)}
    if not path.exists():
        return False
    found = read_json(path)
    if found != wanted:
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        got, want = (abbreviate(about.get(changed[0])) for about in (found, wanted))
        raise ValueError(f"{path}: got another {changed[0]}, {got}; wanted {want}: choose another "
                         f"--run, or remove {folder}")
    return True


@dataclass(frozen=True)
class Job:
    """A command to run, its folder, and what it is called in messages."""
    label: str
    command: tuple[str, ...]
    folder: Path
    config: str
    makes: str                                    # a file in the folder that it ends with

    def todo(self) -> bool:
        return not is_done(self.folder, list(self.command), self.config)


def script(name: str) -> tuple[str, ...]:
    """The words that start a stage, such as evaluate.py, or a tool, such as tools.baselines."""
    return (os.path.relpath(ROOT / name),) if name.endswith(".py") else ("-m", name)


def started(command: tuple[str, ...]) -> list[str]:
    """The command with this Python, also where python is not on the path."""
    first = {"python": [sys.executable],
             "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [*first.get(command[0], command[:1]), *command[1:]]


def run_jobs(jobs: Iterable[Job], plan: Plan, label: str) -> None:
    """Run the jobs that are not done, some at once; each writes <its folder>/log.txt.

    Raises ValueError naming the first that fails, with the end of its log; the others are stopped,
    and go on where they were when the same command is given again.
    """
    waiting, running = [job for job in jobs if job.todo()], {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if plan.threads is not None:
        environment["OMP_NUM_THREADS"] = str(plan.threads)
    bar = tqdm(total=len(waiting), desc=label, unit="run", disable=not waiting or None)

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while waiting or running:
            while waiting and len(running) < plan.at_once:
                job = waiting.pop(0)
                job.folder.mkdir(parents=True, exist_ok=True)
                with (job.folder / "log.txt").open("a", encoding="utf-8") as log:
                    running[job] = subprocess.Popen(
                        started(job.command), stdout=log, stderr=log, env=environment,
                        stdin=subprocess.DEVNULL)
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                if process.returncode or not (job.folder / job.makes).exists():
                    tail = (job.folder / "log.txt").read_text(encoding="utf-8")[-2000:]
                    raise ValueError(f"{job.label}: `{shlex.join(job.command)}` ended with "
                                     f"{process.returncode}, wanted 0 and {job.makes}; the end of "
                                     f"{job.folder / 'log.txt'}:\n"
                                     f"{tail.strip()}")
                write_json(job.folder / "done.json", {"command": list(job.command),
                                                      "settings": settings_of(job.config)})
                bar.update()
            time.sleep(0.1)
    finally:
        bar.close()
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def command_job(plan: Plan, name: str, label: str, file: str, makes: str, *options: str) -> Job:
    """A script that runs once, in <paper>/<name>, and ends with the file `makes` there."""
    folder = plan.folder / name
    return Job(label, (*plan.launch, *script(file), plan.config, f"run={folder}", *options),
               folder, plan.config, makes)


def clips_folder(plan: Plan) -> Path:
    """Where all baselines of a plan keep the clips that one of them encoded."""
    return plan.folder / "clips"


def train_job(plan: Plan, arm: Arm, seed: int) -> Job:
    """The run of one arm with one seed."""
    folder = plan.folder / arm.name / f"seed{seed}"
    own = [f"clips={clips_folder(plan)}"] if arm.script == "tools.baselines" else []
    return Job(f"{arm.label}, seed {seed}",
               (*plan.launch, *script(arm.script), plan.config, f"run={folder}", f"seed={seed}",
                *plan.options, *own, *arm.options), folder, plan.config, "student.safetensors")


def evaluate_job(plan: Plan, name: str, label: str, students: list[Path],
                 names: list[str] | None = None) -> Job:
    """The evaluation of some students, in <paper>/<name>; with names all are shown."""
    folder = plan.folder / name
    options = [f"names={','.join(names)}"] if names else ["pictures=false"]
    return Job(f"{label}, evaluation",
               (*plan.launch, *script("evaluate.py"), plan.config, f"run={folder}",
                f"students={','.join(map(str, students))}",
                f"teacher_samples={plan.folder / 'teacher.safetensors'}", *plan.evaluate,
                *options), folder / "evaluate", plan.config, "table.json")


def student_file(plan: Plan, arm: Arm, seed: int, iteration: int | None = None) -> Path:
    """The student of a run, at its end or after some iterations."""
    end = "" if iteration is None else f"_{iteration:06d}"
    return plan.folder / arm.name / f"seed{seed}/student{end}.safetensors"


# --------------------------------------------------------------------------------- statistics

# 97.5% points of Student's t by degrees of freedom; from 11 on the normal's, 2% too small at most.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# How far a row is from the teacher's, less is better: of a table's row and teacher@n's.
SHORTFALLS = {
    "endpoint error": lambda row, best: row["endpoint"][0],
    "energy": lambda row, best: row["energy"][0] - best["energy"][0],
    "sliced W": lambda row, best: row["sliced"][0] - best["sliced"][0],
    "HF from 1": lambda row, best: abs(1 - row["hf"][0]),
    "spread from 1": lambda row, best: abs(1 - row["spread"][0]),
    "C2ST": lambda row, best: row["c2st"][0]}


def mean_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error of values; None for the error of one."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def compare(ours: list[float], theirs: list[float]) -> dict:
    """Whether our values are the smaller ones, from their paired 95% interval over seeds.

    Returns {"difference", "half" (of the interval, None for one pair), "pairs", "verdict"}.
    """
    gaps = [a - b for a, b in zip(ours, theirs, strict=False)]  # of the seeds that both have
    mean, error = mean_error(gaps)
    half = None
    if error is not None:
        half = error * (T_975[len(gaps) - 2] if len(gaps) <= len(T_975) + 1 else 1.96)
    verdict = ("cannot be told" if half is None or abs(mean) <= half else
               "holds" if mean < 0 else "does not hold")
    return {"difference": mean, "half": half, "pairs": len(gaps), "verdict": verdict}


@dataclass
class Measured:
    """An arm's rows of the table, one a seed, beside those of teacher@n and teacher@m."""
    label: str
    m: int
    best: dict
    few: dict
    rows: list[dict]
    command: str

    def values(self, measure: str) -> list[float]:
        return [SHORTFALLS[measure](row, self.best) for row in self.rows]


def read_measured(plan: Plan, name: str, label: str) -> Measured:
    """What an evaluation in <paper>/<name> found."""
    path = plan.folder / name / "evaluate/table.json"
    table = read_json(path, {"rows": [{"label": str}], "command": str})
    best, few, *rows = [row for row in table["rows"] if ", mean of" not in row["label"]]
    return Measured(label, few["evaluations"], best, few, rows, table["command"])


def claim(text: str, ours: Measured, theirs: Measured) -> dict:
    """A claim that one arm is nearer to the teacher than another, by each measure."""
    return {"claim": text, **{name: compare(ours.values(name), theirs.values(name))
                              for name in SHORTFALLS}}


# ----------------------------------------------------------------------------------- Markdown

COLUMNS = {"endpoint": "endpoint error ↓", "energy": "energy distance ↓", "sliced": "sliced W ↓",
           "hf": "HF → 1", "spread": "spread → 1", "c2st": "C2ST → .5", "all": "oracle ↑"}


def cell(values: list[float]) -> str:
    """Mean ± standard error of a few values."""
    mean, error = mean_error(values)
    return f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")


def table_lines(teachers: Iterable[dict], arms: Iterable[Measured]) -> list[str]:
    """A table with a row for each teacher and each arm, mean ± standard error over seeds."""
    teachers, arms = list(teachers), list(arms)
    columns = [name for name in COLUMNS if name in teachers[0]]
    lines = ["| | seeds | " + " | ".join(COLUMNS[name] for name in columns) + " |",
             "|---" * (len(columns) + 2) + "|"]
    for row in teachers:
        cells = [f"{row[name][0]:.4f}" for name in columns]
        lines.append(f"| {row['label']} | | " + " | ".join(cells) + " |")
    for arm in arms:
        cells = [cell([row[name][0] for row in arm.rows]) for name in columns]
        lines.append(f"| {arm.label} | {len(arm.rows)} | " + " | ".join(cells) + " |")
    return lines


def claim_lines(claims: list[dict]) -> list[str]:
    """Claims with the paired difference of each shortfall, its 95% interval and the verdict."""
    lines = ["| claim: … nearer to the teacher than … | " + " | ".join(SHORTFALLS) + " |",
             "|---" * (len(SHORTFALLS) + 1) + "|"]
    for entry in claims:
        cells = []
        for name in SHORTFALLS:
            found = entry[name]
            half = "" if found["half"] is None else f" ± {found['half']:.4f}"
            verdict = found["verdict"]
            verdict = verdict if verdict == "cannot be told" else f"**{verdict}**"
            cells.append(f"{found['difference']:+.4f}{half}: {verdict}")
        lines.append(f"| {entry['claim']} | " + " | ".join(cells) + " |")
    return lines
HOW_TO_READ = (
    "Rows: mean ± standard error over seeds. Claims: paired difference over the seeds that both "
    "arms have, of how far each is from the teacher, with its 95% interval (Student's t): a claim "
    "holds where the interval is below 0, does not hold where it is above, and cannot be told "
    "where it contains 0. No correction for the number of comparisons.")
