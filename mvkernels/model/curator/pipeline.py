"""One chain through the five stages: a trace, or the reason why there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from mvkernels.grammar import TAG_PATTERN
from mvkernels.model.curator.asking import Answerer, Dialogue, Message, Record, Rejected, system, user
from mvkernels.model.curator.chains import Chain
from mvkernels.model.curator.checks import Finding, check_trace, content_distance
from mvkernels.model.curator.groups import read_groups
from mvkernels.model.curator.job import Rules
from mvkernels.model.curator.mapreduce import BlockText, Draft, block_at, read_mapreduce
from mvkernels.model.curator.refill import Ranges, read_ranges
from mvkernels.model.curator.sentences import Sentences
from mvkernels.model.curator.structure import Node, ParallelBlock, blocks_of, read_structure, steps_of
from mvkernels.model.curator.summary import MOST_STEPS, Step, main_of, read_summary, summary_text

NO_PARALLEL_STEP = "no parallel step"


class Pipeline:
    """Chains to lines of `traces.jsonl` or `rejected.jsonl`."""

    def __init__(self, answerer: Answerer, rules: Rules) -> None:
        self.answerer = answerer
        self.rules = rules

    async def curate(self, chain: Chain) -> tuple[bool, dict[str, Any]]:
        """Whether there is a trace, and the line. What the answerer raises passes through."""
        record = Record()
        try:
            trace, distance, warnings = await _OneChain(self, chain, record).run()
        except Rejected as rejected:
            return False, {
                "id": chain.id,
                "question": chain.question,
                "original": chain.text,
                "stage": rejected.stage,
                "reason": rejected.reason,
                "attempts": record.bad,
                "tokens": record.tokens,
            }
        return True, {
            "id": chain.id,
            "question": chain.question,
            "answer": chain.answer,
            "original": chain.text,
            "trace": trace,
            "distance": round(distance, 6),
            "tries": record.tries(),
            "tokens": record.tokens,
            "warnings": warnings,
        }


class _OneChain:
    def __init__(self, pipeline: Pipeline, chain: Chain, record: Record) -> None:
        self.answerer = pipeline.answerer
        self.rules = pipeline.rules
        self.chain = chain
        self.record = record
        self.question = chain.question.strip() or "(not given)"

    async def run(self) -> tuple[str, float, list[str]]:
        """The trace, its distance from the original, and warnings. Raises Rejected."""
        self._check_input()
        sentences = Sentences.of(self.chain.text)
        steps, nodes = await self._structure(sentences)
        if not any(blocks_of(nodes)):
            if self.rules.drop_sequential:
                raise Rejected("structure", NO_PARALLEL_STEP)
            trace = f"<Think>\n{self.chain.text.strip()}\n</Think>\n"
            return trace, content_distance(trace, self.chain.text), [NO_PARALLEL_STEP]
        ranges = await self._refill(sentences, steps, nodes)
        draft = Draft(sentences, nodes, ranges, _placeholders(nodes, steps))
        distance = await asyncio.to_thread(content_distance, draft.trace(), self.chain.text)
        if distance > self.rules.max_distance:  # the sentences are all there: it is the text itself that is strange
            raise Rejected("refill", f"the refilled text is {distance:.3f} away from the original")
        trace, distance = await self._mapreduce(draft, steps)
        return trace, distance, []

    def _check_input(self) -> None:
        chain, most = self.chain, self.rules.max_characters
        if chain.problem:
            raise Rejected("input", chain.problem)
        if not chain.text.strip():
            raise Rejected("input", "expected a chain of thought, got an empty one")
        for name, text in (("chain", chain.text), ("question", chain.question), ("answer", chain.answer)):
            tag = TAG_PATTERN.search(text)
            if tag is not None:
                raise Rejected("input", f"expected a {name} without control tags, got {tag.group()}")
        if len(chain.text) > most:
            raise Rejected("input", f"expected a chain of at most {most} characters, got {len(chain.text)}")

    async def _structure(self, sentences: Sentences) -> tuple[tuple[Step, ...], tuple[Node, ...]]:
        """Stages 1 to 3, one conversation; only the answers that were used stay in it."""
        count = len(sentences)
        if count < 2:
            return (), ()
        request = user("summary", question=self.question, chain=sentences.numbered(1, count), most=MOST_STEPS)
        messages = [system(), request]
        dialogue = self._dialogue("summary", messages)
        steps = await dialogue.get(lambda answer: read_summary(answer, count))
        messages = [*messages, _said(dialogue.text), user("groups")]
        dialogue = self._dialogue("groups", messages)
        groups = await dialogue.get(lambda answer: read_groups(answer, steps))
        if not groups:
            return steps, ()
        messages = [*messages, _said(dialogue.text), user("structure")]
        nodes = await self._dialogue("structure", messages).get(lambda answer: read_structure(answer, steps, groups))
        return steps, nodes

    async def _refill(self, sentences: Sentences, steps: Sequence[Step], nodes: Sequence[Node]) -> Ranges:
        """Stage 4: the main steps over the whole chain, then the substeps of each divided step over its sentences."""
        used = list(steps_of(nodes))
        needed = {step.id: 1 if step.id in used else len(step.leaves) for step in steps}
        ranges = dict(await self._ranges(sentences, steps, needed, 1, len(sentences)))
        for step in steps:
            if step.id not in used:
                first, last = ranges[step.id]
                ranges |= await self._ranges(sentences, step.substeps, dict.fromkeys(step.leaves, 1), first, last)
        return ranges

    async def _ranges(
        self, sentences: Sentences, steps: Sequence[Step], needed: dict[str, int], first: int, last: int
    ) -> Ranges:
        if len(steps) == last - first + 1:
            return {step.id: (first + i, first + i) for i, step in enumerate(steps)}  # there is one way only
        listed = "\n".join(
            f"{step.id}: {step.text}" + (f" (at least {needed[step.id]} sentences)" if needed[step.id] > 1 else "")
            for step in steps
        )
        request = user("refill", first=first, last=last, steps=listed, sentences=sentences.numbered(first, last))
        dialogue = self._dialogue("refill", [system(), request], f"{main_of(steps[0].id)}: " if first > 1 else "")
        return await dialogue.get(lambda answer: read_ranges(answer, needed, first, last))

    async def _mapreduce(self, draft: Draft, steps: Sequence[Step]) -> tuple[str, float]:
        """Stage 5: block by block, the inner ones first; each outermost block is checked, and at the end the whole."""
        groups: dict[int, dict[int, _Rewriter]] = {}
        for node in draft.nodes:
            if isinstance(node, ParallelBlock):
                found = {block.number: _Rewriter(self, draft, steps, block, node) for block in blocks_of([node])}
                groups[node.number] = found
                await self._block(draft, found)
        while True:
            trace = draft.trace()
            findings = check_trace(trace)
            if findings:  # the blocks were right one by one, so it is nothing that another answer would put right
                raise Rejected("mapreduce", _listed(findings))
            distance = await asyncio.to_thread(content_distance, trace, self.chain.text)
            if distance <= self.rules.max_distance:
                return trace, distance
            worst = max((one for found in groups.values() for one in found.values()), key=_Rewriter.changed)
            worst.dialogue.refuse(
                f"The edits take the text too far from the original (a distance of {distance:.2f}, allowed are "
                f"{self.rules.max_distance:g}): edit fewer sentences, and change as few words as you can."
            )
            await worst.write()
            await self._block(draft, groups[worst.outermost.number])

    async def _block(self, draft: Draft, rewriters: dict[int, _Rewriter]) -> None:
        """Writes what has no text yet in an outermost block, and again what the checks find.

        An inner block is checked by itself first, so that what is around it is written for sentences that will stay.
        """
        for rewriter in rewriters.values():
            if not rewriter.written:
                await rewriter.write()
            node = rewriter.block
            while True:
                text = draft.block_trace(node)
                findings: dict[int, list[Finding]] = {}
                for finding in check_trace(text):
                    findings.setdefault(block_at(text, node.number, finding.line), []).append(finding)
                if not findings:
                    break
                for number, found in findings.items():
                    rewriters[number].dialogue.refuse(_listed(found))
                    await rewriters[number].write()

    def _dialogue(self, stage: str, messages: list[Message], about: str = "") -> Dialogue:
        return Dialogue(self.answerer, self.record, stage, messages, self.rules.max_tries, about)


class _Rewriter:
    """Stage 5 of one block, inside (or itself) an outermost one. Its texts take the place of its earlier ones."""

    def __init__(
        self, one: _OneChain, draft: Draft, steps: Sequence[Step], block: ParallelBlock, outermost: ParallelBlock
    ) -> None:
        self.one = one
        self.draft = draft
        self.steps = steps
        self.block = block
        self.outermost = outermost
        self.written = False
        self._dialogue: Dialogue | None = None

    @property
    def dialogue(self) -> Dialogue:
        if self._dialogue is None:
            paths = []
            for number, path in enumerate(self.block.paths, start=1):
                span = self.draft.span(path)
                sentences = self.draft.sentences.numbered(span[0], span[-1], self.draft.edits)
                paths.append(f"## Path {number} ({', '.join(steps_of(path))})\n{sentences}")
            request = user(
                "mapreduce",
                question=self.one.question,
                steps=summary_text(self.steps),
                count=len(self.block.paths),
                paths="\n\n".join(paths),
            )
            about = f"block {self.block.number}: "
            self._dialogue = self.one._dialogue("mapreduce", [system(), request], about)
        return self._dialogue

    async def write(self) -> None:
        """Asks, and puts the texts into the draft. Raises Rejected."""
        span = self.draft.block_span(self.block)
        text = await self.dialogue.get(lambda answer: read_mapreduce(answer, len(self.block.paths), span))
        # An edit of the block around this one may be what was complained of, so this block takes its sentences over.
        self.draft.put(self.block, text, alone=self.written and self.block is not self.outermost)
        self.written = True

    def changed(self) -> int:
        """Characters of the edits and of what they took the place of."""
        pieces = self.draft.sentences.pieces
        edits = self.draft.layers.get(self.block.number, {})
        return sum(len(words) + len(pieces[number - 1]) for number, words in edits.items())


def _placeholders(nodes: Sequence[Node], steps: Sequence[Step]) -> dict[int, BlockText]:
    """Texts that make the refilled structure a trace before stage 5: the steps' own."""
    texts = {step.id: step.text for main in steps for step in (main, *main.substeps)}
    return {
        block.number: BlockText(tuple(texts[next(steps_of(path))] for path in block.paths), {}, "-")
        for block in blocks_of(nodes)
    }


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _listed(findings: Sequence[Finding]) -> str:
    """What the checks found, for the model: by path, without the lines, which it does not see."""
    lines = dict.fromkeys(f"Path {one.path}: {one.message}" if one.path else one.message for one in findings)
    return "\n".join(lines)
