"""The flash-attn backend: when it is taken, and what it is given. The packages themselves run on a GPU only."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mvkernels import attention
from mvkernels.attention import multiverse_attention
from mvkernels.errors import BackendError
from mvkernels.layout import BranchLayout
from mvkernels.ops.attention import flash as attention_flash

PACKED = BranchLayout.pack([BranchLayout.causal(5), BranchLayout.causal(9)])
BRANCHED = BranchLayout.from_tree([5, [[3], [4]], 2])
BOTH = ("flash_attn_interface", "flash_attn")


def on_gpu(dtype: torch.dtype = torch.bfloat16, depth: int = 64) -> SimpleNamespace:
    """What the choice of a backend reads of a tensor."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(14, 4, depth))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def be(capability: tuple[int, int], names: tuple[str, ...]) -> None:
        monkeypatch.setattr(attention_flash, "INSTALLED", names)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return be


@pytest.mark.parametrize(
    ("capability", "names", "module", "preferred"),
    [
        ((8, 0), ("flash_attn",), "flash_attn", True),
        ((8, 0), BOTH, "flash_attn", True),
        ((8, 9), ("flash_attn_interface",), None, False),
        ((9, 0), BOTH, "flash_attn_interface", True),
        ((9, 0), ("flash_attn",), "flash_attn", False),
        ((10, 0), BOTH, "flash_attn", False),
        ((8, 0), (), None, False),
    ],
)
def test_which_package_and_whether_auto_prefers_it(machine, capability, names, module, preferred) -> None:
    machine(capability, names)
    assert attention_flash.module_for(capability) == module
    assert attention._prefer_flash(on_gpu()) == preferred
    assert not attention._prefer_flash(torch.zeros(14, 4, 64))
    assert (attention._flash_reason(on_gpu(), PACKED, False) is None) == (module is not None)


@pytest.mark.parametrize(
    ("q", "layout", "return_lse", "reason"),
    [
        (on_gpu(), BRANCHED, False, "expected a layout without branches, got one with branches"),
        (on_gpu(), PACKED, True, "no gradient of the log-sum-exp"),
        (on_gpu(torch.float32), PACKED, False, "expected dtype bfloat16, float16, got torch.float32"),
        (on_gpu(depth=288), PACKED, False, "expected a head dim of a multiple of 8 up to 256, got 288"),
        (on_gpu(depth=60), PACKED, False, "expected a head dim of a multiple of 8 up to 256, got 60"),
        (torch.zeros(14, 4, 64), PACKED, False, "expected tensors on cuda, got cpu"),
    ],
)
def test_why_it_cannot(machine, q, layout, return_lse, reason) -> None:
    machine((9, 0), BOTH)
    assert reason in attention._flash_reason(q, layout, return_lse)


def test_asked_for_by_name_it_says_why_it_cannot(machine) -> None:
    q, k, v = torch.zeros(3, 14, 2, 64, dtype=torch.bfloat16)
    machine((9, 0), ())
    with pytest.raises(BackendError, match="backend 'flash' cannot do this: flash-attn is not installed"):
        multiverse_attention(q, k, v, BRANCHED, backend="flash")
    machine((9, 0), BOTH)
    with pytest.raises(BackendError, match="backend 'flash' cannot do this: expected tensors on cuda, got cpu"):
        multiverse_attention(q, k, v, PACKED, backend="flash")


@pytest.mark.parametrize("name", BOTH)
def test_what_the_package_is_given(machine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls = []

    def flash_attn_varlen_func(*args, **options):
        calls.append((args, options))
        return (args[2] + 1, None) if name == "flash_attn_interface" else args[2] + 1

    module = types.ModuleType(name)
    monkeypatch.setattr(module, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    monkeypatch.setitem(sys.modules, name, module)
    machine((9, 0), (name,))
    q, k, v = torch.randn(3, 14, 2, 64)
    out = attention_flash.attend(q, k, v, PACKED.cu_seqlens, PACKED.longest_document, 0.25)
    assert torch.equal(out, v + 1)
    [(args, options)] = calls
    assert args[:3] == (q, k, v) and args[3:5] == (PACKED.cu_seqlens,) * 2 and args[5:] == (9, 9)
    assert options == {"softmax_scale": 0.25, "causal": True, "deterministic": True}


@pytest.mark.parametrize("name", BOTH)
def test_the_call_can_be_traced(machine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Without a graph break, and without a compilation per layout."""

    def flash_attn_varlen_func(q, k, v, first, last, longest_q, longest_k, softmax_scale, causal, deterministic):
        return v * softmax_scale + longest_k

    module = types.ModuleType(name)
    monkeypatch.setattr(module, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    monkeypatch.setitem(sys.modules, name, module)
    machine((9, 0), (name,))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(x: torch.Tensor, layout: BranchLayout) -> torch.Tensor:
        return attention_flash.attend(x, x, x, layout.cu_seqlens, layout.longest_document, 0.5)

    for length in (7, 12, 33):
        layout = BranchLayout.pack([BranchLayout.causal(length), BranchLayout.causal(2)])
        x = torch.randn(layout.total_tokens, 2, 64)
        torch.testing.assert_close(run(x, layout), x * 0.5 + length)
    assert counter.frame_count == 2


@pytest.mark.gpu
@pytest.mark.skipif(not attention_flash.INSTALLED, reason="flash-attn is not installed")
def test_it_agrees_with_the_triton_backend() -> None:
    layout = BranchLayout.pack([BranchLayout.causal(n) for n in (300, 1, 777)])
    leaves = [torch.randn(1078, h, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)]
    grads = []
    for backend in ("flash", "triton"):
        out = multiverse_attention(*leaves, layout, backend=backend)
        grads.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))
