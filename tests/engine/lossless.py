"""The lossless check: what the engine computed branch by branch, in pages, is what two other computations give.

    packed      one forward over the whole transcript with its BranchLayout (patched model)
    alone       every path decoded by itself with a plain transformers cache and explicit positions (unpatched model);
                behind a block, with its paths' caches joined

`Recorder` wraps a sampler and keeps the logits that the engine sampled from. Which row of a transcript they belong to
is told by what the token sees: the layout's dense mask gives the same list of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

from mvkernels import BranchLayout, is_patched, patch_model, unpatch_model
from mvkernels.grammar import Tree, parse
from mvkernels.model.engine.engine import BranchView, Engine, Generation
from mvkernels.model.engine.sampling.sampler import sample


@dataclass
class Recorder:
    """A sampler that remembers. seen: (request, tokens seen, position) -> (logits [V], token chosen)."""

    inner: Callable[..., Sequence[int]] = sample
    seen: dict[tuple[int, tuple[int, ...], int], tuple[torch.Tensor, int]] = field(default_factory=dict)

    def __call__(self, views: Sequence[BranchView], logits: torch.Tensor) -> Sequence[int]:
        chosen = self.inner(views, logits)
        for view, row, token in zip(views, logits, chosen, strict=True):
            key = (view.request, tuple(view.context), view.position)
            assert key not in self.seen, "two branches that see the same tokens at the same position"
            self.seen[key] = row.clone(), token
        return chosen


@contextmanager
def unpatched(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model as transformers has it, on sdpa."""
    patched = is_patched(model)
    if patched:
        unpatch_model(model)
    try:
        yield model
    finally:
        if patched:
            patch_model(model)


def recorded_logits(recorder: Recorder, generation: Generation, request: int) -> dict[int, torch.Tensor]:
    """Index of each sampled token of the transcript -> the logits [V] it was sampled from."""
    layout, ids = generation.layout, torch.tensor(generation.token_ids)
    mask = layout.dense_mask()
    out = {}
    for index in layout.sampled.nonzero()[0].tolist():
        visible = tuple(ids[:index][mask[index, :index]].tolist())
        logits, token = recorder.seen[request, visible, int(layout.position_ids[index])]
        assert token == generation.token_ids[index]
        out[index] = logits
    return out


def packed_logits(model: PreTrainedModel, ids: Sequence[int], layout: BranchLayout) -> torch.Tensor:
    """[T, V] of one packed forward."""
    patched = is_patched(model)
    try:
        with torch.inference_mode():
            positions = layout.position_ids[None].to(model.device)
            tokens = torch.tensor([list(ids)], device=model.device)
            model = model if patched else patch_model(model)
            return model(tokens, position_ids=positions, branch_layout=layout, use_cache=False).logits[0].float()
    finally:
        if not patched:
            unpatch_model(model)


def alone_logits(model: PreTrainedModel, ids: Sequence[int], tree: Tree, chunk: int) -> torch.Tensor:
    """[T, V] of decoding each path by itself, `chunk` tokens a forward. tree: the structure of `ids`."""
    rows: list[torch.Tensor] = []

    def decode(items: Tree, past: list[tuple[torch.Tensor, torch.Tensor]], position: int) -> tuple[list, int]:
        for item in items:
            if isinstance(item, int):
                for begin in range(0, item, chunk):
                    count = min(chunk, item - begin)
                    past = run(past, position, count)
                    position += count
                continue
            ends = [decode(path, past, position) for path in item]
            length = past[0][0].shape[-2] if past else 0
            past = [
                tuple(
                    torch.cat([whole, *(end[layer][kv][..., length:, :] for end, _ in ends)], dim=-2)
                    for kv, whole in enumerate(states)
                )
                for layer, states in enumerate(past)
            ]
            position = max(end for _, end in ends)
        return past, position

    def run(past: list, position: int, count: int) -> list:
        cache = DynamicCache(config=model.config)
        for layer, (k, v) in enumerate(past):
            cache.update(k, v, layer)
        first = len(rows)
        tokens = torch.tensor([list(ids[first : first + count])], device=model.device)
        positions = torch.arange(position, position + count, device=model.device)[None]
        logits = model(tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]
        rows.extend(logits.float())
        return [(layer.keys, layer.values) for layer in cache.layers]

    with torch.inference_mode():
        decode(tree, [], 0)
    return torch.stack(rows)


def check_lossless(
    engine: Engine, recorder: Recorder, generation: Generation, tolerance: float, request: int = 0, chunk: int = 1
) -> int:
    """Compares the engine's logits at every sampled token with both: within `tolerance`, the same argmax.

    The transcript must be well-formed, or end within one branch. Returns the number of tokens compared.
    """
    ids, layout = generation.token_ids, generation.layout
    recorded = recorded_logits(recorder, generation, request)
    compare(recorded, packed_logits(engine.model, ids, layout), layout, tolerance, "packed")
    tree = [layout.total_tokens] if engine.tags is None else parse(engine.tags.kinds(ids), allow_open=True).tree
    with unpatched(engine.model) as model:
        compare(recorded, alone_logits(model, ids, tree, chunk), layout, tolerance, "alone")
    return len(recorded)


def compare(
    recorded: dict[int, torch.Tensor], logits: torch.Tensor, layout: BranchLayout, tolerance: float, name: str
) -> None:
    """The logits of each sampled token against the row of `logits` [T, V] that predicts it."""
    for index, row in recorded.items():
        source = int(layout.predecessor[index])
        assert source >= 0, f"token {index}: expected one row that predicts it"
        error = float((row - logits[source]).abs().max())
        assert error <= tolerance, f"{name}, token {index}: logits differ by {error:.2e}, expected {tolerance:.0e}"
        assert int(row.argmax()) == int(logits[source].argmax()), f"{name}, token {index}: another token is likeliest"
