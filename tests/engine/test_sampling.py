"""Sampling: greedy, filters as in transformers, masks, rows of a batch, and randomness of the branch alone."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig as TransformersConfig

from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.engine.sampling.logits import StepLogits
from mvkernels.model.engine.sampling.penalties import SeenTokens, penalise
from mvkernels.model.engine.sampling.sampler import (
    BranchView,
    _draw,
    branch_key,
    probabilities,
    request_key,
    sample,
    sample_step,
    uniform,
)
from tests.support.tiny_model import tiny_model


def view(
    key: str = "k",
    drawn: int = 0,
    banned: tuple[int, ...] = (),
    allowed: torch.Tensor | None = None,
    context: list[int] | None = None,
    seen: SeenTokens | None = None,
    **config,
) -> BranchView:
    return BranchView(
        request=0,
        path=(1,),
        drawn=drawn,
        position=7,
        state="path",
        config=GenerationConfig(**config),
        banned=banned,
        allowed=allowed,
        key=key,
        read_context=lambda: list(context or []),
        seen=seen,
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


def by_definition(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """[V] fp64 probabilities of one row, one rule after the other."""
    scaled = logits.double() / config.temperature
    if 0 < config.top_k < len(scaled):
        scaled[scaled < scaled.topk(config.top_k).values[-1]] = -math.inf
    probability = torch.softmax(scaled, dim=-1)
    ordered, order = probability.sort(descending=True, stable=True)
    if config.top_p < 1:
        probability[order[ordered.cumsum(-1) - ordered >= config.top_p]] = 0
    probability[probability < config.min_p * probability.max()] = 0
    return probability / probability.sum()


FILTERS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.3},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.5},
]


@pytest.mark.parametrize("config", FILTERS, ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()))
def test_choices_are_those_of_transformers(config: dict) -> None:
    """The processors that transformers makes of the same config, in its order, give the same distribution."""
    theirs = TransformersConfig(do_sample=True, **({"top_k": 0} | config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a missing prompt
        processors = tiny_model()._get_logits_processor(generation_config=theirs, device="cpu")
    assert len(processors) == len(config) - (config["temperature"] == 1)
    for seed in range(10):
        logits = random_logits(seed, 1, 400)
        context = torch.randint(400, (1, 60), generator=torch.Generator().manual_seed(seed))
        wanted = torch.softmax(processors(context, logits.clone()).double(), -1)
        seen = SeenTokens.rows([SeenTokens(context[0].tolist())], logits)
        penalised = penalise(logits, seen, [config.get("repetition_penalty", 1.0)])
        ours = probabilities(penalised, [GenerationConfig(**config)])
        assert ours.dtype == torch.float64 and math.isclose(float(ours.sum()), 1, abs_tol=1e-12)
        assert torch.equal(ours > 0, wanted > 0)
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)
        # And what is drawn is drawn from that.
        v = view(str(seed), context=context[0].tolist(), **config)
        assert sample([v], logits) == [invert(ours[0], uniform(v.key, 0))]


def invert(probability: torch.Tensor, number: float) -> int:
    """The first token at which the cumulative probability exceeds the number."""
    return int(torch.searchsorted(probability.cumsum(-1), number, right=True))


@pytest.mark.parametrize("spread", [3.0, 0.1], ids=["peaked", "flat"])
def test_filters_by_definition_in_one_batch(spread: float) -> None:
    """Flat rows keep more tokens than top-p looks at first."""
    configs = [GenerationConfig(**config) for config in FILTERS] * 2
    logits = random_logits(5, len(configs), 1500) * spread
    ours = probabilities(logits, configs)
    for row, config in enumerate(configs):
        wanted = by_definition(logits[row], config)
        assert torch.equal(ours[row] > 0, wanted > 0), config
        torch.testing.assert_close(ours[row], wanted, atol=1e-12, rtol=1e-9)
    assert spread == 3.0 or int((ours > 0).sum(-1)[2]) > 256


def test_top_p_among_equals_keeps_the_lowest_ids() -> None:
    logits = torch.zeros(3, 1024)
    logits[1, 900:] = 3.0
    logits[2, ::2] = 1.0
    kept = probabilities(logits, [GenerationConfig(temperature=1.0, top_p=p) for p in (0.5, 0.25, 0.6)]) > 0
    assert kept[0].nonzero().flatten().tolist() == list(range(512))
    high = math.exp(3) / (900 + 124 * math.exp(3))
    assert kept[1].nonzero().flatten().tolist() == list(range(900, 900 + math.ceil(0.25 / high)))
    assert kept[2].nonzero().flatten().tolist() == list(range(0, 2 * math.ceil(0.6 * 512 * (1 + math.exp(-1))), 2))


def test_a_batch_has_the_bits_of_its_rows() -> None:
    """Whatever the other rows are, and whichever filters they have."""
    count = 3 * len(FILTERS)
    logits = random_logits(7, count, 1003) * torch.linspace(0.02, 2, count)[:, None]
    mask = torch.arange(1003) % 3 > 0
    views = [
        view(
            f"{row}",
            drawn=row,
            allowed=mask if row % 2 else None,
            banned=(row,) if row % 3 else (),
            context=list(range(row, 900, 7)),
            **({} if row % 5 == 4 else FILTERS[row % len(FILTERS)]),
        )
        for row in range(count)
    ]
    together = sample(views, logits)
    assert together == [sample([v], logits[row : row + 1])[0] for row, v in enumerate(views)]
    assert together[::-1] == sample(views[::-1], logits.flip(0))
    assert len(set(together)) > count // 2
    sampled = [(row, v.config) for row, v in enumerate(views) if v.config.temperature > 0]
    whole = probabilities(logits[[row for row, _ in sampled]], [config for _, config in sampled])
    for i, (row, config) in enumerate(sampled):
        assert torch.equal(probabilities(logits[row : row + 1], [config])[0], whole[i])


def test_large_batches_go_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(8, 9, 50)
    views = [view(str(row), temperature=row % 3) for row in range(9)]
    expected = sample(views, logits)
    monkeypatch.setattr("mvkernels.model.engine.sampling.sampler._LARGEST_GROUP", {"cpu": 100})
    assert sample(views, logits) == expected


def test_masks_of_several_kinds_in_one_batch() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 1.0]]).repeat(5, 1)
    even, last = torch.tensor([True, False, True, False]), torch.tensor([False, False, False, True])
    masks = [even, None, last, even, last]
    assert sample([view(allowed=mask) for mask in masks], logits) == [2, 1, 3, 2, 3]
    assert sample([view(allowed=even, banned=(2,))], logits[:1]) == [0]
    views = [view(drawn=i, allowed=even if i % 2 else None, temperature=9.0) for i in range(200)]
    tokens = sample(views, logits[:1].expand(200, 4))
    assert set(tokens[1::2]) == {0, 2} and set(tokens[::2]) == {0, 1, 2, 3}


def test_a_mask_on_the_host_is_that_of_the_tensor() -> None:
    """The engine hands both over, so that a greedy row is not looked at on a device."""
    logits = random_logits(3, 64, 50)
    masks = [random_logits(4 + i, 1, 50)[0] > 0 for i in range(3)]
    masks[2][:] = False
    masks[2][7] = True
    plain = [view(allowed=masks[i % 3]) for i in range(64)]
    both = [replace(one, allowed_bytes=one.allowed.numpy().tobytes()) for one in plain]
    wanted = [max((j for j in range(50) if masks[i % 3][j]), key=lambda j: row[j]) for i, row in enumerate(logits)]
    assert sample(plain, logits) == sample(both, logits) == sample_step(both, StepLogits.of(logits)) == wanted


def test_a_repetition_penalty_counts_when_greedy() -> None:
    logits = torch.tensor([[4.0, 5.0, -1.0], [4.0, 5.0, -1.0], [-3.0, -1.0, -2.5]])
    views = [view(context=[1, 1], repetition_penalty=1.5), view(context=[1]), view(context=[1], repetition_penalty=3.0)]
    assert sample(views, logits) == [0, 1, 2]


@given(st.integers(0, 10**6))
def test_seen_tokens_are_those_of_the_context(seed: int) -> None:
    """Sets grown token by token, forked and joined, against sets of Python; some rows are read on the way."""
    numbers = torch.randint(10**6, (400,), generator=torch.Generator().manual_seed(seed)).tolist()
    logits = torch.zeros(1, 97)
    ours, theirs = [SeenTokens([3])], [{3}]
    for number in numbers:
        kind, at = number % 50, number // 50 % len(ours)
        if kind == 0 and len(ours) < 6:
            ours.append(ours[at].fork())
            theirs.append(set(theirs[at]))
        elif kind == 1 and at:
            ours[0].join([ours.pop(at)])
            theirs[0] |= theirs.pop(at)
        elif kind == 2:
            assert set(SeenTokens.rows([ours[at]], logits)[0].nonzero().flatten().tolist()) == theirs[at]
        else:
            ours[at].add(number // 5000 % 97)
            theirs[at].add(number // 5000 % 97)
    rows = SeenTokens.rows(ours, logits)
    assert [set(row.nonzero().flatten().tolist()) for row in rows] == theirs


def test_drawn_frequencies_follow_the_probabilities() -> None:
    logits, count = random_logits(3, 1, 6), 4000
    tokens = sample([view(drawn=i, temperature=1.5) for i in range(count)], logits.expand(count, 6))
    wanted = probabilities(logits, [GenerationConfig(temperature=1.5)])[0]
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
    # One of n samples alone draws what a request alone draws.
    assert request_key(3, 4) == request_key(3, 4, 0) == "3:4:"
    assert len({uniform(request_key(3, 4, j), index) for j in range(12) for index in range(50)}) == 600


@given(st.text(max_size=20), st.integers(0, 10**9))
def test_uniform_is_in_the_unit_interval(key: str, index: int) -> None:
    assert 0 <= uniform(key, index) < 1


@given(st.integers(0, 10**6), st.floats(1e-6, 10), st.integers(0, 8), st.floats(0.01, 1), st.floats(0, 1))
def test_a_draw_has_a_probability(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(seed, 1, 16)
    logits[0, seed % 16] = -math.inf
    v = view(str(seed), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    [token] = sample([v], logits)
    assert probabilities(logits, [v.config])[0, token] > 0


def test_the_ends_of_the_unit_interval_hit_tokens_with_a_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for number, token in ((0.0, 1), (0.5 - 2**-53, 1), (0.5, 2), (1 - 2**-53, 2)):
        monkeypatch.setattr("mvkernels.model.engine.sampling.sampler.uniform", lambda key, index, number=number: number)
        assert sample([view(temperature=1.0)], logits) == [token]


@given(st.lists(st.integers(0, 2**61), min_size=1, max_size=40).filter(any))
def test_the_last_number_never_passes_the_last_token(counts: list[int]) -> None:
    """Whatever the sum, and however it rounds in fp64."""
    probability = torch.tensor([counts], dtype=torch.float64) / max(sum(counts), 1)
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert int(_draw(probability, last)) <= max(i for i, count in enumerate(probability[0]) if count > 0)
    assert int(_draw(probability * 2.0**-40, last)) < len(counts)


@pytest.mark.parametrize("config", [{}, {"temperature": 1.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused_and_name_the_branch(value: float, config: dict) -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = value
    found = "NaN" if math.isnan(value) else "infinity"
    with pytest.raises(ValueError, match=rf"request 0, path \(1,\): expected logits without NaN .*, got {found}"):
        sample([view(**config), view(**config)], logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_that_leaves_nothing_is_refused(temperature: float) -> None:
    v = view(allowed=torch.tensor([True, False, False]), banned=(0,), temperature=temperature)
    with pytest.raises(ValueError, match="expected at least one token that may come, got a mask that leaves none"):
        sample([v], torch.zeros(1, 3))


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
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("logprobs", -1),
        ("stop", ("",)),
        ("stop", "text"),
        ("max_new_tokens", 3.5),
        ("max_new_tokens", None),
        ("max_critical_path", "9"),
        ("max_depth", math.nan),
        ("max_seconds", "1"),
        ("temperature", "1"),
        ("seed", 0.5),
    ],
)
def test_config_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .*, got .*{'' if value == ('',) else str(value)}"):
        GenerationConfig(**{name: value})
