"""Quantities with units: what people write, what comes back, and what is refused."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lentando.cli.quantities import (
    format_bandwidth,
    format_bytes,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_count,
    parse_seconds,
    parse_share,
)
from lentando.comm.errors import ConfigurationError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_count, "25.6M", 25_600_000),
        (parse_count, "7B", 7_000_000_000),
        (parse_count, "1_000", 1000),
        (parse_count, "1e6", 1_000_000),
        (parse_count, " 64 k ", 64_000),
        (parse_seconds, "180ms", 0.18),
        (parse_seconds, "50us", 50e-6),
        (parse_seconds, "50 µs", 50e-6),
        (parse_seconds, "1.5s", 1.5),
        (parse_seconds, "2min", 120.0),
        (parse_seconds, "1h", 3600.0),
        (parse_seconds, "1e-3s", 1e-3),
        (parse_seconds, "0", 0.0),
        (parse_bytes, "4096", 4096),
        (parse_bytes, "64KiB", 65536),
        (parse_bytes, "64kB", 64000),
        (parse_bytes, "1.5GiB", 3 * 2**29),
        (parse_bandwidth, "10gbit", 1.25e9),
        (parse_bandwidth, "10Gbit/s", 1.25e9),
        (parse_bandwidth, "25Gbps", 3.125e9),
        (parse_bandwidth, "100mbit", 12.5e6),
        (parse_bandwidth, "8bit", 1.0),
        (parse_bandwidth, "1.25GB/s", 1.25e9),
        (parse_bandwidth, "1MiB/s", 2.0**20),
        (parse_share, "10%", 0.1),
        (parse_share, "0.25", 0.25),
    ],
)
def test_what_people_write(parse: Callable[[str], float], text: str, value: float) -> None:
    assert parse(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_count, "many"),
        (parse_count, "0"),
        (parse_count, "2.5"),
        (parse_count, "-4"),
        (parse_count, "25.6 Mb/s"),
        (parse_count, "1_"),
        (parse_count, ""),
        (parse_seconds, "50"),
        (parse_seconds, "-1s"),
        (parse_seconds, "1e999s"),
        (parse_seconds, "nan s"),
        (parse_seconds, "5 parsecs"),
        (parse_bytes, "10gbit"),
        (parse_bandwidth, "10gb"),
        (parse_bandwidth, "10"),
        (parse_bandwidth, "0gbit"),
        (parse_bandwidth, "10GB"),
        (parse_share, "0%"),
    ],
)
def test_nonsense_is_refused_with_what_was_expected(parse: Callable[[str], float], text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^expected .* got ") as caught:
        parse(text)
    assert repr(text) in str(caught.value)


positive = st.floats(1e-9, 1e15)


@given(positive)
def test_what_is_printed_can_be_read(value: float) -> None:
    assert parse_seconds(format_seconds(value)) == pytest.approx(value, rel=1e-3)
    assert parse_bandwidth(format_bandwidth(value)) == pytest.approx(value, rel=1e-3)
    assert parse_bytes(format_bytes(round(value))) == pytest.approx(round(value), rel=1e-3)


@given(st.integers(1, 10**15))
def test_counts_come_back(count: int) -> None:
    assert parse_count(str(count)) == count
    assert parse_count(f"{count / 1000}k") == pytest.approx(count, rel=1e-9)


@pytest.mark.slow
@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_count, parse_seconds, parse_bytes, parse_bandwidth, parse_share):
        try:
            value = parse(text)
        except ConfigurationError:
            continue
        assert math.isfinite(value)
        assert value >= 0


@given(st.floats(1e-6, 999), st.sampled_from(["ms", "s", "us"]))
def test_spaces_and_case_of_the_exponent_do_not_matter(number: float, unit: str) -> None:
    assert parse_seconds(f"{number:e}{unit}") == parse_seconds(f" {number:E} {unit} ")


@pytest.mark.parametrize(
    ("value", "text"), [(0.18, "180 ms"), (0.99999999, "1 s"), (0.0, "0 ns"), (1.0, "1 s"), (50e-6, "50 us")]
)
def test_times_are_printed_in_their_unit(value: float, text: str) -> None:
    assert format_seconds(value) == text
