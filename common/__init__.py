"""What every stage needs and no reader of the paper: settings, files, weights, processes.

A stage imports this before torch, whose import takes seconds: its parent may end meanwhile.
"""

import os

LAUNCHER = os.getppid()  # torchrun's, for ranks.watch_launcher
