"""Paths on the screen while they grow: plain lines and panels, from scripted events."""

from __future__ import annotations

import io

from rich.console import Console

from mvkernels.commands.live import LivePanels, PlainLines, Silent, make_view
from mvkernels.model.events import ForkEvent, MergeEvent, PathEndEvent, TokenEvent


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
    out = console(terminal=False)
    with PlainLines(out) as view:
        for event in EVENTS:
            view.show(event)
        assert "Three, nine." not in out.file.getvalue(), "a line was printed before it was whole"
    assert out.file.getvalue().splitlines() == [
        "      | Two sums.",
        "    1 | <Path>",
        "    2 | <Path>",
        "    1 | 1: one and two",
        "  1.1 | <Path>",
        "    2 | 2: four and five",
        "    2 | </Path>",
        "  1.1 | 1.1: [b]deep[/b]",
        "  1.1 | </Path>",
        "    1 | is three. </Path>",
        "      | <Conclusion>",
        "      | Three, nine.",
    ]


def test_control_characters_of_a_model_never_reach_the_terminal():
    for view_of in (PlainLines, LivePanels):
        out = console(terminal=False)
        with view_of(out) as view:
            view.show(token((), "a\x1b]0;title\x07b\r\x9b\n"))
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
    view = LivePanels(out)
    for event in EVENTS[:7]:
        view.show(event)
    out.print(view.render())
    shown = out.file.getvalue()
    for part in ("Two sums.", "─ 2 ─", "2: four", "─ 1.1 ─", "1.1: [b]deep[/b]"):
        assert part in shown
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
