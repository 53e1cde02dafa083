"""The HTML trace: complete, self-contained, safe with any text; in a browser, where there is one, what it shows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mvkernels.model import Engine, Generation
from mvkernels.model.engine import FinishEvent, TokenEvent
from mvkernels.model.trace_html import TracedRun, trace_page
from tests.engine_cases import CASES, config_for, follow
from tests.tiny_model import tiny_model, tiny_tokenizer

HOSTILE = "</script><script>document.title='owned'</script><!--DATA--><!--PLAIN--><img src=x onerror=alert(1)>&amp;"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), page_size=4)


@pytest.fixture(scope="module")
def nested(engine: Engine) -> Generation:
    [out] = engine.generate("the product", config_for(engine, logprobs=2), follow(engine, CASES["nested"]))
    return out


def data_of(page: str) -> dict:
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def hostile(out: Generation) -> Generation:
    """With a text that would end the script, and a log-probability that is no number."""
    texts = [HOSTILE, *out.texts[1:]]
    changes = {"texts": texts, "text": "".join(texts), "warnings": [HOSTILE], "error": HOSTILE}
    return replace(out, **changes, logprobs=[float("-inf"), *out.logprobs[1:]])


def test_the_page_has_every_token_with_its_path(engine: Engine) -> None:
    events = list(engine.stream("the product", config_for(engine), follow(engine, CASES["nested"])))
    [out] = [event.generation for event in events if isinstance(event, FinishEvent)]
    [run] = data_of(trace_page([TracedRun("run", out)]))["runs"]
    found = sorted(
        (branch["path"], run["positions"][i], run["ids"][i], run["texts"][i], not run["sampled"][i])
        for branch in run["branches"]
        for part in branch["parts"]
        if isinstance(part, list)
        for i in range(*part)
    )
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert found == sorted((list(e.path), e.position, e.token_id, e.text, e.forced) for e in tokens)
    blocks = [part["block"] for branch in run["branches"] for part in branch["parts"] if isinstance(part, dict)]
    assert sorted(child for block in blocks for child in block) == [*range(1, len(run["branches"]))]
    for branch in run["branches"]:
        for part in branch["parts"]:
            for i, child in enumerate(part["block"] if isinstance(part, dict) else ()):
                assert run["branches"][child]["path"] == [*branch["path"], i + 1]


def test_a_prompt_cut_in_a_path_is_left_out(engine: Engine, nested: Generation) -> None:
    for cut in range(1, len(nested.token_ids), 7):
        count = len(nested.token_ids) - cut
        out = replace(nested, prompt_length=cut, total_tokens=count, texts=nested.texts[-count:], steps_of=[1] * count)
        out = replace(out, text="".join(out.texts), logprobs=None, top_logprobs=None)
        [run] = data_of(trace_page([TracedRun("run", out)]))["runs"]
        ranges = sorted(part for b in run["branches"] for part in b["parts"] if isinstance(part, list))
        assert [i for first, last in ranges for i in range(first, last)] == [*range(count)]


def test_no_text_leaves_its_place(nested: Generation) -> None:
    run = TracedRun(HOSTILE, hostile(nested), seconds=1.5)
    page = trace_page([run, TracedRun("two", nested)], HOSTILE, HOSTILE, decode=lambda token: HOSTILE)
    data = data_of(page)
    assert data["prompt"] == data["title"] == data["runs"][0]["name"] == data["runs"][0]["texts"][0] == HOSTILE
    assert set(data["names"].values()) == {HOSTILE} and data["runs"][0]["logprobs"][0] == "-inf"
    assert HOSTILE not in page and html.escape(HOSTILE) in page and "<img" not in page
    clean = trace_page([TracedRun("run", nested), TracedRun("two", nested)])
    assert page.count("<script") == clean.count("<script") == 2


def test_the_page_needs_nothing_else(nested: Generation) -> None:
    page = trace_page([TracedRun("run", nested)])
    code = page.replace(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0], "")
    assert "default-src 'none'" in code
    for word in (
        "http:",
        "https:",
        "src=",
        "<link",
        "url(",
        "@import",
        "fetch(",
        "innerHTML",
        "insertAdjacent",
        "eval(",
    ):
        assert word not in code, word
    assert not re.search("<!--(TITLE|DATA|PLAIN)-->", page)


def test_a_page_of_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one run, got none"):
        trace_page([])


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")
def test_in_a_browser(nested: Generation, tmp_path: Path) -> None:
    """The script runs to its end, and what it shows is the text of the tokens, once each."""
    page = tmp_path / "trace.html"
    page.write_text(trace_page([TracedRun("run", hostile(nested), 2.0)], "ask", "a title"), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", profile, "--dump-dom")
    done = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    shown = done.stdout
    spans = re.findall(r'<span class="t[^"]*"[^>]*data-i="(\d+)"[^>]*>(.*?)</span>', shown, re.DOTALL)
    assert [int(i) for i, _ in spans] == [*range(nested.total_tokens)]
    texts = [HOSTILE, *nested.texts[1:]]
    for (_, text), wanted in zip(spans, texts, strict=True):
        assert html.unescape(text) in (wanted, "⏎"), wanted
    assert "owned" not in re.findall(r"<title>(.*?)</title>", shown)[0] and "<img" not in shown
    assert shown.count('class="path"') == 8 and 'aria-label="Timeline:' in shown
    assert f"<dd>{nested.parallelism:.2f}</dd>" in shown and f"<dd>{nested.steps}</dd>" in shown
