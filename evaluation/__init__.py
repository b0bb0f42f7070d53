"""Parts of evaluate.py and of tools.paper: measures, statistics, the page, pictures."""
