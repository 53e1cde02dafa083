"""The Python of README.md runs as it stands, and prints what the comment behind each print says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.test_cli import TRACE, invoke
from tests.tiny_model import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def test_readme_examples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """In order, in a folder that has the package at the same place; a command's output goes where it says."""
    (tmp_path / "mvkernels").symlink_to(ROOT / "mvkernels")
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|sh)\n(.*?)```(?:\n\n```\n(.*?)```)?", readme, re.DOTALL)
    assert [kind for kind, _, _ in blocks].count("python") >= 5 and "sh" in {kind for kind, _, _ in blocks}
    model = tiny_model()
    names: dict[str, object] = {"model": model, "tokenizer": tiny_tokenizer(), "text": TRACE}
    for kind, block, shown in blocks:
        if kind == "sh":
            for line in block.splitlines():
                program, *arguments = shlex.split(line)
                *arguments, arrow, target = arguments
                assert (program, arrow) == ("mvkernels", ">")
                done = invoke(*arguments)
                assert done.exit_code == 0, done.output
                Path(target).write_text(done.stdout, encoding="utf-8")
            continue
        exec(compile(block, "README.md", "exec"), names)
        said = [line.partition("  # ")[2] for line in block.splitlines() if line.startswith("print(")]
        assert capsys.readouterr().out.splitlines() == (shown.splitlines() or said)
    assert names["loss"].isfinite() and model.lm_head.weight.grad.abs().sum() > 0
    assert "<!doctype html>" in (tmp_path / "trace.html").read_text(encoding="utf-8")


def test_readme_links_lead_to_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / target).exists(), target
