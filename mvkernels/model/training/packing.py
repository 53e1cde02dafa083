"""Documents one after the other in one row, as arguments of a patched model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mvkernels import BranchLayout


def pack_row(documents: Iterable[tuple[Sequence[int] | npt.NDArray[np.int32], BranchLayout]]) -> dict[str, Any]:
    """A row of documents, each its token ids and their layout, without padding.

    Returns input_ids, labels [1, T] int64, position_ids [1, T], branch_layout.
    """
    pairs = list(documents)
    layout = BranchLayout.pack([layout for _, layout in pairs])
    ids = torch.cat([torch.as_tensor(tokens, dtype=torch.int64) for tokens, _ in pairs])
    return {
        "input_ids": ids[None],
        "labels": layout.labels(ids)[None],
        "position_ids": layout.position_ids[None],
        "branch_layout": layout,
    }
