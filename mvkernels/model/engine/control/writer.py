"""The engine's own tokens: kinds as it writes them in a vocabulary, and the prefixes that a prompt may have begun."""

from __future__ import annotations

from collections.abc import Sequence

from mvkernels.grammar import FIRST_TAG, TAGS, Kind
from mvkernels.model.engine.control.interpreter import Interpreter
from mvkernels.model.engine.control.prices import Prices
from mvkernels.model.engine.control.state import HEADING_KINDS, State
from mvkernels.tags import TagTokens

# Spellings that are kept. Their number grows with the indices that come; a few thousand serve any sensible tree.
_MOST_SPELLINGS = 4096


class TagWriter:
    """Spells kinds: tags as tags, a space as a newline, an index with its colon as `tags.encode` cuts it.

    semantics: "canonical" or "released"; `prices` are those of an `Interpreter` of such requests.
    """

    def __init__(self, tags: TagTokens, semantics: str = "canonical") -> None:
        self.tags, self.semantics = tags, semantics
        self._spelled: dict[tuple[tuple[Kind, ...], tuple[int, ...]], list[int]] = {}
        self.prices = Prices(len(self.tokens((Kind.SPACE,))), self.heading, semantics == "released")

    def tokens(self, kinds: tuple[Kind, ...], index: tuple[int, ...] = ()) -> list[int]:
        """The tokens of `kinds`. index: (2, 1) for `2.1`. The list is not the caller's to change."""
        key = kinds, index if Kind.INDEX in kinds else ()
        tokens = self._spelled.get(key)
        if tokens is None:
            words = {Kind.SPACE: "\n", Kind.INDEX: ".".join(map(str, index)), Kind.INDEX_END: ":"}
            text = "".join(TAGS[kind - FIRST_TAG] if kind >= FIRST_TAG else words[kind] for kind in kinds)
            if len(self._spelled) >= _MOST_SPELLINGS:
                self._spelled.clear()
            tokens = self._spelled[key] = self.tags.encode(text)
        return tokens

    def heading(self, index: tuple[int, ...]) -> int:
        """How many tokens a newline, an index and its colon are."""
        return len(self.tokens(HEADING_KINDS, index))

    def rest_of_prefix(self, interpreter: Interpreter, branch: int, own: Sequence[int]) -> list[int]:
        """What is left to write before the model may go on, where a prompt ends within what the engine writes.

        That is the opening of a path, of a conclusion or, with the grammar, what is certain within a block. own: the
        branch's tokens. Empty where the prompt has whitespace of its own there and the tag behind it.
        """
        items, state = interpreter.items(branch), interpreter.state(branch)
        ahead = interpreter.ahead(branch)
        if ahead:
            begun = self._behind_tag(own)
            whole = self.tokens(ahead, (*interpreter.path(branch), interpreter.outlines(branch) + 1))
            return whole[len(begun) :] if whole[: len(begun)] == begun else []
        if len(items) == 1 and not interpreter.path(branch):
            return []  # the trunk before its first block
        prices = self.prices
        kinds = prices.opening_kinds if len(items) == 1 else prices.joining_kinds
        whole, last = self.tokens(kinds, interpreter.path(branch)), items[-1]
        count = last if isinstance(last, int) else 0
        if whole[:count] == list(own[len(own) - count :]):
            return whole[count:]
        if state in (State.OPENING, State.JOINING):  # other whitespace than the engine's
            return self.tokens(kinds[1:] if kinds[0] is Kind.SPACE else kinds, interpreter.path(branch))
        return []

    def _behind_tag(self, own: Sequence[int]) -> list[int]:
        """The last tokens of a branch, behind its last tag."""
        count = 0
        while count < len(own) and self.tags.kind(own[-1 - count]) < FIRST_TAG:
            count += 1
        return list(own[len(own) - count :])
