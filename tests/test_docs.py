"""README.md and docs/: files, commands, options and functions that they show exist."""

import ast
import dataclasses
import importlib
import re

import pytest

from common.config import Shared
from common.files import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
STAGES = ("synvid", "distill", "sample", "evaluate", "small_world.teacher", "tools.baselines",
          "tools.bench", "tools.extract_lora", "tools.paper", "tools.taps")
OPTIONS = {f.name for cls in (Shared, *(importlib.import_module(name).Config for name in STAGES))
           for f in dataclasses.fields(cls)}
OTHERS = {  # options of torchrun, pip, toy1d.py, the tools, of the authors' code
    "help", "nproc_per_node", "shutdown_timeout", "max_restarts", "extra_index_url", "quick",
    "seeds", "data", "mismatch", "M", "epsilon", "info", "scores", "sample_solver", "sample_steps",
    "model", "images", "instruction", "max_tokens", "gpus", "stage", "table", "kill_on_bad_exit",
    "nnodes", "node_rank", "master_addr", "master_port", "rdzv_id", "rdzv_backend",
    "rdzv_endpoint", "signals_to_handle"}


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def page(request):
    return request.param


def test_torchrun_passes_on_the_signal_that_slurm_sends():
    """By its option, with which test_resume.py sends the signal too: an environment variable of
    that name has no effect."""
    text = (ROOT / "docs/slurm.sbatch").read_text()
    [sent] = re.findall(r"--signal=B:(\w+)@", text)
    [handled] = re.findall(r"torchrun[^\"]* --signals-to-handle (\S+)", text)
    assert f"SIG{sent}" in handled.split(",")


def test_links_of_a_page_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_commands_and_paths_of_a_page_exist(page):
    text = page.read_text()
    for name in re.findall(r"python (?:-m )?((?:\w+[./])*\w+)", text):
        name = name.removesuffix(".py")
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name
    for path in re.findall(r"`((?:artifacts|assets|common|configs|evaluation|frozen|small_world|"
                           r"tests|tools|training)/[\w./-]*)", text):
        assert (ROOT / path).exists(), path


def test_options_of_a_page_are_settings(page):
    named = {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)",
                                                          page.read_text())}
    assert named - {"field"} <= OPTIONS | OTHERS


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_the_command_that_prints_it(stage, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(stage).main(["--help"])
    command = f"-m {stage}" if "." in stage else f"{stage}.py"
    assert f"usage: python {command} [CONFIG]" in capsys.readouterr().out


def test_functions_of_a_page_are_defined(page):
    """`file.py: name`, `name`, …: the names after a file, up to the end of the cell, are in it."""
    for line in page.read_text().splitlines():
        for path, names in re.findall(r"`([\w/]+\.py): (\w+(?:\.\w+)?`(?:(?:,| …) `\w+`)*)", line):
            tree = ast.parse((ROOT / path).read_text())
            defined = {node.name for node in ast.walk(tree)
                       if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            for name in re.findall(r"\w+(?:\.\w+)?", names):
                assert name.split(".")[0] in defined, (path, name)
