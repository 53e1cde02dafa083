"""Stream an answer in parallel branches: tokens, forks and merges as they happen, then budgets and log-probs."""

from __future__ import annotations

import sys
from collections import defaultdict

from mvkernels.model import Engine, GenerationConfig
from mvkernels.model.engine.output.events import FinishEvent, ForkEvent, MergeEvent, TokenEvent

PROMPT = "Compute 47*38 + 125*6 + 904.\n"


def main(model: str = "embedded") -> None:
    engine = Engine.from_pretrained(model)
    texts: dict[tuple[int, ...], str] = defaultdict(str)
    forks = 0
    for event in engine.stream(PROMPT, GenerationConfig(max_new_tokens=2000)):
        name = ".".join(map(str, event.path)) or "trunk" if hasattr(event, "path") else ""
        match event:
            case TokenEvent():
                texts[event.path] += event.text
            case ForkEvent():
                forks += 1
                print(f"{name} forks into {event.width} paths")
            case MergeEvent():
                print(f"{name} merges, and continues at position {event.position}")
            case FinishEvent():
                print(f"finished: {event.generation.finish_reason}, after {forks} forks")
    for path, text in sorted(texts.items()):
        print(f"{'.'.join(map(str, path)) or 'trunk':>6} | {text.removesuffix('</Path>').strip().splitlines()[-1]}")

    # A budget ends a request gracefully: what is open is closed in the grammar.
    [short] = engine.generate([PROMPT], GenerationConfig(max_critical_path=150))
    print(f"with a budget: {short.finish_reason}, critical path {short.critical_path}")
    print("well formed:", short.text.count("<Path>") == short.text.count("</Path>"))

    [scored] = engine.generate([PROMPT], GenerationConfig(max_new_tokens=2000, logprobs=2))
    print(f"log-prob of the first tokens: {[round(value, 3) for value in scored.logprobs[:3]]}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
