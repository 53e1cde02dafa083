"""Weights of an engine's model: which ones a decoder was made of, and new values for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel


class TakenWeights:
    """The parameters of a model as they are now: where they lie, and how often they were written to.

    Their memory is held, so that no other tensor can come to lie where one of them does. Writes through `.data` and in
    inference mode are not counted by PyTorch, so they are not seen.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._held = [parameter.detach() for parameter in model.parameters()]
        self._state = _state(self._held)

    def are_those_of(self, model: PreTrainedModel) -> bool:
        """Whether a model has these parameters, and none was written to since."""
        return _state(model.parameters()) == self._state


def _state(tensors: Iterable[torch.Tensor]) -> list[tuple[int, torch.dtype, torch.Size, int]]:
    return [(x.data_ptr(), x.dtype, x.shape, 0 if x.is_inference() else x._version) for x in tensors]


def matched(
    model: PreTrainedModel, named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Match new values to the tensors of a model.

    Args:
        model: whose `state_dict` has the names. Of tensors that are tied, one name is enough.
        named_tensors: (name, values), floating point, on any device.

    Returns:
        (tensor of the model, new values), each tensor once.

    Raises:
        ValueError: for a missing, foreign or wrongly shaped tensor, and for tied ones that differ, by name.
    """
    given = dict(named_tensors)
    known = model.state_dict(keep_vars=True)
    found: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}
    for name, values in given.items():
        target = known.get(name)
        if target is None:
            raise ValueError(f"{name}: expected a name of the model's state_dict (adapters are to be merged first)")
        if not isinstance(values, torch.Tensor) or values.shape != target.shape or not values.is_floating_point():
            kind = f"{values.dtype} {list(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(f"{name}: expected floating-point values of shape {list(target.shape)}, got {kind}")
        first, _, before = found.setdefault(id(target), (name, target, values))
        if before is not values and not torch.equal(before, values):
            raise ValueError(f"{name}: expected the values of {first}, to which it is tied, got others")
    missing = [name for name, target in known.items() if id(target) not in found]
    if missing:
        raise ValueError(f"{missing[0]}: expected values for it, got none ({len(missing)} tensors are missing)")
    return [(target, values) for _, target, values in found.values()]
