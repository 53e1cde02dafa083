"""The Python of README.md runs as it stands, and prints what the comment behind each print says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_cli import TRACE
from tests.tiny_model import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def test_readme_examples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    model = tiny_model()
    names: dict[str, object] = {"model": model, "tokenizer": tiny_tokenizer(), "text": TRACE}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    said = [line.partition("  # ")[2] for block in blocks for line in block.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == said
    assert names["loss"].isfinite() and model.lm_head.weight.grad.abs().sum() > 0
