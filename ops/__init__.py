"""Around a run: its folder, what is watched, drawn and exported, and what is checked before it. Open
run_dir.py first.

Imported by session.py; doctor.py, plan.py, plot.py, samples_page.py and export.py are commands: `python -m
ops.plot RUN`.
"""
