"""The RSDB and the order behind it: nothing lost, nothing twice, the same stream after any interruption."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import CheckpointError
from trinity.data.order import MixedOrder, SourceOrder, epoch_permutation
from trinity.data.rsdb import DocumentBuffer, Places

lengths_of_a_source = st.lists(st.integers(2, 40), min_size=1, max_size=25)


def buffer_of(lengths: list[int], capacity: int, seed: int) -> DocumentBuffer:
    order = MixedOrder([np.array(lengths)], [1.0], ["only"], seed)
    return DocumentBuffer(order, capacity, seed)


@settings(deadline=None)
@given(lengths_of_a_source, st.integers(1, 8), st.integers(1, 50), st.integers(0, 2**32))
def test_every_token_is_served_once_an_epoch(lengths: list[int], capacity: int, row: int, seed: int) -> None:
    """Tokens served are those drawn, less those still ahead of a read head: none twice, none skipped."""
    buffer = buffer_of(lengths, capacity, seed)
    served: Counter[tuple[int, int]] = Counter()
    for _ in range(3 * sum(lengths) // row + 3):
        segments = buffer.fill(row)
        assert sum(stop - start for _, start, stop in segments) == row
        for document, start, stop in segments:
            assert 0 <= start < stop <= lengths[document]
            served.update((document, position) for position in range(start, stop))
    state = buffer.state()
    epoch, position = state["order"]["epochs"][0], state["order"]["positions"][0]
    last = epoch_permutation(len(lengths), seed, "only", epoch)[:position].tolist()
    drawn = Counter(dict.fromkeys(range(len(lengths)), epoch)) + Counter(last)
    ahead: Counter[tuple[int, int]] = Counter()
    for document, head in buffer.live_documents():
        ahead.update((document, position) for position in range(head, lengths[document]))
    for document, length in enumerate(lengths):
        for position in range(length):
            assert served[document, position] + ahead[document, position] == drawn[document]


@settings(deadline=None)
@given(lengths_of_a_source, st.integers(1, 8), st.integers(1, 50), st.integers(0, 30), st.integers(0, 2**32))
def test_the_stream_goes_on_identically_from_any_state(
    lengths: list[int], capacity: int, row: int, before: int, seed: int
) -> None:
    unbroken = buffer_of(lengths, capacity, seed)
    for _ in range(before):
        unbroken.fill(row)
    resumed = buffer_of(lengths, capacity, seed)
    resumed.fill(row)  # a state replaces whatever was there
    resumed.load_state(json.loads(json.dumps(unbroken.state())))
    for _ in range(20):
        assert resumed.fill(row) == unbroken.fill(row)


def test_the_buffer_refills_to_twice_its_capacity_when_it_has_fallen_to_it() -> None:
    buffer = buffer_of([3] * 500, 10, 0)
    seen = []
    for _ in range(300):
        buffer.fill(1)
        seen.append(buffer.live)
    assert max(seen) == 20 and min(seen) == 10
    for before, after in zip(seen, seen[1:], strict=False):
        assert after in (before, before - 1) or (before == 10 and after in (19, 20))


def test_long_documents_come_back_between_others() -> None:
    """A document longer than a row is read on later, at its head, and rows mix documents."""
    buffer = buffer_of([1000] * 8, 4, 1)
    first = [buffer.fill(100)[0] for _ in range(60)]
    assert len({segment.document for segment in first[:20]}) > 2
    heads: dict[int, int] = {}
    for document, start, stop in first:
        assert start == heads.get(document, 0)
        heads[document] = stop % 1000


def test_epochs_are_different_permutations_and_pure_functions() -> None:
    order = SourceOrder(50, seed=3, source="a")
    drawn = [order.draw() for _ in range(100)]
    assert sorted(drawn[:50]) == sorted(drawn[50:]) == list(range(50))
    assert drawn[:50] != drawn[50:]
    assert drawn[50:] == epoch_permutation(50, 3, "a", 1).tolist()
    assert epoch_permutation(50, 3, "b", 1).tolist() != drawn[50:] != epoch_permutation(50, 4, "a", 1).tolist()


@settings(deadline=None)
@given(st.lists(st.tuples(lengths_of_a_source, st.floats(0.05, 1)), min_size=2, max_size=4), st.integers(0, 99))
def test_a_mix_keeps_its_shares_in_tokens(sources: list[tuple[list[int], float]], seed: int) -> None:
    total = sum(weight for _, weight in sources)
    weights = [weight / total for _, weight in sources]
    order = MixedOrder([np.array(own) for own, _ in sources], weights, [f"s{n}" for n in range(len(sources))], seed)
    for _ in range(300):
        document, tokens = order.draw()
        assert tokens == np.concatenate([own for own, _ in sources])[document]
    longest = max(max(own) for own, _ in sources)
    for tokens, weight in zip(order.tokens_drawn, weights, strict=True):
        assert abs(tokens - weight * sum(order.tokens_drawn)) <= longest * len(sources)


@given(st.integers(0, 2**64), st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=50), st.integers(0, 3000))
def test_places_are_those_of_numpy(seed: int, bounds: list[int], before: int) -> None:
    """The twin: numpy's own integers, one call for each number. Bounds near 2**32 reject about every other draw."""
    ours, numpys = Places(seed), np.random.Generator(np.random.PCG64(seed))
    for bound in [8192, 3 * 2**30] * (before // 2) + bounds:
        assert ours.below(bound) == int(numpys.integers(bound))
    again = Places(0)
    again.load_state(json.loads(json.dumps(ours.state())))
    assert [again.below(97) for _ in range(5000)] == [ours.below(97) for _ in range(5000)]


@given(st.lists(st.integers(2, 40), min_size=4, max_size=30), st.integers(1, 8), st.integers(0, 60), st.integers(0, 99))
def test_other_weights_lose_nothing_and_read_nothing_twice(
    lengths: list[int], capacity: int, before: int, seed: int
) -> None:
    """After a turn the live documents are read to their end, and each source goes on where it stood in its epoch."""
    sources = [np.array(lengths), np.array(lengths[::-1]), np.array(lengths[:3])]
    order = MixedOrder(sources, [0.5, 0.5, 0.0], ["a", "b", "c"], seed)
    buffer = DocumentBuffer(order, capacity, seed)
    everything = np.concatenate(sources)
    served: Counter[tuple[int, int]] = Counter()
    for turn, weights in ((before, [0.0, 0.3, 0.7]), (40, [0.5, 0.5, 0.0]), (30, None)):
        for _ in range(turn):
            for document, start, stop in buffer.fill(25):
                served.update((document, position) for position in range(start, stop))
        if weights:
            order.turn_to(weights)
            assert order.tokens_drawn == (0, 0, 0)
    for document, head in buffer.live_documents():
        served.update((document, position) for position in range(head, everything[document]))
    state, first = order.state(), 0
    for name, own, epoch, position in zip("abc", sources, state["epochs"], state["positions"], strict=True):
        last = epoch_permutation(len(own), seed, name, epoch)[:position].tolist()
        for document, length in enumerate(own):
            times = epoch + (document in last)
            assert all(served[first + document, place] == times for place in range(length))
        first += len(own)


def test_lengths_of_documents_over_all_sources() -> None:
    order = MixedOrder([np.array([3, 4]), np.array([5]), np.array([6, 7, 8])], [0.5, 0.0, 0.5], ["a", "b", "c"], 0)
    assert order.lengths_of(np.array([5, 0, 2, 3, 1, 4])).tolist() == [8, 3, 5, 6, 4, 7]
    assert all(order.draw()[0] != 2 for _ in range(50)), "a source without weight is never drawn, not even first"


def test_a_state_that_cannot_be_unpacked_is_refused() -> None:
    buffer = buffer_of([3] * 9, 2, 0)
    buffer.fill(5)
    with pytest.raises(CheckpointError, match="state of the data cannot be read"):
        buffer.load_state({**buffer.state(), "heads": "AAAA"})
