"""Curation: chains of thought rewritten as traces with parallel paths, checked, counted and reported."""
