"""Answers of an engine to questions, one JSON line a sample, in a file from which an interrupted run goes on.

The first line of a file says what was run; a file of another run is refused. The samples of a batch of questions are
written when all of them have ended, at once, so a file never holds a part of a question's samples that counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.evaluation.questions import Question
from mvkernels.model.files import errors_name, write_whole
from mvkernels.model.json_input import parse_json, shown
from mvkernels.model.tasks.common import PARALLEL_ENDING, SEQUENTIAL_ENDING

if TYPE_CHECKING:
    from mvkernels.model.engine.engine import Engine
    from mvkernels.model.engine.output.events import FinishEvent

FORMAT, VERSION = "mvkernels.samples", 1


@dataclass(frozen=True)
class Mode:
    """How a question is put. ending: of the prompt. blocks: whether the model may open any; name: in tables."""

    name: str
    ending: str
    blocks: bool


#: "parallel" asks for blocks. "zero" does not, but the model may open some ("-zero" in arXiv 2506.09991). In
#: "sequential" it may not.
MODES = {
    mode.name: mode
    for mode in (
        Mode("parallel", PARALLEL_ENDING, True),
        Mode("zero", SEQUENTIAL_ENDING, True),
        Mode("sequential", SEQUENTIAL_ENDING, False),
    )
}


@dataclass(frozen=True)
class Sample:
    """One answer. tokens, critical_path: generated ones. seconds: from when its batch of questions was handed to the
    engine to the end of this answer. exact: whether it is a trace that models are trained to write, where known.
    """

    question: str
    sample: int
    correct: bool
    expected: str
    tokens: int
    critical_path: int
    steps: int
    finish_reason: str
    seconds: float
    text: str
    size: int | None = None
    exact: bool | None = None

    @property
    def parallelism(self) -> float:
        """Tokens / critical path."""
        return self.tokens / max(self.critical_path, 1)


_TYPES: dict[str, Any] = get_type_hints(Sample)


@dataclass(frozen=True)
class Plan:
    """What is run: the model's name, the mode, the sampling, n samples of each question, `batch` questions at once.

    Raises ValueError for several samples that would all be the same.
    """

    model: str
    mode: Mode
    config: GenerationConfig
    n: int = 1
    batch: int = 16

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch < 1:
            raise ValueError(f"expected n and batch of at least 1, got {self.n} and {self.batch}")
        if self.n > 1 and self.config.temperature == 0:
            raise ValueError(f"expected a temperature above 0 for {self.n} samples of a question, got 0")

    def prompt(self, question: Question, chat: bool) -> Any:
        """What the engine is given. chat: whether the model has a chat template."""
        text = question.text + self.mode.ending
        return [{"role": "user", "content": text}] if chat and not question.raw else text + "\n"

    def request(self, place: int) -> GenerationConfig:
        """The config of the question at `place`, with a seed of its own whatever batch it comes in."""
        depth = self.config.max_depth if self.mode.blocks else 0
        return replace(self.config, seed=self.config.seed + place, max_depth=depth)

    def header(self, questions: Sequence[Question]) -> dict[str, Any]:
        """The first line of the file."""
        # The prompt as a chat, where it is not raw: text, ending and rawness are all in it.
        asked = json.dumps([[question.id, self.prompt(question, True), question.expected] for question in questions])
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "mode": self.mode.name,
            "n": self.n,
            "batch": self.batch,
            "config": {key: value for key, value in asdict(self.config).items() if value is not None},
            "questions": len(questions),
            "digest": hashlib.blake2b(asked.encode(), digest_size=8).hexdigest(),
        }


def collect(
    engine: Engine,
    questions: Sequence[Question],
    plan: Plan,
    path: Path,
    progress: Callable[[int], None] | None = None,
) -> list[Sample]:
    """All samples of all questions, in order: those in the file, and what is missing, which is added to it.

    progress: told how many questions are done. Raises ValueError, before anything runs, for ids that come twice, for a
    file of another run and for one that is none, and what the engine raises.
    """
    for done in batches(engine, questions, plan, path):
        if progress is not None:
            progress(done)
    return read_samples(path, questions)


def batches(engine: Engine, questions: Sequence[Question], plan: Plan, path: Path) -> Iterator[int]:
    """The same, a batch of questions each time that the next number is asked for: how many are done, first those that
    are in the file. Raises as `collect` does, when the first is asked for.
    """
    if len({question.id for question in questions}) != len(questions):
        raise ValueError("questions: expected a different id for each, got one twice")
    kept = _resume(path, plan.header(questions), plan.n, {question.id for question in questions})
    chat = getattr(engine.tokenizer, "chat_template", None) is not None
    missing = [(place, question) for place, question in enumerate(questions) if question.id not in kept]
    yield len(questions) - len(missing)
    for first in range(0, len(missing), plan.batch):
        part = missing[first : first + plan.batch]
        _append(path, _ask(engine, part, plan, chat))
        yield len(questions) - len(missing) + first + len(part)


def read_samples(path: Path, questions: Sequence[Question] | None = None) -> list[Sample]:
    """The samples of a file, in the order of `questions` where they are given.

    Raises ValueError, naming the file, for one that is no such file.
    """
    samples = _read(path)[1]
    if questions is None:
        return samples
    places = {question.id: place for place, question in enumerate(questions)}
    return sorted(samples, key=lambda sample: (places[sample.question], sample.sample))


def _read(path: Path) -> tuple[dict[str, Any], list[Sample]]:
    lines = list(_whole_lines(path))
    if not lines or lines[0].get("format") != FORMAT or lines[0].get("version") != VERSION:
        raise ValueError(f"{path}: expected samples of version {VERSION}, got another file")
    return lines[0], [_read_sample(line, f"{path}, line {place}") for place, line in enumerate(lines[1:], start=2)]


def _read_sample(line: dict[str, Any], where: str) -> Sample:
    for field in fields(Sample):
        if field.name not in line and field.default is MISSING:
            raise ValueError(f"{where}: expected one sample a line, got one without {field.name}")
        value = line.get(field.name)
        kind = _TYPES[field.name]
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if kind not in (bool, bool | None) and isinstance(value, (int, float)):
            fits = fits and not isinstance(value, bool) and value >= 0
        if not fits:
            raise ValueError(f"{where}: expected {field.name} of type {field.type}, got {shown(value)}")
    return Sample(**{name: line[name] for name in _TYPES if name in line})


def _ask(engine: Engine, part: Sequence[tuple[int, Question]], plan: Plan, chat: bool) -> list[Sample]:
    from mvkernels.model.engine.output.events import (
        FinishEvent,  # here: plans and modes are checked before PyTorch is imported
    )

    prompts = [plan.prompt(question, chat) for _, question in part]
    configs = [plan.request(place) for place, _ in part]
    started = time.perf_counter()
    found: dict[int, Sample] = {}
    with engine.stream(prompts, configs, n=plan.n) as events:
        for event in events:
            if isinstance(event, FinishEvent):
                seconds = time.perf_counter() - started
                place, number = divmod(event.request, plan.n)
                found[event.request] = _sample(part[place][1], number, event, seconds)
    return [found[number] for number in sorted(found)]


def _sample(question: Question, number: int, event: FinishEvent, seconds: float) -> Sample:
    generation = event.generation
    return Sample(
        question=question.id,
        sample=number,
        correct=question.grade(generation.text),
        expected=question.expected,
        tokens=generation.total_tokens,
        critical_path=generation.critical_path,
        steps=generation.steps,
        finish_reason=generation.finish_reason,
        seconds=seconds,
        text=generation.text,
        size=question.size,
        exact=generation.text.strip() in question.traces if question.traces else None,
    )


def read_begun(path: Path, header: dict[str, Any]) -> list[Sample] | None:
    """The samples of a file that a run with this header has begun; None where there is none yet.

    Raises ValueError, naming the file, for a file of another run and for one that is none.
    """
    if not path.exists() or not path.stat().st_size:
        return None
    found, samples = _read(path)
    header = json.loads(json.dumps(header))  # as it is in the file: with lists for tuples
    for key in header:
        if found.get(key) != header[key]:
            raise ValueError(
                f"{path}: expected a file of the same run to go on with ({key}={header[key]!r}), got "
                f"{found.get(key)!r}; another --out begins anew"
            )
    return samples


def _resume(path: Path, header: dict[str, Any], n: int, asked: set[str]) -> set[str]:
    """The questions, of those asked, of which the file has all samples; it is left with just these, or begun."""
    kept: dict[str, list[Sample]] = {}
    samples = read_begun(path, header)
    if samples is not None:
        for sample in samples:
            kept.setdefault(sample.question, []).append(sample)
        whole = list(range(n))
        kept = {
            question: some
            for question, some in kept.items()
            if question in asked and sorted(one.sample for one in some) == whole
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *(asdict(sample) for some in kept.values() for sample in some)]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return set(kept)


def _append(path: Path, samples: Sequence[Sample]) -> None:
    with errors_name(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a last line that was cut short is left out."""
    for place, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        shortened = line[:60].decode("utf-8", "replace")
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {place}: expected one JSON object a line, got {shortened!r}: {error}"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {place}: expected one JSON object a line, got {shortened!r}")
        yield row
