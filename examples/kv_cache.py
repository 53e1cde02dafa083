"""Fork, decode and merge a KV cache without copying, and check the result against attention over the whole row."""

from __future__ import annotations

import torch

import mvkernels as mk

HEADS, KV_HEADS, DIM = 8, 2, 64
PROMPT, PATHS, AFTER = 100, (30, 50), 1


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = mk.BranchLayout.from_tree([PROMPT, [[length] for length in PATHS], AFTER]).to(device)
    total = layout.total_tokens
    q = torch.randn(total, HEADS, DIM, device=device)
    k, v = torch.randn(2, total, KV_HEADS, DIM, device=device)
    expected = mk.multiverse_attention(q, k, v, layout)

    cache = mk.PagedKVCache(64, 16, num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, device=device)
    out = torch.empty_like(expected)

    def decode(entries: list[tuple[int, slice]]) -> torch.Tensor:
        """One step: appends the rows of each branch, and decodes them. Returns their positions."""
        step = cache.plan([(branch, rows.stop - rows.start) for branch, rows in entries])
        index = torch.cat([torch.arange(rows.start, rows.stop) for _, rows in entries]).to(device)
        cache.append(0, k[index], v[index], step)
        out[index] = mk.tree_decode(q[index], cache.k[0], cache.v[0], step)
        cache.commit(step)
        return step.positions

    trunk = cache.new()
    decode([(trunk, slice(0, PROMPT))])
    left, right = cache.fork(trunk, 2)
    first, second = PROMPT, PROMPT + PATHS[0]
    for token in range(max(PATHS)):  # both paths in one step, until the shorter one has ended
        entries = [(left, slice(first + token, first + token + 1))] if token < PATHS[0] else []
        decode([*entries, (right, slice(second + token, second + token + 1))])
    cache.merge(trunk, [left, right])
    position = decode([(trunk, slice(total - AFTER, total))])

    print("position after the merge:", position.tolist(), "of", total, "tokens")
    print("bytes of KV moved:", cache.bytes_moved)
    error = (out - expected).abs().max().item()
    print(f"max error: {error:.1e}; equal: {error < 1e-3}")


if __name__ == "__main__":
    main()
