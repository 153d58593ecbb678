"""For test_readme.py: finds the commands of a page, and runs them in this process.

A command runs as bash reads it, in a copy of the tree whose `python`, `torchrun` and `pip` ask this process
to do the work: importing torch once is enough. What must not run is run up to the point where its options are
accepted.
"""

import argparse
import ast
import contextlib
import importlib
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import get_args_parser

from config import load_config

ROOT = Path(__file__).parents[1]
LIMIT = 100  # seconds that one script may take

# ----------------------------------------------------------------------------------- what a page asks to type


@dataclass(frozen=True)
class Command:
    """One command of a page. setup: the page's assignments before it; context: the paragraph in which it
    stands.

    language: bash, or python for a block of Python.
    """

    place: str  # page:line
    text: str
    setup: str
    context: str
    language: str = "bash"

    def known(self, table: dict) -> str:
        """Its key in a table, or "": the command itself, or its beginning where it has several lines."""
        line = " ".join(self.text.split())
        return next((key for key in table if line == key or "\n" in self.text and line.startswith(key)), "")


SPAN = re.compile(r"`((?:python|torchrun|pip|sbatch|bash run\.sh|[A-Z_]+=\S+ python)(?:\s[^`]*)?)`")
SETUP = re.compile(r"(export |source |\w+=)[^ ;]*( \w+=[^ ;]*)*")


def commands_of_block(block: str) -> Iterator[tuple[int, str]]:
    """(line within the block, command): as many lines as bash needs, or the whole block where it begins with
    #!.
    """
    waiting = ""
    for i, line in enumerate(block.splitlines(keepends=True)):
        waiting += line
        script = block.startswith("#!") and waiting != block
        if (
            script
            or line.endswith("\\\n")
            or subprocess.run(["bash", "-n", "-c", waiting], capture_output=True).returncode
        ):
            continue
        yield i + 1 - waiting.count("\n"), waiting
        waiting = ""


def commands(page: str) -> list[Command]:
    """All commands of a page, in its order: those of its bash blocks, and code spans that begin like one."""
    text, found, setup = (ROOT / page).read_text(encoding="utf-8"), [], []
    for part in re.finditer(r"(?ms)^```(\w*)\n(.*?)^```$|([^\n].*?)(?=\n\n|\n- |\|\n\||\n```|\Z)", text):
        line = text[: part.start()].count("\n") + 1
        language, block, paragraph = part.groups()
        if paragraph is not None:
            context = paragraph
            for span in SPAN.findall(paragraph):
                found.append(Command(f"{page}:{line}", " ".join(span.split()), "\n".join(setup), context))
        if language == "python":
            found.append(Command(f"{page}:{line + 1}", block, "", context, "python"))
        for offset, command in commands_of_block(block) if language == "bash" else ():
            bare = (
                command
                if block.startswith("#!")
                else re.sub(r"\s*\\\n\s*", " ", re.sub(r"(?m)(^| )#.*", "", command))
            )
            if SETUP.fullmatch(bare.strip()):
                setup.append(bare.strip())
            elif bare.strip():
                place = f"{page}:{line + 1 + offset}"
                found.append(Command(place, bare.strip(), "\n".join(setup), f"{context}\n{command}"))
    return found


# -------------------------------------------------------------------------------- running it, in this process

# Stands for each of these in the copy: asks this process, and hands on what it prints and returns.
SHIMS = ("python", "torchrun", "pip", "vllm")
SHIM = """#!/usr/bin/env bash
if [ "$1" = -c ]; then exec "{python}" "$@"; fi
printf '%s\\0' "{name}" "$@" > "{place}/ask.part" && mv "{place}/ask.part" "{place}/ask"
until [ -e "{place}/answer" ]; do sleep 0.02; done
code=$(cat "{place}/answer"); rm "{place}/answer"; cat "{place}/printed"; exit "$code"
"""
# Stand for Slurm's commands.
CLUSTER = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo node1',
    "sbatch": 'true',
}


def make_environment(place: Path) -> None:
    """place/.venv, whose programs are the stand-ins above: run.sh finds everything installed."""
    folder = place / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").write_text("")
    (place / ".venv" / "installed.txt").write_text((place / "requirements.txt").read_text())
    for name in SHIMS:
        (folder / name).write_text(SHIM.format(python=sys.executable, name=name, place=place))
    for name, script in CLUSTER.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    for program in folder.iterdir():
        program.chmod(0o755)


class Accepted(BaseException):
    """The options of a command that is not run here are right."""


def accepting(parse):
    """The same function, but nothing happens after it."""

    def then_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Accepted

    return then_stop


@contextlib.contextmanager
def as_found(place: Path) -> Iterator[None]:
    """In the folder `place`; puts back what a script changes in its process, and ends it when it takes too
    long.
    """
    environment, path, words, there = dict(os.environ), list(sys.path), list(sys.argv), Path.cwd()
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    }

    def too_long(number, frame):
        raise TimeoutError(f"took longer than {LIMIT} s: make it smaller in RUN, or move it to NOT_RUN")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    os.chdir(place)
    try:
        yield
    finally:
        signal.alarm(0)
        os.chdir(there)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:], sys.argv[:] = path, words
        torch.set_num_threads(1)


def run_script(script: str, arguments: list[str]) -> int:
    """`python SCRIPT …` in this process -> its exit code."""
    sys.argv[:] = [script, *arguments]
    sys.path.append(str((ROOT / script).parent))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Accepted:
        return 0
    except ModuleNotFoundError as error:  # bfcl_handler.py needs the official package
        return int((ROOT / f"{error.name}.py").exists())
    return 0


def answer(name: str, words: list[str], run: bool) -> int:
    """What `python …`, `torchrun …` and so on return. run: else only the options are looked at. May raise
    anything.
    """
    if words[:2] == ["-m", "torch.distributed.run"]:
        name, words = "torchrun", words[2:]
    if words[:2] == ["-m", "pytest"]:  # of run.sh; the tests themselves run anyway
        return int(not all((ROOT / word).exists() for word in words[2:]))
    if name == "pip":
        return int("-r" in words and not (ROOT / words[words.index("-r") + 1]).exists())
    if name == "vllm" or words[:1] == ["-m"] and not run:  # programs of others
        return 0
    if name == "torchrun":
        options = get_args_parser().parse_args(words)
        words = [options.training_script, *options.training_script_args]
    with pytest.MonkeyPatch.context() as patch:
        if not run:
            patch.setattr("config.load_config", accepting(load_config))
            patch.setattr(
                argparse.ArgumentParser, "parse_args", accepting(argparse.ArgumentParser.parse_args)
            )
        return run_script(words[0], words[1:])


def exit_code(name: str, words: list[str], run: bool) -> int:
    """Of `answer`: 1 after an exception, with a traceback."""
    try:
        return answer(name, words, run)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception:
        traceback.print_exc()
        return 1


def execute(command: Command, replacements: dict[str, str] | None, place: Path) -> str:
    """Runs a command of a page in the copy -> "" or what went wrong. replacements: None, to look at options
    only.
    """
    text = command.text
    for old, new in (replacements or {}).items():
        if old not in text:
            return f"{old!r} of RUN does not stand in it any more"
        text = text.replace(old, new)
    script = f"set -eo pipefail\n{command.setup}\n{text}"
    if command.language == "python":
        return execute_python(text, replacements is not None, place)
    said, failed, printed_by_bash = (
        "",
        [],
        place.with_name("printed.txt"),
    )  # a file, because a pipe may be full
    environment = os.environ | {"PATH": f"{place}/.venv/bin:{os.environ['PATH']}", "PYTHON": sys.executable}
    with printed_by_bash.open("w") as file:
        shell = subprocess.Popen(["bash", "-c", script], cwd=place, env=environment, stdout=file, stderr=file)
    while shell.poll() is None:
        time.sleep(0.01)
        if not (place / "ask").exists():
            continue
        name, *words = (place / "ask").read_text().split("\0")[:-1]
        (place / "ask").unlink()
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors), as_found(place):
            code = exit_code(name, words, replacements is not None)
        said += printed.getvalue() + errors.getvalue()
        if code:
            failed.append(f"{name} {' '.join(words)}")
        (place / "printed").write_text(printed.getvalue())
        (place / "answer.part").write_text(str(code))
        (place / "answer.part").rename(place / "answer")
    said += printed_by_bash.read_text()
    return f"{'; '.join(failed) or text} failed:\n{said[-3000:]}" if failed or shell.returncode else ""


def execute_python(code: str, run: bool, place: Path) -> str:
    """The same for a block of Python. Where it is not run: what it imports from this project must be
    there.
    """
    try:
        with as_found(place), contextlib.redirect_stdout(io.StringIO()):
            if run:
                exec(compile(code, "page", "exec"), {})
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, name.name) for name in node.names), (
                        f"{node.module} has other names"
                    )
    except (Exception, SystemExit):
        return traceback.format_exc()
    return ""
