"""The Makefile: the demo installs what it needs and no more, says what it does, and ends when pip fails."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    # Without what a `make test` that runs this would hand down.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment["PATH"] = f"{path}{os.environ['PATH']}"
    command = ["make", "-f", str(ROOT / "Makefile"), "VENV=venv", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("setup.py", "pyproject.toml"):
        (tmp_path / name).touch()
    return tmp_path


def test_the_demo_installs_no_tools_of_developers(folder: Path):
    demo, test = make(folder, "-n", "demo").stdout, make(folder, "-n", "test").stdout
    assert "-e '.[hf]'" in demo and "triton" not in demo and "dev" not in demo.replace("/dev/null", "")
    assert "-e '.[hf,train,plot,dev]' 'triton" in test and "-e '.[hf]'" not in test
    assert demo.count("'torch==") == test.count("'torch==") > 0, "torch is pinned, and installed first"
    for shown in (demo, test):
        assert shown.index("'torch==") < shown.index("-e '.[hf")


def test_set_up_shows_lines_and_ends_with_the_status_of_pip(folder: Path):
    """A python that makes a venv whose pip shows two lines and fails at the second call."""
    fake = folder / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(
        """#!/bin/sh
case "$*" in
  *venv*) mkdir -p venv/bin; cp "$0" venv/bin/python;;
  *torch*) echo "  Downloading small.whl (3 kB)"; echo "Collecting torch";;
  *pip*) echo "ERROR: no such wheel" >&2; exit 7;;
esac
"""
    )
    fake.chmod(0o755)
    done = make(folder, "demo", path=f"{fake.parent}:")
    lines = done.stdout.splitlines()
    assert done.returncode != 0 and "Error 7" in done.stderr
    assert lines[0] == "python3 -m venv venv" and "torch==" in lines[1]
    assert (
        lines[2] == "  Collecting torch" and lines[3].endswith("-e '.[hf]'") and lines[4:] == ["  ERROR: no such wheel"]
    )
