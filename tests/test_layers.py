"""Imports go one way: every module of the package imports only what stands below it, as parsing shows."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mvkernels"

# What fused layers call.
KERNELS = (
    *("ops.backends", "ops.decode_native", "ops.decoder_native", "ops.layer_native", "ops.layer_triton"),
    *("ops.linear_native", "ops.linear_tiles", "ops.native", "ops.product"),
)
# Layer -> the layers it may import besides itself. Everything may use EVERYWHERE, below.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "_lazy": set(),
    "grammar": set(),
    "tags": {"grammar"},
    "ops": set(),
    "layout": {"grammar", "tags", "ops.device", "ops.mask", "ops.mask_table"},
    "reference": {"grammar"},
    "attention": {"layout", "ops", "reference"},
    "rope": {"ops", "reference"},
    "kv_cache": {"ops", "reference", "rope"},
    "decode": {"kv_cache", "ops", "reference"},
    "hf": {"attention", "decode", "kv_cache", "layout", *KERNELS},
}
EVERYWHERE = {"errors", "_lazy"}
# A file whose name begins so is a part of that layer.
PARTS = {"layout_": "layout", "attention_": "attention", "kv_": "kv_cache", "decode_": "decode", "hf_": "hf"}
# model/ stands on what `import mvkernels` offers; grammar holds the tag names and kinds that its texts are made of.
PUBLIC = {"attention", "decode", "errors", "grammar", "hf", "kv_cache", "layout", "tags"}
# A distribution -> the only layers that may import it. torch and numpy: everywhere but below.
OPTIONAL = {
    "triton": {"ops"},
    "cupy": {"ops"},
    "transformers": {"hf", "model", "commands"},
    "tokenizers": {"model"},
    "safetensors": {"model"},
    "gguf": {"model"},
    "accelerate": {"model"},
    "peft": {"model"},
    "tensorboard": {"model"},
    "matplotlib": {"commands"},
    "typer": {"commands", "__main__"},
    "rich": {"commands", "model"},
    "lighteval": {"model"},
    "openai": {"model"},
    "rapidfuzz": {"model"},
    "pyarrow": {"model"},
}
STDLIB_ONLY = {"errors", "_lazy", "grammar", "tags"}


def modules() -> dict[str, Path]:
    """Dotted name within the package -> file."""
    found = {}
    for path in sorted(walk(PACKAGE)):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def walk(folder: Path) -> list[Path]:
    files = []
    for path in folder.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            files += walk(path)
        elif path.suffix == ".py":
            files.append(path)
    return files


def layer_of(module: str) -> str:
    top = module.partition(".")[0]
    return next((layer for prefix, layer in PARTS.items() if top.startswith(prefix)), top)


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


def own_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, by dotted name within it; a public name counts as its module."""
    known = modules()
    found = set()
    for name in imports(path):
        if name.partition(".")[0] != "mvkernels":
            continue
        inner = name.partition(".")[2]
        while inner and inner not in known:
            inner = inner.rpartition(".")[0]
        if inner:
            found.add(inner)
    return found


def may_import(layer: str, module: str, target: str) -> bool:
    target_layer = layer_of(target)
    if target_layer == layer or target_layer in EVERYWHERE or layer in ("__init__", "__main__"):
        return layer != "__main__" or target_layer in EVERYWHERE | {"commands"}
    if layer == "model":
        return target_layer in PUBLIC
    if layer == "commands":
        return target_layer != "__main__"
    return target_layer in ALLOWED[layer] or target in ALLOWED[layer]


def test_every_module_belongs_to_a_layer():
    special = {"__init__", "__main__", "model", "commands"}
    unknown = {name for name in modules() if layer_of(name) not in ALLOWED.keys() | special}
    assert not unknown, f"expected every module in a layer of this test, got {sorted(unknown)}"
    assert {"grammar", "layout", "ops", "reference", "model", "commands"} <= {layer_of(name) for name in modules()}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str):
    layer = layer_of(module)
    path = modules()[module]
    wrong = sorted(target for target in own_imports(path) if not may_import(layer, module, target))
    assert not wrong, f"mvkernels.{module} (layer {layer}) may not import {wrong}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_distributions_stay_in_their_layers(module: str):
    layer = layer_of(module)
    tops = {name.partition(".")[0] for name in imports(modules()[module])}
    wrong = {top for top in tops if top in OPTIONAL and layer not in OPTIONAL[top]}
    if layer in STDLIB_ONLY:
        wrong |= tops - set(sys.stdlib_module_names) - {"mvkernels"}
    if layer == "reference":
        wrong |= tops - set(sys.stdlib_module_names) - {"mvkernels", "torch"}
    assert not wrong, f"mvkernels.{module} (layer {layer}) may not import {sorted(wrong)}"


def test_model_and_reference_import_nothing_from_the_top_level_folders():
    """`import model` would be a second copy of the package under another name."""
    for module, path in modules().items():
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & {"model", "reference", "tests", "benchmarks"}, f"mvkernels.{module} imports {tops}"


@pytest.mark.parametrize(
    ("layer", "target", "allowed"),
    [
        ("ops", "tags", False),
        ("ops", "layout", False),
        ("reference", "layout", False),
        ("reference", "ops.mask", False),
        ("layout", "attention", False),
        ("layout", "ops.plan", False),
        ("model", "ops.mask", False),
        ("model", "reference", False),
        ("kv_cache", "decode", False),
        ("__main__", "model.engine", False),
        ("attention", "layout_build", True),
        ("model", "kv_cache", True),
        ("layout", "ops.mask", True),
    ],
)
def test_the_rule_itself(layer: str, target: str, allowed: bool):
    assert may_import(layer, layer, target) is allowed
