"""Merge of the page tables of branches, on the CPU and on the GPU."""
