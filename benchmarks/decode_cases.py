"""What decoding is timed on: branches with a prefix that all of them see, and tokens of their own, one new each.

shared   the case that the library is for, at a length of the device: see `benchmarks.run.SHAPES`
single   one branch: nothing is shared
small    8 branches on 1024 tokens
sweep    branches x lengths of the prefix
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.peers import Shape
from mvkernels import PagedKVCache
from mvkernels.cache.step import Branch, Step
from mvkernels.reference.decode import attend

CASES = ("shared", "single", "small", "sweep")
PAGE_SIZE = 16  # that of the engine
BRANCHES = {"cpu": 8, "cuda": 32}
OWN = {"cpu": 256, "cuda": 512}
SWEEP_BRANCHES = (1, 2, 4, 8, 16, 32)
SWEEP_PREFIXES = {"cpu": (512, 2048, 8192), "cuda": (1024, 4096, 16384, 65536)}

Pages = npt.NDArray[np.int32]
KV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class DecodeCase:
    """Each of `branches` sees `prefix` tokens and `own` of its own, of which the last is new. shape.tokens: unused.

    own 0: one branch, whose last token of the prefix is new.
    """

    name: str
    branches: int
    prefix: int
    own: int
    shape: Shape

    def __post_init__(self) -> None:
        if min(self.branches, self.prefix) < 1 or (self.own < 1 and self.branches > 1) or self.prefix + self.own < 2:
            raise ValueError(f"expected branches with tokens, got {self.branches} x ({self.prefix} + {self.own})")

    @property
    def length(self) -> int:
        """Tokens that each branch sees."""
        return self.prefix + self.own

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token, in one layer."""
        return 2 * self.shape.kv_heads * self.shape.head_dim * getattr(torch, self.shape.dtype).itemsize

    @property
    def unique_bytes(self) -> int:
        """Of all keys and values that some branch sees, each counted once."""
        return (self.prefix + self.branches * self.own) * self.token_bytes

    @property
    def branch_bytes(self) -> int:
        """The same where every branch has a prefix of its own."""
        return self.branches * self.length * self.token_bytes


def cases(shape: Shape, quick: bool, only: list[str] | None) -> list[DecodeCase]:
    """shape.tokens: the prefix of `shared`; where it is not the default, everything is scaled with it."""
    device = shape.device
    default = {"cpu": 8192, "cuda": 32768}[device]
    scaled = lambda tokens: max(2, tokens * shape.tokens // default)  # noqa: E731
    found = [
        DecodeCase("shared", BRANCHES[device], shape.tokens, scaled(OWN[device]), shape),
        DecodeCase("single", 1, shape.tokens, 0, shape),
        DecodeCase("small", 8, scaled(1024), scaled(128), shape),
    ]
    for prefix in SWEEP_PREFIXES[device]:
        for branches in SWEEP_BRANCHES[2::3] if quick else SWEEP_BRANCHES:
            found.append(DecodeCase("sweep", branches, scaled(prefix), scaled(64), shape))
    return [case for case in found if not only or case.name in only]


class Decoding:
    """A case set up: the paged cache of one layer, its open step, and the same keys and values unpaged.

    q          [branches, Hq, D]
    prefix     keys and values [prefix, Hkv, D]
    own        keys and values [branches, own, Hkv, D]
    """

    def __init__(self, case: DecodeCase, seed: int = 0) -> None:
        self.case = case
        shape = case.shape
        self.device = torch.device(shape.device)
        self.dtype: torch.dtype = getattr(torch, shape.dtype)
        generator = torch.Generator(shape.device).manual_seed(seed)

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, shape.head_dim, generator=generator, device=self.device, dtype=self.dtype)

        self.q = normal(case.branches, shape.heads)
        self.prefix: KV = (normal(case.prefix, shape.kv_heads), normal(case.prefix, shape.kv_heads))
        sizes = (case.branches, case.own, shape.kv_heads)
        self.own: KV = (normal(*sizes), normal(*sizes))
        pages = -(-case.prefix // PAGE_SIZE) + case.branches * -(-case.own // PAGE_SIZE)
        heads = (shape.kv_heads, shape.head_dim)
        self.cache = PagedKVCache(pages, PAGE_SIZE, 1, *heads, self.dtype, self.device)
        for pages_of in (*self.cache.k, *self.cache.v):  # FlexAttention multiplies hidden slots by 0
            pages_of.zero_()
        self.step = self._fill()

    def _fill(self) -> Step:
        """Writes everything, the new tokens too, whose step stays open."""
        case, root = self.case, self.cache.new()
        if not case.own:
            self._write([root], case.prefix - 1, tuple(x[None, :-1] for x in self.prefix))
            return self._open([root], tuple(x[None, -1:] for x in self.prefix))
        self._write([root], case.prefix, tuple(x[None] for x in self.prefix))
        children = self.cache.fork(root, case.branches)
        for first in range(0, case.own - 1, PAGE_SIZE):  # page by page, so that they lie as after generation
            last = min(first + PAGE_SIZE, case.own - 1)
            self._write(children, last - first, tuple(x[:, first:last] for x in self.own))
        return self._open(children, tuple(x[:, -1:] for x in self.own))

    def _write(self, branches: list[Branch], tokens: int, new: tuple[torch.Tensor, ...]) -> None:
        if tokens:
            self.cache.commit(self._open(branches, new))

    def _open(self, branches: list[Branch], new: tuple[torch.Tensor, ...]) -> Step:
        step = self.cache.plan([(branch, new[0].shape[1]) for branch in branches])
        self.cache.append(0, new[0].flatten(0, 1), new[1].flatten(0, 1), step)
        return step

    def unshared(self) -> tuple[PagedKVCache, Step]:
        """Another cache, in which every branch holds all that it sees; and its step."""
        case = self.case
        pages = case.branches * -(-case.length // PAGE_SIZE)
        cache = PagedKVCache(pages, PAGE_SIZE, 1, case.shape.kv_heads, case.shape.head_dim, self.dtype, self.device)
        branches = [cache.new() for _ in range(case.branches)]
        new: list[KV] = []
        for index, branch in enumerate(branches):
            k, v = self.contiguous(index)
            step = cache.plan([(branch, case.length - 1)])
            cache.append(0, k[:-1], v[:-1], step)
            cache.commit(step)
            new.append((k[-1:].clone(), v[-1:].clone()))
        step = cache.plan([(branch, 1) for branch in branches])
        cache.append(0, *(torch.cat(tensors) for tensors in zip(*new, strict=True)), step)
        return cache, step

    def contiguous(self, branch: int) -> KV:
        """Keys and values [L, Hkv, D] of all that a branch sees, never paged."""
        k, v = (torch.cat([shared, own[branch]]) for shared, own in zip(self.prefix, self.own, strict=True))
        return k, v

    @cached_property
    def exact(self) -> torch.Tensor:
        """What every branch's new token attends to, by the reference in fp64: [branches, Hq, D]."""
        found = []
        for branch in range(self.case.branches):
            k, v = (x.double() for x in self.contiguous(branch))
            found.append(attend(self.q[branch : branch + 1].double(), k, v)[0])
        return torch.cat(found)

    def slots(self, branch: int) -> torch.Tensor:
        """Where all that a branch sees lies in the cache, [L] int64 on the device."""
        return torch.from_numpy(self.step.views.visible_slots(branch)).to(self.device)

    @cached_property
    def shared_pages(self) -> Pages:
        """Pages of the prefix. ValueError where its last one is ragged, which page lists of other kernels cannot be."""
        entry = self.step.views.entries[0]
        if not entry.whole:
            return np.zeros(0, np.int32)
        counts = np.concatenate([run.counts for run in entry.whole])
        if (counts != PAGE_SIZE).any():
            raise ValueError(f"expected a prefix of a multiple of {PAGE_SIZE} tokens, got {self.case.prefix}")
        return np.concatenate([run.pages for run in entry.whole])

    def own_pages(self, branch: int) -> Pages:
        """Pages of a branch's own tokens."""
        own = self.step.views.entries[branch].own
        return own.pages[own.counts > 0]

    @property
    def last_count(self) -> int:
        """Tokens in the last page of each branch."""
        return (self.case.own or self.case.prefix) % PAGE_SIZE or PAGE_SIZE
