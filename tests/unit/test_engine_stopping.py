"""Stop strings do not depend on how the text arrived, and nothing of them is shown."""

from hypothesis import given
from hypothesis import strategies as st

from trinity.engine.stopping import StopFinder

texts = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple)


def shown(parts: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    finder = StopFinder(stops)
    out = "".join(finder.push(part) for part in parts)
    return out + finder.rest(), finder.found


def plain(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The definition: the answer ends with the first prefix that contains a stop string."""
    for end in range(len(text) + 1):
        places = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if places:
            return text[: min(places)], True
    return text, False


@given(texts, stops, st.lists(st.integers(0, 30), max_size=6))
def test_any_split_gives_the_defined_answer(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert shown(parts, stops) == plain(text, stops)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    finder = StopFinder(("\nUser:", "###"))
    assert finder.push("Hello\n") == "Hello"
    assert finder.push("there #") == "\nthere "
    assert finder.push("1") == "#1"
    assert finder.push("\nUs") == ""
    assert finder.push("er: more") == ""
    assert finder.found
    assert finder.push("ignored") == finder.rest() == ""
