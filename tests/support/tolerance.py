"""The one tolerance of the numerical tests: relative to what eager PyTorch makes of the same computation."""

from __future__ import annotations

import torch


def assert_as_good_as_eager(
    got: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    label: str = "",
    factor: float = 2.0,
    least: float = 0.0,
) -> None:
    """Largest error of `got` <= factor x the largest error of `eager` + a floor; both against `exact`, in fp64.

    eager: the same computation by PyTorch in the dtype under test. The floor, for inputs on which eager happens to
    round luckily: a few units in the last place of that dtype at the largest exact value, and of the fp32 in which sums
    are kept at 1, because the terms of a gradient may be of that size and cancel; at least `least`.
    """
    assert got.shape == exact.shape, f"{label}: shape {list(got.shape)}, expected {list(exact.shape)}"
    assert got.dtype == eager.dtype, f"{label}: dtype {got.dtype}, expected {eager.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{label}: {int((~torch.isfinite(got)).sum())} values are not finite"
    error = (got.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    sums = torch.float64 if got.dtype == torch.float64 else torch.float32
    floor = 4 * torch.finfo(got.dtype).eps * exact.abs().max().item() + 16 * torch.finfo(sums).eps
    floor = max(floor, least)
    assert error <= factor * eager_error + floor, (
        f"{label}: error {error:.3e}, eager's {eager_error:.3e}, allowed {factor} times that + {floor:.3e}"
    )
