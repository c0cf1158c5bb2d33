"""Units round-trip, seeds have names, and the nearest name is offered."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.errors import UsageError, nearest
from trinity.base.lineage import fingerprint, read_lineage, write_lineage
from trinity.base.seeds import named_seed
from trinity.base.units import parse_bytes, parse_count, show_bytes, show_count, show_seconds


@given(st.integers(0, 10**16))
def test_a_shown_count_reads_back_to_three_digits(count: int):
    shown = show_count(count)
    if "e" not in shown:
        assert parse_count(shown) == pytest.approx(count, rel=0.005)


@given(st.integers(0, 10**15))
def test_a_whole_number_is_read_exactly(count: int):
    assert parse_count(str(count)) == count == parse_count(f"{count:,}") == parse_count(f"{count:_}")


@pytest.mark.parametrize(
    ("text", "count"), [("17T", 17 * 10**12), ("1.5M", 1_500_000), (" 2k ", 2000), ("3B", 3 * 10**9), (4096, 4096)]
)
def test_counts(text: str | int, count: int):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "1.5 tokens", "-3", "1e6", "0x10", "1.2.3", "5MM"])
def test_what_is_no_count_is_refused(text: str):
    with pytest.raises(UsageError, match="is not a count"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 * 10**9), ("4GB", 4 * 10**9), ("1.5 gib", 3 * 2**29), ("512MiB", 2**29), ("80", 80), ("80B", 80), (7, 7)],
)
def test_sizes_in_bytes(text: str | int, size: int):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "4Q", "-1G", "4iB", "1e9", "4 G B", "4GiBs"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(UsageError, match="is not a number of bytes. Write one such as 800M, 4G or 4GiB."):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0s"),
        (0.0321, "32ms"),
        (0.45, "0.5s"),
        (3.21, "3.2s"),
        (75.2, "1m15s"),
        (3600, "1h00m"),
        (90000, "1d1h"),
        (59.97, "60.0s"),
    ],
)
def test_seconds(seconds: float, shown: str):
    assert show_seconds(seconds) == shown


@pytest.mark.parametrize(("size", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB")])
def test_bytes(size: int, shown: str):
    assert show_bytes(size) == shown


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), st.integers(0, 2**31))
def test_a_seed_depends_on_its_whole_name(names: list[str], root: int):
    seed = named_seed(root, *names)
    assert seed == named_seed(root, *names) and 0 <= seed < 2**63
    assert seed != named_seed(root + 1, *names) and seed != named_seed(root, *names, "more")


def test_seeds_stay_as_they_are():
    """Runs made yesterday must be repeatable tomorrow."""
    assert named_seed(0, "data") == 454179170045371426
    assert named_seed(7, "init", "layers.3") == 4436757301647569501


def test_the_nearest_name_is_offered_or_the_whole_list():
    assert nearest("nanno", ["nano", "mini"]) == "Did you mean 'nano'?"
    assert nearest("zzz", ["nano", "mini"]) == "Known: mini, nano."


def test_fingerprints_do_not_depend_on_order():
    assert fingerprint({"a": 1, "b": [2, None]}) == fingerprint({"b": [2, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})


def test_lineage_travels_with_the_folder(tmp_path):
    assert read_lineage(tmp_path) == {}
    write_lineage(tmp_path, "tokens", {"documents": "abc"}, {"command": "data tokenize"})
    found = read_lineage(tmp_path)
    assert found["kind"] == "tokens" and found["parents"] == {"documents": "abc"} and "trinity" in found["code"]
