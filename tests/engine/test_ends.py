"""Where a branch ends: ends of text of any value and type, stop strings; and a model that was changed meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mvkernels import BranchLayout, patch_model, unpatch_model
from mvkernels.grammar import TAGS
from mvkernels.model import Engine, GenerationConfig
from tests.engine.cases import CASES, CONCLUDE, check_pages, config_for, follow, goal, script
from tests.support.tiny_model import END, scripted, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("all_pages_come_back")

# Nothing of it is left to the model, and no newline, digit or colon of it is sampled.
BLOCK = {
    "": "<Parallel>\n<Goal>\n<Outline>\n1: so</Outline>\n<Outline>\n2: add</Outline>\n</Goal>"
    f" the sum</Conclusion>\n</Parallel> of{END}",
    "1": " two<Parallel>\n<Goal>\n<Outline>\n1.1: a</Outline>\n</Goal> b</Conclusion>\n</Parallel></Path>",
    "1.1": " parts</Path>",
    "2": "</Path>",
}


# ---- ends of text


@pytest.mark.parametrize("semantics", ["canonical", "released"])
def test_what_the_engine_writes_is_no_end_of_text(engine: Engine, semantics: str) -> None:
    """A newline, a digit and a colon as ends of text: each block of the engine's was text, or had none."""
    engine = Engine(engine.model, engine.tokenizer, page_size=4, semantics=semantics)
    config = config_for(engine)
    [expected] = engine.generate("so", config, follow(engine, BLOCK))
    assert expected.finish_reason == "stop" and expected.layout.has_branches and not expected.warnings
    written = set(expected.token_ids) - {t for own in script(BLOCK, engine).values() for t in own} - {*engine.tags.ids}
    assert written >= {*engine.tags.encode("\n1:")}
    for ends in ([token] for token in sorted(written)) if semantics == "canonical" else [written]:
        config = GenerationConfig(max_new_tokens=400, eos_token_ids=[engine.tokenizer.eos_token_id, *ends])
        [out] = engine.generate("so", config, follow(engine, BLOCK))
        assert (out.token_ids, out.text, out.warnings) == (expected.token_ids, expected.text, [])
        assert out.finish_reason == "stop" and torch.equal(out.layout.position_ids, expected.layout.position_ids)
    BranchLayout.from_token_ids(out.token_ids, engine.tags, semantics=semantics)


def test_a_sampled_newline_is_an_end_of_text_where_it_is_one(engine: Engine) -> None:
    """Also one between tags, which a grammar-less model may write: there it is no whitespace."""
    [newline] = engine.tags.encode("\n")
    config = GenerationConfig(max_new_tokens=100, eos_token_ids=newline)
    case = BLOCK | {"1.1": " a\n", "": BLOCK[""].removesuffix(f" of{END}") + "\n of"}
    [out] = engine.generate("so", config, follow(engine, case))
    assert out.finish_reason == "stop" and out.token_ids[-1] == newline and out.text.endswith("</Parallel>")
    assert out.warnings == ["path 1.1: closed by a forced </Path> (end of text)"]
    assert "1.1: a</Path>" in out.text, "an end of text has no text"
    BranchLayout.from_token_ids(out.token_ids, engine.tags)
    [out] = engine.generate("so", config_for(engine, grammar=False), follow(engine, {"": "a\nb" + END}, grammar=False))
    assert out.text == "a\nb", "where it is none"
    changed = GenerationConfig(max_new_tokens=100, eos_token_ids=newline, grammar=False)
    [out] = engine.generate("so", changed, follow(engine, {"": "a<Parallel>\nb"}, grammar=False))
    assert out.text == "a<Parallel>" and out.finish_reason == "stop" and "kept as text" in out.warnings[0]


@pytest.mark.timeout(60)
def test_a_tag_is_no_end_of_text() -> None:
    """With `</Path>` among them, as servers want it that decode each path by itself, the engine never returned."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    engine = Engine(model, tokenizer, page_size=4)
    end, message = tokenizer.eos_token_id, "expected ends of text without control tags, .* got"
    for tag in TAGS:
        for ends in ((end, tokenizer.convert_tokens_to_ids(tag)), tokenizer.convert_tokens_to_ids(tag)):
            with pytest.raises(ValueError, match=f"^eos_token_ids: {message} {tag}$"):
                engine.generate("so", GenerationConfig(eos_token_ids=ends))
    assert engine.cache is None, "refused before anything runs"
    [expected] = engine.generate("so", config_for(engine), follow(engine, BLOCK))
    model.generation_config.eos_token_id = [end, *engine.tags.ids]
    with pytest.warns(UserWarning, match=f"^generation_config.eos_token_id: {message} {' '.join(TAGS)}; left out"):
        [out] = engine.generate("so", GenerationConfig(max_new_tokens=400), follow(engine, BLOCK))
    assert out.token_ids == expected.token_ids and out.finish_reason == "stop"


ENDS: dict[str, Any] = {
    "integer": 7,
    "list": [7],
    "tuple": (9, 7),
    "set": {7, 9},
    "frozenset": frozenset([7]),
    "range": range(5, 9),
    "tensor of no dimension": torch.tensor(7),
    "tensor": torch.tensor([9, 7], dtype=torch.int32),
    "list of tensors": [torch.tensor(9), torch.tensor(7)],
    "array": np.array([7, 9]),
    "number of numpy": np.int64(7),
    "list of numpy": [np.int32(7)],
    "twice": [7, 7],
    "out of the vocabulary": [10**9, 2**70, -1, 7],
}


@pytest.mark.parametrize("name", ENDS)
def test_ends_of_text_of_every_type(engine: Engine, name: str) -> None:
    """Of the caller's, and of the model's generation config: as a tensor, that ended with "error"."""
    text = [20, 21, 7, 22]
    [out] = engine.generate("so", GenerationConfig(eos_token_ids=ENDS[name]), scripted({(): text}))
    assert out.token_ids[out.prompt_length :] == text[:3] and out.finish_reason == "stop", out.error
    before, engine.model.generation_config.eos_token_id = engine.model.generation_config.eos_token_id, ENDS[name]
    try:
        [again] = engine.generate("so", GenerationConfig(), scripted({(): text}))
        assert again.token_ids == out.token_ids and again.finish_reason == "stop"
        config = GenerationConfig(max_new_tokens=4, eos_token_ids=[])
        [whole] = engine.generate("so", config, scripted({(): text}))
        assert whole.token_ids[whole.prompt_length :] == text
    finally:
        engine.model.generation_config.eos_token_id = before


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        ("7", "'7'"),
        (b"7", "b'7'"),
        (7.0, "7.0"),
        ([7, 7.5], "7.5"),
        ([[7]], r"\[7\]"),
        ([None], "None"),
        (True, "True"),
        (torch.tensor([7.0]), "7.0"),
        (torch.tensor([[7]]), r"\[7\]"),
        ([torch.tensor(7.5)], r"tensor\(7.5000\)"),
        (np.array(["a"]), "'a'"),
        ([7, "a"], "'a'"),
    ],
    ids=repr,
)
def test_ends_of_text_that_are_none(engine: Engine, wrong: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"^eos_token_ids: expected token ids, got {got}$"):
        GenerationConfig(eos_token_ids=wrong)
    before, engine.model.generation_config.eos_token_id = engine.model.generation_config.eos_token_id, wrong
    try:
        with pytest.raises(ValueError, match=f"^generation_config.eos_token_id: expected token ids, got {got}$"):
            engine.generate("so")
    finally:
        engine.model.generation_config.eos_token_id = before


# ---- stop strings

# Each with the text that is sampled, and what of it comes before the branch ends.
STOPS = {
    "a long one beside a short one": (("zq", "sum of the parts"), "the sum of the parts is", "the sum of the parts"),
    "a short one beside a long one": (("sum of the parts", "zq"), "the sum zq of the parts", "the sum zq"),
    "one that begins another": (("the", "the whole"), "so the whole", "so the"),
    "one that ends another": (("the whole", "whole"), "so the whole is", "so the whole"),
    "one within another": (("a whole of", "who"), "is a whole of", "is a who"),
    "they overlap": (("parts i", "rts is"), "the parts is the", "the parts i"),
    "one that begins again": (("aab",), "aaaaab a", "aaaaab"),
    "only its beginning comes": (("whole b", "q"), "the whole a whole b", "the whole a whole b"),
    "many bytes to a character": (("é🙂", "q"), "a é€🙂é🙂b", "a é€🙂é🙂"),
    "a part of a character's bytes": (("è",), "é ê è é", "é ê è"),
    "a newline": (("\n\n", "zzzzzzzz"), "a\nb\n\nc", "a\nb\n\n"),
    "the text of a tag": (("Think",), "a<Think>b", "a<Think>"),
    "none": (("zq", "sum of the parts of"), "the sum of the parts is", "the sum of the parts is"),
}


@pytest.mark.parametrize("whole_tokens", [False, True], ids=["byte by byte", "as encoded"])
@pytest.mark.parametrize("name", STOPS)
def test_the_stop_string_that_is_complete_first_ends_the_branch(engine: Engine, name: str, whole_tokens: bool) -> None:
    """A tail as long as the shortest of them forgot the beginning of the longer ones."""
    stops, text, kept = STOPS[name]
    tokens = engine.tags.encode(text) if whole_tokens else one_by_one(engine, text)
    decode = engine.tokenizer.decode
    least = next(end for end in range(len(tokens) + 1) if decode(tokens[:end]).startswith(kept))
    for order in (stops, stops[::-1]):
        config = config_for(engine, stop=order, grammar=False)
        [out] = engine.generate("zq", config, scripted({(): [*tokens, engine.tokenizer.eos_token_id]}))
        sampled = [i for i, own in zip(out.token_ids, out.layout.sampled.tolist(), strict=True) if own]
        wanted = [*tokens, engine.tokenizer.eos_token_id] if name == "none" else tokens[:least]
        assert out.finish_reason == "stop" and sampled == wanted


def one_by_one(engine: Engine, text: str) -> list[int]:
    """Tags as they are, all else byte by byte."""
    vocabulary, tags = engine.tokenizer.get_vocab(), {*engine.tags.ids}
    spelled = {token: spelling for spelling, token in vocabulary.items()}
    out: list[int] = []
    for token in engine.tags.encode(text):
        out += [token] if token in tags else [vocabulary[byte] for byte in spelled[token]]
    return out


def test_a_stop_string_within_a_path_and_on_the_trunk(engine: Engine) -> None:
    """It is looked for in the sampled text of each branch by itself: neither across what the engine writes, nor from
    one path to another, nor from a path to the trunk behind it."""
    case = {
        "": f"so the{goal('1: a', '2: b', '3: c')} parts is sum of the w{CONCLUDE} whole is{END}",
        "1": " sum of the</Path>",
        "2": " parts is sum of the parts is it",
        "3": " whole</Path>",
    }
    stops = ("sum of the parts", "the parts", "a</Outline>\n<", "1:", "sum of the whole", "zq")
    [out] = engine.generate("zq", config_for(engine, stop=stops), follow(engine, case))
    assert out.warnings == ["path 2: closed by a forced </Path> (stop string 'sum of the parts')"]
    assert "\n2: parts is sum of the parts</Path>" in out.text and out.text.endswith("</Parallel> whole is")
    assert out.finish_reason == "stop" and out.token_ids[-1] == engine.tokenizer.eos_token_id
    with_end = case | {"": case[""].replace(" whole is", " the parts of it")}
    [out] = engine.generate("zq", config_for(engine, stop=stops), follow(engine, with_end))
    assert out.finish_reason == "stop" and out.text.endswith("</Parallel> the parts")


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        (["a", ""], "stop: expected strings that are not empty, got ''"),
        (7, "stop: expected strings that are not empty, got 7"),
        ([b"a"], "stop: expected strings that are not empty, got b'a'"),
        ("ab", "stop: expected a tuple of strings, got the string 'ab'"),
    ],
)
def test_stop_strings_that_are_none(engine: Engine, stops: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        GenerationConfig(stop=stops)
    if stops == "ab":
        return
    engine.model.generation_config.stop_strings = stops
    try:
        with pytest.raises(ValueError, match=f"^generation_config.{message.replace('stop', 'stop_strings', 1)}$"):
            engine.generate("so")
    finally:
        engine.model.generation_config.stop_strings = None


def test_stop_strings_in_a_list(engine: Engine) -> None:
    config = GenerationConfig(max_new_tokens=9, stop=["sum"])
    assert config.stop == ("sum",) and hash(config)
    [out] = engine.generate("so", config, scripted({(): engine.tags.encode(" sum of")}))
    assert out.text == " sum" and out.finish_reason == "stop"


# ---- a model that is no longer what the engine made of it


def test_a_model_that_was_changed_behind_the_engine() -> None:
    """Unpatched, or with another attention, it wrote other tokens without a word."""
    engine = Engine(tiny_model(), tiny_tokenizer(), page_size=4, decoder="hosted")
    sampler, config = follow(engine, CASES["two paths"]), config_for(engine)
    [expected] = engine.generate("so", config, sampler)
    opened = engine.stream("so", config, sampler)
    changes = {
        "one with attention implementation 'sdpa'": lambda model: unpatch_model(model),
        "one patched with backend 'reference'": lambda model: patch_model(model, backend="reference"),
        "one with attention implementation 'eager'": lambda model: model.set_attn_implementation("eager"),
    }
    for got, change in changes.items():
        change(engine.model)
        message = f"expected the model as the engine has patched it, got {got}; patch_model"
        for call in (engine.generate, engine.stream, engine.astream):
            with pytest.raises(ValueError, match=message):
                call("so", config, sampler)
        with pytest.raises(ValueError, match=message):
            next(opened)
        patch_model(engine.model)
        [out] = engine.generate("so", config, follow(engine, CASES["two paths"]))
        assert out.token_ids == expected.token_ids
        opened = engine.stream("so", config, follow(engine, CASES["two paths"]))
    assert [event for event in opened][-1].generation.token_ids == expected.token_ids
    check_pages(engine)


def test_a_model_that_is_unpatched_while_a_request_runs() -> None:
    engine = Engine(tiny_model(), tiny_tokenizer(), page_size=4, decoder="hosted")
    stream = engine.stream("so", GenerationConfig(max_new_tokens=12))
    next(stream)
    unpatch_model(engine.model)
    out = [*stream][-1].generation
    assert out.finish_reason == "error" and "got one that was unpatched meanwhile" in out.error
    check_pages(engine)


def test_a_model_that_grew_or_was_replaced() -> None:
    engine = Engine(tiny_model(), tiny_tokenizer(), page_size=4)
    config = GenerationConfig(max_new_tokens=12)
    [before] = engine.generate("so", config)
    engine.model.resize_token_embeddings(384, mean_resizing=False)
    head = engine.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[300:] = 0.0
    [out] = engine.generate("so", config)
    assert out.token_ids == before.token_ids and out.finish_reason == "max_new_tokens"
    other = Engine(tiny_model(seed=3), engine.tokenizer, page_size=4)
    [expected] = other.generate("so", config)
    engine.model = other.model
    [out] = engine.generate("so", config)
    assert out.token_ids == expected.token_ids != before.token_ids
    check_pages(engine)
