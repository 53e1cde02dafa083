"""Forward pass of the engine over the paged KV cache: weights of a transformers model, and executors of its layers."""
