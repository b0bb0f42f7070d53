"""A stage of which one rank is killed once, at a chosen place.

python killed_stage.py MARK RANK PLACE COUNT STAGE ARGUMENTS…: at the COUNT-th call of PLACE, rank
RANK makes the file MARK and kills itself; if MARK is there it lives.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.distributed.tensor import DTensor

import distill
from common import weights
from common.ranks import cli
from training.checkpoint import Saver

PLACES = {"iteration": (distill, "update_heads"),
          "checkpoint": (weights, "bytes_of"),          # a part of a rank's file is written
          "naming": (Saver, "name_it"),                 # all files are written, none has its name
          "export": (DTensor, "full_tensor")}           # a part of the student is written

if __name__ == "__main__":
    mark, rank, place, count, stage = Path(sys.argv[1]), *sys.argv[2:6]
    module, name = PLACES[place]
    real, left = getattr(module, name), [int(count)]

    def killed(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and os.environ.get("RANK", "0") == rank and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, killed)
    cli(lambda: importlib.import_module(stage).main(sys.argv[6:]))
