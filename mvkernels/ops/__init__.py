"""Kernels, their schemas and their tile plans, independent of tags and tokenizers.

Importing this package imports neither torch nor Triton: every module below is imported where it is needed.
"""
