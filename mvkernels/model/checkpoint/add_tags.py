"""Control tags for models that have none: new tokens, their embedding rows, and the config entry that names them.

A checkpoint says which tags and which semantics it was trained with in the `multiverse` entry of its config.json, so
that it is never served with the wrong ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from mvkernels import TagTokens
from mvkernels.grammar import TAGS
from mvkernels.layout import SEMANTICS
from mvkernels.model.checkpoint.files import DTYPES, published_dtype, require_checkpoint
from mvkernels.model.checkpoint.loading import load_checkpoint
from mvkernels.model.checkpoint.names import checkpoint_path
from mvkernels.model.files import require_free, whole_folder

#: The key in config.json.
CONFIG_KEY = "multiverse"
# Noise of new rows, as a share of the spread of the model's own rows. Rows of one word would else be equal for ever: a
# tag and its closing form would get the same gradients.
_NOISE = 0.02
# Rows that are added come up to a multiple of so many, as matrix units want them: with twelve tags behind 152064 rows
# an H200 took 437 us for the logits of 8 rows in bf16, where reading the weights would take about 255.
_ROWS = 64


def multiverse_entry(semantics: str = "canonical") -> dict[str, Any]:
    """The config entry of a model trained with `semantics`. Raises ValueError for semantics that do not exist."""
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics: expected one of {SEMANTICS}, got {semantics!r}")
    return {"semantics": semantics, "tags": list(TAGS)}


def read_entry(config: Any) -> str | None:
    """The semantics that a model config names, or None where it has no `multiverse` entry.

    Raises ValueError for an entry with other tags or unknown semantics.
    """
    entry = getattr(config, CONFIG_KEY, None)
    if entry is None:
        return None
    semantics, tags = (entry.get("semantics"), entry.get("tags")) if isinstance(entry, dict) else (None, None)
    if semantics not in SEMANTICS or tags != list(TAGS):
        raise ValueError(
            f"config entry {CONFIG_KEY!r}: expected semantics out of {SEMANTICS} and the twelve tags, got {entry!r}"
        )
    return str(semantics)


def add_tag_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Extend a tokenizer alone, in place. Returns the tags that it did not have."""
    new = [tag for tag in TAGS if tag not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in new], special_tokens=True)
    return new


def add_tags(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0, semantics: str = "canonical"
) -> TagTokens:
    """Extend a model and its tokenizer by the twelve control tags, in place.

    The row of a new tag is the mean of the rows of its bare word (`Path` for `<Path>` and `</Path>`) plus small seeded
    noise, in the input embeddings and, if it is not tied to them, in the output layer. A tag that the tokenizer has
    keeps its row. If rows are added, their number becomes a multiple of 64; rows without a token are the mean of all,
    which no context makes likely. The config gets its `multiverse` entry.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        seed: Of the noise.
        semantics: "canonical" or "released", for the config.

    Returns:
        The ids of the tags.

    Raises:
        ValueError: The semantics are unknown.
    """
    entry = multiverse_entry(semantics)
    new = add_tag_tokens(tokenizer)
    words = {tag: tokenizer.encode(tag.strip("</>"), add_special_tokens=False) for tag in new}
    tables = _tables(model)
    known = tables[0].shape[0]
    if len(tokenizer) > known:
        # The rows are set below, so transformers need not sample them.
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_ROWS, mean_resizing=False)
        tables = _tables(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in tables:
            if known < len(table):
                table[known:] = table[:known].mean(0, dtype=torch.float32).to(table.dtype)
            spread = table[:known].float().std()
            for tag in new:
                noise = torch.randn(table.shape[1], generator=generator).to(table.device) * spread * _NOISE
                row = table[words[tag]].float().mean(0) + noise
                table[tokenizer.convert_tokens_to_ids(tag)] = row.to(table.dtype)
    setattr(model.config, CONFIG_KEY, entry)
    return TagTokens.from_tokenizer(tokenizer)


def _tables(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weight tables with one row per token: input embeddings, and the output layer where it has its own."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [module.weight for module in modules if module is not None]
    return weights[:1] if weights[-1] is weights[0] else weights


def add_tags_to_checkpoint(
    source: str | Path, target: str | Path, seed: int = 0, dtype: str | None = None
) -> TagTokens:
    """`add_tags` from one folder (or GGUF file) to a new folder, with tokenizer and config. Safetensors out.

    The folder appears whole or not at all.

    Args:
        source: The checkpoint.
        target: A folder that does not exist, or an empty one.
        seed: Of the noise in the new rows.
        dtype: Of the saved weights. None: that of the published weights (`published_dtype`).

    Returns:
        The ids of the tags.

    Raises:
        ValueError: `source` cannot be read, `target` holds anything already, or `dtype` is none of `DTYPES`.
        OSError: `target` cannot be written. It names the file or folder.
    """
    source, target = checkpoint_path(source), Path(target)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    require_free(target)
    require_checkpoint(source)
    dtype = dtype or published_dtype(source)
    model, tokenizer = load_checkpoint(source, None if dtype is None else getattr(torch, dtype))
    tags = add_tags(model, tokenizer, seed)
    with whole_folder(target) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    return tags
