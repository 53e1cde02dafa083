"""The exceptions of the library, and checks of arguments. Each message has what was expected and what came.

A plain `ValueError` is an invalid argument. The types below are for errors that a caller may handle.
"""

from __future__ import annotations

from numbers import Integral


def described(value: object) -> str:
    """Describe a value in an error message: `None`, `list`, `Tensor [2, 3] torch.int64`."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{type(value).__name__} {list(shape)} {dtype}"
    return "None" if value is None else type(value).__name__


def is_integer(value: object) -> bool:
    """Return whether a value is an integer, of Python or NumPy."""
    return isinstance(value, Integral)


def require_integer(expected: str, *values: object) -> None:
    """Raise ValueError unless all values are integers. expected: the message up to what came."""
    for value in values:
        if not is_integer(value):
            raise ValueError(f"{expected}, got {value!r}")


def require_type(kind: type, expected: str | None = None, **values: object) -> None:
    """Raise ValueError unless all values, by their names, are of type `kind`. expected: words for the type."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name}: expected a {expected or kind.__name__}, got {described(value)}")


class GrammarError(ValueError):
    """A token sequence is not a well-formed trace.

    Args:
        offset: Index of the offending token.
        expected: What the grammar allows there.
        found: What is there.
        line: Line of the text, from 1; None for token ids.
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
    """The requested backend cannot compute this, or, for "auto", none can; the message gives each reason."""


class CacheError(RuntimeError):
    """The paged KV cache refused an operation; nothing was changed."""


class OutOfPages(CacheError):
    """A step needs more pages than are free; nothing was reserved."""


class BranchError(CacheError):
    """A branch handle cannot be used for this: it was freed, is of another cache, or is in use by a fork or a step."""


class StaleStep(CacheError):
    """A step was used after it was committed or rolled back, or after the tree of its cache changed."""
