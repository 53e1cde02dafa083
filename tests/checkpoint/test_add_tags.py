"""add_tags: what becomes of a model and a tokenizer that have no control tags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from mvkernels.grammar import TAGS
from mvkernels.model.checkpoint.add_tags import add_tags, add_tags_to_checkpoint, read_entry
from mvkernels.model.checkpoint.loading import load_checkpoint
from tests.test_files import full_disk


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_model(rows: int, tied: bool) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rows", [256, 300], ids=["exact", "padded"])
def test_new_rows_are_the_mean_of_the_bare_word_but_no_two_are_equal(rows: int, tied: bool) -> None:
    model, tokenizer = make_model(rows, tied), make_tokenizer()
    old = [table.weight.detach().clone() for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    tags = add_tags(model, tokenizer, seed=3)
    assert tags.ids == tuple(range(256, 268))
    for before, table in zip(old, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        new = table.weight.detach()
        assert len(new) == {256: 320, 300: 300}[rows]
        assert torch.equal(new[:256], before[:256])
        spare = before[268:] if rows > 268 else before.mean(0).expand(52, -1)
        assert torch.allclose(new[268:], spare, atol=1e-6)
        for tag, row in zip(TAGS, tags.ids, strict=True):
            mean = before[tokenizer.encode(tag.strip("</>"))].mean(0)
            difference = (new[row] - mean).norm() / before.std() / len(mean) ** 0.5
            assert 0.002 < difference < 0.1
        assert len(torch.unique(new[list(tags.ids)], dim=0)) == 12
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert read_entry(model.config) == "canonical"


def test_the_rows_depend_on_the_seed_alone_and_a_second_call_changes_nothing() -> None:
    tables = []
    for seed in (0, 0, 1):
        model, tokenizer = make_model(256, True), make_tokenizer()
        add_tags(model, tokenizer, seed)
        tables.append(model.get_input_embeddings().weight.detach().clone())
        add_tags(model, tokenizer, seed + 5)
        assert torch.equal(model.get_input_embeddings().weight, tables[-1])
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def test_a_checkpoint_keeps_its_tags(tmp_path: Path) -> None:
    source, target = tmp_path / "base", tmp_path / "out" / "tagged"
    make_model(256, True).save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    tags = add_tags_to_checkpoint(source, target)
    assert json.loads((target / "config.json").read_text())["multiverse"] == {
        "semantics": "canonical",
        "tags": list(TAGS),
    }
    assert sorted(path.suffix for path in target.iterdir() if path.suffix != ".json") == [".safetensors"]
    assert [path.name for path in target.parent.iterdir()] == ["tagged"]
    model, tokenizer = load_checkpoint(target)
    assert tokenizer.convert_tokens_to_ids(list(TAGS)) == list(tags.ids)
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == 320
    assert tokenizer.encode("a<Path>\n</Path>") == [
        *tokenizer.encode("a"),
        tags.ids[8],
        *tags.encode("\n"),
        tags.ids[9],
    ]
    with pytest.raises(ValueError, match="expected a target that does not exist or is an empty folder"):
        add_tags_to_checkpoint(source, target)


def test_the_published_dtype_is_kept(tmp_path: Path) -> None:
    """That of the weights, even where config.json names another; or the one that is asked for."""
    source = tmp_path / "base"
    make_model(256, True).bfloat16().save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    config = source / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
        target = tmp_path / str(dtype)
        add_tags_to_checkpoint(source, target, dtype=dtype)
        assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {expected}
        assert json.loads((target / "config.json").read_text())["dtype"] == str(expected).partition(".")[2]
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, got 'int8'"):
        add_tags_to_checkpoint(source, tmp_path / "other", dtype="int8")


def test_on_a_full_disk_nothing_is_left(tmp_path: Path) -> None:
    source, target = tmp_path / "base", tmp_path / "out"
    make_model(256, True).save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    with full_disk(9000), pytest.raises(OSError, match=r"File too large: .*/out'$"):
        add_tags_to_checkpoint(source, target)
    assert not target.exists() and [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_config_entry_with_other_tags_is_refused() -> None:
    model = make_model(256, True)
    assert read_entry(model.config) is None
    for entry in ({"semantics": "canonical", "tags": ["<A>"]}, {"semantics": "none", "tags": list(TAGS)}, "canonical"):
        model.config.multiverse = entry
        with pytest.raises(ValueError, match=r"config entry 'multiverse': expected semantics out of .* got"):
            read_entry(model.config)
