"""What multiverse_attention refuses, and in which words."""

from __future__ import annotations

import pytest
import torch

from mvkernels import attention
from mvkernels.attention import backend_reasons, multiverse_attention
from mvkernels.errors import BackendError
from mvkernels.layout import BranchLayout
from mvkernels.ops import backends
from mvkernels.ops.attention.config import HEAD_DIMS, attention_config

LAYOUT = BranchLayout.causal(6)


def tensors(q=(6, 4, 32), k=(6, 2, 32), v=None, dtypes=(torch.float32,) * 3):
    shapes = (q, k, v or k)
    return [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (tensors(q=(1, 6, 4, 32)), r"q: expected 3 dimensions \[tokens, heads, head_dim\], got shape \[1, 6, 4, 32\]"),
        (tensors(v=(6, 2, 16)), r"k and v of one shape, got k \[6, 2, 32\] and v \[6, 2, 16\]"),
        (tensors(k=(5, 2, 32)), r"k and v: expected \[6, kv_heads, 32\] to fit q \[6, 4, 32\], got \[5, 2, 32\]"),
        (tensors(k=(6, 2, 16)), r"k and v: expected \[6, kv_heads, 32\] to fit q \[6, 4, 32\], got \[6, 2, 16\]"),
        (tensors(k=(6, 3, 32)), r"q heads a positive multiple of kv heads, got q \[6, 4, 32\] and k \[6, 3, 32\]"),
        (tensors(k=(6, 0, 32)), r"q heads a positive multiple of kv heads, got q \[6, 4, 32\] and k \[6, 0, 32\]"),
        (tensors(q=(6, 4, 0), k=(6, 2, 0)), r"head_dim > 0"),
        (tensors(dtypes=(torch.float32, torch.float32, torch.float64)), "of one dtype, got torch.float32, .*float64"),
        (tensors(dtypes=(torch.int64,) * 3), "q: expected a floating dtype, got torch.int64"),
        (tensors(q=(7, 4, 32), k=(7, 2, 32)), "q of the layout's 6 tokens, got 7"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_inputs_that_do_not_fit_together(inputs, message, backend):
    with pytest.raises(ValueError, match=message):
        multiverse_attention(*inputs, LAYOUT, backend=backend)


def test_inputs_on_two_devices():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="one device, got cpu, meta and meta"):
        multiverse_attention(q, k.to("meta"), v.to("meta"), LAYOUT)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="expected one of 'auto', 'triton', 'cpu', 'flash', 'reference', got 'cuda'"):
        multiverse_attention(*tensors(), LAYOUT, backend="cuda")


def test_a_named_backend_does_not_fall_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"backend 'triton' cannot do this: (Triton is not|tensors are on the CPU)"):
        multiverse_attention(*tensors(), LAYOUT, backend="triton")
    with pytest.raises(BackendError, match="backend 'cpu' cannot do this: expected tensors on the CPU, got meta"):
        multiverse_attention(*(x.to("meta") for x in tensors()), LAYOUT, backend="cpu")


def test_auto_gives_every_reason_when_none_fits():
    inputs = [x.to("meta") for x in tensors()]
    with pytest.raises(BackendError, match="no backend fits: cpu: expected tensors on the CPU, got meta; triton: "):
        multiverse_attention(*inputs, LAYOUT)


def test_auto_never_takes_the_reference():
    inputs = [x.to(torch.float8_e4m3fn) for x in tensors()]
    with pytest.raises(
        BackendError, match=r"cpu: expected dtype float32, bfloat16, float16, float64, got torch.float8"
    ):
        multiverse_attention(*inputs, LAYOUT)


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (torch.zeros(1, 1, 64, dtype=torch.float64), "expected dtype bfloat16, float16, float32, got torch.float64"),
        (torch.zeros(1, 1, 48), "expected a head dim among 32, 64, 80, 96, 128, 192, 256, got 48"),
        (torch.zeros(1, 1, 64, dtype=torch.bfloat16), "interpreter has no bfloat16"),
        (torch.zeros(1, 1, 64), None),
    ],
)
def test_why_triton_cannot(q, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(attention, "triton_reason", lambda device: None)
    found = backend_reasons(q)
    assert list(found) == ["triton", "cpu", "flash", "reference"]
    assert found["triton"] is None if reason is None else reason in found["triton"]
    assert found["cpu"] is None


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_auto_on_the_cpu_is_the_cpu_backend(interpret, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(backends, "TRITON_INSTALLED", True)
    chosen = []
    choose = attention.choose_backend
    monkeypatch.setattr(attention, "choose_backend", lambda *a, **k: chosen.append(choose(*a, **k)) or chosen[-1])
    multiverse_attention(*tensors(), LAYOUT)
    assert chosen == ["cpu"]


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = backends.triton_reason(torch.device("cuda"))
    assert reason == "expected compute capability 8.0 or higher, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends.triton_reason(torch.device("cuda")) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in backends.triton_reason(torch.device("cuda"))


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_configuration_for_every_head_dim(head_dim, itemsize, capability):
    config = attention_config(head_dim, itemsize, capability)
    for kernel in (config.forward, config.dq, config.dkdv):
        assert kernel.block_m in (16, 32, 64, 128)  # tl.dot takes 16 and more
        assert kernel.block_n in (16, 32, 64, 128)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_scale_that_is_not_finite(scale, backend):
    with pytest.raises(ValueError, match=f"scale: expected a finite number, got {scale}"):
        multiverse_attention(*tensors(), LAYOUT, scale, backend)


def test_a_layout_that_is_none():
    with pytest.raises(ValueError, match="layout: expected a BranchLayout, got Tensor"):
        multiverse_attention(*tensors(), LAYOUT.position_ids)
