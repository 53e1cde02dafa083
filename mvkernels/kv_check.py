"""The invariants of the paged cache, recomputed from the live branches alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from mvkernels.errors import CacheError
from mvkernels.kv_nodes import BranchState, Node


def check_cache(
    branches: Mapping[int, BranchState],
    nodes: Mapping[int, Node],
    free: Collection[int],
    reserved: Collection[int],
    num_pages: int,
    page_size: int,
) -> None:
    """Raises CacheError, with what was expected and what is there, at the first invariant that does not hold."""
    _check_branches(branches)
    refs = Counter(node for state in branches.values() if not state.merged for node in state.nodes)
    _expect("live nodes", sorted(node.id for node in refs), sorted(nodes))
    frozen = Counter(seen for node in refs if node.length for seen in node.visible)
    ends: dict[Node, int] = {}
    for node in sorted(refs, key=lambda node: node.id):  # whatever a node starts after was made before it
        _expect(f"the node numbered {node.id}", node, nodes[node.id])
        _expect(f"references of node {node.id}", refs[node], node.refs)
        _expect(f"nodes with tokens after node {node.id}", frozen[node], node.frozen)
        _check_node(node, page_size)
        # By definition and in another way than `resolve_start`, which this judges too.
        start = max((ends[before] for before in node.predecessors), default=0)
        _expect(f"start of node {node.id} with {node.length} tokens", start if node.length else None, node.start)
        ends[node] = start + node.length
    _check_handles(branches, refs)
    owned = [page for node in refs for page in node.pages]
    _check_pages(owned, free, reserved, num_pages)


def _expect(what: str, expected: object, got: object) -> None:
    if expected != got:
        raise CacheError(f"{what}: expected {expected}, got {got}")


def _check_branches(branches: Mapping[int, BranchState]) -> None:
    """Parents and children name each other; no two branches write one node."""
    _expect("branches that share a tail", len(branches), len({state.tail for state in branches.values()}))
    for number, state in branches.items():
        _expect("number of a branch", number, state.id)
        _expect(f"children of branch {number} that are listed twice", len(state.children), len(set(state.children)))
        for child in state.children:
            _expect(f"child {child} of branch {number} is live", True, child in branches)
            _expect(f"parent of branch {child}", number, branches[child].parent)
            _expect(f"what child {child} of branch {number} sees first", state.nodes, branches[child].tail.visible[
                : len(state.nodes)
            ])  # fmt: skip
        if state.parent is not None:
            listed = state.parent in branches and number in branches[state.parent].children
            _expect(f"branch {number} is listed by its parent {state.parent}", True, listed)
        if state.merged:
            _expect(f"parent and children of merged branch {number}", (None, []), (state.parent, state.children))


def _check_node(node: Node, page_size: int) -> None:
    """Pages fit the length, and the list of visible nodes is closed."""
    _expect(f"pages of node {node.id} with {node.length} tokens", -(-node.length // page_size), len(node.pages))
    _expect(f"page array of node {node.id}", node.pages, node.page_array().tolist())
    visible = set(node.visible)
    _expect(f"nodes that node {node.id} sees, once each and without itself", len(node.visible), len(visible - {node}))
    for before in (*node.visible, *node.predecessors):
        hidden = ({before} | set(before.visible)) - visible
        _expect(f"nodes before {before.id} that node {node.id} does not see", [], sorted(n.id for n in hidden))


def _check_handles(branches: Mapping[int, BranchState], refs: Collection[Node]) -> None:
    """A merged handle lives as long as its node may still be written, and its node says so."""
    merged = {state.id: state.tail for state in branches.values() if state.merged}
    for number, tail in merged.items():
        _expect(f"node of merged branch {number} is live", True, tail in refs)
        _expect(f"tokens after merged branch {number}", 0, tail.frozen)
    named = {node.merged_branch: node for node in refs if node.merged_branch is not None}
    _expect("merged branches and their nodes", merged, named)


def _check_pages(owned: list[int], free: Collection[int], reserved: Collection[int], num_pages: int) -> None:
    """Every page is owned by one node, or reserved by the open step, or free."""
    shared = [page for page, times in Counter((*owned, *reserved, *free)).items() if times > 1]
    _expect("pages that are owned, reserved or free more than once", [], sorted(shared))
    present = {*owned, *reserved, *free}
    _expect("pages that nobody owns and that are not free", [], sorted(set(range(num_pages)) - present))
    _expect("pages that do not exist", [], sorted(present - set(range(num_pages))))
