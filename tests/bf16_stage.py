"""A stage with the arithmetic of a GPU, on the CPU: python bf16_stage.py STAGE ARGUMENTS…"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from common import ranks

ranks.compute_dtype = lambda device: torch.bfloat16  # before a stage imports it

if __name__ == "__main__":
    ranks.cli(lambda: importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
