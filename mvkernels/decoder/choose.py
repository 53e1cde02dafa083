"""Which decoder runs a model: `make_decoder`."""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedModel

from mvkernels.decoder.decoder import Decoder
from mvkernels.decoder.hosted import HostedDecoder
from mvkernels.decoder.native import NativeDecoder, narrow_rows, native_decoder_reason
from mvkernels.decoder.torch import TorchDecoder
from mvkernels.decoder.triton import TritonDecoder, triton_decoder_reason
from mvkernels.decoder.weights import take_weights, weights_reason
from mvkernels.errors import BackendError
from mvkernels.hf import patch_model

DECODERS = ("auto", "own", "hosted")


def make_decoder(
    model: PreTrainedModel, decoder: str = "auto", backend: str = "auto", copies: int | None = None, rows: int = 1
) -> Decoder:
    """Make the decoder of a model.

    Args:
        model: a causal language model on one device. A hosted one is patched in place.
        decoder: "own", the layers of this package; "hosted", transformers' modules; "auto", "own" where it knows the
            model, else "hosted" with a warning that says why.
        backend: of the attention.
        copies: bytes that bf16 copies of float32 matrices may take; None: any.
        rows: that every step has at least; copies that are read with fewer only are not made.

    Raises:
        ValueError: for another name.
        BackendError: for "own" and a model that it does not know; what `patch_model` raises.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder: expected one of {', '.join(map(repr, DECODERS))}, got {decoder!r}")
    reason = None if decoder == "hosted" else weights_reason(model)
    if reason is not None and decoder == "own":
        other = 'decoder="hosted" runs transformers\' modules'
        raise BackendError(f"decoder 'own' cannot run this model: {reason}; {other}")
    if decoder == "hosted" or reason is not None:
        hosted = HostedDecoder(patch_model(model, backend=backend))
        if reason is not None:
            warnings.warn(f'transformers\' modules run the model (decoder "hosted"): {reason}', stacklevel=4)
        return hosted
    weights = take_weights(model)
    queries = torch.empty(0, weights.heads, weights.head_dim, dtype=weights.dtype, device=weights.device)
    reasons = executor_reasons(queries, backend)
    if reasons["native"] is None:
        size = torch.bfloat16.itemsize * weights.linear_numbers()
        narrow = (copies is None or size <= copies) and rows <= narrow_rows()
        return NativeDecoder(weights, backend, narrow)
    if reasons["triton"] is None:
        return TritonDecoder(weights, backend)
    return TorchDecoder(weights, backend)


def executor_reasons(q: torch.Tensor, backend: str = "auto") -> dict[str, str | None]:
    """Say for each own executor, best first, why it cannot run layers with such queries [0, heads, dim], or None."""
    return {"native": native_decoder_reason(q, backend), "triton": triton_decoder_reason(q, backend), "torch": None}
