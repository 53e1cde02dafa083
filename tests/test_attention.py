"""multiverse_attention on the CPU against the reference, and against what must hold whatever computes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvkernels.attention import multiverse_attention
from mvkernels.errors import BackendError
from mvkernels.layout import BranchLayout
from mvkernels.ops.attention import cpu as attention_cpu
from mvkernels.ops.attention import cpu_plan
from mvkernels.ops.attention.schema import OPS
from mvkernels.reference.attention import attention as reference_attention
from tests.ops.attention_cases import MEDIUM, NESTED, SMALL, AttentionCase, ids, output_grads, reference
from tests.support.tolerance import assert_as_good_as_eager
from tests.support.trees import trees

NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v")


def results(case, inputs, layout, backend, scale=None):
    """out, lse, grad_q, grad_k, grad_v of a backend."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = multiverse_attention(*leaves, layout, scale=scale, backend=backend, return_lse=True)
    grads = torch.autograd.grad([out, lse], leaves, output_grads(case, inputs))
    return [out.detach(), lse.detach(), *grads]


def check_against_reference(case, inputs, layout, visible, backend, scale=None):
    grads = output_grads(case, inputs)
    exact = reference(case, inputs, visible, grads, torch.float64, scale)
    eager = reference(case, inputs, visible, grads, inputs[0].dtype, scale)
    got = results(case, inputs, layout, backend, scale)
    # PyTorch's flash kernel for the CPU takes a fast exponential in two-byte dtypes: lse is off by 5.3e-5.
    rough = backend == "cpu" and inputs[0].dtype.itemsize == 2
    for name, g, a, e in zip(NAMES, got, eager, exact, strict=True):
        least = 1e-4 if rough and name == "lse" else 0.0
        assert_as_good_as_eager(g, a, e, f"{case.id} {backend} {name}", least=least)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory is NaN: what is never written shows."""

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture
def small_blocks(monkeypatch):
    """Block sizes at which a short input has groups, dense calls, cut key runs and merges."""
    for name, size in (("GROUP_ROWS", 16), ("BLOCK_ROWS", 8), ("SHORT_SEGMENT", 3), ("CALL_KEYS", 10)):
        monkeypatch.setattr(cpu_plan, name, size)


@pytest.mark.parametrize("case", SMALL, ids=ids)
@pytest.mark.usefixtures("poisoned")
def test_short_cases(case):
    check_against_reference(case, case.inputs(), case.layout(), case.visible(), "cpu")


@pytest.mark.parametrize("case", SMALL, ids=ids)
@pytest.mark.usefixtures("poisoned", "small_blocks")
def test_short_cases_in_small_blocks(case):
    check_against_reference(case, case.inputs(), case.layout(), case.visible(), "cpu")


@pytest.mark.parametrize("case", MEDIUM, ids=ids)
@pytest.mark.usefixtures("poisoned")
def test_cases_across_block_borders(case):
    layout = case.layout()
    check_against_reference(case, case.inputs(), layout, layout.dense_mask(), "cpu")


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_the_reference_backend_is_the_reference(case):
    """By its own mask, pair by pair, and by the layout's dense mask: the same."""
    inputs = case.inputs()
    expected, expected_lse = reference_attention(*inputs, case.visible())
    out, lse = multiverse_attention(*inputs, case.layout(), backend="reference", return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@settings(max_examples=12)
@given(
    st.lists(trees(max_length=6), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([8, 33]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([None, 0.3, -1.0, 0.0]),
)
def test_any_tree(documents, heads, head_dim, dtype, scale):
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("GROUP_ROWS", 16), ("BLOCK_ROWS", 8), ("SHORT_SEGMENT", 3), ("CALL_KEYS", 10)):
            patch.setattr(cpu_plan, name, size)
        case = AttentionCase("any", tuple(documents), *heads, head_dim, str(dtype).removeprefix("torch."))
        check_against_reference(case, case.inputs(), case.layout(), case.visible(), "cpu", scale)


@pytest.mark.usefixtures("small_blocks")
def test_gradients_in_fp64():
    case = AttentionCase(
        "gradcheck", ([2, [[3, [[2], [1]]], [0], [4]], 2], [2]), heads=2, kv_heads=1, head_dim=2, dtype="float64"
    )
    layout = case.layout()
    inputs = [x.requires_grad_() for x in case.inputs()]
    for backend in ("cpu", "reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, v, backend=backend: multiverse_attention(q, k, v, layout, backend=backend, return_lse=True),
            inputs,
        )
        assert torch.autograd.gradcheck(
            lambda q, k, v, backend=backend: multiverse_attention(q, k, v, layout, backend=backend), inputs
        )


def test_lse_alone_has_a_gradient():
    case = SMALL[2]
    layout = case.layout()
    grads = []
    for backend in ("cpu", "reference"):
        leaves = [x.requires_grad_() for x in case.inputs()]
        _, lse = multiverse_attention(*leaves, layout, backend=backend, return_lse=True)
        grads.append(torch.autograd.grad(lse.sum(), leaves, materialize_grads=True))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    case = AttentionCase("opcheck", (NESTED,), heads=4, kv_heads=2, head_dim=8)
    q, k, v = (x.to(dtype) for x in case.inputs())
    layout = case.layout()
    table = layout.mask_table
    forward, backward = OPS["cpu"]
    torch.library.opcheck(forward, (*(x.requires_grad_() for x in (q, k, v)), table, 0.3))
    out, lse = forward(q, k, v, table, 0.3)
    fixed = [x.detach() for x in (q, k, v, out, lse)]
    for grad_lse in (torch.randn_like(fixed[4]), None):
        torch.library.opcheck(backward, (torch.randn_like(fixed[3]), grad_lse, *fixed, table, 0.3))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("total", [0, 1])
def test_hardly_any_tokens(backend, total):
    q, k, v = (torch.randn(total, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out, lse = multiverse_attention(q, k, v, BranchLayout.causal(total), backend=backend, return_lse=True)
    out.sum().backward()
    assert torch.equal(out.detach(), v.detach().repeat_interleave(2, dim=1))
    assert lse.shape == (4, total)
    assert q.grad.shape == q.shape
    assert torch.equal(v.grad, torch.full_like(v, 2.0))


def test_any_strides():
    case = SMALL[6]
    layout = case.layout()
    inputs = case.inputs()
    expected = results(case, inputs, layout, "cpu")
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    depth_first = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in inputs]
    fused = torch.cat(inputs, dim=1).split([x.shape[1] for x in inputs], dim=1)
    for variant in (heads_first, depth_first, fused):
        assert not variant[0].is_contiguous()
        for got, want in zip(results(case, variant, layout, "cpu"), expected, strict=True):
            assert torch.equal(got, want)


def test_hidden_keys_do_not_matter_and_visible_ones_do():
    """Changing one path's keys and values changes nothing in its sibling, and everything after the join."""
    case = AttentionCase("siblings", ([5, [[70], [90]], 6],))
    layout = case.layout()
    q, k, v = case.inputs()
    before = multiverse_attention(q, k, v, layout)
    k[5:75] += 1
    v[5:75] += 1
    changed = (multiverse_attention(q, k, v, layout) != before).any(dim=-1).all(dim=-1)
    assert changed.tolist() == [False] * 5 + [True] * 70 + [False] * 90 + [True] * 6


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_reaches_every_row_that_sees_it(backend, which):
    case = AttentionCase("nan", ([300, [[400], [200]], 150], [300]))
    layout = case.layout()
    inputs = case.inputs()
    inputs[1][350] -= 100 * inputs[0][360].mean(0)  # far from every query: its weight is 0, and 0 * NaN is NaN
    inputs[which][350, 0, 3] = float("nan")
    out = multiverse_attention(*inputs, layout, backend=backend)
    sees = layout.dense_mask()[:, 350] if which else torch.arange(len(out)) == 350
    assert out[sees, 0].isnan().any(dim=-1).all()
    assert not out[:, 1].isnan().any()
    if backend == "cpu":
        assert not out[1050:].isnan().any()  # another document, another block of rows


def test_results_repeat_bit_by_bit():
    case = MEDIUM[3]
    layout = case.layout()
    first, second = (results(case, case.inputs(), layout, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tensor_of_size_t_squared():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            Largest.elements = max([Largest.elements, *sizes])
            return out

    layout = BranchLayout.from_tree([200, [[300], [400], [60]] * 2, [[11]] * 60, 900])
    total = layout.total_tokens
    q, k, v = (torch.randn(total, 1, 16, requires_grad=True) for _ in range(3))
    with Largest():
        multiverse_attention(q, k, v, layout).sum().backward()
    assert total * 16 <= Largest.elements < total * total / 4


def test_the_plan_is_made_once_per_layout(monkeypatch):
    case = SMALL[2]
    layout = case.layout()
    calls = []
    monkeypatch.setattr(attention_cpu, "cpu_plan", lambda mask, make=cpu_plan.cpu_plan: calls.append(1) or make(mask))
    for _ in range(3):
        multiverse_attention(*case.inputs(), layout)
    assert len(calls) == 1


def test_a_layout_first_used_in_inference_mode_trains():
    layout = BranchLayout.from_tree([5, [[3], [2]], 4])
    q, k, v = torch.randn(3, 14, 2, 8)
    with torch.inference_mode():
        before = multiverse_attention(q, k, v, layout)
    out = multiverse_attention(q.requires_grad_(), k, v, layout)
    out.sum().backward()
    assert torch.equal(out, before) and q.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_does_not_change_the_dtype(backend):
    case = SMALL[2]
    wanted = multiverse_attention(*case.inputs(), case.layout(), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(multiverse_attention(*case.inputs(), case.layout(), backend=backend), wanted)


def test_a_second_derivative_is_refused():
    case = SMALL[2]
    q, k, v = (x.requires_grad_() for x in case.inputs())
    out = multiverse_attention(q, k, v, case.layout())
    [grad] = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(BackendError, match=r"no second derivative; backend=.reference. has"):
        grad.sum().backward()
