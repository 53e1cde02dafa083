"""Checkpoints to resume from: each is whole or is passed over, however the run before ended."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from mvkernels.model.files import sync

#: The folder of checkpoints in the output folder of a run.
CHECKPOINTS = "checkpoints"
#: Where a checkpoint is written, among the others, until it is whole.
UNFINISHED = ".part"
# In each checkpoint: the sizes of its files, in bytes.
_SIZES = "sizes.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def publish(written: Path, folder: Path) -> None:
    """Move a checkpoint that is written to its place in `folder`, in one step. The ones before it are removed then.

    Args:
        written: `checkpoint-N`, on the same disk as `folder`.
        folder: The checkpoints of the run.
    """
    (written / _SIZES).write_text(json.dumps(_sizes(written)), encoding="utf-8")
    sync(written)
    target = folder / written.name
    if target.exists():  # one that was passed over
        shutil.rmtree(target)
    written.replace(target)
    sync(folder)
    for other in folder.glob("checkpoint-*"):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder` of which every file is there and has its size, or None."""
    steps = {int(match[1]): path for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))}
    return next((steps[step] for step in sorted(steps, reverse=True) if _is_whole(steps[step])), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        expected = json.loads((checkpoint / _SIZES).read_text(encoding="utf-8"))
        found = _sizes(checkpoint)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(expected, dict) and bool(expected) and expected.items() <= found.items()


def _sizes(checkpoint: Path) -> dict[str, int]:
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
