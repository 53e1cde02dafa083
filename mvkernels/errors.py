"""Every error type of the library. Each message says what was expected and what came.

A plain `ValueError` means that the caller passed something wrong; the types below add what a caller may want to catch.
"""

from __future__ import annotations

from numbers import Integral


def described(value: object) -> str:
    """What came, in a few words for a message: `None`, `list`, `Tensor [2, 3] torch.int64`."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{type(value).__name__} {list(shape)} {dtype}"
    return "None" if value is None else type(value).__name__


def is_integer(value: object) -> bool:
    """Whether a value is an integer, be it one of NumPy."""
    return isinstance(value, Integral)


def require_integer(expected: str, *values: object) -> None:
    """Raise ValueError where a value is no integer. expected: the message up to what came."""
    for value in values:
        if not is_integer(value):
            raise ValueError(f"{expected}, got {value!r}")


def require_type(kind: type, expected: str | None = None, **values: object) -> None:
    """Raise ValueError where one of the values, by their names, is of another type. expected: default, the type."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name}: expected a {expected or kind.__name__}, got {described(value)}")


class GrammarError(ValueError):
    """A token sequence is not a well-formed trace.

    `offset` is the index of the offending token, `expected` says what may stand there, `found` what does; `line` is the
    line of the text (from 1), where there is a text.
    """

    def __init__(self, offset: int, expected: str, found: str, line: int | None = None) -> None:
        place = f"token {offset}" if line is None else f"line {line}, token {offset}"
        super().__init__(f"{place}: expected {expected}, found {found}")
        self.offset = offset
        self.expected = expected
        self.found = found
        self.line = line

    def __reduce__(self) -> tuple[type[GrammarError], tuple[int, str, str, int | None]]:
        # The default pickles the message alone, which does not fit __init__: data loaders raise across processes.
        return type(self), (self.offset, self.expected, self.found, self.line)


class BackendError(NotImplementedError):
    """The backend that was asked for cannot do this, or (for "auto") none can. The message gives each reason."""


class CacheError(RuntimeError):
    """The paged cache refused an operation; nothing was changed."""


class OutOfPages(CacheError):
    """A step needs more pages than are free; nothing was reserved."""


class BranchError(CacheError):
    """A branch handle cannot be used so: it was freed, belongs to another cache, or is busy in a fork or a step."""


class StaleStep(CacheError):
    """A step was used after the tree it was planned for changed, or after its commit or rollback."""
