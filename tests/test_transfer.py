"""Transfer learning: which parameters are tuned and at which learning rate, and what the loss is."""

import pytest
import torch
from torch.nn import functional as F

from minissl.data import Images
from minissl.data.batch import Batch
from minissl.data.images import Factor
from minissl.errors import InputError
from minissl.methods.transfer import Transfer
from minissl.models.factory import create_encoder
from minissl.models.layers import layer_lr_scales
from minissl.training.config import TrainConfig
from minissl.training.trainer import create_optimizer, learn, set_schedules
from tests.golden import tiny_vit


def colored_squares(n=120, seed=0):
    """Return noise images (n, 3, 16, 16) with a square of one of three colors, and the colors."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 3
    for i, label in enumerate(labels.tolist()):
        images[i, label, 4:12, 4:12] = 230
    return images, labels


def squares_batch(n=6):
    images, labels = colored_squares(n)
    return Batch(images, labels, factors={"color": labels, "size": (labels + 1) % 3})


def tuned_parameters(method):
    return {name for name, p in method.encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tune", ["all", "last", "head"])
def test_exactly_the_tuned_parameters_change(tune):
    torch.manual_seed(0)
    method = Transfer(tiny_vit(), crop_size=16, num_classes=3, tune=tune)
    before = {name: p.clone() for name, p in method.encoder.named_parameters()}
    learn(method, Images(*colored_squares()), TrainConfig(batch_size=6, lr=0.01, warmup_fraction=0.0), 2)
    changed = {name for name, p in method.encoder.named_parameters() if not torch.equal(p, before[name])}
    last = {name for name in before if name.startswith(("norm.", "blocks.1."))}
    assert tuned_parameters(method) == {"all": set(before), "last": last, "head": set()}[tune]
    assert changed == tuned_parameters(method)


def test_a_frozen_encoder_keeps_its_batch_norm_statistics():
    method = Transfer(create_encoder("cnn"), crop_size=16, num_classes=3, tune="head").train()
    before = [b.clone() for b in method.encoder.buffers()]
    method.loss(squares_batch(), 0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, method.encoder.buffers(), strict=True))
    assert len(before) > 0


def test_learning_rates_decay_by_layer():
    encoder = tiny_vit()
    scales = layer_lr_scales(encoder, 0.5)
    assert scales["blocks.1.attn.qkv.weight"] == scales["norm.weight"] == 1
    assert scales["blocks.0.mlp.fc1.bias"] == 0.5
    assert scales["pos_embed"] == scales["patch_embed.proj.weight"] == 0.25
    assert set(scales) == {name for name, _ in encoder.named_parameters()}
    assert set(layer_lr_scales(create_encoder("cnn"), 0.3).values()) == {0.3}
    method = Transfer(encoder, crop_size=16, num_classes=3, layer_decay=0.5)
    optimizer = create_optimizer(method, TrainConfig())
    set_schedules(optimizer, TrainConfig(lr=1.0, warmup_fraction=0.0), 0.0)
    names = {id(p): n for n, p in method.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["lr"] == scales.get(names[id(p)].removeprefix("encoder."), 1.0)


def test_the_loss_is_the_sum_of_the_cross_entropies_of_all_targets():
    options = {"crop_size": 16, "crop_scale": (1.0, 1.0), "num_classes": 3}
    method = Transfer(tiny_vit(), **options, targets=("color", "size")).eval()
    torch.manual_seed(0)
    terms = method.loss(squares_batch(), 0.0)
    torch.testing.assert_close(terms["loss"], terms["color"] + terms["size"])
    assert method.num_candidates(6) == {"color": 3, "size": 3}
    method, logits = Transfer(tiny_vit(), **options, label_smoothing=0.1), []
    method.heads["labels"].register_forward_hook(lambda layer, inputs, output: logits.append(output))
    loss = method.loss(squares_batch(), 0.0)["loss"]
    targets = 0.9 * F.one_hot(squares_batch().labels, 3) + 0.1 / 3
    expected = -(F.log_softmax(logits[0].double(), -1) * targets).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_impossible_options_are_rejected():
    images = Images(*colored_squares(6), factors={"color": Factor(torch.arange(6), tuple("abcdef"), ())})
    with pytest.raises(InputError, match=r"'place'.*color"):
        Transfer(tiny_vit(), targets=("place",)).prepare(images)
    with pytest.raises(InputError, match="--num_classes 3"):
        Transfer(tiny_vit(), num_classes=2).prepare(images)
    with pytest.raises(InputError, match="--tune"):
        Transfer(create_encoder("cnn"), tune="last")


def test_classification_is_learned():
    torch.manual_seed(0)
    method = Transfer(tiny_vit(), crop_size=16, num_classes=3)
    history = learn(method, Images(*colored_squares()), TrainConfig(batch_size=32, lr=3e-3, seed=1), 60)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert set(history[0]) == {"loss", "accuracy"}
