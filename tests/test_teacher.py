"""The teacher is a moving average and nothing else; schedules go where they say."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minissl.teacher import Teacher, cosine, linear, warmup_cosine
from tests.golden import tiny_vit

unit = st.floats(0, 1)
value = st.floats(-10, 10)


def test_following_is_the_moving_average():
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    teacher = Teacher(student)
    start = copy.deepcopy(student)
    nn.init.normal_(student.weight)
    teacher.follow(student, 0.9)
    torch.testing.assert_close(teacher.network.weight, 0.9 * start.weight + 0.1 * student.weight)
    teacher.follow(student, 1.0)
    torch.testing.assert_close(teacher.network.weight, 0.9 * start.weight + 0.1 * student.weight)
    teacher.follow(student, 0.0)
    torch.testing.assert_close(teacher.network.weight, student.weight)


def test_the_teacher_has_no_gradient_and_drops_no_path():
    teacher = Teacher(tiny_vit(drop_path=0.9)).train()
    images = torch.randn(4, 3, 16, 16)
    first, second = teacher(images).cls, teacher(images).cls
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_student_keeps_its_drop_path():
    student = tiny_vit(drop_path=0.9)
    Teacher(student)
    assert student.blocks[-1].drop_path.rate == 0.9


@given(value, value, unit)
def test_cosine_stays_between_its_ends(start, end, progress):
    found = cosine(start, end, progress)
    assert min(start, end) - 1e-9 <= found <= max(start, end) + 1e-9


@given(value, value)
def test_schedules_reach_their_ends(start, end):
    assert cosine(start, end, 0) == pytest.approx(start)
    assert cosine(start, end, 1) == pytest.approx(end)
    assert linear(start, end, 0.0, until=0.5) == pytest.approx(start)
    assert linear(start, end, 0.5, until=0.5) == linear(start, end, 0.9, until=0.5) == pytest.approx(end)


def test_warm_up_and_cosine_equal_the_authors():
    """1 -> 0.1 over 10 steps, 2 of them warm-up: the authors' cosine has 8 steps, ours (progress - 0.2) / 0.8."""
    expected = [1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254]
    assert [warmup_cosine(0, 1, 0.1, i / 10, 0.2) for i in range(2, 10)] == pytest.approx(expected, abs=1e-6)
    assert [warmup_cosine(0, 1, 0.1, i / 10, 0.2) for i in range(2)] == pytest.approx([0, 0.5])


def test_no_warm_up_starts_at_the_peak():
    assert warmup_cosine(0, 1, 0.1, 0.0, 0.0) == 1
