"""LARS equals its formula and, where the two agree, lightly's; training with it is resumed bit for bit."""

import pytest
import torch
from torch import nn

from minissl.methods.simclr import SimCLR
from minissl.models.factory import create_encoder
from minissl.training import checkpoint, trainer
from minissl.training.config import TrainConfig
from minissl.training.optimizers import LARS
from minissl.training.sampler import seed_step
from tests.golden import tiny_vit, wave
from tests.test_checkpoint import load_training
from tests.test_contract import batch, build, fake_steps

LARS_CONFIG = {"optimizer": "lars", "lr": 1.7, "clip_grad": 0.0, "weight_decay": 1e-4, "final_weight_decay": 1e-3}


def layer():
    """A matrix and a bias."""
    return nn.Parameter(wave(5, 4)), nn.Parameter(wave(5, c=0.3))


def gradient(p, step):
    return wave(*p.shape, c=1.1, phase=step) * (step + 1)


def take_steps(optimizer, parameters, n=4, gradient=gradient):
    """Return the parameters after each of n steps."""
    history = []
    for step in range(n):
        for p in parameters:
            p.grad = gradient(p, step)
        optimizer.step()
        history.append([p.detach().clone() for p in parameters])
    return history


def norm(numbers):
    return sum(x * x for x in numbers) ** 0.5


def lars_by_loops(p, weight_decay, trust):
    """Apply the formula number by number; lr is 0.5, 0.25, ... Returns the weights after each of four steps."""
    w, v, history = p.flatten().tolist(), [0.0] * p.numel(), []
    for step in range(4):
        g = [a + weight_decay * b for a, b in zip(gradient(p, step).flatten().tolist(), w)]
        r = trust * norm(w) / norm(g) if p.ndim > 1 else 1.0
        v = [0.9 * old + 0.5**step * 0.5 * r * new for old, new in zip(v, g)]
        w = [a - b for a, b in zip(w, v)]
        history.append(w)
    return history


def test_steps_equal_the_formula_while_the_learning_rate_changes():
    matrix, bias = layer()
    expected = zip(lars_by_loops(matrix, 0.02, 0.01), lars_by_loops(bias, 0.0, 0.01))
    optimizer = LARS([{"params": [matrix]}, {"params": [bias], "weight_decay": 0.0}], 0.5, 0.02, 0.9, 0.01)
    for step, (expected_matrix, expected_bias) in enumerate(expected):
        for group in optimizer.param_groups:
            group["lr"] = 0.5**step * 0.5
        for p in (matrix, bias):
            p.grad = gradient(p, step)
        optimizer.step()
        assert matrix.flatten().tolist() == pytest.approx(expected_matrix, rel=1e-12)
        assert bias.flatten().tolist() == pytest.approx(expected_bias, rel=1e-12)


def create_pair(weight_decay, trust=0.01):
    """Create ours and lightly's with the same hyperparameters, each with its own matrix and bias."""
    from lightly.utils.lars import LARS as LightlyLARS

    pair = []
    for optimizer, name, more in ((LARS, "trust", {}), (LightlyLARS, "trust_coefficient", {"eps": 0.0})):
        matrix, bias = layer()
        groups = [{"params": [matrix], "weight_decay": weight_decay}, {"params": [bias], "weight_decay": 0.0}]
        pair.append((optimizer(groups, lr=0.5, momentum=0.9, **{name: trust}, **more), [matrix, bias]))
    return pair


def test_steps_equal_lightly_without_weight_decay():
    """At 0 lightly does not adapt the learning rate at all, so the decay is not 0 but negligible.

    lightly multiplies the velocity by lr, not what is added to it; the same while lr is constant.
    """
    ours, lightly = (take_steps(*each) for each in create_pair(weight_decay=1e-300))
    torch.testing.assert_close(ours, lightly, rtol=1e-12, atol=1e-14)


def test_steps_equal_lightly_if_gradients_are_parallel_to_the_weights():
    """lightly divides by |g| + decay |w|, ours by |g + decay w| as Google's code: equal for parallel g and w."""

    def parallel(p, step):
        return (step + 1) * p.detach() if p.ndim > 1 else gradient(p, step)

    ours, lightly = (take_steps(*each, gradient=parallel) for each in create_pair(weight_decay=0.05))
    torch.testing.assert_close(ours, lightly, rtol=1e-12, atol=1e-14)


def test_steps_differ_from_lightly_for_other_gradients():
    ours, lightly = (take_steps(*each) for each in create_pair(weight_decay=0.5))
    assert (ours[-1][0] - lightly[-1][0]).abs().max() > 1e-4


def test_weights_of_zero_take_an_sgd_step():
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.arange(6.0).view(3, 2)
    LARS([p], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), -0.5 * torch.arange(6.0).view(3, 2))


def test_a_gradient_of_zero_changes_nothing():
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.zeros(3, 2)
    optimizer = LARS([p], lr=0.5)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3, 2), 1 - 0.5 * 0.001))


def test_a_parameter_without_a_gradient_is_not_changed():
    p, q = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    q.grad = torch.ones(3, 2)
    LARS([p, q], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(p.detach(), torch.ones(3, 2))
    assert (q < 1).all()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_norm_of_a_step_does_not_depend_on_that_of_the_gradient(scale):
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = scale * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    LARS([p], lr=2.0, trust=0.01).step()
    assert (p.detach() - 1).norm().item() == pytest.approx(2.0 * 0.01 * 4)


def create_training(seed):
    torch.manual_seed(seed)
    method = SimCLR(tiny_vit(), crop_size=16, projection_dim=8)
    config = TrainConfig(**LARS_CONFIG, precision="fp32")
    return method, trainer.create_optimizer(method, config), config


def train_steps(method, optimizer, config, start, end):
    for step in range(start, end):
        seed_step(0, step)
        trainer.training_step(method, optimizer, batch(), step / 4, config)


def test_training_is_resumed_bit_for_bit(tmp_path):
    training, resumed = create_training(0), create_training(1)
    train_steps(*training, 0, 2)
    checkpoint.save_training_state(tmp_path / "c", *training[:2], {"step": 2})
    assert load_training(tmp_path / "c", *resumed[:2]) == {"step": 2}
    for each in (training, resumed):
        train_steps(*each, 2, 4)
    for (name, expected), t in zip(training[0].state_dict().items(), resumed[0].state_dict().values()):
        assert torch.equal(expected, t), name


def test_the_velocity_is_in_the_checkpoint(tmp_path):
    method, optimizer, config = create_training(0)
    train_steps(method, optimizer, config, 0, 2)
    checkpoint.save_training_state(tmp_path / "c", method, optimizer, {"step": 2})
    tensors, _ = checkpoint.load_tensors(tmp_path / "c")
    velocities = [t for name, t in tensors.items() if name.endswith(".velocity")]
    assert len(velocities) == sum(p.requires_grad for p in method.parameters())
    assert all(t.any() for t in velocities)


def test_the_config_chooses_lars_and_the_schedules_apply_to_it():
    method, optimizer, config = create_training(0)
    assert isinstance(optimizer, LARS)
    assert isinstance(trainer.create_optimizer(method, TrainConfig()), torch.optim.AdamW)
    trainer.set_schedules(optimizer, config, 0.1)
    decayed, plain = optimizer.param_groups
    assert decayed["lr"] == plain["lr"] == pytest.approx(1.7)
    assert 1e-4 <= decayed["weight_decay"] < 1e-3
    assert plain["weight_decay"] == 0


@pytest.mark.parametrize("clip_grad", [0.0, 3.0])
@pytest.mark.parametrize(("precision", "device"), [("fp32", "cuda"), ("bf16", "cuda"), ("fp32", "cpu")])
def test_a_step_does_not_wait_for_the_gpu(precision, device, clip_grad):
    """On fake tensors an operation that reads a value back fails; on a fake CPU, in the backward pass too."""
    config = TrainConfig(**LARS_CONFIG | {"clip_grad": clip_grad}, precision=precision)
    method = SimCLR(create_encoder("cnn"), crop_size=16, projection_dim=8)
    fake_steps(method, config, size=20, steps=2, device=device)


@pytest.mark.parametrize("name", ["dino", "simclr", "transfer"])
def test_the_encoder_is_frozen_for_a_fraction_of_the_run(name):
    """Its weight decay too."""
    method = build(name)
    config = TrainConfig(lr=0.01, warmup_fraction=0.0, weight_decay=0.1, freeze_encoder_fraction=0.5, precision="fp32")
    optimizer = trainer.create_optimizer(method, config)
    encoder = {k: p for k, p in method.named_parameters() if "encoder." in k and p.requires_grad}
    heads = {k: p for k, p in method.named_parameters() if "encoder." not in k and p.requires_grad}
    for progress, frozen in ((0.1, True), (0.6, False)):
        before = {k: p.clone() for k, p in (encoder | heads).items()}
        trainer.training_step(method, optimizer, batch(), progress, config)
        assert all(torch.equal(before[k], p) for k, p in encoder.items()) == frozen
        assert not any(torch.equal(before[k], p) for k, p in heads.items() if p.ndim > 1)
