"""LARS is its formula and, where they agree, lightly's; and a run with it comes back to the bit."""

import pytest
import torch
from torch import nn

from minissl.training import checkpoint, trainer
from minissl.models.factory import create_encoder
from minissl.methods.simclr import SimCLR
from minissl.training.optimizers import LARS
from minissl.training.config import TrainConfig
from tests.golden import tiny_vit, wave
from tests.test_checkpoint import load_training
from tests.test_contract import batch, build, fake_steps

LARS_CONFIG = {"optimizer": "lars", "lr": 1.7, "clip": 0.0, "weight_decay": 1e-4, "final_weight_decay": 1e-3}


def layer():
    """A matrix and a bias that want a gradient."""
    return nn.Parameter(wave(5, 4)), nn.Parameter(wave(5, c=0.3))


def gradient(p, step):
    return wave(*p.shape, c=1.1, phase=step) * (step + 1)


def steps(optimizer, parameters, n=4, gradient=gradient):
    """The parameters after each of n steps."""
    seen = []
    for step in range(n):
        for p in parameters:
            p.grad = gradient(p, step)
        optimizer.step()
        seen.append([p.detach().clone() for p in parameters])
    return seen


def length(numbers):
    return sum(x * x for x in numbers) ** 0.5


def by_numbers(p, decay, trust):
    """The formula, number by number; the rate is 0.5, 0.25, ... Returns the weights after each of four steps."""
    w, v, seen = p.flatten().tolist(), [0.0] * p.numel(), []
    for step in range(4):
        g = [a + decay * b for a, b in zip(gradient(p, step).flatten().tolist(), w)]
        r = trust * length(w) / length(g) if p.ndim > 1 else 1.0
        v = [0.9 * old + 0.5**step * 0.5 * r * new for old, new in zip(v, g)]
        w = [a - b for a, b in zip(w, v)]
        seen.append(w)
    return seen


def test_steps_equal_the_formula_while_the_rate_changes():
    matrix, bias = layer()
    expected = zip(by_numbers(matrix, 0.02, 0.01), by_numbers(bias, 0.0, 0.01))
    optimizer = LARS([{"params": [matrix]}, {"params": [bias], "weight_decay": 0.0}], 0.5, 0.02, 0.9, 0.01)
    for step, (of_matrix, of_bias) in enumerate(expected):
        for group in optimizer.param_groups:
            group["lr"] = 0.5**step * 0.5
        for p in (matrix, bias):
            p.grad = gradient(p, step)
        optimizer.step()
        assert matrix.flatten().tolist() == pytest.approx(of_matrix, rel=1e-12)
        assert bias.flatten().tolist() == pytest.approx(of_bias, rel=1e-12)


def pair_of_optimizers(decay, trust=0.01):
    """Ours and lightly's with the same numbers, each on its own matrix and bias."""
    from lightly.utils.lars import LARS as Theirs

    made = []
    for kind, name, more in ((LARS, "trust", {}), (Theirs, "trust_coefficient", {"eps": 0.0})):
        matrix, bias = layer()
        groups = [{"params": [matrix], "weight_decay": decay}, {"params": [bias], "weight_decay": 0.0}]
        made.append((kind(groups, lr=0.5, momentum=0.9, **{name: trust}, **more), [matrix, bias]))
    return made


def test_steps_equal_lightlys_without_weight_decay():
    """At 0 it would not measure a layer at all, so the decay is too small to be felt.

    Its rate multiplies the velocity, not what is added to it; while the rate is constant that is the same.
    """
    ours, theirs = (steps(*made) for made in pair_of_optimizers(decay=1e-300))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_steps_equal_lightlys_with_weight_decay_along_the_weights():
    """It divides by |g| + decay |w|, we by |g + decay w| as Google does: the same if g points where w points."""

    def along(p, step):
        return (step + 1) * p.detach() if p.ndim > 1 else gradient(p, step)

    ours, theirs = (steps(*made, gradient=along) for made in pair_of_optimizers(decay=0.05))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_with_a_gradient_across_the_weights_lightlys_is_another():
    ours, theirs = (steps(*made) for made in pair_of_optimizers(decay=0.5))
    assert (ours[-1][0] - theirs[-1][0]).abs().max() > 1e-4


def test_weights_of_zero_take_a_plain_step():
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.arange(6.0).view(3, 2)
    LARS([p], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), -0.5 * torch.arange(6.0).view(3, 2))


def test_a_gradient_of_zero_moves_nothing():
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.zeros(3, 2)
    optimizer = LARS([p], lr=0.5)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3, 2), 1 - 0.5 * 0.001))


def test_a_parameter_without_a_gradient_stays():
    p, q = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    q.grad = torch.ones(3, 2)
    LARS([p, q], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(p.detach(), torch.ones(3, 2))
    assert (q < 1).all()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_step_is_a_share_of_the_layer_however_steep_it_is(scale):
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = scale * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    LARS([p], lr=2.0, trust=0.01).step()
    assert (p.detach() - 1).norm().item() == pytest.approx(2.0 * 0.01 * 4)


def run(seed):
    torch.manual_seed(seed)
    method = SimCLR(tiny_vit(), crop_size=16, projection_dim=8)
    config = TrainConfig(**LARS_CONFIG, precision="fp32")
    return method, trainer.create_optimizer(method, config), config


def go_on(method, optimizer, config, start, end):
    for step in range(start, end):
        trainer.seed_step(0, step)
        trainer.training_step(method, optimizer, batch(), step / 4, config)


def test_a_run_goes_on_to_the_same_bits(tmp_path):
    made, other = run(0), run(1)
    go_on(*made, 0, 2)
    checkpoint.save_training_state(tmp_path / "c", *made[:2], {"step": 2})
    assert load_training(tmp_path / "c", *other[:2]) == {"step": 2}
    for each in (made, other):
        go_on(*each, 2, 4)
    for (name, ours), (_, theirs) in zip(made[0].state_dict().items(), other[0].state_dict().items()):
        assert torch.equal(ours, theirs), name


def test_the_velocity_is_in_the_checkpoint(tmp_path):
    method, optimizer, config = run(0)
    go_on(method, optimizer, config, 0, 2)
    checkpoint.save_training_state(tmp_path / "c", method, optimizer, {"step": 2})
    tensors, _ = checkpoint.load_tensors(tmp_path / "c")
    velocities = [t for name, t in tensors.items() if name.endswith(".velocity")]
    assert len(velocities) == sum(p.requires_grad for p in method.parameters())
    assert all(t.any() for t in velocities)


def test_a_config_asks_for_it_and_the_schedule_reaches_it():
    method, optimizer, config = run(0)
    assert isinstance(optimizer, LARS)
    assert isinstance(trainer.create_optimizer(method, TrainConfig()), torch.optim.AdamW)
    trainer.set_schedules(optimizer, config, 0.1)
    decayed, plain = optimizer.param_groups
    assert decayed["lr"] == plain["lr"] == pytest.approx(1.7)
    assert 1e-4 <= decayed["weight_decay"] < 1e-3
    assert plain["weight_decay"] == 0


@pytest.mark.parametrize("clip", [0.0, 3.0])
@pytest.mark.parametrize(("precision", "device"), [("fp32", "cuda"), ("bf16", "cuda"), ("fp32", "cpu")])
def test_a_step_stays_on_the_gpu(precision, device, clip):
    """A real copy of the operations on fake numbers: what is read back fails; on a fake CPU, in backward too."""
    config = TrainConfig(**LARS_CONFIG | {"clip": clip}, precision=precision)
    fake_steps(SimCLR(create_encoder("cnn"), crop_size=16, projection_dim=8), config, size=20, steps=2, device=device)


@pytest.mark.parametrize("name", ["dino", "simclr", "transfer"])
def test_new_heads_may_learn_first(name):
    """Then the encoder rests, even from its decay; and moves afterwards."""
    method = build(name)
    config = trainer.TrainConfig(lr=0.01, warmup_fraction=0.0, weight_decay=0.1, freeze_encoder_fraction=0.5, precision="fp32")
    optimizer = trainer.create_optimizer(method, config)
    rests = {k: p for k, p in method.named_parameters() if "encoder." in k and p.requires_grad}
    others = {k: p for k, p in method.named_parameters() if "encoder." not in k and p.requires_grad}
    for progress, rested in ((0.1, True), (0.6, False)):
        before = {k: p.clone() for k, p in (rests | others).items()}
        trainer.training_step(method, optimizer, batch(), progress, config)
        assert all(torch.equal(before[k], p) for k, p in rests.items()) == rested
        assert not any(torch.equal(before[k], p) for k, p in others.items() if p.ndim > 1)
