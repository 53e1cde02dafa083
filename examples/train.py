"""Train a transformers model on traces: packed rows, the branch mask, and labels for what the model samples."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import mvkernels as mk
from mvkernels.model.checkpoint.loading import load_checkpoint

TRACES = Path(__file__).parent / "traces.jsonl"
ROW_TOKENS = 4096
STEPS = 6


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Any Llama, Mistral, Qwen2 or Qwen3; `mvkernels add-tags MODEL OUT` adds the control tags to a model.
    model, tokenizer = load_checkpoint("embedded")
    model = mk.patch_model(model).to(device)
    tags = mk.TagTokens.from_tokenizer(tokenizer)

    documents, ids = [], []
    for line in TRACES.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        prompt, trace = tags.encode(example["question"] + "\n"), tags.encode(example["trace"])
        if len(ids) + len(prompt) + len(trace) > ROW_TOKENS:
            break
        ids += [*prompt, *trace]
        # The prompt and what the engine writes, such as the prefix of a path, get no label.
        documents.append(mk.BranchLayout.from_token_ids([*prompt, *trace], tags, prompt_length=len(prompt)))
    layout = mk.BranchLayout.pack(documents).to(device)
    row, labels = torch.tensor([ids], device=device), layout.labels(ids)[None].to(device)
    print(f"{len(documents)} traces, {layout.total_tokens} tokens, {int((labels >= 0).sum())} labels")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        positions = layout.position_ids[None]
        loss = model(row, position_ids=positions, branch_layout=layout, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"loss {loss.item():.3f}")
    print("the loss falls:", losses[-1] < losses[0])


if __name__ == "__main__":
    main()
