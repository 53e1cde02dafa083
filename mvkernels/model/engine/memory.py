"""How much memory an engine takes by default: for keys and values, and for bf16 copies of weights."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mvkernels.cache.cache import PagedKVCache
from mvkernels.errors import OutOfPages

# Share of the memory that is free on a GPU once the model is there, and of the machine's, which is committed page by
# page as it is written to.
_GPU_SHARE, _CPU_SHARE = 0.8, 0.25
# Of the machine's memory at most, for weights that are kept in bf16 besides.
_NARROW_SHARE = 0.125
# Further pages would not be used, and would cost time whenever the cache is checked.
_MOST_PAGES = {"cpu": 2**16}
_MOST_PAGES_ELSEWHERE = 2**20


def make_cache(model: PreTrainedModel, page_size: int, num_pages: int | None) -> PagedKVCache:
    """The cache of a model, on its device. num_pages: None takes a share of the memory that there is.

    Raises OutOfPages where the memory does not suffice.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    layers, kv_heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if num_pages is None:
        page_bytes = 2 * layers * page_size * kv_heads * head_dim * model.dtype.itemsize
        most = min(_MOST_PAGES.get(model.device.type, _MOST_PAGES_ELSEWHERE), (2**31 - 1) // page_size)
        num_pages = max(1, min(int(_memory(model.device)) // page_bytes, most))
    try:
        return PagedKVCache(num_pages, page_size, layers, kv_heads, head_dim, model.dtype, model.device)
    except RuntimeError as error:  # on a GPU a subclass of it; PyTorch has no type of its own for the CPU
        if "memory" not in str(error):
            raise
        expected = (
            f"expected a cache that fits into memory, got {num_pages} pages of {page_size} tokens: lower num_pages"
        )
        raise OutOfPages(expected) from error


def _memory(device: torch.device) -> float:
    """Bytes to be used."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free * _GPU_SHARE
    return _machine_memory() * _CPU_SHARE


def narrow_bytes() -> int:
    """Bytes that bf16 copies of float32 weights may take."""
    return int(_machine_memory() * _NARROW_SHARE)


def _machine_memory() -> int:
    """Bytes that the machine has, or the container."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" where a container has no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory
