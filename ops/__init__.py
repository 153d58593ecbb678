"""Around a run: its folder, what is watched, drawn and exported, and what is checked before it.

Open run_dir.py first. session.py imports run_dir, monitor, plot, export and samples_page. doctor, plan and
chat are commands only, which no library module imports; plot, samples_page and export are commands too:
`python -m ops.plot RUN`.
"""

import distributed.start  # noqa: F401
