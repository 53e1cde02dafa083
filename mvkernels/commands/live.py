"""Showing paths while they grow: panels in a terminal, otherwise one plain line at a time, marked with its path."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from mvkernels.model.events import Event, ForkEvent, MergeEvent, PathEndEvent, TextEvent, TokenEvent

Path = tuple[int, ...]
TRUNK_LINES, PATH_LINES = 6, 4
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
    """Each line is printed when it is whole, with its path before it: `2.1 | ...`. Paths interleave as they grow."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pending: dict[Path, str] = {}

    def show(self, event: Event) -> None:
        if isinstance(event, PathEndEvent):
            self._print(event.path, self._pending.pop(event.path, ""))
        if not isinstance(event, (TokenEvent, TextEvent)):
            return
        *lines, rest = (self._pending.pop(event.path, "") + event.text).split("\n")
        if rest == "</Parallel>":
            lines.append(rest)
            rest = ""
        for line in lines:
            self._print(event.path, line)
        self._pending[event.path] = rest

    def _print(self, path: Path, line: str) -> None:
        if line.strip():
            label = path_name(path)
            self._console.print(f"{label:>5} | {visible(line)}", markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, *exception: object) -> None:
        for path, rest in sorted(self._pending.items()):
            self._print(path, rest)


class LivePanels(Silent):
    """The trunk, and below it one panel per running path with the last lines of its text."""

    def __init__(self, console: Console) -> None:
        self._text: dict[Path, str] = {(): ""}
        self._idle: set[Path] = set()  # they wait for their own paths, or for their siblings
        self._live = Live(
            console=console, transient=True, refresh_per_second=REFRESH_PER_SECOND, get_renderable=self.render
        )

    def show(self, event: Event) -> None:
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
        panels: list[RenderableType] = [tail(self._text[()], TRUNK_LINES)]
        for path in self.running():
            panels.append(Panel(tail(self._text[path], PATH_LINES), title=path_name(path), title_align="left"))
        return Group(*panels)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()


def tail(text: str, lines: int) -> Text:
    """The last lines of a text that are not empty."""
    kept = [line for line in text.split("\n") if line.strip()][-lines:]
    return Text(visible("\n".join(kept)), no_wrap=True, overflow="ellipsis")


def make_view(console: Console, quiet: bool) -> View:
    if quiet:
        return Silent()
    return LivePanels(console) if console.is_terminal else PlainLines(console)
