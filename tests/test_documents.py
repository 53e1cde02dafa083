"""README.md and docs/: every code block runs or is checked, lines have at most 120 columns, links lead to files.

A block of ```python runs alone, in an empty folder, and prints the comment behind each `print`. The commands of ```sh
run in a folder that has the examples; http://localhost:8000 is a real endpoint. For ```console, which needs more than a
test has, programs, options, modules and make's targets are checked.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mvkernels.__main__ import COMMANDS, load_command
from tests.cli.test_cli import invoke

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROSE = [*DOCUMENTS, *(ROOT / name for name in ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PROSE}
COLUMNS, README_LINES = 120, 150
OTHER_PROGRAMS = {"accelerate", "git", "hf", "pip"}


def blocks(kind: str) -> list[Any]:
    found = []
    for path in DOCUMENTS:
        for match in re.finditer(rf"^```{kind}\n(.*?)^```", TEXTS[path], re.MULTILINE | re.DOTALL):
            line = TEXTS[path].count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{path.relative_to(ROOT)}:{line}"))
    return found


PYTHON, SHELL, CONSOLE = map(blocks, ("python", "sh", "console"))


def test_there_are_blocks() -> None:
    assert len(PYTHON) >= 12 and len(SHELL) >= 5 and len(CONSOLE) >= 5
    kinds = {kind for text in TEXTS.values() for kind in re.findall(r"^```(\w*)$", text, re.MULTILINE)}
    assert kinds <= {"python", "sh", "console", ""}, "a kind of block that no test runs"


@pytest.mark.parametrize("block", PYTHON)
def test_python_runs_alone(
    block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "document", "exec"), {"__name__": "__main__"})
    said = [line.partition("  # ")[2] for line in block.splitlines() if line.startswith("print(")]
    assert said and capsys.readouterr().out.splitlines() == said
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("block", SHELL)
def test_commands_run(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    if "--base-url" in block:
        pytest.importorskip("openai", reason="needs the curate extra")
        from tests.curator.server import Server

        with Server() as server:
            run(block.replace("http://localhost:8000/v1", server.url))
    else:
        run(block)


def run(block: str) -> None:
    for line in block.splitlines():
        program, *words = shlex.split(line)
        target = None
        if ">" in words:
            *words, _, target = words
        assert program == "mvkernels"
        done = invoke(*words)
        assert done.exit_code == 0 and done.stdout, (line, done.output, done.exception)
        if target is not None:
            Path(target).write_text(done.stdout, encoding="utf-8")
        if "--html" in words:
            assert "<!doctype html>" in Path(words[words.index("--html") + 1]).read_text(encoding="utf-8")


@pytest.mark.parametrize("block", CONSOLE)
def test_commands_that_need_more_exist(block: str) -> None:
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines():
        assert line.startswith("$ "), line
        words = [word for word in shlex.split(line[2:], comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if "mvkernels" in words:
            command, *arguments = words[words.index("mvkernels") + 1 :]
            known = {name for option in load_command(command).params for name in (*option.opts, *option.secondary_opts)}
            assert command in COMMANDS and known >= {word for word in arguments if word.startswith("--")}, line
        elif words[0] == "make":
            assert words[1] in targets, line
        elif words[:2] == ["python", "-m"]:
            assert words[2] == "pytest" or importlib.util.find_spec(words[2]), line
        else:
            assert words[0] in OTHER_PROGRAMS, line


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_short_and_links_lead_to_files(path: Path) -> None:
    lines = TEXTS[path].splitlines()
    assert [(number, len(line)) for number, line in enumerate(lines, 1) if len(line) > COLUMNS] == []
    assert path.name != "README.md" or len(lines) <= README_LINES
    for target in re.findall(r"\]\(([^)#:]+)[)#]", TEXTS[path]):
        assert (path.parent / target).exists(), target
