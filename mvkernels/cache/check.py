"""The invariants of the paged cache, recomputed from the live branches alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from mvkernels.cache.nodes import BranchEntry, Link, Node
from mvkernels.errors import CacheError
from mvkernels.ops.decode.tasks import page_counts


def check_cache(
    branches: Mapping[int, BranchEntry],
    nodes: Mapping[int, Node],
    free: Collection[int],
    reserved: Collection[int],
    num_pages: int,
    page_size: int,
) -> None:
    """Raise CacheError, with what was expected and what was found, at the first invariant that does not hold."""
    _check_branches(branches)
    held = _count_links(branches)
    refs = Counter(link.node for link in held)
    _expect("live nodes", sorted(node.id for node in refs), sorted(nodes))
    after = _count_after(refs)
    ends: dict[Node, int] = {}
    for node in _in_order(refs):
        _expect(f"the node numbered {node.id}", node, nodes[node.id])
        _expect(f"references of node {node.id}", refs[node], node.refs)
        _expect(f"links of node {node.id}", [], [link for link in held if link.node is node and link not in node.links])
        for link in node.links:
            _expect(f"tokens after a link of node {node.id}", after[link], link.after)
            _expect(f"references of a link of node {node.id}", held[link], link.refs)
            _check_contents(link, page_size)
        _expect(f"nodes with tokens see node {node.id}", any(node in _seen(n) for n in refs if n.length), node.frozen)
        _check_node(node, page_size)
        # By definition and in another way than `resolve_start`, which this judges too.
        start = max((ends[before] for before in node.predecessors), default=0)
        _expect(f"start of node {node.id} with {node.length} tokens", start if node.length else None, node.start)
        ends[node] = start + node.length
    for link in held:
        if link.fixed:
            _check_fixed(link)
    _check_handles(branches, refs)
    owned = [page for node in refs for page in node.pages]
    _check_pages(owned, free, reserved, num_pages)


def _count_links(branches: Mapping[int, BranchEntry]) -> Counter[Link]:
    """Count the references of each link, from the lists of branches that own what they see."""
    held: Counter[Link] = Counter()
    for state in branches.values():
        if not state.merged:
            for link in state.head.back():
                held[link] += 1
                if held[link] > 1:  # held by the link behind it already, and so are those before it
                    break
    return held


def _count_after(nodes: Collection[Node]) -> Counter[Link]:
    """Count, for each link, nodes with tokens whose chain it is, and links right after it that have an `after`."""
    after: Counter[Link] = Counter()
    for node in nodes:
        if node.length:
            for link in node.chain.back() if node.chain is not None else ():
                after[link] += 1
                if after[link] > 1:
                    break
    return after


def _in_order(nodes: Collection[Node]) -> list[Node]:
    """Order nodes behind their predecessors; a node can be older than the front that was cut off it."""
    order: dict[Node, None] = {}
    stack = sorted(nodes, key=lambda node: -node.id)
    while stack:
        waiting = [before for before in stack[-1].predecessors if before not in order]
        if waiting:
            stack.extend(waiting)
        else:
            order[stack.pop()] = None
    return [*order]


def _seen(node: Node) -> set[Node]:
    """Return the nodes that every row of a node sees whole."""
    return {link.node for link in node.chain.back()} if node.chain is not None else set()


def _expect(what: str, expected: object, got: object) -> None:
    if expected != got:
        raise CacheError(f"{what}: expected {expected}, got {got}")


def _check_branches(branches: Mapping[int, BranchEntry]) -> None:
    """Parents and children name each other; no two branches write one node."""
    _expect("branches that share a tail", len(branches), len({state.tail for state in branches.values()}))
    for number, state in branches.items():
        _expect("number of a branch", number, state.id)
        _expect(f"children of branch {number} that are listed twice", len(state.children), len(set(state.children)))
        for child in state.children:
            _expect(f"child {child} of branch {number} is live", True, child in branches)
            _expect(f"parent of branch {child}", number, branches[child].parent)
            _expect(
                f"what child {child} of branch {number} sees first", True, state.head in branches[child].head.back()
            )
        if state.parent is not None:
            listed = state.parent in branches and number in branches[state.parent].children
            _expect(f"branch {number} is listed by its parent {state.parent}", True, listed)
        if state.merged:
            _expect(f"parent and children of merged branch {number}", (None, []), (state.parent, state.children))


def _check_node(node: Node, page_size: int) -> None:
    """Pages fit the length, and the list of visible nodes is closed."""
    _expect(f"pages of node {node.id} with {node.length} tokens", -(-node.length // page_size), len(node.pages))
    _expect(f"page array of node {node.id}", node.pages, node.page_array().tolist())
    visible = _seen(node)
    listed = 0 if node.chain is None else sum(1 for _ in node.chain.back())
    _expect(f"nodes that node {node.id} sees, once each and without itself", listed, len(visible - {node}))
    for before in (*visible, *node.predecessors):
        hidden = ({before} | _seen(before)) - visible
        _expect(f"nodes before {before.id} that node {node.id} does not see", [], sorted(n.id for n in hidden))


def _check_contents(link: Link, page_size: int) -> None:
    """Check that the remembered contents of a list are what its nodes hold, oldest first, now or at an earlier time."""
    if link.contents is None or not link.after or link.seen != link.node.length:
        return
    nodes = [before.node for before in link.back()][::-1]
    pages = [page for node in nodes for page in node.pages]
    counts = [count for n in nodes for count in page_counts(len(n.pages), n.length, page_size).tolist()]
    found: list[list[int]] = [[], []]
    for contents in [*link.contents.back()][::-1]:
        for kept, part in zip(found, contents.log.slice(0, contents.end), strict=True):
            kept += part.tolist()
    _expect(f"contents of a link of node {link.node.id}", [pages, counts], found)
    _expect(f"tokens up to a link of node {link.node.id}", sum(counts), link.contents.tokens)


def _check_fixed(link: Link) -> None:
    """Check that a list behind a cut never changes: each node has no handle, or is seen by a later node of the list."""
    frozen: set[Node] = set()
    for before in link.back():
        node = before.node
        if node.writer is not None and node not in frozen:
            raise CacheError(
                f"a list that branches were cut off behind: expected nodes that no branch can change, got {node} of "
                f"branch {node.writer}"
            )
        if node.length:
            frozen |= _seen(node)


def _check_handles(branches: Mapping[int, BranchEntry], refs: Collection[Node]) -> None:
    """Check that a node names its writer, and that a merged handle lives as long as its node can be written."""
    merged = {state.id: state.tail for state in branches.values() if state.merged}
    for number, tail in merged.items():
        _expect(f"node of merged branch {number} is live", True, tail in refs)
        _expect(f"tokens after merged branch {number}", False, tail.frozen)
    named = {node: node.writer for node in refs if node.writer is not None}
    _expect("nodes and the branches that write them", {b.tail: number for number, b in branches.items()}, named)


def _check_pages(owned: list[int], free: Collection[int], reserved: Collection[int], num_pages: int) -> None:
    """Every page is owned by one node, or reserved by the open step, or free."""
    shared = [page for page, times in Counter((*owned, *reserved, *free)).items() if times > 1]
    _expect("pages that are owned, reserved or free more than once", [], sorted(shared))
    present = {*owned, *reserved, *free}
    _expect("pages that nobody owns and that are not free", [], sorted(set(range(num_pages)) - present))
    _expect("pages that do not exist", [], sorted(present - set(range(num_pages))))
