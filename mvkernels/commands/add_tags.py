"""``mvkernels add-tags``: a model and its tokenizer, extended by the twelve control tags."""

from __future__ import annotations

from pathlib import Path

from mvkernels.grammar import TAGS
from mvkernels.model.tokens import add_tags_to_checkpoint


def run(model: Path, out: Path, seed: int) -> None:
    """Writes the extended checkpoint to ``out``, and says which ids the tags have there."""
    tags = add_tags_to_checkpoint(model, out, seed)
    print(f"{out}: " + " ".join(f"{tag} {number}" for tag, number in zip(TAGS, tags.ids, strict=True)))
