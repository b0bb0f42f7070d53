"""What the errors that are raised tell people to type exists: commands, options, configs."""

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator

from common.config import Shared
from common.files import ROOT

PLACES = ("", "artifacts", "common", "evaluation", "frozen", "small_world", "tools", "training")
FILES = sorted(path for place in PLACES for path in (ROOT / place).glob("*.py"))
STAGES = ("synvid", "distill", "sample", "evaluate", "tools.extract_lora", "tools.taps", "tools.bench",
          "tools.baselines", "tools.paper", "small_world.teacher")
CONFIGS = [importlib.import_module(name).Config for name in STAGES]
SETTINGS = {f.name for config in (Shared, *CONFIGS) for f in dataclasses.fields(config)}
OTHERS = {"help", "output_path"}  # of every stage; of VBench


def messages() -> Iterator[tuple[str, str]]:
    """(file:line, text) of every string that a raise statement of the product builds; a value that
    is filled in stands as {}."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise):
                continue
            for part in ast.walk(node):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                if isinstance(part, ast.JoinedStr):
                    yield where, "".join(v.value if isinstance(v, ast.Constant) else "{}"
                                         for v in part.values)
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield where, part.value


def test_the_walk_sees_the_errors():
    found = list(messages())
    assert len({where for where, _ in found}) > 200
    assert any("python distill.py" in text for _, text in found)


def test_every_option_that_an_error_names_is_a_setting():
    named = {(where, option.replace("-", "_")) for where, text in messages()
             for option in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", text)}
    assert len(named) > 20
    assert [(where, option) for where, option in named if option not in SETTINGS | OTHERS] == []


def test_every_command_that_an_error_names_is_there():
    named = {(where, name) for where, text in messages()
             for name in re.findall(r"python (?:-m )?([\w./]+?)(?:\.py)?(?=[\s`{]|$)", text)}
    assert len(named) > 5
    missing = [(where, name) for where, name in named
               if not (ROOT / f"{name.replace('.', '/')}.py").exists()]
    assert missing == []


def test_every_config_that_an_error_names_is_there():
    named = {(where, name) for where, text in messages()
             for name in re.findall(r"configs/[\w.-]+\.yaml", text)}
    assert named and [(where, name) for where, name in named if not (ROOT / name).exists()] == []
