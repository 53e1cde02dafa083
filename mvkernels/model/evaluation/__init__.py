"""Evaluation: how often a model is right, and how much of its work runs at the same time."""
