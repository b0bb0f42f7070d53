"""Parts of evaluate.py and of the paper's tables: measures, statistics, the page, pictures."""
