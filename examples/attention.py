"""The attention kernel alone: forward and backward under a branch mask, checked against SDPA with the dense mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import mvkernels as mk


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # 1500 tokens, then two paths, the second of which splits again, then 300 tokens.
    layout = mk.BranchLayout.from_tree([1500, [[800], [600, [[300], [400]], 100]], 300]).to(device)
    print(f"{layout.total_tokens} tokens, critical path {layout.critical_path}, on {device}")

    shapes = [(layout.total_tokens, heads, 64) for heads in (8, 2, 2)]  # q [T, Hq, D], k and v [T, Hkv, D]
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    out = mk.multiverse_attention(q, k, v, layout)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))

    # The same by definition: a mask of T x T, which the kernel never builds.
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    dense = F.scaled_dot_product_attention(*heads_first, attn_mask=layout.dense_mask(), enable_gqa=True)
    expected = dense[0].transpose(0, 1)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))

    errors = [(a - b).abs().max().item() for a, b in zip((out, *ours), (expected, *wanted), strict=True)]
    print("max error of out, dq, dk, dv:", *(f"{error:.1e}" for error in errors))
    print("equal:", max(errors) < 1e-3)


if __name__ == "__main__":
    main()
