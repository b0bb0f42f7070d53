"""Settings: what a config file says, what the command line changes, what is wrong with either.

A stage's Config is a dataclass that extends `Shared`. Its defaults, then its YAML file, then the
command line decide a value; every key is known, typed and explained by --help.
"""

import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml

from common.files import ROOT, read_text, remove_leftovers, abbreviate, write_text

STAGES = ("teacher", "synvid", "distill", "sample", "evaluate", "paper", "lora", "bench")


def field(default: Any, help: str, within: str | None = None) -> Any:
    """A dataclass field with its help text (meaning and unit); lists are copied.

    within: the interval of its numbers, as "[1, inf)" or "(0, 1]", which load_config checks.
    """
    about = {"help": help, "within": within}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


@dataclass
class Shared:
    """What all stages of a run agree on: the top level of a YAML file."""
    family: Literal["wan", "hunyuan"] = field("wan", "network family")
    preset: str = field("tiny", "sizes of the DiT, a name of model.PRESETS")
    weights: str = field("assets/tiny", "teacher: an official or a diffusers folder")
    run: str = field("runs/tiny", "folder for everything this run makes")
    height: int = field(48, "pixels, a multiple of 16", "[16, 16384]")
    width: int = field(48, "pixels, a multiple of 16", "[16, 16384]")
    frames: int = field(9, "video frames, 4n + 1", "[1, 100000]")
    fps: float = field(8, "frames per second of the videos written", "(0, 1000]")
    n: int = field(50, "steps of the teacher's grid", "[1, 10000]")
    shift: float = field(7.0, "time shift of the teacher's grid", "(0, 1000]")
    cfg_scale: float = field(1.0, "teacher's classifier-free guidance; 1 = one evaluation a step",
                             "[0, 1000]")
    embedded_guidance: float = field(6.016, "HunyuanVideo's; its release's 6 acts as 6.016",
                                     "[0, 1000]")
    negative_prompt: str = field("", "text of the teacher's unconditional branch")
    key: list[int] = field([0, 10, 20, 30, 40, 50], "key timesteps as indices into that grid")
    seed: int = field(0, "base seed of everything drawn")
    device: str = field("auto", "cpu, cuda, or auto: a GPU if there is one")
    attention: Literal["auto", "flash", "cudnn"] = field("auto", "kernels a GPU tries first; auto: "
                                                         "cudnn on Hopper, else flash")

    def __post_init__(self) -> None:
        # No settings: where the values come from, for a person and for another stage.
        self.origin, self.path = "the defaults", ROOT / "configs/tiny.yaml"


def nearest(name: str, names: Any) -> str:
    """ "; did you mean …?" with the closest of the names, or nothing."""
    close = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def check_within(value: Any, interval: str | None, key: str, where: str) -> None:
    """Raise ValueError for a number, or one of a list, that is outside of its field's interval."""
    if interval is None or value is None:
        return
    low, high = map(float, interval[1:-1].split(","))
    for number in value if isinstance(value, list) else [value]:
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        if not (above and below):
            raise ValueError(f"{where}: {key}: got {number}; wanted {words_of(interval, key)}")


def words_of(interval: str, key: str) -> str:
    """An interval in words: 1 or more, more than 0, 0 ≤ beta1 < 1."""
    low, high = (end.strip() for end in interval[1:-1].split(","))
    if high == "inf":
        return f"{low} or more" if interval[0] == "[" else f"more than {low}"
    signs = {"[": "≤", "]": "≤", "(": "<", ")": "<"}
    return f"{low} {signs[interval[0]]} {key} {signs[interval[-1]]} {high}"


def coerce(value: Any, kind: Any, key: str, where: str) -> Any:
    """A value of YAML or the command line as its field's type. Raises ValueError naming the key."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None or value in ("none", "null", "~", ""):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    wanted = " | ".join(choices) or (str(kind) if typing.get_origin(kind) else kind.__name__)
    try:
        if choices:
            if value not in choices:
                raise ValueError
            return value
        if typing.get_origin(kind) is list:
            items = value.replace(",", " ").split() if isinstance(value, str) else value
            if not isinstance(items, list):
                raise ValueError
            return [coerce(v, typing.get_args(kind)[0], key, where) for v in items]
        if kind is bool:
            if str(value).lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
                raise ValueError
            return str(value).lower() in ("true", "1", "yes", "on")
        if value is None or isinstance(value, (dict, list)) or isinstance(value, bool):
            raise ValueError
        if kind is int:
            if len(str(value)) > 40 or re.match(r"[+-]?0\d", str(value)):  # 010 is 8 to some
                raise ValueError
            mantissa, _, power = str(value).lower().partition("e")
            if power and abs(int(power)) > 30:  # Fraction would write it out
                raise ValueError
            number = Fraction(str(value))  # reads 1e3 too, and any size exactly
            if number.denominator != 1:
                raise ValueError
            return int(number)
        out = kind(value)
        if kind is float and not math.isfinite(out):
            raise ValueError
        return out
    except (ValueError, TypeError, OverflowError) as e:
        raise ValueError(f"{where}: {key}: got {abbreviate(value)}; wanted {wanted}") from e


class PlainLoader(yaml.SafeLoader):
    """YAML as people mean it: whole and decimal numbers, true, false and null; all else stays text,
    where YAML itself reads 010 as 8, 1:30 as 90 and 2026-01-01 as a date. No key twice."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if (name := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{name:.80}' is given twice: keep one", node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


for tag, pattern in (
        ("bool", "true|True|TRUE|false|False|FALSE|yes|no|on|off"), ("null", "~|null|Null|NULL|"),
        ("int", "[-+]?(0|[1-9][0-9]*)"), ("float", r"[-+]?\.inf|\.nan"),
        ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")):
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^({pattern})$"),
                                      None)


def load_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises ValueError naming it when it is none."""
    text = read_text(path, 1 << 18)  # its parser takes a second for each 100 KB
    try:
        return yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError,
            OverflowError) as e:  # PyYAML has many for a value that its tag does not fit
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"{path}: is not valid YAML: {reason:.300}: correct it") from e


NO_SUCH = "; remove it; --help lists all"


def read_yaml(path: Path, stage: str, fields: dict) -> dict:
    """A config file's shared keys and those of one stage. Raises ValueError naming a wrong key."""
    if not path.is_file():
        near = nearest(path.name, [p.name for p in (ROOT / "configs").glob("*.yaml")])
        raise FileNotFoundError(f"{path}: no such config{near}; the shipped ones are in configs/")
    data = load_yaml(path) or {}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: got {abbreviate(data)}; wanted keys with values")
    shared = {f.name for f in dataclasses.fields(Shared)}
    own = data.get(stage) or {}
    if not isinstance(own, dict):
        raise ValueError(f"{path}: {stage}: got {abbreviate(own)}; wanted keys with values")
    for key in data:
        if key not in shared and key not in STAGES:
            near = nearest(str(key), [*shared, *STAGES])
            raise ValueError(f"{path}: unknown key '{key!s:.80}'{near or NO_SUCH}")
    for key in own:
        if key not in fields:
            near = nearest(str(key), fields)
            raise ValueError(f"{path}: unknown key '{stage}.{key!s:.80}'{near or NO_SUCH}")
    return {**{k: v for k, v in data.items() if k in shared}, **own}


def print_help(cfg: Any, script: str, doc: str) -> None:
    """Print a stage's docstring and each field with its value and meaning."""
    print(f"{doc.strip()}\n\nusage: python {script} [CONFIG] [--field value | field=value]\n"
          f"in brackets: the values of {cfg.origin}\n")
    kinds = typing.get_type_hints(type(cfg))
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        kind = kinds[f.name]
        choices = " | ".join(typing.get_args(kind)) if "Literal" in str(kind) else ""
        limits = f"; {words_of(within, f.name)}" if (within := f.metadata["within"]) else ""
        print(f"  --{f.name:<18} {choices}{': ' if choices else ''}{f.metadata['help']}{limits} "
              f"[{'none' if value is None else value}]")


def names_config(args: list[str]) -> bool:
    """Whether a command line starts with a config file, not with an override."""
    return bool(args) and not args[0].startswith("-") and "=" not in args[0]


def load_config(cls: type, stage: str, argv: list[str] | None = None, doc: str = "",
                script: str | None = None) -> Any:
    """A stage's Config from a YAML file (default configs/tiny.yaml) and overrides of its fields.

    Args: cls, the stage's dataclass (a Shared); stage, its section's name; argv without program
    name; doc, shown by --help with the name of the script (none: the stage's). An override is
    `--field value`, `--field=value` or `field=value` (the one that torchrun's own parser leaves
    alone); a bare --flag sets a bool field. Relative paths are the user's. Raises ValueError
    naming the key, what was got and the nearest known key.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    fields = typing.get_type_hints(cls)
    wants_help = "--help" in args or "-h" in args
    named = names_config(args)
    path = Path(args.pop(0)) if named else ROOT / "configs/tiny.yaml"
    values = read_yaml(path, stage, fields) if named or not wants_help else {}
    where, given = dict.fromkeys(values, str(path)), {}
    while args:
        arg = args.pop(0)
        if arg in ("--help", "-h"):
            continue
        name, equals, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not (arg.startswith("--") or equals) or name not in fields:
            near = nearest(name, fields)
            raise ValueError(f"command line: unknown option {abbreviate(arg)}{near}; see --help")
        if not equals and fields[name] is bool and (not args or args[0].startswith("--")):
            value = True
        elif not equals:
            if not args:
                raise ValueError(f"command line: {abbreviate(arg)}: got nothing; wanted a value")
            value = args.pop(0)
        given[name], where[name] = value, "command line"
    values = {k: coerce(v, fields[k], k, where[k]) for k, v in {**values, **given}.items()}
    for f in dataclasses.fields(cls):
        if f.name in values:
            check_within(values[f.name], f.metadata["within"], f.name, where[f.name])
    cfg = cls(**{k: os.path.expanduser(v) if k in PATHS and v else v for k, v in values.items()})
    for name in PATHS & fields.keys() - given.keys():  # what is shipped is there from everywhere
        value = getattr(cfg, name)
        if value and value.startswith("assets/") and not Path(value).exists():
            setattr(cfg, name, str(ROOT / value))
    cfg.path = path
    start = str(path) if named or not wants_help else cfg.origin
    cfg.origin = "  ".join([start, *(f"{name}={getattr(cfg, name)}" for name in given)])
    if wants_help:
        own = "-m small_world.teacher" if stage == "teacher" else f"{stage}.py"
        print_help(cfg, script or own, doc)
        raise SystemExit(0)
    own = Path(cfg.run) / "teacher/weights"  # where stage 0 of the same config writes
    if stage not in ("teacher", "bench") and Path(cfg.weights) == own and not own.exists():
        raise FileNotFoundError(f"{own}: there is no teacher yet; train it by `python -m "
                                f"small_world.teacher {path}`")
    return cfg


OLD = 3600.0  # seconds without a write after which a half-written file is a killed process's


def announce(cfg: Any, stage: str, rank: int = 0) -> Path:
    """On the first rank, print where the settings come from and save them all as
    <run>/<stage>/config.yaml; returns that folder."""
    folder = Path(cfg.run) / stage
    if rank == 0:
        print(f"{stage}: {cfg.origin}; all settings: {folder / 'config.yaml'}", flush=True)
        text = yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False, allow_unicode=True)
        write_text(folder / "config.yaml", text)
        remove_leftovers(folder, OLD)
    return folder


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `announce` saved; empty if they cannot be read."""
    try:
        values = load_yaml(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


# Where things lie may differ from rank to rank; what they hold may not.
PATHS = {"run", "weights", "synvid", "prompts", "prompt_file", "image", "student", "students",
         "out", "base", "teacher_samples", "clips", "vbench", "vbench_prompts",
         "vbench_flickering", "vbench_scores", "how"}
LOCAL = PATHS | {"device"}


def settings_to_compare(cfg: Any, **contents: Any) -> dict[str, Any]:
    """What all ranks must agree on: every setting but where files lie, and what those hold."""
    values = dataclasses.asdict(cfg)
    return {name: values[name] for name in values if name not in LOCAL} | contents
