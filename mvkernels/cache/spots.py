"""Rows and spots: where the nodes of a cache stand in tables on its device; `cache.rows` has the legend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mvkernels.cache.nodes import Node

Int32Array = npt.NDArray[np.int32]


@dataclass(eq=False, slots=True)
class Row:
    """What a branch owns, in order, as far as updates have met it.

    slot      None while it is absent from the tables
    alive     nodes in it that some branch sees; the others go when it is laid anew
    end       entries in the tables
    calls     after how many of an update's calls of merge it is complete
    stamp     the last update that wrote it or wanted it
    overlong  it did not fit when it was last laid, and no node of it has shrunk since
    """

    spots: list[Spot] = field(default_factory=list)
    alive: int = 0
    slot: int | None = None
    end: int = 0
    calls: int = 0
    stamp: int = 0
    overlong: bool = False

    def add(self, node: Node) -> Spot:
        """A node at the end, without entries."""
        spot = node.spot = Spot(node, self)
        self.spots.append(spot)
        self.alive += node.refs > 0
        return spot


@dataclass(eq=False, slots=True)
class Spot:
    """Entries first .. first + entries - 1 of the row hold the node's pages. The first `paged` of them name the right
    page, and the first `full` are known to count a full one.
    """

    node: Node
    row: Row
    first: int = 0
    entries: int = 0
    paged: int = 0
    full: int = 0

    def clear(self) -> None:
        self.entries = self.paged = self.full = 0


class Target(NamedTuple):
    """What a node holds in a step: `tokens` in pages [P], the first ones full; the next position after them."""

    pages: Int32Array
    tokens: int
    position: int
