"""Modules of other people beside ours: those of a user's own file, or of a trainer that executes one of ours.

Imports nothing of ours, so that it can be imported first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _names(folder: Path) -> set[str]:
    """The modules and packages that lie in a folder."""
    packages = {file.parent.name for file in folder.glob("*/__init__.py")}
    return packages | {file.stem for file in folder.glob("*.py")}


def _is_foreign(name: str) -> bool:
    """Whether the loaded module of this name, which is one of ours, is somebody else's."""
    file = Path(getattr(sys.modules.get(name), "__file__", None) or ROOT).resolve()
    return name in sys.modules and file not in (ROOT / f"{name}.py", ROOT / name / "__init__.py")


@contextmanager
def modules_beside(file: Path) -> Iterator[None]:
    """Within it, imports go as if `file` were run as a script: what lies beside it wins over modules with
    names of ours, also over loaded ones, and there are no arguments. Afterwards names mean what they meant.
    """
    folder = file.resolve().parent
    if folder == ROOT:
        names = {name for name in _names(ROOT) if _is_foreign(name)}
    else:
        names = (_names(ROOT) & _names(folder)) - {file.stem}  # of itself, a file means ours

    def loaded() -> list[str]:
        return [key for key in sys.modules if key.partition(".")[0] in names]

    hidden = {key: sys.modules.pop(key) for key in loaded()}
    arguments = sys.argv
    sys.argv = [str(file)]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.argv = arguments
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # for what a function imports when it is called
        for key in loaded():
            del sys.modules[key]
        sys.modules.update(hidden)
