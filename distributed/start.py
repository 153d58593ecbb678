"""Imported by every script before all else: Ctrl-C while torch loads, standard streams that are closed, and
how CUDA memory is allocated.

Unlike other modules it acts when it is imported: once torch is there, it is too late. What it sets in the
environment, child processes have too.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType


def open_streams() -> None:
    """Opens the null device for each of stdin, stdout and stderr that is closed (`>&-`): else the next file
    that is opened would take its number, and what is printed would land there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def show_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own report of an error that nothing caught; one word for Ctrl-C, whose place says nothing."""
    cause: BaseException | None = error
    while isinstance(cause, ImportError):  # a module of C++ that was interrupted
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def allow_growing_segments() -> None:
    """Lets CUDA's allocator extend its segments in place, unless the user sets its options. Segments of fixed
    size would leave much memory idle: rollouts and updates ask for ever other shapes.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


open_streams()
allow_growing_segments()
sys.excepthook = show_uncaught
