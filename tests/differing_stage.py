"""A stage whose second rank sees other settings or files than the first.

python differing_stage.py OVERRIDE STAGE ARGUMENTS…: OVERRIDE is added to the second rank's command.
"""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.ranks import cli

if __name__ == "__main__":
    override, stage, *arguments = sys.argv[1:]
    extra = [override] if os.environ["RANK"] == "1" else []
    cli(lambda: importlib.import_module(stage).main([*arguments, *extra]))
