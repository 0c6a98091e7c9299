"""Every method keeps the contract of `methods.base.Method`: all of `list_methods()`, and one in a user's own file.

Without a GPU, training steps run on fake tensors of a fake "cuda" device. They have shapes, dtypes and devices, and an
operation that mixes devices, or reads a number back, fails. Everything in the step is real except the engine of the
backward pass. Planted errors show that they are caught.
"""

import copy
import inspect
import math
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

import docstring_parser
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from minissl.data.batch import Batch
from minissl.errors import InputError
from minissl.methods import list_methods
from minissl.methods.base import ImageTextMethod, Method
from minissl.methods.registry import create_method, get_method_class, method_options
from minissl.models.factory import create_encoder
from minissl.models.outputs import Encoder, Tokens
from minissl.training import trainer
from minissl.training.config import TrainConfig
from minissl.training.sampler import seed_step
from tests.golden import tiny_vit

OWN_METHOD = Path(__file__).parent / "own_method.py"
NAMES = [*list_methods(), str(OWN_METHOD)]
SMALL = {
    "crop_size": 16,
    "local_crop_size": 8,
    "num_local_crops": 1,
    "num_prototypes": 32,
    "num_patch_prototypes": 32,
    "hidden_dim": 16,
    "bottleneck_dim": 8,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "embed_dim": 16,
    "text_width": 16,
    "text_layers": 2,
    "text_heads": 2,
    "context_length": 12,
    "vocab_size": 600,
}
CAPTIONS = [("a dog",), ("a red cat", "a cat"), ("the sea",)]
RUN_OPTIONS = {"data", "out", "device", "preset", "resume", "image_size", "init_from", "teacher", "log"}


def options_of(name):
    """Return the method's own options by name."""
    assert next(iter(inspect.signature(get_method_class(name)).parameters)) == "encoder"
    return method_options(get_method_class(name))


def small_options(name):
    return {option: value for option, value in SMALL.items() if option in options_of(name)}


def build(name, seed=0):
    torch.manual_seed(seed)
    return create_method(name, tiny_vit(), **small_options(name))


def batch(n=6, size=20):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(n) % 3, [CAPTIONS[i % 3] for i in range(n)])


@pytest.fixture(params=NAMES, ids=lambda name: Path(name).stem)
def name(request):
    return request.param


def test_the_file_defines_one_subclass_of_method(name):
    method = build(name)
    assert isinstance(method, Method)
    assert isinstance(method.encoder, Encoder)
    assert method.presets.keys() == {"cpu", "gpu"}
    assert set(method.required_fields) <= set(Batch._fields)
    assert method.feature_pooling in ("cls", "both")
    assert ("captions" in method.required_fields) == isinstance(method, ImageTextMethod)


def test_options_are_documented_keywords_with_types_and_defaults(name):
    base_classes = (Method, ImageTextMethod)
    docs = [c.__doc__ for c in get_method_class(name).__mro__ if issubclass(c, Method) and c not in base_classes]
    documented = {p.arg_name for doc in docs for p in docstring_parser.parse(doc).params}
    for option in options_of(name).values():
        assert option.kind is inspect.Parameter.KEYWORD_ONLY, option
        assert option.default is not inspect.Parameter.empty, option
        assert option.annotation is not inspect.Parameter.empty, option
        assert option.name in documented, option
    assert "crop_size" in options_of(name)


def test_presets_set_options_that_exist(name):
    known = set(options_of(name)) | {f.name for f in fields(TrainConfig)} | {"image_size"}
    encoder_options = set(inspect.signature(create_encoder).parameters) - {"image_size"}
    known |= {f"encoder.{option}" for option in encoder_options}
    for preset in get_method_class(name).presets.values():
        assert set(preset) <= known


def test_no_option_has_the_name_of_an_option_of_the_run(name):
    assert not set(options_of(name)) & ({f.name for f in fields(TrainConfig)} | RUN_OPTIONS)


def test_attributes_have_the_names_of_their_options(name):
    """Options that are plain values are found again on the method; those of submodules are not."""
    method, values = build(name), {"crop_size": 16, "crop_scale": None, "local_crop_size": 8, "koleo_loss_weight": None}
    for option in set(values) & set(options_of(name)):
        default = options_of(name)[option].default
        assert getattr(method, option) == (default if values[option] is None else values[option])


def test_config_builds_the_method_again(name):
    method = build(name)
    again = create_method(method.config["name"], tiny_vit(), **method.config["options"])
    assert method.config["options"].keys() == options_of(name).keys()
    assert again.config == method.config
    again.load_state_dict(method.state_dict())


def test_loss_is_a_dict_of_finite_scalars_and_hooks_name_its_terms(name):
    method = build(name)
    terms = method.loss(batch(), 0.3)
    assert terms["loss"].requires_grad
    for term in terms.values():
        assert term.ndim == 0
        assert math.isfinite(term.item())
    assert set(method.num_candidates(6)) <= set(terms)
    assert all(n > 1 for n in method.num_candidates(6).values())
    assert set(method.param_lr_scales()) <= {label for label, _ in method.named_parameters()}


def test_target_probs_are_distributions(name):
    features = torch.randn(5, 32)
    probs = build(name).target_probs(features)
    assert (probs is not None) == ("num_prototypes" in options_of(name))
    if probs is not None:
        assert probs.shape == (5, 32)
        torch.testing.assert_close(probs.sum(-1), torch.ones(5))


def test_image_text_methods_embed_both_into_one_space(name):
    method = build(name)
    if not isinstance(method, ImageTextMethod):
        pytest.skip("no text encoder")
    assert method.embed_images(torch.randn(2, 3, 16, 16)).shape == (2, 16)
    assert method.embed_text(["a dog", "the sea", "a cat"]).shape == (3, 16)
    assert method.logit_scale.ndim == 0


def test_exactly_the_trained_parameters_get_a_gradient(name):
    method = build(name)
    method.loss(batch(), 1.0)["loss"].backward()
    for label, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, label
        assert parameter.grad is None or parameter.grad.any(), label


def test_after_step_updates_an_encoder_that_is_not_trained(name):
    method = build(name)
    if method.requires_pretrained_encoder or any(p.requires_grad for p in method.encoder.parameters()):
        pytest.skip("the encoder is trained by gradients, or frozen")
    before = [p.clone() for p in method.encoder.parameters()]
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.1 if p.requires_grad else 0.0)
    method.after_step(0.1)
    assert not any(torch.equal(old, new) for old, new in zip(before, method.encoder.parameters()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_run_in_both_precisions(name, precision):
    method, config = build(name), TrainConfig(precision=precision)
    optimizer = trainer.create_optimizer(method, config)
    for step in range(8):
        seed_step(0, step)
        assert trainer.training_step(method, optimizer, batch(), 0.5, config)["loss"].isfinite()


def test_a_step_changes_the_encoder_unless_it_is_frozen(name):
    method, config = build(name), TrainConfig(lr=0.1, warmup_fraction=0.0, precision="fp32")
    before = {k: v.clone() for k, v in method.encoder.named_parameters()}
    trainer.training_step(method, trainer.create_optimizer(method, config), batch(), 0.1, config)
    changed = any(not torch.equal(before[k], v) for k, v in method.encoder.named_parameters())
    assert changed != method.requires_pretrained_encoder


def test_the_encoder_returns_tokens_and_attention(name):
    encoder, images = build(name).encoder.eval(), torch.randn(2, 3, 16, 16)
    tokens = encoder(images)
    assert isinstance(tokens, Tokens)
    assert tokens.cls.shape == (2, 32)
    assert tokens.patches.shape == (2, 4, 4, 32)
    assert encoder.attention(images).shape == (2, 4, 4, 4)


def test_the_seed_determines_the_loss_and_images_stay_unchanged(name):
    method, images = build(name), batch()
    original, state, losses = images.images.clone(), copy.deepcopy(method.state_dict()), []
    for _ in range(2):
        method.load_state_dict(state)
        seed_step(0, 3)
        losses.append(method.loss(images, 0.5)["loss"].item())
    assert losses[0] == losses[1]
    assert torch.equal(images.images, original)


def test_the_state_dict_holds_all_of_a_method(name):
    method, other = build(name), build(name, seed=1)
    config = TrainConfig(lr=0.01, warmup_fraction=0.0, precision="fp32")
    trainer.training_step(method, trainer.create_optimizer(method, config), batch(), 0.1, config)
    other.load_state_dict(method.state_dict())
    losses = []
    for m in (method, other):
        seed_step(0, 3)
        losses.append(m.loss(batch(), 0.5)["loss"].item())
    assert losses[0] == losses[1]


def test_methods_without_prototypes_cannot_be_distilled(name):
    if get_method_class(name).set_distillation_teacher is not Method.set_distillation_teacher:
        pytest.skip("supports distillation")
    with pytest.raises(InputError, match="--teacher"):
        build(name).set_distillation_teacher(build(name))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "0 subclasses"),
        (f"{OWN_METHOD.read_text()}\n\nclass Second(SimSiam):\n    pass\n", "2 subclasses"),
        ("import a_missing_module", "a_missing_module"),
    ],
)
def test_a_file_without_exactly_one_method_is_rejected(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(InputError, match=message):
        get_method_class(str(path))


def test_unknown_names_get_a_suggestion():
    with pytest.raises(InputError, match="'dinov2'"):
        get_method_class("dino_v2")
    with pytest.raises(InputError, match=r"missing\.py"):
        get_method_class("missing.py")
    with pytest.raises(InputError, match="'num_prototypes'"):
        create_method("dino", tiny_vit(), prototypes=32)


def reached_parameters(loss):
    """Return the parameters that the backward pass would reach, from the autograd graph."""
    seen, todo, parameters = set(), [loss.grad_fn], []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            parameters += [node.variable] if hasattr(node, "variable") else []
            todo += [other for other, _ in node.next_functions]
    return parameters


def fake_backward(loss):
    """Replace autograd's engine, which asks the CUDA driver for threads; a gradient has its parameter's shape."""
    for parameter in reached_parameters(loss):
        parameter.grad = torch.empty_like(parameter)


def move(method, device):
    """Do what `Module.to` does, which fails for fake tensors: move parameters and buffers, no other attributes."""
    for module in method.modules():
        for label, p in module._parameters.items():
            if p is not None:
                module._parameters[label] = nn.Parameter(p.detach().to(device), requires_grad=p.requires_grad)
        for label, b in module._buffers.items():
            if b is not None:
                module._buffers[label] = b.to(device)


def fake_steps(method, config, size=256, steps=1, device="cuda", spoil=lambda method: None):
    """Run training steps of a fake copy of a method on a fake device. Returns the terms of the last step."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        method = copy.deepcopy(method)
    enable_autocast = patch("torch.cuda.amp.common.amp_definitely_not_available", bool)
    enable_bf16 = patch("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True)
    with mode, enable_autocast, enable_bf16:
        move(method, device)
        spoil(method)
        images = torch.zeros(4, 3, size, size, dtype=torch.uint8, device=device)
        labels = torch.zeros(4, dtype=torch.long, device=device)
        fake_batch = Batch(images, labels, [CAPTIONS[i % 3] for i in range(4)])
        optimizer = trainer.create_optimizer(method, config)
        backward = fake_backward if device == "cuda" else torch.Tensor.backward
        with patch.object(torch.Tensor, "backward", backward):
            for step in range(steps):
                seed_step(0, step)
                terms = trainer.training_step(method, optimizer, fake_batch, 0.5, config)
    devices = {t.device.type for t in [*terms.values(), *(p.grad for p in method.parameters() if p.grad is not None)]}
    assert devices == {device}
    return terms


def build_preset(name, preset):
    """Build a method and its encoder by a preset, as a run does."""
    values = get_method_class(name).presets[preset]
    options = {k: v for k, v in values.items() if k in options_of(name)}
    encoder = {k.removeprefix("encoder."): v for k, v in values.items() if k.startswith("encoder.")}
    image_size = options.get("crop_size", options_of(name)["crop_size"].default)
    return create_method(name, create_encoder(**encoder, image_size=image_size), **options)


SLOW = pytest.mark.slow  # repeats of what is tested for another precision or method among the fast tests


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "precision"),
    [("cpu", "fp32"), ("cpu", "bf16"), pytest.param("gpu", "fp32", marks=SLOW), ("gpu", "bf16")],
)
def test_steps_stay_on_the_gpu(name, preset, precision):
    """Three steps with the small preset, because random choices change which operations run."""
    steps = 3 if preset == "cpu" else 1
    terms = fake_steps(build_preset(name, preset), TrainConfig(precision=precision), steps=steps)
    assert terms["loss"].dtype == torch.float32


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_linear_layers_compute_in_the_given_precision(name, precision, dtype):
    dtypes = set()

    def record_dtypes(method):
        for layer in (m for m in method.modules() if isinstance(m, nn.Linear)):
            layer.register_forward_hook(lambda layer, inputs, output: dtypes.add(output.dtype))

    fake_steps(build(name), TrainConfig(precision=precision), size=20, spoil=record_dtypes)
    assert dtypes == {dtype}


def test_the_backward_pass_reads_no_number_back(name):
    """On a fake CPU, autograd's own engine runs; `.item()` anywhere in the step fails as on a fake GPU."""
    fake_steps(build(name), TrainConfig(precision="fp32"), size=20, device="cpu")


def use_a_tensor_on_the_cpu(method):
    original = method.loss
    method.loss = lambda batch, progress: {"loss": (original(batch, progress)["loss"] * torch.ones(4)).sum()}


def forget_a_buffer(method):
    original, method.weights = method.loss, torch.ones(4)  # an attribute that `to` does not move
    method.loss = lambda batch, progress: {"loss": (original(batch, progress)["loss"] * method.weights).sum()}


def read_a_number_back(method):
    original = method.loss
    method.loss = lambda batch, progress: {"loss": original(batch, progress)["loss"] * batch.images.sum().item()}


def branch_on_a_tensor(method):
    original = method.loss
    method.loss = lambda batch, progress: original(batch, progress) if batch.images.sum() > 0 else {}


def use_a_data_dependent_shape(method):
    original = method.loss
    method.loss = lambda batch, progress: original(Batch(batch.images[batch.labels == 0]), progress)


def read_a_number_after_the_step(method):
    method.after_step = lambda progress: next(method.parameters()).sum().item()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (use_a_tensor_on_the_cpu, "two.* devices,? cuda:0"),
        (forget_a_buffer, "two.* devices,? cuda:0"),
        (read_a_number_back, "_local_scalar_dense"),
        (branch_on_a_tensor, "_local_scalar_dense"),
        (use_a_data_dependent_shape, "nonzero"),
        (read_a_number_after_the_step, "_local_scalar_dense"),
    ],
)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "dino" else SLOW) for n in list_methods()])
def test_errors_that_slow_down_or_break_a_gpu_are_caught(name, spoil, message):
    with pytest.raises(RuntimeError, match=message):
        fake_steps(build(name), TrainConfig(precision="fp32"), size=20, spoil=spoil)
