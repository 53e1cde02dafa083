"""The control tags in a tokenizer's vocabulary: ids to grammar kinds, and the one tokenization of a trace.

The tokenizer is duck-typed (any transformers tokenizer will do), so this module imports no library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mvkernels.grammar import FIRST_TAG, INDEX_PATTERN, TAG_PATTERN, TAGS, WHITESPACE, Kind

# How vocabularies write whitespace: byte-level BPE (GPT-2, Qwen, Llama 3), SentencePiece, and the characters
# themselves.
_WHITESPACE_SPELLINGS = re.compile(r"(?:[ĠĊĉčċČ▁ \t\n\r\f\v]|<0x(?:20|0A|09|0D|0B|0C)>)+")
_INDEX_TOKEN = re.compile(r"[0-9.]+")
_INDEX_END_TOKEN = re.compile(r"[0-9.]*:")
_KINDS = tuple(Kind)  # by their numbers
_INDEX_PREFIX = re.compile(rf"[{re.escape(WHITESPACE)}]*{INDEX_PATTERN.pattern}")


@dataclass(frozen=True)
class TagTokens:
    """The twelve control tags as token ids, and what else the grammar must know of a vocabulary.

    ids: the tags' ids in the order of `mvkernels.grammar.TAGS`. space_ids: tokens that are whitespace only.
    index_ids, index_end_ids: tokens of digits and dots, without and with the colon that ends a path index.
    tokenizer: needed by `encode` only.
    """

    ids: tuple[int, ...]
    space_ids: frozenset[int] = frozenset()
    index_ids: frozenset[int] = frozenset()
    index_end_ids: frozenset[int] = frozenset()
    tokenizer: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.ids) != len(TAGS) or len(set(self.ids)) != len(TAGS):
            raise ValueError(f"expected {len(TAGS)} different tag ids in the order of {TAGS}, got {self.ids}")

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TagTokens:
        """Look the twelve tags up, and the whitespace and index tokens.

        tokenizer: a transformers tokenizer, or anything with `get_vocab`, `decode` and `encode`.
        Raises ValueError when a tag is no single token of the vocabulary.
        """
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        missing = [tag for tag in TAGS if tag not in vocabulary]
        if missing:
            raise ValueError(
                f"expected each of the {len(TAGS)} control tags as one token of the vocabulary, got a tokenizer "
                f"without {' '.join(missing)}; `mvkernels add-tags` extends a model and its tokenizer"
            )
        return cls(
            ids=tuple(vocabulary[tag] for tag in TAGS),
            space_ids=frozenset(
                token
                for spelling, token in vocabulary.items()
                # The letter `č` may be itself in another vocabulary, so what it decodes to decides.
                if _WHITESPACE_SPELLINGS.fullmatch(spelling) and not tokenizer.decode([token]).strip(WHITESPACE)
            ),
            index_ids=frozenset(token for spelling, token in vocabulary.items() if _INDEX_TOKEN.fullmatch(spelling)),
            index_end_ids=frozenset(
                token for spelling, token in vocabulary.items() if _INDEX_END_TOKEN.fullmatch(spelling)
            ),
            tokenizer=tokenizer,
        )

    @cached_property
    def _kind_of(self) -> dict[int, int]:
        return {
            **dict.fromkeys(self.space_ids, int(Kind.SPACE)),
            **dict.fromkeys(self.index_ids, int(Kind.INDEX)),
            **dict.fromkeys(self.index_end_ids, int(Kind.INDEX_END)),
            **{token: FIRST_TAG + i for i, token in enumerate(self.ids)},
        }

    def kind(self, token: int) -> Kind:
        """The grammar kind of one token id."""
        return _KINDS[self._kind_of.get(token, 0)]

    def kinds(self, ids: Iterable[int]) -> bytes:
        """One grammar kind per token id, as `mvkernels.grammar.parse` takes them. ids: integers, or a 1-D tensor."""
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        lookup = self._kind_of.get
        return bytes([lookup(token, 0) for token in values])

    def id(self, kind: Kind) -> int:
        """The token id of a control tag."""
        if kind < FIRST_TAG:
            raise ValueError(f"expected the kind of a control tag, got {kind.name}")
        return self.ids[kind - FIRST_TAG]

    def encode(self, text: str) -> list[int]:
        """Tokenize a trace as the engine writes it.

        The text is cut at every tag, after every index that follows a tag, and after the newline behind
        `<Conclusion>`; the pieces are encoded apart. So the engine's own `\\n<Path>\\n1:` and `\\n<Conclusion>\\n` are
        the same tokens in training and in generation, in every vocabulary. No special token is added. Raises
        ValueError without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("TagTokens.encode: expected a TagTokens with a tokenizer, got one made from ids alone")
        known = {tag: [token] for tag, token in zip(TAGS, self.ids, strict=True)}
        out: list[int] = []
        for piece in split_pieces(text):
            if piece not in known:  # short ones come again and again
                known[piece] = self.tokenizer.encode(piece, add_special_tokens=False)
            out += known[piece]
        return out


def split_pieces(text: str) -> list[str]:
    """Cut a trace where `TagTokens.encode` cuts it. The pieces joined are the text; none is empty."""
    pieces: list[str] = []
    previous = ""
    for piece in TAG_PATTERN.split(text):
        cut = 0
        if previous in ("<Path>", "<Outline>"):
            match = _INDEX_PREFIX.match(piece)
            cut = match.end() if match else 0
        elif previous == "<Conclusion>":
            cut = 1 if piece.startswith("\n") else 0
        pieces += [part for part in (piece[:cut], piece[cut:]) if part]
        previous = piece
    return pieces


def as_id_list(ids: Any) -> list[int]:
    """Token ids as a list of ints, from a sequence or a 1-D tensor. Raises ValueError for another shape."""
    if hasattr(ids, "tolist"):
        if ids.ndim != 1:
            raise ValueError(f"expected token ids of shape [T], got shape {tuple(ids.shape)}")
        values: list[int] = ids.tolist()
        return values
    return [int(token) for token in ids]
