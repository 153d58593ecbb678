"""Imports run one way, down this list, and never in a circle. Lazy imports count."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # from the top; a wing stands for its modules that have no line of their own
    {"ops.doctor"},
    {"grpo"},
    {"sft", "eval_bfcl", "eval_apibank"},
    {"session"},
    {"ops", "data"},
    {"corpus.distill", "corpus.overlap"},
    {"evals"},
    {"rollout"},
    {"distributed", "corpus"},
    {"model", "reward"},
    {"evals.published_rewards"},
    {"losses", "corpus.examples", "corpus.replies", "corpus.schema", "corpus.sources",
     "evals.reference_reward"},
    {"prompts"},
    {"config", "kernel", "corpus.foreign", "corpus.strict_json"},
]
WINGS = ("kernel", "distributed", "corpus", "evals", "ops")
FILES = [file for folder in (".", *WINGS) for file in ROOT.glob(f"{folder}/*.py")]
NAMES = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in FILES]
MODULES = {name: file.read_text(encoding="utf-8") for name, file in zip(NAMES, FILES)}


def imported(source: str) -> set[str]:
    """The modules of ours that a source imports, at its top or inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & MODULES.keys()


def floor(module: str) -> int:
    wing = module.partition(".")[0]
    return next(n for name in (module, wing) for n, rooms in enumerate(FLOORS) if name in rooms)


def forbidden(module: str, source: str) -> set[str]:
    """What the module imports and may not: what is above it, and other rooms on its floor."""
    wing = module.partition(".")[0]
    return {
        other
        for other in imported(source) - {module}
        if floor(other) < floor(module) or (floor(other) == floor(module) and other.partition(".")[0] != wing)
    }


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_down(module):
    assert not forbidden(module, MODULES[module])


def test_there_is_no_circle():
    graph = {module: imported(source) - {module} for module, source in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # a circle raises


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kernel.head", "import config"),
        ("model", "def f():\n    from rollout import sample_groups"),
        ("session", "from ops import doctor"),
        ("reward", "from corpus import layouts"),
        ("sft", "import grpo"),
    ],
)
def test_a_forbidden_import_is_seen(module, line):
    assert forbidden(module, MODULES[module] + "\n" + line)


def test_grpo_imports_twelve_modules_at_most():
    assert len(imported(MODULES["grpo"]) - {"corpus", "distributed", "kernel"}) <= 12
