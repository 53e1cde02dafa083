"""Split of a node, and the cut of a list of nodes, for a branch that sees only its beginning. No key or value moves."""

from __future__ import annotations

from typing import NamedTuple

from mvkernels.cache.nodes import Contents, Link, Node, make_link
from mvkernels.errors import BranchError


class Cut(NamedTuple):
    """A list cut in two.

    Either `after` is behind the cut, and the new branch begins where its node does; or the node of `link` is to be
    split behind its first `tokens`. Both are None where the cut has nothing before it.
    """

    after: Link | None
    link: Link | None = None
    tokens: int = 0


def find_cut(head: Link, dropped: int, page_size: int) -> Cut:
    """Find the cut of a list that leaves its last `dropped` tokens behind it; 0 <= dropped <= all of them.

    Raises BranchError where a page, or a block, would be cut in two.
    """
    behind = []
    link: Link | None = head
    while link is not None and link.node.length <= dropped:
        dropped -= link.node.length
        behind.append(link)
        link = link.before
    if link is None:
        return Cut(None)
    tokens = link.node.length - dropped
    if dropped and tokens % page_size:
        raise BranchError(f"fork_at: expected a cut at the end of a page of {page_size}, got one {tokens} tokens in")
    if not dropped and is_fixed(link):
        for after in reversed(behind):
            if after.node.chain is after.before:
                return Cut(after)
            if after.node.length or after.node.writer is not None:
                break
    if link.node.chain is not link.before:
        raise BranchError("fork_at: expected a cut outside of merged blocks, or behind the join and its first token")
    return Cut(None, link, tokens)


def is_fixed(link: Link | None) -> bool:
    """Whether no node of the list up to a link can change as long as the list is held.

    Empty nodes fix nothing before them: what counts is a node with tokens and without a writer, whose chain is frozen.
    """
    tokens = False
    while link is not None:
        node = link.node
        if node.writer is not None:  # a merged branch is never frozen; all nodes behind another one see it
            return tokens and node.frozen
        if node.length and node.chain is link.before:
            return True
        tokens = tokens or node.length > 0
        link = link.before
    return True


def split(node: Node, tokens: int, number: int, page_size: int) -> Node:
    """Split a node behind its first `tokens`, full pages or all that it has; returns the new node before it.

    The node keeps its identity, its handle, and the rest. The new one gets `number`, and is never written to.
    """
    pages = -(-tokens // page_size)
    chain = node.chain
    front = Node(number, chain, node.predecessors, tokens, node.start, node.pages[:pages], refs=node.refs)
    own = next(link for link in node.links if link.before is chain)
    for link in node.links:
        first = make_link(front, link.before, link.forked)
        first.refs, first.after = int(link.refs > 0), int(link.after > 0)
        _split_contents(link, first, len(node.pages) - pages, node.length - tokens)
        link.before, link.forked = first, False
    del node.pages[:pages]
    node.length -= tokens
    node.renew()
    node.chain, node.predecessors = own.before, (front,)
    if not node.length or node.start is None or own.before is None:
        node.start = None
        return front
    node.start += tokens
    own.before.after += 1
    if own.before.after == 1 and chain is not None:
        chain.after += 1  # not counted further up: the node had tokens
    return front


def _split_contents(link: Link, first: Link, pages: int, tokens: int) -> None:
    """Split the remembered contents of a list, with so many pages and tokens behind the cut."""
    node, known = link.node, link.contents
    link.contents = None
    if known is None or link.seen != node.length:
        return
    first.contents = Contents(known.log, known.end - pages, known.tokens - tokens, known.before)
    first.seen = first.node.length
    if known.log.first is node:
        known.log.first = first.node
    if tokens:
        link.contents, link.seen = known, tokens
