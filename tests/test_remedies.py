"""Commands, options and configs that error messages recommend exist."""

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator

from common.config import Shared
from common.files import ROOT

PLACES = ("", "artifacts", "common", "evaluation", "frozen", "small_world", "tools", "training")
FILES = sorted(path for place in PLACES for path in (ROOT / place).glob("*.py"))
STAGES = ("synvid", "distill", "sample", "evaluate", "tools.extract_lora", "tools.taps",
          "tools.bench", "tools.baselines", "tools.paper", "small_world.teacher")
CONFIGS = [importlib.import_module(name).Config for name in STAGES]
SETTINGS = {f.name for config in (Shared, *CONFIGS) for f in dataclasses.fields(config)}
OTHERS = {"help", "output_path", "model", "instruction"}  # every stage; VBench; tools.caption


def messages() -> Iterator[tuple[str, str]]:
    """(file:line, text) of every string in a raise statement of the product, or given to end_all;
    {} stands for a value."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            function = getattr(node, "func", None)
            if not isinstance(node, ast.Raise) and getattr(function, "id", None) != "end_all":
                continue
            for part in ast.walk(node):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                if isinstance(part, ast.JoinedStr):
                    yield where, "".join(v.value if isinstance(v, ast.Constant) else "{}"
                                         for v in part.values)
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield where, part.value


def test_the_messages_are_found():
    found = list(messages())
    assert len({where for where, _ in found}) > 190
    assert any("python distill.py" in text for _, text in found)


def test_every_option_in_an_error_is_a_setting():
    options = {(where, option.replace("-", "_")) for where, text in messages()
               for option in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", text)}
    assert len(options) > 20
    assert [found for found in options if found[1] not in SETTINGS | OTHERS] == []


def test_every_command_in_an_error_exists():
    commands = {(where, name) for where, text in messages()
                for name in re.findall(r"python (?:-m )?([\w./]+?)(?:\.py)?(?=[\s`{]|$)", text)}
    assert len(commands) > 5
    missing = [(where, name) for where, name in commands
               if not (ROOT / f"{name.replace('.', '/')}.py").exists()]
    assert missing == []


def test_every_config_in_an_error_exists():
    configs = {(where, name) for where, text in messages()
               for name in re.findall(r"configs/[\w.-]+\.yaml", text)}
    assert configs and [found for found in configs if not (ROOT / found[1]).exists()] == []
