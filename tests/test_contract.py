"""Every method found in the folder keeps the promise of `minissl.method`; none is listed by hand.

Without a GPU, training steps are run on fake tensors of a fake "cuda" device: they have shapes, types and devices, and
an operation that mixes devices, or reads a number back, fails as it would be wrong or slow on a real one. All of the
step is the true one but the walk of the backward pass; and mistakes are planted, to show that they are caught.
"""

import copy
import inspect
import math
from dataclasses import fields
from unittest.mock import patch

import docstring_parser
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from minissl import train
from minissl.encoders import make_encoder
from minissl.method import Batch, Tokens, available, find, options
from minissl.train import TrainConfig
from tests.golden import tiny_vit

SMALL = {"size": 16, "local_size": 8, "local_crops": 1, "prototypes": 32, "hidden": 16, "bottleneck": 8}
SMALL |= {"patch_prototypes": 32}
SMALL |= {"embedding": 16, "text_width": 16, "text_depth": 2, "text_heads": 2, "length": 12, "vocabulary": 600}
SAID = [("a dog",), ("a red cat", "a cat"), ("the sea",)]
COMMAND = {"data", "out", "device", "preset", "resume", "image_size", "start", "teacher"}


def options_of(name):
    """The method's own options, by name."""
    assert next(iter(inspect.signature(find(name)).parameters)) == "encoder"
    return options(find(name))


def build(name, seed=0):
    torch.manual_seed(seed)
    return find(name)(tiny_vit(), **{k: v for k, v in SMALL.items() if k in options_of(name)})


def batch(n=6, size=20):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(n) % 3, [SAID[i % 3] for i in range(n)])


@pytest.fixture(params=available())
def name(request):
    return request.param


def test_options_are_keywords_with_defaults_and_are_explained(name):
    docs = [c.__doc__ for c in find(name).__mro__ if hasattr(c, "presets")]  # its own, and of what it extends
    explained = {p.arg_name for doc in docs for p in docstring_parser.parse(doc).params}
    for option in options_of(name).values():
        assert option.kind is inspect.Parameter.KEYWORD_ONLY, option
        assert option.default is not inspect.Parameter.empty, option
        assert option.annotation is not inspect.Parameter.empty, option
        assert option.name in explained, option
    assert "size" in options_of(name)


def test_presets_change_options_that_exist(name):
    known = set(options_of(name)) | {f.name for f in fields(TrainConfig)} | {"image_size"}
    known |= {f"encoder.{choice}" for choice in inspect.signature(make_encoder).parameters} - {"encoder.img_size"}
    assert set(find(name).presets) == {"cpu", "gpu"}
    for preset in find(name).presets.values():
        assert set(preset) <= known


def test_no_option_has_two_meanings(name):
    assert not set(options_of(name)) & ({f.name for f in fields(TrainConfig)} | COMMAND)


def test_a_file_has_one_class_that_keeps_the_promise(name):
    method = build(name)
    assert isinstance(method, nn.Module)
    assert isinstance(method.encoder, nn.Module)
    assert callable(method.loss)
    assert callable(method.after_step)


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
        assert parameter.grad is None or parameter.grad.any(), label


def test_after_step_alone_moves_an_encoder_that_is_not_trained(name):
    method = build(name)
    if getattr(find(name), "frozen", False) or any(p.requires_grad for p in method.encoder.parameters()):
        pytest.skip("the encoder is trained itself, or not at all")
    before = [p.clone() for p in method.encoder.parameters()]
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.1 if p.requires_grad else 0.0)
    method.after_step(0.1)
    assert not any(torch.equal(old, new) for old, new in zip(before, method.encoder.parameters()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_run_in_either_precision_whatever_is_drawn(name, precision):
    method, config = build(name), TrainConfig(precision=precision)
    optimizer = train.make_optimizer(method, config)
    for step in range(8):
        train.seed_step(0, step)
        assert train.training_step(method, optimizer, batch(), 0.5, config)["loss"].isfinite()


def test_a_step_moves_the_encoder_that_is_kept(name):
    if getattr(find(name), "frozen", False):
        pytest.skip("the encoder is given, and stays as it is")
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
    method, other = build(name), build(name, seed=1)
    config = TrainConfig(lr=0.01, warmup=0.0, precision="fp32")
    train.training_step(method, train.make_optimizer(method, config), batch(), 0.1, config)
    other.load_state_dict(method.state_dict())
    losses = []
    for m in (method, other):
        train.seed_step(0, 3)
        losses.append(m.loss(batch(), 0.5)["loss"].item())
    assert losses[0] == losses[1]


def reached(loss):
    """The parameters that a backward pass would reach, from the graph it would walk."""
    seen, todo, found = set(), [loss.grad_fn], []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            todo += [other for other, _ in node.next_functions]
    return found


def like_backward(loss):
    """Stands in for autograd's engine, which asks the CUDA driver for threads; a gradient is like its parameter."""
    for parameter in reached(loss):
        parameter.grad = torch.empty_like(parameter)


def move(method, device):
    """What `Module.to` does, which fake tensors cannot: parameters and buffers go, a forgotten attribute stays."""
    for module in method.modules():
        for label, p in module._parameters.items():
            if p is not None:
                module._parameters[label] = nn.Parameter(p.detach().to(device), requires_grad=p.requires_grad)
        for label, b in module._buffers.items():
            if b is not None:
                module._buffers[label] = b.to(device)


def fake_steps(method, config, size=256, steps=1, device="cuda", spoil=lambda method: None):
    """Whole training steps of a real method's fake copy, moved to a fake device. Returns the terms of the last."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        method = copy.deepcopy(method)
    there = patch("torch.cuda.amp.common.amp_definitely_not_available", bool)  # else autocast turns itself off
    able = patch("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True)
    with mode, there, able:
        move(method, device)
        spoil(method)
        images = torch.zeros(4, 3, size, size, dtype=torch.uint8, device=device)
        images = Batch(images, torch.zeros(4, dtype=torch.long, device=device), [SAID[i % 3] for i in range(4)])
        optimizer = train.make_optimizer(method, config)
        backward = like_backward if device == "cuda" else torch.Tensor.backward
        with patch.object(torch.Tensor, "backward", backward):
            for step in range(steps):
                train.seed_step(0, step)
                terms = train.training_step(method, optimizer, images, 0.5, config)
    devices = {t.device.type for t in [*terms.values(), *(p.grad for p in method.parameters() if p.grad is not None)]}
    assert devices == {device}
    return terms


def preset_method(name, preset):
    """As `runs.Run.build` makes it."""
    values = find(name).presets[preset]
    options = {k: v for k, v in values.items() if k in options_of(name)}
    encoder = {k.removeprefix("encoder."): v for k, v in values.items() if k.startswith("encoder.")}
    size = options.get("size", options_of(name)["size"].default)
    return find(name)(make_encoder(**encoder, img_size=size), **options)


SLOW = pytest.mark.slow  # what repeats, in another precision or for another method, what is tried fast as well


@pytest.mark.parametrize(
    ("preset", "precision"),
    [("cpu", "fp32"), ("cpu", "bf16"), pytest.param("gpu", "fp32", marks=SLOW), ("gpu", "bf16")],
)
def test_steps_stay_on_the_gpu(name, preset, precision):
    """Three with the small preset: what is drawn can change which operations run, and in which precision."""
    steps = 3 if preset == "cpu" else 1
    terms = fake_steps(preset_method(name, preset), TrainConfig(precision=precision), steps=steps)
    assert terms["loss"].dtype == torch.float32


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrices_are_multiplied_in_the_precision_asked_for(name, precision, dtype):
    found = set()

    def listen(method):
        for layer in (m for m in method.modules() if isinstance(m, nn.Linear)):
            layer.register_forward_hook(lambda layer, inputs, output: found.add(output.dtype))

    fake_steps(build(name), TrainConfig(precision=precision), size=20, spoil=listen)
    assert found == {dtype}


def test_the_backward_pass_reads_no_number_back(name):
    """On a fake CPU autograd's own engine runs: an `.item()` anywhere in the step fails as on a fake GPU."""
    fake_steps(build(name), TrainConfig(precision="fp32"), size=20, device="cpu")


def a_tensor_on_the_cpu(method):
    honest = method.loss
    method.loss = lambda batch, progress: {"loss": (honest(batch, progress)["loss"] * torch.ones(4)).sum()}


def a_forgotten_buffer(method):
    honest, method.weights = method.loss, torch.ones(4)  # an attribute that `to` does not move
    method.loss = lambda batch, progress: {"loss": (honest(batch, progress)["loss"] * method.weights).sum()}


def a_number_read_back(method):
    honest = method.loss
    method.loss = lambda batch, progress: {"loss": honest(batch, progress)["loss"] * batch.images.sum().item()}


def a_choice_by_a_tensor(method):
    honest = method.loss
    method.loss = lambda batch, progress: honest(batch, progress) if batch.images.sum() > 0 else {}


def a_shape_that_depends_on_numbers(method):
    honest = method.loss
    method.loss = lambda batch, progress: honest(Batch(batch.images[batch.labels == 0]), progress)


def a_number_read_after_the_step(method):
    method.after_step = lambda progress: next(method.parameters()).sum().item()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (a_tensor_on_the_cpu, "two.* devices,? cuda:0"),
        (a_forgotten_buffer, "two.* devices,? cuda:0"),
        (a_number_read_back, "_local_scalar_dense"),
        (a_choice_by_a_tensor, "_local_scalar_dense"),
        (a_shape_that_depends_on_numbers, "nonzero"),
        (a_number_read_after_the_step, "_local_scalar_dense"),
    ],
)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "dino" else SLOW) for n in available()])
def test_what_is_wrong_on_a_gpu_is_caught(name, spoil, says):
    with pytest.raises(RuntimeError, match=says):
        fake_steps(build(name), TrainConfig(precision="fp32"), size=20, spoil=spoil)
