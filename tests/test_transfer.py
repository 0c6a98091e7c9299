"""Transfer: what is tuned, how fast each layer moves, and that features of a learnt task help where labels are few."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minissl.hub import pretrained
from minissl.data import Images
from minissl.data.images import Factor
from minissl.models.factory import create_encoder
from minissl.errors import InputError
from minissl.evaluation import extract_features, sample_per_class, few_shot, fine_tune, linear_probe
from minissl.data.batch import Batch
from minissl.methods.transfer import Transfer
from minissl.training.config import TrainConfig
from minissl.training.trainer import learn, create_optimizer, set_schedules
from minissl.models.layers import layer_lr_scales
from tests.golden import tiny_vit


def squares(n=120, seed=0):
    """Images (n, 3, 16, 16) of noise with a square in one of three colours, and which."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 3
    for i, label in enumerate(labels.tolist()):
        images[i, label, 4:12, 4:12] = 230
    return images, labels


def batch(n=6):
    images, labels = squares(n)
    return Batch(images, labels, factors={"color": labels, "size": (labels + 1) % 3})


def tuned(method):
    return {name for name, p in method.encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tune", ["all", "last", "head"])
def test_what_is_tuned_moves_and_nothing_else(tune):
    torch.manual_seed(0)
    method = Transfer(tiny_vit(), crop_size=16, num_classes=3, tune=tune)
    before = {name: p.clone() for name, p in method.encoder.named_parameters()}
    learn(method, Images(*squares()), TrainConfig(batch_size=6, lr=0.01, warmup_fraction=0.0), 2)
    moved = {name for name, p in method.encoder.named_parameters() if not torch.equal(p, before[name])}
    everything = set(before)
    last = {name for name in everything if name.startswith(("norm.", "blocks.1."))}
    assert tuned(method) == {"all": everything, "last": last, "head": set()}[tune]
    assert moved == tuned(method)


def test_a_frozen_encoder_keeps_its_batch_norms():
    method = Transfer(create_encoder("cnn"), crop_size=16, num_classes=3, tune="head").train()
    before = [b.clone() for b in method.encoder.buffers()]
    method.loss(batch(), 0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, method.encoder.buffers()))
    assert len(before) > 0


def test_layers_move_at_their_own_speed():
    encoder = tiny_vit()
    rates = layer_lr_scales(encoder, 0.5)
    assert rates["blocks.1.attn.qkv.weight"] == rates["norm.weight"] == 1
    assert rates["blocks.0.mlp.fc1.bias"] == 0.5
    assert rates["pos_embed"] == rates["patch_embed.proj.weight"] == 0.25
    assert set(rates) == {name for name, _ in encoder.named_parameters()}
    assert set(layer_lr_scales(create_encoder("cnn"), 0.3).values()) == {0.3}
    method = Transfer(encoder, crop_size=16, num_classes=3, layer_decay=0.5)
    optimizer = create_optimizer(method, TrainConfig())
    set_schedules(optimizer, TrainConfig(lr=1.0, warmup_fraction=0.0), 0.0)
    name = {id(p): n for n, p in method.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["lr"] == rates.get(name[id(p)].removeprefix("encoder."), 1.0)


def test_the_loss_is_the_cross_entropy_of_every_target():
    method = Transfer(tiny_vit(), crop_size=16, crop_scale=(1.0, 1.0), num_classes=3, targets=("color", "size")).eval()
    torch.manual_seed(0)
    terms = method.loss(batch(), 0.0)
    torch.testing.assert_close(terms["loss"], terms["color"] + terms["size"])
    single = Transfer(tiny_vit(), crop_size=16, crop_scale=(1.0, 1.0), num_classes=3, label_smoothing=0.1)
    seen = []
    single.heads["labels"].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    loss, logits = single.loss(batch(), 0.0)["loss"], seen
    slow = -(F.log_softmax(logits[0].double(), -1) * (0.9 * F.one_hot(batch().labels, 3) + 0.1 / 3)).sum(-1).mean()
    assert loss.item() == pytest.approx(slow.item(), abs=1e-6)


def test_what_cannot_be_learnt_is_said():
    images = Images(*squares(6), factors={"color": Factor(torch.arange(6), tuple("abcdef"), ())})
    with pytest.raises(InputError, match="no factor 'place'; choose from color"):
        Transfer(tiny_vit(), targets=("place",)).prepare(images)
    with pytest.raises(InputError, match="3 classes and 2 outputs; give --num_classes 3"):
        Transfer(tiny_vit(), num_classes=2).prepare(images)
    with pytest.raises(InputError, match="no blocks"):
        Transfer(create_encoder("cnn"), tune="last")


@pytest.fixture(scope="module")
def learnt():
    torch.manual_seed(0)
    method = Transfer(tiny_vit(), crop_size=16, num_classes=3)
    history = learn(method, Images(*squares()), TrainConfig(batch_size=32, lr=3e-3, seed=1), 60)
    return method, history


def test_it_learns(learnt):
    _, history = learnt
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    assert set(history[0]) == {"loss", "accuracy"}


def test_few_takes_as_many_of_each_class_as_asked_for():
    _, labels = squares(30)
    rows = sample_per_class(labels, 4, seed=0)
    assert labels[rows].bincount().tolist() == [4, 4, 4]
    assert len(set(rows.tolist())) == 12
    assert torch.equal(rows, sample_per_class(labels, 4, seed=0))
    assert not torch.equal(rows, sample_per_class(labels, 4, seed=1))
    assert len(sample_per_class(labels, 100, seed=0)) == 30


@pytest.mark.slow
def test_few_labels_are_enough_for_features_that_know_the_task(learnt):
    torch.manual_seed(3)
    encoder, train, test = learnt[0].encoder, squares(60, seed=5), squares(60, seed=6)
    kept = {name: p.clone() for name, p in encoder.state_dict().items()}
    table = few_shot(encoder, tiny_vit(), train, test, 16, labels_per_class=(1, 4), num_seeds=2)
    assert {name: values.shape for name, values in table.items()} == dict.fromkeys(table, torch.Size((2, 2)))
    assert table["frozen"][1].min() > 0.9
    rows = sample_per_class(train[1], 1, seed=1)
    found = linear_probe(extract_features(encoder, train[0][rows], 16), train[1][rows], extract_features(encoder, test[0], 16), 0.1)
    assert table["frozen"][0, 1] == (found == test[1]).float().mean()
    assert all(torch.equal(kept[name], p) for name, p in encoder.state_dict().items())


def test_fine_tuning_is_the_same_from_the_same_seed(learnt):
    encoder, (images, labels) = learnt[0].encoder, squares(30)
    one, other = (fine_tune(encoder, images, labels, images, 16, steps=5, seed=2) for _ in range(2))
    assert torch.equal(one, other)
    assert one.shape == (30,)


@pytest.mark.parametrize("name", ["nano", "cnn", "resnet18"])
def test_every_encoder_gives_tokens_and_learns_from_where_another_stopped(name, tmp_path):
    choices = {"name": name, "patch_size": 8, "img_size": 32, "stem": "conv"}
    torch.manual_seed(0)
    encoder, images = create_encoder(**choices).eval(), torch.randn(2, 3, 32, 32)
    tokens = encoder(images)
    assert tokens.cls.shape == (2, encoder.dim)
    assert tokens.patches.shape[-1] == encoder.dim
    attention = encoder.attention(images)
    assert attention.shape[-2:] == tokens.patches.shape[1:3]
    path = tmp_path / "encoder.safetensors"
    pretrained.save_encoder(encoder, choices, path)
    torch.manual_seed(1)
    again = create_encoder(**choices)
    pretrained.load_weights(again, path)
    for one in (again.eval(), pretrained.load_encoder(path)):
        torch.testing.assert_close(one(images).cls, tokens.cls)


def test_weights_of_another_encoder_are_refused(tmp_path):
    path = tmp_path / "encoder.safetensors"
    pretrained.save_encoder(create_encoder("cnn"), {"name": "cnn"}, path)
    with pytest.raises(InputError, match="another encoder"):
        pretrained.load_weights(create_encoder("nano", 8, 32), path)
    with pytest.raises(InputError, match=r"pretrained\.put"):
        create_encoder("nano", 8, 32, weights=str(path))
    with pytest.raises(InputError, match="ResNets only"):
        create_encoder("nano", 8, 32, weights="imagenet")


def test_a_resnet_is_torchvisions():
    import torchvision

    torch.manual_seed(0)
    ours, theirs = create_encoder("resnet18", image_size=224).eval(), torchvision.models.resnet18().eval()
    theirs.load_state_dict(ours.network.state_dict(), strict=False)
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images).cls, theirs(images))
