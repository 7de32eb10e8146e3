"""Imports point downwards: none leads back to where it began, and only few things come from transformers."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nanotoolrl", "bench")
# They read and write checkpoints. The model and its forward pass are ours.
DOORS = {
    "transformers.AutoConfig",
    "transformers.AutoModelForCausalLM",
    "transformers.AutoTokenizer",
    "transformers.PreTrainedModel",
    "transformers.PreTrainedTokenizerBase",
    "transformers.__version__",
    "transformers.utils.logging",
}
PRIVATE = ("past_key_values", "_attn_implementation", "transformers.Cache")


def module_of(path: Path) -> str:
    """The name a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_of(path): path.read_text(encoding="utf-8")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(name: str) -> set[str]:
    """What a module imports, wherever in it the import stands: modules, and names of modules (`a.b.name`)."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import):
            assert not any(alias.asname and "transformers" in alias.name for alias in node.names), name
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def graph() -> dict[str, set[str]]:
    """The modules of ours that each module of ours runs when it is imported, or later.

    An import of `a.b.c` runs the packages `a` and `a.b`, too, but for those that the importer is in: they
    have begun before it. A package that imports whatever it finds in its folder imports all of that.
    """
    found = {}
    for name in SOURCES:
        named = {one if one in SOURCES else one.rpartition(".")[0] for one in imported(name)}
        if "iter_modules(__path__)" in SOURCES[name]:
            named |= {one for one in SOURCES if one.rpartition(".")[0] == name}
        packages = {part for one in named for part in prefixes(one)} - {*prefixes(name)}
        found[name] = (named | packages) & SOURCES.keys()
    return found


def prefixes(name: str) -> list[str]:
    """`a.b.c`, `a.b` and `a` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def test_the_graph_is_seen():
    """At the top of a file, within a function, from a package, by folder."""
    edges = graph()
    assert "nanotoolrl.signals" in edges["nanotoolrl.look.metrics"]
    assert "bench.trl" in edges["bench.steps"]
    assert "nanotoolrl.gpu.distributed" in edges["nanotoolrl.cli"]
    assert {"nanotoolrl.world", "nanotoolrl.world.api"} <= edges["nanotoolrl.env"]
    assert "nanotoolrl.world.domains.music" in edges["nanotoolrl.world.domains"]
    assert len(edges) > 60


def test_no_import_leads_back_to_where_it_began():
    """Raises CycleError, which names the modules."""
    order = list(TopologicalSorter(graph()).static_order())
    assert sorted(order) == sorted(SOURCES)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nanotoolrl.calls", "from nanotoolrl.look.metrics import metrics"),
        ("nanotoolrl.calls", "def f():\n    import nanotoolrl.signals"),
        ("nanotoolrl.env", "from nanotoolrl.world import generate"),
        ("nanotoolrl.world.domains.music", "from nanotoolrl.world.domains import ORDER"),
        ("nanotoolrl.world.words", "from nanotoolrl.world.tasks import load_tasks"),
        ("bench.trl", "from bench.steps import new_run"),
    ],
)
def test_one_line_more_would_be_found(name, line, monkeypatch):
    monkeypatch.setitem(SOURCES, name, f"{SOURCES[name]}\n{line}\n")
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph()).static_order())


def test_the_package_knows_nothing_of_what_uses_it():
    """But for the old name of a command, which has its own tiny module."""
    above = {path.stem for path in ROOT.glob("*.py")} | {"bench", "tests", "data"}
    found = {
        name
        for name in SOURCES
        if name.startswith("nanotoolrl") and {one.partition(".")[0] for one in imported(name)} & above
    }
    assert {"train", "sample"} < above
    assert found == {"nanotoolrl.bench"}
    assert len(SOURCES["nanotoolrl.bench"].splitlines()) < 10


def test_only_the_doors_of_transformers_are_used():
    used = set()
    for name in (name for name in SOURCES if name.startswith("nanotoolrl")):
        used |= {one for one in imported(name) if one.startswith("transformers.")}
        for node in ast.walk(ast.parse(SOURCES[name])):
            parts = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
            if parts[:1] == ["transformers"] and parts != ["transformers", "utils"]:
                used.add(".".join(parts[: 3 if parts[1] == "utils" else 2]))
    assert used <= DOORS, used - DOORS
    assert len(used) > 3


def test_nothing_private_of_transformers_is_named():
    for name, source in SOURCES.items():
        if name.startswith("nanotoolrl"):
            assert not [word for word in PRIVATE if word in source], name
