"""patch_model: four families of transformers decoders compute the branch attention of the layout, and nothing else
changes.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from mvkernels import BackendError, BranchLayout, PagedKVCache, patch_model, unpatch_model
from mvkernels.hf import ATTENTION_NAME, is_patched

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
TREE = [5, [[4, [[3], [2], []], 2], [7], [1]], 6]


def make(family: str, **changes: object):
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    return model(config(**{**SIZES, **changes})).eval()


def ids_of(tokens: int) -> torch.Tensor:
    return torch.randint(0, 61, (1, tokens), generator=torch.Generator().manual_seed(1))


def dense_logits(model, ids: torch.Tensor, layout: BranchLayout) -> torch.Tensor:
    """The unpatched model with an explicit mask: transformers hands a 4-D mask through."""
    positions = layout.position_ids[None].long()
    return model(ids, position_ids=positions, attention_mask=dense(layout), use_cache=False).logits


def dense(layout: BranchLayout) -> torch.Tensor:
    return layout.dense_mask()[None, None]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_forward_and_gradients_equal_the_dense_mask(family: str) -> None:
    model = make(family)
    layout = BranchLayout.pack([BranchLayout.from_tree(TREE), BranchLayout.causal(7)])
    ids = ids_of(layout.total_tokens)
    weights = torch.randn(layout.total_tokens, 61, generator=torch.Generator().manual_seed(2))

    def run(logits: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        (logits[0] * weights).sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters()]

    wanted, wanted_grads = run(dense_logits(model, ids, layout))
    patch_model(model)
    got, got_grads = run(model(ids, position_ids=layout.position_ids[None], branch_layout=layout).logits)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    # Positions come from the layout where none are given, and the base model alone may be called.
    torch.testing.assert_close(model(ids, branch_layout=layout).logits, got, rtol=0, atol=0)
    hidden = model.model(input_ids=ids, branch_layout=layout).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), got, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_decoding_equals_the_packed_forward(family: str) -> None:
    model = patch_model(make(family))
    layout = BranchLayout.from_tree([5, [[3], [2]], 2])
    ids = ids_of(12)
    with torch.no_grad():
        wanted = model(ids, branch_layout=layout).logits[0]
        cache = PagedKVCache(16, 3, 2, 2, 8)
        trunk = cache.new()

        def step(*entries: tuple) -> torch.Tensor:
            """(branch, first row, end) each; returns the logits of those rows."""
            planned = cache.plan([(branch, end - first) for branch, first, end in entries])
            rows = torch.cat([torch.arange(first, end) for _, first, end in entries])
            assert planned.positions.tolist() == layout.position_ids[rows].tolist()
            logits = model(ids[:, rows], position_ids=planned.positions[None], paged_kv=(cache, planned)).logits[0]
            cache.commit(planned)
            torch.testing.assert_close(logits, wanted[rows], rtol=1e-4, atol=1e-5)
            return logits

        step((trunk, 0, 4))
        children = cache.fork(trunk, 2)
        step((trunk, 4, 5), (children[0], 5, 7), (children[1], 8, 9))
        cache.merge(trunk, children)
        step((children[0], 7, 8), (children[1], 9, 10), (trunk, 10, 11))
        step((trunk, 11, 12))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_layout_nothing_changes(family: str) -> None:
    plain = make(family)
    patched = patch_model(copy.deepcopy(plain))
    ids = ids_of(9)
    padded = torch.ones(2, 9, dtype=torch.long)
    padded[1, :3] = 0
    batch = ids.expand(2, -1)
    assert torch.equal(patched(ids).logits, plain(ids).logits)
    assert torch.equal(patched(batch, attention_mask=padded).logits, plain(batch, attention_mask=padded).logits)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(patched.generate(ids, **arguments), plain.generate(ids, **arguments))


def test_unpatch_restores_the_model() -> None:
    model = make("qwen2")
    before = (model.config._attn_implementation, dict(model.model._forward_pre_hooks))
    assert patch_model(model) is model and is_patched(model)
    patch_model(model, backend="reference")  # twice is once
    assert len(model.model._forward_pre_hooks) == 1
    assert unpatch_model(model) is model and not is_patched(model)
    assert (model.config._attn_implementation, dict(model.model._forward_pre_hooks)) == before
    with pytest.raises(ValueError, match="expected a model patched by patch_model"):
        unpatch_model(model)


def test_the_backend_is_the_one_asked_for() -> None:
    layout = BranchLayout.from_tree(TREE)
    ids = ids_of(layout.total_tokens)
    model = patch_model(make("llama"), backend="reference")
    wanted = model(ids, branch_layout=layout).logits
    torch.testing.assert_close(
        patch_model(model, "cpu")(ids, branch_layout=layout).logits, wanted, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"expected one of .* got 'fastest'"):
        patch_model(model, "fastest")(ids, branch_layout=layout)


def test_under_autocast_queries_keys_and_values_get_one_dtype() -> None:
    """Rotation leaves queries and keys in fp32 there, beside values in bf16."""
    layout = BranchLayout.from_tree(TREE)
    ids = ids_of(layout.total_tokens)
    model = make("qwen2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = dense_logits(model, ids, layout)
        patch_model(model)
        found = model(ids, branch_layout=layout, use_cache=False).logits
    exact = dense_logits(unpatch_model(model), ids, layout)
    assert (found.float() - exact).abs().max() <= 2 * (expected.float() - exact).abs().max() + 1e-3


def test_paged_decoding_under_autocast_keeps_the_dtype_of_the_cache() -> None:
    model = patch_model(make("qwen2"))
    config = model.config
    heads, depth = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache = PagedKVCache(4, 16, config.num_hidden_layers, heads, depth)
    ids = ids_of(20)
    step = cache.plan([(cache.new(), 20)])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids, paged_kv=(cache, step)).logits
        expected = model(ids, branch_layout=BranchLayout.causal(20)).logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = patch_model(make("qwen2")).train()
    layout = BranchLayout.from_tree(TREE)
    ids = ids_of(layout.total_tokens)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, branch_layout=layout, labels=layout.labels(ids[0])[None]).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for mine, theirs in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_no_mask_of_the_sequence_squared_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(make("qwen2"))
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, ATTENTION_NAME, None)
    monkeypatch.setattr(BranchLayout, "dense_mask", None)
    layout = BranchLayout.pack([BranchLayout.from_tree(TREE)] * 2)
    model(ids_of(layout.total_tokens), branch_layout=layout)
    with pytest.raises(TypeError, match="not callable"):
        model(ids_of(9), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))  # here transformers does build one


LAYOUT = BranchLayout.causal(4)
BRANCHED = BranchLayout.from_tree([2, [[1], [2]], 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"input_ids": ids_of(5), "branch_layout": LAYOUT}, r"expected inputs of shape \[1, 4\] .* got \[1, 5\]"),
        ({"input_ids": ids_of(4).expand(2, -1), "branch_layout": LAYOUT}, r"BranchLayout.pack\), got \[2, 4\]"),
        ({"input_ids": ids_of(4), "branch_layout": LAYOUT, "position_ids": torch.arange(4)}, r"got \[4\]"),
        ({"input_ids": ids_of(4), "branch_layout": LAYOUT, "attention_mask": torch.ones(1, 4)}, "no attention_mask"),
        ({"input_ids": ids_of(4), "branch_layout": LAYOUT, "use_cache": True}, "use_cache=False"),
        ({"input_ids": ids_of(4), "branch_layout": "wide"}, "expected a BranchLayout, got str"),
        ({"input_ids": ids_of(4), "paged_kv": LAYOUT}, r"expected \(PagedKVCache, Step\)"),
        ({"input_ids": ids_of(4), "paged_kv": 1, "branch_layout": LAYOUT}, "got both"),
        ({"input_ids": ids_of(4)[0], "branch_layout": LAYOUT}, r"input_ids: expected .* \[1, T\], got Tensor \[4\]"),
        ({"input_ids": ids_of(4).numpy(), "branch_layout": LAYOUT}, r"input_ids: expected a tensor .* got ndarray"),
        ({"inputs_embeds": torch.ones(4, 32), "branch_layout": LAYOUT}, r"inputs_embeds: expected .* \[1, T, hidden\]"),
        ({"branch_layout": LAYOUT}, "expected input_ids or inputs_embeds, got neither"),
        ({"input_ids": ids_of(4), "branch_layout": LAYOUT, "cache": DynamicCache()}, "got a cache"),
        (
            {"input_ids": ids_of(4), "batch_invariant": True},
            "expected batch_invariant=True beside paged_kv=, .* nothing",
        ),
        ({"input_ids": ids_of(4), "branch_layouts": LAYOUT}, "got branch_layouts=; the nearest one is branch_layout="),
        ({"input_ids": ids_of(4), "paged_kvs": 1}, "got paged_kvs=; the nearest one is paged_kv="),
        ({"input_ids": ids_of(4), "branch_layout": LAYOUT, "batch_invarient": True}, "nearest one is batch_invariant="),
        (
            {"input_ids": ids_of(7), "position_ids": BRANCHED.position_ids[None]},
            "neither branch_layout= .* got 2 after 2",
        ),
        (
            {
                "input_ids": ids_of(7),
                "position_ids": BRANCHED.position_ids[None],
                "attention_mask": torch.ones(1, 7, dtype=torch.long),
            },
            "position_ids: expected positions that go up by one or restart at 0",
        ),
        (
            {"input_ids": ids_of(14).view(2, 7), "position_ids": torch.stack([torch.arange(7), BRANCHED.position_ids])},
            "got 2 after 2",
        ),
        (
            {"input_ids": ids_of(6), "position_ids": BranchLayout.from_tree([[[3], [2]], 1]).position_ids[None]},
            "got 3 after 1",
        ),
    ],
)
def test_bad_calls_say_what_was_expected(call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_model(make("qwen2"))(**call)


def test_positional_arguments_are_read_like_keywords() -> None:
    model = patch_model(make("qwen2"))
    ids, positions = ids_of(7), BRANCHED.position_ids[None]
    with torch.no_grad():
        wanted = model(ids, branch_layout=BRANCHED).logits
        assert torch.equal(model(ids, None, positions, branch_layout=BRANCHED).logits, wanted)
        hidden = model.model(ids, None, positions, branch_layout=BRANCHED).last_hidden_state
        assert torch.equal(model.lm_head(hidden), wanted)
        with pytest.raises(ValueError, match="got 2 after 2"):
            model.model(ids, None, positions)
        with pytest.raises(ValueError, match="no attention_mask"):
            model.model(ids, torch.ones(1, 7), positions, branch_layout=BRANCHED)
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds, branch_layout=BRANCHED).logits, wanted)


def test_what_transformers_passes_is_accepted() -> None:
    """Padding, packed documents, chunks behind a cache, and every keyword that transformers' own code passes."""
    plain = make("qwen2")
    patched = patch_model(copy.deepcopy(plain))
    ids = ids_of(8).view(2, 4)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    left = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # 1, 1, 0, 1
    labels = {"labels": ids, "num_items_in_batch": torch.tensor(6), "shift_labels": ids}
    sizes = torch.tensor([0, 3, 8], dtype=torch.int32)
    flash = {"cu_seq_lens_q": sizes, "cu_seq_lens_k": sizes, "max_length_q": 5, "max_length_k": 5}
    documents = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    calls = [
        {"input_ids": ids, "attention_mask": mask, "position_ids": left},
        {"input_ids": ids_of(8), "position_ids": documents, **flash},
        {"input_ids": ids, "output_hidden_states": True, "output_attentions": False, "return_dict": True},
        {"input_ids": ids, "logits_to_keep": 1, "cache_position": torch.arange(4), "use_cache": False},
        {"input_ids": ids, **labels},
        {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "is_causal": True},
        {"input_ids": ids, "position_ids": torch.arange(5, 9)[None]},
        {"input_ids": ids_of(7), "position_ids": BRANCHED.position_ids[None].long(), "attention_mask": dense(BRANCHED)},
    ]
    with torch.no_grad():
        for call in calls:
            assert torch.equal(patched(**call).logits, plain(**call).logits)
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    lookup = {"prompt_lookup_num_tokens": 2, "attention_mask": mask[1:]}
    for rows, more in ((ids, {}), (ids, {"num_beams": 2}), (ids[1:], lookup)):
        given = {**arguments, **more}
        assert torch.equal(patched.generate(rows, **given), plain.generate(rows, **given))


def test_a_model_whose_attention_was_set_since_is_refused() -> None:
    model = patch_model(make("qwen2"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention was set to 'sdpa' since then: patch it again"):
        model(ids_of(4), branch_layout=LAYOUT)
    assert patch_model(model)(ids_of(4), branch_layout=LAYOUT).logits.isfinite().all()


def test_spare_rows_of_embeddings() -> None:
    """Rows were counted by the last dimension, which of embeddings is the hidden size."""
    model, ids = patch_model(make("qwen2")), ids_of(6)
    logits = []
    for given in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        cache = PagedKVCache(4, 4, 2, 2, 8)
        step = cache.plan([(cache.new(), 4)])
        with torch.no_grad():
            logits.append(model(**given, paged_kv=(cache, step), batch_invariant=True).logits[0, :4])
    assert torch.equal(*logits)


def test_models_with_other_attention_are_refused_by_name() -> None:
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES))
    with pytest.raises(BackendError, match="softcap"):
        patch_model(gemma)
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel, got Linear"):
        patch_model(torch.nn.Linear(2, 2))
    model = patch_model(make("qwen2", attention_dropout=0.1)).train()
    with pytest.raises(BackendError, match=r"no attention dropout, got 0\.1"):
        model(ids_of(4), branch_layout=LAYOUT)


def test_a_sliding_window_is_accepted_until_it_is_exceeded() -> None:
    model = patch_model(make("mistral", sliding_window=6))
    model(ids_of(6), branch_layout=BranchLayout.causal(6))
    two = BranchLayout.pack([BranchLayout.causal(6)] * 2)
    model(ids_of(12), branch_layout=two)
    with pytest.raises(BackendError, match="sliding window of 6 tokens, got 7"):
        model(ids_of(7), branch_layout=BranchLayout.causal(7))
    cache = PagedKVCache(4, 4, 2, 2, 8)
    step = cache.plan([(cache.new(), 7)])
    with pytest.raises(BackendError, match="sliding window of 6 tokens, got 7"):
        model(ids_of(7), paged_kv=(cache, step))


def test_a_patched_model_can_be_pickled():
    model = patch_model(Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval())
    layout = BranchLayout.from_tree([3, [[4], [2]], 2])
    ids = torch.arange(11)[None]
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(ids, branch_layout=layout).logits, model(ids, branch_layout=layout).logits)
    unpatch_model(again)
    assert is_patched(model) and not is_patched(again)
