"""Imports go one way: a package imports only what stands below it, type annotations included, as parsing shows."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mvkernels"

# Bottom to top. A module belongs to the longest prefix; packages in one row do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "_lazy"),
    ("grammar",),
    ("tags", "mask"),
    ("mask_tensor", "layout_runs"),
    ("ops.backends", "ops.device", "ops.native"),
    ("layout", "reference"),
    ("ops.rope", "ops.attention", "ops.merge"),
    ("ops.decode",),
    ("ops.dense",),
    ("rope", "branch_tables"),
    ("cache",),
    ("context_parallel",),
    ("attention", "decode"),
    ("hf",),
    ("decoder",),
    ("graph",),
    ("model.files", "model.json_input", "model.parquet", "model.sequentialize", "model.settings", "model.tasks"),
    ("model.checkpoint", "model.curator"),
    ("model.engine.control", "model.engine.kv", "model.engine.sampling"),
    ("model.engine.output",),
    ("model.engine",),
    ("model.training", "model.evaluation"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# A file of another name that belongs to a package.
PARTS = {"hf_": "hf"}
EVERYWHERE = {"errors", "_lazy"}
# A package -> the only ones below it that it may import, where that is less than all.
NARROW: dict[str, set[str]] = {
    "ops": {"ops", "mask", "mask_tensor"},
    "reference": {"grammar"},
    "rope": {"ops", "reference"},
    "branch_tables": {"ops", "reference"},
    "cache": {"ops", "rope", "branch_tables"},
    "context_parallel": {"layout", "mask"},
    "attention": {"context_parallel", "layout", "ops", "reference"},
    "decode": {"cache", "ops", "reference"},
    "model.engine.control": {"grammar", "tags"},
    "model.engine.kv": {"cache"},
    "model.engine.sampling": {"model.settings", "ops.dense"},
    "__main__": {"cli"},
}
# A distribution -> the only packages that may import it. torch and numpy: everywhere but in STDLIB_ONLY.
OPTIONAL = {
    "triton": {"ops"},
    "cupy": {"ops"},
    "transformers": {"hf", "decoder", "graph", "model", "cli"},
    "tokenizers": {"model"},
    "safetensors": {"model"},
    "gguf": {"model"},
    "accelerate": {"model"},
    "peft": {"model"},
    "tensorboard": {"model"},
    "matplotlib": {"cli"},
    "typer": {"cli", "__main__"},
    "rich": {"cli", "model"},
    "lighteval": {"model"},
    "openai": {"model"},
    "rapidfuzz": {"model"},
    "pyarrow": {"model"},
}
STDLIB_ONLY = {"errors", "_lazy", "grammar", "tags"}


def walk(folder: Path) -> list[Path]:
    files = []
    for path in folder.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            files += walk(path)
        elif path.suffix == ".py":
            files.append(path)
    return files


def modules() -> dict[str, Path]:
    """Dotted name within the package -> file."""
    found = {}
    for path in sorted(walk(PACKAGE)):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def package_of(module: str) -> str:
    """The package of a module in `LAYERS`, or its first name."""
    for prefix, package in PARTS.items():
        if module.startswith(prefix):
            return package
    inside = [name for name in RANK if module == name or module.startswith(f"{name}.")]
    return max(inside, key=len, default=module.partition(".")[0])


def imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports anywhere in it, also inside functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: expected absolute imports, got a relative one"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def public_names(known: dict[str, Path]) -> dict[str, str]:
    """What an `__init__` exports -> where that is defined, both with their full dotted names."""
    found = {}
    for module, path in known.items():
        if path.name == "__init__.py":
            package = "mvkernels" if module == "__init__" else f"mvkernels.{module}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mvkernels."):
                    names = {f"{package}.{a.name}": f"{node.module}.{a.name}" for a in node.names}
                    found |= {name: target for name, target in names.items() if name != target}
    return found


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports; a public name counts as the module that defines it."""
    known = modules()
    public = public_names(known)
    graph = {}
    for module, path in known.items():
        graph[module] = set()
        for name in imports(path):
            while name in public:
                name = public[name]
            top, _, inner = name.partition(".")
            while top == "mvkernels" and inner and inner not in known:
                inner = inner.rpartition(".")[0]
            if top == "mvkernels" and inner and inner != module:
                graph[module].add(inner)
    return graph


GRAPH = import_graph()


def within(package: str, names: set[str]) -> bool:
    return any(package == name or package.startswith(f"{name}.") for name in names)


def may_import(package: str, target: str) -> bool:
    """Whether modules of a package may import from the package ``target``."""
    if target == package or target in EVERYWHERE:
        return True
    narrow = [names for name, names in NARROW.items() if within(package, {name})]
    if not all(within(target, names) for names in narrow):
        return False
    if package not in RANK:  # the __init__ files at the top, which only name what is below them
        return target != "__main__"
    return target in RANK and RANK[target] < RANK[package]


def test_every_module_belongs_to_a_layer():
    tops = {"__init__", "__main__", "ops", "model"}
    unknown = sorted(name for name in GRAPH if package_of(name) not in RANK and name not in tops)
    assert not unknown, f"expected every module in a layer of this test, got {unknown}"
    assert {package_of(name) for name in GRAPH} >= {*RANK}, "a layer of this test has no module"


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_go_down(module: str):
    package = package_of(module)
    wrong = sorted(target for target in GRAPH[module] if not may_import(package, package_of(target)))
    assert not wrong, f"mvkernels.{module} (of {package}) may not import {wrong}"


def test_no_module_imports_itself_through_others():
    try:
        graphlib.TopologicalSorter(GRAPH).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_distributions_stay_in_their_packages(module: str):
    package = package_of(module)
    tops = {name.partition(".")[0] for name in imports(modules()[module])}
    wrong = {top for top in tops if top in OPTIONAL and not within(package, OPTIONAL[top])}
    foreign = tops - {*sys.stdlib_module_names} - {"mvkernels"}
    if package in STDLIB_ONLY:
        wrong |= foreign
    if package == "reference":
        wrong |= foreign - {"torch"}
    assert not wrong, f"mvkernels.{module} (of {package}) may not import {sorted(wrong)}"


def test_nothing_is_imported_by_the_name_of_a_top_level_link():
    """`import model` would be a second copy of the package under another name."""
    for module, path in modules().items():
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & {"model", "reference", "tests", "benchmarks"}, f"mvkernels.{module} imports {tops}"


@pytest.mark.parametrize(
    ("package", "target", "allowed"),
    [
        ("ops.attention", "tags", False),
        ("ops.attention", "layout", False),
        ("ops.attention", "ops.dense", False),
        ("ops.dense", "ops.attention", True),
        ("reference", "layout", False),
        ("reference", "mask", False),
        ("layout", "attention", False),
        ("layout", "mask", True),
        ("cache", "decode", False),
        ("attention", "decode", False),
        ("model.engine.control", "cache", False),
        ("model.engine.control", "model.engine.kv", False),
        ("model.engine.kv", "model.engine", False),
        ("model.engine", "cache", True),
        ("model.evaluation", "model.training", False),
        ("__main__", "model.engine", False),
        ("__main__", "cli", True),
        ("cli", "model.training", True),
    ],
)
def test_the_rule_itself(package: str, target: str, allowed: bool):
    assert may_import(package, target) is allowed


def test_an_annotation_counts_as_an_import():
    assert "model.engine.engine" in GRAPH["cli.generate"], "generate.py imports Engine under TYPE_CHECKING only"
