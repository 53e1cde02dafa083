"""The tables that Triton kernels derive from a mask's table on the device, against those the host plans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mvkernels import mask_tensor as mask_table
from mvkernels.layout import BranchLayout
from mvkernels.mask_tensor import MaskTable, find_mask_table
from mvkernels.ops.attention.config import AttentionConfig, KernelConfig, attention_config
from mvkernels.ops.attention.schema import OPS
from mvkernels.ops.attention.tables import AttentionTables, attention_tables, build_tables
from tests.attention_cases import MEDIUM, NESTED
from tests.conftest import has_cuda
from tests.test_decode_aot import assert_fits, compile_kernel
from tests.trees import TEST_TAGS, traces, trees

DEVICE = torch.device("cuda", 0) if has_cuda() else torch.device("cpu")

documents = st.one_of(
    trees(max_depth=2, max_paths=3).map(BranchLayout.from_tree),
    st.tuples(traces(max_depth=1), st.sampled_from(["canonical", "released"])).map(
        lambda drawn: BranchLayout.from_token_ids(drawn[0], TEST_TAGS, semantics=drawn[1])
    ),
)
layouts = st.lists(documents, min_size=1, max_size=2).map(BranchLayout.pack)


def config(*blocks: tuple[int, int]) -> AttentionConfig:
    return AttentionConfig(*(KernelConfig(block_m, block_n, 4, 1) for block_m, block_n in blocks))


CONFIGS = [
    attention_config(64, 4, None),
    config((16, 5), (16, 5), (9, 64)),  # one plan for two kernels
    config((64, 64), (8, 4), (8, 8)),
]


def intervals(columns: torch.Tensor, found: torch.Tensor) -> list[tuple[int, set[int]]]:
    """Of each row of a `rows` or `keys` table: its bound, and what its gaps hide."""
    return [
        (bound, {i for a, b in found[gap:gap_end].tolist() for i in range(a, b)})
        for bound, gap, gap_end in columns.tolist()
    ]


def check_same(got: AttentionTables, wanted: AttentionTables) -> None:
    for name in ("forward", "dq", "dkdv"):
        for part in ("tiles", "runs"):
            mine, theirs = getattr(getattr(got, name), part).cpu(), getattr(getattr(wanted, name), part)
            assert torch.equal(mine, theirs), f"{name}.{part}: expected {theirs}, got {mine}"
    for name, gaps in (("rows", "gaps"), ("keys", "key_gaps")):
        mine, theirs = ([getattr(x, name).cpu(), getattr(x, gaps).cpu()] for x in (got, wanted))
        assert intervals(*mine) == intervals(*theirs)
    for tensor in (*got.forward, *got.dq, *got.dkdv, got.rows, got.gaps, got.keys, got.key_gaps):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0  # else a layout could change how a kernel is specialised


@pytest.mark.triton
@pytest.mark.parametrize("chosen", CONFIGS, ids=lambda c: "-".join(map(str, c.blocks)))
@settings(max_examples=5, phases=[Phase.generate])  # no shrinking: the interpreter takes its time
@given(layout=layouts, chunk=st.sampled_from([4, 16, 64]))
def test_the_device_derives_what_the_host_plans(layout: BranchLayout, chunk: int, chosen: AttentionConfig) -> None:
    from mvkernels.ops.attention import plan_triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_triton, "CHUNK", chunk)  # small ones, so that runs cross their borders
        got = plan_triton.device_tables(layout.mask_table.to(DEVICE), chosen)
    check_same(got, build_tables(layout.mask, chosen, torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.parametrize("case", MEDIUM, ids=lambda case: case.id)
def test_longer_layouts_at_the_shipped_tile_sizes(case) -> None:
    from mvkernels.ops.attention.plan_triton import device_tables

    layout, chosen = case.layout(), attention_config(128, 2, (9, 0))
    got = device_tables(layout.mask_table.to(DEVICE), chosen)
    check_same(got, build_tables(layout.mask, chosen, torch.device("cpu")))


@pytest.mark.triton
def test_no_mask_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a table that stands on the device only, the way an op asks for its tables."""
    layout, chosen = BranchLayout.from_tree(NESTED), CONFIGS[0]
    tensor = layout.mask_table.to(DEVICE).clone()
    table = MaskTable.__new__(MaskTable)
    table._enter(None, tensor, {})
    mask_table._kept.append(table)
    assert find_mask_table(tensor) is table
    monkeypatch.setattr(mask_table, "unpack", lambda tensor: pytest.fail("the mask was read back"))
    found = attention_tables(table, chosen, DEVICE)
    assert table.is_on_device_only
    assert attention_tables(table, chosen, DEVICE) is found  # for the backward
    monkeypatch.undo()
    check_same(found, build_tables(layout.mask, chosen, torch.device("cpu")))
    assert table.mask.total_tokens == layout.total_tokens  # read back when somebody asks
    assert not table.is_on_device_only


@pytest.mark.triton
def test_what_is_no_table_is_refused() -> None:
    from mvkernels.ops.attention.plan_triton import device_tables

    for values in ([5, 100, 3, 0, 0, 1], [-1, 0, 0, 0, 0, 0, 0]):
        with pytest.raises(ValueError, match="expected a mask table"):
            device_tables(torch.tensor(values, dtype=torch.int32, device=DEVICE), CONFIGS[0])


@pytest.mark.gpu
@pytest.mark.parametrize("case", MEDIUM, ids=lambda case: case.id)
def test_an_unregistered_copy_attends_bit_by_bit_alike(case) -> None:
    layout = case.layout().to(DEVICE)
    copied = layout.mask_table.clone()
    outcomes = []
    for table in (layout.mask_table, copied):
        leaves = [x.requires_grad_() for x in case.inputs(device="cuda")]
        out, lse = OPS["triton"][0](*leaves, table, 0.2)
        grads = torch.autograd.grad(out.float().square().sum() + lse.sum(), leaves)
        outcomes.append([out, lse, *grads])
    assert find_mask_table(copied) is not find_mask_table(layout.mask_table)
    assert find_mask_table(copied).is_on_device_only
    for got, wanted in zip(*outcomes, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kind", "fill", "capability"),
    [*((kind, fill, 90) for kind in (0, 1, 2) for fill in (False, True)), (2, True, 80), (2, True, 100)],
)
def test_the_kernel_compiles_and_spills_nothing(kind: int, fill: bool, capability: int, tmp_path) -> None:
    from mvkernels.ops.attention.plan_triton import CHUNK, NUM_WARPS, runs_kernel

    constants = {"KIND": kind, "FILL": fill, "CHUNK": CHUNK}
    types = {name: "*i32" if name.endswith("_ptr") else "i32" for name in set(runs_kernel.arg_names) - set(constants)}
    compiled = compile_kernel(runs_kernel, types, constants, capability, num_warps=NUM_WARPS)
    assert_fits(compiled, capability, tmp_path)
