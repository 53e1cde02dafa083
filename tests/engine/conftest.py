"""The engine of a tiny model that tests of one module share, and what must hold after each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mvkernels.model import Engine
from tests.engine.cases import check_pages
from tests.support.tiny_model import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), page_size=4)


@pytest.fixture
def all_pages_come_back(engine: Engine) -> Iterator[None]:
    """Every page that a test's requests took is free again, or in the prefix cache."""
    yield
    check_pages(engine)
