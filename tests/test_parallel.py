"""Two processes with half a batch each learn what one would learn from the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minissl.methods.simclr import nt_xent
from minissl.distributed import gather_rows, rank, is_distributed
from tests.golden import wave
from tests.processes import group
from tests.test_simclr import by_loops

WORLD, T = 2, 0.2


def whole_batch():
    """The two views of six images."""
    return wave(6, 8), wave(6, 8, c=0.71, phase=0.5)


def linear():
    """(5, 8) numbers, the parameters that both processes share."""
    layer = nn.Linear(8, 5, bias=False).double()
    layer.weight.data.copy_(wave(5, 8, c=1.3))
    return layer


def one_process(number, world, folder):
    """What a process does with its half of the batch; what it finds is left in the folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=world)
    halves = [z.chunk(WORLD)[number].clone().requires_grad_() for z in whole_batch()]
    loss = nt_xent(*halves, T)
    found = {"rank": torch.tensor(rank()), "loss": loss.detach(), "inputs": torch.autograd.grad(loss, halves)}

    network = DistributedDataParallel(linear())
    nt_xent(*network(torch.cat(halves)).chunk(2), T).backward()
    found["averaged"] = network.module.weight.grad

    also = torch.zeros(2 * WORLD, 3, requires_grad=True)
    elsewhere = also * 1  # made before, so that its gradient is asked for after that of what is gathered
    (gather_rows(torch.ones(2, 3, requires_grad=True)) + elsewhere).mul(2).sum().backward()
    found["elsewhere"] = also.grad
    found["rows"] = gather_rows(torch.arange(6.0).add(10 * number).view(2, 3).T)
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    group(one_process, WORLD, folder)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(WORLD)]


def test_the_mean_loss_is_that_of_the_whole_batch(found):
    assert [int(process["rank"]) for process in found] == [0, 1]
    losses = torch.stack([process["loss"] for process in found])
    torch.testing.assert_close(losses.mean(), by_loops(*whole_batch(), T), rtol=1e-10, atol=1e-10)
    assert losses[0] != losses[1]


def test_each_process_compares_its_half_with_everyone(found):
    """A process's loss, anchor by anchor: its own views, all 2 W B - 1 others as candidates."""
    z1, z2 = ([z / z.norm() for z in views] for views in whole_batch())
    for number, process in enumerate(found):
        total = 0.0
        for i in (3 * number, 3 * number + 1, 3 * number + 2):
            for own, partner in ((z1[i], z2[i]), (z2[i], z1[i])):
                others = [z for z in z1 + z2 if z is not own]
                assert len(others) == 11
                total = total - own.dot(partner) / T + sum((own.dot(z) / T).exp() for z in others).log()
        torch.testing.assert_close(process["loss"], total / 6, rtol=1e-10, atol=1e-10)


def test_the_averaged_gradients_are_those_of_the_whole_batch(found):
    views = [z.requires_grad_() for z in whole_batch()]
    expected = torch.autograd.grad(by_loops(*views, T), views)
    averaged = [torch.cat(halves) / WORLD for halves in zip(*(process["inputs"] for process in found))]
    torch.testing.assert_close(averaged, list(expected), rtol=1e-10, atol=1e-10)


def test_shared_parameters_get_the_gradient_of_the_whole_batch(found):
    layer = linear()
    by_loops(*(layer(z) for z in whole_batch()), T).backward()
    for process in found:
        torch.testing.assert_close(process["averaged"], layer.weight.grad, rtol=1e-10, atol=1e-10)


def test_rows_come_in_the_order_of_the_ranks(found):
    """Of a transposed matrix too, which does not lie in the memory row by row."""
    one = torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])
    for process in found:
        assert torch.equal(process["rows"], torch.cat([one, one + 10]))


def test_gathering_leaves_a_gradient_that_another_needs(found):
    for process in found:
        assert torch.equal(process["elsewhere"], torch.full((4, 3), 2.0))


def test_a_single_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
    assert rank() == 0
    assert not is_distributed()
