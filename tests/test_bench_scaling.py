"""bench/scaling.py: its figures are those of its runs, and it runs from end to end."""
