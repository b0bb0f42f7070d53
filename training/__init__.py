"""What distill.py leans on: checkpoints, what it logs and draws, the memory it needs."""
