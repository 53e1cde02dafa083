"""RMSNorms of transformers models in one call each, for inference: `fuse_norms` and its undoing.

transformers writes an RMSNorm as seven operations. With few rows each takes longer to start than to compute, and a
model has two norms in every layer. On a CPU in fp32 the call is of a kernel that is compiled here, on a GPU of one in
Triton. With gradients, under torch.compile and in other dtypes a norm is what it was.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mvkernels.ops.backends import triton_reason
from mvkernels.ops.dense.layer import layer_reason, rms_norm

Model = TypeVar("Model", bound=nn.Module)

_OWN = tuple(str(Path(package.__file__).parent) for package in (transformers, torch) if package.__file__)
# What an attention falls back to where it is asked for nothing else.
_NOT_CALLED = {"eager_attention_forward"}


def fuse_norms(model: Model) -> Model:
    """Let the RMSNorms of a model take one call, in place; returns it. Without a compiler and a GPU nothing changes.

    A module takes part whose class computes what Llama's does, in the very same code, as those of Qwen2, Qwen3 and
    Mistral do.
    """
    unfuse_norms(model)
    for module in model.modules():
        if is_rms_norm(module) and (module.weight.is_cuda or layer_reason() is None):
            module.forward = partial(_forward, module)
    return model


def unfuse_norms(model: Model) -> Model:
    """Restore the norms that `fuse_norms` changed; returns the model."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "func", None) is _forward:
            del module.__dict__["forward"]
    return model


def is_rms_norm(module: Any) -> bool:
    """Whether a module computes what Llama's RMSNorm does, and nobody has replaced its forward."""
    return (
        isinstance(module, nn.Module) and _untouched(module) and same_code(type(module).forward, LlamaRMSNorm.forward)
    )


def same_code(function: Any, known: Any, looked_at: tuple[Any, ...] = ()) -> bool:
    """Whether two functions do the same: they have the very same code, and call functions that have.

    transformers writes each model's anew. What others have wrapped around one may do anything. looked_at: functions
    on the way here, which may call one another.
    """
    chains = [_unwrapped(one) for one in (function, known)]
    if None in chains:
        return False
    first, second = (chain[-1] for chain in chains if chain is not None)
    codes = first.__code__, second.__code__
    if any(getattr(codes[0], name) != getattr(codes[1], name) for name in ("co_code", "co_names", "co_consts")):
        return False
    called = [name for name in codes[0].co_names if name not in _NOT_CALLED]
    pairs = [(first.__globals__.get(name), second.__globals__.get(name)) for name in called]
    return all(
        one is other or one in looked_at or same_code(one, other, (*looked_at, function))
        for one, other in pairs
        if inspect.isfunction(one) or inspect.isfunction(other)
    )


def is_own(function: Any) -> bool:
    """Whether a function is transformers' own, whatever it does, or PyTorch's."""
    chain = _unwrapped(function)
    return chain is not None and _is_own(chain[-1])


def _unwrapped(function: Any) -> list[Any] | None:
    """A function and those that it wraps; None where it is none, and where some wrapper is not transformers' own."""
    chain = [function]
    while hasattr(chain[-1], "__wrapped__"):
        chain.append(chain[-1].__wrapped__)
    known = all(map(inspect.isfunction, chain)) and all(map(_is_own, chain[:-1]))
    return chain if known else None


def _is_own(function: Any) -> bool:
    return bool(function.__code__.co_filename.startswith(_OWN))


def _untouched(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return forward is None or getattr(forward, "func", None) is _forward


def _forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight, eps = module.weight, module.variance_epsilon
    alike = hidden_states.dtype is weight.dtype and hidden_states.shape[-1:] == weight.shape
    if alike and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if hidden_states.is_cpu and weight.is_cpu and weight.dtype is torch.float32 and layer_reason() is None:
            return rms_norm(hidden_states, weight, eps)
        if hidden_states.is_cuda and weight.device == hidden_states.device and triton_reason(weight.device) is None:
            from mvkernels.ops.dense import layer_triton

            if weight.dtype in layer_triton.DTYPES:
                return layer_triton.rms_norm(hidden_states, weight, eps)
    plain: torch.Tensor = type(module).forward(module, hidden_states)
    return plain
