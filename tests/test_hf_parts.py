"""What is noticed of tensors that something was made of."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from mvkernels.hf_parts import Snapshot


def swap(parameter: nn.Parameter, data: torch.Tensor) -> None:
    parameter.data = data


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "written to": lambda p: p.mul_(2),
    "moved": lambda p: swap(p, p.data.clone()),
    "another dtype": lambda p: swap(p, p.data.view(torch.int32)),
    "another shape": lambda p: swap(p, p.data.view(2, 8)),
    "other strides": lambda p: swap(p, p.data.t()),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changes_are_noticed(name: str) -> None:
    one, other = (nn.Parameter(torch.zeros(4, 4), requires_grad=False) for _ in range(2))
    snapshot = Snapshot([one, None, other])
    assert snapshot.holds([one, None, other])
    CHANGES[name](other)
    assert not snapshot.holds([one, None, other])
    assert Snapshot([one, None, other]).holds([one, None, other])


def test_others_are_noticed() -> None:
    one, other = torch.zeros(4), torch.zeros(4)
    snapshot = Snapshot([one, None])
    for tensors in ([other, None], [one, other], [None, one], [one], [one.view(4), None]):
        assert not snapshot.holds(tensors)
    with torch.inference_mode():
        made = torch.zeros(4)
    assert Snapshot([made]).holds([made])


def test_tensors_that_are_made_of_others() -> None:
    """They lie nowhere themselves."""
    one, other = (TwoTensor(torch.zeros(4), torch.ones(4)) for _ in range(2))
    assert one.data_ptr() == other.data_ptr() == 0
    assert Snapshot([one]).holds([one]) and not Snapshot([one]).holds([other])


def test_a_snapshot_is_not_copied() -> None:
    with pytest.raises(TypeError, match="expected a Snapshot to stay with its tensors"):
        copy.deepcopy(Snapshot([torch.zeros(4)]))
