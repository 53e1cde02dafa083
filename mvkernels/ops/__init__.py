"""Kernels, their schemas and their tile plans. Nothing here knows a tag or a tokenizer.

Importing this package imports neither torch nor Triton: every module below is imported where it is needed.
"""
