"""Decode steps of fixed shapes, captured as CUDA graphs."""
