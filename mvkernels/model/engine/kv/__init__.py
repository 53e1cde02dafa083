"""A request's side of the KV cache, and prefix caching."""
