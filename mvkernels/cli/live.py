"""Showing paths while they grow: lines that are marked with their path, and in a terminal panels side by side."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mvkernels.grammar import TAG_PATTERN
from mvkernels.model.engine.output.events import Event, ForkEvent, MergeEvent, PathEndEvent, TextEvent, TokenEvent

Path = tuple[int, ...]
#: Of a panel.
PATH_LINES, PANEL_WIDTH = 4, 26
REFRESH_PER_SECOND = 12


class View(Protocol):
    """Something that events are shown on, as a context manager."""

    def show(self, event: Event) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def visible(text: str) -> str:
    """A model's text without what a terminal would obey: control characters become their pictures (U+2400 ..)."""
    return text.translate(_CONTROL_PICTURES)


_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def path_name(path: Path) -> str:
    """`2.1` for (2, 1); the trunk has no name."""
    return ".".join(map(str, path))


class Silent:
    """Shows nothing."""

    def show(self, event: Event) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class PlainLines(Silent):
    """The answer as it grows: each line when it is whole, with its path before it, `  2.1 | ...`.

    Of a path only the first and the last line are shown, and no outlines, which the first lines repeat; a line of tags
    alone is none. So the lines of paths that run at the same time stand beside one another.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pending: dict[Path, str] = {}
        self._lines: dict[Path, list[str]] = {}  # of each path, those that are whole
        self._in_goal = False

    def show(self, event: Event) -> None:
        if isinstance(event, (TokenEvent, TextEvent)):
            *lines, self._pending[event.path] = (self._pending.get(event.path, "") + event.text).split("\n")
            for line in lines:
                self._take(event.path, line)
        elif isinstance(event, PathEndEvent):
            self._end(event.path)

    def _take(self, path: Path, line: str) -> None:
        if not path:
            self._in_goal |= "<Goal>" in line
            outline, self._in_goal = self._in_goal, self._in_goal and "</Goal>" not in line
            if outline:
                return
        text = TAG_PATTERN.sub("", line).strip()
        if not text:
            return
        kept = self._lines.setdefault(path, [])
        if not path or not kept:
            self._print(path, text)
        kept.append(text)

    def _end(self, path: Path) -> None:
        self._take(path, self._pending.pop(path, ""))
        lines = self._lines.pop(path, [])
        if len(lines) > 1:
            self._print(path, "... " * (len(lines) > 2) + lines[-1])

    def _print(self, path: Path, line: str) -> None:
        self._console.print(f"{path_name(path):>5} | {visible(line)}", markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, *exception: object) -> None:
        for path in sorted(self._pending):
            self._end(path) if path else self._take(path, self._pending[path])


class LivePanels(PlainLines):
    """The same lines, and below them, while it runs, the running paths side by side with the last lines of each."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._text: dict[Path, str] = {}
        self._idle: set[Path] = set()  # they wait for their own paths, or for their siblings
        self._live = Live(
            console=console, transient=True, refresh_per_second=REFRESH_PER_SECOND, get_renderable=self.render
        )

    def show(self, event: Event) -> None:
        super().show(event)
        if isinstance(event, (TokenEvent, TextEvent)):
            self._text[event.path] = self._text.get(event.path, "") + event.text
        elif isinstance(event, ForkEvent):
            self._idle.add(event.path)
            for number in range(1, event.width + 1):
                self._text[(*event.path, number)] = ""
        elif isinstance(event, PathEndEvent):
            self._idle.add(event.path)
        elif isinstance(event, MergeEvent):
            for path in self._below(event.path):
                del self._text[path]
            self._idle &= self._text.keys() - {event.path}

    def _below(self, path: Path) -> list[Path]:
        return [other for other in self._text if len(other) > len(path) and other[: len(path)] == path]

    def running(self) -> list[Path]:
        """The paths that are being written, in order; one whose block is running waits, and one that ended is gone."""
        return [path for path in sorted(self._text) if path and path not in self._idle]

    def render(self) -> RenderableType:
        running = self.running()
        if not running:
            return Text(visible(self._pending.get((), "")), no_wrap=True, overflow="ellipsis")
        columns = min(len(running), max(1, self._console.width // PANEL_WIDTH))
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        panels = [
            Panel(tail(self._text[path], PATH_LINES), title=path_name(path), title_align="left", height=PATH_LINES + 2)
            for path in running
        ]
        for first in range(0, len(panels), columns):
            grid.add_row(*panels[first : first + columns])
        return grid

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._live.stop()


def tail(text: str, lines: int) -> Text:
    """The last lines of a text that are not empty."""
    kept = [line for line in text.split("\n") if line.strip()][-lines:]
    return Text(visible("\n".join(kept)), no_wrap=True, overflow="ellipsis")


def make_view(console: Console, quiet: bool) -> View:
    if quiet:
        return Silent()
    return LivePanels(console) if console.is_terminal else PlainLines(console)
