"""Text of a branch while its tokens come: pieces that are right when a character's bytes are split over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so more tokens than this hold no unfinished character but bytes that make none.
_LONGEST_WAIT = 8
# Of byte-level tokenizers: the texts of tokens by themselves, as far as they were asked for.
_TEXTS: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()


class TextStream:
    """Turns tokens into text incrementally.

    A token's text may depend on the ones before it (bytes of one character; spaces in SentencePiece vocabularies), so
    each piece is the difference of two decodings of a short window of tokens. Where a token is the same bytes whatever
    stands before it, and no token waits for another, that is the token's own text, which is remembered.
    tokenizer: anything with `decode`. context: tokens before the first one.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._decoder = decoder_of(tokenizer)
        self._texts = _TEXTS.setdefault(tokenizer, {}) if _adds_bytes(tokenizer) else None
        self._window = list(context)  # the tokens of the last finished piece, then the unfinished ones
        self._finished = len(self._window)
        self._before = self._decode(self._window)

    def push(self, token: int, silent: bool = False) -> str:
        """The text that `token` adds; empty while it ends within a character. A silent one, such as an end of text, has
        no text of its own and adds what was unfinished.
        """
        if silent:
            piece = self.rest()
            self._before += piece
            return piece
        if self._texts is not None and self._finished == len(self._window):
            alone = self._texts.get(token)
            if alone is None:
                alone = self._texts[token] = self._decode([token])
            if _UNFINISHED not in alone:
                self._window, self._finished, self._before = [token], 1, alone
                return alone
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._finished
        if text.endswith(_UNFINISHED) and waiting <= _LONGEST_WAIT:
            return ""
        piece = text[len(self._before) :]
        self._window = self._window[self._finished :]
        self._finished = len(self._window)
        self._before = self._decode(self._window)
        return piece

    def rest(self) -> str:
        """The text of an unfinished character at the end, as the tokenizer writes it."""
        return self._decode(self._window)[len(self._before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._decoder(tokens) if tokens else ""


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


def _adds_bytes(tokenizer: Any) -> bool:
    """Whether the text of some tokens is their bytes one after the other."""
    return _is_plain(tokenizer) and type(tokenizer.backend_tokenizer.decoder) is ByteLevel
