"""The EMA teacher is an exponential moving average of the student's parameters, without gradients or drop path."""

import copy

import torch
from torch import nn

from minissl.models.ema import EMATeacher, copy_buffers
from tests.golden import tiny_vit


def test_update_is_the_moving_average():
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    teacher = EMATeacher(student)
    initial = copy.deepcopy(student)
    nn.init.normal_(student.weight)
    teacher.update(student, 0.9)
    torch.testing.assert_close(teacher.network.weight, 0.9 * initial.weight + 0.1 * student.weight)
    teacher.update(student, 1.0)
    torch.testing.assert_close(teacher.network.weight, 0.9 * initial.weight + 0.1 * student.weight)
    teacher.update(student, 0.0)
    torch.testing.assert_close(teacher.network.weight, student.weight)


def test_the_teacher_has_no_gradient_and_no_drop_path():
    teacher = EMATeacher(tiny_vit(drop_path=0.9)).train()
    images = torch.randn(4, 3, 16, 16)
    first, second = teacher(images).cls, teacher(images).cls
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not teacher.cls_tokens(images).requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_student_keeps_its_drop_path():
    student = tiny_vit(drop_path=0.9)
    EMATeacher(student)
    assert student.blocks[-1].drop_path.rate == 0.9


def test_forward_with_gradient_has_the_teachers_output_and_reaches_the_student():
    torch.manual_seed(0)
    student, x = nn.Linear(3, 2), torch.randn(4, 3)
    teacher = EMATeacher(student)
    nn.init.normal_(student.weight)
    output = teacher.forward_with_gradient(student, x)
    torch.testing.assert_close(output, teacher(x))
    (gradient,) = torch.autograd.grad(output.sum(), [student.weight])
    torch.testing.assert_close(gradient, x.sum(dim=0).expand(2, 3))


def test_copy_buffers_copies_running_statistics_only():
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(source.weight)
    source(torch.randn(8, 3))
    copy_buffers(target, source)
    assert torch.equal(target.running_mean, source.running_mean)
    assert torch.equal(target.weight, torch.ones(3))
