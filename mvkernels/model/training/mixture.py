"""From passes over the data to packed rows, all known before training starts: what `--dry-run` prints.

In each pass every example comes once, in an order of its own. A share of them is written as Multiverse documents, the
rest as sequential ones. The stream of all passes is cut into steps of as many documents, and a step into as many rows;
what the last step lacks is repeated from the beginning of the last pass. Rows are balanced by their tokens, and their
number is the smallest with which every row of every step keeps within its budget.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from mvkernels.model.training.packing import pack_row
from mvkernels.model.training.traces import Document, EncodedExample
from mvkernels.model.training.tuning_recipe import TuningRecipe


@dataclass(frozen=True)
class Pass:
    """One pass over the data, as counted: documents and tokens of each kind. labelled: tokens with a label."""

    share: float
    parallel: int
    sequential: int
    parallel_tokens: int
    sequential_tokens: int
    labelled: int


@dataclass(frozen=True)
class Mixture:
    """rows: the documents of each row, step after step. repeated: documents that fill the last step."""

    passes: tuple[Pass, ...]
    rows: tuple[tuple[Document, ...], ...]
    rows_per_step: int
    repeated: int

    @property
    def steps(self) -> int:
        return len(self.rows) // self.rows_per_step


def make_mixture(recipe: TuningRecipe, examples: Sequence[EncodedExample], processes: int = 1) -> Mixture:
    """The whole training, row by row. processes: each takes one row at a time, so rows_per_step is a multiple of it.

    Raises ValueError where documents_per_step is less than the processes.
    """
    if recipe.documents_per_step < processes:
        raise ValueError(
            f"documents_per_step: expected at least one document for each of {processes} processes, "
            f"got {recipe.documents_per_step}"
        )
    passes: list[Pass] = []
    stream: list[Document] = []
    last: list[Document] = []
    for number, share in enumerate(recipe.passes):
        last = _draw(examples, share, f"{recipe.seed} {number}")
        stream += last
        passes.append(_count(share, last, {id(example.parallel) for example in examples}))
    lacking = -len(stream) % recipe.documents_per_step
    stream += [last[i % len(last)] for i in range(lacking)]
    steps = [stream[i : i + recipe.documents_per_step] for i in range(0, len(stream), recipe.documents_per_step)]
    if recipe.steps:
        steps = steps[: recipe.steps]
    count = processes
    while True:
        rows = [row for step in steps for row in _balance(step, count)]
        if all(sum(len(doc.ids) for doc in row) <= recipe.tokens_per_row for row in rows):
            return Mixture(tuple(passes), tuple(rows), count, lacking)
        count += processes
        if count > recipe.documents_per_step:
            # Each document fits alone, but the rows of a step are to be as many for each process, and none empty.
            raise ValueError(
                f"documents_per_step: expected a multiple of {processes} (the processes), as no fewer rows hold a step "
                f"within {recipe.tokens_per_row} tokens each, got {recipe.documents_per_step}"
            )


def _draw(examples: Sequence[EncodedExample], share: float, seed: str) -> list[Document]:
    generator = random.Random(seed)
    order = list(examples)
    generator.shuffle(order)
    parallel = round(share * len(order))
    documents = [example.parallel for example in order[:parallel]] + [
        example.sequential for example in order[parallel:]
    ]
    generator.shuffle(documents)
    return documents


def _count(share: float, documents: Sequence[Document], parallel: set[int]) -> Pass:
    kinds: dict[bool, list[int]] = {True: [], False: []}
    for document in documents:
        kinds[id(document) in parallel].append(len(document.ids))
    return Pass(
        share,
        len(kinds[True]),
        len(kinds[False]),
        sum(kinds[True]),
        sum(kinds[False]),
        sum(document.labelled for document in documents),
    )


def _balance(documents: Sequence[Document], count: int) -> list[tuple[Document, ...]]:
    """`count` rows of about as many tokens, none empty: the longest document first, to the shortest row."""
    rows: list[list[Document]] = [[] for _ in range(count)]
    heap = [(0, i) for i in range(count)]
    for document in sorted(documents, key=lambda doc: -len(doc.ids)):
        tokens, i = heapq.heappop(heap)
        rows[i].append(document)
        heapq.heappush(heap, (tokens + len(document.ids), i))
    return [tuple(row) for row in rows]


class PackedRows(Dataset[dict[str, Any]]):
    """Rows of documents, packed when they are asked for (see `pack_row`), with the documents' names in "names"."""

    def __init__(self, rows: Sequence[Sequence[Document]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**pack_row((document.ids, document.layout()) for document in row), "names": [doc.name for doc in row]}
