"""The recipe of supervised fine-tuning on traces: a small TOML file, every field of which the command line may set."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from mvkernels.grammar import SEMANTICS
from mvkernels.model.checkpoint.files import DTYPES, require_checkpoint
from mvkernels.model.checkpoint.names import checkpoint_path
from mvkernels.model.curator.outputs import TRACES
from mvkernels.model.training.recipe_file import RecipeFile

#: Recipes that come with the package.
SHIPPED = Path(__file__).resolve().parent / "recipes"
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TuningRecipe(RecipeFile):
    """How a base model is tuned on traces.

    model                 folder of the base model (safetensors) or GGUF file; without the control tags, it gets them
    tokenizer             tokenizer.json, or a folder with one, instead of the model's
    end_of_text           token that ends a document; default: the tokenizer's own
    data                  JSONL files, .xml traces, folders of either (see `traces.read_examples`)
    held_out              the last so many examples are not trained on: their loss is what evaluation measures
    semantics             "canonical", or "released" for weights trained with the released Multiverse code
    parallel_ending, sequential_ending    what a prompt ends with, for Multiverse data and for sequential data
    chat                  prompts go through the tokenizer's chat template where it has one
    passes                share of Multiverse data in each pass over the data; the rest of a pass is sequential
    documents_per_step    examples of one optimizer step, over all processes: the effective batch
    tokens_per_row        a step's documents are packed into as few rows as hold at most so many tokens each
    tokens_per_document   longest document; 0: tokens_per_row
    cut                   cut longer documents there; otherwise they are bad
    steps                 stop after so many optimizer steps; 0: all passes
    learning_rate         peak; a straight line up to it, then a cosine down to 0
    warmup_share          share of the steps up to the peak
    weight_decay, betas, max_grad_norm    of AdamW, and of clipping
    precision             "bf16": products in bf16 (autocast), weights in fp32; "fp32": all in fp32
    dtype                 of the saved weights: "float32", "bfloat16", "float16"; default: bfloat16 with "bf16", else
                          the dtype in which the base model was published (a quantized GGUF file: bfloat16)
    gradient_checkpointing    compute activations again in the backward pass instead of keeping them
    lora_rank             0: all weights are trained. Else LoRA on every linear layer, and the tags' embeddings
    lora_alpha, lora_dropout    of LoRA
    merge                 LoRA is merged into the weights when saving; otherwise an adapter is saved
    tensorboard           write TensorBoard logs to `logs` in the output folder
    evaluate_every        steps between two evaluations of what is held out; 0: before and after training only
    log_every, save_every    steps between two logged losses, and between two checkpoints to resume from
    seed                  of new embedding rows, LoRA, and the order of the data

    Raises ValueError when a value is out of range.
    """

    outcome: ClassVar[str] = "losses.csv"

    model: str
    data: tuple[str, ...]
    tokenizer: str = ""
    end_of_text: str = ""
    held_out: int = 0
    semantics: str = "canonical"
    parallel_ending: str = " Think step by step and in parallel before answering."
    sequential_ending: str = " Think step by step before answering."
    chat: bool = True
    passes: tuple[float, ...] = (1.0,)
    documents_per_step: int = 16
    tokens_per_row: int = 32768
    tokens_per_document: int = 0
    cut: bool = False
    steps: int = 0
    learning_rate: float = 1e-5
    warmup_share: float = 0.05
    weight_decay: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    dtype: str = ""
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    merge: bool = True
    tensorboard: bool = False
    evaluate_every: int = 0
    log_every: int = 1
    save_every: int = 100
    seed: int = 0

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


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`--field value`, `--field=value`, and `--field` alone for a truth value. Raises ValueError for anything else."""
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"expected --field value, got {word!r}")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            alone = not rest or rest[0].startswith("--")
            if alone and _hints().get(name) is not bool:
                raise ValueError(f"--{name}: expected a value, got none")
            value = "true" if alone else rest.pop(0)
        given[name] = value
    return given


def _hints() -> dict[str, Any]:
    hints = get_type_hints(TuningRecipe)
    return {field.name: hints[field.name] for field in fields(TuningRecipe)}


def _value(name: str, value: Any) -> Any:
    """A value from TOML, or a text from the command line, in the type of its field."""
    hint = _hints().get(name)
    if hint is None:
        raise ValueError(f"{name}: expected a field of a recipe, one of {', '.join(_hints())}")
    if hint in (tuple[str, ...], tuple[float, ...]):
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, (list, tuple)):
            return tuple(_scalar(name, str if hint == tuple[str, ...] else float, item) for item in items)
        raise ValueError(f"{name}: expected a list, got {value!r}")
    return _scalar(name, hint, value)


def _scalar(name: str, kind: type, value: Any) -> Any:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if kind is bool and value in ("true", "false"):
        return value == "true"
    if type(value) is kind:
        return value
    try:
        if kind is float and type(value) is int:
            return float(value)
        if kind in (int, float) and isinstance(value, str):
            return kind(value)
    except ValueError:
        pass
    raise ValueError(f"{name}: expected {words[kind]}, got {value!r}")
