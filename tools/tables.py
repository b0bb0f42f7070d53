"""What each table and figure of the paper consists of: its arms, its claims, its picture.

A section is a function of what was measured, so that the page is redrawn in seconds. n and m are
the numbers of steps of teacher and student, `s` the Settings.
"""

import html
import itertools
import statistics
import string
from dataclasses import dataclass, field
from pathlib import Path

from common.files import NUMBER, ROOT, read_json, read_log, write_json, write_text
from evaluation.page import BLUE, ORANGE, draw_table, drawing, html_of, markdown_table
from evaluation.sheets import data_uri
from tools.runs import (
    HOW_TO_READ, Arm, Measured, Plan, Run, claim_lines, make_claims, read_measured, table_lines,
    without_errors)

TABLES = ("ladder", "table3", "table4", "methods", "fig5", "fig6", "fig8", "fig9")
METHODS = {"pcm": "phased consistency", "perflow": "PeRFlow-style", "dmd": "distribution matching"}
DATA = {"matched": "the teacher's own kind of clips", "mismatched": "clips of smaller objects",
        "samples": "the teacher's own samples"}


# ----------------------------------------------------------------------------------------- arms

@dataclass(frozen=True)
class Settings:
    """What the arms depend on."""
    n: int
    times: list[float]                            # of the teacher's grid
    m: int                                        # steps of all tables but table4 and the ladder
    m_config: int                                 # the config's own steps
    ladder: list[int]                             # steps
    seeds: range                                  # of table3
    other_seeds: range                            # of table4, fig9 and other methods
    iterations: int
    lr: float
    lambda_adv: float
    clips: bool                                   # whether this is the small world, with its clips
    traj_lr: float                                # L_traj's own best learning rate
    shared_lambda: float                          # λ_adv of one shared head at equal dose
    methods: dict[str, list[float]]               # learning rate and iterations of other methods

    @property
    def key(self) -> str:
        """The option that sets m evenly spaced key timesteps."""
        return key_option(even_key(self.n, self.m))

    @property
    def fig9_every(self) -> int:
        """Iterations between two points of fig9."""
        return max(1, self.iterations // 4)

    @property
    def fig9_points(self) -> list[int]:
        """The iterations that fig9 shows, to the end of the run."""
        return [*range(self.fig9_every, self.iterations, self.fig9_every), self.iterations]


def even_key(n: int, m: int) -> list[int]:
    """m + 1 evenly spaced indices into the teacher's grid of n steps: the paper's choice."""
    return [round(j * n / m) for j in range(m + 1)]


def uniform_key(times: list[float], m: int) -> list[int]:
    """Indices of the points of the teacher's grid (times, falling) that are nearest to m + 1 evenly
    spaced times. Source: Table 4, which has .811 although .797 of the grid is nearer to .8."""
    key = [min(range(len(times)), key=lambda i, t=1 - j / m: abs(times[i] - t))
           for j in range(m + 1)]
    if sorted(set(key)) != key:
        raise ValueError(f"table4: the uniform grid of {m} steps: expected different points of the "
                         f"teacher's {len(times)} times, got {key}: choose fewer steps")
    return key


def key_option(key: list[int]) -> str:
    """The option of a command that sets the key timesteps."""
    return f"key={','.join(map(str, key))}"


def full_arm(s: Settings, m: int, seeds: range) -> Arm:
    """The complete method with m steps; it exports students over iterations for fig9."""
    export = (f"export_every={s.fig9_every}",) if m == s.m else ()
    return Arm(f"full-m{m}", "L_traj + L_adv, a head per timestep",
               (key_option(even_key(s.n, m)), *export), seeds)


def parts_arms(s: Settings) -> list[Arm]:
    """L_traj alone, one shared head and the complete method, and each once more as a control: with
    L_traj's own best learning rate, or with the λ_adv that gives one shared head's weighted
    gradient the norm of separate heads'."""
    def arm(name: str, label: str, *options: str) -> Arm:
        return Arm(f"{name}-m{s.m}", label, (s.key, *options), s.seeds)

    rate, dose = f"lr={s.traj_lr:g}", f"lambda_adv={s.shared_lambda:g}"
    shared, full = "L_traj + L_adv, one shared head", "L_traj + L_adv, a head per timestep"
    return [arm("traj", "L_traj alone", "adv=false"),
            arm("traj-rate", f"L_traj alone, {rate}", "adv=false", rate),
            arm("shared", shared, "heads=shared"),
            arm("shared-dose", f"{shared}, {dose}", "heads=shared", dose),
            full_arm(s, s.m, s.seeds), arm("full-rate", f"{full}, {rate}", rate)]


def method_options(s: Settings, method: str, data: str) -> tuple[str, ...]:
    """The options of tools.baselines for one method that learns from one set of data."""
    simulate = ("simulate=false",) if method == "dmd" and data != "captions" else ()
    return (s.key, f"method={method}", f"data={'samples' if data == 'captions' else data}",
            *simulate)


def method_arms(s: Settings) -> list[Arm]:
    """Other families of methods on data: on clips in the small world, on samples everywhere."""
    arms, data = [], DATA if s.clips else {"samples": DATA["samples"]}
    for method, label in METHODS.items():
        lr, iterations = s.methods[method]
        captions = {"captions": "captions alone"} if method == "dmd" else {}
        arms += [Arm(f"{method}-{name}", f"{label} on {title}",
                     (*method_options(s, method, name), f"lr={lr:g}", f"iterations={iterations:g}"),
                     s.other_seeds, "tools.baselines")
                 for name, title in {**captions, **data}.items()]
    return arms


SEARCH_SEEDS = range(100, 101)  # no table uses this seed


def search_arms(s: Settings) -> list[Arm]:
    """The same search for every method, on other captions and noise: learning rates and lengths,
    and λ_adv of a shared head, in units of the config's."""
    kinds = {"traj": ("L_traj alone", "distill.py", (s.key, "adv=false")),
             "full": ("L_traj + L_adv", "distill.py", (s.key,))} | {
        method: (label, "tools.baselines",
                 method_options(s, method, "captions" if method == "dmd" else "samples"))
        for method, label in METHODS.items()}
    arms = [Arm(f"search/shared-{dose}", f"one shared head, λ = {dose * s.lambda_adv:g}",
                (s.key, "heads=shared", f"lambda_adv={dose * s.lambda_adv:g}"), SEARCH_SEEDS)
            for dose in (1, 1.5, 2)]
    for name, (label, script, options) in kinds.items():
        for length, rate in itertools.product((1, 2), (1, 3, 10)):
            lr, iterations = f"lr={rate * s.lr:g}", length * s.iterations
            arms.append(Arm(f"search/{name}-{rate}-{length}",
                            f"{label}, {lr}, {iterations} iterations",
                            (*options, lr, f"iterations={iterations}"), SEARCH_SEEDS, script))
    return arms


def arms_of(table: str, s: Settings) -> list[Arm]:
    """The training runs that a table or figure needs."""
    if table == "search":
        return search_arms(s)
    if table == "ladder":
        return [full_arm(s, m, range(1)) for m in s.ladder]
    if table == "table4":
        return [arm for m in dict.fromkeys((s.m_config, s.m)) for arm in (
            full_arm(s, m, s.seeds if m == s.m else s.other_seeds),
            Arm(f"uniform-m{m}", "uniform key timesteps", (key_option(uniform_key(s.times, m)),),
                s.other_seeds))]
    parts, full = parts_arms(s), full_arm(s, s.m, s.seeds)
    adv = Arm(f"adv-m{s.m}", "L_adv alone",
              (s.key, "traj=false", f"export_every={s.fig9_every}"), s.other_seeds)
    return {"table3": parts, "methods": [full, *method_arms(s)], "fig8": [parts[0], full],
            "fig9": [adv, full]}.get(table, [])


def evaluations_of(table: str, s: Settings, plan: Plan) -> list[Run]:
    """The evaluations that a table or figure needs."""
    arms = arms_of(table, s)
    if table in ("ladder", "fig8"):
        names = ["student"] * len(arms) if table == "ladder" else ["L_traj alone", "full"]
        return [plan.measure(table, [plan.student(arm, 0) for arm in arms], names)]
    if table == "search":
        return [plan.measure(table, [plan.student(arm, *SEARCH_SEEDS) for arm in arms])]
    if table == "fig9":
        return [plan.measure(f"{arm.name}-at-{i}", [
            plan.student(arm, seed, i if i < s.iterations else None) for seed in s.other_seeds])
            for arm in arms for i in s.fig9_points]
    return [plan.measure(arm.name, [plan.student(arm, seed) for seed in arm.seeds])
            for arm in arms]


# ------------------------------------------------------------------------------------- sections

@dataclass
class Section:
    """A table or figure on the page: Markdown lines, pictures, and all its numbers."""
    title: str
    lines: list[str]
    numbers: dict
    pictures: list[Path] = field(default_factory=list)


def all_numbers(arms: dict[str, Measured], claims: list[dict]) -> dict:
    """Every per-seed row of the arms, and the claims."""
    return {"arms": {name: {"label": arm.label, "m": arm.teacher_m["m"], "command": arm.command,
                            "teacher": [arm.teacher_n, arm.teacher_m], "seeds": arm.rows}
                     for name, arm in arms.items()}, "claims": claims}


def draw_arms(path: Path, panels: dict[str, str], curves: dict[str, tuple], x: str,
                lines: tuple[dict, ...] = ()) -> None:
    """A panel for each column {name: title} with one curve for each label, ± standard error.

    Args: curves, {label: (colour, values of x, rows)}; lines, rows drawn as horizontal lines.
    """
    with drawing(path, 3.4 * len(panels), 3.3) as figure:
        grid = figure.subplots(1, len(panels))
        for axes, (name, title) in zip(grid, panels.items(), strict=True):
            for label, (colour, points, rows) in curves.items():
                values, errors = zip(*(row[name] for row in rows), strict=True)
                axes.errorbar(points, values, [error or 0.0 for error in errors], color=colour,
                              marker="o", capsize=3, label=label)
            for row in lines:
                axes.axhline(row[name][0], color=ORANGE, ls="--", label=row["label"])
            axes.set(title=title, xlabel=x, xticks=points)
            if points[0] > points[-1]:
                axes.invert_xaxis()
        grid[0].legend(fontsize=8)


def claims_of(table: str, s: Settings) -> list[tuple[str, str, str]]:
    """The claims of a table: text, the arm that should be nearer to the teacher, the other arm."""
    if table == "table4":
        return [(f"chosen key timesteps nearer than uniform ones, m = {m}", f"full-m{m}",
                 f"uniform-m{m}") for m in dict.fromkeys((s.m_config, s.m))]
    traj, traj_rate, shared, dose, full, full_rate = (arm.name for arm in parts_arms(s))
    if table == "table3":
        return [("one shared head nearer than L_traj alone", shared, traj),
                ("a head per timestep nearer than L_traj alone", full, traj),
                ("a head per timestep nearer than one shared head", full, shared),
                ("a head per timestep nearer than one shared head of equal dose", full, dose),
                (f"a head per timestep nearer than L_traj alone at lr {s.traj_lr:g}", full,
                 traj_rate),
                (f"a head per timestep nearer than L_traj alone, both at lr {s.traj_lr:g}",
                 full_rate, traj_rate)]
    claims = [(f"full nearer than {arm.label}", full, arm.name) for arm in method_arms(s)]
    for method, label in METHODS.items() if s.clips else ():
        claims += [(f"{label}: matched clips nearer than mismatched", f"{method}-matched",
                    f"{method}-mismatched"),
                   (f"{label}: the teacher's samples nearer than matched clips",
                    f"{method}-samples", f"{method}-matched")]
    return claims


def arms_table(plan: Plan, s: Settings, table: str) -> Section:
    """Table 3, its parts of the method or its other methods, or Table 4, the key timesteps."""
    title = {"table3": f"Table 3: the parts of the method, m = {s.m}",
             "methods": f"Table 3: other methods on data, m = {s.m}",
             "table4": "Table 4: which key timesteps"}[table]
    arms = {arm.name: read_measured(plan, arm.name, arm.label) for arm in arms_of(table, s)}
    claims = make_claims([(text, arms[ours], arms[theirs])
                          for text, ours, theirs in claims_of(table, s)])
    lines, pictures = [], []
    for m in dict.fromkeys(arm.teacher_m["m"] for arm in arms.values()):
        same_m = [arm for arm in arms.values() if arm.teacher_m["m"] == m]
        grids = {str(arm.teacher_m["endpoint"]): arm for arm in same_m}  # by key timesteps
        teachers = [arm.teacher_m if len(grids) == 1 else
                    arm.teacher_m | {"label": f"{arm.teacher_m['label']}, {arm.label}"}
                    for arm in grids.values()]
        rows = [*map(without_errors, (same_m[0].teacher_n, *teachers)),
                *(arm.mean for arm in same_m)]
        lines += [*table_lines(rows), ""]
        pictures.append(plan.folder / f"{table}-m{m}.png")
        draw_table(pictures[-1], rows, title)
    return Section(title, [*lines, *claim_lines(claims)], all_numbers(arms, claims), pictures)


def search_table(plan: Plan, s: Settings) -> Section:
    """How rates, lengths and λ_adv were chosen: one run each, on other captions and noise.

    The dose is the mean norm of λ_adv · g_adv, L_adv's gradient at the student, over a run.
    """
    measured, arms = read_measured(plan, "search"), search_arms(s)
    teachers, doses = [measured.teacher_n, measured.teacher_m], {}
    rows = [row | {"label": arm.label} for arm, row in zip(arms, measured.rows, strict=True)]
    for arm in arms:
        path = plan.student(arm, *SEARCH_SEEDS).parent / "distill/log.jsonl"
        if log := read_log(path, "grad_adv"):
            doses[arm.label] = statistics.fmean(line["grad_adv"] for line in log)
    lines = [*table_lines([*teachers, *rows]), "",
             *markdown_table(["run", "dose"], [[label, f"{x:.4f}"] for label, x in doses.items()])]
    return Section(f"How rates, lengths and λ_adv were chosen, m = {s.m}, one seed", lines,
                   {"rows": rows, "teacher": teachers, "doses": doses})


def data_shares(arms: dict[str, dict], s: Settings) -> dict[str, dict[str, float]]:
    """What a method's endpoint error consists of, as shares of its error on mismatched clips.

    ours, the error of the complete method on trajectories; method, what the method adds to it when
    it learns from the teacher's own samples; data, what matched clips, which the teacher did not
    generate, add; mismatch, what clips of smaller objects add. Args: arms, the numbers of the table
    of methods.
    """
    def error_of(name: str) -> float:
        return statistics.fmean(row["endpoint"][0] for row in arms[name]["seeds"])

    shares, ours = {}, error_of(f"full-m{s.m}")
    for method, label in METHODS.items():
        matched, mismatched, samples = (error_of(f"{method}-{data}") for data in DATA)
        parts = {"ours": ours, "method": samples - ours, "data": matched - samples,
                 "mismatch": mismatched - matched}
        shares[label] = {name: part / mismatched for name, part in parts.items()}
    return shares


def share_lines(shares: dict[str, dict[str, float]]) -> list[str]:
    """Shares as Markdown."""
    return ["Shares of each method's endpoint error on clips of smaller objects:", "",
            *markdown_table(["method", "remains with trajectories", "the method",
                             "clips in place of the teacher's samples", "their mismatch"],
                            [[label, *(f"{100 * share:.0f} %" for share in found.values())]
                             for label, found in shares.items()])]


def fig8(plan: Plan, s: Settings) -> Section:
    """Pictures of teacher@m, L_traj alone and the complete method."""
    rows = read_measured(plan, "fig8").all_rows
    return Section(f"Figure 8: what one sees, m = {s.m}, seed 0",
                   table_lines(rows), {"rows": rows}, [plan.folder / "fig8/evaluate/videos.png"])


def fig9(plan: Plan, s: Settings) -> Section:
    """L_adv alone against the complete method, over iterations."""
    arms, curves = {}, {}
    for arm, colour in zip(arms_of("fig9", s), ("#b3402f", BLUE), strict=True):
        curve = {f"{arm.name}-at-{i}": read_measured(
            plan, f"{arm.name}-at-{i}", f"{arm.label}, iteration {i}") for i in s.fig9_points}
        curves[arm.label] = colour, s.fig9_points, [measured.mean for measured in curve.values()]
        arms |= curve
    adv, full = (arms[f"{name}-m{s.m}-at-{s.iterations}"] for name in ("adv", "full"))
    claims = make_claims([("with L_traj nearer than L_adv alone, at the end", full, adv)])
    panels = {"endpoint": "endpoint error", "hf": "HF", "spread": "spread", "c2st": "C2ST"}
    path = plan.folder / "fig9.png"
    draw_arms(path, panels, curves, "iteration", (adv.teacher_m,))
    lines = table_lines([adv.teacher_n, adv.teacher_m, *(arm.mean for arm in arms.values())])
    return Section(f"Figure 9: L_adv alone, m = {s.m}", [*lines, "", *claim_lines(claims)],
                   all_numbers(arms, claims), [path])


def ladder(plan: Plan, s: Settings) -> Section:
    """Teacher and student with fewer and fewer steps: pictures and the curve."""
    rows, path = read_measured(plan, "ladder").all_rows, plan.folder / "ladder.png"
    curves = {}
    for kind, label, colour in (("teacher_m", "teacher", ORANGE), ("student", "student", BLUE)):
        curve = [row for row in rows if row["kind"] == kind]
        curves[label] = colour, [row["m"] for row in curve], curve
    draw_arms(path, {"endpoint": "endpoint error", "hf": "HF, 1 = slow teacher's"}, curves, "steps")
    return Section("The ladder: fewer and fewer steps, seed 0",
                   table_lines(rows), {"rows": rows},
                   [plan.folder / "ladder/evaluate/videos.gif", path])


def fig5(plan: Plan, prompts: list[str]) -> Section:
    """How long the prompts of SynVid are."""
    lengths = sorted(len(text.split()) for text in prompts)
    path = plan.folder / "fig5.png"
    with drawing(path, 5, 3) as figure:
        axes = figure.subplots()
        axes.hist(lengths, bins=min(40, max(lengths) - min(lengths) + 1), color=BLUE)
        axes.set(xlabel="words of a prompt", ylabel="prompts")
    words = {f"{percent} %": lengths[round(percent / 100 * (len(lengths) - 1))]
             for percent in (0, 10, 50, 90, 100)}
    lines = markdown_table(
        ["prompts", "different", *(f"{percent} have at most" for percent in words)],
        [[str(len(lengths)), str(len(set(prompts))), *(f"{n} words" for n in words.values())]])
    return Section("Figure 5: lengths of the prompts", lines, {
        "prompts": len(lengths), "different": len(set(prompts)), "words": words}, [path])


def fig6(plan: Plan, _: Settings) -> Section:
    """How well features of the teacher's blocks detect few-step latents, by tools.taps."""
    taps = read_json(plan.folder / "fig6/taps/taps.json",
                     {"found": [{"block": int, "k": int, "probe": NUMBER, "head": NUMBER}]})
    entries = {(entry["block"], entry["k"]): entry for entry in taps["found"]}
    blocks = dict.fromkeys(block for block, _ in entries)
    ks = sorted({k for _, k in entries}, reverse=True)
    rows = [[str(block), *(f"{entries[block, k]['probe']:.2f}, {entries[block, k]['head']:.2f}"
                           + (" (D7)" if taps["D7"][k] == block else "") for k in ks)]
            for block in blocks]
    lines = markdown_table(["block", *(f"t'_{k}: probe, head" for k in ks)], rows)
    return Section("Figure 6: how well the teacher's features detect few-step latents", lines,
                   {"D7": taps["D7"], "found": taps["found"]},
                   [plan.folder / "fig6/taps/taps.png"])


# ----------------------------------------------------------------------------------------- page

def write_paper(plan: Plan, sections: dict[str, Section], facts: dict) -> Path:
    """Write paper.json and report.html into the plan's folder; returns the page."""
    title, out = "The paper's tables and figures on this teacher", plan.folder
    write_json(out / "paper.json", {**facts, **{name: section.numbers for name, section
                                                in sections.items()}})
    parts = [html_of(f"`{facts['command']}`; {facts['device']}, {facts['seconds']} s in this call."
                     f"\n\n{HOW_TO_READ}")]
    for section in sections.values():
        name = html.escape(section.title)
        parts.append(f"<h2>{name}</h2>")
        parts += [f'<div class="wide"><img alt="{name}" src="{data_uri(picture)}"></div>'
                  for picture in section.pictures]
        parts.append(html_of("\n".join(section.lines)))
    template = string.Template((ROOT / "assets/paper_template.html").read_text(encoding="utf-8"))
    write_text(out / "report.html", template.substitute(title=title, body="\n".join(parts)))
    return out / "report.html"
