"""The engine at its limits: budgets, malformed output, ends of text, and random streams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvkernels import BranchLayout, GrammarError
from mvkernels.grammar import TAGS, Kind
from mvkernels.model import Engine, Generation, GenerationConfig
from tests.engine.cases import CASES, CONCLUDE, TOLERANCE, check_pages, config_for, follow, goal, plain, script
from tests.engine.lossless import Recorder, compare, packed_logits, recorded_logits
from tests.support.tiny_model import END, scripted, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("all_pages_come_back")


def check_shape(out: Generation) -> None:
    """What holds for every generation, however it ended."""
    assert out.layout.total_tokens == len(out.token_ids) == out.prompt_length + out.total_tokens
    assert not out.layout.sampled[: out.prompt_length].any()
    assert out.critical_path <= out.total_tokens


def check_closed(engine: Engine, out: Generation) -> None:
    """Every path is closed and merges; where nothing stayed text, the transcript is well-formed."""
    count = {tag: out.token_ids.count(token) for tag, token in zip(TAGS, engine.tags.ids, strict=True)}
    assert count["<Path>"] == count["</Path>"]
    if not any("kept as text" in message for message in out.warnings):
        parsed = BranchLayout.from_token_ids(out.token_ids, engine.tags)
        assert torch.equal(parsed.position_ids, out.layout.position_ids)


# ---- budgets


@pytest.mark.parametrize("name", ["small nested", "two paths"])
def test_every_total_budget_is_kept(engine: Engine, name: str) -> None:
    [whole] = engine.generate("the", config_for(engine), follow(engine, CASES[name]))
    for budget in range(1, whole.total_tokens + 2):
        recorder = Recorder(follow(engine, CASES[name]))
        [out] = engine.generate("the", config_for(engine, max_new_tokens=budget), recorder)
        check_shape(out)
        assert out.total_tokens <= budget
        if budget >= whole.total_tokens:
            assert out.finish_reason == "stop" and out.token_ids == whole.token_ids and not out.warnings
            continue
        if out.finish_reason == "max_new_tokens":
            assert out.total_tokens == budget
        else:  # a script takes no notice of what has no room, and goes on behind it
            assert out.finish_reason == "stop" and any("no room" in message for message in out.warnings)
        check_closed(engine, out)
        if budget % 5 == 0:
            packed = packed_logits(engine.model, out.token_ids, out.layout)
            compare(recorded_logits(recorder, out, 0), packed, out.layout, TOLERANCE, "packed")


@pytest.mark.parametrize("name", ["small nested", "one after the other", "nested"])
def test_every_critical_path_budget_is_kept(engine: Engine, name: str) -> None:
    [whole] = engine.generate("the", config_for(engine), follow(engine, CASES[name]))
    reasons = set()
    # The longest of these transcripts at every third budget.
    for budget in range(whole.critical_path + 1, 0, -3 if name == "nested" else -1):
        [out] = engine.generate("the", config_for(engine, max_critical_path=budget), follow(engine, CASES[name]))
        check_shape(out)
        assert out.critical_path <= budget
        reasons.add(out.finish_reason)
        if budget >= whole.critical_path:
            assert out.token_ids == whole.token_ids and out.finish_reason == "stop" and not out.warnings
        elif out.finish_reason == "max_critical_path":
            assert out.critical_path == budget
        else:
            assert out.finish_reason == "stop" and any("no room" in message for message in out.warnings)
        check_closed(engine, out)
    assert reasons == {"stop", "max_critical_path"}


def test_a_path_cut_short_merges_and_its_siblings_finish(engine: Engine) -> None:
    case = {"": f"{goal('1: a', '2: b')}~~{CONCLUDE}{END}", "1": "~" * 50 + "</Path>", "2": "~~</Path>"}
    start = len(engine.tags.encode(goal("1: a", "2: b")))
    opening = len(engine.tags.encode("\n<Path>\n1:"))
    budget = start + opening + 20
    recorder = Recorder(follow(engine, case))
    [out] = engine.generate("the", config_for(engine, max_critical_path=budget), recorder)
    assert out.critical_path == budget and out.finish_reason == "max_critical_path"
    assert out.warnings == [
        "path 1: closed by a forced </Path> (max_critical_path)",
        "trunk: block closed by the engine (max_critical_path)",
    ]
    ends = [i for i, kind in enumerate(engine.tags.kinds(out.token_ids)) if kind == Kind.PATH_END]
    assert out.layout.sampled[ends].tolist() == [False, True] and ends[1] - ends[0] == opening + 3
    assert out.layout.position_ids[out.prompt_length :].max() == out.prompt_length + budget - 1
    packed = packed_logits(engine.model, out.token_ids, out.layout)
    compare(recorded_logits(recorder, out, 0), packed, out.layout, TOLERANCE, "packed")


def test_the_models_positions_are_a_budget(engine: Engine) -> None:
    small = Engine(tiny_model(max_positions=24), tiny_tokenizer())
    prompt = list(range(20, 40))
    config = config_for(engine)
    [out] = small.generate([prompt], config, plain(small))
    assert out.total_tokens == 4 and out.finish_reason == "max_positions"
    [out] = small.generate([prompt], replace(config, max_critical_path=3), plain(small))
    assert out.total_tokens == 3 and out.finish_reason == "max_critical_path"
    assert small.generate([list(range(20, 43))], config, plain(small))[0].total_tokens == 1
    with pytest.raises(ValueError, match=r"prompt 1: expected .* at most 23 tokens.*24 positions, got 24"):
        small.generate([prompt, list(range(20, 44))], config)


def test_a_block_shortens_the_prompts_critical_path(engine: Engine) -> None:
    case = {"": f"{goal('1:', '2:')}{CONCLUDE}~", "1": "~" * 9 + "</Path>", "2": "~" * 9 + "</Path>"}
    [out] = engine.generate("the", config_for(engine, max_new_tokens=70), follow(engine, case))
    whole = BranchLayout.from_token_ids(out.token_ids, engine.tags, allow_open=True)
    small = Engine(tiny_model(max_positions=whole.critical_path + 2), tiny_tokenizer())
    assert whole.total_tokens > whole.critical_path + 2
    [more] = small.generate([out.token_ids], config_for(engine), plain(small))
    assert more.critical_path == more.total_tokens == 2 and more.finish_reason == "max_positions"


# ---- ends of text, stop strings


def test_end_of_text_inside_a_path_closes_it(engine: Engine) -> None:
    case = {"": f"{goal('1: a', '2: b')}~{CONCLUDE}{END}", "1": f"~~{END}", "2": "~~~~</Path>"}
    [out] = engine.generate("the", config_for(engine), follow(engine, case))
    assert out.warnings == ["path 1: closed by a forced </Path> (end of text)"]
    assert out.finish_reason == "stop" and out.text.count("</Path>") == 2 and END not in out.text
    end = engine.tokenizer.eos_token_id
    assert out.token_ids.count(end) == 2, "no sampled token is lost"
    position = out.token_ids.index(end)
    assert out.token_ids[position + 1] == engine.tags.ids[TAGS.index("</Path>")]
    assert out.layout.sampled[position] and not out.layout.sampled[position + 1]
    parsed = BranchLayout.from_token_ids(out.token_ids, engine.tags)
    assert torch.equal(parsed.position_ids, out.layout.position_ids)


@pytest.mark.parametrize("last", [END, "so"])
def test_paths_that_end_in_one_step_share_a_budget(engine: Engine, last: str) -> None:
    """The last token of all may be what ends a path: its siblings, which come later in the step, get none."""
    prompt = f"the{goal('1:', '2:', '3:', '4:')}"
    case = {"": f"{CONCLUDE}{END}"} | {str(path): f" a{last}" for path in range(1, 5)}
    config = config_for(engine, stop=("so",))
    [whole] = engine.generate(prompt, config, follow(engine, case))
    assert whole.text.count("</Path>") == 4 and whole.finish_reason == "stop"
    for budget in range(whole.total_tokens - 8, whole.total_tokens):
        [out] = engine.generate(prompt, replace(config, max_new_tokens=budget), follow(engine, case))
        assert out.total_tokens <= budget and out.finish_reason == "max_new_tokens"
        check_closed(engine, out)


def test_end_of_text_in_an_open_block(engine: Engine) -> None:
    """Of a sampler that ignores its mask: between the parts of a block it is text, within one it ends the block."""
    config = config_for(engine, grammar=False)  # with it, the first outline is there as soon as the block is
    for text in ("<Parallel>\n", "<Parallel>\n<Goal>\n"):
        [out] = engine.generate("the", config, follow(engine, {"": text + END}, grammar=False))
        assert out.finish_reason == "stop" and out.text == text
        assert len(out.warnings) == 1 and "kept as text" in out.warnings[0]
    case = {"": f"<Parallel>\n<Goal>\n<Outline>\n1: a{END}"}
    [out] = engine.generate("the", config_for(engine), follow(engine, case))
    assert out.text == (
        "<Parallel>\n<Goal>\n<Outline>\n1: a</Outline>\n</Goal>\n<Path>\n1:</Path>"
        "\n<Conclusion>\n</Conclusion>\n</Parallel>"
    )
    assert out.finish_reason == "stop" and out.warnings == ["trunk: block closed by the engine (stop)"]
    [out] = engine.generate("the", config_for(engine), follow(engine, {"": f"<Think>so{END}"}))
    assert out.text == "<Think>so</Think>" and out.warnings == ["trunk: closed by a forced </Think> (stop)"]


def test_stop_strings(engine: Engine) -> None:
    case = {
        "": f"the{goal('1: the', '2: b')}so~~ add x",
        "1": " the wh ole",
        "2": " a",
    }
    config = config_for(engine, stop=("wh", "add"))
    [out] = engine.generate("add wh", config, follow(engine, case | {"2": "~~</Path>"}))
    assert out.finish_reason == "stop" and out.text.endswith(" add</Conclusion>\n</Parallel>"), "kept, and closed"
    assert out.warnings[0] == "path 1: closed by a forced </Path> (stop string 'wh')"
    assert out.warnings[1:] == ["trunk: block closed by the engine (stop)"]
    assert "1: the wh</Path>" in out.text


def test_stop_and_end_of_text_of_the_models_generation_config(engine: Engine) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [5, 6]
    model.generation_config.stop_strings = "sum"
    other = Engine(model, tiny_tokenizer())
    encode = other.tags.encode
    for text, kept in (([*encode(" a"), 6, 20], 1), ([5], 0), (encode(" sum of"), 2)):
        [out] = other.generate("two", GenerationConfig(max_new_tokens=30), scripted({(): text}))
        assert out.finish_reason == "stop" and out.total_tokens < 30
        assert out.token_ids[out.prompt_length :] == text[: out.total_tokens] and out.total_tokens > kept
    config = GenerationConfig(max_new_tokens=9, eos_token_ids=(), stop=())
    [out] = other.generate("two", config, scripted({(): [6, 5, *encode(" sum")]}))
    assert out.total_tokens == 9 and out.finish_reason == "max_new_tokens"


# ---- malformed output

MALFORMED = {
    "goal without outlines": ("<Parallel>\n<Goal>\n</Goal> so~~", ["</Goal>"]),
    "text in a block": ("<Parallel>\nso\n<Goal>~", ["found text|by text", "<Goal>"]),
    "paths without a goal": ("<Parallel>\n<Path>\n1: a</Path>~", ["<Path>", "</Path>"]),
    "path without a block": ("so <Path>\n1: a</Path>~</Conclusion>", ["<Path>", "</Path>", "</Conclusion>"]),
    "outline left open": ("<Parallel>\n<Goal>\n<Outline>\n1: a\n</Goal>~", ["</Goal>"]),
    "closing tags alone": ("</Parallel></Think></Goal>", ["</Parallel>", "</Think>", "</Goal>"]),
    "think in think": ("<Think><Think></Think></Think>", ["<Think>", "</Think>"]),
    "block in an outline": ("<Parallel><Goal><Outline><Parallel>~", ["<Parallel>", "text"]),
    "every tag": ("".join(TAGS) + "~", []),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_output_stays_text(engine: Engine, name: str) -> None:
    text, named = MALFORMED[name]
    case = {"": f"{text}{END}"}
    [out] = engine.generate("the", config_for(engine, grammar=False), follow(engine, case, grammar=False))
    ids = out.token_ids[out.prompt_length :]
    wanted = script(case, engine, grammar=False)[()]
    assert len(ids) == len(wanted) and all(a == b or b < 0 for a, b in zip(ids, wanted, strict=True))
    assert out.text == engine.tokenizer.decode(ids).removesuffix(END)
    assert out.finish_reason == "stop" and not out.layout.has_branches
    assert len(out.warnings) >= max(len(named), 1)
    for tag, warning in zip(named, out.warnings, strict=bool(named)):
        assert any(word in warning for word in tag.split("|")), (tag, warning)


def test_malformed_conclusion_leaves_the_paths_merged(engine: Engine) -> None:
    case = {"": f"{goal('1: a', '2: b')}~~</Parallel>~{END}", "1": "~</Path>", "2": "</Goal>~~</Path>"}
    recorder = Recorder(follow(engine, case))
    [out] = engine.generate("the", config_for(engine), recorder)
    assert [w.split(":")[0] for w in out.warnings] == ["path 2", "trunk"]
    assert "stay merged" in out.warnings[1] and out.layout.has_branches and out.finish_reason == "stop"
    packed = packed_logits(engine.model, out.token_ids, out.layout)
    compare(recorded_logits(recorder, out, 0), packed, out.layout, TOLERANCE, "packed")


def test_malformed_prompts_are_refused(engine: Engine) -> None:
    with pytest.raises(GrammarError, match="found </Path>"):
        engine.generate("so </Path>")


# ---- any output at all


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**9),
    total=st.integers(1, 120),
    critical=st.integers(1, 60),
    depth=st.integers(0, 2),
    width=st.integers(1, 3),
    one_path=st.booleans(),
)
def test_random_tokens_with_many_tags(
    seed: int, total: int, critical: int, depth: int, width: int, one_path: bool
) -> None:
    engine = RANDOM_ENGINE
    generator = torch.Generator().manual_seed(seed)
    helpful = [int(i) for i in engine.tags.ids[2:10]] * 2 + [engine.tags.encode("\n")[0]] * 3
    pool = torch.tensor([*engine.tags.ids, *helpful, 20, 21, engine.tokenizer.eos_token_id])

    def choose(views, logits):
        return pool[torch.randint(len(pool), (len(views),), generator=generator)].tolist()

    config = GenerationConfig(
        max_new_tokens=total,
        max_critical_path=critical,
        max_depth=depth,
        max_width=width,
        eos_token_ids=(engine.tokenizer.eos_token_id,),
        sequential=one_path,
    )
    head = engine.tags.encode(goal("1: a", "2: b"))  # most streams begin with a block that forks
    outs = engine.generate(["the", "two"], config, scripted([{(): head if seed % 3 else []}, {}], choose))
    check_pages(engine)
    for out in outs:
        check_shape(out)
        assert out.total_tokens <= total and out.critical_path <= critical
        assert out.finish_reason in ("stop", "max_new_tokens", "max_critical_path")


RANDOM_ENGINE = Engine(tiny_model(), tiny_tokenizer(), page_size=4)
