"""The control-tag state machine: what a sampled tag does, what it costs, which tokens are allowed."""
