"""Nothing wrong is timed: ours and every peer that claims the same mask, against the reference in fp64.

Short layouts of each case are checked with gradients, on two key heads. At full length, where the reference would not
fit, a peer's results are compared with ours (`agree`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.flex import FlexMask
from benchmarks.peers import Attention, Peer, Shape, peers
from mvkernels import BranchLayout
from mvkernels.reference.attention import attention as reference_attention

SHORT = 700  # tokens; a published trace is longer, the shortest is taken
OURS = ("ours", "ours-triton", "apart")
NAMES = ("out", "grad_q", "grad_k", "grad_v")


class WrongResultError(Exception):
    """Something that is to be timed computes something else."""


def check_case(case: str, layout: BranchLayout, shape: Shape) -> dict[str, str]:
    """Peer -> why it must not be timed on this case. layout: the case, short. Raises WrongResultError for ours."""
    refused: dict[str, str] = {}
    for peer in peers(case, layout, shape):
        if not peer.exact:
            continue
        try:
            _check_peer(peer, shape)
        except WrongResultError as error:
            if peer.name in OURS:
                raise WrongResultError(f"{case}: {error}; nothing was timed") from error
            refused[peer.name] = str(error)
        except Exception as error:
            if peer.name in OURS:
                raise
            refused[peer.name] = reason(error)
    return refused


def _check_peer(peer: Peer, shape: Shape) -> None:
    if peer.name == "flex":  # compiling for a short layout would take long: its kernel is checked at full length
        check_flex_mask(peer.layout, shape.device)
        return
    few = shape.few_heads()
    inputs = few.inputs(peer.layout.total_tokens, seed=1)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact, _ = reference_attention(*wide, peer.layout.dense_mask().to(shape.device))
    grad = torch.randn(exact.shape, generator=torch.Generator(shape.device).manual_seed(2), device=shape.device)
    got = results(peer.make(), inputs, grad.to(inputs[0].dtype))
    want = [exact.detach(), *torch.autograd.grad(exact, wide, grad.to(inputs[0].dtype).double())]
    agree(peer.name, got, want, shape.dtype)


def check_flex_mask(layout: BranchLayout, device: str) -> None:
    """Raise WrongResultError where FlexAttention's mask function shows other keys than the layout, which is short."""
    if not torch.equal(FlexMask(layout, device).dense().cpu(), layout.dense_mask()):
        raise WrongResultError("flex: the mask function shows other keys than the layout")


def results(attend: Attention, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """out and the gradients of q, k and v."""
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def agree(name: str, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], dtype: str, factor: float = 1) -> None:
    """Raise WrongResultError unless the relative errors are those of rounding. factor: on what is allowed.
    got, want: as in NAMES, or the first of them.

    out is judged by its worst row of a head, where a key too many shows; gradients, which may vanish in a row, whole.
    """
    rows_limit, limit = (1e-4, 1e-4) if dtype == "float32" else (2e-2, 3e-2)
    for label, mine, exact in zip(NAMES[: len(want)], got, want, strict=True):
        bound = factor * (rows_limit if label == "out" else limit)
        exact = exact if exact.dtype == torch.float64 else exact.float()
        difference = mine.to(exact.dtype) - exact
        if label == "out":
            error = float((difference.norm(dim=-1) / exact.norm(dim=-1)).max())
        else:
            error = float(difference.norm() / exact.norm())
        if not error <= bound:
            raise WrongResultError(f"{name}: relative error of {label} {error:.1e}, expected at most {bound:.0e}")


def reason(error: Exception, warned: Sequence[str] = ()) -> str:
    """One line. warned: what PyTorch warned about meanwhile, which is where it says why a backend refuses."""
    lines = str(error).strip().splitlines() or [""]
    hints = dict.fromkeys(text.splitlines()[0].partition(" (Triggered")[0] for text in warned)
    return "; ".join([f"{type(error).__name__}: {lines[0]}", *hints])
