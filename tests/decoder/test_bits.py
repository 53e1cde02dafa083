"""The native decoder has the bits of the fused path that it replaces."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from mvkernels import patch_model
from mvkernels.decoder.choose import make_decoder
from mvkernels.decoder.hosted import HostedDecoder
from mvkernels.hf_layers import fuse_layers
from mvkernels.hf_linear import pack_linear
from mvkernels.hf_norm import fuse_norms
from mvkernels.ops.dense.layer import layer_reason
from tests.decoder.cases import MODELS, make_model, steps

pytestmark = pytest.mark.skipif(layer_reason() is not None, reason=str(layer_reason()))


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits(name: str, batch_invariant: bool) -> None:
    model = make_model(name)
    found = steps(make_decoder(model, "own"), model.config, batch_invariant, 4 * batch_invariant)
    fused = HostedDecoder(fuse_layers(fuse_norms(pack_linear(patch_model(model)))))
    assert all(map(torch.equal, found, steps(fused, model.config, batch_invariant, 4 * batch_invariant)))
