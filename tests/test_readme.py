"""README.md: each block runs alone, as it stands, and prints what the comment behind each print says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import invoke

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON, SHELL = (re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("python", "sh"))


def test_there_are_blocks():
    assert len(PYTHON) >= 5 and len(SHELL) >= 2


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_runs_alone(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """In a fresh namespace, outside of the checkout."""
    monkeypatch.chdir(tmp_path)
    block = PYTHON[number]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block, "README.md", "exec"), namespace)
    if "model" in namespace:
        gradients = [weight.grad for weight in namespace["model"].parameters()]
        assert all(one is not None and one.isfinite().all() and one.any() for one in gradients)
    said = [line.partition("  # ")[2] for line in block.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == said
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("number", range(len(SHELL)))
def test_commands_run_alone(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """In a folder that has the examples; a command's output goes where it says."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for line in SHELL[number].splitlines():
        program, *arguments = shlex.split(line)
        target = None
        if ">" in arguments:
            *arguments, _, target = arguments
        assert program == "mvkernels"
        done = invoke(*arguments)
        assert done.exit_code == 0 and done.stdout, (line, done.output, done.exception)
        if target is not None:
            Path(target).write_text(done.stdout, encoding="utf-8")
    if "--html" in SHELL[number]:
        assert "<!doctype html>" in (tmp_path / "trace.html").read_text(encoding="utf-8")


def test_readme_links_lead_to_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / target).exists(), target
