"""Settings: what a config file says, what the command line changes, what is wrong with either.

A stage's Config is a dataclass that extends `Shared`. Its defaults, then its YAML file, then the
command line decide a value; every key is known, typed and explained by --help.
"""

import dataclasses
import math
import os
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
import yaml

from model import ROOT, Ranks, key_times, latent_shape, nearest, sizes_of, write_text

STAGES = ("teacher", "synvid", "distill", "sample", "evaluate")


def field(default: Any, help: str) -> Any:
    """A dataclass field with its help text (meaning and unit); lists are copied."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Shared:
    """What all stages of a run agree on: the top level of a YAML file."""
    family: str = field("wan", "network family: wan | hunyuan")
    preset: str = field("tiny", "sizes of the DiT, a name of model.PRESETS")
    weights: str = field("assets/tiny", "teacher: an official or a diffusers folder")
    run: str = field("runs/tiny", "folder for everything this run makes")
    height: int = field(48, "pixels, a multiple of 16")
    width: int = field(48, "pixels, a multiple of 16")
    frames: int = field(9, "video frames, 4n + 1")
    fps: int = field(8, "frames per second of the videos written")
    n: int = field(50, "steps of the teacher's grid")
    shift: float = field(7.0, "time shift of the teacher's grid")
    cfg_scale: float = field(1.0, "teacher's classifier-free guidance; 1 = one evaluation a step")
    embedded_guidance: float = field(6.016, "HunyuanVideo's; its release's 6 acts as 6.016")
    negative_prompt: str = field("", "text of the teacher's unconditional branch")
    key: list[int] = field([0, 10, 20, 30, 40, 50], "key timesteps as indices into that grid")
    seed: int = field(0, "base seed of everything drawn")
    device: str = field("auto", "cpu, cuda, or auto: a GPU if there is one")
    attention: Literal["auto", "flash", "cudnn"] = field("auto", "kernels a GPU tries first; auto: "
                                                         "cudnn on Hopper, else flash")


def coerce(value: Any, kind: Any, key: str, where: str) -> Any:
    """A value of YAML or the command line as its field's type. Raises ValueError naming the key."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None or value in ("none", "null"):
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
            number = Fraction(str(value))  # reads 1e3 too, and any size exactly
            if number.denominator != 1:
                raise ValueError
            return int(number)
        out = kind(value)
        if kind is float and not math.isfinite(out):
            raise ValueError
        return out
    except (ValueError, TypeError, OverflowError) as e:
        raise ValueError(f"{where}: {key}: got {value!r}; wanted {wanted}") from e


def read_yaml(path: Path, stage: str, fields: dict) -> dict:
    """A config file's shared keys and those of one stage. Raises ValueError naming a wrong key."""
    if not path.exists():
        near = nearest(path.name, [p.name for p in (ROOT / "configs").glob("*.yaml")])
        raise FileNotFoundError(f"{path}: no such config{near}; the shipped ones are in configs/")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: is not valid YAML: {e}") from e
    if not isinstance(data, dict):
        raise ValueError(f"{path}: got {type(data).__name__}; wanted keys with values")
    shared = {f.name for f in dataclasses.fields(Shared)}
    own = data.get(stage) or {}
    if not isinstance(own, dict):
        raise ValueError(f"{path}: {stage}: got {own!r}; wanted keys with values")
    for key in data:
        if key not in shared and key not in STAGES:
            raise ValueError(f"{path}: unknown key '{key}'{nearest(str(key), [*shared, *STAGES])}")
    for key in own:
        if key not in fields:
            raise ValueError(f"{path}: unknown key '{stage}.{key}'{nearest(str(key), fields)}")
    return {**{k: v for k, v in data.items() if k in shared}, **own}


def print_help(cls: type, stage: str, doc: str) -> None:
    """Print a stage's docstring and each field with default and meaning."""
    print(f"{doc.strip()}\n\nusage: python {stage}.py [CONFIG] [--field value | field=value]\n")
    blank = cls()
    for f in dataclasses.fields(cls):
        value = getattr(blank, f.name)
        choices = " | ".join(typing.get_args(f.type)) if "Literal" in str(f.type) else ""
        print(f"  --{f.name:<18} {choices}{': ' if choices else ''}{f.metadata['help']} "
              f"[{'none' if value is None else value}]")


def names_config(args: list[str]) -> bool:
    """Whether a command line starts with a config file, not with an override."""
    return bool(args) and not args[0].startswith("-") and "=" not in args[0]


def load_config(cls: type, stage: str, argv: list[str] | None = None, doc: str = "") -> Any:
    """A stage's Config from a YAML file (default configs/tiny.yaml) and overrides of its fields.

    Args: cls, the stage's dataclass (a Shared); stage, its section's name; argv without program
    name; doc, shown by --help. An override is `--field value`, `--field=value` or `field=value`
    (the one that torchrun's own parser leaves alone); a bare --flag sets a bool field. Relative
    paths are the user's. Raises ValueError naming the key, what was got and the nearest known key.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    path = Path(args.pop(0)) if names_config(args) else ROOT / "configs/tiny.yaml"
    values = {} if args[:1] in (["--help"], ["-h"]) else read_yaml(path, stage, fields)
    where = dict.fromkeys(values, str(path))
    while args:
        arg = args.pop(0)
        if arg in ("--help", "-h"):
            print_help(cls, stage, doc)
            raise SystemExit(0)
        name, equals, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not (arg.startswith("--") or equals) or name not in fields:
            near = nearest(name, fields)
            raise ValueError(f"command line: unknown option '{arg}'{near}; see --help")
        if not equals and fields[name] is bool and (not args or args[0].startswith("--")):
            value = True
        elif not equals:
            if not args:
                raise ValueError(f"command line: {arg}: got nothing; wanted a value")
            value = args.pop(0)
        values[name], where[name] = value, "command line"
    cfg = cls(**{k: coerce(v, fields[k], k, where[k]) for k, v in values.items()})
    latent_shape(cfg.frames, cfg.height, cfg.width)
    key_times(cfg.family, cfg.n, cfg.shift, cfg.key)
    if sizes_of(cfg.preset).family != cfg.family:
        raise ValueError(f"preset: '{cfg.preset}' is of family {sizes_of(cfg.preset).family}, got "
                         f"family '{cfg.family}': change one of them")
    own = Path(cfg.run) / "teacher/weights"  # where stage 0 of the same config writes
    if stage != "teacher" and Path(cfg.weights) == own and not own.exists():
        if not getattr(cfg, "random_weights", False):
            raise FileNotFoundError(f"{own}: there is no teacher yet; train it by `python "
                                    f"teacher.py {path}`")
    return cfg


def announce(cfg: Any, stage: str, ranks: Ranks | None = None) -> Path:
    """Print the resolved config and save it as <run>/<stage>/config.yaml; returns that folder."""
    folder = Path(cfg.run) / stage
    if ranks is None or ranks.rank == 0:
        values = dataclasses.asdict(cfg)
        print(f"{stage}: " + "  ".join(f"{k}={v}" for k, v in values.items()), flush=True)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_text(folder / "config.yaml", text)
    return folder


def leave(status: int) -> None:
    """End this process now, without Python's farewell.

    A gloo thread may still let go of the last collective's tensors; it needs the interpreter for
    that, and one that is being torn down aborts the process after all work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def cli(main: Callable[[], None]) -> None:
    """Run a stage's main; what a user can cause ends in one line on stderr and exit status 1.

    With a process group, which a stage has from early on, it always ends by leave(). A rank that
    fails does so at once, without the farewell that the others cannot answer, so that torchrun sees
    it and stops them.
    """
    status = 1
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
            leave(0)
        return
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
    except SystemExit as e:
        if not dist.is_initialized():
            raise
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        if dist.get_world_size() > 1:
            time.sleep(1)  # if it only lost another rank, torchrun sees that one die first
    if dist.is_initialized():
        leave(status)
    raise SystemExit(status)


def rate(seconds: float) -> str:
    """Seconds as a short human duration: 45 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
