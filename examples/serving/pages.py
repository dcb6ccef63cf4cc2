"""Who has which page of the cache: a free list, reference counts, and an index of what pages hold.

The index is a tree. A page whose tokens are known is an edge: from the node of the pages before it, by its tokens, to a node
of its own. A request that starts walks it with its prompt; the pages on its way are shared, never written again. Keys are
the tokens themselves, found by their hash: no two prefixes can be mistaken for each other. A page nobody uses stays in the
index until it is needed for something else, the longest unused first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

ROOT = 0


@dataclass
class Match:
    """The part of a prompt that is in the cache: whole pages to share, and `fork_len` tokens of page `fork` to copy."""

    pages: list[int] = field(default_factory=list)
    node: int = ROOT  # behind the last page of `pages`
    fork: int | None = None
    fork_len: int = 0


class PagePool:
    def __init__(self, num_pages: int, page_size: int, sharing: bool = True) -> None:
        self.num_pages, self.page_size, self.sharing = num_pages, page_size, sharing
        self._refs = [0] * num_pages
        # Pages with no reference, the next to be given away first: those that hold nothing, then the longest unused.
        self._free = OrderedDict.fromkeys(range(num_pages))
        self._nodes = itertools.count(ROOT + 1)
        self._edges: dict[int, dict[tuple[int, ...], int]] = {}  # node -> tokens of the next page -> page
        self._known: dict[int, tuple[int, tuple[int, ...], int]] = {}  # page -> (node before it, its tokens, its node)

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    # ---- references ----

    def allocate(self, count: int) -> list[int]:
        """Pages to write, one reference each; there must be as many available."""
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._forget(page)
            self._refs[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._free.pop(page, None)
            self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):  # so that the end of a prefix is given away before its beginning
            self._refs[page] -= 1
            assert self._refs[page] >= 0, f"page {page} was released once too often"
            if self._refs[page] == 0:
                self._free[page] = None
                self._free.move_to_end(page, last=page in self._known)

    # ---- the index ----

    def match(self, tokens: Sequence[int]) -> Match:
        """What the cache has of `tokens`, but for the last one: its logits are wanted, so it must be computed."""
        found, size, limit = Match(), self.page_size, len(tokens) - 1
        if not self.sharing:
            return found
        for begin in range(0, limit - size + 1, size):
            page = self._edges.get(found.node, {}).get(tuple(tokens[begin : begin + size]))
            if page is None:
                break
            found.pages.append(page)
            found.node = self._known[page][2]
        begin = len(found.pages) * size
        rest = tokens[begin : min(begin + size, limit)]
        for edge, page in self._edges.get(found.node, {}).items():
            same = next(
                (i for i, (a, b) in enumerate(zip(edge, rest, strict=False)) if a != b), min(len(edge), len(rest))
            )
            if same > found.fork_len:
                found.fork, found.fork_len = page, same
        return found

    def learn(self, page: int, before: int, tokens: Sequence[int]) -> int:
        """`page`, behind node `before`, now holds `tokens` (fewer than a page's: partly filled). Returns its node.

        Where another page is known to hold the same, that one's node: the two are alike.
        """
        if not self.sharing:
            return ROOT
        edges, key = self._edges.setdefault(before, {}), tuple(tokens)
        if key in edges:
            return self._known[edges[key]][2]
        self._forget(page)
        edges = self._edges.setdefault(before, {})  # (gone if the page was the last edge of it)
        node = next(self._nodes)
        edges[key], self._known[page] = page, (before, key, node)
        return node

    def _forget(self, page: int) -> None:
        if page in self._known:
            before, tokens, _ = self._known.pop(page)
            del self._edges[before][tokens]
            if not self._edges[before]:
                del self._edges[before]
