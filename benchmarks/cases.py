"""The branch layouts that attention is timed on, as functions of the number of tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvkernels import BranchLayout, TagTokens

Tree = list[Any]


def causal(tokens: int) -> BranchLayout:
    """One document without branches."""
    return BranchLayout.causal(tokens)


def narrow(tokens: int) -> BranchLayout:
    """Blocks of three paths of 100 tokens, as in published traces: nearly all of the causal area is visible."""
    block: Tree = [140, [[100], [90], [110]], 60]
    tree = block * (tokens // 500)
    return BranchLayout.from_tree([*tree, tokens % 500])


def wide(tokens: int, paths: int = 16) -> BranchLayout:
    """One block of 16 equal paths between a prompt and an answer of one sixteenth each."""
    ends = tokens // 16
    inside = tokens - 2 * ends
    lengths = [inside // paths + (i < inside % paths) for i in range(paths)]
    return BranchLayout.from_tree([ends, [[length] for length in lengths], ends])


def nested(tokens: int) -> BranchLayout:
    """A block of four paths; each splits into four again."""
    unit = tokens // 32
    inner: Tree = [unit, [[unit], [unit], [unit], [unit]], unit]
    rest = tokens - 4 * 6 * unit
    return BranchLayout.from_tree([rest // 2, [inner, inner, inner, inner], rest - rest // 2])


def shared_prompt(tokens: int, responses: int = 16) -> BranchLayout:
    """A prompt with 16 responses of half its length that never join; `apart` is the same without sharing."""
    response = tokens // (responses + 2)
    return BranchLayout.from_tree([tokens - responses * response, [[response]] * responses])


def apart(tokens: int, responses: int = 16) -> BranchLayout:
    """What `shared_prompt` replaces: every response packed with a prompt of its own."""
    response = tokens // (responses + 2)
    return BranchLayout.pack([BranchLayout.causal(tokens - responses * response + response)] * responses)


SYNTHETIC: dict[str, Callable[[int], BranchLayout]] = {
    "causal": causal,
    "narrow": narrow,
    "wide": wide,
    "nested": nested,
    "shared-prompt": shared_prompt,
}


def data_folder() -> Path | None:
    """The folder with the published traces (`MVKERNELS_DATA`, default ../shared/data), or None."""
    named = os.environ.get("MVKERNELS_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    return folder if (folder / "released_layout").is_dir() else None


def real(tokens: int) -> BranchLayout | None:
    """Published traces packed up to `tokens`, at least one; None where the data or transformers is missing."""
    folder = data_folder()
    if folder is None:
        return None
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        return None
    file = folder / "qwen2.5_tokenizer" / "tokenizer.json"
    tags = TagTokens.from_tokenizer(PreTrainedTokenizerFast(tokenizer_file=str(file)))
    layouts: list[BranchLayout] = []
    for path in sorted((folder / "released_layout").glob("*.json"), key=lambda path: int(path.stem)):
        ids = json.loads(path.read_text())["tokens"]
        if not layouts or sum(a.total_tokens for a in layouts) + len(ids) <= tokens:
            layouts.append(BranchLayout.from_token_ids(ids, tags))
    return BranchLayout.pack(layouts)
