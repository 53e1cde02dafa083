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

from mvkernels.layout import BranchLayout
from mvkernels.model import Engine, Generation
from mvkernels.model.engine.engine import FinishEvent, TokenEvent
from mvkernels.model.engine.output.trace_html import TracedRun, trace_page
from tests.engine.cases import CASES, config_for, follow
from tests.support.tiny_model import tiny_model, tiny_tokenizer

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
                assert child > run["branches"].index(branch)  # the page reads them in this order


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


def laid_out(tree: list, measured: bool = False) -> Generation:
    """A generation of this structure whose paths all advance at the same time: a token's step is its position + 1."""
    layout = BranchLayout.from_tree(tree)
    count = layout.total_tokens
    texts = [f"word {i} " for i in range(count)]
    return Generation(
        text="".join(texts),
        token_ids=[*range(count)],
        layout=layout,
        prompt_length=0,
        finish_reason="stop",
        total_tokens=count,
        critical_path=layout.critical_path,
        steps=layout.critical_path,
        warnings=[],
        tree=tree,
        texts=texts,
        steps_of=[position + 1 for position in layout.position_ids.tolist()],
        logprobs=[-1 / (3 + i % 100) for i in range(count)] if measured else None,
        top_logprobs=[tuple((k, -(1 + k) / 7) for k in range(5))] * count if measured else None,
    )


def test_a_long_trace_is_a_small_page() -> None:
    """20,000 tokens with their likeliest tokens, and 500 levels of blocks."""
    long = laid_out([500, *([[[150], [200], [120]], 50] * 37)], measured=True)
    assert long.total_tokens == 19740
    page = trace_page([TracedRun("run", long)])
    assert len(page) < 170 * long.total_tokens
    [run] = data_of(page)["runs"]
    assert run["logprobs"] == [round(value, 4) for value in long.logprobs] and len(run["branches"]) == 1 + 3 * 37
    tree: list = [1]
    for _ in range(500):
        tree = [1, [tree, [1]], 1]
    [run] = data_of(trace_page([TracedRun("run", laid_out(tree))]))["runs"]
    assert len(run["branches"]) == 1001 and max(len(branch["path"]) for branch in run["branches"]) == 500


def test_a_page_of_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one run, got none"):
        trace_page([])


needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")


def in_browser(page: Path) -> str:
    """The page as the browser has it when its scripts have run."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--window-size=1200,900")
    command = [BROWSER, *flags, profile, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@needs_browser
def test_in_a_browser(nested: Generation, tmp_path: Path) -> None:
    """The script runs to its end, and what it shows is the text of the tokens, once each."""
    page = tmp_path / "trace.html"
    page.write_text(trace_page([TracedRun("run", hostile(nested), 2.0)], "ask", "a title"), encoding="utf-8")
    shown = in_browser(page)
    spans = re.findall(r'<span class="t[^"]*"[^>]*data-i="(\d+)"[^>]*>(.*?)</span>', shown, re.DOTALL)
    assert [int(i) for i, _ in spans] == [*range(nested.total_tokens)]
    texts = [HOSTILE, *nested.texts[1:]]
    for (_, text), wanted in zip(spans, texts, strict=True):
        assert html.unescape(text) in (wanted, "⏎"), wanted
    assert "owned" not in re.findall(r"<title>(.*?)</title>", shown)[0] and "<img" not in shown
    assert shown.count('class="path"') == 8 and 'aria-label="Timeline:' in shown
    assert f"<dd>{nested.parallelism:.2f}</dd>" in shown and f"<dd>{nested.steps}</dd>" in shown


# Uses the page as a reader does, by its keys and buttons, and leaves what it saw as JSON.
READER = """
const view = $("timeline"), seen = {};
const press = (id, key) => $(id).dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const box = node => node.getBoundingClientRect();
const last = () => cellAt({offsetX: (run.steps + .5) * cell - view.scrollLeft, offsetY: AXIS + ROW / 2});
const wide = () => view.scrollWidth - view.clientWidth;
seen.rows = [...$("names").children].slice(1).map(row => row.querySelector(".name").textContent);
seen.titles = [...$("names").children].slice(1).map(row => row.title);
seen.fits = wide() === 0 && last().includes(run.texts.length - 1);
const labels = [...$("names").querySelectorAll(".name, .number")];
seen.apart = labels.every(label => box(label).right <= box($("canvas")).left);
for (let i = 0; i < 20; i++) press("timeline", "+");
seen.zoomed = [wide() > 1000, $("in").disabled, $("canvas").width === view.clientWidth - $("names").offsetWidth];
view.scrollLeft = 1e9;
seen.end = last();
view.scrollLeft = 0;
seen.start = cellAt({offsetX: 1.5 * cell, offsetY: AXIS + ROW / 2});
$("out").click(); $("out").click();
seen.less = wide() > 0;
press("timeline", "0");
seen.fitted = wide() === 0 && $("fit").disabled;
for (const key of ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"]) press("text", key);
seen.marked = [marked, $("tip").style.visibility, $("tip").querySelector("p").textContent];
$("names").children[1].focus();
press("names", "ArrowDown"); press("names", "ArrowDown");
seen.focus = document.activeElement.title;
document.body.replaceChildren(el("pre", "seen", JSON.stringify(seen)));
"""


@needs_browser
@pytest.mark.parametrize("blocks", [1, 40])
def test_in_a_browser_the_timeline_is_read_by_keys(blocks: int, tmp_path: Path) -> None:
    """A short and a long trace fit into the width; zooming goes to single steps; each path stands below its block."""
    out = laid_out([400, *([[[150], [200, [[30]], 7], [120]], 50] * blocks)])
    page = tmp_path / "trace.html"
    html_text = trace_page([TracedRun("run", out)])
    end = html_text.rindex("</script>")
    page.write_text(html_text[:end] + READER + html_text[end:], encoding="utf-8")
    [found] = re.findall(r'<pre class="seen">(.*?)</pre>', in_browser(page), re.DOTALL)
    seen = json.loads(html.unescape(found))
    assert len(seen["rows"]) == 1 + 6 * blocks
    for number in range(blocks):
        rows, titles = (seen[key][1 + 6 * number :][:6] for key in ("rows", "titles"))
        assert [row.split("word")[0] for row in rows] == [
            f"block {number + 1} · 3 paths", "1", "2", "block 1 · 1 path", "2.1", "3",
        ]  # fmt: skip
        assert titles[4].startswith(f"block {number + 1} › path 2 › block 1 › path 1: 30 tokens, steps ")
    assert seen["fits"] and seen["apart"] and seen["less"] and seen["fitted"]
    assert seen["zoomed"] == [True, True, True]
    assert seen["end"] == [out.total_tokens - 1] and seen["start"] == [0]
    assert seen["marked"] == [[1], "visible", "sampled · trunk · step 2 · position 1 · id 1"]
    assert seen["focus"].startswith("block 1 › path 1: 150 tokens, steps 401–550")
