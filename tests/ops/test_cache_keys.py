"""What is kept under a key: every part of the key counts, and the same key finds the same thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mvkernels.layout import BranchLayout
from mvkernels.mask_tensor import find_mask_table
from mvkernels.ops.attention.config import attention_config
from mvkernels.ops.attention.tables import attention_tables
from mvkernels.ops.decode import native as decode_native
from tests.ops.decode_cases import CASES
from tests.test_decode import make_world

CPU = torch.device("cpu")


def check(found: Callable[..., Any], base: dict[str, Any], changes: dict[str, Any]) -> None:
    """found: by keyword arguments. changes: another value of each. None finds what another one does."""
    one = found(**base)
    kept = [one]
    for name, value in changes.items():
        other = found(**{**base, name: value})
        assert all(other is not before for before in kept), name
        assert found(**{**base, name: value}) is other, name
        kept.append(other)
    assert found(**base) is one


@pytest.mark.skipif(decode_native.compile_reason() is not None, reason="needs a compiler")
def test_plans_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    w = make_world()
    views = w.write(CASES["siblings"](w)).views

    def found(group: int, kv_heads: int, invariant: bool, threads: int, lanes: int) -> Any:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(decode_native, "_kernel", lambda: (None, lanes))
        return decode_native.plan_items(views, group, kv_heads, invariant)

    base = {"group": 2, "kv_heads": 2, "invariant": False, "threads": 1, "lanes": 16}
    check(found, base, {"group": 3, "kv_heads": 1, "invariant": True, "threads": 2, "lanes": 8})


@pytest.mark.triton
def test_tables_of_a_step() -> None:
    from mvkernels.ops.decode.triton import plan_tables, tables_key

    w = make_world()
    views = w.write(CASES["siblings"](w)).views
    base = {"heads": 4, "kv_heads": 2, "dim": 16, "element_size": 4, "device": CPU}
    changes = {"heads": 8, "kv_heads": 1, "dim": 32, "element_size": 2}
    check(lambda **given: plan_tables(views, **given), base, changes)
    key = tables_key(**base)
    assert all(tables_key(**{**base, name: value}) != key for name, value in changes.items())
    assert tables_key(**{**base, "device": torch.device("cuda", 0)}) != key


def test_tables_of_a_mask() -> None:
    table = find_mask_table(BranchLayout.from_tree([40, [[9], [7]], 20]).mask_table)
    config = attention_config(32, 4, None)
    sizes = {
        f"{kernel} {size}": replace(
            config, **{kernel: replace(getattr(config, kernel), **{size: 2 * getattr(getattr(config, kernel), size)})}
        )
        for kernel in ("forward", "dq", "dkdv")
        for size in ("block_m", "block_n")
    }
    kept = [attention_tables(table, config, CPU)]
    for name, other in sizes.items():
        kept.append(attention_tables(table, other, CPU))
        assert attention_tables(table, other, CPU) is kept[-1], name
    kept.append(attention_tables(table, config, torch.device("meta")))
    assert len({id(one) for one in kept}) == len(kept) == 8
    assert kept[-1].rows.device.type == "meta"


@pytest.mark.triton
def test_buckets_of_graphs() -> None:
    from mvkernels.graph.buckets import Buckets
    from mvkernels.graph.fixed_step import plan_fixed

    w = make_world()
    step = w.write(CASES["siblings"](w))
    laid, buckets = plan_fixed(step, 4), Buckets(CPU)
    capacity, config = laid.bucket.capacity, laid.bucket.config
    first = buckets.lay(laid, step, ())
    changed = {
        **{name: laid.bucket._replace(capacity=capacity._replace(**{name: 2 * getattr(capacity, name)}))
           for name in ("rows", "work", "pages")},
        "partials": laid.bucket._replace(capacity=capacity._replace(partials=2 * capacity.partials or 64)),
        "config": laid.bucket._replace(config=replace(config, num_warps=2 * config.num_warps)),
    }  # fmt: skip
    kept = [first]
    for name, bucket in changed.items():
        kept.append(buckets.lay(replace(laid, bucket=bucket), step, ()))
        assert buckets.lay(replace(laid, bucket=bucket), step, ()) is kept[-1], name
    assert len({id(one) for one in kept}) == len(kept) == 6
    assert buckets.lay(laid, step, ()) is first
    assert laid.bucket._replace(lists=(1, 2)) not in buckets._kept
