"""Context parallelism: the split is a balanced partition, and 2 and 4 processes give what one gives, with gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mvkernels import BranchLayout, multiverse_attention, patch_model
from mvkernels.context_parallel import split_context

TREE = [[300, [[280, [[90], [150]], 30], [210], [170]], 140], [200, [[60], [70]], 90]]


def packed() -> BranchLayout:
    return BranchLayout.pack([BranchLayout.from_tree(tree) for tree in TREE])


def inputs(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (4, 2, 2, 4)  # q, k, v, gradient of out
    return [torch.randn(tokens, count, 16, generator=generator, dtype=torch.float64) for count in heads]


def one_process() -> list[torch.Tensor]:
    layout = packed()
    q, k, v, grad = inputs(layout.total_tokens)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = multiverse_attention(q, k, v, layout, backend="reference", return_lse=True)
    ((out * grad).sum() + lse.sin().sum()).backward()
    return [out.detach(), lse.detach().t(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def worker(rank: int, folder: str) -> None:
    """One of four processes; two of them are a group of their own too, with a patched model."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    try:
        pair = dist.new_group([0, 1])
        run(rank, 4, dist.group.WORLD, folder)
        if rank < 2:
            run(rank, 2, pair, folder)
            run_model(rank, pair, folder)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the processes have computed. They are started once: each imports PyTorch."""
    folder = tmp_path_factory.mktemp("outcomes")
    mp.spawn(worker, (str(folder),), nprocs=4)
    return folder


def run(rank: int, ranks: int, group: Any, folder: str) -> None:
    layout = packed()
    rows = torch.from_numpy(split_context(layout, ranks).rows[rank])
    q, k, v, grad = (x[rows] for x in inputs(layout.total_tokens))
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = multiverse_attention(q, k, v, layout, return_lse=True, group=group)
    ((out * grad).sum() + lse.sin().sum()).backward()
    with pytest.raises(ValueError, match=r"q: expected shape .*, the rows of rank"):
        multiverse_attention(q[1:], k, v, layout, group=group)
    torch.save((rows, [out.detach(), lse.detach().t(), q.grad, k.grad, v.grad]), f"{folder}/{ranks}-{rank}.pt")


def run_model(rank: int, group: Any, folder: str) -> None:
    rows = torch.from_numpy(split_context(packed(), 2).rows[rank])
    logits, gradients = of_model(rows, group)
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    torch.save((rows, logits, gradients), f"{folder}/model-{rank}.pt")


def of_model(rows: torch.Tensor, group: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of some tokens, and the gradients of the sum of their losses."""
    from tests.support.tiny_model import tiny_model  # transformers, which two of the processes do without

    layout = packed()
    ids = torch.randint(0, 300, (layout.total_tokens,), generator=torch.Generator().manual_seed(0))
    shifted = torch.nn.functional.pad(layout.labels(ids)[1:], (0, 1), value=-100)
    model = patch_model(tiny_model(max_positions=4096).double(), group=group)
    out = model(
        ids[rows][None], branch_layout=layout, labels=ids[rows][None], shift_labels=shifted[rows][None],
        num_items_in_batch=100, use_cache=False,
    )  # fmt: skip
    out.loss.backward()
    if group is not None:
        with pytest.raises(ValueError, match=rf"expected inputs of shape \[1, {len(rows)}\]"):
            model(ids[None], branch_layout=layout)
    return out.logits[0].detach(), [parameter.grad for parameter in model.parameters()]


def test_a_patched_model_as_in_one_process(outcomes: Path) -> None:
    expected, expected_gradients = of_model(torch.arange(packed().total_tokens), None)
    for rank in range(2):
        rows, logits, gradients = torch.load(outcomes / f"model-{rank}.pt", weights_only=True)
        torch.testing.assert_close(logits, expected[rows], rtol=1e-8, atol=1e-8)
        for mine, whole in zip(gradients, expected_gradients, strict=True):
            # transformers takes the loss in fp32
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_as_one_process(outcomes: Path) -> None:
    expected = one_process()
    for ranks in (2, 4):
        seen = []
        for rank in range(ranks):
            rows, found = torch.load(outcomes / f"{ranks}-{rank}.pt", weights_only=True)
            seen.append(rows)
            for name, mine, whole in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
                torch.testing.assert_close(
                    mine, whole[rows], rtol=1e-9, atol=1e-10, msg=lambda m, n=f"{ranks}, {name}": f"{n}: {m}"
                )
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(len(expected[0])))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_split_is_a_balanced_partition(ranks: int) -> None:
    layout = BranchLayout.from_tree([2000, [[1500], [900], [700, [[400], [300]], 200]], 3000])
    split = split_context(layout, ranks, tile_rows=64)
    assert np.array_equal(np.sort(np.concatenate(split.rows)), np.arange(layout.total_tokens))
    assert max(map(len, split.rows)) - min(map(len, split.rows)) <= 2 * 64  # the last tile is short
    assert sum(split.pairs) == layout.mask.visible_pairs()
    assert max(split.pairs) < 1.05 * sum(split.pairs) / ranks
    dense = layout.dense_mask()
    for rows, mask in zip(split.rows, split.masks, strict=True):
        mask.check()
        # Others' rows cost one diagonal block a tile.
        others = (layout.total_tokens - len(rows)) * (64 + 1) // 2
        own = int(dense[torch.from_numpy(rows)].sum())
        assert own <= mask.visible_pairs() <= own + others
    with pytest.raises(ValueError, match=r"at least one tile of 9000 rows for each of 2 ranks, got 9000 tokens"):
        split_context(BranchLayout.causal(9000), 2, tile_rows=9000)
    with pytest.raises(ValueError, match=r"at least one tile of 0 rows for each of 2 ranks, got 9000 tokens"):
        split_context(BranchLayout.causal(9000), 2, tile_rows=0)
