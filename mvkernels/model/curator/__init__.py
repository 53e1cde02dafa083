"""The curator: sequential chains of thought become Multiverse traces, by a language model's answers that code checks.

`run.curate` works through a file of chains with the five stages of arXiv 2506.09991, section 4; `pipeline.Pipeline`
does one chain. Nothing here is imported with the package: `openai`, `rapidfuzz` and `pyarrow` are in the extra
`curate`.
"""
