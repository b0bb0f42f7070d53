"""What each table and figure of the paper is made of: its arms, its claims, its picture.

Every section is a function of what was measured, so that a page is drawn anew in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.files import NUMBER, read_json, replace_file, write_json, write_text
from evaluation.page import html_of
from evaluation.sheets import data_uri
from tools.runs import (
    HOW_TO_READ, Arm, Measured, Plan, claim, claim_lines, even_key, key_option, mean_error,
    read_measured, student_file, table_lines, uniform_key)

TABLES = ("ladder", "table3", "table4", "fig5", "fig6", "fig8", "fig9")
METHODS = {"perflow": "PeRFlow-style", "pcm": "phased consistency", "dmd": "distribution matching"}
DATA = {"matched": "the teacher's own kind of clips", "mismatched": "clips of smaller objects",
        "samples": "the teacher's own samples"}


# -------------------------------------------------------------------------------------- arms

@dataclass(frozen=True)
class Settings:
    """What the arms depend on."""
    n: int
    times: list[float]                            # of the teacher's grid
    m: int                                        # steps of table3, fig8, fig9
    m_config: int                                 # the config's own steps
    ladder: list[int]                             # steps
    seeds: int
    baseline_seeds: int
    iterations: int
    clips: bool                                   # whether the small world's clips are there


def full_arm(s: Settings, m: int, seeds: int) -> Arm:
    """The whole method with m steps. Its export over iterations serves fig9."""
    options = [key_option(even_key(s.n, m))]
    if m == s.m:
        options.append(f"export_every={fig9_every(s)}")
    return Arm(f"full-m{m}", "L_traj + L_adv, a head per timestep", m, tuple(options), seeds)


def fig9_every(s: Settings) -> int:
    """Iterations between two points of fig9."""
    return max(1, s.iterations // 4)


def fig9_iterations(s: Settings) -> list[int | None]:
    """Where fig9 looks; None is the end."""
    every = fig9_every(s)
    return [*range(every, s.iterations, every), None]


def baseline_arms(s: Settings) -> list[Arm]:
    """Other families of methods on data: on clips where there are any, on samples everywhere."""
    key = key_option(even_key(s.n, s.m))
    return [Arm(f"{method}-{data}", f"{METHODS[method]} on {DATA[data]}", s.m,
                (key, f"method={method}", f"data={data}"), s.baseline_seeds, "tools.baselines")
            for method in METHODS for data in (DATA if s.clips else ("samples",))]


def arms_of(table: str, s: Settings) -> list[Arm]:
    """The runs that a table or figure needs."""
    key = key_option(even_key(s.n, s.m))
    traj = Arm(f"traj-m{s.m}", "L_traj alone", s.m, (key, "adv=false"), s.seeds)
    shared = Arm(f"shared-m{s.m}", "L_traj + L_adv, one shared head", s.m, (key, "heads=shared"),
                 s.seeds)
    adv = Arm(f"adv-m{s.m}", "L_adv alone", s.m,
              (key, "traj=false", f"export_every={fig9_every(s)}"), s.seeds)
    full = full_arm(s, s.m, s.seeds)
    if table == "table3":
        return [traj, shared, full, *baseline_arms(s)]
    if table == "table4":
        return [arm for m in dict.fromkeys((s.m_config, s.m)) for arm in (
            full_arm(s, m, s.seeds),
            Arm(f"uniform-m{m}", "uniform key timesteps", m,
                (key_option(uniform_key(s.times, m)),), s.seeds))]
    if table == "fig8":
        return [traj, full]
    if table == "fig9":
        return [adv, full]
    if table == "ladder":
        return [full_arm(s, m, 1) for m in s.ladder]
    return []


def evaluations_of(table: str, s: Settings, plan: Plan) -> dict[str, tuple]:
    """What a table or figure needs measured: {folder: (label, students' files, their names)}."""
    arms = arms_of(table, s)
    if table == "ladder":
        files = [student_file(plan, arm, 0) for arm in arms]
        return {"ladder": ("ladder", files, ["student"] * len(files))}
    if table == "fig8":
        return {"fig8": ("fig8", [student_file(plan, arm, 0) for arm in arms],
                         ["L_traj alone", "full"])}
    if table == "fig9":
        return {f"{arm.name}-at-{it or s.iterations}": (
            f"{arm.label}, iteration {it or s.iterations}",
            [student_file(plan, arm, seed, it) for seed in range(arm.seeds)], None)
            for arm in arms for it in fig9_iterations(s)}
    return {arm.name: (arm.label, [student_file(plan, arm, seed) for seed in range(arm.seeds)],
                       None) for arm in arms}


# ---------------------------------------------------------------------------------- sections

@dataclass
class Section:
    """A table or figure as it is shown: Markdown lines, pictures, and all its numbers."""
    title: str
    lines: list[str]
    numbers: dict
    pictures: list[Path] = field(default_factory=list)


def numbers_of(arms: dict[str, Measured], claims: list[dict]) -> dict:
    """Every per-seed row of the arms, and the claims."""
    return {"arms": {name: {"label": arm.label, "m": arm.m, "command": arm.command,
                            "teacher": [arm.best, arm.few], "seeds": arm.rows}
                     for name, arm in arms.items()}, "claims": claims}


def draw_bars(path: Path, arms: list[Measured], few: dict, title: str) -> None:
    """A panel for each measure with a bar for each arm, ± standard error; teacher@m dashed."""
    from matplotlib.figure import Figure

    panels = {"endpoint": "endpoint error", "sliced": "sliced W − teacher's", "hf": "HF",
              "spread": "spread", "c2st": "C2ST"}
    figure = Figure((3.0 * len(panels), 1.6 + 0.34 * len(arms)), dpi=120, layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True)
    for axes, (name, heading) in zip(grid, panels.items(), strict=True):
        zero = few["zero"]["sliced"][0] if name == "sliced" else 0.0
        found = [mean_error([row[name][0] - zero for row in arm.rows]) for arm in arms]
        axes.barh(range(len(arms)), [mean for mean, _ in found],
                  xerr=[error or 0.0 for _, error in found], color="#2f6db3", capsize=2)
        axes.axvline(few[name][0] - zero, color="#d98032", ls="--")
        if name in ("hf", "spread", "c2st"):
            axes.axvline(0.5 if name == "c2st" else 1.0, color="#8a8f98", lw=1)
        axes.set_title(heading, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_yticks(range(len(arms)), [f"{arm.label}, m = {arm.m}" for arm in arms], fontsize=8)
    grid[0].invert_yaxis()
    figure.suptitle(f"{title}; dashed: {few['label']}, grey: the slow teacher", fontsize=10)
    replace_file(path, lambda aside: figure.savefig(aside, format="png"))


def table_section(title: str, plan: Plan, s: Settings, table: str,
                  claims_of: Callable[[dict[str, Measured]], list[dict]]) -> Section:
    """A table of arms with its claims; `claims_of` gets the arms by name."""
    arms = {arm.name: read_measured(plan, arm.name, arm.label) for arm in arms_of(table, s)}
    claims = claims_of(arms)
    lines, pictures = [], []
    for m in dict.fromkeys(arm.m for arm in arms.values()):
        own = [arm for arm in arms.values() if arm.m == m]
        fews = {str(arm.few["endpoint"]): arm for arm in own}  # one for each set of key timesteps
        few_rows = [arm.few if len(fews) == 1 else
                    arm.few | {"label": f"{arm.few['label']}, {arm.label}"}
                    for arm in fews.values()]
        lines += [*table_lines([own[0].best, *few_rows], own), ""]
        pictures.append(plan.folder / f"{table}-m{m}.png")
        draw_bars(pictures[-1], own, own[0].few | {"zero": own[0].best}, title)
    return Section(title, [*lines, *claim_lines(claims)], numbers_of(arms, claims), pictures)


def table3(plan: Plan, s: Settings) -> Section:
    """The parts of the method, and other families of methods on data."""
    def claims_of(arms: dict[str, Measured]) -> list[dict]:
        traj, shared, full = (arms[f"{name}-m{s.m}"] for name in ("traj", "shared", "full"))
        claims = [claim("one shared head nearer than L_traj alone", shared, traj),
                  claim("a head per timestep nearer than L_traj alone", full, traj),
                  claim("a head per timestep nearer than one shared head", full, shared)]
        for arm in baseline_arms(s):
            claims.append(claim(f"full nearer than {arm.label}", full, arms[arm.name]))
        for method, label in METHODS.items() if s.clips else ():
            claims.append(claim(f"{label} on matched clips nearer than on mismatched",
                                arms[f"{method}-matched"], arms[f"{method}-mismatched"]))
        return claims

    return table_section(f"Table 3: the parts of the method, and other methods on data, m = {s.m}",
                         plan, s, "table3", claims_of)


def table4(plan: Plan, s: Settings) -> Section:
    """The chosen key timesteps against uniform ones."""
    def claims_of(arms: dict[str, Measured]) -> list[dict]:
        return [claim(f"chosen key timesteps nearer than uniform ones, m = {m}", arms[f"full-m{m}"],
                      arms[f"uniform-m{m}"]) for m in dict.fromkeys((s.m_config, s.m))]

    return table_section("Table 4: which key timesteps", plan, s, "table4", claims_of)


def fig8(plan: Plan, s: Settings) -> Section:
    """Pictures of teacher@m, L_traj alone and the whole method."""
    measured = read_measured(plan, "fig8", "seed 0")
    return Section(f"Figure 8: what one sees, m = {s.m}, seed 0",
                   table_lines([measured.best, measured.few, *measured.rows], []),
                   {"rows": [measured.best, measured.few, *measured.rows]},
                   [plan.folder / "fig8/evaluate/ladder.png"])


def fig9(plan: Plan, s: Settings) -> Section:
    """L_adv alone against the whole method, over iterations."""
    from matplotlib.figure import Figure

    arms, points = {}, [it or s.iterations for it in fig9_iterations(s)]
    for arm in arms_of("fig9", s):
        for it in points:
            arms[f"{arm.name}-at-{it}"] = read_measured(
                plan, f"{arm.name}-at-{it}", f"{arm.label}, iteration {it}")
    adv, full = (arms[f"{arm.name}-at-{s.iterations}"] for arm in arms_of("fig9", s))
    claims = [claim("with L_traj nearer than L_adv alone, at the end", full, adv)]
    panels = {"endpoint": "endpoint error", "hf": "HF", "spread": "spread", "c2st": "C2ST"}
    figure = Figure((3.4 * len(panels), 3.2), dpi=120, layout="constrained")
    for axes, (name, heading) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for arm, colour in zip(arms_of("fig9", s), ("#b3402f", "#2f6db3"), strict=True):
            found = [mean_error([row[name][0] for row in arms[f"{arm.name}-at-{it}"].rows])
                     for it in points]
            axes.errorbar(points, [mean for mean, _ in found], [error or 0 for _, error in found],
                          color=colour, marker="o", capsize=3, label=arm.label)
        axes.axhline(adv.few[name][0], color="#d98032", ls="--", label=adv.few["label"])
        axes.set(title=heading, xlabel="iteration")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=7)
    path = plan.folder / "fig9.png"
    replace_file(path, lambda aside: figure.savefig(aside, format="png"))
    lines = [*table_lines([adv.best, adv.few], arms.values()), "", *claim_lines(claims)]
    return Section(f"Figure 9: L_adv alone, m = {s.m}", lines, numbers_of(arms, claims), [path])


def ladder(plan: Plan, s: Settings) -> Section:
    """Teacher and student with fewer and fewer steps: pictures and the curve."""
    from matplotlib.figure import Figure

    measured = read_measured(plan, "ladder", "seed 0")
    rows = [measured.few, *measured.rows]
    figure = Figure((7, 3.4), dpi=120, layout="constrained")
    panels = {"endpoint": "endpoint error", "hf": "HF, 1 = slow teacher's"}
    for axes, (name, heading) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for who, colour in (("teacher", "#d98032"), ("student", "#2f6db3")):
            own = [row for row in rows if row["label"].startswith(who)]
            axes.errorbar([int(row["label"].split("@")[1]) for row in own],
                          [row[name][0] for row in own], [row[name][1] for row in own],
                          color=colour, marker="o", capsize=3, label=who)
        axes.set(title=heading, xlabel="steps", xticks=s.ladder)
        axes.invert_xaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend()
    path = plan.folder / "ladder.png"
    replace_file(path, lambda aside: figure.savefig(aside, format="png"))
    return Section("The ladder: fewer and fewer steps, seed 0",
                   table_lines([measured.best, *rows], []), {"rows": [measured.best, *rows]},
                   [plan.folder / "ladder/evaluate/ladder.gif", path])


def fig5(plan: Plan, prompts: list[str]) -> Section:
    """How long the prompts of SynVid are."""
    from matplotlib.figure import Figure

    lengths = sorted(len(text.split()) for text in prompts)
    figure = Figure((5, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=min(40, max(lengths) - min(lengths) + 1), color="#2f6db3")
    axes.set(xlabel="words of a prompt", ylabel="prompts")
    path = plan.folder / "fig5.png"
    replace_file(path, lambda aside: figure.savefig(aside, format="png"))
    tenths = {f"{part} %": lengths[round(part / 100 * (len(lengths) - 1))]
              for part in (0, 10, 50, 90, 100)}
    lines = ["| prompts | different | " + " | ".join(f"{name} have at most" for name in tenths)
             + " |", "|---" * (len(tenths) + 2) + "|",
             f"| {len(lengths)} | {len(set(prompts))} | "
             + " | ".join(f"{words} words" for words in tenths.values()) + " |"]
    return Section("Figure 5: lengths of the prompts", lines,
                   {"prompts": len(lengths), "different": len(set(prompts)), "words": tenths},
                   [path])


def fig6(plan: Plan) -> Section:
    """What blocks of the teacher tell, by taps.py."""
    found = read_json(plan.folder / "fig6/taps/taps.json",
                      {"found": [{"block": int, "k": int, "probe": NUMBER, "head": NUMBER}]})
    ks = sorted({entry["k"] for entry in found["found"]}, reverse=True)
    lines = ["| block | " + " | ".join(f"t'_{k}: probe, head" for k in ks) + " |",
             "|---" * (len(ks) + 1) + "|"]
    for block in dict.fromkeys(entry["block"] for entry in found["found"]):
        own = {entry["k"]: entry for entry in found["found"] if entry["block"] == block}
        cells = [f"{own[k]['probe']:.2f}, {own[k]['head']:.2f}"
                 + (" (D7)" if found["D7"][k] == block else "") for k in ks]
        lines.append(f"| {block} | " + " | ".join(cells) + " |")
    return Section("Figure 6: what the teacher's features tell of few-step latents", lines,
                   {"D7": found["D7"], "found": found["found"]},
                   [plan.folder / "fig6/taps/taps.png"])


# -------------------------------------------------------------------------------------- page

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 80rem; font: 16px/1.5 system-ui, sans-serif; }}
img {{ max-width: 100%; background: #fff; padding: 6px; box-sizing: border-box; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }}
td {{ padding: .3rem .5rem; border-bottom: 1px solid #8886; vertical-align: top; }}
td:first-child {{ font-weight: 600; }} h2 {{ margin-top: 2.2rem; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def write_report(plan: Plan, sections: dict[str, Section], facts: dict) -> Path:
    """paper.json, paper.md and report.html in the plan's folder; returns the page's path."""
    title, out = "The paper's tables and figures on this teacher", plan.folder
    write_json(out / "paper.json", {**facts, **{name: section.numbers for name, section
                                                in sections.items()}})
    told = f"`{facts['command']}`; {facts['device']}, {facts['seconds']} s in this call."
    text, body = [f"# {title}", "", told, "", HOW_TO_READ], [html_of(f"{told}\n\n{HOW_TO_READ}")]
    for section in sections.values():
        text += ["", f"## {section.title}", ""]
        body.append(f"<h2>{section.title}</h2>")
        for picture in section.pictures:
            text += [f"![{section.title}]({picture.relative_to(out)})", ""]
            body.append(f'<div class="wide"><img alt="{section.title}" src="{data_uri(picture)}">'
                        "</div>")
        text += section.lines
        body.append(html_of("\n".join(section.lines)))
    write_text(out / "paper.md", "\n".join(text) + "\n")
    write_text(out / "report.html", PAGE.format(title=title, body="\n".join(body)))
    return out / "report.html"
