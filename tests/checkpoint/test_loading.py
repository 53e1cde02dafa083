"""Checkpoints: safetensors folders in one file and in several, what is refused, and that each refusal is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mvkernels.grammar import TAGS
from mvkernels.model import Engine
from mvkernels.model.checkpoint.add_tags import multiverse_entry
from mvkernels.model.checkpoint.files import published_dtype
from mvkernels.model.checkpoint.loading import load_checkpoint, load_model, load_tokenizer
from tests.engine.cases import config_for, plain
from tests.support.tiny_model import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.config.multiverse = multiverse_entry()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def expect_refusal(path: Path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Engine.from_pretrained(path, **options)
    assert "\n" not in str(caught.value)


def test_a_saved_model_generates_the_same(saved: Path) -> None:
    engine, loaded = Engine(tiny_model(), tiny_tokenizer()), Engine.from_pretrained(saved)
    config = config_for(engine, max_new_tokens=12)
    [expected] = engine.generate("the sum", config, plain(engine))
    [out] = loaded.generate("the sum", config, plain(loaded))
    assert out.token_ids == expected.token_ids and loaded.tags is not None


def test_several_files(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = Engine.from_pretrained(tmp_path)
    for name, parameter in tiny_model().named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}], ids=str)
def test_dtype_and_device(saved: Path, options: dict) -> None:
    engine = Engine.from_pretrained(saved, dtype=torch.bfloat16, page_size=8, **options)
    assert engine.model.dtype == torch.bfloat16 and engine.page_size == 8
    [out] = engine.generate("the", config_for(engine, max_new_tokens=3))
    assert out.total_tokens <= 3 and engine.cache.dtype == torch.bfloat16


def test_device_and_device_map_are_alternatives(saved: Path) -> None:
    expect_refusal(saved, "device or device_map, got both: 'cpu' and 'auto'", device="cpu", device_map="auto")


def test_no_such_path(tmp_path: Path) -> None:
    expect_refusal(tmp_path / "none", "expected a local model folder or a .gguf file, got .*none")
    (tmp_path / "file.txt").write_text("no model")
    expect_refusal(tmp_path / "file.txt", "a local model folder or a .gguf file")
    expect_refusal(tmp_path, r"config.json and \*.safetensors, got .*without")


def test_pickles_are_not_loaded(copy: Path) -> None:
    for file in copy.glob("*.safetensors"):
        file.unlink()
    torch.save(tiny_model().state_dict(), copy / "pytorch_model.bin")
    expect_refusal(copy, "pickled weights are not loaded")


def test_foreign_code_is_not_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config |= {"model_type": "unheard_of", "auto_map": code}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\n")
    expect_refusal(copy, "expected a readable causal language model")
    assert not (copy / "ran").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"expected a folder with config.json and \*.safetensors, got .*copy without config.json$"),
        (
            "tokenizer.json",
            r"a tokenizer \(tokenizer.json\), got .*copy without one: it has .*model.safetensors, token",
        ),
        ("token*", r"got .*copy without one: it has chat_template.jinja, config.json, generation_config.json, model.s"),
    ],
    ids=["config", "vocabulary", "tokenizer"],
)
def test_a_missing_file_is_named(copy: Path, missing: str, message: str) -> None:
    """Without the files of a tokenizer, transformers makes an empty one for some models, and says nothing."""
    for file in copy.glob(missing):
        file.unlink()
    expect_refusal(copy, message)
    if missing != "config.json":
        with pytest.raises(ValueError, match=message):
            load_tokenizer(copy)
        assert load_model(copy).dtype == torch.float32  # which needs none


def test_a_name_on_the_hub_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = "; `hf download Qwen/Qwen2.5-7B --local-dir Qwen2.5-7B` gets the files of a model on huggingface.co"
    for load in (load_checkpoint, load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"got Qwen/Qwen2.5-7B, which is neither; `hf") as caught:
            load("Qwen/Qwen2.5-7B")
        assert str(caught.value).endswith(how)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in (tmp_path / "a" / "b", "runs/b", "a/b/c", "nowhere"):
        with pytest.raises(ValueError, match=r"which is neither$"):
            load_checkpoint(path)


@pytest.mark.parametrize("left", [0, 100, -1], ids=["empty", "cut in the header", "cut at the end"])
def test_a_torn_file_of_weights_is_named(left: int, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    torn = sorted(tmp_path.glob("*.safetensors"))[1]
    torn.write_bytes(torn.read_bytes()[:left])
    expect_refusal(tmp_path, f"expected a whole safetensors file, got {torn}: ")
    torn.unlink()
    expect_refusal(tmp_path, f"No such file or directory: .*{torn.name}")


def test_the_published_dtype(tmp_path: Path) -> None:
    """The one that most weights have."""
    gguf = pytest.importorskip("gguf")
    saved = {"a": torch.zeros(9, 9, dtype=torch.bfloat16), "b": torch.zeros(2, 2), "c": torch.zeros(3, 3).half()}
    save_file(saved, tmp_path / "a.safetensors")
    assert published_dtype(tmp_path) == "bfloat16"
    save_file({"d": torch.zeros(100)}, tmp_path / "b.safetensors")
    assert published_dtype(tmp_path) == "float32"
    save_file({"e": torch.zeros(300, dtype=torch.int8)}, tmp_path / "c.safetensors")
    assert published_dtype(tmp_path) is None
    kinds = gguf.GGMLQuantizationType
    wanted = {kinds.F32: "float32", kinds.F16: "float16", kinds.BF16: "bfloat16", kinds.Q8_0: "bfloat16"}
    for kind, expected in wanted.items():
        file = tmp_path / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_tensor("norm", np.ones(64, dtype=np.float32))
        weights = gguf.quants.quantize(np.ones((4, 64), dtype=np.float32), kind)
        writer.add_tensor("weights", weights, raw_dtype=kind)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        assert published_dtype(file) == expected
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"expected a readable GGUF file, got .*Q8_0.gguf"):
        published_dtype(file)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_file(copy: Path, file: str) -> None:
    (copy / file).write_bytes(b"\x80\x02}q\x00.")
    expect_refusal(copy, "expected a readable causal language model, got ")


def test_a_broken_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"no model at all")
    expect_refusal(tmp_path / "a.gguf", "expected a readable causal language model, got .*a.gguf")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"semantics": "canonical"}, "twelve tags, got .*canonical"),
        ({"semantics": "other", "tags": list(TAGS)}, "got .*other"),
        ({"semantics": "canonical", "tags": ["<a>"]}, "twelve tags, got .*<a>"),
        ("canonical", "twelve tags, got 'canonical'"),
    ],
    ids=["no tags", "unknown", "other tags", "text"],
)
def test_weights_trained_otherwise_are_refused(copy: Path, entry: object, message: str) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"multiverse": entry}
    (copy / "config.json").write_text(json.dumps(config))
    expect_refusal(copy, message)
