"""Merging the page lists of branches, on the CPU and on the GPU."""
