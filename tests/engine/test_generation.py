"""What a generation tells: log-probabilities, steps and texts of its tokens, events with branches; JSON and back."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from mvkernels.model import Engine, Generation
from mvkernels.model.engine.engine import ForkEvent, MergeEvent, PathEndEvent, TokenEvent
from mvkernels.model.engine.sampling.penalties import SeenTokens
from tests.engine.cases import CASES, config_for, follow
from tests.engine.lossless import packed_logits
from tests.support.tiny_model import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), page_size=4)


@pytest.fixture(scope="module")
def released() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), page_size=4, semantics="released")


@pytest.fixture(scope="module")
def nested(engine: Engine) -> Generation:
    [out] = engine.generate("the product", config_for(engine, logprobs=2), follow(engine, CASES["nested"]))
    return out


def generated(out: Generation) -> slice:
    return slice(out.prompt_length, None)


# ---- what it tells of each token


@pytest.mark.parametrize("name", ["two paths", "nested", "one after the other"])
def test_logprobs_are_those_of_one_packed_forward(engine: Engine, name: str) -> None:
    config = config_for(engine, logprobs=3, temperature=0.7, repetition_penalty=1.2)
    [out] = engine.generate("the product", config, follow(engine, CASES[name]))
    wanted = torch.log_softmax(packed_logits(engine.model, out.token_ids, out.layout), -1)
    sampled = out.layout.sampled[generated(out)].tolist()
    assert [value is not None for value in out.logprobs] == [top is not None for top in out.top_logprobs] == sampled
    for index, (value, top) in enumerate(zip(out.logprobs, out.top_logprobs, strict=True), start=out.prompt_length):
        if value is not None:
            row = wanted[int(out.layout.predecessor[index])]
            assert math.isclose(value, row[out.token_ids[index]], abs_tol=1e-4)
            assert [token for token, _ in top] == row.topk(3).indices.tolist()


def test_nothing_is_measured_unasked(engine: Engine) -> None:
    config = config_for(engine, max_new_tokens=60)
    [plain, own, top] = engine.generate(["the"] * 3, [replace(config, logprobs=k) for k in (None, 0, 1)])
    assert plain.logprobs is None and plain.top_logprobs is None
    assert own.top_logprobs is None and own.logprobs == top.logprobs
    assert plain.token_ids == own.token_ids == top.token_ids
    # Greedy, so the likeliest is the chosen one wherever the grammar let it come.
    pairs = [(a, b[0][1]) for a, b in zip(top.logprobs, top.top_logprobs, strict=True) if b is not None]
    assert pairs and all(value <= best for value, best in pairs) and any(value == best for value, best in pairs)


def test_texts_and_steps_of_the_tokens(nested: Generation) -> None:
    assert "".join(nested.texts) == nested.text and len(nested.texts) == nested.total_tokens
    sampled = nested.layout.sampled[generated(nested)]
    own = [step for step, flag in zip(nested.steps_of, sampled, strict=True) if flag]
    assert min(own) == 1 and max(nested.steps_of) == nested.steps
    assert len(set(own)) < len(own), "paths share steps"
    # The token before it, where that is one token, was there a step earlier.
    for index, source in enumerate(nested.layout.predecessor.tolist()):
        if index >= nested.prompt_length and source >= nested.prompt_length:
            gap = nested.steps_of[index - nested.prompt_length] - nested.steps_of[source - nested.prompt_length]
            assert gap >= int(nested.layout.sampled[index])


def test_one_path_at_a_time_shares_no_step(engine: Engine) -> None:
    config = config_for(engine, sequential=True)
    [out] = engine.generate("the product", config, follow(engine, CASES["nested"]))
    own = [step for step, flag in zip(out.steps_of, out.layout.sampled[generated(out)], strict=True) if flag]
    assert len(set(own)) == len(own) == out.steps


def test_events_name_their_branches(engine: Engine, nested: Generation) -> None:
    sampler = follow(engine, CASES["nested"])
    events = list(engine.stream("the product", config_for(engine, logprobs=2), sampler))
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for event in events:
        if isinstance(event, ForkEvent):
            assert paths[event.branch] == event.path and len(event.children) == event.width
            paths |= {child: (*event.path, i) for i, child in enumerate(event.children, start=1)}
        elif isinstance(event, (TokenEvent, PathEndEvent, MergeEvent)):
            assert paths[event.branch] == event.path, "no branch before its fork"
    assert len(paths) == 9 and sorted(event.branch for event in events if isinstance(event, PathEndEvent)) == [
        *range(1, 9)
    ]
    found = sorted((e.branch, e.position, e.token_id, e.logprob or 0.0, e.top_logprobs) for e in tokens)
    at = iter(nested.layout.position_ids[generated(nested)].tolist())
    wanted = zip(at, nested.token_ids[generated(nested)], nested.logprobs, nested.top_logprobs, strict=True)
    assert sorted(row[1:] for row in found) == sorted((*row[:2], row[2] or 0.0, row[3] or ()) for row in wanted)
    for merge in (event for event in events if isinstance(event, MergeEvent)):
        children = next(e.children for e in events if isinstance(e, ForkEvent) and e.branch == merge.branch)
        ends = [event.position for event in events if isinstance(event, PathEndEvent) and event.branch in children]
        assert merge.position == max(ends) and len(ends) == len(children)


def test_the_end_of_a_path_says_why_the_engine_closed_it(engine: Engine) -> None:
    case = CASES["two paths"] | {"1": "~" * 90, "2": "~~~</Path>"}
    events = engine.stream("the", config_for(engine, max_critical_path=90), follow(engine, case))
    ends = {event.path: event.reason for event in events if isinstance(event, PathEndEvent)}
    assert ends == {(1,): "max_critical_path", (2,): None}


def test_a_penalty_knows_what_each_branch_sees(engine: Engine) -> None:
    inner, seen = follow(engine, CASES["nested"]), 0

    def watch(views, logits):
        nonlocal seen
        for view in views:
            row = SeenTokens.rows([view.seen], logits)[0]
            assert set(row.nonzero().flatten().tolist()) == set(view.context), view.path
            seen += 1
        return inner(views, logits)

    [out] = engine.generate("the product", config_for(engine, repetition_penalty=1.1), watch)
    assert seen == out.layout.sampled.sum() > 50


# ---- JSON


def assert_same_layout(a: Generation, b: Generation) -> None:
    for name in ("position_ids", "cu_seqlens"):
        assert torch.equal(getattr(a.layout, name), getattr(b.layout, name)), name
    assert torch.equal(a.layout.dense_mask(), b.layout.dense_mask())
    assert (a.layout.sampled == b.layout.sampled).all() and (a.layout.predecessor == b.layout.predecessor).all()
    assert a.layout.critical_path == b.layout.critical_path


@pytest.mark.parametrize("semantics", ["canonical", "released"])
@pytest.mark.parametrize("name", CASES)
def test_json_and_back(engine: Engine, released: Engine, name: str, semantics: str) -> None:
    used = engine if semantics == "canonical" else released
    [out] = used.generate("the «product»\n", config_for(used, logprobs=2), follow(used, CASES[name]))
    line = out.to_json()
    assert "\n" not in line and line.isascii() and len(line.splitlines()) == 1
    back = Generation.from_json(line)
    assert back == out and back.to_json() == line
    assert_same_layout(back, out)
    for field in Generation.__slots__:
        if field != "layout":
            assert getattr(back, field) == getattr(out, field), field
    assert ("positions" in json.loads(line)["layout"]) == (semantics == "released" and name != "no block")


def test_what_json_has_no_number_for(nested: Generation) -> None:
    odd = replace(
        nested,
        error="RuntimeError: \u2028 no luck",
        request_id="a/b",
        logprobs=[-math.inf] * nested.total_tokens,
        top_logprobs=[((3, -0.5), (4, -math.inf))] * nested.total_tokens,
    )
    back = Generation.from_json(odd.to_json().encode())
    assert back == odd != nested and back.error == odd.error and back.top_logprobs == odd.top_logprobs
    assert json.loads(odd.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert nested != replace(nested, token_ids=[*nested.token_ids[:-1], 7]) and nested != 3


def test_a_deep_tree_has_json() -> None:
    """Depth has no limit but that of the JSON reader."""
    tree: list = [1]
    for _ in range(400):
        tree = [1, [tree], 1]
    from mvkernels import BranchLayout

    layout = BranchLayout.from_tree(tree)
    count = layout.total_tokens
    out = Generation("", [5] * count, layout, 0, "stop", count, count, 1, [], tree, [""] * count, [1] * count)
    assert Generation.from_json(out.to_json()) == out


def test_names_that_are_not_known_are_left_out(nested: Generation) -> None:
    assert Generation.from_json(json.dumps({**nested.to_dict(), "run": {"seconds": 1}})) == nested


def positions(*pairs: list[int]):
    return lambda d: d | {"layout": d["layout"] | {"positions": [*pairs]}}


def deep_object() -> dict:
    value: dict = {}
    for _ in range(900):
        value = {"a": value}
    return value


BROKEN = {
    "no JSON": (lambda d: None, "expected JSON, got 'generation'"),
    "no object": (lambda d: [1], "of format 'mvkernels.generation', got \\[1\\]"),
    "other format": (lambda d: d | {"format": "x"}, "got 'x'"),
    "version": (lambda d: d | {"version": 2}, "expected version 1, got 2"),
    "missing": (lambda d: {k: v for k, v in d.items() if k != "steps"}, "expected steps of type int, got None"),
    "boolean": (lambda d: d | {"steps": True}, "expected steps of type int, got True"),
    "ids": (lambda d: d | {"token_ids": [1, "2"]}, "expected token_ids as a list of int, got '2'"),
    "prompt": (lambda d: d | {"prompt_length": -1}, "expected prompt_length from 0 to .*, got -1"),
    "long prompt": (lambda d: d | {"prompt_length": 2**31 - 1}, "prompt_length \\+ total_tokens = .* a prompt of 2147"),
    "id": (lambda d: d | {"token_ids": [-1, *d["token_ids"][1:]]}, "expected token_ids from 0 to .*, got -1"),
    "large id": (lambda d: d | {"token_ids": [2**31, *d["token_ids"][1:]]}, "token_ids from 0 .*, got 2147483648"),
    "path": (lambda d: d | {"critical_path": 2**31}, "expected critical_path from 0 to 2\\*\\*31 - 1, got 2147483648"),
    "position": (positions([0, 2**31]), "expected positions from 0 to 2\\*\\*31 - 1, got 2147483648"),
    "last position": (positions([0, 2**31 - 2]), "expected positions from 0 to 2\\*\\*31 - 1, got 21474839"),
    "negative position": (positions([0, -1]), "expected positions from 0 to .*, got -1"),
    "huge position": (positions([0, 10**300]), "expected positions from 0 to .*, got 1000"),
    "boolean position": (positions([False, True]), "positions as pairs of integers, got \\[False, True\\]"),
    "null in tree": (
        lambda d: d | {"layout": d["layout"] | {"tree": [*d["layout"]["tree"], None]}},
        "tree: .*got None",
    ),
    "object in tree": (
        lambda d: d | {"layout": d["layout"] | {"tree": [deep_object()]}},
        "tree: expected a text length",
    ),
    "number": (lambda d: d | {"logprobs": [1e400] * d["total_tokens"]}, "expected a finite number, got Infinity"),
    "not a number": (lambda d: d | {"logprobs": [float("nan")]}, "expected a finite number, got NaN"),
    "version's type": (lambda d: d | {"version": True}, "expected version 1, got True"),
    "total": (lambda d: d | {"total_tokens": 3}, "prompt_length \\+ total_tokens"),
    "tree": (lambda d: d | {"layout": d["layout"] | {"tree": [-1]}}, "tree: expected a text length"),
    "short tree": (lambda d: d | {"layout": d["layout"] | {"tree": [1]}}, "sampled: expected 1 booleans"),
    "sampled": (lambda d: d | {"layout": d["layout"] | {"sampled": [[0, 9999]]}}, "ranges within 0 .. .*9999"),
    "pair": (lambda d: d | {"layout": d["layout"] | {"sampled": [[0]]}}, "sampled as pairs of integers, got \\[0\\]"),
    "positions": (lambda d: d | {"layout": d["layout"] | {"positions": [[1, 1]]}}, "tokens from 0 .*positions"),
    "no positions": (lambda d: d | {"layout": d["layout"] | {"positions": []}}, "positions"),
    "texts": (lambda d: d | {"texts": ["x"] * d["total_tokens"]}, "the texts of the tokens to be the text"),
    "steps_of": (lambda d: d | {"steps_of": [1]}, "expected .* values in steps_of, got 1"),
    "logprob": (lambda d: d | {"logprobs": ["inf"] * d["total_tokens"]}, "expected a log-probability, got 'inf'"),
    "top": (lambda d: d | {"top_logprobs": [[[1]]] * d["total_tokens"]}, "pairs of a token id and .*got \\[1\\]"),
    "error": (lambda d: d | {"error": 7}, "expected error of type str, got 7"),
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": ' + "[" * 100_000, "expected JSON nested at most"),
        ('{"format": ' + "1" * 5000 + "}", "expected an integer of at most 1000 digits, got one of 5000"),
        ('{"format": "a", "format": "b"}', "expected every key once in an object, got 'format' twice"),
        (b"\xff", "can't decode byte 0xff"),
    ],
    ids=["deep", "digits", "repeated key", "bytes"],
)
def test_a_text_that_is_no_generation(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^generation: expected JSON, got .*{message}"):
        Generation.from_json(text)


@pytest.mark.parametrize("name", BROKEN)
def test_json_that_is_no_generation(nested: Generation, name: str) -> None:
    change, message = BROKEN[name]
    found = change(nested.to_dict())
    with pytest.raises(ValueError, match=message):
        Generation.from_json("generation" if found is None else json.dumps(found))


def test_branches_and_paths_in_events_of_two_blocks(engine: Engine) -> None:
    """A path of the next block has the same name and another branch."""
    sampler = follow(engine, CASES["one after the other"])
    branches = defaultdict(set)
    for event in engine.stream("the", config_for(engine), sampler):
        if isinstance(event, TokenEvent):
            branches[event.path].add(event.branch)
    assert [len(branches[path]) for path in ((), (1,), (2,), (3,))] == [1, 2, 2, 1]
