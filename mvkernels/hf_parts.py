"""Whether a model is still what it was when something was made of it: its modules, their hooks, their weights."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as module_hooks
from torch.utils.hooks import RemovableHandle


class Parts:
    """Modules as they hang together, with the forwards that they have of their own; without hooks, which would want to
    be called. parents: whose children they are.
    """

    def __init__(self, parents: Iterable[nn.Module]) -> None:
        self._children = [(parent, name, part) for parent in parents for name, part in parent.named_children()]
        self._found = [part.__dict__.get("forward") for _, _, part in self._children]
        self._calm = -1  # the number of the next hook when there was none here

    @cached_property
    def _places(self) -> list[tuple[dict[str, Any], str, nn.Module, dict[str, Any], Any]]:
        """Of each part: what its parent has, its name, itself, and what it has; with its own forward, if any."""
        return [
            (parent.__dict__, name, part, part.__dict__, forward)
            for (parent, name, part), forward in zip(self._children, self._found, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copy's modules have dictionaries of their own.
        return {"_children": self._children, "_found": self._found, "_calm": -1}

    def untouched(self) -> bool:
        """Whether all of it is as it was."""
        # Every hook gets a number of its own, the next one: where none was given out since, none has come.
        if self._calm != RemovableHandle.next_id:
            if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
                return False
            if any([own["_forward_hooks"] or own["_forward_pre_hooks"] for _, _, _, own, _ in self._places]):
                return False
            self._calm = RemovableHandle.next_id
        for parent, name, part, own, forward in self._places:
            if parent["_modules"].get(name) is not part or own.get("forward") is not forward:
                return False
        return True


class Snapshot:
    """Tensors as they are now, without keeping any memory of theirs: which ones, where, how they lie there, and how
    often they were written to. Writing through `.data` is not counted, nor is any in inference mode.
    """

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        self._tensors = [_nothing if tensor is None else weakref.ref(tensor) for tensor in tensors]
        # Others may come to lie at an address only when these have gone.
        storages = [one.untyped_storage() for one in present]
        self._storages: list[Any] = [StorageWeakRef(one) for one in storages]  # type: ignore[no-untyped-call]
        self._counting = [place for place, tensor in enumerate(present) if not tensor.is_inference()]
        self._state = self._look(present)

    def __reduce__(self) -> NoReturn:
        # Its references to storages would be given back twice.
        raise TypeError("expected a Snapshot to stay with its tensors, got a copy of it")

    def holds(self, tensors: Sequence[torch.Tensor | None]) -> bool:
        """Whether these are the same ones, as they were."""
        known = [tensor() for tensor in self._tensors]
        return (
            len(tensors) == len(known)
            and all(map(operator.is_, tensors, known))
            and self._look([tensor for tensor in tensors if tensor is not None]) == self._state
            and not any([storage.expired() for storage in self._storages])
        )

    def _look(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Kind by kind, which is faster than tensor by tensor: a model has hundreds."""
        return [
            [tensor.data_ptr() for tensor in tensors],
            [tensor.dtype for tensor in tensors],
            [tensor.shape for tensor in tensors],
            [tensor.stride() for tensor in tensors],
            [tensors[place]._version for place in self._counting],
        ]


def _nothing() -> None:
    return None


class Weights:
    """The parameters of modules, whichever they are at the time."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)

    @cached_property
    def _places(self) -> list[tuple[dict[str, Any], str]]:
        return [(one.__dict__, name) for one in self._modules for name in one._parameters]

    def __getstate__(self) -> dict[str, Any]:
        return {"_modules": self._modules}

    def now(self) -> list[torch.Tensor | None]:
        return [own["_parameters"].get(name) for own, name in self._places]
