"""What several scripts share: timed processes, table rows, our code as bytes, and the machine."""

import argparse
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Spent:
    """One process: wall and processor seconds, the largest memory of any so far, its output."""

    wall: float
    cpu: float
    mib: float
    output: str


def run_process(arguments: Sequence[str]) -> Spent:
    """Runs Python with these arguments in the repository's root. Ends the program if it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"a measured process failed: {done.stderr.strip()[-500:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(wall, cpu, after.ru_maxrss / 1024, done.stdout)


def options(about: str, **defaults: int | str | bool | list[str]) -> argparse.Namespace:
    """The command line of a script: an option for every default, of its type; for a list, a word of it.

    about: the script's docstring.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        if isinstance(default, list):
            parser.add_argument(name, choices=default)
            continue
        kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{name}", **kind, help=f"default: {default!r}")
    return parser.parse_args()


def table_row(name: str, values: Sequence[float], form: str) -> str:
    """A row of a Markdown table: minimum, median, maximum."""
    row = (min(values), statistics.median(values), max(values))
    return f"| {name} | {' | '.join(format(value, form) for value in row)} |"


def code() -> bytes:
    """All code of ours that decides a result: without ops, bench and tests."""
    return b"".join(path.read_bytes() for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[cdek]*/*.py")]))


def machine() -> str:
    """Processor, cores, load, version and date."""
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name = names[0] if names else platform.machine()
    return (f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
            f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
