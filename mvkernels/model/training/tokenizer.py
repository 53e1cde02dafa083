"""A small tokenizer made from nothing: digits and signs one by one, whole words, bytes for all else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mvkernels.grammar import TAGS

END_OF_TEXT = "<|endoftext|>"

# Qwen2's pieces, because transformers gives every Qwen2 checkpoint Qwen2's pieces, whatever its tokenizer.json says.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(words: Iterable[str], added: Sequence[str] = (), chat_ending: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary of `words`, with the twelve control tags and an end-of-text token.

    words: each becomes one token; none may span two of Qwen2's pieces. added: texts that are one token wherever they
    stand, the longest first, whatever the pieces. Any text in Unicode normal form C comes back exactly from
    `decode(encode(text))`. chat_ending: what the chat template puts after the last message. The same words give the
    same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, *TAGS)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        vocab_size=1024,
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(chat_ending),
    )


def _chat_template(ending: str) -> str:
    return "{% for message in messages %}{{ message['content'] }}{% endfor %}" + ending + r"{{ '\n' }}"
