"""DecodeGraph: the logits of plain steps, token for token, whatever happens to the tree between two runs.

Each test drives a graph and, in a cache of its own, plain plan and commit steps through the same tree.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvkernels import BackendError, BranchError, DecodeGraph, OutOfPages, PagedKVCache, StaleStep, patch_model
from mvkernels.graph import buckets as hf_buckets
from mvkernels.graph.buckets import WARM_UPS
from tests.conftest import interpreting
from tests.support.tiny_model import tiny_model
from tests.test_hf import make

PAGE = 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"  # of kernels, or of the interpreter


def make_cache(model, num_pages: int = 64, **options) -> PagedKVCache:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return PagedKVCache(
        num_pages, PAGE, config.num_hidden_layers, config.num_key_value_heads, head_dim, model.dtype, model.device,
        **options,
    )  # fmt: skip


class Twin:
    """A graph and a plain cache with the same branches, numbered; every step is run by both and compared.

    plain_model: for the plain steps, with the same weights; None: the same model. device_tables: of the graph's cache.
    """

    def __init__(
        self,
        device: str = "cpu",
        reserve: int = 64,
        num_pages: int = 64,
        model=None,
        plain_model=None,
        device_tables: bool | None = None,
        **options,
    ) -> None:
        self.model = model or patch_model(tiny_model(head_dim=32).to(device))
        self.plain_model = plain_model or self.model
        cache = make_cache(self.model, num_pages, device_tables=device_tables)
        self.graph = DecodeGraph(self.model, cache, reserve, **options)
        self.plain = make_cache(self.model, 256)
        self.branches = [(self.graph.cache.new(), self.plain.new())]
        self.generator = torch.Generator().manual_seed(3)

    def fork(self, parent: int, count: int) -> list[int]:
        made = [cache.fork(self.branches[parent][i], count) for i, cache in enumerate((self.graph.cache, self.plain))]
        self.branches += zip(*made, strict=True)
        return list(range(len(self.branches) - count, len(self.branches)))

    def merge(self, parent: int, children: Sequence[int]) -> None:
        for i, cache in enumerate((self.graph.cache, self.plain)):
            cache.merge(self.branches[parent][i], [self.branches[child][i] for child in children])

    def plain_logits(self, entries: Sequence[tuple[int, int]], ids: torch.Tensor) -> torch.Tensor:
        step = self.plain.plan([(self.branches[number][1], count) for number, count in entries])
        with torch.no_grad():
            logits = self.plain_model(ids[None].to(self.model.device), paged_kv=(self.plain, step)).logits[0]
        self.plain.commit(step)
        return logits[torch.tensor([count for _, count in entries]).cumsum(0) - 1]

    def run(self, *entries: int | tuple[int, int]) -> torch.Tensor:
        pairs = [entry if isinstance(entry, tuple) else (entry, 1) for entry in entries]
        ids = torch.randint(0, 300, (sum(count for _, count in pairs),), generator=self.generator)
        handle = {number: self.branches[number][0] for number, _ in pairs}
        given = [(handle[e[0]], e[1]) if isinstance(e, tuple) else handle[e] for e in entries]
        logits = self.graph.run(given, ids.tolist())
        wanted = self.plain_logits(pairs, ids)
        assert logits.shape == (len(pairs), 300)
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        self.graph.cache.check()
        for mine, theirs in self.branches:
            if theirs.id in self.plain._branches:  # a merged handle dies when its parent goes on
                assert (mine.num_tokens, mine.next_position) == (theirs.num_tokens, theirs.next_position)
        return logits


def on_gpu(twin: Twin) -> bool:
    return twin.graph.backend == "cuda_graph"


@pytest.mark.parametrize("device", DEVICES)
def test_a_tree_of_branches_across_page_borders(device: str) -> None:
    twin = Twin(device, reserve=20)
    twin.run((0, 7))
    paths = twin.fork(0, 3)
    twin.run((paths[0], 3), (paths[1], 1), (paths[2], 5))
    for _ in range(14):  # each path crosses three page borders, at different steps
        twin.run(*paths)
    twin.merge(0, paths)
    for _ in range(6):
        twin.run(0)
    assert twin.graph.captures == (2 if on_gpu(twin) else 0)  # of three rows, and of one


@pytest.mark.parametrize("device", DEVICES)
def test_a_reserve_that_is_used_up_is_planned_anew(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin(device, reserve=5)
    twin.run((0, 3))
    twin.fork(0, 2)
    plans = count_plans(twin, monkeypatch)
    for _ in range(15):
        twin.run(1, 2)
    assert plans == [5, 5, 5]  # 1 + 5 steps each
    assert twin.graph.captures == (1 if on_gpu(twin) else 0)
    assert twin.graph.cache.num_free_pages == 64 - 1 - 2 * 5  # 3 reserved steps are within pages that are written


def count_plans(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The reserves of the plans that the graph's cache makes from here on."""
    plans: list[int] = []
    plan = twin.graph.cache.plan

    def counted(entries, reserve=0, *rest):
        plans.append(reserve)
        return plan(entries, reserve, *rest)

    monkeypatch.setattr(twin.graph.cache, "plan", counted)
    return plans


@pytest.mark.parametrize("device", DEVICES)
def test_branches_come_and_go(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin(device, num_pages=128)
    twin.run((0, 6))
    twin.fork(0, 4)
    plans = count_plans(twin, monkeypatch)
    for _ in range(4):
        twin.run(1, 2, 3, 4)
    assert plans == [64]
    for branches in ((1, 2, 4), (4, 1), (1, 4), (2,), (2, 1, 3, 4)):
        for _ in range(4):
            twin.run(*branches)
    assert plans == [64] * 6
    assert twin.graph.captures == (3 if on_gpu(twin) else 0)  # of one row, of two, and of up to four


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_caller_does_to_the_tree_in_between(device: str) -> None:
    twin = Twin(device)
    twin.run((0, 5))
    for _ in range(5):
        twin.run(0)
    cache = twin.graph.cache
    twin.run(0)
    cache.rollback(cache.plan([(cache.new(), 9)]))  # another plan discards the one that goes on
    twin.run(0)
    twin.run(0)
    for i, own in enumerate((cache, twin.plain)):  # tokens are taken back
        own.truncate(twin.branches[0][i], 2)
    for _ in range(4):
        twin.run(0)
    inner = twin.fork(0, 2)
    twin.run(0, inner[1], inner[0])  # the parent's pending token, and its fresh children: each sees what it adds
    for _ in range(4):
        twin.run(inner[1], inner[0])
    twin.merge(0, inner)
    twin.run(inner[0], 0)
    twin.run(0)


def test_only_one_plan_while_the_tree_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin()
    twin.run((0, 5))
    twin.run(0)
    monkeypatch.setattr(twin.graph.cache, "plan", None)
    for _ in range(20):
        twin.run(0)
    twin.graph.cache.new()  # disturbs nothing
    twin.run(0)


def test_out_of_pages_leaves_everything_as_it_was() -> None:
    twin = Twin(num_pages=4)  # 16 tokens
    twin.run((0, 9))
    branch, other = twin.branches[0][0], twin.graph.cache.new()
    for _ in range(6):
        twin.run(0)  # the reserve that fits is smaller than the one asked for
    with pytest.raises(OutOfPages, match="expected at most 0 free pages to be needed, got 2"):
        twin.graph.run([branch, (other, 5)], [1] * 6)
    twin.run(0)  # on in the same plan
    with pytest.raises(OutOfPages, match="expected at most 0 free pages to be needed, got 1"):
        twin.graph.run([branch], [1])
    assert (branch.num_tokens, other.num_tokens, twin.graph.cache.num_free_pages) == (16, 0, 0)
    twin.graph.cache.check()
    twin.graph.cache.free(branch)
    assert twin.graph.cache.num_free_pages == 4


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_of_the_model_rolls_the_step_back(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin(device)
    twin.run((0, 5))
    twin.run(0)
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="broken"):
        patch.setattr(twin.model.lm_head, "forward", broken)
        twin.graph.run([twin.branches[0][0]], [1])
    assert twin.branches[0][0].num_tokens == 6 and twin.graph.cache.num_free_pages == 62
    for _ in range(5):
        twin.run(0)


def broken(*arguments: object) -> None:
    raise KeyError("broken")


@pytest.mark.parametrize("device", DEVICES)
def test_a_sliding_window_is_looked_at_in_every_step(device: str) -> None:
    """Also in those that a graph would replay: the step that leaves the window raises, and changes nothing."""
    window = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0}
    twin = Twin(model=patch_model(tiny_model(head_dim=32, **window).to(device)))
    twin.run((0, 8))
    for _ in range(4):
        twin.run(0)
    with pytest.raises(BackendError, match="sliding window of 12 tokens, got 13"):
        twin.graph.run([twin.branches[0][0]], [1])
    assert twin.branches[0][0].num_tokens == 12


def test_reset_gives_the_reserve_back() -> None:
    twin = Twin(reserve=30)
    twin.run((0, 5))
    twin.run(0)
    assert twin.graph.cache.num_free_pages == 64 - 9
    step = twin.graph._plan.step
    twin.graph.reset()
    assert twin.graph.cache.num_free_pages == 64 - 2
    with pytest.raises(StaleStep):
        step.require_open()
    twin.run(0)


def test_logits_are_the_callers_own() -> None:
    twin = Twin()
    first = twin.run((0, 5))
    kept = first.clone()
    first[:, 3] = -torch.inf  # outside of inference mode too
    twin.run(0)
    assert torch.equal(first[:, 4:], kept[:, 4:])


def test_token_ids_as_tensors() -> None:
    model = patch_model(tiny_model(head_dim=32))
    found = []
    for kind in (torch.int32, torch.int64):
        graph = DecodeGraph(model, make_cache(model))
        branch = graph.cache.new()
        graph.run([(branch, 3)], torch.tensor([5, 6, 7], dtype=kind))
        found.append(graph.run([branch], torch.tensor([9], dtype=kind)))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1], "expected 2 tokens for these entries, got 1"),
        ([1, 300], "expected ids from 0 to 299, got 300"),
        ([1, -1], "expected ids from 0 to 299, got -1"),
        (torch.zeros(2), r"expected \[T\] int64 or int32, got torch.float32 of shape \[2\]"),
        (torch.zeros(1, 2, dtype=torch.int64), r"got torch.int64 of shape \[1, 2\]"),
    ],
)
def test_bad_token_ids_change_nothing(ids: object, message: str) -> None:
    twin = Twin()
    twin.run((0, 5))
    twin.fork(0, 2)
    twin.run(1, 2)
    before = twin.graph._plan
    with pytest.raises(ValueError, match=message):
        twin.graph.run([pair[0] for pair in twin.branches[1:]], ids)
    assert twin.graph._plan is before
    twin.run(1, 2)


def test_bad_arguments_say_what_was_expected() -> None:
    model = tiny_model(head_dim=32)
    with pytest.raises(ValueError, match="expected a model patched by patch_model, got Qwen2ForCausalLM"):
        DecodeGraph(model, make_cache(model))
    patch_model(model)
    cache = make_cache(model)
    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: DecodeGraph(model, cache, reserve=-1), ValueError, "reserve: expected at least 0 tokens, got -1"),
        (
            lambda: DecodeGraph(model, cache, backend="fast"),
            ValueError,
            "expected one of 'auto', 'cuda_graph', 'eager'",
        ),
        (lambda: DecodeGraph(model, cache, backend="cuda_graph"), BackendError, "expected a model on cuda, got cpu"),
        (lambda: DecodeGraph(model, cache).run([], []), ValueError, "expected at least one entry, got none"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    gone = cache.new()
    cache.free(gone)
    with pytest.raises(BranchError):
        DecodeGraph(model, cache).run([gone], [1])


@pytest.mark.triton
def test_the_tables_of_the_kernels_advance_with_the_steps() -> None:
    """Without graphs too tables are made once for a plan, and turn into those of the next step by themselves."""
    model = tiny_model(head_dim=16, layers=1, heads=2, kv_heads=1)
    twin = Twin(model=patch_model(model.to(DEVICE), "triton"), reserve=5, backend="eager")
    twin.run((0, 6))
    twin.fork(0, 2)
    twin.run((1, 2), (2, 3))
    made = set()
    for _ in range(8):  # a plan of 1 + 5 steps, and two of the next
        twin.run(2, 1)
        made.update(twin.graph._plan.step.views._cache.values() if twin.graph._plan else ())
    assert len(made) == 2
    twin.merge(0, [1, 2])
    for _ in range(3):
        twin.run(0)


class NoHost(TorchDispatchMode):
    """Raises for what a capture cannot hold: values that the host asks for, and tensors that it makes from its own."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        asking = (aten.item, aten.is_nonzero, aten._local_scalar_dense, aten.nonzero, aten.equal)
        if func.overloadpacket in (*asking, aten.lift_fresh):
            raise AssertionError(f"expected device work only, got {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.triton
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_what_is_captured_asks_the_host_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(make(family, head_dim=16).to(DEVICE), "triton")
    graph = DecodeGraph(model, make_cache(model))
    branch = graph.cache.new()
    watched = []

    def record(function):
        with NoHost():
            watched.append(function())
        return lambda: watched[-1]

    graph.backend, graph._buckets.record = "cuda_graph", record
    graph.run([(branch, 5)], [1] * 5)
    for token in range(WARM_UPS + 1):
        graph.run([branch], [token])
    assert len(watched) == 1 and branch.num_tokens == 6 + WARM_UPS


# -- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_replays_launch_no_kernel_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin("cuda")
    twin.run((0, 5))
    twin.fork(0, 3)
    for done in range(10):
        assert twin.graph.captured == (done > WARM_UPS)
        twin.run(1, 2, 3)
    assert twin.graph.captures == 1
    twin.graph.cache.truncate(twin.branches[1][0], 2)  # another plan, the same graph
    twin.plain.truncate(twin.branches[1][1], 2)
    monkeypatch.setattr(twin.model, "forward", broken)  # a replay does not come by
    branches = [pair[0] for pair in twin.branches[1:]]
    logits = [twin.graph.run(branches, ids) for ids in ([7, 8, 9], [4, 5, 6])]
    monkeypatch.undo()
    for got, ids in zip(logits, ([7, 8, 9], [4, 5, 6]), strict=True):
        wanted = twin.plain_logits([(1, 1), (2, 1), (3, 1)], torch.tensor(ids))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert twin.graph.captures == 1


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_graphs_of_a_random_tree(seed: int) -> None:
    """Forks, merges, tags and lost tokens, by far fewer graphs than plans."""
    rng, twin = random.Random(seed), Twin("cuda", reserve=8, num_pages=256)
    twin.run((0, 70))
    for _ in range(12):
        paths = twin.fork(0, rng.randint(2, 6))
        twin.run((0, 1), *((path, rng.randint(1, 4)) for path in paths))
        for _ in range(rng.randint(1, 12)):
            twin.run(*paths)
        some = rng.sample(paths, 2)
        for i, cache in enumerate((twin.graph.cache, twin.plain)):
            cache.truncate(twin.branches[some[0]][i], 1)
        twin.run(*some)
        twin.merge(0, paths)
        for _ in range(rng.randint(1, 4)):
            twin.run(0)
    captured = [bucket for bucket in twin.graph._buckets._kept.values() if bucket.replay is not None]
    assert twin.graph.captures == len(captured) <= 16


@pytest.mark.gpu
def test_graphs_that_are_given_up_free_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_buckets, "MOST", 2)
    twin = Twin("cuda", reserve=4)
    twin.run((0, 70))
    twin.fork(0, 8)
    allocated = []
    for round_ in range(3):
        for count in (1, 2, 4, 8):
            for _ in range(WARM_UPS + 2):
                twin.run(*range(1, 1 + count))
        assert twin.graph.captures == 4 * (round_ + 1) and len(twin.graph._buckets._kept) == 2
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[2] <= allocated[1]


@pytest.mark.gpu
def test_what_cannot_be_captured_is_a_backend_error(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin("cuda")
    twin.run((0, 5))
    for _ in range(WARM_UPS):
        twin.run(0)
    head = twin.model.lm_head.forward

    def asks_the_host(hidden: torch.Tensor) -> torch.Tensor:
        return head(hidden) + float(hidden.sum().item() * 0)

    monkeypatch.setattr(twin.model.lm_head, "forward", asks_the_host)
    with pytest.raises(BackendError, match="the step cannot be captured as a CUDA graph"):
        twin.graph.run([twin.branches[0][0]], [1])
    monkeypatch.undo()
    assert twin.branches[0][0].num_tokens == 5 + WARM_UPS
    for _ in range(6):
        twin.run(0)
    assert twin.graph.captures == 1


@pytest.mark.gpu
def test_dynamic_rope_is_refused_by_name() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = patch_model(tiny_model(head_dim=32, rope_parameters=rope).to("cuda"))
    with pytest.raises(BackendError, match="rope_type 'dynamic' decides on the host"):
        DecodeGraph(model, make_cache(model), backend="cuda_graph")
    assert DecodeGraph(model, make_cache(model)).backend == "eager"
