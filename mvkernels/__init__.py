"""Attention kernels, paged KV cache and engine for language models that write in parallel branches.

Public names are imported on first use, so that ``import mvkernels`` is fast and needs no optional dependency. If a
dependency is missing, the error names the extra that installs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mvkernels._lazy import lazy_names

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BranchError",
    "BranchLayout",
    "BranchTables",
    "CacheError",
    "DecodeGraph",
    "GrammarError",
    "OutOfPages",
    "PagedKVCache",
    "Rope",
    "StaleStep",
    "TagTokens",
    "errors",
    "is_patched",
    "merge_branches",
    "multiverse_attention",
    "patch_model",
    "rotate",
    "tree_decode",
    "unpatch_model",
]

if TYPE_CHECKING:
    from mvkernels import errors
    from mvkernels.attention import multiverse_attention
    from mvkernels.branch_tables import BranchTables, merge_branches
    from mvkernels.cache.cache import PagedKVCache
    from mvkernels.decode import tree_decode
    from mvkernels.errors import BackendError, BranchError, CacheError, GrammarError, OutOfPages, StaleStep
    from mvkernels.graph.graph import DecodeGraph
    from mvkernels.hf import is_patched, patch_model, unpatch_model
    from mvkernels.layout import BranchLayout
    from mvkernels.rope import Rope, rotate
    from mvkernels.tags import TagTokens
else:
    _EXPORTS = {
        "BackendError": "mvkernels.errors",
        "BranchError": "mvkernels.errors",
        "BranchLayout": "mvkernels.layout",
        "BranchTables": "mvkernels.branch_tables",
        "CacheError": "mvkernels.errors",
        "DecodeGraph": "mvkernels.graph.graph",
        "GrammarError": "mvkernels.errors",
        "OutOfPages": "mvkernels.errors",
        "PagedKVCache": "mvkernels.cache.cache",
        "Rope": "mvkernels.rope",
        "StaleStep": "mvkernels.errors",
        "TagTokens": "mvkernels.tags",
        "errors": "mvkernels.errors",
        "is_patched": "mvkernels.hf",
        "merge_branches": "mvkernels.branch_tables",
        "multiverse_attention": "mvkernels.attention",
        "patch_model": "mvkernels.hf",
        "rotate": "mvkernels.rope",
        "tree_decode": "mvkernels.decode",
        "unpatch_model": "mvkernels.hf",
    }
    __getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
