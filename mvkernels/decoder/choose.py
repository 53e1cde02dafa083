"""Choice of the decoder that runs a model: `make_decoder`."""

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
        model: A causal language model on one device. A hosted one is patched in place.
        decoder: "own": the layers of this package. "hosted": transformers' modules. "auto": "own" if the model is
            supported, else "hosted" with a warning that gives the reason.
        backend: Backend of the attention.
        copies: Most bytes for bf16 copies of float32 matrices; None: any.
        rows: Fewest rows of a step; copies that are only read with fewer rows are not made.

    Returns:
        The decoder.

    Raises:
        ValueError: `decoder` is another name.
        BackendError: `decoder` is "own" and the model is not supported; or `patch_model` refuses it.
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
    """Return why each own executor, best first, cannot run layers with queries like q [0, heads, dim], or None."""
    return {"native": native_decoder_reason(q, backend), "triton": triton_decoder_reason(q, backend), "torch": None}
