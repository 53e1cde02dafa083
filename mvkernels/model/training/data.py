"""The training data: an endless stream of fresh problems, packed into rows without padding."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mvkernels import BranchLayout, TagTokens
from mvkernels.model.tasks import GeneratedProblem, task_named
from mvkernels.model.training.packing import pack_row
from mvkernels.model.training.recipe import Recipe


@dataclass(frozen=True)
class Document:
    """One example: its token ids, and how many of them at the front carry no label."""

    ids: list[int]
    prompt_length: int

    def cut(self, length: int) -> Document:
        """The first `length` tokens."""
        return Document(self.ids[:length], min(self.prompt_length, length))


def document_text(problem: GeneratedProblem, parallel: bool, ending: bool = True) -> tuple[str, str]:
    """The prompt and what a model answers. ending: whether the prompt says how to think.

    The newline after the prompt belongs to the answer here, so that the model also continues a prompt without one.
    """
    prompt = problem.prompt(parallel).rstrip("\n") if ending else problem.question
    return prompt, "\n" + (problem.parallel_trace if parallel else problem.sequential_trace)


def encode_document(prompt: str, answer: str, tags: TagTokens, end_of_text: int) -> Document:
    """Token ids of a prompt, its answer and the end-of-text token."""
    head = tags.encode(prompt)
    return Document([*head, *tags.encode(answer), end_of_text], len(head))


class PackedProblems(Dataset[dict[str, Any]]):
    """Row i of the stream is a function of the recipe and i alone, so that a resumed run sees the same rows.

    A row: input_ids, labels [1, T] int64, position_ids [1, T], branch_layout. T is always tokens_per_step: the last
    document is cut there, so that nothing is padded and every step has the same shapes.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe = recipe
        self.tags = TagTokens.from_tokenizer(tokenizer)
        (self.end_of_text,) = tokenizer.encode(str(tokenizer.eos_token), add_special_tokens=False)

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        documents: list[Document] = []
        total = 0
        style = random.Random(f"style {self.recipe.seed} {index}")
        for problem in task_named(self.recipe.task).training(f"{self.recipe.seed} {index}"):
            parallel = style.random() >= self.recipe.sequential_share
            ending = not parallel or style.random() >= self.recipe.bare_share
            prompt, answer = document_text(problem, parallel, ending)
            document = encode_document(prompt, answer, self.tags, self.end_of_text)
            documents.append(document.cut(self.recipe.tokens_per_step - total))
            total += len(documents[-1].ids)
            if total == self.recipe.tokens_per_step:
                break
        return pack_documents(documents, self.tags)


def pack_documents(documents: list[Document], tags: TagTokens) -> dict[str, Any]:
    """The documents one after the other, as arguments of a patched model."""
    layouts = (
        BranchLayout.from_token_ids(doc.ids, tags, prompt_length=doc.prompt_length, allow_open=True)
        for doc in documents
    )
    return pack_row((doc.ids, layout) for doc, layout in zip(documents, layouts, strict=True))
