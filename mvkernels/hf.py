"""Branch attention for transformers models: `patch_model`, `unpatch_model`, `is_patched`.

A patched model takes more keyword arguments:

    branch_layout=layout     packed training forward: attention by `multiverse_attention`
    paged_kv=(cache, step)   paged prefill and decode: new keys and values are appended to the KV cache, attention by
                             `tree_decode`
    batch_invariant=True     beside paged_kv: batch-invariant attention. The inputs may have spare rows behind those of
                             the step, with any ids and positions: they are not written and attend to nothing

An unpatched model ignores these keywords silently, as transformers ignores every unknown keyword: check with
`is_patched(model)`. Without these keywords a patched model computes what it did before, on transformers' `sdpa`, but
refuses unknown keywords and the positions of branches (`hf_inputs`).

Supported: causal decoders with plain softmax attention behind transformers' attention interface, such as Qwen2, Qwen3,
Llama and Mistral. Inputs are one row [1, T]: documents are packed, not padded into several rows.

Mechanism: the attention function is registered under a name of its own, and the layout reaches it in the keyword
arguments that transformers hands through. A forward pre-hook passes a one-element 4-D attention mask, which
transformers takes as a finished mask. Otherwise it would build a T x T mask and take branch positions for packed
documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mvkernels.attention import multiverse_attention
from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Step
from mvkernels.context_parallel import split_context
from mvkernels.decode import tree_decode
from mvkernels.errors import BackendError, described
from mvkernels.hf_inputs import known_keywords, parameter_names, refuse_falling, refuse_unknown
from mvkernels.layout import BranchLayout

#: The name of the attention implementation in transformers' registries.
ATTENTION_NAME = "multiverse"
_STATE = "_mvkernels_patch"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments of transformers' attention functions that change the result and that no backend here computes.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass
class _Patch:
    """State for `unpatch_model`: the attention implementation before the patch, the hook, and the requested backend."""

    previous: str | None
    hook: RemovableHandle
    backend: str


def patch_model(model: Model, backend: str = "auto", group: dist.ProcessGroup | None = None) -> Model:
    """Patch a transformers model in place for branch attention.

    The module's docstring lists the keyword arguments that its forward takes from then on. Patching a second time only
    changes `backend` and `group`.

    Args:
        model: A causal decoder with plain softmax attention behind transformers' attention interface.
        backend: Backend of `multiverse_attention`, `PagedKVCache.append` and `tree_decode`.
        group: Context parallelism over the processes of this group in forwards with a layout. Each process passes its
            own tokens, `split_context(layout, ranks).rows[rank]`, and the whole layout, and gets the logits of these
            tokens. Shift labels before splitting them (`shift_labels=`), and sum the gradients of weights over the
            processes.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no transformers PreTrainedModel.
        BackendError: The attention of the model cannot be replaced: there is no attention interface, it is an encoder,
            or some layers are not plain softmax attention.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"patch_model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    _check_model(model)
    previous = getattr(model, _STATE, None)
    if previous is not None:
        unpatch_model(model)
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise BackendError(
            f"patch_model: expected a model that uses transformers' attention interface, got {type(model).__name__}, "
            "whose attention implementation cannot be set"
        )

    # On the base model, so that `model(...)` and `model.model(...)` both run the hook once. A partial instead of a
    # closure, so that a patched model can be pickled.
    base = model.base_model
    names = tuple(parameter_names(type(base).forward)[1:])  # behind self
    prepare = partial(_prepare, names=names, known=known_keywords(model), backend=backend, group=group)
    hook = base.register_forward_pre_hook(prepare, with_kwargs=True)
    setattr(model, _STATE, _Patch(before, hook, backend))
    return model


def unpatch_model(model: Model) -> Model:
    """Undo `patch_model` in place.

    Args:
        model: A patched model.

    Returns:
        The same model, with the attention implementation that it had before.

    Raises:
        ValueError: The model is not patched.
    """
    patch: _Patch | None = getattr(model, _STATE, None)
    if patch is None:
        raise ValueError(
            f"unpatch_model: expected a model patched by patch_model, got an unpatched {type(model).__name__}"
        )
    patch.hook.remove()
    model.set_attn_implementation(patch.previous or "sdpa")
    delattr(model, _STATE)
    return model


def is_patched(model: PreTrainedModel) -> bool:
    """Return whether `patch_model` is in effect.

    An unpatched transformers model accepts `branch_layout=` and ignores it, so check before the first forward.

    Args:
        model: A transformers model.

    Returns:
        True for a patched model; False again after another attention implementation was set.
    """
    config: Any = model.base_model.config
    return hasattr(model, _STATE) and config._attn_implementation == ATTENTION_NAME


def patched_backend(model: PreTrainedModel) -> str:
    """Return the backend given to `patch_model`. Raises ValueError when the model is not patched."""
    patch: _Patch | None = getattr(model, _STATE, None)
    if patch is None:
        raise ValueError(f"expected a model patched by patch_model, got an unpatched {type(model).__name__}")
    return patch.backend


def _check_model(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_causal", True):
        raise BackendError(f"patch_model: expected a causal decoder, got {type(model).__name__}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise BackendError(
            f"patch_model: expected attention without softcap, got a softcap of {config.attn_logit_softcapping}"
        )
    other = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other:
        raise BackendError(f"patch_model: expected layers of types {sorted(_LAYER_TYPES)}, got also {sorted(other)}")


def _prepare(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: tuple[str, ...],
    known: frozenset[str],
    backend: str,
    group: dist.ProcessGroup | None,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Check the keywords of a forward, and pass a finished mask to transformers; forward pre-hook of the base model.

    names: the parameters of the forward in order. known: keywords that the model reads.
    """
    refuse_unknown(kwargs, known)
    positional = dict(zip(names, args, strict=False))
    if len(args) > len(positional) or any(name in kwargs for name in positional):
        return None  # the forward itself refuses such calls
    kwargs = {**positional, **kwargs}
    layout, paged = kwargs.get("branch_layout"), kwargs.get("paged_kv")
    if paged is None and kwargs.get("batch_invariant"):
        beside = "nothing" if layout is None else "branch_layout="
        raise ValueError(f"expected batch_invariant=True beside paged_kv=, got it beside {beside}")
    if layout is None and paged is None:
        refuse_falling(kwargs)
        return None
    config: Any = module.config
    if config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            "expected a model patched by patch_model, got one whose attention was set to "
            f"{config._attn_implementation!r} since then: patch it again"
        )
    if layout is not None and paged is not None:
        raise ValueError("expected branch_layout= or paged_kv=, got both")
    inputs = _inputs(kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    if layout is not None:
        if not isinstance(layout, BranchLayout):
            raise ValueError(f"branch_layout: expected a BranchLayout, got {type(layout).__name__}")
        tokens, positions = layout.total_tokens, layout.position_ids
        if group is not None:
            own = split_context(layout, dist.get_world_size(group)).rows[dist.get_rank(group)]
            tokens, positions = len(own), positions[torch.from_numpy(own).to(positions.device)]
            kwargs["branch_group"] = group
    else:
        _, step = _unpack(paged)
        tokens, positions = step.total_rows, step.positions
        if kwargs.get("batch_invariant") and inputs.shape[1] > tokens:
            positions = torch.nn.functional.pad(positions, (0, inputs.shape[1] - tokens))
            tokens = len(positions)
    kwargs["position_ids"] = _position_ids(kwargs.get("position_ids"), inputs, tokens, positions)
    if kwargs.get("attention_mask") is not None:
        raise ValueError("expected no attention_mask beside branch_layout= or paged_kv=: what is visible is in them")
    if any(kwargs.get(name) is not None for name in ("past_key_values", "cache")) or kwargs.get("use_cache"):
        raise ValueError(
            "expected use_cache=False and no past_key_values beside branch_layout= or paged_kv=, got a cache"
        )
    kwargs["use_cache"] = False
    kwargs["attention_mask"] = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=inputs.device)
    kwargs["branch_backend"] = backend
    return (), kwargs


def _inputs(ids: Any, embeds: Any) -> torch.Tensor:
    """Token ids [1, T] or embeddings [1, T, hidden], whichever is given."""
    for name, given, dims in (("input_ids", ids, 2), ("inputs_embeds", embeds, 3)):
        if given is None:
            continue
        if not isinstance(given, torch.Tensor) or given.dim() != dims:
            expected = "a tensor of shape [1, T]" if dims == 2 else "a tensor of shape [1, T, hidden]"
            raise ValueError(f"{name}: expected {expected}, got {described(given)}")
        return given
    raise ValueError("expected input_ids or inputs_embeds, got neither")


def _unpack(paged: Any) -> tuple[PagedKVCache, Step]:
    if isinstance(paged, tuple) and len(paged) == 2:
        cache, step = paged
        if isinstance(cache, PagedKVCache) and isinstance(step, Step):
            return cache, step
    raise ValueError(f"paged_kv: expected (PagedKVCache, Step), got {described(paged)}")


def _position_ids(given: Any, inputs: torch.Tensor, tokens: int, positions: torch.Tensor) -> torch.Tensor:
    """[1, T] position ids for the model, from the caller or the layout."""
    if inputs.shape[0] != 1 or inputs.shape[1] != tokens:
        raise ValueError(
            f"expected inputs of shape [1, {tokens}] for {tokens} tokens in one row (pack several documents with "
            f"BranchLayout.pack), got {list(inputs.shape)}"
        )
    if given is None:
        return positions[None].to(inputs.device)
    if not isinstance(given, torch.Tensor) or given.shape != (1, tokens):
        shape = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(f"position_ids: expected shape [1, {tokens}], got {shape}")
    return given


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    branch_layout: BranchLayout | None = None,
    paged_kv: tuple[PagedKVCache, Step] | None = None,
    branch_backend: str = "auto",
    branch_group: dist.ProcessGroup | None = None,
    batch_invariant: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers' attention interface: query [1, Hq, T, D], key and value [1, Hkv, T, D].

    Returns ([1, T, Hq, D], None).
    """
    if branch_layout is None and paged_kv is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    _refuse_variants(kwargs, dropout)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, H, D]
    if branch_layout is not None:
        if sliding_window is not None:
            _check_window(sliding_window, branch_layout.longest_document)
        q, k, v = _as_autocast(q, k, v)
        out = multiverse_attention(q, k, v, branch_layout, scaling, branch_backend, group=branch_group)
    else:
        cache, step = _unpack(paged_kv)
        if sliding_window is not None:
            _check_window(sliding_window, step.longest_context)
        if torch.is_autocast_enabled(q.device.type):  # three dtypes: autocast's, the cache's, q and k's
            q, k, v = (tensor.to(cache.dtype) for tensor in (q, k, v))
        layer: int = module.layer_idx  # type: ignore[assignment]
        spare = len(q) - step.total_rows
        if spare:
            q, k, v = (tensor[: step.total_rows] for tensor in (q, k, v))
        cache.append(layer, k, v, step, backend=branch_backend)
        out = tree_decode(
            q, cache.k[layer], cache.v[layer], step, scaling, branch_backend, batch_invariant=batch_invariant
        )
        if spare:
            out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, spare))
    return out[None], None


def _as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to one dtype under autocast: RoPE leaves queries and keys in fp32, while values are in bf16.

    On a GPU that is autocast's dtype, as in sdpa. On a CPU it is fp32: the flash kernels there are no faster in bf16
    forward, and take twice as long backward.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _refuse_variants(kwargs: dict[str, Any], dropout: float) -> None:
    named = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if named:
        raise BackendError(f"branch attention: expected plain softmax attention, got {', '.join(named)}")
    if dropout:
        raise BackendError(f"branch attention: expected no attention dropout, got {dropout}")


def _check_window(window: int, tokens: int) -> None:
    if tokens > window:
        raise BackendError(
            f"branch attention: expected a sequence within the sliding window of {window} tokens, got {tokens} tokens"
        )
