"""BranchLayout against the reference, which goes by definition; released layouts against what the released code
computes.
"""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvkernels import BranchLayout, TagTokens
from mvkernels.errors import GrammarError
from mvkernels.grammar import parse
from mvkernels.reference import layout as reference
from tests.support.trees import TEST_TAGS, traces, trees

REAL = sorted(["1", "2", "3", "4", "5", "7", "8", "9", "10", "11", "12", "14", "15", "17", "19", "20"], key=int)


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(got.to(wanted.dtype), wanted)


def test_the_example_of_the_design() -> None:
    layout = BranchLayout.from_tree([3, [[5], [2]], 4])
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 8, 9, 10, 11]
    assert layout.position_ids.dtype == torch.int32
    assert (layout.total_tokens, layout.critical_path, layout.parallelism) == (14, 12, 14 / 12)
    assert layout.dense_mask()[8].nonzero().flatten().tolist() == [0, 1, 2, 8]
    assert layout.dense_mask()[10].sum() == 11


@given(trees(max_paths=3))
def test_trees_equal_the_definition(tree: list) -> None:
    layout = BranchLayout.from_tree(tree)
    layout.mask.check()
    assert same(layout.position_ids, reference.tree_positions(tree))
    assert same(layout.dense_mask(), reference.tree_mask(tree))
    assert layout.mask.visible_pairs() == int(layout.dense_mask().sum())


@given(traces())
def test_canonical_traces_equal_the_definition(ids: list[int]) -> None:
    kinds = TEST_TAGS.kinds(ids)
    for cut in (len(ids), len(ids) * 2 // 3):
        trace = parse(kinds[:cut], allow_open=True)
        layout = BranchLayout.from_token_ids(ids[:cut], TEST_TAGS, allow_open=True)
        assert same(layout.dense_mask(), reference.mask_from_enclosing(reference.trace_enclosing(trace, "canonical")))
        assert same(layout.position_ids, reference.tree_positions(trace.tree))


@given(traces())
def test_released_traces_equal_the_definition(ids: list[int]) -> None:
    kinds = TEST_TAGS.kinds(ids)
    layout = BranchLayout.from_token_ids(ids, TEST_TAGS, semantics="released")
    layout.mask.check()
    enclosing = reference.trace_enclosing(parse(kinds), "released")
    assert same(layout.dense_mask(), reference.mask_from_enclosing(enclosing))
    assert same(layout.position_ids, reference.released_positions(kinds))


@given(st.lists(trees(max_depth=2), min_size=1, max_size=3))
def test_packs_keep_documents_apart(documents: list) -> None:
    layouts = [BranchLayout.from_tree(tree) for tree in documents]
    pack = BranchLayout.pack([BranchLayout.pack(layouts[:1]), *layouts[1:]])
    pack.mask.check()
    assert same(pack.dense_mask(), reference.pack_masks([reference.tree_mask(tree) for tree in documents]))
    assert same(pack.position_ids, torch.cat([reference.tree_positions(tree) for tree in documents]))
    assert pack.cu_seqlens.tolist() == np.cumsum([0] + [layout.total_tokens for layout in layouts]).tolist()
    assert pack.longest_document == max(layout.total_tokens for layout in layouts)
    assert pack.critical_path == sum(layout.critical_path for layout in layouts)
    ids = list(range(pack.total_tokens))
    rows, targets = pack.targets(ids)
    starts = np.cumsum([0] + [layout.total_tokens for layout in layouts])
    parts = [layout.targets(ids[a:b]) for layout, a, b in zip(layouts, starts, starts[1:], strict=False)]
    assert same(rows, torch.cat([part[0] + int(start) for part, start in zip(parts, starts, strict=False)]))
    assert same(targets, torch.cat([part[1] for part in parts]))


# A trace over TEST_TAGS: text 20.. is sampled, whitespace is 12, the index `1:` is 14 16.
PARALLEL, GOAL, OUTLINE, PATH, CONCLUSION = 2, 4, 6, 8, 10
GOAL_PART = [GOAL, OUTLINE, 14, 16, OUTLINE + 1, OUTLINE, 14, 16, OUTLINE + 1, GOAL + 1]
PATHS_PART = [12, PATH, 12, 14, 16, 21, PATH + 1, 12, PATH, 12, 14, 22, PATH + 1]
TAGGED = [20, PARALLEL, 12, *GOAL_PART, *PATHS_PART, 12, CONCLUSION, 12, 13, 23, CONCLUSION + 1, 12, PARALLEL + 1, 24]


def test_labels_leave_out_what_the_engine_writes() -> None:
    layout = BranchLayout.from_token_ids(TAGGED, TEST_TAGS)
    labels = layout.labels(TAGGED).tolist()
    engine = {*range(13, 18), *range(20, 24), *range(26, 29)}  # the second path's index has no colon of its own
    assert labels == [-100 if i in engine or i == 0 else token for i, token in enumerate(TAGGED)]
    with_prompt = BranchLayout.from_token_ids(TAGGED, TEST_TAGS, prompt_length=4).labels(TAGGED).tolist()
    assert with_prompt == [-100] * 4 + labels[4:]
    assert layout.labels(torch.tensor(TAGGED)).dtype == torch.int64


def test_the_shift_by_one_and_targets_agree_on_tagged_traces() -> None:
    layout = BranchLayout.from_token_ids(TAGGED, TEST_TAGS)
    shifted = layout.labels(TAGGED)[1:]
    rows, targets = layout.targets(TAGGED)
    assert rows.tolist() == (shifted != -100).nonzero().flatten().tolist()
    assert targets.tolist() == shifted[shifted != -100].tolist()


def test_targets_of_an_open_tree_start_each_path_at_the_trunk() -> None:
    layout = BranchLayout.from_tree([3, [[2], [1], []]])
    rows, targets = layout.targets([10, 11, 12, 20, 21, 30])
    assert list(zip(rows.tolist(), targets.tolist(), strict=True)) == [(0, 11), (1, 12), (2, 20), (3, 21), (2, 30)]
    assert layout.labels([10, 11, 12, 20, 21, 30]).tolist() == [-100, 11, 12, 20, 21, -100]
    joined = BranchLayout.from_tree([1, [[1], [1]], 1, [[1]], 1])
    assert joined.targets([0, 1, 2, 3, 4, 5])[0].tolist() == [0, 0, 3, 4]  # token 3 has two predecessors, so none


def test_to_keeps_the_memory_of_derived_data() -> None:
    layout = BranchLayout.causal(5)
    calls = []
    for _ in range(2):
        layout.to("cpu").cached("plan", lambda: calls.append(1))
    assert calls == [1]


def many_gaps() -> BranchLayout:
    """A layout that says that it has 2**30 gaps; they are two numbers in memory."""
    layout = BranchLayout.causal(3)
    gaps = np.broadcast_to(np.zeros(2, dtype=np.int32), (2**30, 2))
    return replace(layout, mask=replace(layout.mask, gaps=gaps), _made=layout._table)


def endless_tree() -> list:
    """A path that holds its own block."""
    tree: list = []
    tree.append([tree])
    return tree


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BranchLayout.from_tree([-1]), "expected a text length >= 0, got -1"),
        (lambda: BranchLayout.from_tree([3, [], 4]), r"expected a text length or a block .* got \[\]"),
        (lambda: BranchLayout.from_tree([3, [4]]), r"expected a sequence .* got 4"),
        (lambda: BranchLayout.from_tree(["a"]), "expected a text length or a block .* got 'a'"),
        (lambda: BranchLayout.from_tree(7), "expected a sequence"),
        (lambda: BranchLayout.from_tree([2], sampled=[True]), r"expected 2 booleans"),
        (lambda: BranchLayout.pack([]), "expected at least one layout"),
        (lambda: BranchLayout.causal(3).labels([1, 2]), r"expected shape \[3\].*got shape \[2\]"),
        (lambda: BranchLayout.from_token_ids([20], TEST_TAGS, semantics="other"), "semantics: expected one of"),
        (lambda: BranchLayout.from_token_ids([20], TEST_TAGS, prompt_length=2), "prompt_length: expected 0 to 1"),
        (lambda: BranchLayout.from_token_ids(torch.zeros(1, 2), TEST_TAGS), r"expected token ids of shape \[T\]"),
        (lambda: TagTokens(ids=(1, 2)), "expected 12 different tag ids"),
        (
            lambda: BranchLayout.causal(2**16 + 1).dense_mask(),
            "dense_mask: expected at most 65536 tokens, .* got 65537",
        ),
        (lambda: BranchLayout.pack([many_gaps()] * 2), rf"pack: expected fewer than 2\*\*31 gaps in all, got {2**31}"),
        (lambda: BranchLayout.from_tree(endless_tree()), "tree: expected blocks nested at most 131072 deep"),
    ],
)
def test_bad_arguments_say_what_was_expected(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_malformed_ids_raise_a_grammar_error() -> None:
    with pytest.raises(GrammarError, match="token 1: expected <Goal>, found text"):
        BranchLayout.from_token_ids([PARALLEL, 20], TEST_TAGS)


def test_layouts_of_nothing() -> None:
    empty = BranchLayout.causal(0)
    assert (empty.total_tokens, empty.critical_path, empty.parallelism) == (0, 0, 1.0)
    assert empty.dense_mask().shape == (0, 0)
    assert BranchLayout.pack([empty, BranchLayout.causal(2)]).cu_seqlens.tolist() == [0, 0, 2]


def test_depth_has_no_limit() -> None:
    tree: list = [1]
    for _ in range(3000):
        tree = [1, [tree], 1]
    layout = BranchLayout.from_tree(tree)
    assert layout.critical_path == layout.total_tokens == 6001


def nested(depth: int) -> list:
    """Two paths at each level, the second one with the next level in it."""
    tree: list = [1]
    for _ in range(depth):
        tree = [1, [[1], tree], 1]
    return tree


def wide(paths: int) -> list[int]:
    """One block, with a visible newline between its paths."""
    outlines, bodies = [OUTLINE, 20, OUTLINE + 1] * paths, [12, PATH, 20, PATH + 1] * paths
    return [20, PARALLEL, GOAL, *outlines, GOAL + 1, *bodies, 12, CONCLUSION, 20, CONCLUSION + 1, PARALLEL + 1, 20]


@pytest.mark.parametrize(
    "build",
    [
        lambda: BranchLayout.from_token_ids(wide(8000), TEST_TAGS, semantics="released"),
        lambda: BranchLayout.from_tree(nested(10_000)),
        lambda: BranchLayout.from_tree([1, *[[[1]] * 2] * 10, *nested(20_000)]),
    ],
    ids=["released", "deep", "deeper"],
)
def test_masks_that_grow_with_the_square_are_refused_before_memory_is_taken(build) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"expected a mask of at most 4194304 gaps, got more by token \d+"):
            build()
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_gaps_of_many_paths() -> None:
    """Path k sees none of the k paths before it: their spans one by one, or as one interval."""
    paths = 300
    released = BranchLayout.from_token_ids(wide(paths), TEST_TAGS, semantics="released").mask
    released.check()
    assert len(released.gaps) == paths * (paths - 1) // 2
    start = 3 + 3 * paths + 1  # behind the goal
    last = released.gaps[-(paths - 1) :]
    assert last.tolist() == [[start + 1 + 4 * k, start + 4 + 4 * k] for k in range(paths - 1)]
    canonical = BranchLayout.from_token_ids(wide(paths), TEST_TAGS).mask
    assert canonical.gaps.tolist() == [[start, start + 4 * k] for k in range(1, paths)]


@pytest.fixture(scope="session")
def qwen_tags(data_dir: Path) -> TagTokens:
    transformers = pytest.importorskip("transformers")
    file = data_dir / "qwen2.5_tokenizer" / "tokenizer.json"
    return TagTokens.from_tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_file=str(file)))


@pytest.mark.real_data
@pytest.mark.parametrize("name", REAL)
def test_published_traces(name: str, data_dir: Path, qwen_tags: TagTokens) -> None:
    """Released layouts equal what the released code computes, exactly; canonical layouts equal the definition."""
    facts = json.loads((data_dir / "released_layout" / f"{name}.json").read_text())
    ids = facts["tokens"]
    released = BranchLayout.from_token_ids(ids, qwen_tags, semantics="released")
    mask = released.dense_mask().numpy()
    assert released.position_ids.tolist() == facts["position_ids"]
    assert mask.sum(1).tolist() == facts["visible_keys_per_row"]
    assert hashlib.sha256(np.packbits(mask).tobytes()).hexdigest() == facts["mask_sha256"]

    canonical = BranchLayout.from_token_ids(ids, qwen_tags)
    trace = parse(qwen_tags.kinds(ids))
    assert same(canonical.position_ids, reference.tree_positions(trace.tree))
    enclosing = reference.trace_enclosing(trace, "canonical")
    got = canonical.dense_mask()
    for row in range(0, len(ids), 211):  # every row pair by pair would take minutes
        inside = enclosing[row]
        wanted = [
            key <= row and all(inside.get(block, path) == path for block, path in enclosing[key].items())
            for key in range(len(ids))
        ]
        assert got[row].tolist() == wanted

    text = (data_dir / "multiverse_1k" / f"{name}.xml").read_text()
    encoded = qwen_tags.encode(text)
    assert qwen_tags.tokenizer.decode(encoded) == text
    assert BranchLayout.from_token_ids(encoded, qwen_tags).critical_path == canonical.critical_path


def test_lengths_from_numpy():
    tree = [np.int64(3), [[np.int32(2)], [np.uint8(4)]], np.int64(1)]
    layout = BranchLayout.from_tree(tree)
    assert layout.position_ids.tolist() == BranchLayout.from_tree([3, [[2], [4]], 1]).position_ids.tolist()
    assert BranchLayout.causal(np.int64(3)).total_tokens == 3


def test_more_tokens_than_int32_counts():
    with pytest.raises(ValueError, match=f"expected at most {2**31 - 1} tokens, got {2**31}"):
        BranchLayout.from_tree([5, [[2**31 - 5], [1]]])


def test_a_pack_of_what_is_no_list():
    assert BranchLayout.pack(BranchLayout.causal(n) for n in (2, 3)).cu_seqlens.tolist() == [0, 2, 5]
