"""The wheel, the sdist and the editable install: mvkernels/ alone is installed, and imports without extras."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="needs the dev extra: build is not installed")

ROOT = Path(__file__).resolve().parent.parent
CODE = "mvkernels"
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
# What the optional extras bring; none of it may be needed by `import mvkernels`.
OPTIONAL = (
    "transformers", "accelerate", "safetensors", "tokenizers", "gguf", "huggingface_hub",
    "triton", "cupy", "cupyx", "matplotlib", "openai", "rapidfuzz", "pyarrow",
)  # fmt: skip


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """The stdout of a command; a failure shows everything it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **(env or {})}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging reads, so that building leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("project") / "mvkernels"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / CODE, copy / CODE, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def built(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``direct/*.whl`` built from the tree, and ``both/``: an sdist and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("built")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", out / "both", project, cwd=out)
    run(*build, "--wheel", "--outdir", out / "direct", project, cwd=out)
    return out


def wheel_contents(folder: Path) -> dict[str, bytes]:
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def source_files(project: Path) -> dict[str, bytes]:
    """What users need of the tree, by the path it has when installed; build leftovers aside."""
    files = (path for path in (project / CODE).rglob("*") if path.is_file())
    return {path.relative_to(project).as_posix(): path.read_bytes() for path in files}


def test_wheel_holds_every_file_of_the_package_and_nothing_else(built: Path, project: Path):
    contents = wheel_contents(built / "direct")
    package = {name: data for name, data in contents.items() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in package} == {"mvkernels"}
    assert package == source_files(project)


def test_wheel_has_the_embedded_model(built: Path):
    embedded = {
        Path(name).name: len(data)
        for name, data in wheel_contents(built / "direct").items()
        if name.startswith("mvkernels/model/embedded/")
    }
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= embedded.keys()
    assert sum(embedded.values()) <= 8 * 2**20, f"the embedded model takes {sum(embedded.values())} bytes"


def test_sdist_gives_the_same_wheel(built: Path):
    from_sdist = wheel_contents(built / "both")
    direct = wheel_contents(built / "direct")
    assert from_sdist.keys() == direct.keys()
    assert all(from_sdist[name] == direct[name] for name in direct)


def test_sdist_holds_no_links(built: Path):
    [sdist] = (built / "both").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert any(member.name.endswith("/mvkernels/model/__init__.py") for member in members)


def test_wheel_has_the_templates_of_pages(built: Path):
    templates = {name for name in wheel_contents(built / "direct") if name.endswith(".html")}
    assert templates == {str(path.relative_to(ROOT)) for path in (ROOT / CODE).rglob("*.html")}


def test_metadata(built: Path):
    contents = wheel_contents(built / "direct")
    [metadata] = [data.decode() for name, data in contents.items() if name.endswith(".dist-info/METADATA")]
    lines = metadata.splitlines()
    expected = {"Name: mvkernels", "Version: 0.1.0", "Requires-Python: >=3.11", "License-Expression: Apache-2.0"}
    assert expected <= {*lines}
    extras = {line.partition(": ")[2] for line in lines if line.startswith("Provides-Extra: ")}
    assert {"hf", "train", "eval", "bench", "cuda", "plot", "curate", "dev"} <= extras
    needed = {line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")}
    assert {line for line in needed if "extra ==" not in line} == {"torch>=2.11", "numpy", "typer<0.29", "rich"}


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new virtual environment that sees what is installed here, but no optional extra."""
    folder = tmp_path_factory.mktemp("bare")
    visible = folder / "visible"
    visible.mkdir()
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            top = entry.name.partition(".")[0].partition("-")[0]
            hidden = top in OPTIONAL or "mvkernels" in entry.name or entry.suffix == ".pth"
            if not hidden and not (visible / entry.name).exists():
                (visible / entry.name).symlink_to(entry)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    [site_packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "visible.pth").write_text(f"{visible}\n")
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def editable(bare_python: Path, project: Path) -> Path:
    """`bare_python` after an editable install of `project`."""
    command = ("-m", "pip", "--python", bare_python, "install", "--no-deps", "--no-build-isolation", "-e", project)
    run(sys.executable, *command, cwd=project)
    return bare_python


def test_editable_install_runs_the_tree_itself(editable: Path, project: Path, tmp_path: Path):
    code = "import mvkernels, mvkernels.model, mvkernels.reference; print(mvkernels.__file__)"
    assert Path(run(editable, "-c", code, cwd=tmp_path).strip()) == project / "mvkernels" / "__init__.py"
    assert run(editable.with_name("mvkernels"), "--version", cwd=tmp_path).strip() == "mvkernels 0.1.0"
    assert run(editable, "-m", "mvkernels", "--version", cwd=tmp_path).strip() == "mvkernels 0.1.0"


@pytest.mark.parametrize("name", ["model", "reference"])
def test_top_level_links_lead_into_the_package_and_refuse_their_own_name(name: str):
    assert (ROOT / name).is_symlink() and (ROOT / name).resolve() == ROOT / "mvkernels" / name
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: this package is mvkernels.{name} and cannot be imported as {name!r}" in done.stderr


def test_import_needs_torch_and_numpy_only(editable: Path, tmp_path: Path):
    """In an environment without any extra, what needs none works, and the rest says which extra it needs."""
    code = """
import sys
import mvkernels as mk
assert "torch" not in sys.modules, "import mvkernels must be quick"
import torch
layout = mk.BranchLayout.from_tree([3, [[5], [2]], 4])
q = torch.randn(14, 2, 8)
out = mk.multiverse_attention(q, q, q, layout)
assert out.shape == q.shape
cache = mk.PagedKVCache(4, 16, 1, 2, 8, torch.float32, "cpu")
for module, name in ((mk, "patch_model"), (mk, "unpatch_model")):
    try:
        getattr(module, name)
    except ImportError as error:
        print(error)
import mvkernels.model
for name in ("Engine", "GenerationConfig"):
    try:
        exec(f"from mvkernels.model import {name}")
    except ImportError as error:
        print(error)
try:
    mk.multiverse_attention(q, q, q, layout, backend="triton")
except mk.BackendError as error:
    print(error)
assert not {"triton", "transformers", "cupy"} & sys.modules.keys()
"""
    lines = run(editable, "-c", code, cwd=tmp_path, env={"TRITON_INTERPRET": "0"}).splitlines()
    what = "needs transformers, which is not installed: pip install 'mvkernels[hf]'"
    names = ["mvkernels.patch_model", "mvkernels.unpatch_model", "mvkernels.model.Engine"]
    assert lines[:3] == [f"{name} {what}" for name in names]
    assert lines[3] == f"mvkernels.model.GenerationConfig {what}"
    assert "triton" in lines[4].lower() and "not installed" in lines[4]


def test_unknown_names_are_attribute_errors():
    import mvkernels

    with pytest.raises(AttributeError, match="has no attribute 'nothing_of_that_name'"):
        _ = mvkernels.nothing_of_that_name
    assert {*mvkernels.__all__} <= {*dir(mvkernels)}
