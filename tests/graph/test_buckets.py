"""DecodeGraph's steps through buckets of fixed memory, without a GPU: what a graph holds is played by the host.

In place of a capture, the function to be captured is called again for every replay, with the step as it was at the
capture and nothing else of the host: the trees that came later are known to it through the memory of its bucket alone.
The kernels run in Triton's interpreter, and logits are compared with those of the reference backend. Its time goes
with layers and KV heads, so most models here have one of each; `test_families_of_models` has two.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mvkernels import BackendError, DecodeGraph, patch_model
from mvkernels.cache.step import StepState
from mvkernels.decoder.choose import make_decoder
from mvkernels.graph import buckets as buckets_module
from mvkernels.graph.buckets import WARM_UPS
from mvkernels.ops.decode import buffers as decode_buffers
from tests.graph.test_graph import DEVICE, Twin, count_plans
from tests.support.tiny_model import tiny_model
from tests.test_hf import make

pytestmark = pytest.mark.triton


class Replayed:
    """In place of a CUDA graph: runs what was captured, and writes the logits where the captured one writes them."""

    def __init__(self, graph: DecodeGraph, function: Callable[[], torch.Tensor]) -> None:
        self.graph, self.function, self.replays = graph, function, 0
        # The plan as it is now, in a state in which it stays open.
        self.plan = replace(graph._plan, step=replace(graph._plan.step, state=StepState()))
        self.logits: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        graph, plan, step = self.graph, self.graph._plan, self.graph.cache._open
        graph._plan, graph.cache._open = self.plan, self.plan.step
        try:
            logits = self.function()
        finally:
            graph._plan, graph.cache._open = plan, step
        self.replays += 1
        self.logits = torch.zeros_like(logits) if self.logits is None else self.logits
        return self.logits.copy_(logits)


def replaying(twin: Twin) -> list[Replayed]:
    """Makes the twin's graph believe in graphs; returns those that it will capture."""
    graph, made = twin.graph, []

    def record(function):
        made.append(Replayed(graph, function))
        return made[-1]

    graph.backend, graph._buckets.record = "cuda_graph", record
    return made


def make_twin(
    reserve: int = 8, num_pages: int = 128, window: dict[str, object] | None = None, decoder: str = "hosted", **options
) -> Twin:
    """decoder: what the graph runs of the model, "hosted" or "own"."""
    sizes = {"head_dim": 16, "layers": 1, "heads": 2, "kv_heads": 1}
    model = patch_model(tiny_model(**sizes, **(window or {})).to(DEVICE), "triton")
    plain = patch_model(tiny_model(**sizes).to(DEVICE), "reference")
    twin = Twin(reserve=reserve, num_pages=num_pages, model=model, plain_model=plain, **options)
    if decoder == "own":
        twin.graph = DecodeGraph(make_decoder(model, "own", "triton"), twin.graph.cache, reserve)
    for tensor in (*twin.graph.cache.k, *twin.graph.cache.v):
        tensor.fill_(torch.nan)
    return twin


def written_slots(twin: Twin) -> int:
    return int((~torch.isnan(twin.graph.cache.k[0]).any(dim=(2, 3))).sum())


@pytest.mark.parametrize("decoder", ["hosted", "own"])
def test_a_bucket_is_captured_once_whatever_the_tree(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = make_twin(reserve=2, decoder=decoder)
    made = replaying(twin)
    plans = count_plans(twin, monkeypatch)
    twin.run((0, 5))
    twin.fork(0, 4)
    for branches in ((1, 2, 3), (2, 1, 3), (4, 1, 2), (1, 2, 3, 4)):  # buckets of four rows
        for _ in range(4):
            twin.run(*branches)
    twin.merge(0, [1, 2, 3, 4])
    for _ in range(3):
        twin.run(0)
    first, second = twin.fork(0, 2), None
    for _ in range(3):
        twin.run(*first)
    second = twin.fork(first[0], 2)
    for _ in range(3):
        twin.run(first[1], *second)
    assert len(plans) == 1 + 4 * 2 + 3
    runs = sorted(bucket.memory.rows for bucket in twin.graph._buckets._kept.values())
    assert runs == [1, 2, 4, 8] and twin.graph.captures == len(made) == 3
    assert sum(graph.replays for graph in made) == 4 * 4 + 3 * 3 - 3 * WARM_UPS
    assert written_slots(twin) == 5 + 4 * (3 + 3 + 3 + 4) + 3 + 6 + 9


def test_the_first_step_of_a_bucket_runs_as_it_is_and_the_others_are_replays() -> None:
    twin = make_twin(reserve=6)
    made = replaying(twin)
    twin.run((0, 9))
    twin.fork(0, 3)
    for done in range(9):
        assert twin.graph.captured == (done > WARM_UPS and done != 7)  # not planned yet: a plan is of 1 + 6 steps
        twin.run(1, 2, 3)
    [graph] = made
    assert graph.replays == 8
    twin.graph.reset()
    assert not twin.graph.captured and not twin.graph._buckets._kept
    for _ in range(WARM_UPS):
        twin.run(1, 2, 3)
    assert len(made) == 1
    twin.run(1, 2, 3)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("seed", "device_tables"),
    [(0, True), (1, False), (2, True)],
    ids=["0, lists on the device", "1, uploaded", "2, lists on the device"],
)
def test_random_trees(seed: int, device_tables: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches fork, merge, lose tokens and go, several requests at once, with prompts and tags among the steps."""
    rng = random.Random(seed)
    twin = make_twin(reserve=rng.choice([0, 3, 8]), num_pages=160, device_tables=device_tables)
    made = replaying(twin)
    plans = count_plans(twin, monkeypatch)
    caches = (twin.graph.cache, twin.plain)
    families: dict[int, list[int]] = {0: []}  # roots -> their paths while they are apart
    twin.run((0, rng.randint(1, 9)))
    for _ in range(40):
        deed = rng.random()
        root = rng.choice(list(families))
        paths = families[root]
        live = [number for other, apart in families.items() for number in (apart or [other])]
        if deed < 0.2 and not paths:
            families[root] = twin.fork(root, rng.randint(1, 4))
            if rng.random() < 0.5:  # the parent's pending token and its fresh children in one step
                twin.run(root, *((path, rng.randint(1, 3)) for path in families[root]))
        elif deed < 0.35 and paths:
            twin.merge(root, paths)
            families[root] = []
        elif deed < 0.4 and len(families) < 3:
            twin.branches.append(tuple(cache.new() for cache in caches))
            families[len(twin.branches) - 1] = []
            twin.run((len(twin.branches) - 1, rng.randint(1, 20)))
        elif deed < 0.45 and len(families) > 1 and not paths:
            for i, cache in enumerate(caches):
                cache.free(twin.branches[root][i])
            del families[root]
        elif deed < 0.55:
            number = rng.choice(live)
            for i, cache in enumerate(caches):
                if cache._state(twin.branches[number][i]).tail.length > 1:
                    cache.truncate(twin.branches[number][i], 1)
        else:
            chosen = rng.sample(live, rng.randint(1, len(live)))
            for _ in range(rng.choice([1, 2, 5])):
                twin.run(*chosen)
    runs = [bucket for bucket in twin.graph._buckets._kept.values() if bucket.runs > WARM_UPS]
    assert twin.graph.captures == len(made) == len(runs)
    assert {bucket.memory.bucket.lists is not None for bucket in runs} == {device_tables}
    assert len(plans) > 2 * len(made) and sum(graph.replays for graph in made) > 3 * len(made)


def test_several_tokens_of_a_branch_run_in_buckets_of_all_rows() -> None:
    """A join's tags, a path's prefix: logits are those of each entry's last token."""
    twin = make_twin()
    made = replaying(twin)
    twin.run((0, 9))
    for _ in range(3):
        twin.fork(0, 3)
        paths = range(len(twin.branches) - 3, len(twin.branches))
        twin.run((0, 1), *((path, 4) for path in paths))  # 13 rows
        twin.run(*((path, 5) for path in paths))  # 15
        twin.merge(0, paths)
        twin.run((0, 2))
    assert {bucket.memory.rows for bucket in twin.graph._buckets._kept.values()} == {2, 16}
    assert len(made) == 2 and sum(graph.replays for graph in made) == 9 - 2 * WARM_UPS
    longest = buckets_module.MOST
    assert twin.graph.captures < longest


def test_prompts_run_without_a_bucket() -> None:
    twin = make_twin()
    replaying(twin)
    twin.run((0, 65))
    assert not twin.graph._buckets._kept
    twin.run((0, 64))
    assert [bucket.memory.rows for bucket in twin.graph._buckets._kept.values()] == [64]


def test_buckets_that_were_not_used_for_longest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets_module, "MOST", 2)
    twin = make_twin(reserve=0)
    made = replaying(twin)
    twin.run((0, 5))
    twin.fork(0, 4)
    for branches in ((1,), (1, 2), (1, 2), (1,), (1, 2, 3, 4), (1,), (1, 2), (1, 2)):
        twin.run(*branches)
    assert [bucket.memory.rows for bucket in twin.graph._buckets._kept.values()] == [1, 2]
    assert [graph.replays for graph in made] == [1, 2, 1]  # two branches, one, and two again from the beginning


def test_page_lists_that_outgrow_their_room_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cache that keeps none on the device."""
    monkeypatch.setattr(buckets_module, "PAGES", 4)
    monkeypatch.setattr(decode_buffers, "PAGES", 4)
    twin = make_twin(reserve=0, device_tables=False)
    twin.graph._buckets.pages = 4
    made = replaying(twin)
    for _ in range(3):
        twin.run((0, 12))
        twin.run(0)
        twin.run(0)
    assert twin.graph._buckets.pages == 16 and len(made) >= 2
    capacities = {bucket.memory.bucket.capacity.pages for bucket in twin.graph._buckets._kept.values()}
    assert capacities == {4, 8, 16}


def test_an_error_in_a_replay_rolls_the_step_back_and_keeps_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = make_twin()
    made = replaying(twin)
    twin.run((0, 5))
    for _ in range(3):
        twin.run(0)
    before = twin.graph.cache.num_free_pages + len(twin.graph.cache._open.planned[0].pages)
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="broken"):
        patch.setattr(twin.model.lm_head, "forward", broken)
        twin.graph.run([twin.branches[0][0]], [1])
    assert twin.branches[0][0].num_tokens == 8 and twin.graph.cache.num_free_pages == before
    for _ in range(3):
        twin.run(0)
    assert len(made) == 1


def broken(*arguments: object) -> None:
    raise KeyError("broken")


def test_a_step_out_of_a_sliding_window_is_not_replayed() -> None:
    window = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0}
    twin = make_twin(window=window)
    made = replaying(twin)
    twin.run((0, 8))
    for _ in range(4):
        twin.run(0)
    with pytest.raises(BackendError, match="sliding window of 12 tokens, got 13"):
        twin.graph.run([twin.branches[0][0]], [1])
    assert [graph.replays for graph in made] == [4 - WARM_UPS] and twin.branches[0][0].num_tokens == 12


def test_a_window_that_no_layer_looks_at_ends_the_graphs_and_not_the_steps() -> None:
    """Layers below max_window_layers see everything: such steps run, but each is looked at."""
    window = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
    twin = make_twin(window=window)
    made = replaying(twin)
    twin.run((0, 8))
    for _ in range(6):
        twin.run(0)
    assert [graph.replays for graph in made] == [4 - WARM_UPS]


def test_layers_with_other_heads_are_refused() -> None:
    twin = make_twin()
    replaying(twin)
    twin.graph.decoder.heads = 4  # a model whose layers differ from its config
    with pytest.raises(BackendError, match="expected layers of 4 query heads"):
        twin.graph.run([(twin.branches[0][0], 3)], [1, 2, 3])
    assert twin.branches[0][0].num_tokens == 0


def test_what_a_plan_uploads() -> None:
    """One copy of known size; the steps of a plan upload nothing but their tokens."""
    twin = make_twin(reserve=6)
    replaying(twin)
    buckets = twin.graph._buckets
    twin.run((0, 9))
    prompt = buckets.uploaded_bytes
    paths = twin.fork(0, 4)
    twin.run(*paths)
    once = buckets.uploaded_bytes - prompt
    assert once == list(buckets._kept.values())[-1].memory._buffers.packed.numel() * 4
    for _ in range(6):
        twin.run(*paths)
    assert buckets.uploaded_bytes == prompt + once
    twin.run(*paths)
    assert buckets.uploaded_bytes == prompt + 2 * once


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_families_of_models(family: str) -> None:
    """Each from the step as it was at the capture: no layer keeps anything of a step on the host."""
    models = [make(family, head_dim=16, vocab_size=300).to(DEVICE) for _ in range(2)]
    for model, backend in zip(models, ("triton", "reference"), strict=True):
        patch_model(model, backend)
    models[1].load_state_dict(models[0].state_dict())
    twin = Twin(model=models[0], plain_model=models[1], reserve=2)
    made = replaying(twin)
    twin.run((0, 5))
    paths = twin.fork(0, 3)
    for _ in range(5):
        twin.run(*paths)
    twin.merge(0, paths)
    for _ in range(2):
        twin.run(0)
    assert len(made) == 2
