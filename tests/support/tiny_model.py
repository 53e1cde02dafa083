"""A Qwen2 model of two layers with random weights, a byte-level tokenizer of 300 tokens, scripted samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from mvkernels.grammar import TAGS
from mvkernels.model.engine.sampling.sampler import BranchView, sample

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}bot: {% endif %}"
)
_TEXT = [
    "two digits multiplied give a product",
    "the sum of the parts is the whole",
    "1: 2: 2.1: 12 34 56 . , \n\n",
    "so we add",
]


@cache
def tiny_tokenizer(tags: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that characters split over tokens; with the control tags as special tokens, or without."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[END], show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=CHAT_TEMPLATE)
    if tags:
        fast.add_special_tokens({"additional_special_tokens": list(TAGS)})
    return fast


def tiny_model(
    seed: int = 0,
    max_positions: int = 512,
    intermediate_size: int = 96,
    vocab_size: int = 300,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    **changes: object,
) -> Qwen2ForCausalLM:
    """fp32, on the CPU. The weights are large enough that the logits depend on the whole context."""
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,
        **changes,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config).eval()


Script = Mapping[tuple[int, ...], Sequence[int]]


def scripted(scripts: Script | Sequence[Script], then: Callable[..., list[int]] = sample) -> Callable[..., list[int]]:
    """A sampler that gives branch `path` the tokens of `scripts[path]`, and asks `then` when they are used up.

    One script serves all requests; a list has one for each. A negative token leaves this one to `then`.
    """

    def choose(views: Sequence[BranchView], logits: torch.Tensor) -> list[int]:
        free = then(views, logits)
        chosen = []
        for view, token in zip(views, free, strict=True):
            script = scripts if isinstance(scripts, Mapping) else scripts[view.request]
            own = script.get(view.path, ())
            scripted_token = own[view.drawn] if view.drawn < len(own) else -1
            chosen.append(token if scripted_token < 0 else scripted_token)
        return chosen

    return choose
