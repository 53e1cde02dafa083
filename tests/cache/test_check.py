"""The integrity check of the paged cache finds every kind of damage; the free pages."""

from __future__ import annotations

import dataclasses

import pytest

from mvkernels.cache.free_pages import FreePages
from mvkernels.errors import CacheError
from tests.cache.world import poisoned_cache


def _shared_page(cache, root, child):
    cache._state(child).tail.pages[0] = cache._state(root).tail.pages[0]
    cache._state(child).tail._page_array = None


def _page_array_behind(cache, root, child):
    cache._state(root).tail.page_array()[0] += 1


def _leaked_page(cache, root, child):
    cache._free.take(1, None)


def _freed_page(cache, root, child):
    cache._free.give_back([cache._state(child).tail.pages[0]])


def _handle_of_dead(cache, root, child):
    cache._state(root).tail.writer = 77


def _set(name, value, of="root"):
    def damage(cache, root, child):
        setattr(cache._state({"root": root, "child": child}[of]).tail, name, value)

    return damage


def _set_link(name, value):
    return lambda cache, root, child: setattr(cache._state(root).head, name, value)


def _parent_not_seen(cache, root, child):
    head = cache._state(child).head
    head.before = dataclasses.replace(head.before)


def _contents_of_root(cache, root, child):
    cache.plan([(child, 1)])
    cache._state(root).head.contents.log.slice(0, 1)[0][0] += 1


DAMAGE = {
    "page owned twice": (_shared_page, "more than once"),
    "page lost": (_leaked_page, "nobody owns"),
    "page in use and free": (_freed_page, "more than once"),
    "page array out of date": (_page_array_behind, "page array"),
    "too many references": (_set("refs", 4), "references of node"),
    "too few references": (_set("refs", 0), "references of node"),
    "too many references to a link": (_set_link("refs", 4), "references of a link"),
    "frozen by nobody": (_set_link("after", 0), "tokens after a link"),
    "link forgotten": (lambda cache, root, child: cache._state(root).tail.links.clear(), "links of node"),
    "contents out of date": (_contents_of_root, "contents of a link"),
    "length beyond the pages": (_set("length", 7), "pages of node"),
    "start moved": (_set("start", 3, "child"), "start of node"),
    "node not seen": (_parent_not_seen, "sees first"),
    "unknown writer": (_handle_of_dead, "branches that write"),
    "node forgotten": (lambda cache, root, child: cache._nodes.popitem(), "live nodes"),
    "child unknown": (lambda cache, root, child: cache._state(root).children.pop(), "listed by its parent"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_finds(damage):
    cache = poisoned_cache(8, 3)
    root = cache.new()
    cache.commit(cache.plan([(root, 4)]))
    child, other = cache.fork(root, 2)
    cache.commit(cache.plan([(child, 2), (other, 1)]))
    cache.check()
    break_it, message = DAMAGE[damage]
    break_it(cache, root, child)
    with pytest.raises(CacheError, match=message):
        cache.check()


def test_free_pages_stay_together_and_are_never_given_twice():
    pages = FreePages(6)
    assert pages.take(2, None) == [0, 1]
    assert pages.take(1, None) == [2]
    assert pages.take(2, 1) == [3, 4]  # 2 is taken
    assert pages.take(1, 4) == [5]
    for bad in ([5, 5], [0, 1, 0]):
        with pytest.raises(CacheError, match="expected pages in use"):
            pages.give_back(bad)
    pages.give_back([4, 0])
    with pytest.raises(CacheError, match="expected pages in use"):
        pages.give_back([4])
    with pytest.raises(CacheError, match="at least 3 free pages, got 2"):
        pages.take(3, None)
    assert pages.take(2, 3) == [4, 0]


def test_free_pages_forget_what_they_gave_back_long_ago():
    pages = FreePages(8)
    for _ in range(1000):
        pages.give_back(pages.take(3, 1))
    assert len(pages._heap) < 200 and pages.take(8, None) == list(range(8))
