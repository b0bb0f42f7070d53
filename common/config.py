"""Settings: defaults, overridden by a YAML file, overridden by the command line.

A stage's Config is a dataclass that extends `Shared`. Every key is known, typed, checked against
its interval and explained by --help.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml

from common.files import ROOT, abbreviate, read_text, remove_leftovers, write_text

STAGES = ("teacher", "synvid", "distill", "sample", "evaluate", "paper", "lora", "bench")


def field(default: Any, help: str, within: str | None = None) -> Any:
    """A dataclass field with its help text (meaning and unit); a list is copied.

    within: the interval of its numbers, as "[1, inf)" or "(0, 1]", which load_config checks.
    """
    metadata = {"help": help, "within": within}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Shared:
    """The settings that all stages of a run share: the top level of a YAML file."""
    family: Literal["wan", "hunyuan"] = field("wan", "network family")
    preset: str = field("tiny", "sizes of the DiT, a name of model.PRESETS")
    weights: str = field("assets/tiny", "the teacher's folder, or a YAML file that names its files")
    run: str = field("runs/tiny", "folder for everything this run makes")
    height: int = field(48, "pixels, a multiple of 16", "[16, 16384]")
    width: int = field(48, "pixels, a multiple of 16", "[16, 16384]")
    frames: int = field(9, "video frames, 4n + 1", "[1, 100000]")
    fps: float = field(8, "frames per second of the videos written", "(0, 1000]")
    n: int = field(50, "steps of the teacher's grid", "[1, 10000]")
    shift: float = field(7.0, "time shift of the teacher's grid", "(0, 1000]")
    cfg_scale: float = field(1.0, "teacher's guidance; 1: one evaluation per step", "[0, 1000]")
    cfg_scale_low: float | None = field(None, "guidance of the expert for low noise, for a teacher "
                                        "with two (Wan 2.2 A14B); default cfg_scale", "[0, 1000]")
    embedded_guidance: float = field(6.016, "HunyuanVideo's guidance, an input of its DiT; the 6 "
                                     "of its release acts as 6.016", "[0, 1000]")
    negative_prompt: str = field("", "text of the teacher's unconditional branch")
    key: list[int] = field([0, 10, 20, 30, 40, 50], "key timesteps, indices in the teacher's grid")
    seed: int = field(0, "base seed of all random numbers")
    device: str = field("auto", "cpu, cuda, or auto: a GPU if there is one")
    attention: Literal["auto", "flash", "cudnn"] = field(
        "auto", "kernels that attention on a GPU tries first; auto: cudnn on Hopper, else flash")

    # Not fields, since they have no types: where the values come from, for messages and stages.
    origin, path = "the defaults", ROOT / "configs/tiny.yaml"

    @property
    def guidance(self) -> float | list[float]:
        """The scale of classifier-free guidance, or those of two experts, high noise first."""
        low = self.cfg_scale_low
        return self.cfg_scale if low in (None, self.cfg_scale) else [self.cfg_scale, low]


def as_options(values: dict[str, Any]) -> list[str]:
    """Settings as words of a command line; those that are None are left out."""
    return [f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in values.items() if value is not None]


def nearest(name: str, names: Any) -> str:
    """"; did you mean …?" with the closest of the names, or ""."""
    close = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def check_within(value: Any, interval: str | None, key: str, where: str) -> None:
    """Raise ValueError for a number, or one of a list, that is outside its field's interval."""
    if interval is None or value is None:
        return
    low, high = map(float, interval[1:-1].split(","))
    for x in value if isinstance(value, list) else [value]:
        if not low <= x <= high or x == low and "(" in interval or x == high and ")" in interval:
            raise ValueError(f"{where}: {key}: expected a number in {interval}, got {x}")


BOOLEANS = {**dict.fromkeys(("true", "1", "yes", "on"), True),
            **dict.fromkeys(("false", "0", "no", "off"), False)}
# Integers of any size, and 1e3 or 2.0; not 010, which some programs read as 8. The length is
# limited because Fraction expands powers.
INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,39})(\.[0-9]{0,39})?([eE][+-]?[0-9]{1,2})?")
DECIMAL = re.compile(r"[+-]?(0|[1-9][0-9]*|(?=\.[0-9]))(\.[0-9]*)?([eE][+-]?[0-9]+)?")


def coerce(value: Any, kind: Any, key: str, where: str) -> Any:
    """A value of YAML or the command line as its field's type. Raises ValueError naming the key."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # X | None
        is_none = str(value).lower() in ("none", "null", "~", "")
        return None if is_none else coerce(value, arguments[0], key, where)
    if origin is list and isinstance(value, str):
        value = value.strip("[]").replace(",", " ").split()  # [0, 25, 50] as in a file, or 0,25,50
    if origin is list and isinstance(value, list):
        return [coerce(item, arguments[0], key, where) for item in value]
    if origin is Literal and value in arguments:
        return value
    text = str(value) if isinstance(value, str | int | float) else ""  # of a list, str may be huge
    with contextlib.suppress(ValueError, KeyError, OverflowError):
        if kind is bool:
            return BOOLEANS[text.lower()]
        if kind is str and (text or value == "") and not isinstance(value, bool):
            return text
        if kind is float and DECIMAL.fullmatch(text.strip()) and math.isfinite(x := float(text)):
            return x
        if kind is int and INTEGER.fullmatch(text) and (x := Fraction(text)).denominator == 1:
            return int(x)
    name = " | ".join(arguments) if origin is Literal else str(kind) if origin else kind.__name__
    raise ValueError(f"{where}: {key}: expected {name}, got {abbreviate(value)}")


# JSON's scalars, of which an empty text and ~ are null, too.
JSON_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null|~|")


class PlainLoader(yaml.BaseLoader):
    """YAML whose scalars are numbers, true, false and null as JSON writes them; others stay text,
    where YAML itself reads 010 as 8, 1:30 as 90 and 2026-01-01 as a date. Tags have no effect."""

    def construct_scalar(self, node: yaml.Node) -> Any:
        text = super().construct_scalar(node)
        if node.style is None and JSON_SCALAR.fullmatch(text):  # without quotes
            return json.loads("null" if text in ("", "~") else text)
        return text

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            [(name, _)] = Counter(str(key.value) for key, _ in node.value).most_common(1)
            raise ValueError(f"key '{name:.80}' is given twice: keep one")
        return values


def load_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises ValueError naming the file if it is not valid."""
    text = read_text(path, 1 << 18)  # parsing takes a second per 100 KB
    try:
        return yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"{path}: is not valid YAML: {reason:.300}: correct it") from e


def check_keys(keys: Iterable[Any], known: Iterable[str], where: str, prefix: str = "") -> None:
    """Raise ValueError naming a key that is not known, and the nearest one."""
    for key in keys:
        if key not in known:
            raise ValueError(f"{where}: unknown key '{prefix}{key!s:.80}'"
                             f"{nearest(str(key), known) or '; remove it; --help lists all'}")


def read_yaml(path: Path, stage: str, fields: dict) -> dict:
    """A config file's shared keys and those of one stage. Raises ValueError naming a wrong key."""
    if not path.is_file():
        near = nearest(path.name, [p.name for p in (ROOT / "configs").glob("*.yaml")])
        raise FileNotFoundError(f"{path}: no such config{near}; the shipped ones are in configs/")
    data = load_yaml(path) or {}
    section = data.get(stage) or {} if isinstance(data, dict) else {}
    for part, name in ((data, ""), (section, f" {stage}:")):
        if not isinstance(part, dict):
            raise ValueError(f"{path}:{name} expected keys with values, got {abbreviate(part)}")
    shared = [f.name for f in dataclasses.fields(Shared)]
    for key in data:
        if key in fields and key not in (*shared, *STAGES):
            raise ValueError(f"{path}: {key}: is a setting of one stage: indent it under {stage}:")
    check_keys(data, [*shared, *STAGES], str(path))
    check_keys(section, fields, str(path), f"{stage}.")
    return {**{key: data[key] for key in shared if key in data}, **section}


def print_help(cfg: Any, script: str, doc: str) -> None:
    """Print a stage's docstring and each field with its value and meaning."""
    print(f"{doc.strip()}\n\nusage: python {script} [CONFIG] [--field value | field=value]\n"
          f"the value in brackets at the end of each line is that of {cfg.origin}\n")
    for f in dataclasses.fields(cfg):
        value, kind = getattr(cfg, f.name), typing.get_type_hints(type(cfg))[f.name]
        choices = " | ".join(typing.get_args(kind)) + ": " if "Literal" in str(kind) else ""
        limits = f"; within {f.metadata['within']}" if f.metadata["within"] else ""
        print(f"  --{f.name:<18} {choices}{f.metadata['help']}{limits} "
              f"[{'none' if value is None else value}]")


def parse_options(args: list[str], fields: dict) -> dict[str, Any]:
    """The overrides of a command line by field. Raises ValueError naming an unknown option."""
    given, args = {}, [arg for arg in args if arg not in ("--help", "-h")]
    while args:
        arg = args.pop(0)
        name, equals, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not (arg.startswith("--") or equals) or name not in fields:
            raise ValueError(f"command line: unknown option {abbreviate(arg)}"
                             f"{nearest(name, fields)}; see --help")
        is_bare = fields[name] is bool and (not args or args[0].lower() not in BOOLEANS)
        if not equals and not is_bare and not args:
            raise ValueError(f"command line: {abbreviate(arg)}: expected a value, got nothing")
        given[name] = value if equals else True if is_bare else args.pop(0)
    return given


def load_config(cls: type, stage: str, argv: list[str] | None = None, doc: str = "",
                script: str | None = None) -> Any:
    """A stage's Config from a YAML file (default configs/tiny.yaml) and overrides of its fields.

    Args: cls, the stage's dataclass, a Shared; stage, the name of its section; argv without the
    program's name; doc and script, the docstring and command that --help prints. An override is
    `--field value`, `--field=value` or `field=value` (the form that torchrun's own parser ignores);
    `--field` alone sets a bool. Relative paths are relative to the working directory.
    Raises ValueError naming the key, its value and the nearest known key.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    fields = typing.get_type_hints(cls)
    wants_help = "--help" in args or "-h" in args
    named = args and not args[0].startswith("-") and "=" not in args[0]
    path = Path(args.pop(0)) if named else ROOT / "configs/tiny.yaml"
    given = parse_options(args, fields)
    values = read_yaml(path, stage, fields) | given
    for f in dataclasses.fields(cls):
        if f.name in values:
            where = "command line" if f.name in given else str(path)
            values[f.name] = coerce(values[f.name], fields[f.name], f.name, where)
            check_within(values[f.name], f.metadata["within"], f.name, where)
    cfg = cls(**values)
    for name in paths_of(cls):
        if value := getattr(cfg, name):
            value = ",".join(map(os.path.expanduser, value.split(",")))  # students are several
            if name not in given and value.startswith("assets/") and not Path(value).exists():
                value = str(ROOT / value)  # shipped files are found from any directory
            setattr(cfg, name, value)
    cfg.path, cfg.given = path, given
    cfg.origin = "  ".join([str(path), *(f"{name}={getattr(cfg, name)}" for name in given)])
    if wants_help:
        print_help(cfg, script or f"{stage}.py", doc)
        raise SystemExit(0)
    trained = Path(cfg.run) / "teacher/weights"  # where stage 0 of the same config writes
    if stage not in ("teacher", "bench") and Path(cfg.weights) == trained and not trained.exists():
        raise FileNotFoundError(f"{trained}: make it by `python -m small_world.teacher {path}`")
    return cfg


def announce(cfg: Any, stage: str, rank: int = 0) -> Path:
    """Print where the settings come from and save them as <run>/<stage>/config.yaml, on the first
    rank; returns that folder."""
    folder = Path(cfg.run) / stage
    if rank == 0:
        print(f"{stage}: {cfg.origin}; all settings: {folder / 'config.yaml'}")
        text = yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False, allow_unicode=True)
        write_text(folder / "config.yaml", text)
        remove_leftovers(folder, 3600.0)  # an hour without a write: its process was killed
    return folder


# Paths may differ from rank to rank; the contents of the files may not. (The `lora` of distill.py,
# an integer, is not a path.)
PATHS = {"run", "weights", "synvid", "prompts", "prompt_file", "image", "student", "students",
         "lora", "out", "base", "teacher_samples", "clips", "how", "high_student"}


def paths_of(cls: type) -> set[str]:
    """The fields of a stage's Config that are paths."""
    return {name for name, kind in typing.get_type_hints(cls).items()
            if name in PATHS and kind in (str, str | None)}


def settings_to_compare(cfg: Any) -> dict[str, Any]:
    """The settings that all ranks must agree on: all but paths and the device."""
    others = paths_of(type(cfg)) | {"device"}
    return {name: x for name, x in dataclasses.asdict(cfg).items() if name not in others}
