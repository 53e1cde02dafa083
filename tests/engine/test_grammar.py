"""The grammar and the budgets in the whole engine: a model of random tokens, the prompt cut anywhere, the clock, and
the layout of the released training code."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from mvkernels import BranchLayout
from mvkernels.grammar import TAGS, Kind, parse_text
from mvkernels.model import Engine, Generation, GenerationConfig
from mvkernels.model.engine.control.interpreter import END as END_BIT
from mvkernels.model.engine.control.masks import TokenMasks
from mvkernels.model.engine.sampling.sampler import sample
from tests.engine.cases import CASES, TOLERANCE, check_pages, config_for, follow, plain
from tests.engine.lossless import Recorder, compare, packed_logits, recorded_logits
from tests.support.tiny_model import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("all_pages_come_back")


def noisy(engine: Engine, tags: float = 4.5):
    """A model to which all tokens are alike, but for tags, which are likelier, and end of text, which is rarer."""
    bias = torch.zeros(300)
    bias[list(engine.tags.ids)] = tags
    bias[engine.tokenizer.eos_token_id] = 1.0
    return lambda views, logits: sample(views, bias.expand_as(logits))


def random_config(engine: Engine, seed: int, **changes) -> GenerationConfig:
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    config = config_for(
        engine,
        max_new_tokens=number(1, 250),
        max_critical_path=number(1, 120) if number(0, 1) else None,
        max_path_tokens=number(12, 50) if number(0, 2) == 0 else None,
        max_depth=number(0, 3),
        max_width=number(1, 4),
        temperature=1.0,
        seed=seed,
        sequential=number(0, 9) == 0,
    )
    return replace(config, **changes)


def check_budgets(out: Generation, config: GenerationConfig) -> None:
    assert out.total_tokens <= config.max_new_tokens
    assert out.layout.total_tokens == len(out.token_ids) == out.prompt_length + out.total_tokens
    assert config.max_critical_path is None or out.critical_path <= config.max_critical_path
    if out.finish_reason == "max_new_tokens":
        assert out.total_tokens == config.max_new_tokens
    elif out.finish_reason == "max_critical_path":
        assert out.critical_path == config.max_critical_path
    else:
        assert out.finish_reason == "stop"


@pytest.mark.parametrize("batch", range(10))
def test_a_model_of_random_tokens_writes_only_what_is_well_formed(engine: Engine, batch: int) -> None:
    configs = [random_config(engine, 100 * batch + i) for i in range(40)]
    outs = engine.generate(["the", "two digits"] * 20, configs, noisy(engine))
    for out, config in zip(outs, configs, strict=True):
        check_budgets(out, config)
        parsed = BranchLayout.from_token_ids(out.token_ids, engine.tags)
        assert torch.equal(parsed.position_ids, out.layout.position_ids)
        assert torch.equal(parsed.dense_mask(), out.layout.dense_mask())
        assert all("forced" in message or "closed by the engine" in message for message in out.warnings)
        parse_text(re.sub(r"(?<=:)(?=\S)", " ", out.text)), "the indices are right, nested ones too"
        end = engine.tokenizer.eos_token_id
        ends = [i for i in range(out.prompt_length, len(out.token_ids)) if out.token_ids[i] == end]
        assert ends == ([len(out.token_ids) - 1] if out.finish_reason == "stop" else [])
    assert sum(out.layout.has_branches for out in outs) > 7


def test_without_the_grammar_everything_stays_text_within_the_budgets(engine: Engine) -> None:
    configs = [random_config(engine, i, grammar=False) for i in range(120)]
    outs = engine.generate(["the"] * 120, configs, noisy(engine))
    for out, config in zip(outs, configs, strict=True):
        check_budgets(out, config)
        end = engine.tokenizer.eos_token_id
        kept = [token for token in out.token_ids[out.prompt_length :] if token != end]
        assert out.text.count("<") >= sum(token in engine.tags.ids for token in kept)
    assert sum(bool(out.warnings) for out in outs) > 100


def test_a_model_that_always_ends_cannot_within_a_block(engine: Engine) -> None:
    """End of text is the likeliest token everywhere: in a block it is masked, and what closes that comes second."""
    bias = torch.zeros(300)
    bias[engine.tokenizer.eos_token_id] = 9.0
    bias[[i for i, tag in zip(engine.tags.ids, TAGS, strict=True) if tag.startswith("</")]] = 5.0
    prompt = engine.tags.encode("so\n<Parallel>\n<Goal>\n<Outline>")
    [out] = engine.generate([prompt], config_for(engine), lambda v, logits: sample(v, bias.expand_as(logits)))
    assert out.text == (
        "\n1:</Outline>\n</Goal>\n<Path>\n1:</Path>\n<Conclusion>\n</Conclusion>\n</Parallel>"
    ) and out.finish_reason == "stop"  # fmt: skip
    assert not out.warnings and out.token_ids[-1] == engine.tokenizer.eos_token_id


def test_masks_of_the_vocabulary(engine: Engine) -> None:
    tags = engine.tags
    masks = TokenMasks(tags, 300, "cpu")
    free, host = masks.row(1 << Kind.TEXT | 1 << Kind.PATH_END, frozenset({5}))
    assert free.dtype == torch.bool and free.shape == (300,)
    expected = {*range(300)} - {*tags.ids, 5} | {tags.id(Kind.PATH_END)}
    assert set(free.nonzero()[:, 0].tolist()) == expected == {i for i, one in enumerate(host) if one}
    between, _ = masks.row(1 << Kind.SPACE | 1 << Kind.GOAL, frozenset({5}))
    assert set(between.nonzero()[:, 0].tolist()) == {*tags.space_ids, tags.id(Kind.GOAL)}
    assert masks.row(1 << Kind.GOAL, frozenset())[0].nonzero().tolist() == [[tags.id(Kind.GOAL)]]
    assert masks.row(END_BIT, frozenset({5, 7, 999}))[0].nonzero()[:, 0].tolist() == [5, 7]
    assert masks.row(1 << Kind.SPACE | 1 << Kind.GOAL, frozenset({5}))[0] is between


# ---- prompts and budgets


def least(engine: Engine, prompt: list[int], config: GenerationConfig, name: str) -> int:
    """The smallest value of a budget that is not refused, as the error says."""
    try:
        engine.stream([prompt], replace(config, **{name: 1})).close()
    except ValueError as error:
        found = re.search(rf"prompt 0: expected {name} of at least (\d+), which closing", str(error))
        assert found, error
        return int(found[1])
    return 1


@pytest.mark.parametrize("name", ["small nested", "one after the other"])
def test_a_prompt_cut_anywhere_needs_room_to_be_closed(engine: Engine, name: str) -> None:
    [whole] = engine.generate("the product", config_for(engine), follow(engine, CASES[name]))
    seen = set()
    for cut in range(2, len(whole.token_ids)):
        prompt, config = whole.token_ids[:cut], config_for(engine)
        for budget in ("max_new_tokens", "max_critical_path"):
            wanted = least(engine, prompt, config, budget)
            seen.add(wanted)
            [out] = engine.generate([prompt], replace(config, **{budget: wanted}), plain(engine))
            reached = out.total_tokens if budget == "max_new_tokens" else out.critical_path
            assert reached <= wanted, f"cut at {cut}"
            if wanted > 1:
                assert reached == wanted and out.finish_reason == budget, f"cut at {cut}"
            parsed = BranchLayout.from_token_ids(out.token_ids, engine.tags)
            assert torch.equal(parsed.position_ids, out.layout.position_ids)
            if wanted > 1:
                with pytest.raises(ValueError, match=f"at least {wanted}, which closing .* got {wanted - 1}"):
                    engine.generate([prompt], replace(config, **{budget: wanted - 1}), plain(engine))
    assert max(seen) > 10


def test_budgets_of_paths_that_no_path_fits_are_refused(engine: Engine) -> None:
    wanted = len(engine.tags.encode("\n<Path>\n1:</Path>"))
    with pytest.raises(ValueError, match=f"max_path_tokens: expected at least {wanted}, .* got {wanted - 1}"):
        engine.generate("the", config_for(engine, max_path_tokens=wanted - 1))
    engine.generate("the", config_for(engine, max_path_tokens=1, max_depth=0, max_new_tokens=2))
    [out] = engine.generate("the", config_for(engine, max_path_tokens=wanted), follow(engine, CASES["two paths"]))
    assert out.text.count(":</Path>") == 2 and out.finish_reason == "stop"
    assert out.warnings == [f"path {i}: closed by a forced </Path> (max_path_tokens)" for i in (2, 1)]


def test_the_clock_closes_what_is_open(engine: Engine, monkeypatch) -> None:
    now, steps = 0.0, 0
    monkeypatch.setattr("mvkernels.model.engine.request.monotonic", lambda: now)
    script = follow(engine, CASES["nested"])

    def slow(views, logits):
        nonlocal now, steps
        steps += 1
        now += 1.0
        return script(views, logits)

    [whole] = engine.generate("the", config_for(engine), slow)
    for seconds in range(1, steps, 4):
        script, now, steps = follow(engine, CASES["nested"]), 0.0, 0
        [out] = engine.generate("the", config_for(engine, max_seconds=float(seconds)), slow)
        assert steps == seconds and out.finish_reason == "max_seconds" and out.total_tokens <= whole.total_tokens
        parsed = BranchLayout.from_token_ids(out.token_ids, engine.tags)
        assert torch.equal(parsed.position_ids, out.layout.position_ids)


@pytest.mark.parametrize("changes", [{"max_path_tokens": 0}, {"max_seconds": 0}, {"max_seconds": -1.0}])
def test_budgets_out_of_range(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected .*, or None, got"):
        GenerationConfig(**changes)


# ---- released semantics


@pytest.fixture(scope="module")
def released() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), page_size=4, semantics="released")


@pytest.mark.parametrize("name", CASES)
def test_released_positions_are_those_of_training(released: Engine, name: str) -> None:
    """Every position of the transcript; what the engine computed is what its own layout says, packed."""
    recorder = Recorder(follow(released, CASES[name]))
    [out] = released.generate("the product", config_for(released), recorder)
    trained = BranchLayout.from_token_ids(out.token_ids, released.tags, semantics="released")
    assert torch.equal(trained.position_ids, out.layout.position_ids)
    assert out.layout.critical_path == trained.critical_path and out.finish_reason == "stop" and not out.warnings
    assert out.text == released.tokenizer.decode(out.token_ids[out.prompt_length :]).removesuffix("<|end|>")
    assert re.search(r"</Path>(?!\n(<Path>|<Conclusion>)\n)|</Goal>(?!\n<Path>)", out.text) is None
    # What a token sees differs from training in newlines behind paths alone: no path sees those of its siblings, and
    # none of them sees other paths.
    newline = released.tags.encode("\n")[0]
    differs = trained.dense_mask() != out.layout.dense_mask()
    rows, columns = differs.nonzero(as_tuple=True)
    ids = torch.tensor(out.token_ids)
    behind = (ids == newline) & (ids.roll(1) == released.tags.id(Kind.PATH_END))
    assert (behind[rows] | behind[columns]).all()
    assert not differs[released_joined(released, out.token_ids)].any(), "behind the paths everything is as in training"
    compare(
        recorded_logits(recorder, out, 0), packed_logits(released.model, out.token_ids, out.layout),
        out.layout, TOLERANCE, "packed",
    )  # fmt: skip
    check_pages(released)


def released_joined(engine: Engine, ids: list[int]) -> torch.Tensor:
    """[T] bool: tokens outside of all paths, but for the newlines behind them."""
    depth, out = 0, []
    kinds = engine.tags.kinds(ids)
    for i, kind in enumerate(kinds):
        depth += kind == Kind.PATH
        out.append(depth == 0 and not (kind == Kind.SPACE and i and kinds[i - 1] == Kind.PATH_END))
        depth -= kind == Kind.PATH_END
    return torch.tensor(out)


@pytest.mark.parametrize("name", ["small nested", "one after the other"])
def test_a_released_prompt_cut_anywhere_goes_on_to_the_same_positions(released: Engine, name: str) -> None:
    [whole] = released.generate("the product", config_for(released), follow(released, CASES[name]))
    ids, mask = torch.tensor(whole.token_ids), whole.layout.dense_mask()
    follows = {
        (tuple(ids[:i][mask[i, :i]].tolist()), int(whole.layout.position_ids[i])): int(ids[i]) for i in range(len(ids))
    }
    for cut in range(1, len(ids)):
        [out] = released.generate(
            [whole.token_ids[:cut]],
            config_for(released),
            lambda views, logits: [follows[tuple(view.context), view.position] for view in views],
        )
        assert out.token_ids == whole.token_ids, f"cut at {cut}"
        assert torch.equal(out.layout.position_ids, whole.layout.position_ids)
        assert torch.equal(out.layout.dense_mask(), mask)


def test_random_tokens_in_released_semantics(released: Engine) -> None:
    configs = [random_config(released, i) for i in range(80)]
    for out, config in zip(released.generate(["the"] * 80, configs, noisy(released)), configs, strict=True):
        check_budgets(out, config)
        trained = BranchLayout.from_token_ids(out.token_ids, released.tags, semantics="released")
        assert torch.equal(trained.position_ids, out.layout.position_ids)
    check_pages(released)


def test_semantics_other_than_the_weights_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"semantics: expected one of .*, got 'other'"):
        Engine(model, tiny_tokenizer(), semantics="other")
    model.config.multiverse = {"semantics": "released", "tags": list(TAGS)}
    with pytest.raises(ValueError, match="expected 'released', with which the weights were trained, got 'canonical'"):
        Engine(model, tiny_tokenizer(), semantics="canonical")
    [out] = Engine(model, tiny_tokenizer()).generate("the", GenerationConfig(max_new_tokens=3))
    assert out.total_tokens == 3
