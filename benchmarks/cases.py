"""The branch layouts that attention is timed on, as functions of the number of tokens. Tests use the same ones.

real            published traces, packed; only where the data and transformers are (see `data_folder`)
causal          one document without branches
narrow          blocks of three short paths: nearly all of the causal area is visible
wide            one block of 16 equal paths
nested          four paths, each of which splits into four
shared-prompt   a prompt with 16 responses of half its length that never join; 18432 tokens: 2048 and 16 x 1024
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from mvkernels import BranchLayout, TagTokens

Tree = list[Any]
Build = Callable[[], BranchLayout]


def causal(tokens: int) -> Tree:
    return [tokens]


def narrow(tokens: int) -> Tree:
    """Paths of 100 tokens, as in published traces."""
    block: Tree = [140, [[100], [90], [110]], 60]
    return [*(block * (tokens // 500)), tokens % 500]


def wide(tokens: int, paths: int = 16) -> Tree:
    """The prompt and the answer take one sixteenth each."""
    ends = tokens // 16
    inside = tokens - 2 * ends
    lengths = [inside // paths + (i < inside % paths) for i in range(paths)]
    return [ends, [[length] for length in lengths], ends]


def nested(tokens: int) -> Tree:
    unit = tokens // 32
    inner: Tree = [unit, [[unit], [unit], [unit], [unit]], unit]
    rest = tokens - 4 * 6 * unit
    return [rest // 2, [inner, inner, inner, inner], rest - rest // 2]


def shared_prompt(tokens: int, responses: int = 16) -> Tree:
    prompt, response = prompt_and_response(tokens, responses)
    return [prompt, [[response]] * responses]


def prompt_and_response(tokens: int, responses: int = 16) -> tuple[int, int]:
    """Lengths of which the responses are half the prompt, as nearly as `tokens` allows."""
    response = tokens // (responses + 2)
    return tokens - responses * response, response


TREES: dict[str, Callable[[int], Tree]] = {
    "causal": causal,
    "narrow": narrow,
    "wide": wide,
    "nested": nested,
    "shared-prompt": shared_prompt,
}


def synthetic(name: str, tokens: int) -> BranchLayout:
    """A case of TREES as a layout."""
    return BranchLayout.from_tree(TREES[name](tokens))


def apart(tokens: int, responses: int = 16) -> BranchLayout:
    """What `shared-prompt` replaces: every response packed with a prompt of its own."""
    prompt, response = prompt_and_response(tokens, responses)
    return BranchLayout.pack([BranchLayout.causal(prompt + response)] * responses)


def builders(tokens: int) -> dict[str, Build]:
    """Case -> what makes its layout anew, for every case that can be made here; `real` from token ids."""
    found: dict[str, Build] = {}
    published = real(tokens)
    if published is not None:
        found["real"] = published
    for name in TREES:
        found[name] = lambda name=name: synthetic(name, tokens)
    return found


def data_folder() -> Path | None:
    """The folder with the published traces (`MVKERNELS_DATA`, default ../shared/data), or None."""
    named = os.environ.get("MVKERNELS_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    return folder if (folder / "released_layout").is_dir() else None


def real(tokens: int) -> Build | None:
    """Published traces that fit into `tokens` together, else the shortest alone; None where something is missing."""
    found = published(tokens)
    if found is None:
        return None
    tags, chosen = found
    return lambda: BranchLayout.pack([BranchLayout.from_token_ids(ids, tags) for ids in chosen])


def published(tokens: int) -> tuple[TagTokens, list[list[int]]] | None:
    """The tags, and the token ids of those traces."""
    folder = data_folder()
    loaded = None if folder is None else _published(folder)
    if loaded is None:
        return None
    tags, traces = loaded
    chosen: list[list[int]] = []
    for ids in traces:
        if sum(map(len, chosen)) + len(ids) <= tokens:
            chosen.append(ids)
    return tags, chosen or [min(traces, key=len)]


@cache
def _published(folder: Path) -> tuple[TagTokens, list[list[int]]] | None:
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        return None
    file = folder / "qwen2.5_tokenizer" / "tokenizer.json"
    tags = TagTokens.from_tokenizer(PreTrainedTokenizerFast(tokenizer_file=str(file)))
    paths = sorted((folder / "released_layout").glob("*.json"), key=lambda path: int(path.stem))
    return tags, [json.loads(path.read_text())["tokens"] for path in paths]
