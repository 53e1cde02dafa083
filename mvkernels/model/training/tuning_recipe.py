"""The recipe of supervised fine-tuning on traces: a small TOML file, every field of which the command line may set."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from mvkernels.grammar import SEMANTICS
from mvkernels.model.checkpoint.files import DTYPES, require_checkpoint
from mvkernels.model.checkpoint.names import checkpoint_path
from mvkernels.model.curator.outputs import TRACES
from mvkernels.model.settings import described, option
from mvkernels.model.training.recipe_file import RecipeFile

#: Recipes that come with the package.
SHIPPED = Path(__file__).resolve().parent / "recipes"
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TuningRecipe(RecipeFile):
    """How a base model is tuned on traces.

    Attributes:
        model: Folder of the base model (safetensors), or a GGUF file. Missing control tags are added.
        data: JSONL files, .xml traces, folders of either (see `traces.read_examples`).
        tokenizer: tokenizer.json, or a folder with one, instead of the model's.
        end_of_text: Token that ends a document; "": the tokenizer's own.
        held_out: Number of last examples that are evaluated instead of trained on.
        semantics: "canonical", or "released" for weights trained with the released Multiverse code.
        parallel_ending: End of the prompt of Multiverse data.
        sequential_ending: End of the prompt of sequential data.
        chat: Whether prompts go through the tokenizer's chat template, if it has one.
        passes: Share of Multiverse data in each pass over the data; the rest of a pass is sequential.
        documents_per_step: Examples of one optimizer step, over all processes: the effective batch.
        tokens_per_row: Most tokens of a packed row. A step has as few rows as possible.
        tokens_per_document: Longest document; 0: tokens_per_row.
        cut: Whether longer documents are cut; otherwise they are errors.
        steps: Number of optimizer steps; 0: all passes.
        learning_rate: Peak. The rate rises linearly to it, then falls to 0 along a cosine.
        warmup_share: Share of the steps up to the peak.
        weight_decay: Of AdamW.
        betas: Of AdamW.
        max_grad_norm: Of gradient clipping.
        precision: "bf16": products in bf16 (autocast), weights in fp32. "fp32": all in fp32.
        dtype: Of the saved weights: "float32", "bfloat16", "float16". "": bfloat16 with precision "bf16", else the
            dtype in which the base model was published (a quantized GGUF file: bfloat16).
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        lora_rank: 0: all weights are trained. Else LoRA on every linear layer, and the embeddings of the tags.
        lora_alpha: Of LoRA.
        lora_dropout: Of LoRA.
        merge: Whether LoRA is merged into the saved weights; otherwise an adapter is saved.
        tensorboard: Whether TensorBoard logs are written to `logs` in the output folder.
        evaluate_every: Steps between two evaluations of the held-out examples; 0: before and after training only.
        log_every: Steps between two logged losses.
        save_every: Steps between two checkpoints to resume from.
        seed: Of new embedding rows, LoRA, and the order of the data.

    Raises:
        ValueError: A value is out of range.
    """

    outcome: ClassVar[str] = "losses.csv"

    model: str = field(metadata=described("Folder of the base model, or a GGUF file."))
    data: tuple[str, ...] = field(metadata=described("JSONL files, .xml traces, folders of either.", commas=True))
    tokenizer: str = option("", "A tokenizer.json, or a folder with one, instead of the model's.")
    end_of_text: str = option("", "Token that ends a document.")
    held_out: int = option(0, "Examples at the end that are not trained on, but evaluated.")
    semantics: str = option("canonical", "canonical, or released.")
    parallel_ending: str = option(
        " Think step by step and in parallel before answering.", "End of the prompt of Multiverse data."
    )
    sequential_ending: str = option(" Think step by step before answering.", "End of the prompt of sequential data.")
    chat: bool = option(True, "Whether prompts go through the tokenizer's chat template.")
    passes: tuple[float, ...] = option((1.0,), "Share of Multiverse data in each pass.", commas=True)
    documents_per_step: int = option(16, "Examples of one optimizer step.")
    tokens_per_row: int = option(32768, "Tokens of a packed row, at most.")
    tokens_per_document: int = option(0, "Longest document; 0: tokens-per-row.")
    cut: bool = option(False, "Cut longer documents instead of refusing them.")
    steps: int = option(0, "Stop after so many optimizer steps; 0: all passes.")
    learning_rate: float = option(1e-5, "Peak.")
    warmup_share: float = option(0.05, "Share of the steps up to the peak.")
    weight_decay: float = option(1e-4, "Of AdamW.")
    betas: tuple[float, ...] = option((0.9, 0.95), "Of AdamW.", commas=True)
    max_grad_norm: float = option(1.0, "Of clipping.")
    precision: str = option("fp32", "bf16: products in bf16, weights in fp32; fp32: all in fp32.")
    dtype: str = option("", "Of the saved weights: float32, bfloat16, float16.")
    gradient_checkpointing: bool = option(False, "Compute activations again in the backward pass.")
    lora_rank: int = option(0, "0: all weights are trained.")
    lora_alpha: float = option(32.0, "Of LoRA.")
    lora_dropout: float = option(0.0, "Of LoRA.")
    merge: bool = option(True, "Whether LoRA is merged into the saved weights.")
    tensorboard: bool = option(False, "Write TensorBoard logs to OUT/logs.")
    evaluate_every: int = option(0, "Steps between two evaluations; 0: first and last only.")
    log_every: int = option(1, "Steps between two logged losses.")
    save_every: int = option(100, "Steps between two checkpoints to resume from.")
    seed: int = option(0, "Of new embedding rows, LoRA, and the order of the data.")

    def __post_init__(self) -> None:
        for name in ("documents_per_step", "tokens_per_row", "log_every", "save_every"):
            self._require(name, "a whole number >= 1", getattr(self, name) >= 1)
        for name in ("held_out", "tokens_per_document", "steps", "evaluate_every", "lora_rank"):
            self._require(name, "a whole number >= 0", getattr(self, name) >= 0)
        self._require(
            "learning_rate", "a finite number > 0", math.isfinite(self.learning_rate) and self.learning_rate > 0
        )
        self._require("weight_decay", "a finite number >= 0", 0 <= self.weight_decay < math.inf)
        self._require("max_grad_norm", "a number > 0", self.max_grad_norm > 0)
        self._require("lora_alpha", "a number > 0", self.lora_alpha > 0)
        for name in ("warmup_share", "lora_dropout"):
            self._require(name, "a number in [0, 1)", 0 <= getattr(self, name) < 1)
        self._require("betas", "two numbers in [0, 1)", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas))
        self._require("passes", "shares in [0, 1]", bool(self.passes) and all(0 <= share <= 1 for share in self.passes))
        self._require("data", "at least one file or folder", bool(self.data))
        self._require("semantics", f"one of {SEMANTICS}", self.semantics in SEMANTICS)
        self._require("precision", f"one of {PRECISIONS}", self.precision in PRECISIONS)
        self._require("dtype", f"one of {DTYPES}", self.dtype in ("", *DTYPES))
        longest = f"at most tokens_per_row, {self.tokens_per_row}"
        self._require("tokens_per_document", longest, self.tokens_per_document <= self.tokens_per_row)
        self._require("save_every", f"a multiple of log_every, {self.log_every}", self.save_every % self.log_every == 0)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document: tokens_per_document, else tokens_per_row."""
        return self.tokens_per_document or self.tokens_per_row

    def check_inputs(self) -> None:
        """Look for the base model, the tokenizer and the data, and read none of them.

        Raises:
            ValueError: One of them is not there.
        """
        require_checkpoint(checkpoint_path(self.model), tokenizer=not self.tokenizer)
        tokenizer = checkpoint_path(self.tokenizer)
        if self.tokenizer and not tokenizer.is_file():
            require_checkpoint(tokenizer, weights=False)
        for path in self.data:
            data_files(path)


def data_files(path: str | Path) -> list[Path]:
    """The files of an entry of `data`: itself, or the .jsonl and .xml files of a folder. ValueError without any.

    Of a folder that `curate` wrote, `traces.jsonl` alone: its other files hold no other traces. A Parquet file in a
    folder may hold the same traces as another file there, so it counts only by its own name.
    """
    path = Path(path)
    if path.is_dir() and (path / TRACES).is_file():
        return [path / TRACES]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in (".xml", ".jsonl"))
    else:
        found = [path] if path.is_file() and path.suffix in (".xml", ".jsonl", ".parquet") else []
    if not found:
        raise ValueError(f"data: expected a .jsonl, .xml or .parquet file, or a folder with some, got {path}")
    return found


def find_recipe(name: str | Path) -> Path:
    """A TOML file: at that path, or among those that come with the package. Raises ValueError for neither."""
    for path in (Path(name), SHIPPED / name):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.name for path in SHIPPED.glob("*.toml")))
    raise ValueError(f"expected a recipe: a TOML file, or one of {shipped}; found no {name}")


def load_recipe(path: Path, given: Mapping[str, Any] | None = None) -> TuningRecipe:
    """The recipe of a TOML file with some fields replaced. Raises ValueError for what is no recipe."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number too long, lists nested too deep
        raise ValueError(f"expected a recipe in TOML, got {path}: {error}") from None
    values |= given or {}
    missing = sorted({"model", "data"} - values.keys())
    if missing:
        raise ValueError(f"{path}: expected the fields {', '.join(missing)}, which are not given")
    try:
        return TuningRecipe(**{name: _value(name, value) for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _hints() -> dict[str, Any]:
    hints = get_type_hints(TuningRecipe)
    return {field.name: hints[field.name] for field in fields(TuningRecipe)}


def _value(name: str, value: Any) -> Any:
    """A value from TOML in the type of its field."""
    hint = _hints().get(name)
    if hint is None:
        raise ValueError(f"{name}: expected a field of a recipe, one of {', '.join(_hints())}")
    if hint in (tuple[str, ...], tuple[float, ...]):
        if isinstance(value, (list, tuple)):
            return tuple(_scalar(name, str if hint == tuple[str, ...] else float, item) for item in value)
        raise ValueError(f"{name}: expected a list, got {value!r}")
    return _scalar(name, hint, value)


def _scalar(name: str, kind: type, value: Any) -> Any:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise ValueError(f"{name}: expected {words[kind]}, got {value!r}")
