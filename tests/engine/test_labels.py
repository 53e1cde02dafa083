"""Labels = what the engine samples: for every kind of vocabulary, in both semantics, and wherever a trace is cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given

from mvkernels import BranchLayout, TagTokens
from mvkernels.grammar import TAG_PATTERN, TAGS, Kind, parse
from mvkernels.layout import sampled_tokens
from mvkernels.model import Engine, GenerationConfig
from mvkernels.reference import layout as reference
from tests.engine.cases import check_pages
from tests.engine.vocabularies import HARDEST, ROWS, VOCABULARIES, whole
from tests.support.tiny_model import tiny_model
from tests.support.trees import TEST_TAGS, traces

# Pieces of text: what begins like whitespace, an index, or a token that is merged with either.
TEXTS = ("", "so", " the", "12", " 1: a", ":", "1:", "é\n", "\n\n", "\n1", " \n", "\ns", ".5 x", "€ so\n", ": a", " ")


@pytest.fixture(params=VOCABULARIES)
def tags(request: pytest.FixtureRequest) -> TagTokens:
    return TagTokens.from_tokenizer(VOCABULARIES[request.param]())


def random_trace(draw: random.Random, depth: int = 2, begin: str | None = None) -> str:
    """A trace as the engine writes it: blocks in their text form, any text in them."""

    def text() -> str:
        return "".join(draw.choice(TEXTS) for _ in range(draw.randint(0, 2)))

    def items(depth: int, path: tuple[int, ...]) -> str:
        found = text()
        for _ in range(draw.randint(0, 2) if depth else 0):
            found += block(depth - 1, path) + text()
        return found

    def block(depth: int, path: tuple[int, ...]) -> str:
        indices = [".".join(map(str, (*path, i + 1))) for i in range(draw.choice((1, 1, 2, 3)))]
        outlines = "".join(f"<Outline>\n{index}:{text()}</Outline>\n" for index in indices)
        paths = "".join(
            f"\n<Path>\n{index}:{items(depth, (*path, i))}</Path>" for i, index in enumerate(indices, start=1)
        )
        conclusion = f"\n<Conclusion>\n{text()}</Conclusion>\n</Parallel>"
        return f"<Parallel>\n<Goal>\n{outlines}</Goal>{paths}{conclusion}"

    return (text() if begin is None else begin) + block(depth, ()) + items(1, ())


# ---- the text that is encoded


def test_encoding_gives_the_text_back(tags: TagTokens) -> None:
    draw = random.Random(0)
    for begin in (None, "\n", " ", "  so", "\t", "é", "<Think>\n</Think>", *TEXTS[1:]):
        for _ in range(2):
            text = random_trace(draw, begin=begin)
            assert whole(tags.tokenizer, tags.encode(text)) == text


def test_what_the_engine_writes_is_encoded_alike_everywhere(tags: TagTokens) -> None:
    for written in ("\n<Path>\n2.12:", "\n<Conclusion>\n", "\n</Parallel>"):
        assert tags.encode(f"so{written} 1: a") == tags.encode("so") + tags.encode(f"{written} 1: a")
        assert tags.encode(f"{written}\n1 a")[: len(tags.encode(written))] == tags.encode(written)


def test_a_text_begins_as_the_tokenizer_has_it() -> None:
    for name in ("byte-level", "Llama 2", "Metaspace", "Gemma", "Unigram"):
        tokenizer = VOCABULARIES[name]()
        tags = TagTokens.from_tokenizer(tokenizer)
        assert tags.encode("the so 12\n") == tokenizer.encode("the so 12\n", add_special_tokens=False)


# ---- labels


def by_branch(tags: TagTokens, ids: list[int], sampled: list[bool]) -> dict[tuple[int, ...], list[list[int]]]:
    """Path -> the sampled tokens of each branch that has it, in order (a second block has paths of the same names)."""
    found: dict[tuple[int, ...], list[list[int]]] = {(): [[]]}
    path: tuple[int, ...] = ()
    counts = [0]
    for token, own in zip(ids, sampled, strict=True):
        kind = tags.kind(token)
        if kind is Kind.PARALLEL:
            counts.append(0)
        elif kind is Kind.PATH:
            counts[-1] += 1
            path = (*path, counts[-1])
            found.setdefault(path, []).append([])
        if own:
            found[path][-1].append(token)
        if kind is Kind.PATH_END:
            path = path[:-1]
        elif kind is Kind.PARALLEL_END:
            counts.pop()
    return found


def writing(scripts: list[dict[tuple[int, ...], list[list[int]]]], end: int) -> Any:
    """A sampler by which each request writes its script, and then `end`."""
    branches: dict[tuple[int, tuple[int, ...]], list[str]] = {}

    def choose(views: Any, logits: torch.Tensor) -> list[int]:
        tokens = []
        for view in views:
            keys = branches.setdefault((view.request, view.path), [])
            if view.key not in keys:
                keys.append(view.key)
            own = scripts[view.request][view.path][keys.index(view.key)]
            tokens.append(own[view.drawn] if view.drawn < len(own) else end)
        return tokens

    return choose


@pytest.mark.parametrize("semantics", ["canonical", "released"])
@pytest.mark.parametrize("tags", HARDEST, indirect=True)
def test_labels_are_what_the_engine_samples(tags: TagTokens, semantics: str) -> None:
    """The engine writes a trace, with a sampler that gives it the labelled tokens and no other."""
    draw = random.Random(1)
    traces = [tags.encode(random_trace(draw, begin="so")) for _ in range(6)]
    layouts = [BranchLayout.from_token_ids(ids, tags, semantics=semantics, prompt_length=1) for ids in traces]
    end = tags.tokenizer.eos_token_id
    model = tiny_model(vocab_size=ROWS, max_positions=1024)
    engine = Engine(model, tags.tokenizer, page_size=16, semantics=semantics)
    config = GenerationConfig(max_new_tokens=1000, grammar=False, eos_token_ids=(end,), max_depth=9, max_width=9)
    scripts = [by_branch(tags, ids, layout.sampled.tolist()) for ids, layout in zip(traces, layouts, strict=True)]
    outs = engine.generate([ids[:1] for ids in traces], config, writing(scripts, end))
    for ids, layout, out in zip(traces, layouts, outs, strict=True):
        assert out.token_ids == [*ids, end] and not out.warnings
        assert out.layout.sampled[:-1].tolist() == layout.sampled.tolist()
        assert torch.equal(out.layout.position_ids[:-1], layout.position_ids)
        assert out.text == whole(tags.tokenizer, ids)[len(whole(tags.tokenizer, ids[:1])) :]
    assert sum(layout.has_branches for layout in layouts) > 1
    check_pages(engine)


def foreign(tags: TagTokens, text: str) -> list[int]:
    """The text as the tokenizer itself has it, between the tags: with spaces before each part, and other tokens."""
    ids: list[int] = []
    for piece in TAG_PATTERN.split(text):
        if piece in TAGS:
            ids.append(tags.ids[TAGS.index(piece)])
        elif piece:
            ids += tags.tokenizer.encode(piece, add_special_tokens=False)
    return ids


def test_labels_of_a_cut_are_the_first_ones_of_the_whole(tags: TagTokens) -> None:
    draw = random.Random(2)
    for encode in (TagTokens.encode, foreign):
        for _ in range(4):
            ids = encode(tags, random_trace(draw, depth=1))
            whole_trace = BranchLayout.from_token_ids(ids, tags)
            labels = whole_trace.labels(ids).tolist()
            texts = [tags.text(token) or "x" for token in ids]
            assert whole_trace.sampled.tolist() == reference.trace_sampled(parse(tags.kinds(ids)), texts)
            for cut in range(len(ids)):
                part = parse(tags.kinds(ids[:cut]), allow_open=True)
                assert sampled_tokens(ids[:cut], tags, part).tolist() == whole_trace.sampled[:cut].tolist()
            cut = draw.randrange(1, len(ids))
            layout = BranchLayout.from_token_ids(ids[:cut], tags, allow_open=True)
            assert layout.labels(ids[:cut]).tolist() == labels[:cut]


@given(traces())
def test_labels_of_any_trace_equal_the_definition(ids: list[int]) -> None:
    texts = [TEST_TAGS.text(token) or "x" for token in ids]
    for cut in (len(ids), len(ids) * 2 // 3, len(ids) // 2):
        layout = BranchLayout.from_token_ids(ids[:cut], TEST_TAGS, allow_open=True)
        trace = parse(TEST_TAGS.kinds(ids[:cut]), allow_open=True)
        assert layout.sampled.tolist() == reference.trace_sampled(trace, texts[:cut])


@pytest.mark.parametrize(
    ("name", "text", "model"),
    [  # what the model samples of a path and of a conclusion, whatever else the tokenizer makes of the engine's part
        ("Llama 2", "{}\n1: a</Path>\n<Conclusion>\nso</Conclusion>", ["▁a", "so"]),
        ("Llama 2", "{} 12: a</Path> <Conclusion> \n so</Conclusion>", ["▁a", "▁so"]),
        ("greedy bytes", "{}\n1:a</Path>\n<Conclusion>\n\na</Conclusion>", ["a", "a"]),
        ("greedy bytes", "{} 1.2: a</Path>\n<Conclusion>\nso</Conclusion>", [":Ġ", "a", "Ċs", "o"]),
        ("byte-level", "{}\n1.12: a</Path>\n<Conclusion>\n\nso</Conclusion>", ["Ġa", "Ċ", "so"]),
    ],
)
def test_the_engines_part_is_told_by_its_text(name: str, text: str, model: list[str]) -> None:
    tags = TagTokens.from_tokenizer(VOCABULARIES[name]())
    begin = "<Parallel><Goal><Outline>1:</Outline></Goal>"
    ids = foreign(tags, text.format(f"{begin}<Path>") + "</Parallel>")
    labels = BranchLayout.from_token_ids(ids, tags).labels(ids)[len(foreign(tags, begin)) :]
    labelled = [token for token in labels.tolist() if token >= 0 and token not in tags.ids]
    assert tags.tokenizer.convert_ids_to_tokens(labelled) == model


def test_a_path_of_whitespace_alone_takes_linear_time() -> None:
    ids = [2, 4, 6, 7, 5, 8, *[12] * 100_000, 9, 10, 11, 3]
    assert not BranchLayout.from_token_ids(ids, TEST_TAGS).sampled[5:-4].any()
