"""Products, norms and whole layers for small batches."""
