"""Small real vocabularies of every kind that checkpoints have: how they write bytes, spaces and newlines, with tags."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mvkernels.grammar import TAGS
from tests.support.tiny_model import END, tiny_tokenizer

#: Enough rows for each of them.
ROWS = 384
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LETTERS = ["▁", *"abcdefghilmnoprstuwx", *"0123456789", *".,:"]
_MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("▁", "the"),
    ("▁", "a"),
    ("s", "o"),
    ("▁", "so"),
    ("▁", "1"),
    ("1", "2"),
    ("▁", "▁"),
]


def _fast(tokenizer: Tokenizer, normalized: bool = True) -> PreTrainedTokenizerFast:
    """With an end of text and the tags, whose flags would take the whitespace beside them from a text."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=True)
    fast.add_tokens([AddedToken(tag, special=True, lstrip=True, rstrip=True, normalized=normalized) for tag in TAGS])
    return fast


def _sentencepiece() -> Tokenizer:
    """BPE that writes as bytes what is no letter of it: newlines, accents."""
    words = [END, *_BYTES, *_LETTERS, *("".join(pair) for pair in _MERGES)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return Tokenizer(models.BPE(vocabulary, _MERGES, byte_fallback=True, fuse_unk=True))


_SPACES_AND_BYTES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@cache
def llama_2() -> PreTrainedTokenizerFast:
    """A space before every piece of a text, which decoding takes off at the beginning."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([*_SPACES_AND_BYTES, decoders.Strip(" ", 1, 0)])
    return _fast(tokenizer, normalized=False)  # the library would spell a normalized tag with a space


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """A space before the first piece, unless it has one."""
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([*_SPACES_AND_BYTES, decoders.Strip(" ", 1, 0)])
    return _fast(tokenizer)


@cache
def gemma() -> PreTrainedTokenizerFast:
    """No space before anything."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(_SPACES_AND_BYTES)
    return _fast(tokenizer)


@cache
def unigram() -> PreTrainedTokenizerFast:
    words = [(END, 0.0), ("<unk>", -20.0), *((byte, -9.0) for byte in _BYTES), *((letter, -5.0) for letter in _LETTERS)]
    words += [("▁the", -4.0), ("▁so", -4.0), ("so", -4.5), ("▁1", -4.0), ("12", -4.0)]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=1, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return _fast(tokenizer)


@cache
def greedy_bytes() -> PreTrainedTokenizerFast:
    """Byte-level, with tokens across spaces, newlines, digits and words, and a space before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("Ċ", "1"),
        ("Ċ1", ":"),
        ("Ġ", "1"),
        ("Ċ", "s"),
        ("Ċ", "Ċ"),
        ("1", "2"),
        (":", "Ġ"),
        ("Ġ", "Ġ"),
        ("Ġ", "Ċ"),
    ]
    merges += [("Ã", "©"), ("s", "o"), ("Ċ", "â"), ("e", "â")]
    words = [END, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


VOCABULARIES = {
    "byte-level": tiny_tokenizer,
    "greedy bytes": greedy_bytes,
    "Llama 2": llama_2,
    "Metaspace": metaspace,
    "Gemma": gemma,
    "Unigram": unigram,
}
#: Of each way to write bytes the hardest one, for tests that run an engine.
HARDEST = ("greedy bytes", "Llama 2", "Unigram")


def byte_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The tokens that a decoder of byte fallback takes for bytes."""
    vocabulary = tokenizer.get_vocab()
    return frozenset(vocabulary[byte] for byte in _BYTES if byte in vocabulary)


def whole(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """What the tokenizer makes of tokens."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
