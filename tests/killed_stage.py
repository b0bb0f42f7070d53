"""A stage of which one rank is killed, or terminated by a signal, at a chosen place.

python killed_stage.py MARK RANK PLACE COUNT TIMES STAGE ARGUMENTS…: at the COUNT-th call of PLACE,
rank RANK adds a byte to the file MARK and sends itself SIGKILL, or SIGTERM if PLACE is
"terminated", until MARK has TIMES bytes. In an iteration it first waits until the checkpoint in
progress is complete, so that every run resumes at that one.
"""

import importlib
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.distributed.tensor import DTensor

import distill
import processes  # noqa: F401  (its presets)
from artifacts import student
from common.ranks import cli
from training.checkpoint import Saver

PLACES = {"start": (distill, "build"),
          "iteration": (distill, "update_heads"),
          "terminated": (distill, "update_heads"),
          "checkpoint": (student, "bytes_of"),          # a part of a rank's file is written
          "publish": (Saver, "publish"),                # all files are written, none has its name
          "export": (DTensor, "full_tensor")}           # a part of the student is written

if __name__ == "__main__":
    mark, rank, place, count, times, stage = Path(sys.argv[1]), *sys.argv[2:7]
    module, name = PLACES[place]
    real, calls = getattr(module, name), [0]

    def killed(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(count) and os.environ.get("RANK", "0") == rank:
            for thread in threading.enumerate():
                if place == "iteration" and thread.name.endswith("(write)"):  # Saver.write
                    thread.join()
            with mark.open("a") as f:
                f.write("x")
            if mark.stat().st_size <= int(times):
                os.kill(os.getpid(), signal.SIGTERM if place == "terminated" else signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, killed)
    cli(lambda: importlib.import_module(stage).main(sys.argv[7:]))
