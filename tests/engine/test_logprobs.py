"""Log-probabilities of chosen tokens: the model's own, asked for row by row, the same bits in any batch."""

from __future__ import annotations

import math

import torch

from mvkernels.model.engine.sampling.logprobs import TokenLogprob, token_logprobs
from tests.engine.test_sampling import random_logits, view


def test_they_are_the_models_own() -> None:
    """Whatever chose the token, and however unlikely or forbidden it was."""
    logits = random_logits(0, 5, 40)
    before = logits.clone()
    mask = torch.arange(40) < 3
    views = [
        view(logprobs=0),
        view(logprobs=0, temperature=0.3, top_k=2),
        view(logprobs=0, allowed=mask, banned=(1,), repetition_penalty=2.0, context=[0, 1, 2]),
        view(),
        view(logprobs=0),
    ]
    chosen = [7, 39, 30, 2, int(logits[4].argmax())]
    found = token_logprobs(views, logits, chosen)
    wanted = torch.log_softmax(logits.double(), -1)
    assert found[3] is None and torch.equal(logits, before)
    for row in (0, 1, 2, 4):
        assert math.isclose(found[row].logprob, wanted[row, chosen[row]], abs_tol=1e-5) and found[row].top == ()


def test_the_likeliest_come_best_first_and_as_many_as_asked_for() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, 2.0]]).repeat(4, 1)
    found = token_logprobs([view(logprobs=k) for k in (2, 0, 4, 99)], logits, [0, 1, 2, 3])
    assert [[token for token, _ in one.top] for one in found] == [[1, 3], [], [1, 3, 4, 2], [1, 3, 4, 2, 0]]
    wanted = torch.log_softmax(logits[0].double(), -1)
    for token, value in found[3].top:
        assert math.isclose(value, wanted[token], abs_tol=1e-6)
    assert found[2].logprob == dict(found[2].top)[2], "one number for one token"


def test_a_batch_has_the_bits_of_its_rows() -> None:
    logits = random_logits(1, 33, 1003)
    views = [view(logprobs=None if row % 4 == 1 else row % 4) for row in range(33)]
    chosen = [row * 30 for row in range(33)]
    together = token_logprobs(views, logits, chosen)
    for row, v in enumerate(views):
        assert token_logprobs([v], logits[row : row + 1], [chosen[row]]) == [together[row]]


def test_a_token_without_any_probability() -> None:
    logits = torch.tensor([[0.0, -math.inf]])
    assert token_logprobs([view(logprobs=2)], logits, [1]) == [TokenLogprob(-math.inf, ((0, 0.0), (1, -math.inf)))]


def test_half_precision_logits_are_taken_in_fp32() -> None:
    logits = random_logits(2, 1, 300).bfloat16()
    [found] = token_logprobs([view(logprobs=0)], logits, [5])
    assert math.isclose(found.logprob, torch.log_softmax(logits.double(), -1)[0, 5], abs_tol=1e-5)
