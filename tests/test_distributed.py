"""Collectives: two processes with half a batch each compute what one computes from the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minissl import distributed
from minissl.distributed import gather_rows, is_distributed, rank
from minissl.errors import InputError
from minissl.methods.simclr import nt_xent
from tests.golden import wave
from tests.processes import spawn_group

WORLD_SIZE, T = 2, 0.2


def whole_batch():
    """Two views (6, 8) of six images."""
    return wave(6, 8), wave(6, 8, c=0.71, phase=0.5)


def linear():
    """A layer whose parameters (5, 8) both processes share."""
    layer = nn.Linear(8, 5, bias=False).double()
    layer.weight.data.copy_(wave(5, 8, c=1.3))
    return layer


def nt_xent_by_loops(z1, z2, rows=None):
    """NT-Xent image by image, as in the SimCLR paper, averaged over the given rows (all without) of both views."""
    z1, z2 = ([z / z.norm() for z in views] for views in (z1, z2))
    rows = range(len(z1)) if rows is None else rows
    total = 0.0
    for i in rows:
        for anchor, positive in ((z1[i], z2[i]), (z2[i], z1[i])):
            candidates = [z for z in z1 + z2 if z is not anchor]
            total = total - anchor.dot(positive) / T + sum((anchor.dot(z) / T).exp() for z in candidates).log()
    return total / (2 * len(rows))


def half_a_batch(rank_, world_size, folder):
    """Compute with half of the batch, in a process of its own, and save the results."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank_, world_size=world_size)
    halves = [z.chunk(WORLD_SIZE)[rank_].clone().requires_grad_() for z in whole_batch()]
    loss = nt_xent(*halves, T)
    results = {"rank": torch.tensor(rank()), "loss": loss.detach(), "inputs": torch.autograd.grad(loss, halves)}

    network = DistributedDataParallel(linear())
    nt_xent(*network(torch.cat(halves)).chunk(2), T).backward()
    results["averaged"] = network.module.weight.grad

    leaf = torch.zeros(2 * WORLD_SIZE, 3, requires_grad=True)
    other = leaf * 1  # created first, so that its gradient is computed after that of the gathered rows
    (gather_rows(torch.ones(2, 3, requires_grad=True)) + other).mul(2).sum().backward()
    results["other"] = leaf.grad
    results["rows"] = gather_rows(torch.arange(6.0).add(10 * rank_).view(2, 3).T)
    torch.save(results, f"{folder}/{rank_}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    spawn_group(half_a_batch, WORLD_SIZE, folder)
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(WORLD_SIZE)]


@pytest.mark.slow
def test_the_mean_loss_is_that_of_the_whole_batch(results):
    assert [int(result["rank"]) for result in results] == [0, 1]
    losses = torch.stack([result["loss"] for result in results])
    torch.testing.assert_close(losses.mean(), nt_xent_by_loops(*whole_batch()), rtol=1e-10, atol=1e-10)
    assert losses[0] != losses[1]


def test_each_process_contrasts_its_half_with_all_images(results):
    """The loss of a process: its own views are the anchors, all other 2 W B - 1 views are the candidates."""
    for i, result in enumerate(results):
        expected = nt_xent_by_loops(*whole_batch(), rows=range(3 * i, 3 * i + 3))
        torch.testing.assert_close(result["loss"], expected, rtol=1e-10, atol=1e-10)


def test_the_averaged_gradients_are_those_of_the_whole_batch(results):
    views = [z.requires_grad_() for z in whole_batch()]
    expected = torch.autograd.grad(nt_xent_by_loops(*views), views)
    averaged = [torch.cat(halves) / WORLD_SIZE for halves in zip(*(result["inputs"] for result in results))]
    torch.testing.assert_close(averaged, list(expected), rtol=1e-10, atol=1e-10)


def test_shared_parameters_get_the_gradient_of_the_whole_batch(results):
    layer = linear()
    nt_xent_by_loops(*(layer(z) for z in whole_batch())).backward()
    for result in results:
        torch.testing.assert_close(result["averaged"], layer.weight.grad, rtol=1e-10, atol=1e-10)


def test_rows_are_gathered_in_the_order_of_the_ranks(results):
    """Also of a transposed matrix, which is not contiguous."""
    rows = torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])
    for result in results:
        assert torch.equal(result["rows"], torch.cat([rows, rows + 10]))


def test_gathering_does_not_change_a_gradient_that_is_still_needed(results):
    for result in results:
        assert torch.equal(result["other"], torch.full((4, 3), 2.0))


def test_a_single_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
    assert rank() == 0
    assert not is_distributed()


def test_a_batch_that_cannot_be_split_over_the_processes_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(InputError, match=r"64.*--batch_size"):
        distributed.local_batch_size(64)
    assert distributed.local_batch_size(63) == 21
