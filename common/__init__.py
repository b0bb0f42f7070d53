"""What every stage needs and no reader of the paper: settings, files, weights, processes.

A stage imports this before torch, whose import takes seconds: its parent may end meanwhile.
"""

import os

LAUNCHER = os.getppid()  # torchrun's, for ranks.watch_launcher
# Prompts of many lengths would fragment a GPU's memory until, after days, a tensor no longer fits.
# Only under torchrun: on WSL some GPUs fail with this setting (pytorch/pytorch, issue 192330).
# torch reads it once; PYTORCH_CUDA_ALLOC_CONF is its older name.
if "RANK" in os.environ and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
