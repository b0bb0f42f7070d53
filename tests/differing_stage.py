"""A stage whose second rank sees other settings or files than the first, which prints slowly.

python differing_stage.py OVERRIDE STAGE ARGUMENTS…: OVERRIDE is added to the second rank's command.
"""

import importlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import ranks

print_error = ranks.print_error


def print_later(error: str) -> None:
    """print_error after the ranks without a message have had time to end first."""
    time.sleep(1)
    print_error(error)


if __name__ == "__main__":
    ranks.print_error = print_later
    override, stage, *arguments = sys.argv[1:]
    extra = [override] if os.environ["RANK"] == "1" else []
    ranks.cli(lambda: importlib.import_module(stage).main([*arguments, *extra]))
