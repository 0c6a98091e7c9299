"""Schedules stay between their ends, reach them, and equal the authors'."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minissl.training.schedules import cosine, linear, warmup_cosine

unit = st.floats(0, 1)
value = st.floats(-10, 10)


@given(value, value, unit)
def test_cosine_stays_between_its_ends(start, end, progress):
    assert min(start, end) - 1e-9 <= cosine(start, end, progress) <= max(start, end) + 1e-9


@given(value, value)
def test_schedules_reach_their_ends(start, end):
    assert cosine(start, end, 0) == pytest.approx(start)
    assert cosine(start, end, 1) == pytest.approx(end)
    assert linear(start, end, 0.0, until=0.5) == pytest.approx(start)
    assert linear(start, end, 0.5, until=0.5) == linear(start, end, 0.9, until=0.5) == pytest.approx(end)


def test_warmup_and_cosine_equal_the_authors():
    """1 -> 0.1 over 10 steps with 2 of warmup: the authors' cosine has 8 steps, this one (progress - 0.2) / 0.8."""
    expected = [1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254]
    assert [warmup_cosine(0, 1, 0.1, i / 10, 0.2) for i in range(2, 10)] == pytest.approx(expected, abs=1e-6)
    assert [warmup_cosine(0, 1, 0.1, i / 10, 0.2) for i in range(2)] == pytest.approx([0, 0.5])


def test_a_schedule_without_warmup_starts_at_the_peak():
    assert warmup_cosine(0, 1, 0.1, 0.0, 0.0) == 1
