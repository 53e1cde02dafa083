"""Wrong Python inputs at every public name get one line that says what was expected and what came; reprs are short."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mvkernels as mk
from mvkernels.decode import decode_path
from mvkernels.model import Engine, Generation, GenerationConfig
from mvkernels.model.engine.output.events import FinishEvent
from tests.support.tiny_model import tiny_model, tiny_tokenizer
from tests.support.trees import TEST_TAGS

IDS, ARRAY = torch.arange(7), np.zeros((4, 1, 8), np.float32)
Q = torch.zeros(4, 1, 8)
LAYOUT = mk.BranchLayout.causal(4)
ROPE = mk.Rope(torch.ones(4))
INT = torch.zeros(1, dtype=torch.int32)


def cache() -> mk.PagedKVCache:
    return mk.PagedKVCache(4, 4, 1, 1, 8)


def stepped():
    made = cache()
    return made, made.plan([(made.new(), 4)])


def decode(q=Q, k=None, step=None):
    made, planned = stepped()
    return mk.tree_decode(q, made.k[0] if k is None else k, made.v[0], planned if step is None else step)


def append(*rows):
    made, planned = stepped()
    made.append(0, *rows, planned)


def graph(**changes):
    model = mk.patch_model(tiny_model())
    made = mk.PagedKVCache(4, 4, 2, 2, 16)
    return mk.DecodeGraph(**{"model": model, "cache": made, **changes}), made


def run_graph(ids):
    made, kept = graph()
    return made.run([kept.new()], ids)


def ask(prompts="so", **changes):
    return Engine(tiny_model(), tiny_tokenizer()).generate(prompts, **changes)


from_ids, attention, tables = mk.BranchLayout.from_token_ids, mk.multiverse_attention, mk.BranchTables
CUDA = "cuda:99"  # there is none, with or without GPUs
WRONG = [
    (lambda: from_ids([1], None), "tags: expected a TagTokens, got None"),
    (lambda: from_ids(["a", "b"], TEST_TAGS), "ids: expected integers, .* got 'a' among them"),
    (lambda: from_ids("ab", TEST_TAGS), "ids: expected integers, .* got str"),
    (lambda: from_ids(None, TEST_TAGS), "ids: expected integers, .* got None"),
    (lambda: from_ids([1.5], TEST_TAGS), "got 1.5 among them"),
    (lambda: from_ids(torch.ones(3), TEST_TAGS), r"got Tensor \[3\] torch.float32"),
    (lambda: from_ids([20, -1], TEST_TAGS), "expected token ids of at least 0, got -1"),
    (lambda: from_ids(IDS[None], TEST_TAGS), r"expected token ids of shape \[T\], got shape \(1, 7\)"),
    (lambda: from_ids([20], TEST_TAGS, prompt_length="1"), "prompt_length: expected an integer, got '1'"),
    (lambda: mk.BranchLayout.from_tree(None), "tree: expected a sequence .* got None"),
    (lambda: mk.BranchLayout.causal("5"), "tree: expected a text length or a block .* got '5'"),
    (lambda: mk.BranchLayout.pack([IDS]), r"pack: expected BranchLayouts, got Tensor \[7\] torch.int64 among them"),
    (lambda: mk.BranchLayout.pack(None), "pack: expected a list of BranchLayouts, got None"),
    (lambda: LAYOUT.to(CUDA), "device: expected a device that PyTorch has here, got 'cuda:99'"),
    (lambda: LAYOUT.to("gpu"), "device: expected a device that PyTorch has here, got 'gpu'"),
    (lambda: LAYOUT.to(None), "device: expected a device that PyTorch has here, got None"),
    (lambda: LAYOUT.labels(["a"] * 4), "ids: expected integers, .* got 'a' among them"),
    (lambda: LAYOUT.targets(torch.ones(4)), r"ids: expected integers, got Tensor \[4\] torch.float32"),
    (lambda: mk.TagTokens.from_tokenizer(None), "tokenizer: expected a transformers tokenizer, .* got None"),
    (lambda: mk.TagTokens.from_tokenizer("qwen"), "tokenizer: expected .* got str"),
    (lambda: mk.TagTokens.from_tokenizer(tiny_tokenizer(tags=False)), "without <Think> </Think>"),
    (lambda: mk.TagTokens(None), "expected 12 tag ids, integers of at least 0, got None"),
    (lambda: mk.TagTokens(tuple(range(-1, 11))), "expected 12 tag ids, integers of at least 0"),
    (lambda: attention(ARRAY, Q, Q, LAYOUT), r"q: expected a Tensor, got ndarray \[4, 1, 8\] float32"),
    (lambda: attention(Q, None, Q, LAYOUT), "k: expected a Tensor, got None"),
    (lambda: attention(Q, Q, Q, None), "layout: expected a BranchLayout, got NoneType"),
    (lambda: attention(Q.long(), Q, Q, LAYOUT), "q: expected a floating dtype, got torch.int64"),
    (lambda: attention(Q, Q, Q, mk.BranchLayout.causal(5)), "expected q of the layout's 5 tokens, got 4"),
    (lambda: attention(Q.to("meta"), Q, Q, LAYOUT), "expected q, k and v on one device, got meta, cpu and cpu"),
    (lambda: mk.PagedKVCache("4", 4, 1, 1, 8), "expected num_pages, .* as integers, got '4'"),
    (lambda: mk.PagedKVCache(4, 4, 1, 1, 8, torch.int64), "dtype: expected a floating torch.dtype, got torch.int64"),
    (lambda: mk.PagedKVCache(4, 4, 1, 1, 8, "float32"), "dtype: expected a floating torch.dtype, got 'float32'"),
    (
        lambda: mk.PagedKVCache(4, 4, 1, 1, 8, device=CUDA),
        "device: expected a device that PyTorch has here, got 'cuda:99'",
    ),
    (lambda: cache().fork(None, 1), "branch: expected a Branch, got None"),
    (lambda: (made := cache()).fork(made.new(), 1.5), "fork: expected an integer count, got 1.5"),
    (lambda: (made := cache()).plan([made.new()]), r"plan: expected \(branch, number of tokens\) pairs, got \[Branch"),
    (lambda: (made := cache()).plan([(made.new(), "3")]), "plan: expected integer numbers of tokens"),
    (lambda: (made := cache()).fork_at(made.new(), None), "fork_at: expected an integer number of tokens, got None"),
    (lambda: (made := cache()).truncate(made.new(), 0.5), "truncate: expected an integer number of tokens, got 0.5"),
    (lambda: cache().commit(None), "step: expected a Step of PagedKVCache.plan, got None"),
    (lambda: append(ARRAY, Q), r"k_new: expected a Tensor, got ndarray \[4, 1, 8\] float32"),
    (lambda: append(Q, None), "v_new: expected a Tensor, got None"),
    (lambda: decode(q=ARRAY), r"q: expected a Tensor, got ndarray \[4, 1, 8\] float32"),
    (lambda: decode(k=ARRAY), "k_layer: expected a Tensor, got ndarray"),
    (lambda: decode(step=LAYOUT), "step: expected a Step of PagedKVCache.plan, got BranchLayout"),
    (lambda: decode(q=Q.to("meta")), "k_layer: expected q's device meta, got cpu"),
    (lambda: decode_path(Q, Q, Q, None), "step: expected a Step of PagedKVCache.plan, got None"),
    (lambda: mk.Rope([1.0]), r"inv_freq: expected a tensor \[H\] torch.float32, got list"),
    (lambda: mk.Rope.from_config(None), "config: expected a transformers model config, got None"),
    (lambda: ROPE.to(CUDA), "device: expected a device that PyTorch has here, got 'cuda:99'"),
    (lambda: mk.rotate(ARRAY, IDS[:4], ROPE), "x: expected a Tensor, got ndarray"),
    (lambda: mk.rotate(Q, [0, 1, 2, 3], ROPE), "positions: expected a Tensor, got list"),
    (lambda: mk.rotate(Q, IDS[:4], None), "rope: expected a Rope, got None"),
    (lambda: tables([1], [1], [1], [1], [1]), "pages: expected a tensor, got list"),
    (lambda: tables.empty(2, 2, CUDA), "device: expected a device that PyTorch has here, got 'cuda:99'"),
    (lambda: mk.merge_branches(None, INT, INT, INT), "tables: expected BranchTables, got NoneType"),
    (lambda: mk.merge_branches(tables.empty(2, 2), [0], INT, INT), "parents: expected a tensor .* got list"),
    (lambda: mk.merge_branches(tables.empty(2, 2), INT, INT, [0, 1]), "child_ptr: expected a tensor, got list"),
    (lambda: mk.patch_model("qwen"), "patch_model: expected a transformers PreTrainedModel, got str"),
    (lambda: mk.unpatch_model(None), "expected a model patched by patch_model, got an unpatched NoneType"),
    (lambda: graph(model=None), "model: expected a model patched by patch_model, got NoneType"),
    (lambda: graph(cache=None), "cache: expected a PagedKVCache, got None"),
    (lambda: graph(reserve="4"), "reserve: expected an integer number of tokens, got '4'"),
    (lambda: run_graph(["a"]), r"token_ids: expected integers, got \['a'\]"),
    (lambda: run_graph([-1]), "token_ids: expected ids from 0 to 299, got -1"),
    (lambda: run_graph(IDS[None]), r"token_ids: expected \[T\] int64 or int32, got torch.int64 of shape \[1, 7\]"),
    (lambda: Engine(None, tiny_tokenizer()), "model: expected a transformers PreTrainedModel, got NoneType"),
    (lambda: Engine(tiny_model(), None), "tokenizer: expected a transformers tokenizer, .* got None"),
    (lambda: Engine(tiny_model(), tiny_tokenizer(), page_size="16"), "page_size: expected an integer, got '16'"),
    (lambda: Engine(tiny_model(), tiny_tokenizer(), page_size=None), "page_size: expected an integer, got None"),
    (lambda: Engine(tiny_model(), tiny_tokenizer(), num_pages=1.5), "num_pages: expected an integer, got 1.5"),
    (lambda: Engine(tiny_model(), tiny_tokenizer(), max_requests="2"), "max_requests: expected an integer, got '2'"),
    (lambda: ask(config="x"), "config: expected a GenerationConfig, one or one a prompt, got 'x'"),
    (lambda: ask(config=[None]), "config: expected a GenerationConfig, one or one a prompt, got None"),
    (lambda: ask(config=5), "config: expected a GenerationConfig, one or one a prompt, got 5"),
    (lambda: ask(n="2"), "n: expected an integer, got '2'"),
    (lambda: ask(n=None), "n: expected an integer, got None"),
    (lambda: ask("\ud800"), r"prompt: expected Unicode text, got half a surrogate pair, '\\ud800'"),
    (lambda: ask(b"so"), "prompts: expected texts, chats or lists of token ids, got 115"),
    (lambda: ask([True, False]), "prompts: expected texts, chats or lists of token ids, got True"),
    (lambda: ask(IDS[None]), r"prompts: expected a text, .* got Tensor \[1, 7\] torch.int64"),
    (lambda: ask([IDS[None]]), r"prompts: expected texts, .* got Tensor \[1, 7\] torch.int64"),
    (lambda: ask(sampler=lambda views, logits: ["a"]), r"sampler: expected token ids, .* got \['a'\]"),
    (lambda: ask(sampler=lambda views, logits: [1.5]), r"sampler: expected token ids, .* got \[1.5\]"),
    (lambda: ask(sampler=lambda views, logits: None), "sampler: expected token ids, .* got None"),
    (lambda: GenerationConfig(max_new_tokens="5"), "max_new_tokens: expected an integer, got '5'"),
    (lambda: GenerationConfig(max_new_tokens=None), "max_new_tokens: expected an integer, got None"),
    (lambda: GenerationConfig(max_seconds="1"), "max_seconds: expected a number, or None, got '1'"),
    (lambda: GenerationConfig(temperature=True), "temperature: expected a number, got True"),
    (lambda: GenerationConfig(grammar="no"), "grammar: expected True or False, got 'no'"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_inputs_say_what_was_expected_and_what_came(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_reprs_are_one_line_with_the_figures_that_matter() -> None:
    layout = mk.BranchLayout.from_tree([3, [[5], [2]], 4])
    made, planned = stepped()
    [branch] = [entry[0] for entry in planned.entries]
    generation = Generation(
        "a" * 50, [1] * 14, layout, 3, "stop", 11, 9, 10, [], [3, [[5], [2]], 4], ["a"] * 11, [1] * 11
    )
    model = tiny_model()
    engine = Engine(model, tiny_tokenizer())
    told = {
        layout: "BranchLayout(14 tokens, 1 document, critical path 12, parallelism 1.17, cpu)",
        branch: "Branch(1, 0 tokens, next position 0)",
        planned: "Step(4 rows of 1 branch, open)",
        made: "PagedKVCache(4 pages of 4 tokens, 3 free, 1 branches, 1 layers, cpu)",
        ROPE: "Rope(4 frequencies, scaling 1, cpu)",
        tables.empty(2, 3): "BranchTables(2 branches, 3 pages each, cpu)",
        TEST_TAGS: "TagTokens(tags 0 .. 11, ",
        graph()[0]: "DecodeGraph(Qwen2ForCausalLM, eager, 0 graphs, reserve 64, cpu)",
        engine: f"Engine(Qwen2ForCausalLM of {model.num_parameters()} parameters, torch.float32, cpu, parallel)",
        GenerationConfig(seed=3, stop=("x",)): "GenerationConfig(seed=3, stop=('x',))",
    }
    for value, wanted in told.items():
        assert repr(value).startswith(wanted) and "\n" not in repr(value) and len(repr(value)) < 160
    wanted = f"Generation('{'a' * 37}...', 11 tokens, critical path 9, parallelism 1.22, 'stop', 0 warnings)"
    assert repr(generation) == wanted
    assert repr(FinishEvent(0, generation)) == f"FinishEvent(request=0, generation={wanted})"
    made.commit(planned)
    made.free(branch)
    assert (repr(branch), repr(planned)) == ("Branch(1, gone)", "Step(4 rows of 1 branch, committed)")
