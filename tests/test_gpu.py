"""A CUDA device end to end: patched model and engine. The kernels' own tests run there too (marker `triton`)."""

from __future__ import annotations

import pytest
import torch

from mvkernels import BranchLayout, patch_model
from mvkernels.model import Engine
from tests.engine.cases import CASES, check_pages, config_for, follow
from tests.engine.lossless import Recorder, check_lossless
from tests.support.tiny_model import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.gpu

# fp32 logits of magnitude 10; matrix products on the GPU sum in another order than on the CPU.
TOLERANCE = 5e-4
HEAD_DIM = 32  # the smallest that the Triton attention takes
TREE = [40, [[70, [[33], [129]], 5], [64], [1], []], 80]


def loss_and_gradients(model, backend: str, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    layout = BranchLayout.pack([BranchLayout.from_tree(TREE), BranchLayout.causal(50)])
    ids = torch.randint(0, 300, (layout.total_tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    patch_model(model.to(device), backend)
    model.zero_grad()
    loss = model(ids[None], branch_layout=layout.to(device), labels=layout.to(device).labels(ids)[None]).loss
    loss.backward()
    return loss.detach().cpu(), [parameter.grad.cpu() for parameter in model.parameters()]


def test_training_forward_and_gradients_equal_the_reference_on_the_cpu() -> None:
    wanted, wanted_grads = loss_and_gradients(tiny_model(head_dim=HEAD_DIM), "reference", "cpu")
    got, got_grads = loss_and_gradients(tiny_model(head_dim=HEAD_DIM), "triton", "cuda")
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4 * float(theirs.abs().max() + 1))


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("name", CASES)
def test_the_engine_is_lossless(name: str, page_size: int) -> None:
    engine = Engine(tiny_model(head_dim=HEAD_DIM).to("cuda"), tiny_tokenizer(), backend="triton", page_size=page_size)
    recorder = Recorder(follow(engine, CASES[name]))
    [out] = engine.generate("the product", config_for(engine), recorder)
    assert check_lossless(engine, recorder, out, TOLERANCE) == len(recorder.seen)
    check_pages(engine)
