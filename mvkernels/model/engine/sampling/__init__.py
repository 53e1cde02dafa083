"""From logits to tokens: sampling parameters, penalties, log-probs."""
