"""The loss in chunks is transformers' own, with its gradients, and without the logits of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from transformers import AutoModelForCausalLM, LlamaConfig

from mvkernels.model.training import loss
from mvkernels.model.training.loss import chunked_loss

VOCABULARY = 97


def make_model(tied: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **sizes))


def batch() -> dict[str, torch.Tensor]:
    """Two rows; the first ten tokens of each have no label."""
    ids = torch.randint(0, VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :10] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: Any, **more: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    found = model(**batch(), **more).loss
    found.backward()
    return found.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(123)}, {"num_items_in_batch": 7}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 10 * VOCABULARY, 2**26], ids=["a token", "ten tokens", "all"])
def test_loss_and_gradients(chunk: int, tied: bool, more: dict[str, Any]) -> None:
    model = make_model(tied)
    wanted, wanted_gradients = gradients(model, **more)
    with chunked_loss(model, chunk):
        found, found_gradients = gradients(model, **more)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert len(found_gradients) == len(wanted_gradients)
    for one, other in zip(found_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    again, _ = gradients(model, **more)  # the model is what it was
    assert torch.equal(again, wanted) and model(**batch()).logits.shape == (2, 50, VOCABULARY)


@pytest.mark.parametrize("trained", [True, False])
def test_what_reaches_the_output_layer(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labelled tokens only, each once, no more of them at a time than a chunk has logits for."""
    model = make_model()
    seen: list[int] = []
    plain = torch.nn.functional.cross_entropy
    monkeypatch.setattr(loss.F, "cross_entropy", lambda x, *a, **k: seen.append(len(x)) or plain(x, *a, **k))
    with chunked_loss(model, 20 * VOCABULARY), torch.set_grad_enabled(trained):
        found = model(**batch()).loss
        if trained:
            found.backward()
    assert sum(seen) == 2 * 40 and max(seen) <= 20


def test_frozen_weights_and_two_byte_ones() -> None:
    model = make_model(tied=False).bfloat16()
    model.lm_head.weight.requires_grad_(False)
    wanted, wanted_gradients = gradients(model)
    with chunked_loss(model, 20 * VOCABULARY):
        found, found_gradients = gradients(model)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert model.lm_head.weight.grad is None and len(found_gradients) == len(wanted_gradients)
    for one, other in zip(found_gradients, wanted_gradients, strict=True):
        assert float((one - other).float().norm()) <= 2e-2 * float(other.float().norm()) + 1e-6


def test_with_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = make_model()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", trainable_token_indices=[3, 4])
    adapted = peft.get_peft_model(model, config)
    wanted, wanted_gradients = gradients(adapted)
    with chunked_loss(adapted, 5 * VOCABULARY):
        assert model.get_output_embeddings()(torch.ones(1, 32)).shape == (1, 32)  # not a layer now
        found, found_gradients = gradients(adapted)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(found_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_loss_of_the_users_own_stays() -> None:
    model = make_model()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + vocab_size
    with chunked_loss(model):
        assert float(model(**batch()).loss) == VOCABULARY
