"""What the paged cache is made of: nodes, links, free pages, the state behind a handle. Host side, no tensors.

A node is a run of tokens of one branch: it owns pages, of which only the last may be ragged. It may be cut in two at
the end of a page, or behind all that it has (`cache.split`). What a branch sees is a
list of nodes. The lists share their beginnings: a list is its last link, and a link is a node and the link before it.
So a fork costs one link a child, and a merge one link for every node that the children's lists add.

    chain          of a node: the last link of what every row of it sees whole; None for the first node of a tree
    links          of a node: where it stands in lists, each holding the node; its own link follows its chain
    predecessors   the nodes that end where this one starts: start = max(their ends), end = start + length
    refs           of a link: live, not merged branches whose list it ends, and held links right after it;
                   of a node: its links with references. At 0 the node's pages are free
    after          of a link: nodes with tokens whose chain it is, and links right after it that have an `after`.
                   While any link of a node has one, some node with tokens sees the node: it may not grow

A node's start is open while it is empty, for its predecessors may still grow, and fixed by its first token. No figure
here is the length of a list: whatever the number of tokens before it, an operation touches what it changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mvkernels.ops.decode.tasks import page_counts

Int32Array = npt.NDArray[np.int32]


@dataclass(eq=False, repr=False, slots=True)
class Node:
    """One run of tokens; the module's docstring has the legend."""

    id: int
    chain: Link | None
    predecessors: tuple[Node, ...]
    length: int = 0
    start: int | None = None
    pages: list[int] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    refs: int = 0
    # The branch whose tail this is, merged or not; None where no handle can add or take back tokens any more.
    writer: int | None = None
    _page_array: Int32Array | None = None
    # Tables on the device: entries first .. first + entries - 1 of the row are its pages, and the first `good` of them
    # are right and full.
    row: Row | None = field(default=None, init=False)
    first: int = field(default=0, init=False)
    entries: int = field(default=0, init=False)
    good: int = field(default=0, init=False)

    def __repr__(self) -> str:
        return f"Node({self.id}, {self.length} tokens)"

    @property
    def frozen(self) -> bool:
        """Whether a node with tokens sees this one."""
        for link in self.links:  # noqa: SIM110 (a generator takes three times as long, and a merge asks for every child)
            if link.after:
                return True
        return False

    def renew(self) -> None:
        """The pages are not those that they were: an array of them is made anew."""
        self._page_array = None

    def forget(self) -> None:
        """Drops what was derived from the pages: some are given back, and others may come in their place."""
        self.renew()
        for link in self.links:
            link.contents = None

    def page_array(self) -> Int32Array:
        """Own pages, [pages] int32; the same array until a page is added."""
        if self._page_array is None or len(self._page_array) != len(self.pages):
            self._page_array = np.array(self.pages, dtype=np.int32)
        return self._page_array


@dataclass(eq=False, repr=False, slots=True)
class Link:
    """A node at one place of a list. forked: the first of a forked child, whose siblings stand beside it.

    fixed: a branch was cut off behind it (`fork_at`), so the list up to here never changes. contents: of the list up to
    here, as it was when the node had `seen` tokens.
    """

    node: Node
    before: Link | None
    forked: bool = False
    fixed: bool = False
    refs: int = 0
    after: int = 0
    contents: Contents | None = None
    seen: int = 0

    def __repr__(self) -> str:
        return f"Link({self.node!r}, {self.refs} references)"

    def back(self) -> Iterator[Link]:
        """This link and those before it, the last first."""
        link: Link | None = self
        while link is not None:
            yield link
            link = link.before


@dataclass(eq=False)
class BranchEntry:
    """What stands behind a handle. `head`: the last link of its list, that of its tail.

    `parent` and `children` are handle numbers; a merged handle has neither.
    """

    id: int
    head: Link
    parent: int | None = None
    children: list[int] = field(default_factory=list)
    merged: bool = False

    @property
    def tail(self) -> Node:
        """The node that the branch writes."""
        return self.head.node

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Everything the next token of the branch sees, oldest first, the tail last. Walks the list: for checks."""
        return tuple(link.node for link in self.head.back())[::-1]


def make_link(node: Node, before: Link | None, forked: bool = False) -> Link:
    """A link without references; `hold` gives it one."""
    link = Link(node, before, forked)
    node.links.append(link)
    return link


def hold(link: Link | None) -> None:
    """One more reference to a link; its first one holds the node and the link before it too."""
    while link is not None:
        link.refs += 1
        if link.refs > 1:
            return
        link.node.refs += 1
        link = link.before


def release(link: Link | None) -> list[Node]:
    """One reference to a link less. Returns the nodes without references, the latest first."""
    dead = []
    while link is not None:
        link.refs -= 1
        if link.refs:
            break
        link.node.refs -= 1
        if not link.node.refs:
            dead.append(link.node)
        link = link.before
    return dead


def tokens_appear(node: Node) -> list[Node]:
    """The node gets its first token. Returns the nodes that may not grow any more on that account."""
    changed = []
    link = node.chain
    while link is not None:
        link.after += 1
        if link.after > 1:
            break
        changed.append(link.node)
        link = link.before
    return changed


def tokens_vanish(node: Node) -> None:
    """The inverse: the node lost its last token, or died."""
    link = node.chain
    while link is not None:
        link.after -= 1
        if link.after:
            break
        link = link.before


def suffix(head: Link, base: Link | None) -> list[Node]:
    """The nodes of a list behind the link `base`, oldest first."""
    found = []
    link: Link | None = head
    while link is not None and link is not base:
        found.append(link.node)
        link = link.before
    found.reverse()
    return found


def contents_of(link: Link | None, page_size: int) -> Contents | None:
    """What the list up to a link holds; None where it holds nothing. The link must have an `after`, or be None.

    Found in the link, or in the nearest link before it: a node with tokens fixes what stands before it in its list, and
    what has an `after` grows no more.
    """
    behind = []
    while link is not None and not (link.contents is not None and link.seen == link.node.length > 0):
        behind.append(link)
        link = link.before
    found = None if link is None else link.contents
    apart = False
    for link in reversed(behind):
        # Siblings do not go on in the array of what they all see: the branch that they are merged into does. So a log
        # holds nodes of one branch's own list, one right after the other.
        apart = apart or link.forked
        if link.node.length:
            counts = page_counts(len(link.node.pages), link.node.length, page_size)
            found = Contents.after(found, link.node, counts, apart)
            link.contents, link.seen = found, link.node.length
            apart = False
    return found


def resolve_start(node: Node, starts: Mapping[Node, int], lengths: Mapping[Node, int]) -> int:
    """Position of the first token of `node`, as it is now or would be.

    `starts` and `lengths` hold what a step plans for nodes that it grows, in place of the nodes' own values.
    """
    found: dict[Node, int] = {}
    stack = [node]
    while stack:  # not recursive: a chain of empty nodes may be as long as the number of forks
        top = stack[-1]
        fixed = top.start if top.start is not None else starts.get(top)
        if fixed is not None:
            found[stack.pop()] = fixed
            continue
        waiting = [before for before in top.predecessors if before not in found]
        if waiting:
            stack.extend(waiting)
            continue
        found[stack.pop()] = max(
            (found[before] + lengths.get(before, before.length) for before in top.predecessors), default=0
        )
    return found[node]


# ---- page lists: growing arrays that lists of nodes with a common beginning share


class PageLog:
    """Pages and the tokens written in each, in two arrays that grow at the end only. first: the first node in them."""

    def __init__(self, first: Node) -> None:
        self.first = first
        self.size = 0
        self._rows = np.empty((2, 16), np.int32)

    def extend(self, pages: Int32Array, counts: Int32Array) -> None:
        end = self.size + len(pages)
        if end > self._rows.shape[1]:  # twice as long: slices of the old arrays stay valid
            rows = np.empty((2, 2 * end), np.int32)
            rows[:, : self.size] = self._rows[:, : self.size]
            self._rows = rows
        self._rows[:, self.size : end] = pages, counts
        self.size = end

    def slice(self, first: int, last: int) -> tuple[Int32Array, Int32Array]:
        """(pages, counts) of the entries first .. last - 1; views that nothing writes to again."""
        return self._rows[0, first:last], self._rows[1, first:last]


@dataclass(frozen=True, eq=False)
class Contents:
    """What a list of nodes holds: the first `end` entries of a log, after all that `before` holds.

    tokens: of all of it.
    """

    log: PageLog
    end: int
    tokens: int
    before: Contents | None

    @classmethod
    def after(cls, before: Contents | None, node: Node, counts: Int32Array, apart: bool) -> Contents:
        """A node with tokens after `before`: in its log where nothing else stands behind it there, unless `apart`."""
        if before is None or apart or before.log.size != before.end:
            log, outer = PageLog(node), before
        else:
            log, outer = before.log, before.before
        log.extend(node.page_array(), counts)
        return cls(log, log.size, node.length + (0 if before is None else before.tokens), outer)

    def back(self) -> Iterator[Contents]:
        """This and what stands before it, the last first: one for each log."""
        contents: Contents | None = self
        while contents is not None:
            yield contents
            contents = contents.before


# ---- where nodes stand in tables on the device: device.py has the legend


@dataclass(eq=False, slots=True)
class Row:
    """The nodes that one branch owns, in order. slot: the row in the tables, None if absent. end: entries there."""

    nodes: list[Node] = field(default_factory=list)
    slot: int | None = None
    end: int = 0

    def add(self, node: Node) -> None:
        """Append a node, without entries."""
        node.row, node.entries, node.good = self, 0, 0
        self.nodes.append(node)


class Target(NamedTuple):
    """What a node holds in a step: `tokens` in pages [P], the first ones full; the next position after them."""

    pages: Int32Array
    tokens: int
    position: int
