"""The paged KV cache: pages, fork, merge and steps."""
