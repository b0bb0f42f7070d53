"""Stages with the arithmetic of a GPU, on the CPU, one after the other in one process.

python bf16_stage.py CONFIG RUN STAGE OPTION… [then STAGE OPTION…]…
"""

import importlib
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from common import ranks


def run(config: str, folder: str, *commands: str) -> None:
    """Run each command's stage with compute_dtype replaced in every module that imported it."""
    real = ranks.compute_dtype
    for word, command in itertools.groupby(commands, lambda word: word == "then"):
        if word:
            continue
        stage, *options = command
        stage = importlib.import_module(stage)
        for module in list(sys.modules.values()):
            if getattr(module, "compute_dtype", None) is real:
                module.compute_dtype = lambda device: torch.bfloat16
        stage.main([config, *options, "--run", folder])


if __name__ == "__main__":
    ranks.cli(lambda: run(*sys.argv[1:]))
