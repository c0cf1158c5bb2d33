"""What texts have in common is read once: full pages of past texts, by the text they end, and windows to go on from.

A page of global layers is named by a hash of all tokens up to its end, so a text that begins like one before finds its
pages. Local layers have dropped most of that text; to go on behind page n they need the window before it. Copies of
windows (`Pools.window_of`) are kept at places where texts are likely to part or to go on: where a prompt ends, where an
answer ends, and where a later text was seen to leave an earlier one. A hit is the longest beginning with all of its
pages and a window at its end. Reading the last window's tokens again instead would not be exact: the first of them
need the keys of the window before, layer under layer.

The pages belong to the pool and are given up when it runs out, those least recently used first. Windows have a budget
of their own.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from trinity.engine.pages import PAGE, Pools, pages_for
from trinity.engine.sequence import Sequence

REMEMBERED = 4096  # names of pages that were given up, to tell a miss from a first meeting

Cause = Literal["hit", "unknown", "given_up", "no_window"]
CAUSES: tuple[Cause, ...] = get_args(Cause)


@dataclass
class Node:
    """One full page: all that came before it is in `parent`."""

    page: int
    parent: bytes
    children: int = 0
    window: Tensor | None = None


@dataclass
class PrefixCache:
    pools: Pools
    window_bytes: int  # budget
    nodes: "OrderedDict[bytes, Node]" = field(default_factory=OrderedDict)  # least recently used first
    windows: "OrderedDict[bytes, int]" = field(default_factory=OrderedDict)  # bytes of each, the same order
    given_up: "OrderedDict[bytes, None]" = field(default_factory=OrderedDict)
    lookups: dict[Cause, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))
    kept_bytes: int = 0  # of all windows
    tokens_asked: int = 0
    tokens_found: int = 0

    def shared(self, sequence: Sequence, other: Sequence) -> int:
        """Of how many pages, read by `other`, a sequence could make use; 0 where no window can be kept at their end."""
        largest = pages_for(self.pools.window) * self.pools.local.page_bytes
        if sequence.salt != other.salt or sequence.scores or largest > self.window_bytes:
            return 0
        mine = self._keys(sequence, (sequence.length - 1) // PAGE)
        others = self._keys(other, min(other.length // PAGE, len(mine)))
        return next((n for n, (key, its) in enumerate(zip(mine, others, strict=False)) if key != its), len(others))

    def begin(self, sequence: Sequence) -> None:
        """Give a sequence that has read nothing what is known of its beginning, all but its last token at most."""
        keys = self._keys(sequence, (sequence.length - 1) // PAGE)
        known = next((n for n, key in enumerate(keys) if key not in self.nodes), len(keys))
        usable = next((n for n in range(known, 0, -1) if self.nodes[keys[n - 1]].window is not None), 0)
        if sequence.scores:
            usable = 0  # its log-probabilities come with the reading
        self.tokens_asked += sequence.length
        self.tokens_found += usable * PAGE
        self.lookups[self._cause(keys, known, usable)] += 1
        for key in reversed(keys[:known]):  # a page is used no longer ago than what follows it
            self.nodes.move_to_end(key)
        if known > usable:
            sequence.marks.add(known)  # texts part here: the next one shall find a window
        # Where it ends, and where one that is equal goes on: its last token is read again.
        sequence.marks |= {len(sequence.prompt) // PAGE, (len(sequence.prompt) - 1) // PAGE}
        if not usable:
            return
        self.windows.move_to_end(keys[usable - 1])
        sequence.pages = [self.nodes[key].page for key in keys[:usable]]
        self.pools.paged.share(sequence.pages)
        sequence.read, sequence.kept = usable * PAGE, usable
        window = self.nodes[keys[usable - 1]].window
        assert window is not None
        self.pools.put_window(sequence.ring, sequence.read, window)

    def _cause(self, keys: list[bytes], known: int, usable: int) -> Cause:
        if known > usable:
            return "no_window"
        if known < len(keys) and keys[known] in self.given_up:
            return "given_up"
        return "hit" if usable else "unknown"

    def take_in(self, sequence: Sequence, ended: bool = False) -> None:
        """Take in what a sequence has read in full pages; where it has `ended`, a window to go on from."""
        full = sequence.read // PAGE
        keys = self._keys(sequence, full)
        for block in range(sequence.kept, full):
            key, parent = keys[block], keys[block - 1] if block else b""
            page = sequence.pages[block]
            if key in self.nodes:  # another sequence was first: one page is enough
                sequence.pages[block] = self.nodes[key].page
                self.pools.paged.share([self.nodes[key].page])
                self.pools.paged.release([page])
                continue
            self.pools.paged.hold(page)
            self.nodes[key] = Node(page, parent)
            if parent:
                self.nodes[parent].children += 1
        before, sequence.kept = sequence.kept, full
        wanted = {mark for mark in sequence.marks if before < mark <= full} | ({full} if ended else set())
        for mark in wanted:
            if mark and self.pools.reaches(mark * PAGE, sequence.read):
                self._keep_window(keys[mark - 1], sequence, mark * PAGE)

    def _keep_window(self, key: bytes, sequence: Sequence, tokens: int) -> None:
        node = self.nodes.get(key)
        if node is None or node.window is not None:
            return
        node.window = self.pools.window_of(sequence.ring, tokens)
        self.windows[key] = node.window.nbytes
        self.kept_bytes += node.window.nbytes
        while self.kept_bytes > self.window_bytes:
            oldest, size = self.windows.popitem(last=False)
            self.kept_bytes -= size
            self.nodes[oldest].window = None

    def give_up_page(self) -> bool:
        """Free one page that no sequence uses and no other page follows; False where there is none."""
        for key, node in self.nodes.items():
            if not node.children and not self.pools.paged.uses[node.page]:
                self._forget(key, node)
                return True
        return False

    def _forget(self, key: bytes, node: Node) -> None:
        del self.nodes[key]
        self.kept_bytes -= self.windows.pop(key, 0)
        if node.parent:
            self.nodes[node.parent].children -= 1
        self.pools.paged.forget(node.page)
        self.given_up[key] = None
        if len(self.given_up) > REMEMBERED:
            self.given_up.popitem(last=False)

    def clear(self) -> None:
        """Forget all texts."""
        while self.give_up_page():
            pass

    @staticmethod
    def _keys(sequence: Sequence, full: int) -> list[bytes]:
        """Names of the first `full` pages of a text: each a hash of its tokens and of the name before it."""
        while len(sequence.keys) < full:
            before = sequence.keys[-1] if sequence.keys else hashlib.blake2b(sequence.salt.encode()).digest()
            tokens = np.asarray(sequence.tokens(len(sequence.keys) * PAGE, PAGE), dtype=np.int64)
            sequence.keys.append(hashlib.blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return sequence.keys[:full]
