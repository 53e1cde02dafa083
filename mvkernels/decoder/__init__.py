"""The engine's forward over the paged cache: weights of a loaded transformers model, and executors of its layers."""
