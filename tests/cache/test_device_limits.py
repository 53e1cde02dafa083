"""The cache's page lists on its device where they do not fit, where merges cannot run there, and after errors."""

from __future__ import annotations

import pytest
import torch

from mvkernels.errors import BackendError
from tests.cache.device_world import Uploads, world


def test_a_row_longer_than_the_capacity_is_uploaded_until_it_fits() -> None:
    w = world((8, 4))
    root, other = w.new(), w.new()
    w.step((root, 5), (other, 3))
    a, b = w.fork(root, 2)
    w.step((a, 5), (b, 3))
    w.merge(root)
    for _ in range(2):
        step = w.write([(root, 1)])  # 2 + 2 + 1 + 1 pages
        assert step.views.device_pages is None
        w.rollback(step)
    step = w.write([(other, 1)])
    assert step.views.device_pages is not None
    w.commit(step)
    w.truncate(a, 5)
    with Uploads(w) as seen:
        step = w.write([(root, 1)])
    assert step.views.device_pages is not None
    assert seen.counted() == (2 + 1 + 1, 0)
    w.commit(step)
    step = w.write([(root, 4)])
    assert step.views.device_pages is None
    w.commit(step)


def test_slots_go_round_and_more_branches_than_rows_in_one_step_are_uploaded() -> None:
    w = world((3, 64))
    branches = [w.new() for _ in range(5)]
    step = w.write([(branch, 2) for branch in branches])
    assert step.views.device_pages is None
    w.commit(step)
    for first in range(5):  # each time some row is absent and none is free: all are written again
        step = w.write([(branches[(first + i) % 5], 1) for i in range(3)])
        assert step.views.device_pages is not None
        w.commit(step)


def test_a_merge_with_an_absent_row_is_uploaded_and_so_is_the_one_around_it() -> None:
    w = world((4, 64))
    root = w.new()
    w.step((root, 4))
    (a,) = w.fork(root, 1)
    w.step((a, 4))
    first, second = w.fork(a, 2)
    w.step((first, 4))
    w.step((second, 4))
    w.step((w.new(), 1))  # no slot is free: all rows but this one are absent
    w.merge(a)
    w.merge(root)
    with Uploads(w) as seen:
        w.step((root, 1))
    assert seen.counted() == (4 * 2 + 1, 0)
    w.step((root, 6))


@pytest.mark.parametrize("error", [BackendError("no kernel"), ImportError("no library")])
def test_without_a_kernel_for_merges_their_rows_are_uploaded(error: Exception, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise error

    w = world()
    root = w.new()
    w.step((root, 4))
    for block in range(2):
        children = w.fork(root, 2)
        w.step(*((child, 4) for child in children))
        w.merge(root)
        if not block:
            monkeypatch.setattr("mvkernels.cache.device.merge_branches", refuse)
        with Uploads(w) as seen:
            step = w.write([(root, 1)])
        assert step.views.device_pages is not None
        # Root's 2 pages, 2 of each child, 1 behind each merge; before the kernel has failed, its call is tried first.
        assert seen.counted() == ((2 + 2 * 5, 0) if block else (1 + 2 + 2 * 2 + 1, 0))
        w.commit(step)
    assert w.cache.device_tables.merge_reason == str(error)


def test_an_error_of_the_device_leaks_no_page_and_the_next_step_is_right(monkeypatch) -> None:
    w = world()
    root = w.new()
    w.step((root, 4))
    children = w.fork(root, 2)
    w.step(*((child, 4) for child in children))
    w.merge(root)
    tables, free = w.cache.device_tables, w.cache.num_free_pages

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(tables, "_scatter", fail)
        with pytest.raises(torch.OutOfMemoryError):
            w.cache.plan([(root, 4)])
    assert w.cache.num_free_pages == free
    w.check()
    w.step((children[0], 1), (root, 3))
    w.step((root, 3))


def test_an_interrupt_while_merges_are_followed_gives_the_tables_up(monkeypatch) -> None:
    """Children that are in no row of their parent's would be read from whatever stands behind it."""
    w = world()
    root = w.new()
    w.step((root, 5))
    w.step(*((child, 4) for child in w.fork(root, 3)))
    w.merge(root)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(w.cache.device_tables, "_write_row", interrupt)
        with pytest.raises(KeyboardInterrupt):
            w.cache.plan([(root, 1)])
    w.step((root, 7))
    step = w.write([(w.fork(root, 1)[0], 1)])
    assert step.views.device_pages is None
    w.commit(step)
    w.check()
