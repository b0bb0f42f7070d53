"""Parts of distill.py: data, optimizer, checkpoints, log and curves, the memory plan."""
