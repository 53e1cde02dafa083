"""``mvkernels add-tags``: a model and its tokenizer, extended by the twelve control tags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mvkernels.grammar import TAGS
from mvkernels.model.checkpoint.files import require_checkpoint
from mvkernels.model.checkpoint.names import checkpoint_path
from mvkernels.model.files import require_free


def run(
    model: Annotated[str, typer.Argument(help="Folder of a causal language model, a GGUF file, or embedded.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the extended model to.")],
    seed: Annotated[int, typer.Option(help="Of the noise in the new embedding rows.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16, float16. Default: as they were published.")
    ] = None,
) -> None:
    """Write the extended checkpoint to `out`, and print the ids of the tags there."""
    require_free(out)
    require_checkpoint(checkpoint_path(model))
    # Imports PyTorch, so a wrong path is an error before.
    from mvkernels.model.checkpoint.add_tags import add_tags_to_checkpoint

    tags = add_tags_to_checkpoint(model, out, seed, dtype)
    print(f"{out}: " + " ".join(f"{tag} {number}" for tag, number in zip(TAGS, tags.ids, strict=True)))
