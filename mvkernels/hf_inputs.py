"""Input checks of a patched model: unknown keywords, and positions that transformers would misread.

transformers' models accept any keyword, and read falling positions as packed documents. Without these checks a
forgotten or misspelt `branch_layout=` would only show in the logits.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs

#: Keywords that `patch_model` adds.
OWN_KEYWORDS = ("branch_layout", "paged_kv", "batch_invariant")
# Keywords that transformers accepts without a signature that has them: decorators take or rename the first ones, and
# tokenizers return the last one for decoders too.
_UNNAMED = ("past_key_values", "cache", "cache_position", "return_dict", "token_type_ids")


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Names of a function's parameters in order, then those of its typed keywords (`Unpack[SomeTypedDict]`)."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    typed = [one for p in parameters if p.kind is p.VAR_KEYWORD for one in get_args(p.annotation)]
    return [*names, *(name for one in typed for name in getattr(one, "__annotations__", ()))]


def known_keywords(model: PreTrainedModel) -> frozenset[str]:
    """Return every keyword that the model, its loss or its `generate` reads, by their signatures."""
    base = model.base_model
    found = {*OWN_KEYWORDS, *_UNNAMED, *TransformersKwargs.__annotations__}
    # From the classes: an instance may have a forward that takes and passes on any keyword.
    for function in (type(base).forward, type(model).forward):
        found |= set(parameter_names(function))
    if "labels" in found:
        found |= set(parameter_names(model.loss_function))
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    found |= set(parameter_names(prepare)) if prepare is not None else set()
    recorded = getattr(base, "_can_record_outputs", None) or {}
    return frozenset(found | {f"output_{name}" for name in recorded})


def refuse_unknown(keywords: Iterable[str], known: frozenset[str]) -> None:
    """Raise ValueError for the first keyword that the model does not read, with the nearest known one."""
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, [*OWN_KEYWORDS, *sorted(known)], n=1, cutoff=0.0)[0]
            raise ValueError(f"expected keywords that the patched model reads, got {name}=; the nearest one is {near}=")


def refuse_falling(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for the positions of branches in a forward without a layout, which would not be read as such.

    Valid positions go up by one, or restart at 0 with another packed document. Not checked: tokens that the 2-D
    attention mask hides, masks and positions of other shapes, and any traced forward. On a GPU the host waits, as in
    transformers, which looks for packed documents here.
    """
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or _is_traced(positions):
        return
    wrong = (positions.diff(dim=1) != 1) & (positions[:, 1:] != 0)
    if mask is not None:
        tokens = positions.shape[1]
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[1] < tokens:
            return
        kept = mask[:, -tokens:].to(positions.device) != 0
        wrong = wrong & kept[:, 1:] & kept[:, :-1]
    if wrong.any():
        row, token = wrong.nonzero()[0].tolist()
        before, after = positions.expand(len(wrong), -1)[row, token : token + 2].tolist()
        raise ValueError(
            "position_ids: expected positions that go up by one or restart at 0, as there is neither branch_layout= "
            f"nor paged_kv=, got {after} after {before}"
        )


def _is_traced(tensor: torch.Tensor) -> bool:
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or tensor.is_meta or capturing
