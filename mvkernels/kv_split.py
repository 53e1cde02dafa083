"""Where a list of nodes is cut for a branch that sees only its beginning, and how a node becomes two. No byte moves."""

from __future__ import annotations

from typing import NamedTuple

from mvkernels.errors import BranchError
from mvkernels.kv_nodes import Link, Node, make_link
from mvkernels.kv_pages import Contents


class Cut(NamedTuple):
    """A list cut in two. Either `after` stands behind the cut, and a branch begins there just where its node does; or
    the node of `link` is to be split behind its first `tokens`. Both are None where nothing is left before the cut.
    """

    after: Link | None
    link: Link | None = None
    tokens: int = 0


def find_cut(head: Link, dropped: int, page_size: int) -> Cut:
    """Where to cut a list so that its last `dropped` tokens stand behind the cut; 0 <= dropped <= all of them.

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
    if not dropped:
        for after in reversed(behind):
            if _begins_for_good(after):
                for (
                    before
                ) in after.node.predecessors:  # fronts, ended paths, what stands before a block that was merged
                    before.sealed = True
                return Cut(after)
            if after.node.length:
                break
    elif tokens % page_size:
        raise BranchError(f"fork_at: expected a cut at the end of a page of {page_size}, got one {tokens} tokens in")
    if link.node.chain is not link.before:
        raise BranchError("fork_at: expected a cut outside of merged blocks, or behind the join and its first token")
    return Cut(None, link, tokens)


def _begins_for_good(link: Link) -> bool:
    """Whether the node begins here, and nothing right before it can grow any more, even if the node dies."""
    node = link.node
    if node.chain is not link.before:
        return False
    if link.forked:  # behind what its parent may go on with, unless it came from a cut
        return all(before.sealed for before in node.predecessors)
    return all(before.merged_branch is None for before in node.predecessors)


def split(node: Node, tokens: int, number: int, page_size: int) -> Node:
    """Cuts a node behind its first `tokens`, full pages or all that it has; returns the new node before it.

    The node keeps its identity, its handle, and the rest. The new one gets `number`; nobody writes to it ever.
    """
    pages = -(-tokens // page_size)
    chain = node.chain
    front = Node(number, chain, node.predecessors, tokens, node.start, node.pages[:pages], refs=node.refs, sealed=True)
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
        chain.after += 1  # nothing before it hears of that: the node had tokens
    return front


def _split_contents(link: Link, first: Link, pages: int, tokens: int) -> None:
    """What is remembered of a list up to a link with so many pages and tokens behind the cut, for the new link too."""
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
