"""The engine on a tiny random model: lossless, blocks of every shape, prompts with blocks, batches, seeds, streams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mvkernels import BranchLayout
from mvkernels.grammar import TAGS, Kind
from mvkernels.model import Engine
from mvkernels.model.engine.engine import FinishEvent, ForkEvent, MergeEvent, TokenEvent
from mvkernels.model.engine.sampling.sampler import sample
from tests.engine.cases import (
    CASES,
    CONCLUDE,
    TOLERANCE,
    by_request,
    check_pages,
    config_for,
    follow,
    goal,
    plain,
    script,
    written_ahead,
)
from tests.engine.lossless import Recorder, check_lossless, compare, packed_logits, recorded_logits
from tests.support.tiny_model import END, scripted

pytestmark = pytest.mark.usefixtures("all_pages_come_back")


@pytest.mark.parametrize("name", CASES)
def test_lossless(engine: Engine, name: str) -> None:
    recorder = Recorder(follow(engine, CASES[name]))
    [out] = engine.generate("the product", config_for(engine), recorder)
    sampled = sum(map(len, script(CASES[name], engine).values()))
    assert check_lossless(engine, recorder, out, TOLERANCE) == sampled == len(recorder.seen)
    assert out.finish_reason == "stop" and not out.warnings
    # The layout that the engine knows is the one that the parser reads.
    parsed = BranchLayout.from_token_ids(out.token_ids, engine.tags, prompt_length=out.prompt_length)
    assert torch.equal(parsed.position_ids, out.layout.position_ids)
    assert torch.equal(parsed.dense_mask(), out.layout.dense_mask())
    labelled = out.layout.sampled | written_ahead(engine, out.token_ids)
    assert (parsed.sampled == labelled).all() and (parsed.predecessor == out.layout.predecessor).all()
    assert out.text == engine.tokenizer.decode(out.token_ids[out.prompt_length :]).removesuffix(END)
    prompt = engine.tokenizer.encode("the product")
    assert out.token_ids[: out.prompt_length] == prompt
    assert out.total_tokens == len(out.token_ids) - len(prompt)
    assert out.critical_path == parsed.critical_path - len(prompt)
    assert out.parallelism == out.total_tokens / out.critical_path


def test_figures_and_text_of_two_paths(engine: Engine) -> None:
    case = {"": f"{goal('1: a', '2: b')} so{CONCLUDE}{END}", "1": " add</Path>", "2": " é, we</Path>"}
    [out] = engine.generate("the", config_for(engine), follow(engine, case))
    assert out.text == (
        "<Parallel>\n<Goal>\n<Outline>\n1: a\n</Outline>\n<Outline>\n2: b\n</Outline>\n</Goal>\n"
        "<Path>\n1: add</Path>\n<Path>\n2: é, we</Path>\n<Conclusion>\n so</Conclusion>\n</Parallel>"
    )
    lengths = {name: len(tokens) for name, tokens in script(case, engine).items()}
    opening = len(engine.tags.encode("\n<Path>\n1:"))
    joining = len(engine.tags.encode("\n<Conclusion>\n"))
    ahead = ("\n<Goal>\n<Outline>\n1:", "\n", "\n2:", "\n", "\n</Parallel>")
    written = sum(len(engine.tags.encode(text)) for text in ahead)
    assert out.total_tokens == sum(lengths.values()) + written + 2 * opening + joining
    assert out.critical_path == lengths[()] + written + opening + lengths[(2,)] + joining
    # One forward a position, but for the tokens that need none: forced ones come with others, the last one is not run.
    assert out.steps == lengths[()] + lengths[(2,)]


@pytest.mark.parametrize("name", ["two paths", "nested", "one after the other"])
def test_one_path_at_a_time_gives_the_same(engine: Engine, name: str) -> None:
    [parallel] = engine.generate("the product", config_for(engine), follow(engine, CASES[name]))
    [sequential] = engine.generate("the product", config_for(engine, sequential=True), follow(engine, CASES[name]))
    assert sequential.token_ids == parallel.token_ids and sequential.critical_path == parallel.critical_path
    assert sequential.steps == sum(map(len, script(CASES[name], engine).values())) > parallel.steps


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_batch_equals_one_by_one_in_any_order(engine: Engine, temperature: float) -> None:
    names = list(CASES)
    prompts = {name: f"the {name} {'parts ' * i}" for i, name in enumerate(names)}
    configs = {name: config_for(engine, temperature=temperature, top_k=40, seed=i) for i, name in enumerate(names)}
    alone = {name: engine.generate(prompts[name], configs[name], follow(engine, CASES[name]))[0] for name in names}
    for order in (names, names[::-1]):
        sampler = by_request([follow(engine, CASES[name]) for name in order])
        outs = engine.generate([prompts[n] for n in order], [configs[n] for n in order], sampler)
        for name, out in zip(order, outs, strict=True):
            assert out.token_ids == alone[name].token_ids and out.text == alone[name].text
            assert torch.equal(out.layout.position_ids, alone[name].layout.position_ids)


def test_seeds_decide_and_nothing_else(engine: Engine) -> None:
    path = "~" * 12 + "</Path>"
    case = {"": f"{goal('1: a', '2: a')}{'~' * 12}{CONCLUDE}{END}", "1": path, "2": path}
    config = config_for(engine, temperature=1.5)
    texts = []
    for seed in (0, 0, 1):
        [out] = engine.generate("the", replace(config, seed=seed), follow(engine, case))
        texts.append(out.text)
    assert texts[0] == texts[1] != texts[2]
    paths = texts[0].split("<Path>\n")[1:]
    assert paths[0].removeprefix("1:").split("</Path>")[0] != paths[1].removeprefix("2:").split("</Path>")[0]
    other = Engine(engine.model, engine.tokenizer, seed=1)
    assert other.generate("the", config, follow(engine, case))[0].text != texts[0]


def test_every_branch_draws_its_own_numbers(engine: Engine) -> None:
    """With equal probabilities everywhere, branches give the same tokens only when their numbers are the same."""
    paths = {"1": "~~~~~~</Path>~~~~~~</Path>", "2": "~~~~~~</Path>~~~~~~</Path>"}
    case = {"": f"{goal('1:', '2:')}{CONCLUDE}{goal('1:', '2:')}{CONCLUDE}{END}"} | paths
    flat = plain(engine, lambda views, logits: sample(views, torch.zeros_like(logits)))
    config = config_for(engine, temperature=1.0)
    [out] = engine.generate("the", config, follow(engine, case, flat))
    ends = [i for i, kind in enumerate(engine.tags.kinds(out.token_ids)) if kind == Kind.PATH_END]
    assert len({tuple(out.token_ids[end - 6 : end]) for end in ends}) == len(ends) == 4


def transcript_sampler(engine: Engine, out):
    """Gives every branch the token that the transcript has behind what the branch sees."""
    ids, mask = torch.tensor(out.token_ids), out.layout.dense_mask()
    follows = {
        (tuple(ids[:i][mask[i, :i]].tolist()), int(out.layout.position_ids[i])): int(ids[i]) for i in range(len(ids))
    }
    return lambda views, logits: [follows[tuple(view.context), view.position] for view in views]


@pytest.mark.parametrize("name", ["small nested", "one after the other"])
def test_a_prompt_cut_anywhere_goes_on_to_the_same_transcript(engine: Engine, name: str) -> None:
    [whole] = engine.generate("the product", config_for(engine), follow(engine, CASES[name]))
    sampler = transcript_sampler(engine, whole)
    for cut in range(1, len(whole.token_ids)):
        [out] = engine.generate([whole.token_ids[:cut]], config_for(engine), sampler)
        assert out.token_ids == whole.token_ids, f"cut at {cut}"
        assert out.prompt_length == cut and out.total_tokens == len(whole.token_ids) - cut
        assert torch.equal(out.layout.position_ids, whole.layout.position_ids)
        cut_path = BranchLayout.from_token_ids(whole.token_ids[:cut], engine.tags, allow_open=True).critical_path
        assert out.critical_path == whole.layout.critical_path - cut_path
        assert out.finish_reason == "stop" and not out.warnings
        engine.cache.check()
        assert engine.available_pages == engine.cache.num_pages


def test_lossless_behind_a_prompt_with_finished_blocks(engine: Engine) -> None:
    [whole] = engine.generate("the product", config_for(engine), follow(engine, CASES["nested"]))
    prompt = whole.token_ids[:-4]
    recorder = Recorder(plain(engine))
    # Limits hold for what is generated, not for the prompt.
    config = config_for(engine, max_width=1, max_depth=0)
    [out] = engine.generate([prompt], replace(config, max_new_tokens=12), recorder)
    assert check_lossless(engine, recorder, out, TOLERANCE) == 12
    assert out.steps < 12 + 12, "a block of the prompt takes a step, not every token"


def test_limits_are_kept_from_the_sampler_and_survive_it(engine: Engine) -> None:
    ids = engine.tags.ids
    parallel, outline = ids[TAGS.index("<Parallel>")], ids[TAGS.index("<Outline>")]
    seen = []

    def watch(views, logits):
        seen.extend((view.path, view.state, view.banned) for view in views)
        return plain(engine)(views, logits)

    case = {"": f"~{goal('1: a', '2: b')}{CONCLUDE}{END}", "1": "~</Path>", "2": "~</Path>"}
    config = config_for(engine, grammar=False)
    sampler = follow(engine, case, watch, grammar=False)
    engine.generate("the", replace(config, max_width=2, max_depth=1), sampler)
    assert ((), "trunk", ()) in seen and ((1,), "path", (parallel,)) in seen
    assert [state for _, state, banned in seen if outline in banned] == ["goal", "goal"]  # after outline 2 and newline
    # A sampler that takes no notice gets text and a warning.
    for changed in (replace(config, max_width=1), replace(config, max_depth=0)):
        [out] = engine.generate("the", changed, follow(engine, case, grammar=False))
        assert out.warnings and out.finish_reason == "stop" and not out.layout.has_branches
        assert out.text.endswith("</Goal></Conclusion>\n</Parallel>") and "<Path>" not in out.text


def test_events_of_a_stream(engine: Engine) -> None:
    sampler = follow(engine, CASES["nested"])
    events = list(engine.stream("the product", config_for(engine), sampler))
    assert isinstance(events[-1], FinishEvent) and sum(isinstance(e, FinishEvent) for e in events) == 1
    out = events[-1].generation
    tokens = [e for e in events if isinstance(e, TokenEvent)]
    assert len(tokens) == out.total_tokens
    assert [e.width for e in events if isinstance(e, ForkEvent)] == [2, 2, 3, 1]
    merges = [e for e in events if isinstance(e, MergeEvent)]
    assert sorted(e.path for e in merges) == [(), (1,), (1, 3), (2,)]
    # Brought into sequence order, the events are the transcript.
    ordered: list[TokenEvent] = []

    def path_order(path: tuple[int, ...]) -> None:
        own = [e for e in tokens if e.path == path]
        children = sorted({e.path for e in tokens if len(e.path) == len(path) + 1 and e.path[: len(path)] == path})
        start = min((e.position for e in tokens if e.path in children), default=10**9)
        ordered.extend(e for e in own if e.position < start)
        for child in children:
            path_order(child)
        ordered.extend(e for e in own if e.position >= start)

    path_order(())
    assert [e.token_id for e in ordered] == out.token_ids[out.prompt_length :]
    assert [e.position for e in ordered] == out.layout.position_ids[out.prompt_length :].tolist()
    assert [not e.forced for e in ordered] == out.layout.sampled[out.prompt_length :].tolist()
    assert "".join(e.text for e in ordered) == out.text


def test_the_last_token_is_kept_without_a_forward(engine: Engine) -> None:
    recorder = Recorder(plain(engine))
    [out] = engine.generate("the sum of", config_for(engine, max_new_tokens=1), recorder)
    assert out.total_tokens == out.steps == 1 and out.finish_reason == "max_new_tokens"
    packed = packed_logits(engine.model, out.token_ids, out.layout)
    compare(recorded_logits(recorder, out, 0), packed, out.layout, TOLERANCE, "packed")


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_page_size_changes_nothing(engine: Engine, page_size: int) -> None:
    [expected] = engine.generate("the product", config_for(engine), follow(engine, CASES["nested"]))
    other = Engine(engine.model, engine.tokenizer, page_size=page_size)
    [out] = other.generate("the product", config_for(engine), follow(engine, CASES["nested"]))
    assert out.token_ids == expected.token_ids
    check_pages(other)


def test_a_script_is_followed(engine: Engine) -> None:
    """The helper of other tests, by request."""
    end = engine.tokenizer.eos_token_id
    scripts = [{(): [*engine.tags.encode("so"), end]}, {(): [end]}]
    outs = engine.generate(["the", "two"], config_for(engine), scripted(scripts))
    assert [out.text for out in outs] == ["so", ""] and [out.total_tokens for out in outs] == [2, 1]
