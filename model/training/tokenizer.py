"""A small tokenizer made from nothing: digits and signs one by one, whole words, bytes for all else."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mvkernels.grammar import TAGS

END_OF_TEXT = "<|endoftext|>"

# Every digit and sign is a piece of its own; a space goes with the word or the sign after it.
_PIECES = r" (?:->|[+=]) | ?\p{L}+|\s|[^\s\p{L}]"


def build_tokenizer(texts: Iterable[str], chat_ending: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary of the words in `texts`, with the twelve control tags and an end-of-text token.

    Any text comes back exactly from `decode(encode(text))`. chat_ending: what the chat template puts after the last
    message. The same texts give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, *TAGS)]
    trainer = trainers.BpeTrainer(
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        vocab_size=1024,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(chat_ending),
    )


def _chat_template(ending: str) -> str:
    return "{% for message in messages %}{{ message['content'] }}{% endfor %}" + ending + r"{{ '\n' }}"
