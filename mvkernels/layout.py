"""BranchLayout: positions, mask and labels of a sequence with parallel branches, in O(T) integers.

Positions (canonical): a text of length n takes p .. p + n - 1. Every path of a block starts at the same p, and the
text after the block starts at the highest next position of its paths. Visibility: token i sees token j iff j <= i, both
are in the same document, and no block has j in one of its paths and i in another. The keys hidden from a token are
therefore at most *depth* contiguous intervals. Source: Multiverse attention, arXiv 2506.09991, section 4; the positions
are those of DESIGN.md, section 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from mvkernels.errors import described, require_integer, require_type
from mvkernels.grammar import SEMANTICS as SEMANTICS
from mvkernels.grammar import WHITESPACE, Block, Kind, Trace, Tree, parse
from mvkernels.layout_runs import Runs, released_runs, tree_runs
from mvkernels.mask import IntervalMask
from mvkernels.mask_tensor import MaskTable
from mvkernels.ops.device import checked_device
from mvkernels.tags import TagTokens, as_id_list

Value = TypeVar("Value")
MAX_DENSE = 2**16  # tokens of a dense mask: 4 GiB
IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class BranchLayout:
    """Positions, mask and labels of one packed row of documents; immutable.

    Build it with `from_token_ids`, `from_tree`, `causal` or `pack`.

    Attributes:
        position_ids: [T] int32 position of every token, for RoPE. Its device is the device of the layout.
        cu_seqlens: [num_documents + 1] int32, the first row of every document, then T.
        mask: The visible keys of every row as intervals, on the host.
        critical_path: Highest position + 1, summed over documents: decode steps when all paths of a block run in
            parallel.
        sampled: [T] bool on the host, False for prompt tokens and tokens that the engine forces.
        predecessor: [T] int32 on the host, the row whose logits predict the token; -1 for none, or for more than one.
        has_branches: Whether any token is hidden from a later token of its document.
        longest_document: Number of tokens of the longest document.

    Raises:
        ValueError: `position_ids` is not int32 [T].

    Source: Multiverse attention, arXiv 2506.09991, section 4.
    """

    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    mask: IntervalMask
    critical_path: int
    sampled: npt.NDArray[np.bool_] = field(repr=False)
    predecessor: npt.NDArray[np.int32] = field(repr=False)
    has_branches: bool = field(init=False)
    longest_document: int = field(init=False)
    _table: MaskTable = field(init=False, repr=False)
    _made: MaskTable | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        documents = f"{self.num_documents} document{'s' if self.num_documents != 1 else ''}"
        figures = f"critical path {self.critical_path}, parallelism {self.parallelism:.2f}"
        return f"BranchLayout({self.total_tokens} tokens, {documents}, {figures}, {self.device})"

    def __post_init__(self) -> None:
        expected = (torch.int32, (self.mask.total_tokens,))
        if (self.position_ids.dtype, tuple(self.position_ids.shape)) != expected:
            got = described(self.position_ids)
            raise ValueError(f"position_ids: expected [{self.mask.total_tokens}] torch.int32, got {got}")
        # Everything that an attention call reads is made here: torch.compile traces attributes, not NumPy on the host.
        starts = np.append(self.mask.first_key, np.int32(self.mask.total_tokens))
        documents = np.diff(starts[np.diff(starts, prepend=-1) > 0])
        object.__setattr__(self, "longest_document", int(documents.max(initial=0)))
        object.__setattr__(self, "has_branches", len(self.mask.gaps) > 0)
        table = MaskTable(self.mask, self.position_ids.device) if self._made is None else self._made
        object.__setattr__(self, "_table", table)

    # ---- construction

    @classmethod
    def from_token_ids(
        cls,
        ids: Sequence[int] | torch.Tensor | npt.NDArray[np.integer[Any]],
        tags: TagTokens,
        semantics: str = "canonical",
        prompt_length: int = 0,
        allow_open: bool = False,
    ) -> BranchLayout:
        """Lay out one document of token ids.

        Args:
            ids: T token ids: a list of integers, or an integer tensor or array [T].
            tags: Control-tag ids of the vocabulary.
            semantics: "canonical", or "released" for weights that were trained with the released Multiverse code.
            prompt_length: Number of leading tokens that carry no label, 0 .. T.
            allow_open: Accept a trace that ends anywhere, with blocks still open.

        Returns:
            The layout of one document, on the CPU.

        Raises:
            GrammarError: The control tags are malformed.
            ValueError: Another argument is invalid, or the mask would have more than 2**22 gaps.
        """
        if semantics not in SEMANTICS:
            raise ValueError(f"semantics: expected one of {SEMANTICS}, got {semantics!r}")
        require_type(TagTokens, tags=tags)
        values = as_id_list(ids)
        require_integer("prompt_length: expected an integer", prompt_length)
        if not 0 <= prompt_length <= len(values):
            raise ValueError(f"prompt_length: expected 0 to {len(values)} (the number of ids), got {prompt_length}")
        kinds = tags.kinds(values)
        trace = parse(kinds, allow_open)
        runs = tree_runs(trace.tree) if semantics == "canonical" else released_runs(kinds)
        sampled = sampled_tokens(values, tags, trace)
        sampled[:prompt_length] = False
        return cls._from_runs(runs, sampled)

    @classmethod
    def from_tree(cls, tree: Tree, sampled: Sequence[bool] | npt.NDArray[np.bool_] | None = None) -> BranchLayout:
        """Lay out a structure without token ids.

        Args:
            tree: A sequence: a list of text lengths and blocks. A block is a list of sequences, one for each path. A
                block at the end is not joined. Example: `[3, [[5], [2]], 4]` is 3 tokens, two paths of 5 and 2, and 4
                after the join.
            sampled: [T] booleans, True for each token that the model samples; None: all.

        Returns:
            The layout of one document, on the CPU.

        Raises:
            ValueError: The tree is malformed, its mask has more than 2**22 gaps, or `sampled` has another length.
        """
        runs = tree_runs(tree)
        if sampled is None:
            flags = np.ones(runs.total_tokens, dtype=np.bool_)
        else:
            flags = np.array(sampled, dtype=np.bool_)
            if flags.shape != (runs.total_tokens,):
                raise ValueError(
                    f"sampled: expected {runs.total_tokens} booleans, one a token, got shape {flags.shape}"
                )
        return cls._from_runs(runs, flags)

    @classmethod
    def causal(cls, length: int) -> BranchLayout:
        """Lay out `length` tokens of plain causal attention.

        Args:
            length: T, at least 0.

        Returns:
            The layout of one document, on the CPU.

        Raises:
            ValueError: `length` is negative or no integer.
        """
        return cls.from_tree([length])

    @classmethod
    @torch.inference_mode(False)  # a layout made during generation may be trained on: autograd saves its tensors
    def pack(cls, layouts: Iterable[BranchLayout]) -> BranchLayout:
        """Concatenate layouts into one row of documents without padding (varlen packing).

        Args:
            layouts: Layouts in order; each may itself be packed.

        Returns:
            One layout of all documents, on the device of the first layout.

        Raises:
            ValueError: There is no layout, an item is no BranchLayout, or the row would have 2**31 tokens or more.
        """
        if not isinstance(layouts, Iterable):
            raise ValueError(f"pack: expected a list of BranchLayouts, got {described(layouts)}")
        layouts = list(layouts)
        for layout in layouts:
            if not isinstance(layout, BranchLayout):
                raise ValueError(f"pack: expected BranchLayouts, got {described(layout)} among them")
        if not layouts:
            raise ValueError("pack: expected at least one layout, got none")
        offsets = np.cumsum([0] + [layout.total_tokens for layout in layouts], dtype=np.int64)
        gap_offsets = np.cumsum([0] + [len(layout.mask.gaps) for layout in layouts], dtype=np.int64)
        for what, total in (("tokens", offsets[-1]), ("gaps", gap_offsets[-1])):
            if total > np.iinfo(np.int32).max:
                raise ValueError(f"pack: expected fewer than 2**31 {what} in all, got {total}")
        pairs = list(zip(layouts, offsets[:-1].astype(np.int32), strict=True))
        device = layouts[0].device
        mask = IntervalMask(
            segment_starts=np.concatenate(
                [a.mask.segment_starts[:-1] + o for a, o in pairs] + [offsets[-1:].astype(np.int32)]
            ),
            first_key=np.concatenate([a.mask.first_key + o for a, o in pairs]),
            gap_ptr=np.concatenate(
                [a.mask.gap_ptr[:-1] + np.int32(g) for a, g in zip(layouts, gap_offsets[:-1], strict=True)]
                + [gap_offsets[-1:].astype(np.int32)]
            ),
            gaps=np.concatenate([a.mask.gaps + o for a, o in pairs]),
            total_tokens=int(offsets[-1]),
        )
        return cls(
            position_ids=torch.cat([layout.position_ids.to(device) for layout in layouts]),
            cu_seqlens=torch.cat(
                [a.cu_seqlens[:-1].to(device) + int(o) for a, o in pairs]
                + [torch.tensor(offsets[-1:], dtype=torch.int32, device=device)]
            ),
            mask=mask,
            critical_path=sum(layout.critical_path for layout in layouts),
            sampled=np.concatenate([layout.sampled for layout in layouts]),
            predecessor=np.concatenate(
                [np.where(a.predecessor >= 0, a.predecessor + o, np.int32(-1)) for a, o in pairs]
            ),
        )

    @classmethod
    @torch.inference_mode(False)
    def _from_runs(cls, runs: Runs, sampled: npt.NDArray[np.bool_]) -> BranchLayout:
        starts = np.array([*runs.starts, runs.total_tokens], dtype=np.int32)
        lengths = np.diff(starts)
        rows = np.arange(runs.total_tokens, dtype=np.int32)
        shift = np.array(runs.positions, dtype=np.int32) - starts[:-1]
        positions = rows + np.repeat(shift, lengths)
        predecessor = rows - 1
        predecessor[starts[:-1]] = runs.predecessors
        gap_ptr, gaps = runs.gap_arrays()
        mask = IntervalMask(
            segment_starts=starts,
            first_key=np.zeros(len(lengths), dtype=np.int32),
            gap_ptr=gap_ptr,
            gaps=gaps,
            total_tokens=runs.total_tokens,
        )
        return cls(
            position_ids=torch.from_numpy(positions),
            cu_seqlens=torch.tensor([0, runs.total_tokens], dtype=torch.int32, device="cpu"),
            mask=mask,
            critical_path=int(positions.max()) + 1 if runs.total_tokens else 0,
            sampled=sampled,
            predecessor=predecessor,
        )

    # ---- queries

    @property
    def total_tokens(self) -> int:
        """T, the number of tokens of all documents."""
        return self.position_ids.shape[0]  # the mask's number would make torch.compile compile again

    @property
    def mask_table(self) -> torch.Tensor:
        """The mask as one int32 tensor [N] on `device`, for the attention ops (`mvkernels.mask_tensor`)."""
        return self._table.tensor

    @property
    def device(self) -> torch.device:
        """Device of `position_ids`, `cu_seqlens` and the mask table."""
        return self.position_ids.device

    @property
    def num_documents(self) -> int:
        """Number of documents in the row."""
        return len(self.cu_seqlens) - 1

    @property
    def parallelism(self) -> float:
        """Tokens / critical path, "# parallel" in arXiv 2506.09991; 1.0 for an empty layout."""
        return self.total_tokens / self.critical_path if self.critical_path else 1.0

    def dense_mask(self) -> torch.Tensor:
        """Build the mask as a dense matrix, for tests and small inputs.

        Returns:
            [T, T] bool on the device of the layout, True where row i sees key j; T squared bytes.

        Raises:
            ValueError: T is more than 2**16.
        """
        if self.total_tokens > MAX_DENSE:
            expected = f"at most {MAX_DENSE} tokens, as it has T squared bytes"
            raise ValueError(f"dense_mask: expected {expected}, got {self.total_tokens}")
        visible = np.tri(self.total_tokens, dtype=np.bool_)
        mask = self.mask
        for s in range(mask.num_segments):
            rows = slice(mask.segment_starts[s], mask.segment_starts[s + 1])
            visible[rows, : mask.first_key[s]] = False
            for first, last in mask.gaps[mask.gap_ptr[s] : mask.gap_ptr[s + 1]]:
                visible[rows, first:last] = False
        return torch.from_numpy(visible).to(self.device)

    def labels(self, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Make training labels in transformers' unshifted convention.

        A token has a label if the model samples it and its predecessor is the row before it. In a tagged trace that
        holds for every sampled token but the first of a document. Use `targets` for structures without tags, where a
        path follows the trunk directly.

        Args:
            ids: [T] token ids: a list of integers, or an integer tensor.

        Returns:
            [T] int64 on the device of the layout: the token id, or -100.

        Raises:
            ValueError: `ids` is of another length or dtype.
        """
        values = self._ids_tensor(ids)
        labelled = self.sampled & (self.predecessor >= 0) & (self.predecessor == np.arange(self.total_tokens) - 1)
        return torch.where(torch.from_numpy(labelled).to(self.device), values, IGNORE_INDEX)

    def targets(self, ids: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pair each sampled token with the row whose logits predict it.

        The first token of a document has no such row, and the first token after a join of several paths has several;
        neither is included.

        Args:
            ids: [T] token ids: a list of integers, or an integer tensor.

        Returns:
            (rows, targets), both [N] int64 on the device of the layout: the predicting row, and the id of the token.

        Raises:
            ValueError: `ids` is of another length or dtype.
        """
        values = self._ids_tensor(ids)
        chosen = np.flatnonzero(self.sampled & (self.predecessor >= 0))
        rows = torch.from_numpy(self.predecessor[chosen].astype(np.int64)).to(self.device)
        return rows, values[torch.from_numpy(chosen).to(self.device)]

    def to(self, device: torch.device | str) -> BranchLayout:
        """Copy the layout to a device; derived data are shared.

        Args:
            device: Device of the tensors of the copy.

        Returns:
            The same layout on `device`.

        Raises:
            ValueError: PyTorch does not have the device here.
        """
        device = checked_device(device)
        with torch.inference_mode(False):
            moved = self.position_ids.to(device)
            cu_seqlens = self.cu_seqlens.to(device)
        # "cuda" has no index; the device of the moved tensor does.
        return replace(self, position_ids=moved, cu_seqlens=cu_seqlens, _made=self._table.to(moved.device))

    def cached(self, key: Hashable, build: Callable[[], Value]) -> Value:
        """Return `build()`, computed once per key for the lifetime of the mask.

        Args:
            key: Key of the value; for data on a device it must name the device.
            build: Called without arguments if the key is new.

        Returns:
            The value of `build`.
        """
        return self._table.cached(key, build)

    def _ids_tensor(self, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        given = ids if isinstance(ids, torch.Tensor) else torch.tensor(as_id_list(ids), dtype=torch.int64)
        if given.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
            raise ValueError(f"ids: expected integers, got {described(given)}")
        values = given.to(self.device, torch.int64)
        if values.shape != (self.total_tokens,):
            expected = f"shape [{self.total_tokens}], the layout's tokens"
            raise ValueError(f"ids: expected {expected}, got shape {list(values.shape)}")
        return values


def sampled_tokens(ids: Sequence[int], tags: TagTokens, trace: Trace) -> npt.NDArray[np.bool_]:
    """Find the tokens that the model samples: all but the prefix of each path and the opening of each conclusion.

    The prefix is recognised by its text, however many tokens that takes. No flag depends on later tokens, so the flags
    of a trace that ends early are the first flags of the whole trace. A token that holds more than the prefix is
    sampled.

    Args:
        ids: [T] token ids of the trace.
        tags: Control tags and texts of the vocabulary.
        trace: `ids` as parsed by `grammar.parse`.

    Returns:
        [T] bool, False for tokens that the engine forces.
    """
    sampled = np.ones(trace.length, dtype=np.bool_)
    pending: list[tuple[Block, ...]] = [trace.blocks]
    while pending:
        for block in pending.pop():
            for path in block.paths:
                end = trace.length if path.open is None else _index_end(ids, tags, path.open + 1)
                sampled[path.start : end] = False
                pending.append(path.blocks)
            if block.conclusion is not None:
                start = block.conclusion
                while start < trace.length and tags.kind(ids[start]) == Kind.SPACE:
                    start += 1
                sampled[block.conclusion : _newline_end(ids, tags, start + 1)] = False
    return sampled


_INDEX_START = re.compile(rf"[{re.escape(WHITESPACE)}]*(?:[0-9.]+:?)?")
_INDEX_REST = re.compile(r"[0-9.]*:?")


def _index_end(ids: Sequence[int], tags: TagTokens, offset: int) -> int:
    """Return the offset behind the whitespace, index and colon that begin at `offset`, counting whole tokens only."""
    expected, text = _INDEX_START, ""
    while offset < len(ids) and not text.endswith(":"):
        text = tags.text(ids[offset])
        if not text or not expected.fullmatch(text):
            break
        if text.strip(WHITESPACE):
            expected = _INDEX_REST
        offset += 1
    return offset


def _newline_end(ids: Sequence[int], tags: TagTokens, offset: int) -> int:
    """Return the offset behind the first newline of the whitespace at `offset`; the model samples the rest."""
    text = ""
    while offset < len(ids) and "\n" not in text:
        text = tags.text(ids[offset])
        if not text or text.strip(WHITESPACE):
            break
        offset += 1
    return offset
