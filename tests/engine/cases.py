"""Outputs for the engine's tests, and samplers that write them: texts by path, where ~ leaves a token to the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from mvkernels.grammar import TAGS, Kind
from mvkernels.model import Engine, GenerationConfig
from mvkernels.model.engine.sampling.sampler import sample
from mvkernels.model.engine.scheduler import Scheduler
from tests.support.tiny_model import END

# fp32 on logits of magnitude 10; two computations with another order of summation were seen to differ by 5e-6.
TOLERANCE = 1e-4
GREEDY = GenerationConfig(max_new_tokens=400)


def goal(*outlines: str) -> str:
    inner = "".join(f"<Outline>\n{outline}\n</Outline>\n" for outline in outlines)
    return f"<Parallel>\n<Goal>\n{inner}</Goal>"


CONCLUDE = "</Conclusion>\n</Parallel>"
# name -> (path -> what is sampled there; ~ leaves one token to the model). Forced tokens are not in it.
CASES = {
    "two paths": {
        "": f"so\n{goal('1: a', '2: b')}~~{CONCLUDE} done~~~{END}",
        "1": " the sum~~~~</Path>",
        "2": "~~</Path>",
    },
    "one path": {"": f"{goal('1: a')}~{CONCLUDE}~{END}", "1": "~~~\n</Path>"},
    "empty paths": {"": f"{goal('1:', '2: b', '3:')}{CONCLUDE}{END}", "1": "</Path>", "2": "</Path>", "3": "</Path>"},
    "one empty among long ones": {
        "": f"~~{goal('1: a', '2: b', '3: c')}~~~{CONCLUDE}~~{END}",
        "1": "~" * 23 + "</Path>",
        "2": "</Path>",
        "3": "~" * 9 + "</Path>",
    },
    "nested": {
        "": f"<Think>\n~~{goal('1: a', '2: b')}so~~\n{CONCLUDE}~~\n</Think>~~~{END}",
        "1": f"~~\n{goal('1.1: x', '1.2: y', '1.3: z')}~{CONCLUDE}~~~</Path>",
        "1.1": "~~~~~~~\n</Path>",
        "1.2": "</Path>",
        "1.3": f"~{goal('1.3.1: deep')}~~{CONCLUDE}</Path>",
        "1.3.1": "~~~</Path>",
        "2": f" é~~{goal('2.1: u', '2.2: v')}{CONCLUDE}</Path>",
        "2.1": "~~</Path>",
        "2.2": "~~~~~~~~~~~~~~~~~</Path>",
    },
    "one after the other": {
        "": f"{goal('1: a', '2: b')}~{CONCLUDE}\n~~{goal('1: c', '2: d', '3: e')}~~{CONCLUDE}~{END}",
        "1": "~~~~~</Path>~</Path>",
        "2": "~</Path>~~~~</Path>",
        "3": "~~</Path>",
    },
    "small nested": {
        "": f"~{goal('1:', '2:')}~{CONCLUDE}{END}",
        "1": "~</Path>",
        "2": f"{goal('2.1:')}{CONCLUDE}~</Path>",
        "2.1": "~~</Path>",
    },
    "no block": {"": f"~~~~~~~~{END}"},
}


def without_certain(text: str) -> str:
    """What is sampled of a text, where the grammar is on: the engine writes the rest of each block."""
    text = re.sub(r"(<Parallel>)\n<Goal>\n<Outline>\n[\d.]+:", r"\1", text)
    text = re.sub(r"(<Outline>)\n[\d.]+:", r"\1", text).replace("</Outline>\n", "</Outline>")
    return text.replace("</Conclusion>\n</Parallel>", "</Conclusion>")


def script(case: dict[str, str], engine: Engine, grammar: bool = True) -> dict[tuple[int, ...], list[int]]:
    """Paths and texts -> paths and tokens; ~ becomes -1, and an end of text its token.

    grammar: the engine writes what is certain within a block, so that is left out.
    """
    end = engine.tokenizer.eos_token_id
    out = {}
    for path, text in case.items():
        if grammar:
            text = without_certain(text)
        tokens: list[int] = []
        for i, piece in enumerate(text.removesuffix(END).split("~")):
            tokens += ([-1] if i else []) + engine.tags.encode(piece)
        out[tuple(int(n) for n in path.split(".") if n)] = tokens + ([end] if text.endswith(END) else [])
    return out


def plain(engine: Engine, inner=sample):
    """The default sampler, kept from control tags and end of text, so that a script decides about these alone."""
    special = (*engine.tags.ids, engine.tokenizer.eos_token_id)

    def choose(views, logits):
        return inner([replace(view, banned=special, allowed=None) for view in views], logits)

    return choose


def per_block(scripts: dict[tuple[int, ...], list[int]], end_of_path: int):
    """`drawn` restarts in every block, so a path that comes again goes on behind its last end of path."""
    used: dict[tuple[tuple[int, ...], str], list[int]] = {}

    def next_tokens(view) -> int:
        key = (view.path, view.key)
        if key not in used:
            taken = sum(1 for path, _ in used if path == view.path)
            whole, start = scripts.get(view.path, []), 0
            for _ in range(taken):
                start = whole.index(end_of_path, start) + 1
            used[key] = whole[start:]
        own = used[key]
        return own[view.drawn] if view.drawn < len(own) else -1

    return next_tokens


def written_ahead(engine: Engine, ids: Sequence[int]) -> npt.NDArray[np.bool_]:
    """[T] bool: what the engine writes within blocks because it is certain, labelled for training all the same."""
    tags = engine.tags
    kinds = [Kind(kind) for kind in tags.kinds(ids)]
    certain = {
        Kind.PARALLEL: (Kind.SPACE, Kind.GOAL),
        Kind.GOAL: (Kind.SPACE, Kind.OUTLINE),
        Kind.OUTLINE_END: (Kind.SPACE,),
        Kind.CONCLUSION_END: (Kind.SPACE, Kind.PARALLEL_END),
    }
    out = np.zeros(len(ids), dtype=np.bool_)
    for place, kind in enumerate(kinds):
        following = certain.get(kind, ())
        assert tuple(kinds[place + 1 : place + 1 + len(following)]) == following
        out[place + 1 : place + 1 + len(following)] = True
        if kind is Kind.OUTLINE:
            end = place + 1
            while ":" not in engine.tokenizer.decode([ids[end]]):
                end += 1
            out[place + 1 : end + 1] = True
    return out


def follow(engine: Engine, case: dict[str, str], then=None, grammar: bool = True):
    """A sampler for one request that follows a case; what the case leaves open is decided by `then`."""
    then = then or plain(engine)
    wanted = per_block(script(case, engine, grammar), engine.tags.ids[TAGS.index("</Path>")])

    def choose(views, logits):
        free = then(views, logits)
        return [token if (own := wanted(view)) < 0 else own for view, token in zip(views, free, strict=True)]

    return choose


def config_for(engine: Engine, **changes) -> GenerationConfig:
    return replace(GREEDY, eos_token_ids=(engine.tokenizer.eos_token_id,), **changes)


def by_request(samplers):
    """One sampler for several requests, each with its own."""

    def choose(views, logits):
        out = []
        for row, view in enumerate(views):
            out += samplers[view.request]([view], logits[row : row + 1])
        return out

    return choose


def check_pages(engine: Engine) -> None:
    """No request has a page any more, none is lost with the prefixes, and nothing was ever moved."""
    if engine.cache is not None:
        engine.cache.check()
        assert engine.available_pages == engine.cache.num_pages
        engine.clear_prefixes()
        engine.cache.check()
        assert engine.cache.num_free_pages == engine.cache.num_pages and engine.cache.bytes_moved == 0


@contextmanager
def preempted_before_every_step():
    """Every request loses its pages before each step, unless it is being computed again: that may take several."""
    schedule = Scheduler.schedule

    def preempt_all(self: Scheduler):
        for request in self.running:
            if request not in self._behind:
                self.preempt(request)
        return schedule(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "schedule", preempt_all)
        yield
