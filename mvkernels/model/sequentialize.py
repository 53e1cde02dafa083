"""A trace as one plain chain of thought: what the autoregressive baseline is trained on.

Removed are the control tags, the text of Map (`<Goal>` with its outlines) and of Reduce (`<Conclusion>`), and the
indices of the paths. What stays is the text around the blocks and of the paths, inner blocks treated alike, in order.
"""

from __future__ import annotations

import re

from mvkernels.grammar import INDEX_PATTERN, TAG_PATTERN, TAGS, WHITESPACE, parse_text

_INDEX = re.compile(rf"[{re.escape(WHITESPACE)}]*{INDEX_PATTERN.pattern}")
_REMOVED = ("<Goal>", "<Conclusion>")  # neither holds a block


def sequentialize(text: str) -> str:
    """The trace as plain text. Pieces that a tag parted stand on lines of their own; none is empty. Linear time.

    text: a whole trace in the text format. Raises GrammarError (a ValueError), with the line, where it is malformed.
    """
    parse_text(text)
    kept: list[str] = []
    removing = False
    previous = ""
    for piece in TAG_PATTERN.split(text):
        if piece in TAGS:
            removing = piece in _REMOVED or (removing and piece.strip("</>") == "Outline")
            previous = piece
        elif not removing:
            index = _INDEX.match(piece) if previous == "<Path>" else None
            piece = (piece[index.end() :] if index else piece).strip(WHITESPACE)
            if piece:
                kept.append(piece)
    return "\n".join(kept)
