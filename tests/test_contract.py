"""Every method found in the folder keeps the promise of `minissl.method`; none is listed by hand.

Without a GPU, a training step is run on fake tensors of a fake "cuda" device: they have shapes, types and devices, and
an operation that mixes devices, or reads a number back, fails as it would be wrong or slow on a real one.
"""

import inspect
import math
import warnings
from dataclasses import fields
from unittest.mock import patch

import docstring_parser
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minissl import train
from minissl.method import Batch, Tokens, available, find
from minissl.train import TrainConfig
from minissl.vit import vit
from tests.golden import tiny_vit

SMALL = {"size": 16, "local_size": 8, "local_crops": 1, "prototypes": 32, "hidden": 16, "bottleneck": 8}
COMMAND = {"data", "out", "device", "preset", "resume", "image_size"}


def options_of(name):
    """The method's own options, by name."""
    parameters = list(inspect.signature(find(name)).parameters.values())
    assert parameters[0].name == "encoder"
    return {p.name: p for p in parameters[1:]}


def build(name):
    torch.manual_seed(0)
    return find(name)(tiny_vit(), **{k: v for k, v in SMALL.items() if k in options_of(name)})


def batch(n=6, size=20):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(n) % 3)


@pytest.fixture(params=available())
def name(request):
    return request.param


def test_options_are_keywords_with_defaults_and_are_explained(name):
    explained = {p.arg_name for p in docstring_parser.parse(find(name).__doc__).params}
    for option in options_of(name).values():
        assert option.kind is inspect.Parameter.KEYWORD_ONLY, option
        assert option.default is not inspect.Parameter.empty, option
        assert option.annotation is not inspect.Parameter.empty, option
        assert option.name in explained, option
    assert "size" in options_of(name)


def test_presets_change_options_that_exist(name):
    known = set(options_of(name)) | {f.name for f in fields(TrainConfig)} | {"image_size"}
    known |= {f"encoder.{choice}" for choice in inspect.signature(vit).parameters} - {"encoder.img_size"}
    assert set(find(name).presets) == {"cpu", "gpu"}
    for preset in find(name).presets.values():
        assert set(preset) <= known


def test_no_option_has_two_meanings(name):
    assert not set(options_of(name)) & ({f.name for f in fields(TrainConfig)} | COMMAND)


def test_loss_is_a_dict_of_finite_scalars(name):
    terms = build(name).loss(batch(), 0.3)
    assert terms["loss"].requires_grad
    for term in terms.values():
        assert term.ndim == 0
        assert math.isfinite(term.item())


def test_every_trained_parameter_gets_a_gradient_and_no_other(name):
    method = build(name)
    method.loss(batch(), 1.0)["loss"].backward()
    for label, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, label


def test_a_step_moves_the_encoder_that_is_kept(name):
    method, config = build(name), TrainConfig(lr=0.1, warmup=0.0, precision="fp32")
    before = {k: v.clone() for k, v in method.encoder.named_parameters()}
    train.training_step(method, train.make_optimizer(method, config), batch(), 0.1, config)
    assert any(not torch.equal(before[k], v) for k, v in method.encoder.named_parameters())


def test_the_encoder_gives_tokens_and_attention(name):
    encoder, images = build(name).encoder.eval(), torch.randn(2, 3, 16, 16)
    tokens = encoder(images)
    assert isinstance(tokens, Tokens)
    assert tokens.cls.shape == (2, 32)
    assert tokens.patches.shape == (2, 4, 4, 32)
    assert encoder.attention(images).shape == (2, 4, 4, 4)


def test_the_same_seed_gives_the_same_loss_and_leaves_the_images(name):
    method, images = build(name), batch()
    kept, state, found = images.images.clone(), {k: v.clone() for k, v in method.state_dict().items()}, []
    for _ in range(2):
        method.load_state_dict(state)
        train.seed_step(0, 3)
        found.append(method.loss(images, 0.5)["loss"].item())
    assert found[0] == found[1]
    assert torch.equal(images.images, kept)


def test_a_method_is_all_in_its_state(name):
    method, other = build(name), build(name)
    config = TrainConfig(lr=0.01, warmup=0.0, precision="fp32")
    train.training_step(method, train.make_optimizer(method, config), batch(), 0.1, config)
    other.load_state_dict(method.state_dict())
    losses = []
    for m in (method, other):
        train.seed_step(0, 3)
        losses.append(m.loss(batch(), 0.5)["loss"].item())
    assert losses[0] == losses[1]


def fill_gradients(groups):
    """Stands in for autograd's engine, which asks the CUDA driver for threads; a gradient is like its parameter."""
    for parameter in [p for group in groups for p in group["params"]]:
        parameter.grad = torch.empty_like(parameter)


def fake_step(method_of, config, n, size):
    """One whole training step with everything on a fake CUDA device."""
    with torch.device("meta"), patch("torch.nn.init.trunc_normal_", lambda tensor, **kwargs: tensor):
        method = method_of()
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA is not available or torch_xla is imported")
        with torch.device("cuda"):
            for module in method.modules():
                for label, p in module._parameters.items():
                    if p is not None:
                        module._parameters[label] = nn.Parameter(torch.empty(p.shape), requires_grad=p.requires_grad)
                for label, b in module._buffers.items():
                    if b is not None:
                        module._buffers[label] = torch.empty(b.shape, dtype=b.dtype)
            images = torch.zeros(n, 3, size, size, dtype=torch.uint8)
            labels = torch.zeros(n, dtype=torch.long)
        groups = train.param_groups(method)
        optimizer = torch.optim.AdamW(groups, foreach=True)  # fused asks the driver, which is not there
        with patch.object(torch.Tensor, "backward", lambda loss: fill_gradients(groups)):
            terms = train.training_step(method, optimizer, Batch(images, labels), 0.5, config)
        assert all(term.device.type == "cuda" for term in terms.values())
        assert all(p.grad.device.type == "cuda" for g in groups for p in g["params"] if p.grad is not None)


def preset_method(name, preset):
    values = find(name).presets[preset]
    options = {k: v for k, v in values.items() if k in options_of(name)}
    encoder = {k.removeprefix("encoder."): v for k, v in values.items() if k.startswith("encoder.")}
    size = options.get("size", options_of(name)["size"].default)
    return lambda: find(name)(vit(**encoder, img_size=size), **options)


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_stays_on_the_gpu(name, preset, precision):
    fake_step(preset_method(name, preset), TrainConfig(precision=precision), n=4, size=256)


def test_a_tensor_left_on_the_cpu_is_caught(name):
    def broken():
        method = preset_method(name, "cpu")()
        honest = method.loss

        def loss(batch, progress):
            terms = honest(batch, progress)
            with torch.device("cpu"):
                weights = torch.ones(4)
            return terms | {
                "loss": terms["loss"] * weights.sum() + (batch.images.float().mean((1, 2, 3)) * weights).sum()
            }

        method.loss = loss
        return method

    with pytest.raises(RuntimeError, match=r"device|cpu"):
        fake_step(broken, TrainConfig(precision="fp32"), n=4, size=64)


def test_a_number_read_back_is_caught(name):
    def broken():
        method = preset_method(name, "cpu")()
        honest = method.loss

        def loss(batch, progress):
            terms = honest(batch, progress)
            return terms | {"loss": terms["loss"] * terms["loss"].item()}

        method.loss = loss
        return method

    with pytest.raises(RuntimeError, match=r"item|data-dependent|_local_scalar_dense"):
        fake_step(broken, TrainConfig(precision="fp32"), n=4, size=64)
