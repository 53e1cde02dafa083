"""The control tags in a tokenizer's vocabulary: their token ids, grammar kinds, and the tokenization of a trace.

The tokenizer is duck-typed (any transformers tokenizer fits), so this module imports no library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import index
from typing import Any

from mvkernels.errors import described, is_integer
from mvkernels.grammar import FIRST_TAG, INDEX_PATTERN, TAG_PATTERN, TAGS, WHITESPACE, Kind

# How vocabularies spell whitespace: byte-level BPE (GPT-2, Qwen, Llama 3) and SentencePiece. Bytes are `<0x0A>`.
_SPELLED = {"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t", "č": "\r", "ċ": "\v", "Č": "\f"}
_SPELLED_LETTER = re.compile(rf"<0x([0-7][0-9A-F])>|[{''.join(_SPELLED)}]")
# Characters of the tokens that the engine forces besides the tags.
_PLAIN = re.compile(rf"[{re.escape(WHITESPACE)}0-9.:]+")
_INDEX_TOKEN = re.compile(r"[0-9.]+")
_INDEX_END_TOKEN = re.compile(r"[0-9.]*:")
_KINDS = tuple(Kind)  # by their numbers
_INDEX_PREFIX = re.compile(rf"[{re.escape(WHITESPACE)}]*{INDEX_PATTERN.pattern}")


@dataclass(frozen=True)
class TagTokens:
    """Token ids of the twelve control tags, and of the whitespace and index tokens that the grammar needs.

    Attributes:
        ids: Ids of the tags, in the order of `mvkernels.grammar.TAGS`.
        space_ids: Tokens of whitespace only.
        index_ids: Tokens of digits and dots, as in a path index.
        index_end_ids: Tokens of digits and dots that end with the colon of a path index.
        tokenizer: For `encode`; may be None.
        texts: Id -> text of tokens of whitespace, digits, dots and colons only. Ids of the sets above without a text
            count as a newline, a digit, and a digit with a colon.

    Raises:
        ValueError: `ids` are not twelve different integers of at least 0.

    Source: arXiv 2506.09991, section 4.
    """

    ids: tuple[int, ...]
    space_ids: frozenset[int] = frozenset()
    index_ids: frozenset[int] = frozenset()
    index_end_ids: frozenset[int] = frozenset()
    tokenizer: Any = field(default=None, repr=False, compare=False)
    texts: Mapping[int, str] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        spaces, indices = len(self.space_ids), len(self.index_ids) + len(self.index_end_ids)
        tokenizer = "no tokenizer" if self.tokenizer is None else type(self.tokenizer).__name__
        ids = f"tags {min(self.ids)} .. {max(self.ids)}"
        return f"TagTokens({ids}, {spaces} whitespace and {indices} index tokens, {tokenizer})"

    def __post_init__(self) -> None:
        if not isinstance(self.ids, (tuple, list)) or not all(is_integer(i) and i >= 0 for i in self.ids):
            raise ValueError(f"expected {len(TAGS)} tag ids, integers of at least 0, got {self.ids!r}")
        if len(self.ids) != len(TAGS) or len(set(self.ids)) != len(TAGS):
            raise ValueError(f"expected {len(TAGS)} different tag ids in the order of {TAGS}, got {self.ids}")

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TagTokens:
        """Look up the twelve tags, and the whitespace and index tokens, in a vocabulary.

        Args:
            tokenizer: A transformers tokenizer, or any object with `get_vocab`, `decode` and `encode`.

        Returns:
            The tags of this vocabulary, with the tokenizer.

        Raises:
            TypeError: `tokenizer` lacks one of these methods.
            ValueError: A tag is not one token of the vocabulary.
        """
        if not all(hasattr(tokenizer, name) for name in ("get_vocab", "decode", "encode")):
            expected = "a transformers tokenizer, or anything with get_vocab, decode and encode"
            raise TypeError(f"tokenizer: expected {expected}, got {described(tokenizer)}")
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        missing = [tag for tag in TAGS if tag not in vocabulary]
        if missing:
            raise ValueError(
                f"expected each of the {len(TAGS)} control tags as one token of the vocabulary, got a tokenizer "
                f"without {' '.join(missing)}; `mvkernels add-tags` extends a model and its tokenizer"
            )
        texts = _plain_texts(vocabulary, tokenizer)
        return cls(
            ids=tuple(vocabulary[tag] for tag in TAGS),
            space_ids=frozenset(token for token, text in texts.items() if not text.strip(WHITESPACE)),
            index_ids=frozenset(token for token, text in texts.items() if _INDEX_TOKEN.fullmatch(text)),
            index_end_ids=frozenset(token for token, text in texts.items() if _INDEX_END_TOKEN.fullmatch(text)),
            tokenizer=tokenizer,
            texts=texts,
        )

    @cached_property
    def _kind_of(self) -> dict[int, int]:
        return {
            **dict.fromkeys(self.space_ids, int(Kind.SPACE)),
            **dict.fromkeys(self.index_ids, int(Kind.INDEX)),
            **dict.fromkeys(self.index_end_ids, int(Kind.INDEX_END)),
            **{token: FIRST_TAG + i for i, token in enumerate(self.ids)},
        }

    @cached_property
    def _text_of(self) -> dict[int, str]:
        assumed = ((self.space_ids, "\n"), (self.index_ids, "0"), (self.index_end_ids, "0:"))
        return {token: text for ids, text in assumed for token in ids} | dict(self.texts)

    @cached_property
    def _unprefixed(self) -> Any:
        return _without_prefix(self.tokenizer)

    def text(self, token: int) -> str:
        """Return the text of a token of whitespace, digits, dots and colons.

        Args:
            token: A token id.

        Returns:
            Its text; empty for any other token.
        """
        return self._text_of.get(token, "")

    def kind(self, token: int) -> Kind:
        """Return the grammar kind of a token.

        Args:
            token: A token id.

        Returns:
            Its kind; `Kind.TEXT` for a token that is no tag, whitespace or index.
        """
        return _KINDS[self._kind_of.get(token, 0)]

    def kinds(self, ids: Iterable[int]) -> bytes:
        """Map token ids to grammar kinds, as `mvkernels.grammar.parse` takes them.

        Args:
            ids: [T] integers, or a tensor or array of them.

        Returns:
            [T] bytes, one `Kind` per token.
        """
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        lookup = self._kind_of.get
        return bytes([lookup(token, 0) for token in values])

    def id(self, kind: Kind) -> int:
        """Return the token id of a control tag.

        Args:
            kind: The kind of a tag, `Kind.THINK` or higher.

        Returns:
            Its token id.

        Raises:
            ValueError: `kind` is not that of a tag.
        """
        if kind < FIRST_TAG:
            raise ValueError(f"expected the kind of a control tag, got {kind.name}")
        return self.ids[kind - FIRST_TAG]

    def encode(self, text: str) -> list[int]:
        """Tokenize a trace as the engine writes it.

        The text is cut at every tag, after every index that follows a tag, and after the newline behind `<Conclusion>`.
        The pieces are encoded one by one, so that the forced `\\n<Path>\\n1:` and `\\n<Conclusion>\\n` are the same
        tokens in training and in generation, in every vocabulary. A space that the tokenizer puts before every text
        (SentencePiece) comes at the beginning only, and not before whitespace, so that decoding returns the text.

        Args:
            text: A trace in the text format of `mvkernels.grammar`.

        Returns:
            Its token ids, without special tokens.

        Raises:
            ValueError: There is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("TagTokens.encode: expected a TagTokens with a tokenizer, got one made from ids alone")
        known = {tag: [token] for tag, token in zip(TAGS, self.ids, strict=True)}
        out: list[int] = []
        for piece in split_pieces(text):
            tokens = known.get(piece)
            if tokens is None:
                tokens = self._encode(piece, first=not out)
                if out:  # short pieces recur
                    known[piece] = tokens
            out += tokens
        return out

    def _encode(self, piece: str, first: bool) -> list[int]:
        """Encode a piece of text without tags. first: whether it begins the text."""
        plain = self._unprefixed
        if plain is not None and not first:
            return list(plain.encode(piece, add_special_tokens=False).ids)
        tokens: list[int] = self.tokenizer.encode(piece, add_special_tokens=False)
        if plain is None:
            return tokens
        # Keep the tokenizer's own prefix unless it adds a space too much (before whitespace, or one that decoding
        # keeps) or one too few.
        if piece[0] in WHITESPACE or plain.decode(tokens, skip_special_tokens=False) == " " + piece:
            for spelled in (piece, " " + piece):
                tokens = plain.encode(spelled, add_special_tokens=False).ids
                if plain.decode(tokens, skip_special_tokens=False) == piece:
                    break
        return tokens


def _plain_texts(vocabulary: Mapping[str, int], tokenizer: Any) -> dict[int, str]:
    """Find the tokens of whitespace, digits, dots and colons only: id -> text."""
    texts = {}
    for spelling, token in vocabulary.items():
        text = _SPELLED_LETTER.sub(lambda found: chr(int(found[1], 16)) if found[1] else _SPELLED[found[0]], spelling)
        # `č` may be the letter itself in another vocabulary, so compare with the decoded token.
        if _PLAIN.fullmatch(text) and tokenizer.decode([token]).strip(WHITESPACE) == text.strip(WHITESPACE):
            texts[token] = text
    return texts


def _without_prefix(tokenizer: Any) -> Any:
    """Copy the `tokenizers` object of a transformers tokenizer, without the space that it puts before a text.

    None if the tokenizer has no such object, or puts no space.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    written = "x" if backend.normalizer is None else backend.normalizer.normalize_str("x")
    if backend.pre_tokenizer is not None:
        written = "".join(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(written))
    if written == "x":
        return None
    state = json.loads(backend.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        state[name] = _prefix_free(state[name])
    plain = type(backend).from_str(json.dumps(state))
    plain.no_padding()
    plain.no_truncation()
    return plain


def _prefix_free(part: Any) -> Any:
    """Remove the space before a text from a serialized normalizer or pre-tokenizer."""
    if part is None or part["type"] == "Prepend":
        return None
    changes: dict[str, Any] = {"prepend_scheme": "never", "add_prefix_space": False}
    part = part | {name: value for name, value in changes.items() if name in part}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            part[name] = [inner for inner in map(_prefix_free, part[name]) if inner is not None]
    return part


def split_pieces(text: str) -> list[str]:
    """Cut a trace where `TagTokens.encode` cuts it; the pieces joined are the text, and none is empty."""
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
    """Convert token ids [T], a sequence, tensor or array, to a list of ints. Raises ValueError for anything else."""
    if hasattr(ids, "tolist") and ids.ndim != 1:
        raise ValueError(f"expected token ids of shape [T], got shape {tuple(ids.shape)}")
    try:
        values = list(map(index, ids.tolist() if hasattr(ids, "tolist") else ids))
    except TypeError:
        expected = "integers, a list or a tensor of shape [T]"
        got = described(ids) if hasattr(ids, "dtype") or not isinstance(ids, (list, tuple)) else _first_other(ids)
        raise ValueError(f"ids: expected {expected}, got {got}") from None
    if values and min(values) < 0:
        raise ValueError(f"ids: expected token ids of at least 0, got {min(values)}")
    return values


def _first_other(ids: Any) -> str:
    """Describe the first item that is no integer, for a message."""
    return next(f"{token!r} among them" for token in ids if not hasattr(token, "__index__"))
