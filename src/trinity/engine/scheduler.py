"""Who takes part in the next step, and with how many tokens: newest tokens of answers first, then parts of prompts.

A step reads at most `step_tokens`. Requests wait by client, and the client that was served least so far is next: its
first request in the queue, and its part of the prompts' tokens (virtual token counters, Sheng et al. 2024; a token of
an answer counts twice). A client that comes back begins where the least served of the others is.

What an earlier of a client's active requests is about to read, one that begins alike waits for, instead of reading it
too: the choices of one prompt cost its reading once. Nobody else waits for that.

When pages run out, those of the prefix cache go first, then the newest request is set back: it waits again, keeps its
answer so far, and reads its text once more when there is room.
"""

from collections import deque
from typing import NamedTuple

from trinity.engine.pages import PAGE, Pools, pages_for
from trinity.engine.prefix import PrefixCache
from trinity.engine.sequence import Sequence

ANSWER_WEIGHT = 2
SCORED_ROWS = 64  # of a prompt whose log-probabilities are wanted, in one step: with 200,000 logits a row, 51 MB


class Part(NamedTuple):
    """What a sequence reads in a step: `length` tokens of its text, and a draft behind its newest token."""

    sequence: Sequence
    length: int
    draft: list[int]


class Scheduler:
    def __init__(
        self, pools: Pools, prefix: PrefixCache, max_active: int, step_tokens: int, draft_tokens: int = 0
    ) -> None:
        self.pools, self.prefix = pools, prefix
        self.max_active, self.step_tokens, self.draft_tokens = max_active, step_tokens, draft_tokens
        self.active: dict[int, Sequence] = {}  # in the order of their admission
        self.waiting: dict[str, deque[Sequence]] = {}  # by client; none is empty
        self.served: dict[str, float] = {}
        self.set_back = 0  # how often a request was

    def add(self, sequence: Sequence) -> None:
        """At the end of its client's queue."""
        busy = {*self.waiting, *(other.client for other in self.active.values())}
        if not busy:
            self.served.clear()
        if sequence.client not in busy:
            least = min((self.served.get(client, 0.0) for client in busy), default=0.0)
            self.served[sequence.client] = max(self.served.get(sequence.client, 0.0), least)
        self.waiting.setdefault(sequence.client, deque()).append(sequence)

    def remove(self, request_id: int) -> Sequence | None:
        """Take a request out wherever it is, with all it holds given back."""
        if request_id in self.active:
            sequence = self.active.pop(request_id)
            self._give_back(sequence)
            return sequence
        for client, queue in self.waiting.items():
            for sequence in queue:
                if sequence.id == request_id:
                    queue.remove(sequence)
                    if not queue:
                        del self.waiting[client]
                    return sequence
        return None

    def plan(self) -> list[Part]:
        """The next step. Every part has its pages; empty only where nothing is to do."""
        self._admit()
        self._begin()
        parts, left = [], self.step_tokens
        for sequence in [s for s in self.active.values() if s.reads and s.unread == 1]:
            if left > 0 and sequence.id in self.active and self._make_room(sequence, 1):
                draft = self._draft(sequence, left - 1)
                parts.append(Part(sequence, 1, draft))
                left -= 1 + len(draft)
        for sequence in sorted((s for s in self.active.values() if s.reads and s.unread > 1), key=self._turn):
            count = min(sequence.unread, left, SCORED_ROWS if sequence.scores else left)
            count = min(count, self._room_for(sequence))
            if count <= 0 and not parts and left and sequence.id in self.active and self._make_room(sequence, 1):
                count = 1
            if count > 0 and sequence.id in self.active:
                self._make_room(sequence, count)
                parts.append(Part(sequence, count, []))
                left -= count
        for part in parts:
            weight = ANSWER_WEIGHT if part.sequence.unread == 1 else 1
            self.served[part.sequence.client] = self.served.get(part.sequence.client, 0.0) + weight * part.length
        return parts

    def _turn(self, sequence: Sequence) -> tuple[float, int]:
        return self.served.get(sequence.client, 0.0), sequence.id

    def _admit(self) -> None:
        while self.waiting and len(self.active) < self.max_active:
            client = min(self.waiting, key=lambda client: (self.served.get(client, 0.0), self.waiting[client][0].id))
            sequence = self.waiting[client][0]
            available = len(self.pools.paged.free) + self.pools.paged.idle
            if self.active and available < pages_for(sequence.length) + len(self.active):
                return
            ring = self.pools.take_ring()
            assert ring is not None, "there is a ring for every active sequence"
            self.waiting[client].popleft()
            if not self.waiting[client]:
                del self.waiting[client]
            sequence.ring = ring
            self.active[sequence.id] = sequence

    def _begin(self) -> None:
        """Let those begin whose text nobody else is reading."""
        for sequence in self.active.values():
            if sequence.reads or self._is_read_by_another(sequence):
                continue
            sequence.reads = True
            self.prefix.begin(sequence)
            if not sequence.begun:
                sequence.begun, sequence.cached_tokens = True, min(sequence.read, len(sequence.prompt))

    def _is_read_by_another(self, sequence: Sequence) -> bool:
        """Whether one admitted before will have read what comes next; it is to keep a window where the texts part."""
        for other in self.active.values():
            if other is sequence:
                return False
            # Not for another client's turn, nor for a prompt that is scored a few rows at a time.
            if other.reads and other.client == sequence.client and not other.scores:
                pages = self.prefix.shared(sequence, other)
                if other.read < pages * PAGE:
                    other.marks.add(pages)
                    return True
        return False

    def _room_for(self, sequence: Sequence) -> int:
        """How many more tokens of a sequence have room without setting another back."""
        free = len(self.pools.paged.free) + self.pools.paged.idle
        return PAGE * (len(sequence.pages) + free) - sequence.read

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` more tokens, taken from whom it must be; False where the sequence itself was set back."""
        missing = pages_for(sequence.read + count) - len(sequence.pages)
        while len(self.pools.paged.free) < missing:
            if self.prefix.give_up_page():
                continue
            newest = next(reversed(self.active.values()))
            self._set_back(newest)
            if newest is sequence:
                return False
        if missing > 0:
            sequence.pages += self.pools.paged.take(missing)
        return True

    def _draft(self, sequence: Sequence, most: int) -> list[int]:
        """Only as far as the answer may go and as there are pages that nobody misses."""
        most = min(most, self.draft_tokens, sequence.most_tokens - len(sequence.answer) - 1)
        most = min(most, PAGE * (len(sequence.pages) + len(self.pools.paged.free)) - sequence.read - 1)
        if most <= 0:
            return []
        known = sequence.drafts.known
        draft = sequence.drafts.propose(sequence.tokens(known, sequence.length - known), most)
        self._make_room(sequence, 1 + len(draft))
        return draft

    def _set_back(self, sequence: Sequence) -> None:
        self.set_back += 1
        del self.active[sequence.id]
        self._give_back(sequence)
        self.waiting.setdefault(sequence.client, deque()).appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pools.paged.release(sequence.pages)
        self.pools.local.release(sequence.ring)
        sequence.pages, sequence.ring, sequence.read, sequence.kept, sequence.reads = [], [], 0, 0, False
