"""The Triton attention: on a GPU where there is one, else in the interpreter, on tiny inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvkernels.attention import multiverse_attention
from mvkernels.layout import BranchLayout
from mvkernels.mask import IntervalMask
from mvkernels.mask_tensor import MaskTable
from mvkernels.ops.attention import triton_backward as attention_triton_backward
from mvkernels.ops.attention import triton_forward as attention_triton
from mvkernels.ops.attention.schema import OPS
from tests.conftest import interpreting
from tests.ops.attention_cases import MEDIUM, NESTED, SMALL, AttentionCase, ids
from tests.support.trees import random_tree
from tests.test_attention import check_against_reference, poisoned, results

pytestmark = pytest.mark.triton

__all__ = ["poisoned"]

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"


def on_device(case: AttentionCase) -> tuple:
    return case.inputs(device=DEVICE), case.layout(), case.visible().to(DEVICE)


@pytest.mark.parametrize("case", SMALL, ids=ids)
@pytest.mark.usefixtures("poisoned")
def test_short_cases(case):
    check_against_reference(case, *on_device(case), "triton")


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_of_either_sign(scale):
    case = AttentionCase("scale", (NESTED,), heads=1, kv_heads=1)
    check_against_reference(case, *on_device(case), "triton", scale)


def test_no_gradient_of_lse_is_no_zero_tensor():
    """The gradient of out alone: what training asks for."""
    case = AttentionCase("out-only", (NESTED,), heads=2, kv_heads=1)
    inputs, layout, _ = on_device(case)
    grads = []
    for backend in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = multiverse_attention(*leaves, layout, backend=backend)
        grads.append(torch.autograd.grad((out * torch.arange(32, device=DEVICE)).sum(), leaves))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_any_strides():
    case = AttentionCase("strides", (NESTED, [2]), heads=2, kv_heads=1)
    inputs, layout, _ = on_device(case)
    expected = results(case, inputs, layout, "triton")
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    depth_first = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in inputs]
    fused = torch.cat(inputs, dim=1).split([x.shape[1] for x in inputs], dim=1)
    for variant in (heads_first, depth_first, fused):
        for got, want in zip(results(case, variant, layout, "triton"), expected, strict=True):
            assert torch.equal(got, want)


def test_hidden_keys_do_not_matter_and_visible_ones_do():
    case = AttentionCase("siblings", ([5, [[20], [19]], 6],), heads=1, kv_heads=1)
    (q, k, v), layout, _ = on_device(case)
    before = multiverse_attention(q, k, v, layout, backend="triton")
    k[5:25] += 1
    v[5:25] += 1
    changed = (multiverse_attention(q, k, v, layout, backend="triton") != before).any(dim=-1).all(dim=-1)
    assert changed.tolist() == [False] * 5 + [True] * 20 + [False] * 19 + [True] * 6


@pytest.mark.parametrize("which", [1, 2], ids=["k", "v"])
def test_nan_reaches_every_row_that_sees_it(which):
    case = AttentionCase("nan", ([10, [[30], [20]], 15], [33]), heads=2, kv_heads=2)
    inputs, layout, visible = on_device(case)
    inputs[which][17, 0, 3] = float("nan")
    out = multiverse_attention(*inputs, layout, backend="triton")
    assert out[visible[:, 17], 0].isnan().any(dim=-1).all()
    assert not out[:, 1].isnan().any()


@pytest.mark.parametrize("total", [0, 1])
def test_hardly_any_tokens(total):
    q, k, v = (torch.randn(total, heads, 32, device=DEVICE, requires_grad=True) for heads in (4, 2, 2))
    out, lse = multiverse_attention(q, k, v, BranchLayout.causal(total), backend="triton", return_lse=True)
    out.sum().backward()
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=1))
    assert lse.shape == (4, total)
    torch.testing.assert_close(v.grad, torch.full_like(v, 2.0))


@pytest.mark.skipif(not interpreting(), reason="on a GPU the compilations themselves are counted")
def test_no_layout_is_a_new_specialization(monkeypatch):
    """What Triton compiles anew for: types, pointers on 16 bytes, and of the other integers 1 and multiples of 16."""
    seen = {}

    def recording(kernel):
        fixed = {kernel.arg_names.index("total")}  # do_not_specialize

        def key(index, x):
            if isinstance(x, torch.Tensor):
                return x.dtype, x.data_ptr() % 16
            if isinstance(x, int):
                return abs(x) < 2**31 if index in fixed else (abs(x) < 2**31, x == 1, x % 16 == 0)
            return type(x)

        class Recording:
            def __getitem__(self, grid):
                def launch(*args, **constants):
                    keys = tuple(key(i, x) for i, x in enumerate(args))
                    seen.setdefault(kernel.__name__, set()).add((keys, tuple(constants.items())))

                return launch

        return Recording()

    for module, names in ((attention_triton, ["forward"]), (attention_triton_backward, ["delta", "dq", "dkdv"])):
        for name in names:
            kernel = getattr(module, f"{name}_kernel")
            monkeypatch.setattr(module, f"{name}_kernel", recording(kernel))
    for tree in [[1], [16], [64, [[64]] * 3, 32], *(random_tree(seed, depth=2) for seed in range(20))]:
        case = AttentionCase("any", (tree,), heads=4, kv_heads=2)
        results(case, case.inputs(), case.layout(), "triton")
    assert {name: len(keys) for name, keys in seen.items()} == dict.fromkeys(seen, 1) and len(seen) == 4


def test_offsets_beyond_32_bits_in_the_interpreter():
    """Tokens so far apart that the last ones lie beyond 2**31 elements. The memory between them is never touched."""
    total, stride, depth = 70, 2**25 + 32, 32
    try:
        store = torch.empty(total * stride, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("cannot reserve 4.7 GB of addresses")
    assert (total - 1) * stride > 2**31
    inputs = [store.as_strided((total, 1, depth), (stride, depth, 1), i * depth) for i in range(3)]
    for x in inputs:
        x.copy_(torch.randn(total, 1, depth))
    case = AttentionCase("far", ([30, [[9], [11]], 20],), heads=1, kv_heads=1, dtype="float16")
    wanted = results(case, [x.contiguous() for x in inputs], case.layout(), "triton")
    for got, want in zip(results(case, inputs, case.layout(), "triton"), wanted, strict=True):
        assert torch.equal(got, want)


def test_a_row_that_sees_nothing_is_zero():
    """No layout has one; a mask made by hand may."""
    starts, gap_ptr = np.array([0, 20, 50], np.int32), np.zeros(3, np.int32)
    blind = IntervalMask(starts, np.array([20, 20], np.int32), gap_ptr, np.zeros((0, 2), np.int32), 50)
    table = MaskTable(blind, torch.device(DEVICE))
    q, k, v = torch.randn(3, 50, 2, 32, device=DEVICE).requires_grad_().unbind()
    out, lse = OPS["triton"][0](q, k, v, table.tensor, 0.2)
    assert torch.equal(out[:20], torch.zeros_like(out[:20])) and (lse[:, :20] == -float("inf")).all()
    assert out.isfinite().all() and lse[:, 20:].isfinite().all()
    grads = torch.autograd.grad(out.sum() + lse[:, 20:].sum(), (q, k, v))
    assert all(grad.isfinite().all() and not grad[:20].any() for grad in grads)


@pytest.mark.parametrize("grad_lse", [True, False])
def test_opcheck(grad_lse):
    case = AttentionCase("opcheck", ([3, [[2], [4]], 1],), heads=2, kv_heads=1)
    (q, k, v), layout, _ = on_device(case)
    forward, backward = OPS["triton"]
    table = layout.to(DEVICE).mask_table
    if grad_lse:
        torch.library.opcheck(forward, (*(x.requires_grad_() for x in (q, k, v)), table, 0.3))
    fixed = [x.detach() for x in (q, k, v, *forward(q, k, v, table, 0.3))]
    grads = torch.randn_like(fixed[3]), torch.randn_like(fixed[4]) if grad_lse else None
    torch.library.opcheck(backward, (*grads, *fixed, table, 0.3))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.usefixtures("poisoned")
def test_every_head_dim(head_dim, dtype):
    case = AttentionCase("head-dim", ([300, [[400], [201], [0], [77]], 130], [65]), 4, 2, head_dim, dtype)
    layout = case.layout()
    check_against_reference(case, case.inputs(device=DEVICE), layout, layout.dense_mask().to(DEVICE), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", MEDIUM, ids=ids)
@pytest.mark.usefixtures("poisoned")
def test_cases_across_block_borders(case):
    layout = case.layout()
    check_against_reference(case, case.inputs(device=DEVICE), layout, layout.dense_mask().to(DEVICE), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", MEDIUM, ids=ids)
def test_results_repeat_bit_by_bit(case):
    layout = case.layout()
    first, second = (results(case, case.inputs(device=DEVICE), layout, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_thousand_backward_passes_are_one():
    case = MEDIUM[-1]
    layout, inputs = case.layout(), case.inputs(device=DEVICE)
    first = results(case, inputs, layout, "triton")
    for _ in range(999):
        assert all(torch.equal(a, b) for a, b in zip(results(case, inputs, layout, "triton"), first, strict=True))


@pytest.mark.gpu
def test_no_layout_compiles_anything_again():
    from mvkernels.ops.attention.triton_backward import dkdv_kernel, dq_kernel
    from mvkernels.ops.attention.triton_forward import forward_kernel

    def compiled() -> list[int]:
        return [
            sum(len(entry[0]) for entry in kernel.device_caches.values())
            for kernel in (forward_kernel, dq_kernel, dkdv_kernel)
        ]

    def run(case: AttentionCase) -> None:
        results(case, case.inputs(device=DEVICE), case.layout(), "triton")

    run(MEDIUM[0])
    before = compiled()
    for trees in (([1],), ([128],), (NESTED, [13]), ([64, [[64]] * 9, 2048],), *((random_tree(i),) for i in range(20))):
        run(AttentionCase("again", trees, heads=4, kv_heads=2, head_dim=64))
    assert compiled() == before


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """The last tokens of tensors with more than 2**31 elements; heads are few and far apart."""
    total, depth = 2**14 + 3, 64
    layout = BranchLayout.causal(total)
    store = torch.zeros(total, 2**31 // (2**14 * depth) + 1, depth, dtype=torch.bfloat16, device=DEVICE)
    store[:, :3] = torch.randn(total, 3, depth, device=DEVICE)
    q, k, v = (store[:, i : i + 1] for i in range(3))
    assert store.numel() > 2**31
    got = multiverse_attention(q, k, v, layout, backend="triton")
    expected = multiverse_attention(*(x.contiguous() for x in (q, k, v)), layout, backend="triton")
    assert torch.equal(got, expected)
