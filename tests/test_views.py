"""The recipes are the papers': how often and how far each operation comes, and what stays true of every batch."""

import random
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minissl import augment, views
from minissl.errors import InputError
from minissl.visualize import views_figure
from tests.benchmarks import views as benchmark

DINO = partial(views.multi_crop, size=16, local_size=8, local_crops=2, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
RECIPES = {"dino": DINO, "simclr": partial(views.simclr, size=16), "simclr_cifar": partial(views.simclr_cifar, size=16)}


@pytest.fixture
def stored():
    torch.manual_seed(0)
    random.seed(0)
    return torch.randint(0, 256, (4, 3, 40, 48), dtype=torch.uint8)


@pytest.fixture
def calls(monkeypatch):
    """Every operation a recipe asks for, as (name, arguments after the images), in order."""
    found = []

    def listen(name):
        true = getattr(views, name)

        def operation(images, *args, **kwargs):
            found.append((name, args, kwargs))
            return true(images, *args, **kwargs)

        monkeypatch.setattr(views, name, operation)

    for name in ("cut", "color_jitter", "random_grey", "random_blur", "solarize", "normalize"):
        listen(name)
    return found


def crop(size, scale, jitter, blur, solar, reach):
    """What is asked for to make one kind of crop, in the papers' order; jitter at 0.8, grey at 0.2."""
    return [
        *(("cut", (scale, size), {}), ("color_jitter", jitter, {}), ("random_grey", (), {})),
        *(("random_blur", (blur,), {"high": reach}), ("solarize", (solar,), {}), ("normalize", (), {})),
    ]


@pytest.mark.parametrize(("blur", "options"), [((1.0, 0.1, 0.5), {}), ((0.0, 0.9, 0.5), {"blur": (0.0, 0.9, 0.5)})])
def test_multi_crop_is_the_papers(stored, calls, blur, options):
    """DINO's, and with its option what DINOv2's published code does."""
    jitter, whole, part = (0.4, 0.4, 0.2, 0.1), (0.4, 1.0), (0.05, 0.4)
    views.multi_crop(stored, 224, 96, 8, whole, part, **options)
    first, second = crop(224, whole, jitter, blur[0], 0.0, 2.0), crop(224, whole, jitter, blur[1], 0.2, 2.0)
    assert calls == first + second + 8 * crop(96, part, jitter, blur[2], 0.0, 2.0)


def test_simclr_is_the_papers(stored, calls):
    views.simclr(stored, 224)
    assert calls == 2 * crop(224, (0.08, 1.0), (0.8, 0.8, 0.8, 0.2), 0.5, 0.0, 2.0)


def test_simclr_for_cifar_has_half_the_jitter_and_no_blur(stored, calls):
    views.simclr_cifar(stored)
    assert calls == 2 * crop(32, (0.08, 1.0), (0.4, 0.4, 0.4, 0.1), 0.0, 0.0, 2.0 * 32 / 224)


def test_the_probabilities_that_recipes_leave_to_the_operations_are_the_papers(stored):
    """In the views themselves: grey 0.2, and half are flipped."""
    torch.manual_seed(0)
    ramp = torch.linspace(40, 200, 32).to(torch.uint8).expand(3000, 3, 32, 32).clone()  # brighter to the right
    ramp[:, 0] += 40
    found = augment.denormalize(views.simclr_cifar(ramp, 8))
    grey = ((found[:, 0] - found[:, 2]).abs() < 1e-3).flatten(1).all(1).float().mean()
    flipped = (found[..., 0].mean((1, 2)) > found[..., -1].mean((1, 2))).float().mean()
    assert grey.item() == pytest.approx(0.2, abs=0.02)
    assert flipped.item() == pytest.approx(0.5, abs=0.02)


def test_multi_crop_is_stored_crop_by_crop():
    torch.manual_seed(0)
    dark_and_bright = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 255)]).to(torch.uint8)
    large, small = views.multi_crop(dark_and_bright, 16, 8, 3, (0.4, 1.0), (0.05, 0.4))
    assert large.shape == (4, 3, 16, 16)
    assert small.shape == (6, 3, 8, 8)
    assert large.dtype == torch.float32
    assert large[0].mean() < large[1].mean()  # crop 0: dark, bright
    for crop in small.unflatten(0, (3, 2)):
        assert crop[0].mean() < crop[1].mean()


def test_simclr_is_stored_view_by_view():
    torch.manual_seed(0)
    dark_and_bright = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 255)]).to(torch.uint8)
    found = views.simclr(dark_and_bright, 16)
    assert found.shape == (4, 3, 16, 16)
    for view in found.unflatten(0, (2, 2)):
        assert view[0].mean() < view[1].mean()


def test_no_local_crops_is_an_empty_batch():
    large, small = views.multi_crop(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 16, 8, 0, (0.4, 1), (0.05, 0.4))
    assert large.shape == (4, 3, 16, 16)
    assert small.shape == (0, 3, 8, 8)


def test_the_anchor_sees_the_same_crops_larger_and_as_they_are(stored):
    """Without distortion, brought down to the student's size, they are the student's crops."""
    options = {"size": 16, "local_size": 8, "local_crops": 1, "global_scale": (0.4, 1.0), "local_scale": (0.05, 0.4)}
    smooth = torch.nn.functional.interpolate(stored[:, :, :6, :6].float(), 64, mode="bicubic").clamp(0, 255).byte()
    with patch.object(views, "distort", lambda crops, *args: augment.normalize(crops)):
        large, small, clean = views.anchored_crop(smooth, 32, **options)
    assert [x.shape for x in (large, small, clean)] == [(8, 3, 16, 16), (4, 3, 8, 8), (8, 3, 32, 32)]
    brought_down = torch.nn.functional.avg_pool2d(clean, 2)
    torch.testing.assert_close(brought_down, large, atol=0.12, rtol=0)
    assert (brought_down - large.flip(-1)).abs().mean() > 5 * (brought_down - large).abs().mean()


def in_one(found):
    """All pixels of a recipe's views, whether it gives one tensor or two."""
    return torch.cat([x.flatten() for x in found]) if isinstance(found, tuple) else found.flatten()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_seed_brings_the_views_back_and_leaves_the_images(stored, recipe):
    kept, drawn = stored.clone(), []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        random.seed(seed)
        drawn.append(in_one(recipe(stored)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(stored, kept)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_same_image_twice_gets_two_draws(stored, recipe):
    found = recipe(stored[:1].expand(6, -1, -1, -1))
    for group in found if isinstance(found, tuple) else [found]:
        assert len(group.flatten(1).unique(dim=0)) == len(group)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_views_are_drawn_on_the_gpu_the_images_are_on(recipe):
    """On a fake one, where mixing devices or reading a number back fails."""
    there = patch("torch.cuda.amp.common.amp_definitely_not_available", bool)  # else autocast warns
    with FakeTensorMode(), there:
        found = recipe(torch.zeros(4, 3, 40, 48, dtype=torch.uint8, device="cuda"))
        assert {x.device.type for x in (found if isinstance(found, tuple) else [found])} == {"cuda"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_views_are_as_exact_under_autocast(stored, recipe):
    """bf16 keeps 8 bits of a pixel; the crop, the blur and their callers must not be multiplied in it."""
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            found.append(in_one(recipe(stored)))
    assert found[1].dtype == torch.float32
    assert torch.equal(*found)


def test_the_figure_has_a_row_for_each_image_and_a_column_for_each_view(stored):
    figure = views_figure(stored, *DINO(stored), views.simclr(stored, 24), title="looks")
    assert len(figure.axes) == 4 * (1 + 2 + 2 + 2)
    assert [axis.get_title() for axis in figure.axes[:7]] == ["image", *["16 px"] * 2, *["8 px"] * 2, *["24 px"] * 2]
    assert figure.get_suptitle() == "looks"


def test_the_figure_shows_the_view_as_it_was_before_it_was_normalised(stored):
    figure = views_figure(stored, augment.normalize(stored))
    for image, view in zip(figure.axes[::2], figure.axes[1::2]):
        shown, as_stored = view.images[0].get_array(), image.images[0].get_array()
        assert abs(shown - as_stored / 255).max() < 1e-5


def test_the_figure_takes_no_local_crops_but_no_half_a_view(stored):
    assert len(views_figure(stored, *DINO(stored, local_crops=0)).axes) == 4 * 3
    with pytest.raises(InputError, match="7 views of 4 images"):
        views_figure(stored, torch.zeros(7, 3, 8, 8))


def test_the_benchmark_runs(stored):
    fast, slow = benchmark.compare(stored, slices=2)
    assert fast.shape == slow.shape == (2,)
    assert (fast > 0).all()
    assert (slow > 0).all()


def test_the_benchmark_compares_the_same_views(stored):
    """The two pipelines agree in the mean and deviation of what they make, over many draws."""
    torch.manual_seed(0)
    pictures = [benchmark.to_pil_image(image) for image in stored]
    one = benchmark.recipe(32, (0.4, 1.0), 1.0, 0.0)
    theirs = torch.stack([one(picture) for picture in pictures for _ in range(60)])
    ours = views.multi_crop(stored.repeat(60, 1, 1, 1), 32, 16, 0, (0.4, 1.0), (0.05, 0.4))[0][:240]
    assert ours.mean() == pytest.approx(theirs.mean().item(), abs=0.08)
    assert ours.std() == pytest.approx(theirs.std().item(), rel=0.08)
