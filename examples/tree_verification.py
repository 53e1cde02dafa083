"""Speculative decoding with a tree of drafts: verify all drafts in one step, keep the longest accepted path."""

from __future__ import annotations

import torch

import mvkernels as mk
from mvkernels.model.checkpoint.loading import load_checkpoint
from mvkernels.model.tasks import arithmetic

DRAFT = 4


def main() -> None:
    model, tokenizer = load_checkpoint("embedded")
    mk.patch_model(model)
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    cache = mk.PagedKVCache(64, 16, config.num_hidden_layers, config.num_key_value_heads, head_dim)

    def greedy(entries: list[tuple[int, int]], ids: list[int]) -> list[int]:
        """One step: the most likely token after each of `ids`. entries: (branch, number of its new tokens)."""
        step = cache.plan(entries)
        with torch.inference_mode():
            positions = step.positions[None]
            out = model(torch.tensor([ids]), position_ids=positions, paged_kv=(cache, step), use_cache=False)
        cache.commit(step)
        return out.logits[0].argmax(-1).tolist()

    prompt = mk.TagTokens.from_tokenizer(tokenizer).encode(next(arithmetic.generate(seed=2)).question)
    trunk = cache.new()
    first = greedy([(trunk, len(prompt))], prompt)[-1]

    # A draft model would propose these. Here: greedy decoding on a fork, with errors planted at different places.
    [probe] = cache.fork(trunk, 1)
    truth = [first]
    while len(truth) <= DRAFT:
        truth += greedy([(probe, 1)], truth[-1:])
    cache.free(probe)
    wrong = 7
    drafts = [[*truth[:cut], *[wrong] * (DRAFT - cut)] for cut in (1, 3, 2)]

    # One step verifies all drafts: the branches share the pages of the prompt.
    branches = cache.fork(trunk, len(drafts))
    flat = greedy([(branch, DRAFT) for branch in branches], [token for draft in drafts for token in draft])
    accepted = []
    for index, draft in enumerate(drafts):
        choices = [first, *flat[index * DRAFT : (index + 1) * DRAFT]]
        accepted.append(next((n for n in range(DRAFT) if draft[n] != choices[n]), DRAFT))
    best = max(range(len(drafts)), key=accepted.__getitem__)
    print(f"accepted tokens of the drafts: {accepted}, kept: draft {best}")
    for branch in set(branches) - {branches[best]}:
        cache.free(branch)
    cache.truncate(branches[best], DRAFT - accepted[best])
    after = greedy([(branches[best], 1)], [flat[best * DRAFT + accepted[best] - 1]])
    print("continues as greedy decoding does:", after[0] == truth[accepted[best] + 1])


if __name__ == "__main__":
    main()
