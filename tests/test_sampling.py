"""Sampling: greedy, temperature, top-k, top-p, bans, and randomness that belongs to the branch alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mvkernels.model.config import GenerationConfig
from mvkernels.model.sampling import BranchView, branch_key, probabilities, sample, uniform


def view(key: str = "k", drawn: int = 0, banned: tuple[int, ...] = (), **config) -> BranchView:
    return BranchView(
        request=0,
        path=(1,),
        drawn=drawn,
        position=7,
        state="path",
        config=GenerationConfig(**config),
        banned=banned,
        key=key,
    )


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_likeliest_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [9.0, 1.0, 2.0, 3.0]])
    assert sample([view(), view()], logits) == [1, 0]


def test_banned_tokens_never_come() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 1.0]] * 3)
    before = logits.clone()
    assert sample([view(), view(banned=(1,)), view(banned=(1, 2))], logits) == [1, 2, 3]
    assert torch.equal(logits, before), "the caller's logits are as they were"
    views = [view(drawn=i, banned=(1,), temperature=5.0) for i in range(200)]
    assert set(sample(views, logits[:1].expand(200, 4))) == {0, 2, 3}


def test_greedy_and_sampled_branches_in_one_batch() -> None:
    logits = random_logits(0, 4, 50)
    views = [view("a", temperature=1.0), view(), view("b", temperature=1.0, top_k=3), view()]
    together = sample(views, logits)
    assert together == [sample([v], logits[i : i + 1])[0] for i, v in enumerate(views)]
    assert [together[1], together[3]] == logits[[1, 3]].argmax(-1).tolist()


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 2.0, "top_k": 12, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 1e-9},
    ],
    ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()),
)
def test_probabilities_are_those_of_transformers(config: dict) -> None:
    for seed in range(10):
        logits = random_logits(seed, 40)
        scores = TemperatureLogitsWarper(config["temperature"])(None, logits[None].double())
        if "top_k" in config:
            scores = TopKLogitsWarper(config["top_k"])(None, scores)
        if "top_p" in config:
            scores = TopPLogitsWarper(config["top_p"])(None, scores)
        ours = probabilities(logits, GenerationConfig(**config))
        assert ours.dtype == torch.float64 and math.isclose(float(ours.sum()), 1, abs_tol=1e-12)
        torch.testing.assert_close(ours, torch.softmax(scores[0], -1), atol=1e-12, rtol=0)


def test_drawn_frequencies_follow_the_probabilities() -> None:
    logits, count = random_logits(3, 1, 6), 4000
    tokens = sample([view(drawn=i, temperature=1.5) for i in range(count)], logits.expand(count, 6))
    wanted = probabilities(logits[0], GenerationConfig(temperature=1.5))
    seen = torch.bincount(torch.tensor(tokens), minlength=6) / count
    # Five standard deviations of a binomial frequency.
    assert bool(((seen - wanted).abs() <= 5 * (wanted * (1 - wanted) / count).sqrt()).all()), (seen, wanted)


def test_draws_differ_by_branch_index_and_seed_and_by_nothing_else() -> None:
    keys = ["0:0:", "0:1:", "1:0:", branch_key("0:0:", 1, 1), branch_key("0:0:", 1, 2), branch_key("0:0:", 2, 1)]
    numbers = {uniform(key, index) for key in keys for index in range(100)}
    assert len(numbers) == 600
    assert uniform("0:0:", 5) == uniform("0:0:", 5)
    # Path 1 of the first block, then of the second; path 11 of none: no two branches have one key.
    assert branch_key(branch_key("", 1, 1), 1, 1) != branch_key("", 11, 1) != branch_key("", 1, 11)


@given(st.text(max_size=20), st.integers(0, 10**9))
def test_uniform_is_in_the_unit_interval(key: str, index: int) -> None:
    assert 0 <= uniform(key, index) < 1


@given(st.integers(0, 10**6), st.floats(0.05, 10), st.integers(0, 8), st.floats(0.01, 1))
def test_a_draw_has_a_probability(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits(seed, 1, 16)
    logits[0, seed % 16] = -math.inf
    v = view(str(seed), temperature=temperature, top_k=top_k, top_p=top_p)
    [token] = sample([v], logits)
    assert probabilities(logits[0], v.config)[token] > 0


def test_the_ends_of_the_unit_interval_hit_tokens_with_a_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for number, token in ((0.0, 1), (0.5 - 2**-53, 1), (0.5, 2), (1 - 2**-53, 2)):
        monkeypatch.setattr("mvkernels.model.sampling.uniform", lambda key, index, number=number: number)
        assert sample([view(temperature=1.0)], logits) == [token]


def test_nan_is_refused_and_names_the_branch() -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"request 0, path \(1,\): expected logits without NaN"):
        sample([view(), view()], logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_critical_path", 0),
        ("max_width", 0),
        ("max_depth", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("stop", ("",)),
        ("stop", "text"),
    ],
)
def test_config_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .*, got .*{'' if value == ('',) else str(value)}"):
        GenerationConfig(**{name: value})
