"""Small chains for the curator, and what comes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Question, chain, answer. The second paragraphs' cases are parallel; one leans on another.
COUNTING = (
    "How many of the numbers 1 to 100 are squares or cubes?",
    """Okay, count the squares and the cubes up to 100 apart.

The squares are 1, 4, 9 and so on up to 100. That makes 10 of them.

Similarly, the cubes are 1, 8, 27 and 64. That makes 4 of them.

Numbers that are both are sixth powers: 1 and 64. Both were counted twice, so 10 + 4 - 2 = 12.""",
    "12",
)
COUNTING_TRACE = """<Think>
Okay, count the squares and the cubes up to 100 apart.
<Parallel>
<Goal>
<Outline>
1: Work on what begins with The
</Outline>
<Outline>
2: Work on what begins with Similarly,
</Outline>
</Goal>
<Path>
1: The squares are 1, 4, 9 and so on up to 100. That makes 10 of them.
</Path>
<Path>
2: the cubes are 1, 8, 27 and 64. That makes 4 of them.
</Path>
<Conclusion>
All 2 are done. 1: That makes 10 of them.; 2: That makes 4 of them.
</Conclusion>
</Parallel>
Numbers that are both are sixth powers: 1 and 64. Both were counted twice, so 10 + 4 - 2 = 12.
</Think>
"""
NESTED = (
    "Solve \\( x^2 = 5x - 6 \\) and check.",
    r"""Let me bring it to one side: \( x^2 - 5x + 6 = 0 \).

Try factors. Two numbers with product 6 and sum 5 are wanted. Try 1 and 6: the sum is 7. Try 2 and 3: it is 5.

Use the formula instead. The discriminant is \( 25 - 24 = 1 \). One root is \( \frac{5+1}{2} = 3 \). The other root is
\( \frac{5-1}{2} = 2 \), as above.

So both ways agree.

Hence x is 2 or 3.""",
    "2, 3",
)
SEQUENTIAL = ("What is 2 + 2?", "Two and two are four. So the answer is 4.", "4")


def many(count: int) -> list[tuple[str, str, str]]:
    """Chains that differ in their numbers."""
    found = []
    for i in range(count):
        question, chain, answer = (COUNTING, NESTED)[i % 2]
        found.append((question, chain.replace("2", str(i + 2)), answer))
    return found


def write_jsonl(path: Path, chains: list[tuple[str, str, str]]) -> Path:
    lines = [json.dumps({"question": q, "chain": c, "answer": a}) for q, c, a in chains]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def traces(out: Path) -> dict[str, str]:
    """Id -> trace; fails where one is there twice."""
    found = records(out / "traces.jsonl")
    assert len({one["id"] for one in found}) == len(found)
    return {one["id"]: one["trace"] for one in found}
