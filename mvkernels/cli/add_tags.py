"""``mvkernels add-tags``: a model and its tokenizer, extended by the twelve control tags."""

from __future__ import annotations

from pathlib import Path

from mvkernels.grammar import TAGS
from mvkernels.model.checkpoint.files import require_checkpoint
from mvkernels.model.checkpoint.names import checkpoint_path
from mvkernels.model.files import require_free


def run(model: str, out: Path, seed: int, dtype: str | None) -> None:
    """Writes the extended checkpoint to ``out``, and says which ids the tags have there."""
    require_free(out)
    require_checkpoint(checkpoint_path(model))
    from mvkernels.model.checkpoint.add_tags import (
        add_tags_to_checkpoint,  # takes seconds, so a wrong path is said before
    )

    tags = add_tags_to_checkpoint(model, out, seed, dtype)
    print(f"{out}: " + " ".join(f"{tag} {number}" for tag, number in zip(TAGS, tags.ids, strict=True)))
