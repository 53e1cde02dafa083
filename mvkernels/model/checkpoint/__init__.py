"""Checkpoints: names, files, loading, and adding the control tags."""
