"""Paths on the screen while they grow: plain lines and panels, from scripted events."""

from __future__ import annotations

import io
import re

from rich.console import Console

from mvkernels.cli.live import LivePanels, PlainLines, Silent, make_view
from mvkernels.model.engine.output.events import ForkEvent, MergeEvent, PathEndEvent, TokenEvent


def token(path: tuple[int, ...], text: str) -> TokenEvent:
    return TokenEvent(request=0, path=path, token_id=1, text=text, position=0, forced=False)


EVENTS = [
    token((), "Two sums.\n"),
    ForkEvent(0, (), 2),
    token((1,), "\n<Path>\n1: one"),
    token((2,), "\n<Path>\n2: four"),
    token((1,), " and two\n"),
    ForkEvent(0, (1,), 1),
    token((1, 1), "\n<Path>\n1.1: [b]deep[/b]"),
    token((2,), " and five\n</Path>"),
    PathEndEvent(0, (2,), 7),
    token((1, 1), "\n</Path>"),
    PathEndEvent(0, (1, 1), 9),
    MergeEvent(0, (1,), 9),
    token((1,), "is three. </Path>"),
    PathEndEvent(0, (1,), 12),
    MergeEvent(0, (), 12),
    token((), "\n<Conclusion>\nThree, nine."),
]


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=60, force_terminal=terminal, color_system=None)


def test_plain_lines_come_whole_and_say_their_path():
    """Of a path its first and last line; no outlines, no tags alone; the trunk's last line when it ends."""
    out = console(terminal=False)
    with PlainLines(out) as view:
        for event in EVENTS:
            view.show(event)
        assert "Three, nine." not in out.file.getvalue(), "a line was printed before it was whole"
    assert out.file.getvalue().splitlines() == LINES


LINES = [
    "      | Two sums.",
    "    1 | 1: one and two",
    "    2 | 2: four and five",
    "  1.1 | 1.1: [b]deep[/b]",
    "    1 | is three.",
    "      | Three, nine.",
]


def test_plain_lines_of_a_long_path_and_of_a_goal():
    out = console(terminal=False)
    with PlainLines(out) as view:
        view.show(token((), "<Goal>\n<Outline>\n1: a\n</Outline></Goal>"))
        view.show(ForkEvent(0, (), 1))
        view.show(token((1,), "\n<Path>\n1: a\nfirst\nsecond\nthird\n</Path>"))
        view.show(PathEndEvent(0, (1,), 7))
        view.show(token((), "\n<Conclusion>\nb</Conclusion>\nafter"))
    assert out.file.getvalue().splitlines() == ["    1 | 1: a", "    1 | ... third", "      | b", "      | after"]


def test_a_terminal_keeps_the_same_lines():
    """What the panels showed is gone when they close; the lines above them stay."""
    out = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    with LivePanels(out) as view:
        for event in EVENTS:
            view.show(event)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.file.getvalue()).replace("\r", "\n").splitlines()
    kept = [line.rstrip() for line in shown if re.match(r" *[\d.]* \| ", line)]
    assert kept == LINES


def test_control_characters_of_a_model_never_reach_the_terminal():
    for view_of in (PlainLines, LivePanels):
        out = console(terminal=False)
        with view_of(out) as view:
            text = "a\x1b]0;title\x07b\r\x9b"
            for event in (token((), f"{text}\n"), ForkEvent(0, (), 1), token((1,), text)):
                view.show(event)
            if isinstance(view, LivePanels):
                out.print(view.render())
        shown = out.file.getvalue()
        assert "a␛]0;title␇b␍" in shown and not set("\x1b\x07\r\x9b") & set(shown)


def test_panels_show_the_paths_that_run():
    view = LivePanels(console(terminal=True))
    running = []
    for event in EVENTS:
        view.show(event)
        running.append(view.running())
    assert running[1] == [(1,), (2,)]
    assert running[5] == [(1, 1), (2,)], "a path waits while its own block runs"
    assert running[8] == [(1, 1)], "path 2 has ended"
    assert running[10] == [], "path 1.1 too, and path 1 waits for it"
    assert running[11] == [(1,)], "path 1 goes on after its block"
    assert running[13] == [], "it has ended, whatever stands before its tag"
    assert running[-1] == []


def test_panels_hold_the_last_lines_of_each_path():
    out = console(terminal=True)
    view = LivePanels(console(terminal=True))
    for event in EVENTS[:7]:
        view.show(event)
    out.print(view.render())
    shown = out.file.getvalue()
    for part in ("─ 2 ─", "2: four", "─ 1.1 ─", "1.1: [b]deep[/b]"):
        assert part in shown
    [titles] = [line for line in shown.splitlines() if "─ 2 ─" in line]
    assert "─ 1.1 ─" in titles, "paths stand side by side"
    assert "1: one and two" not in shown


def test_a_second_block_starts_with_empty_paths():
    view = LivePanels(console(terminal=True))
    for event in (*EVENTS, ForkEvent(0, (), 2), token((1,), "again")):
        view.show(event)
    out = console(terminal=True)
    out.print(view.render())
    assert "again" in out.file.getvalue() and "one and two" not in out.file.getvalue()


def test_the_view_fits_the_console():
    assert isinstance(make_view(console(terminal=True), quiet=False), LivePanels)
    assert type(make_view(console(terminal=False), quiet=False)) is PlainLines
    assert type(make_view(console(terminal=True), quiet=True)) is Silent


def test_live_panels_leave_the_terminal_clean_after_an_error():
    out = console(terminal=True)
    try:
        with LivePanels(out) as view:
            view.show(EVENTS[0])
            raise RuntimeError("of the engine")
    except RuntimeError:
        pass
    assert out._live_stack == [], "the live display is still running"
    assert out.file.getvalue().endswith("\x1b[2K") or "\x1b[?25h" in out.file.getvalue()
