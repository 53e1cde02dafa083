"""Small work of the CPU kernels opens no parallel region: its threads would wait for one another on a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from mvkernels.decoder.native import NativeDecoder
from mvkernels.decoder.weights import take_weights
from mvkernels.ops import native
from mvkernels.ops.decode.native import compile_reason
from mvkernels.ops.dense.linear import linear_reason
from tests.support.tiny_model import tiny_model

# libgomp starts a thread at the first parallel region that needs it.
SCRIPT = """
import os
import torch
from mvkernels import PagedKVCache, tree_decode
from mvkernels.ops.dense.linear import LinearLayers

def threads():
    return len(os.listdir("/proc/self/task"))

def decode(tokens):
    cache = PagedKVCache(4, 16, 1, 2, 32)
    step = cache.plan([(cache.new(), tokens)])
    new = torch.ones(tokens, 2, 32)
    cache.append(0, new, new, step)
    out = tree_decode(torch.ones(tokens, 4, 32), cache.k[0], cache.v[0], step)
    assert torch.allclose(out, torch.ones(()))

def multiply(rows):
    weight = torch.ones(128, 128)
    out = LinearLayers([weight], [None])(torch.ones(rows, 128))
    assert torch.equal(out, torch.full((rows, 128), 128.0))

few = threads()
multiply(8)
assert threads() == few, "a small product opened a region"
decode(8)
assert threads() == few, "a small step of attention opened a region"
multiply(64)
assert threads() == few + 1, "a large product opened none"
"""


@pytest.mark.skipif(linear_reason() is not None or compile_reason() is not None, reason="needs a C++ compiler")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_only_large_work_is_shared_among_threads() -> None:
    """It once took 20 times as long with the embedded model beside other processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(linear_reason() is not None, reason="needs a C++ compiler")
def test_threads_that_would_spin_on_a_busy_machine_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    native._warn_once.cache_clear()
    weights = take_weights(tiny_model())
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    try:
        for threads, policy, said in ((1, "", 0), (2, "passive", 0), (2, "", 1), (2, "", 0)):
            torch.set_num_threads(threads)
            monkeypatch.setenv("OMP_WAIT_POLICY", policy)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                NativeDecoder(weights)
            assert [str(one.message) for one in caught] == [native.BUSY] * said
    finally:
        torch.set_num_threads(before)
        native._warn_once.cache_clear()
