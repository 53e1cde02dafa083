"""GRPO-style training: one prompt with several responses in one row, equal to the responses run one by one."""

from __future__ import annotations

import torch

import mvkernels as mk
from mvkernels.model.checkpoint.loading import load_checkpoint
from mvkernels.model.tasks import arithmetic


def shared_loss(model: torch.nn.Module, prompt: list[int], responses: list[list[int]], rewards: torch.Tensor):
    """The policy gradient loss: each response's log-prob times its advantage, from one forward."""
    ids = [*prompt, *(token for response in responses for token in response)]
    # A block at the end never merges: every response sees the prompt, and no other response.
    layout = mk.BranchLayout.from_tree([len(prompt), [[len(response)] for response in responses]])
    row = torch.tensor([ids])
    hidden = model.model(row, position_ids=layout.position_ids[None], branch_layout=layout, use_cache=False)
    # The prompt's last row predicts the first token of every response.
    rows, targets = layout.targets(ids)
    rows, targets = rows[len(prompt) - 1 :], targets[len(prompt) - 1 :]
    logprobs = model.lm_head(hidden.last_hidden_state[0, rows]).log_softmax(-1)
    chosen = logprobs.gather(1, torch.as_tensor(targets)[:, None])[:, 0]
    return -(chosen * torch.repeat_interleave(rewards, torch.tensor([len(r) for r in responses]))).mean()


def separate_loss(model: torch.nn.Module, prompt: list[int], responses: list[list[int]], rewards: torch.Tensor):
    """The same, one sequence at a time: the prompt is computed once for each response."""
    terms = []
    for response, reward in zip(responses, rewards, strict=True):
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        terms.append(logprobs[range(len(response)), response] * reward)
    return -torch.cat(terms).mean()


def main() -> None:
    model, tokenizer = load_checkpoint("embedded")
    mk.patch_model(model)
    tags = mk.TagTokens.from_tokenizer(tokenizer)
    problem = next(arithmetic.generate(seed=1))
    prompt = tags.encode(problem.question)
    chain = tags.encode(problem.sequential_trace)
    responses = [chain[:60], chain[:35], chain[20:90]]
    rewards = torch.tensor([1.0, 0.2, -1.2])  # advantages: rewards of the group, mean-centred

    gradients = []
    for loss_of in (shared_loss, separate_loss):
        model.zero_grad()
        loss = loss_of(model, prompt, responses, rewards)
        loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        print(f"{loss_of.__name__}: {loss.item():.5f}")
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    print(f"relative difference of the gradients: {difference:.0e}; equal: {difference.item() < 1e-4}")


if __name__ == "__main__":
    main()
