"""Text of a branch while its tokens come: the pieces, joined, are what the tokenizer makes of the tokens.

A piece never changes afterwards, so a token whose text depends on what follows is held back: the first bytes of a
character and, where the vocabulary writes bytes as tokens (`<0x0A>`), a whole run of such tokens, because its decoder
replaces every byte of a run that is no UTF-8. `flush` gives what is held back at the end of a branch.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so more tokens than this hold no unfinished character but bytes that make none.
_LONGEST_WAIT = 8
_UTF8 = codecs.getincrementaldecoder("utf-8")


class TextStream:
    """Turns the tokens of one branch into text incrementally.

    Args:
        tokenizer: Anything with `decode`.
        context: The tokens before the first one. A character that they end within is told with the tokens that
            complete it.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary = _vocabulary_of(tokenizer)
        self._texts = vocabulary.texts
        self._utf8 = _UTF8("replace") if vocabulary.is_byte_level else None
        self._open = False  # byte-level: whether the bytes so far end within a character
        # Others: tokens that the next piece depends on, how many of them are told, and the text of these.
        self._window: list[int] = []
        self._told, self._before = 0, ""
        if self._utf8 is not None:
            self._utf8.decode(vocabulary.last_bytes(context))
            self._open = self._utf8.getstate()[0] != b""
        else:
            self._window, self._told = vocabulary.last_tokens(context)
            self._before = vocabulary.text(self._window[: self._told])

    def push(self, token: int, silent: bool = False) -> str:
        """Return the text that `token` adds; empty while it depends on what follows.

        Args:
            token: The id of the branch's next token.
            silent: Whether the token has no text of its own, as an end of text. It adds what was held back.
        """
        if silent:
            return self.flush()
        utf8 = self._utf8
        if utf8 is None:
            return self._push(token)
        if not self._open:
            alone = self._texts.get(token)
            if alone is not None:
                return alone
        piece = utf8.decode(self._vocabulary.bytes_of(token))
        closed = utf8.getstate()[0] == b""
        if closed and not self._open:
            self._texts[token] = piece
        self._open = not closed
        return piece

    def rest(self) -> str:
        """The text that is held back, as the tokenizer writes it where nothing follows."""
        if self._utf8 is not None:
            return self._utf8.getstate()[0].decode("utf-8", "replace") if self._open else ""
        if self._told == len(self._window):
            return ""
        return self._vocabulary.text(self._window)[len(self._before) :]

    def held(self) -> str:
        """The same where it is whole characters, for which a stop string need not wait; else empty."""
        rest = self.rest()
        return "" if _UNFINISHED in rest else rest

    def flush(self) -> str:
        """Return what is held back, which is told by this: nothing follows, or nothing that it depends on."""
        rest = self.rest()
        if self._utf8 is not None:
            self._utf8.reset()
            self._open = False
        elif rest:
            self._before += rest
            self._told = len(self._window)
        return rest

    def _push(self, token: int) -> str:
        """`push` where a token is not the same bytes everywhere (spaces in SentencePiece vocabularies): the piece is
        the difference of two decodings.
        """
        vocabulary, window = self._vocabulary, self._window
        alone = self._texts.get(token)
        if alone is None:
            if not vocabulary.knows(token):
                return ""
            alone = self._texts[token] = vocabulary.text([token])
        window.append(token)
        if token in vocabulary.byte_tokens:
            return ""
        text = vocabulary.text(window)
        if vocabulary.may_wait and text.endswith(_UNFINISHED) and len(window) - self._told <= _LONGEST_WAIT:
            return ""
        piece = text[len(self._before) :]
        if vocabulary.may_wait:  # the token may be the last byte of a character
            self._window = window[self._told :]
            self._told, self._before = len(self._window), vocabulary.text(self._window)
            return piece
        self._window, self._told, self._before = [token], 1, alone
        return piece


class _Vocabulary:
    """How a tokenizer makes text of tokens.

    is_byte_level: whether the text of tokens is their bytes one after the other. may_wait: whether that is not known,
    so that a character that is replaced may be an unfinished one. texts: of tokens by themselves, as far as they were
    asked for.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = decoder_of(tokenizer)
        self._backend = tokenizer.backend_tokenizer if _is_plain(tokenizer) else None
        decoder = getattr(self._backend, "decoder", None)
        self.is_byte_level = type(decoder) is ByteLevel
        state = b"" if decoder is None else bytes(decoder.__getstate__())
        self.may_wait = self._backend is None or (b'"ByteLevel"' in state and not self.is_byte_level)
        self._has_bytes = b'"ByteFallback"' in state
        self.texts: dict[int, str] = {}

    @cached_property
    def byte_tokens(self) -> dict[int, int]:
        """The tokens that are a byte each (`<0x0A>`) to a decoder that knows such, and their bytes."""
        if self._backend is None or not self._has_bytes:
            return {}
        found = ((self._backend.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
        return {token: byte for token, byte in found if token is not None}

    def knows(self, token: int) -> bool:
        """Whether there is such a token: a model may have more rows than its vocabulary, and these have no text."""
        return self._backend is None or self._backend.id_to_token(token) is not None

    def text(self, tokens: Sequence[int]) -> str:
        """The whole text of tokens."""
        return self._decode(list(tokens)) if tokens else ""

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a byte-level token."""
        assert self._backend is not None
        spelled: str = self._backend.id_to_token(token) or ""
        try:
            return bytes([_BYTES[letter] for letter in spelled])
        except KeyError:  # an added token, written as it is
            return spelled.encode()

    def last_bytes(self, tokens: Sequence[int]) -> bytes:
        """The last bytes of byte-level tokens, at least three if there are: all of an unfinished character."""
        found = b""
        for token in reversed(tokens):
            found = self.bytes_of(token) + found
            if len(found) >= 3:
                break
        return found

    def last_tokens(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The last tokens, as many as the text of the next one may depend on, and how many of them have been told."""
        if self.may_wait:
            last = list(tokens[-_LONGEST_WAIT:])
            told = len(last)
            while told and self.text(last[:told]).endswith(_UNFINISHED):
                told -= 1
            return last, told
        window: list[int] = []
        run = b""
        for token in reversed(tokens):
            if not self.knows(token):
                continue
            window.insert(0, token)
            if token not in self.byte_tokens:
                break
            run = bytes([self.byte_tokens[token]]) + run
        utf8 = _UTF8("strict")
        try:
            utf8.decode(run)
        except UnicodeDecodeError:  # replaced for good
            return window, len(window)
        return window, len(window) - (len(run) if utf8.getstate()[0] else 0)


# Of transformers' own tokenizers, which live as long as an engine.
_VOCABULARIES: WeakKeyDictionary[Any, _Vocabulary] = WeakKeyDictionary()


def _vocabulary_of(tokenizer: Any) -> _Vocabulary:
    if not _is_plain(tokenizer):
        return _Vocabulary(tokenizer)
    found = _VOCABULARIES.get(tokenizer)
    if found is None:
        found = _VOCABULARIES[tokenizer] = _Vocabulary(tokenizer)
    return found


def _alphabet() -> dict[str, int]:
    """The letters in which byte-level vocabularies spell bytes: printable ones are themselves, others follow from 256
    on (GPT-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _alphabet()


def decoder_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """From tokens to their whole text, special ones and spaces as they are.

    transformers' own tokenizers only pass the tokens on to a library, with checks that take several times as long.
    """
    if _is_plain(tokenizer):
        decode = tokenizer.backend_tokenizer.decode
        return lambda tokens: decode(tokens, skip_special_tokens=False)
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _is_plain(tokenizer: Any) -> bool:
    plain = PreTrainedTokenizerFast
    names = ("decode", "_decode")
    return isinstance(tokenizer, plain) and all(getattr(type(tokenizer), n, 0) is getattr(plain, n, 1) for n in names)
