"""A chain as numbered sentences: the model names sentences by their numbers, and code puts the text back exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Behind the end of a sentence, or of a line. Not behind "e.g." or the number of a list item, and not within a number.
_END = re.compile(
    r"""(?: (?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)(?<!\bEq)(?<!^\d)(?<!\n\d)(?<!\n\d\d)(?<![.!?:;]\s\d) \.
         | (?<![!?]) [!?]++ )
        ["')\]*]*+ (?= \s ) [ \t]*+ \n* (?:[ \t]*\n)*
      | (?: [。！？]++ [”’」』)]*+ | \n ) [ \t]*+ \n* (?:[ \t]*\n)*""",
    re.VERBOSE,
)
_LONGEST = 2000  # characters; what has no end of a sentence for longer is cut at a space


@dataclass(frozen=True)
class Sentences:
    """pieces: the sentences with the whitespace behind them; together they are the chain. Numbers count from 1."""

    pieces: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Sentences:
        """Cuts a text. Linear in its length; every piece holds more than whitespace, unless the text does not."""
        pieces: list[str] = []
        start = 0
        for match in _END.finditer(text):
            end = match.end()
            if text[start:end].strip():
                _append(pieces, text[start:end])
            elif pieces:
                pieces[-1] += text[start:end]
            else:
                continue  # whitespace at the beginning stays with the first sentence
            start = end
        rest = text[start:]
        if rest.strip() or not pieces:
            _append(pieces, rest)
        else:
            pieces[-1] += rest
        return cls(tuple(pieces))

    def __len__(self) -> int:
        return len(self.pieces)

    def text(self, first: int, last: int, edits: dict[int, str] | None = None) -> str:
        """Sentences `first` to `last`, both included, as they stand, or with other words where there is an edit."""
        if not edits:
            return "".join(self.pieces[first - 1 : last]).strip()
        parts = []
        for number in range(first, last + 1):
            piece = self.pieces[number - 1]
            if number in edits:
                piece = edits[number] + piece[len(piece.rstrip()) :]
            parts.append(piece)
        return "".join(parts).strip()

    def numbered(self, first: int, last: int, edits: dict[int, str] | None = None) -> str:
        """`[7] text` line by line, with an empty line where a paragraph ends."""
        lines = []
        for number in range(first, last + 1):
            piece = self.pieces[number - 1]
            words = (edits or {}).get(number) or piece
            lines.append(f"[{number}] {' '.join(words.split())}")
            if number < last and piece[len(piece.rstrip()) :].count("\n") > 1:
                lines.append("")
        return "\n".join(lines)


def _append(pieces: list[str], piece: str) -> None:
    """Adds a piece, cut where it is very long."""
    while len(piece) > _LONGEST:
        cut = piece.rfind(" ", 1, _LONGEST) + 1 or _LONGEST
        if not piece[cut:].strip() or not piece[:cut].strip():
            break
        pieces.append(piece[:cut])
        piece = piece[cut:]
    pieces.append(piece)
