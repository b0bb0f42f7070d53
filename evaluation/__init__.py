"""What evaluate.py leans on: measures, the page, and the paper's tables and figures as runs."""
