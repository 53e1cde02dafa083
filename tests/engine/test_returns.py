"""Every call returns, or is refused at once: for all ends of text, stop strings, budgets and sizes of the engine.

The model is a stand-in whose logits are random numbers that hang on a token and its position; all else is the engine.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from mvkernels import BranchLayout, OutOfPages
from mvkernels.model import Engine, Generation, GenerationConfig
from mvkernels.model.engine.output.events import FinishEvent
from mvkernels.model.engine.sampling.sampler import sample
from tests.engine.cases import check_pages, goal
from tests.support.tiny_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
NEWLINE, ONE, COLON, PATH_END = (TOKENIZER.convert_tokens_to_ids(spelling) for spelling in ("Ċ", "1", ":", "</Path>"))
POSITIONS = 90
# Work is bounded: far more forwards than all tokens of an example, each computed again a few times.
MOST_FORWARDS = 6000


class RandomLogits(Qwen2ForCausalLM):
    """Tags and newlines are likelier than other tokens. salt: other numbers. forwards: how many."""

    def __init__(self) -> None:
        super().__init__(
            Qwen2Config(
                vocab_size=300,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                max_position_embeddings=POSITIONS,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )
        self.table = torch.randn(997, 300, generator=torch.Generator().manual_seed(0))
        self.table[:, [*range(288, 300), NEWLINE]] += 1.5
        self.salt = self.forwards = 0

    def forward(self, input_ids, position_ids, logits_to_keep=None, **_):
        self.forwards += 1
        if self.forwards > MOST_FORWARDS:
            raise RuntimeError("expected an end")
        rows = (input_ids[0] * 31 + position_ids[0] * 17 + self.salt) % len(self.table)
        return CausalLMOutput(logits=self.table[rows if logits_to_keep is None else rows[logits_to_keep]][None])


MODEL = RandomLogits().eval()


def ignores_masks(views, logits):
    """A sampler of the caller's own."""
    return logits.argmax(-1).tolist()


REASONS = {"stop", "max_new_tokens", "max_critical_path", "max_positions", "max_seconds", "out_of_pages"}
PROMPTS = [
    "so",
    "the product of the parts is the whole",
    "a<Parallel>",
    "<Parallel>\n<Goal>\n<Outline>\n1: a",
    "<Parallel><Goal>" + "<Outline></Outline>" * 4 + "</Goal>",
    goal("1:", "2:") + "\n<Path>\n1: so",
    f"<Think>so{goal('1: a')}",
    [TOKENIZER.eos_token_id, NEWLINE],
]
ENDS = [
    *[None, (), [TOKENIZER.eos_token_id], (NEWLINE, ONE, COLON)] * 4,
    torch.tensor([TOKENIZER.eos_token_id, NEWLINE]),
    {-1, 10**9, 40},
    range(288),
    (TOKENIZER.eos_token_id, PATH_END),
]
STOPS = [None, (), ("\n",), ["e", "the parts", "1:"], ("Path",)]
BUDGETS = st.one_of(st.integers(30, 45), st.integers(25, 45), st.sampled_from([1, 20, 2**31, 10**30]))
CONFIGS = st.builds(
    dict,
    max_new_tokens=st.one_of(st.integers(30, 50), BUDGETS),
    max_critical_path=st.none() | BUDGETS,
    max_path_tokens=st.none() | BUDGETS,
    max_seconds=st.sampled_from([*[None] * 17, 1e-300, 1e-2, float("inf")]),
    max_width=st.sampled_from([1, 2, 3, 16, 10**30]),
    max_depth=st.sampled_from([0, 1, 2, 8, 10**30]),
    eos_token_ids=st.sampled_from(ENDS),
    stop=st.sampled_from(STOPS),
    grammar=st.sampled_from([True, True, True, False]),
    sequential=st.sampled_from([False, False, False, True]),
)
ENGINES = st.builds(
    dict,
    page_size=st.sampled_from([1, 1, 1, 2, 3, 1000]),
    num_pages=st.one_of(st.integers(20, 60), st.integers(20, 60), st.integers(1, 130)),
    max_step_tokens=st.sampled_from([None, 1, 2, 3, 9, 10**12]),
    max_step_width=st.sampled_from([1, 2, 64, 10**12]),
    max_requests=st.sampled_from([1, 2, 256]),
    prefix_cache=st.booleans(),
    semantics=st.sampled_from(["canonical", "canonical", "released"]),
)


async def awaited(events) -> list[Generation]:
    return [event.generation async for event in events if isinstance(event, FinishEvent)]


def call(engine: Engine, how: str, *asked: Any) -> list[Generation]:
    if how == "generate":
        return engine.generate(*asked)
    if how == "stream":
        outs = [event.generation for event in engine.stream(*asked) if isinstance(event, FinishEvent)]
    else:
        outs = asyncio.run(awaited(engine.astream(*asked)))
    return sorted(outs, key=lambda out: int(out.request_id))


def check_outcome(out: Generation, engine: Engine, config: GenerationConfig, masked: bool) -> None:
    assert out.finish_reason in REASONS, out.error
    assert out.layout.total_tokens == len(out.token_ids) == out.prompt_length + out.total_tokens
    assert out.total_tokens <= config.max_new_tokens
    assert config.max_critical_path is None or out.critical_path <= config.max_critical_path
    assert int(out.layout.position_ids.max()) < POSITIONS
    assert "".join(out.texts) == out.text
    if config.grammar and masked and out.finish_reason != "out_of_pages":
        parsed = BranchLayout.from_token_ids(out.token_ids, engine.tags, semantics=engine._writer.semantics)
        assert torch.equal(parsed.position_ids, out.layout.position_ids)


@pytest.mark.timeout(1200)
def test_every_call_returns() -> None:
    """The blocks that it opens, the pages that are short, and the limits that end it differ in every example."""
    ended: Counter[str] = Counter()

    @settings(max_examples=2000)
    @given(
        ENGINES,
        st.lists(st.tuples(st.sampled_from(PROMPTS), CONFIGS), min_size=1, max_size=3),
        st.sampled_from(["generate"] * 4 + ["stream", "astream"]),
        st.sampled_from([True, True, False]),
        st.integers(0, 996),
    )
    def check(
        options: dict[str, Any], requests: list[tuple[Any, dict[str, Any]]], how: str, masked: bool, salt: int
    ) -> None:
        engine = Engine(MODEL, TOKENIZER, decoder="hosted", **options)
        MODEL.salt, MODEL.forwards = salt, 0
        configs = [GenerationConfig(**config) for _, config in requests]
        try:
            outs = call(engine, how, [prompt for prompt, _ in requests], configs, sample if masked else ignores_masks)
        except (ValueError, OutOfPages) as error:
            assert "\n" not in str(error) and "expected" in str(error) and MODEL.forwards == 0, "before anything runs"
            ended["refused"] += 1
        else:
            assert len(outs) == len(requests)
            for out, config in zip(outs, configs, strict=True):
                check_outcome(out, engine, config, masked)
            ended.update(out.finish_reason for out in outs)
            ended["with blocks"] += any(out.layout.has_branches for out in outs)
        ended["preempted"] += engine.preemptions > 0
        check_pages(engine)

    check()
    assert set(ended) == {*REASONS, "refused", "with blocks", "preempted"} and all(ended.values()), ended
