"""JSON from outside the program, read in one place: whatever a text holds, it gives a value or a ValueError."""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

#: Nesting that a text may have. Python's own functions for nested values recurse, so far deeper ones break later.
DEEPEST = 64
_MOST_DIGITS = 1000  # Python itself refuses to read more than 4300
_HALF_PAIR = re.compile("\\\\u[dD][89a-fA-F]|[\ud800-\udfff]")

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80
_shown.maxlevel = 3


def shown(value: Any) -> str:
    """The `repr` of a value for a message: short, and safe for any depth."""
    return _shown.repr(value)


def parse_json(text: str | bytes, strict: bool = True, deepest: int | None = DEEPEST) -> Any:
    """Read one JSON value.

    Control characters within strings are taken as they are.

    Args:
        text: The JSON text; bytes are UTF-8.
        strict: Refuse a key that comes twice in an object, NaN, infinities and half surrogate pairs. Records of data
            sets are read without: the last of two keys counts, and a half pair becomes "?".
        deepest: Levels of lists and objects inside one another; None: as many as Python's reader can take.

    Returns:
        The value, of Python's own types.

    Raises:
        ValueError: The text is no JSON, is nested deeper, has an integer of more than 1000 digits, or is refused by
            `strict`.
    """
    hooks: dict[str, Any] = {"parse_int": _integer}
    if strict:
        hooks |= {"parse_float": _finite, "parse_constant": _finite, "object_pairs_hook": _without_repeats}
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, strict=False, **hooks)
        if deepest is None or not _is_deeper(value, deepest):
            return _whole(value, strict) if _HALF_PAIR.search(decoded) else value
    except RecursionError:
        pass
    raise ValueError(f"expected JSON nested at most {deepest or 'about 900'} deep, got a deeper one")


def _is_deeper(value: Any, deepest: int) -> bool:
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(deepest):
        items = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in items if isinstance(item, (list, dict))]
        if not level:
            return False
    return True


def _whole(value: Any, strict: bool) -> Any:
    """A value without half surrogate pairs, which no file in UTF-8 can hold."""
    text = json.dumps(value, ensure_ascii=False)
    clean = text.encode("utf-8", "replace").decode("utf-8")
    if clean == text:
        return value
    if strict:
        raise ValueError("expected Unicode text, got half a surrogate pair")
    return json.loads(clean)


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"expected an integer of at most {_MOST_DIGITS} digits, got one of {len(digits)}")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if value - value != 0:
        raise ValueError(f"expected a finite number, got {number[:40]}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"expected every key once in an object, got {shown(twice)} twice")
    return found
