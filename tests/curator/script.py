"""A scripted curator: answers the curator's prompts by rules, as a careful model would. It has not seen the checks.

Paragraphs are steps, long ones have two substeps; a paragraph that begins with a word such as "So" needs the one before
it, others stand for themselves; sentences that lean on others, by the words that the prompt lists, lose those words.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

DEPENDENT = re.compile(r"(?:So|Then|Therefore|Thus|Hence|Now|Wait|But|That|This|Substituting|Plugging|Since)\b")
SHOWN = 14  # words of its text by which a step is known


@dataclass
class Paragraph:
    """first: number of its first sentence."""

    first: int
    sentences: list[str]

    @property
    def halves(self) -> list[Paragraph]:
        if len(self.sentences) < 4:
            return []
        cut = len(self.sentences) // 2
        return [Paragraph(self.first, self.sentences[:cut]), Paragraph(self.first + cut, self.sentences[cut:])]

    @property
    def dependent(self) -> bool:
        return DEPENDENT.match(self.sentences[0]) is not None

    @property
    def summary(self) -> str:
        return " ".join(" ".join(self.sentences).split()[:SHOWN])


def paragraphs_of(text: str) -> list[Paragraph]:
    """The paragraphs of a numbered listing."""
    found: list[Paragraph] = []
    fresh = True
    for line in text.splitlines():
        match = re.match(r"\[(\d+)\] (.*)", line)
        if match is None:
            fresh = True
        elif fresh:
            found.append(Paragraph(int(match[1]), [match[2]]))
            fresh = False
        else:
            found[-1].sentences.append(match[2])
    return found


def answer(messages: list[dict[str, str]], structured: bool) -> str:
    """What the curator says to a conversation; in JSON where the request had a schema."""
    asked = [i for i, one in enumerate(messages) if one["role"] == "user" and one["content"].startswith("# Stage ")]
    request = messages[asked[-1]]["content"]
    stage = stage_of(request)
    follow_up = messages[asked[-1] + 1 :]
    if stage in ("summary", "groups", "structure"):
        chain = messages[asked[0]]["content"].partition("# Chain of thought\n")[2]
        most = int(re.findall(r"at most (\d+) steps", messages[asked[0]]["content"])[0])
        value = {"summary": summary, "groups": groups, "structure": structure}[stage](
            coarse(paragraphs_of(chain), most)
        )
    elif stage == "refill":
        value = refill(request)
    else:
        value = map_reduce(request, follow_up)
    return json.dumps(value) if structured else plain(stage, value)


def coarse(paragraphs: list[Paragraph], most: int) -> list[Paragraph]:
    """So few that with two substeps each they are no more steps than allowed: adjacent ones together."""
    size = -(-len(paragraphs) // (most // 3))
    found = []
    for i in range(0, len(paragraphs), size):
        together = [sentence for paragraph in paragraphs[i : i + size] for sentence in paragraph.sentences]
        found.append(Paragraph(paragraphs[i].first, together))
    return found


def stage_of(request: str) -> str:
    """By the number in the heading of a prompt."""
    return ("summary", "groups", "structure", "refill", "mapreduce")[int(request.split()[2]) - 1]


def summary(paragraphs: list[Paragraph]) -> dict[str, Any]:
    steps = []
    for number, paragraph in enumerate(paragraphs, start=1):
        steps.append({"id": f"S{number}", "text": paragraph.summary})
        steps += [{"id": f"S{number}.{k}", "text": half.summary} for k, half in enumerate(paragraph.halves, start=1)]
    return {"steps": steps}


def main_groups(paragraphs: list[Paragraph]) -> list[list[list[int]]]:
    """Groups of paths of numbers of paragraphs. The first and the last stand alone; four paths at most."""
    found: list[list[list[int]]] = [[[1]]]
    last = len(paragraphs)
    for number in range(2, last):
        if paragraphs[number - 1].dependent and len(found) > 1:
            found[-1][-1].append(number)
        elif len(found) > 1 and len(found[-1]) < 4:
            found[-1].append([number])
        else:
            found.append([[number]])
    if last > 1:
        found.append([[last]])
    return found


def groups(paragraphs: list[Paragraph]) -> dict[str, Any]:
    needs, listed = [], []
    earlier: list[str] = []
    for group in main_groups(paragraphs):
        for path in group:
            for i, number in enumerate(path):
                needs.append({"step": f"S{number}", "uses": [*earlier[-3:], *(f"S{n}" for n in path[:i])]})
        listed.append({"paths": [[f"S{n}" for n in path] for path in group], "reason": "none uses another"})
        earlier += [f"S{n}" for path in group for n in path]
    for number, paragraph in enumerate(paragraphs, start=1):
        if paragraph.halves:
            parallel = not paragraph.halves[1].dependent
            pair = [f"S{number}.1", f"S{number}.2"]
            needs += [{"step": pair[0], "uses": []}, {"step": pair[1], "uses": [] if parallel else pair[:1]}]
            separate = [{"paths": [[one]], "reason": ""} for one in pair]
            together = [{"paths": [[one] for one in pair], "reason": "two computations"}]
            listed += together if parallel else separate
    return {"needs": needs, "groups": listed}


def structure(paragraphs: list[Paragraph]) -> dict[str, Any]:
    lines: list[str] = []

    def step(number: int) -> None:
        halves = paragraphs[number - 1].halves
        if halves and not halves[1].dependent:
            block([[f"S{number}.1"], [f"S{number}.2"]])
        else:
            lines.append(f"S{number}")

    def block(paths: list[list[Any]]) -> None:
        lines.append("<Parallel>")
        for path in paths:
            lines.append("<Path>")
            for one in path:
                lines.append(one) if isinstance(one, str) else step(one)
            lines.append("</Path>")
        lines.append("</Parallel>")

    for group in main_groups(paragraphs):
        if len(group) > 1:
            block(group)
        else:
            for number in group[0]:
                step(number)
    return {"lines": lines}


def refill(request: str) -> dict[str, Any]:
    listed, _, text = request.partition("# Steps\n")[2].partition("# Sentences\n")
    steps = [re.sub(r" \(at least \d+ sentences\)$", "", line).partition(": ") for line in listed.strip().splitlines()]
    sentences = [one for paragraph in paragraphs_of(text) for one in paragraph.sentences]
    number = paragraphs_of(text)[0].first
    begins: list[int] = []
    at = 0
    for name, _, shown in steps:
        words = " ".join(shown.split())
        while not " ".join(" ".join(sentences[at : at + SHOWN]).split()).startswith(words):
            at += 1
            assert at < len(sentences), f"no sentence begins like {name}: {shown}"
        begins.append(number + at)
        at += 1
    ends = [*(begin - 1 for begin in begins[1:]), number + len(sentences) - 1]
    ranges = zip(steps, begins, ends, strict=True)
    return {"ranges": [{"step": name, "first": first, "last": last} for (name, _, _), first, last in ranges]}


def map_reduce(request: str, follow_up: list[dict[str, str]]) -> dict[str, Any]:
    """Follows the complaints in the messages behind the request too."""
    rules = request.partition("# Question")[0]
    leaning = re.findall(r'"([^"]+)"', rules.partition("where it says")[2].partition("or uses")[0])
    body = request.partition("# The block")[2]
    parts = re.split(r"## Path \d+ [^\n]*\n", body)[1:]
    paths = [[p for p in paragraphs_of(part)] for part in parts]
    sentences = {p.first + i: one for path in paths for p in path for i, one in enumerate(p.sentences)}
    edits = without(leaning, sentences)
    if follow_up:
        said, complaint = follow_up[-2]["content"], follow_up[-1]["content"]
        phrases = re.findall(r"(?m)^Path [\d.]+: '([^']+)'", complaint)
        for number, text in edits_in(said).items():
            if number in sentences and not without(phrases, {number: text}):
                edits[number] = text
        edits |= without(phrases, {**sentences, **edits})
    outlines = [f"Work on what begins with {path[0].sentences[0].split()[0]}" for path in paths]
    concluded = "; ".join(f"{i}: {path[-1].sentences[-1][:60]}" for i, path in enumerate(paths, start=1))
    return {
        "outlines": outlines,
        "edits": [{"sentence": number, "text": text} for number, text in sorted(edits.items())],
        "conclusion": f"All {len(paths)} are done. {concluded}",
    }


def without(phrases: list[str], sentences: dict[int, str]) -> dict[int, str]:
    """The sentences that hold one of the phrases, without it."""
    found = {}
    for number, text in sentences.items():
        new = text
        for phrase in phrases:
            words = r"\s+".join(map(re.escape, phrase.split()))
            new = re.sub(rf"(?<!\w){words}(?!\w),?\s*", "", new, flags=re.IGNORECASE)
        if new != text:
            found[number] = new.strip(" ,") or "Next."
    return found


def edits_in(said: str) -> dict[int, str]:
    if said.startswith("{"):
        return {edit["sentence"]: edit["text"] for edit in json.loads(said)["edits"]}
    return {int(number): text for number, text in re.findall(r"(?m)^Edit (\d+): (.*)$", said)}


def plain(stage: str, value: dict[str, Any]) -> str:
    """The same in the form of lines."""
    if stage == "summary":
        return "\n".join(f"{step['id']}: {step['text']}" for step in value["steps"])
    if stage == "groups":
        lines = ["Needs:", *(f"{one['step']} <- {', '.join(one['uses']) or 'none'}" for one in value["needs"])]
        lines.append("Groups:")
        for group in value["groups"]:
            line = " || ".join(" + ".join(path) for path in group["paths"])
            lines.append(f"{line} : {group['reason']}" if group["reason"] else line)
        return "\n".join(lines)
    if stage == "structure":
        return "\n".join(value["lines"])
    if stage == "refill":
        return "\n".join(f"{one['step']}: {one['first']}-{one['last']}" for one in value["ranges"])
    lines = [f"Outline {number}: {text}" for number, text in enumerate(value["outlines"], start=1)]
    lines += [f"Edit {edit['sentence']}: {edit['text']}" for edit in value["edits"]]
    return "\n".join([*lines, f"Conclusion: {value['conclusion']}"])
