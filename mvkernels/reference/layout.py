"""Positions and masks by definition, slowly: `mvkernels.layout` is tested against this module.

A tree is that of `mvkernels.grammar`: a sequence is a list of text lengths and blocks, a block a list of sequences.
Every token gets the (block, path) pairs that enclose it. Token i sees token j iff j <= i and no block has j in one of
its paths and i in another. Source: DESIGN.md, section 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch

from mvkernels.grammar import WHITESPACE, Block, Kind, Trace, Tree

Enclosing = dict[int, int]  # block number -> path number


def tree_positions(tree: Tree) -> torch.Tensor:
    """Compute the positions of the tokens of a tree by recursion.

    Args:
        tree: A sequence of text lengths and blocks.

    Returns:
        [T] int64 positions.
    """
    positions: list[int] = []
    _place(tree, 0, positions)
    return torch.tensor(positions, dtype=torch.int64)


def _place(sequence: Tree, position: int, positions: list[int]) -> int:
    for item in sequence:
        if isinstance(item, int):
            positions.extend(range(position, position + item))
            position += item
        else:
            position = max(_place(path, position, positions) for path in item)
    return position


def tree_mask(tree: Tree) -> torch.Tensor:
    """Compute the mask of a tree: one document, canonical semantics.

    Args:
        tree: A sequence of text lengths and blocks.

    Returns:
        [T, T] bool, True where row i sees key j.
    """
    enclosing: list[Enclosing] = []
    _enclose(tree, {}, count(), enclosing)
    return mask_from_enclosing(enclosing)


def _enclose(sequence: Tree, outer: Enclosing, blocks: Any, out: list[Enclosing]) -> None:
    for item in sequence:
        if isinstance(item, int):
            out.extend([outer] * item)
        else:
            block = next(blocks)
            for number, path in enumerate(item):
                _enclose(path, {**outer, block: number}, blocks, out)


def mask_from_enclosing(enclosing: list[Enclosing]) -> torch.Tensor:
    """Compute the mask pair by pair, as it is defined.

    Args:
        enclosing: For each token, block -> path.

    Returns:
        [T, T] bool, True where row i sees key j.
    """
    total = len(enclosing)
    mask = torch.zeros(total, total, dtype=torch.bool)
    for i in range(total):
        for j in range(i + 1):
            mask[i, j] = all(enclosing[i].get(block, path) == path for block, path in enclosing[j].items())
    return mask


def pack_masks(masks: list[torch.Tensor]) -> torch.Tensor:
    """Build the mask of concatenated documents: nothing is visible across documents.

    Args:
        masks: A mask for each document.

    Returns:
        [T, T] bool for the tokens of all documents.
    """
    total = sum(len(mask) for mask in masks)
    packed = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for mask in masks:
        packed[start : start + len(mask), start : start + len(mask)] = mask
        start += len(mask)
    return packed


def trace_enclosing(trace: Trace, semantics: str) -> list[Enclosing]:
    """Find the (block, path) pairs that enclose each token of a parsed trace.

    Args:
        trace: A parsed trace.
        semantics: "canonical": the span of a path begins with the whitespace before `<Path>`. "released": it is
            `<Path>` to `</Path>` inclusive.

    Returns:
        For each token, block -> path.
    """
    enclosing: list[Enclosing] = [{} for _ in range(trace.length)]
    numbers = count()

    def visit(blocks: tuple[Block, ...]) -> None:
        for block in blocks:
            identity = next(numbers)
            for number, path in enumerate(block.paths):
                first = path.start if semantics == "canonical" else path.open
                end = trace.length if path.end is None else path.end
                for token in range(end if first is None else first, end):
                    enclosing[token][identity] = number
                visit(path.blocks)

    visit(trace.blocks)
    return enclosing


def trace_sampled(trace: Trace, texts: Sequence[str]) -> list[bool]:
    """Find the tokens of a parsed trace that the model samples.

    The engine forces the beginning of each path up to its index and colon, and of each conclusion up to the first
    newline after the tag. A token is forced if it ends within that text, or if it only reaches beyond it with
    whitespace.

    Args:
        trace: A parsed trace.
        texts: The text of each token.

    Returns:
        For each token, whether the model samples it.
    """
    sampled = [True] * trace.length

    def written(start: int, opening: int | None, pattern: str) -> None:
        behind = trace.length if opening is None else opening + 1
        sampled[start:behind] = [False] * (behind - start)
        match = re.match(pattern, "".join(texts[behind:]))
        left = match.end() if match else 0
        for token in range(behind, trace.length):
            if left <= 0 or (len(texts[token]) > left and texts[token].strip(WHITESPACE)):
                break
            sampled[token] = False
            left -= len(texts[token])

    def visit(blocks: tuple[Block, ...]) -> None:
        for block in blocks:
            for path in block.paths:
                written(path.start, path.open, rf"[{WHITESPACE}]*([0-9.]+:?)?")
                visit(path.blocks)
            if block.conclusion is not None:
                begins = (i for i in range(block.conclusion, trace.length) if texts[i].strip(WHITESPACE))
                blank = WHITESPACE.replace("\n", "")
                written(block.conclusion, next(begins, None), rf"[{blank}]*\n?")

    visit(trace.blocks)
    return sampled


def released_positions(kinds: bytes) -> torch.Tensor:
    """Compute the positions of the released training code, token by token.

    Args:
        kinds: One `Kind` per token; they must parse.

    Returns:
        [T] int64 positions.
    """
    positions: list[int] = []
    goal_ends: list[int] = []
    path_ends: list[list[int]] = []
    for kind in kinds:
        position = positions[-1] + 1 if positions else 0
        if kind == Kind.PARALLEL:
            path_ends.append([])
        elif kind == Kind.GOAL_END:
            goal_ends.append(position)
        elif kind == Kind.PATH:
            position = goal_ends[-1] + 1
        elif kind == Kind.PATH_END:
            path_ends[-1].append(position)
        elif kind == Kind.CONCLUSION:
            position = max(path_ends[-1]) + 1
        elif kind == Kind.PARALLEL_END:
            goal_ends.pop()
            path_ends.pop()
        positions.append(position)
    return torch.tensor(positions, dtype=torch.int64)
