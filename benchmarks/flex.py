"""FlexAttention under the mask of a branch layout, as a user of it would write it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from mvkernels import BranchLayout

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def mask_function(layout: BranchLayout, device: str) -> MaskFunction:
    """Each row has its first visible key and its hidden intervals, padded to the most that any row has."""
    mask = layout.mask
    counts = np.diff(mask.gap_ptr)
    most = int(counts.max(initial=0))
    segment = np.repeat(np.arange(mask.num_segments), counts)
    padded = np.zeros((mask.num_segments, most, 2), np.int32)
    padded[segment, np.arange(len(mask.gaps)) - mask.gap_ptr[segment]] = mask.gaps
    rows = mask.segment_of_rows()
    first = torch.from_numpy(mask.first_key[rows]).to(device)  # [T]
    bounds = [[torch.from_numpy(padded[rows, g, end]).to(device) for end in (0, 1)] for g in range(most)]  # of [T]

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        seen = (j <= i) & (j >= first[i])
        for hidden_from, hidden_to in bounds:
            seen = seen & ((j < hidden_from[i]) | (j >= hidden_to[i]))
        return seen

    return visible


class FlexMask:
    """The mask of a layout; `build` makes what FlexAttention takes."""

    def __init__(self, layout: BranchLayout, device: str) -> None:
        self.layout = layout
        self.device = device
        self._create = create_block_mask

    def compile(self) -> None:
        """From here on `build` runs compiled."""
        self._create = torch.compile(create_block_mask, dynamic=False)

    def build(self) -> BlockMask:
        total = self.layout.total_tokens
        return self._create(
            mask_function(self.layout, self.device), None, None, total, total, device=torch.device(self.device)
        )

    def dense(self) -> torch.Tensor:
        """[T, T] bool: the mask function everywhere. For checks on short layouts."""
        total = self.layout.total_tokens
        return create_mask(mask_function(self.layout, self.device), 1, 1, total, total, device=self.device)[0, 0]


def attention(mask: FlexMask) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Compiles for this shape alone: kernels for any shape would be slower."""
    import torch._functorch.config

    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # else a backward may run only once for each forward
    mask.compile()
    blocks = mask.build()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*heads_first, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return attend
