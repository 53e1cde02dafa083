"""Packaging: ``mvkernels/`` alone is installed; the links ``model`` and ``reference`` are for reading the tree."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "mvkernels" / "__init__.py").read_text(), re.MULTILINE)
if VERSION is None:
    raise SystemExit('mvkernels/__init__.py has no line __version__ = "..."')

HF = ["transformers>=5.17", "accelerate", "safetensors", "gguf"]
TRAIN = [*HF, "peft>=0.17", "tensorboard"]
PLOT = ["matplotlib"]
EVAL = [*PLOT, "math-verify>=0.9"]
CURATE = ["openai>=2", "rapidfuzz>=3.9", "pyarrow>=18"]
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0"]
# pytest-timeout: pyproject.toml sets a limit for every test, those of benchmarks/test_quick.py too.
BENCH = ["pytest>=9", "pytest-benchmark", "pytest-timeout"]
# Compiles the CUDA sources in tests, without a GPU or its driver.
NVRTC = [f"{name}>=13; sys_platform == 'linux'" for name in ("cuda-bindings", "nvidia-cuda-nvrtc")]
EXTRAS = {
    "hf": HF,
    "train": TRAIN,
    "eval": [*HF, *EVAL],
    "curate": CURATE,
    "bench": [*PLOT, *BENCH],
    "cuda": ["triton>=3.6", "cupy-cuda13x>=14"],
    "plot": PLOT,
    "docs": DOCS,
    "dev": [
        *TRAIN,
        *EVAL,
        *CURATE,
        *BENCH,
        *DOCS,
        *NVRTC,
        "build",
        "hypothesis",
        "mypy",
        "pytest-xdist",
        "ruff",
        "setuptools>=77",
        "wheel",
    ],
}

setup(
    name="mvkernels",
    version=VERSION.group(1),
    description="Attention kernels, paged cache and engine for language models that write in parallel branches",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["mvkernels", "mvkernels.*"]),
    package_data={
        "mvkernels": ["py.typed", "ops/**/*.cu", "ops/**/*.cpp", "ops/*.h"],
        "mvkernels.model": ["embedded/*", "engine/output/*.html", "training/recipes/*.toml"],
        "mvkernels.model.curator": ["*.html", "prompts/*.txt"],
    },
    include_package_data=False,
    # typer 0.29 imports pydantic, which takes 0.3 s of every usage error (`python -X importtime -m mvkernels x`).
    install_requires=["torch>=2.11", "numpy", "typer<0.29", "rich"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mvkernels = mvkernels.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
