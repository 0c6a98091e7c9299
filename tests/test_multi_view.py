"""The recipes of views equal the papers', in the probability and strength of each operation."""

import random
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.v2.functional import to_pil_image

from minissl.data.transforms import functional, multi_view
from minissl.errors import InputError
from minissl.visualization import views_figure

CROPS = {
    "crop_size": 16,
    "local_crop_size": 8,
    "num_local_crops": 2,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_scale": (0.05, 0.4),
}
RECIPES = {
    "dino": partial(multi_view.multi_crop, **CROPS),
    "simclr": partial(multi_view.simclr_views, size=16),
    "simclr_cifar": partial(multi_view.simclr_cifar_views, size=16),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture
def images():
    torch.manual_seed(0)
    random.seed(0)
    return torch.randint(0, 256, (4, 3, 40, 48), dtype=torch.uint8)


@pytest.fixture
def calls(monkeypatch):
    """Record every operation of a recipe as (name, arguments after the images), in order."""
    recorded = []

    def record(name):
        original = getattr(multi_view, name)

        def operation(images, *args, **kwargs):
            recorded.append((name, args, kwargs))
            return original(images, *args, **kwargs)

        monkeypatch.setattr(multi_view, name, operation)

    for name in (
        *("random_resized_crops", "color_jitter", "random_grayscale"),
        *("random_gaussian_blur", "random_solarize", "normalize"),
    ):
        record(name)
    return recorded


def expected_calls(size, scale, jitter, blur_prob, solarize_prob, max_sigma):
    """Return the calls for one crop, in the papers' order."""
    return [
        ("random_resized_crops", (scale, size), {}),
        ("color_jitter", jitter, {}),
        ("random_grayscale", (), {}),
        ("random_gaussian_blur", (blur_prob,), {"max_sigma": max_sigma}),
        ("random_solarize", (solarize_prob,), {}),
        ("normalize", (), {}),
    ]


@pytest.mark.parametrize(
    ("blur_probs", "options"), [((1.0, 0.1, 0.5), {}), ((0.0, 0.9, 0.5), {"blur_probs": (0.0, 0.9, 0.5)})]
)
def test_multi_crop_equals_dino_and_with_blur_probs_dinov2s_code(images, calls, blur_probs, options):
    jitter, global_scale, local_scale = (0.4, 0.4, 0.2, 0.1), (0.4, 1.0), (0.05, 0.4)
    multi_view.multi_crop(images, 224, 96, 8, global_scale, local_scale, **options)
    first = expected_calls(224, global_scale, jitter, blur_probs[0], 0.0, 2.0)
    second = expected_calls(224, global_scale, jitter, blur_probs[1], 0.2, 2.0)
    assert calls == first + second + 8 * expected_calls(96, local_scale, jitter, blur_probs[2], 0.0, 2.0)


def test_simclr_views_equal_the_paper(images, calls):
    multi_view.simclr_views(images, 224)
    assert calls == 2 * expected_calls(224, (0.08, 1.0), (0.8, 0.8, 0.8, 0.2), 0.5, 0.0, 2.0)


def test_simclr_cifar_views_have_half_the_jitter_and_no_blur(images, calls):
    multi_view.simclr_cifar_views(images)
    assert calls == 2 * expected_calls(32, (0.08, 1.0), (0.4, 0.4, 0.4, 0.1), 0.0, 0.0, 2.0 * 32 / 224)


def test_views_are_gray_with_probability_0_2_and_flipped_with_0_5():
    torch.manual_seed(0)
    random.seed(0)
    ramp = torch.linspace(40, 200, 32).to(torch.uint8).expand(3000, 3, 32, 32).clone()  # brighter to the right
    ramp[:, 0] += 40
    views = functional.denormalize(multi_view.simclr_cifar_views(ramp, 8))
    gray = ((views[:, 0] - views[:, 2]).abs() < 1e-3).flatten(1).all(1).float().mean()
    flipped = (views[..., 0].mean((1, 2)) > views[..., -1].mean((1, 2))).float().mean()
    assert gray.item() == pytest.approx(0.2, abs=0.02)
    assert flipped.item() == pytest.approx(0.5, abs=0.02)


def dark_and_bright():
    return torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 255)]).to(torch.uint8)


def test_multi_crop_is_stored_crop_by_crop():
    torch.manual_seed(0)
    global_crops, local_crops = multi_view.multi_crop(dark_and_bright(), 16, 8, 3, (0.4, 1.0), (0.05, 0.4))
    assert global_crops.shape == (4, 3, 16, 16)
    assert local_crops.shape == (6, 3, 8, 8)
    assert global_crops.dtype == torch.float32
    for dark, bright in (global_crops.unflatten(0, (2, 2))[0], *local_crops.unflatten(0, (3, 2))):
        assert dark.mean() < bright.mean()


def test_simclr_views_are_stored_view_by_view():
    torch.manual_seed(0)
    views = multi_view.simclr_views(dark_and_bright(), 16)
    assert views.shape == (4, 3, 16, 16)
    for dark, bright in views.unflatten(0, (2, 2)):
        assert dark.mean() < bright.mean()


def test_no_local_crops_is_an_empty_batch():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    global_crops, local_crops = multi_view.multi_crop(images, 16, 8, 0, (0.4, 1), (0.05, 0.4))
    assert global_crops.shape == (4, 3, 16, 16)
    assert local_crops.shape == (0, 3, 8, 8)


def test_gram_crops_are_the_global_crops_undistorted_at_another_size(images):
    """Without distortion, and downsampled to the student's size, they equal the student's crops."""
    smooth = torch.nn.functional.interpolate(images[:, :, :6, :6].float(), 64, mode="bicubic").clamp(0, 255).byte()
    with patch.object(multi_view, "augment_crops", lambda crops, *args: functional.normalize(crops)):
        crops = multi_view.multi_crop_with_gram_crops(smooth, 32, **CROPS | {"num_local_crops": 1})
    global_crops, local_crops, gram_crops = crops
    assert [x.shape for x in (global_crops, local_crops, gram_crops)] == [(8, 3, 16, 16), (4, 3, 8, 8), (8, 3, 32, 32)]
    downsampled = torch.nn.functional.avg_pool2d(gram_crops, 2)
    torch.testing.assert_close(downsampled, global_crops, atol=0.12, rtol=0)
    flipped_difference = (downsampled - global_crops.flip(-1)).abs().mean()
    assert flipped_difference > 5 * (downsampled - global_crops).abs().mean()


def all_pixels(views):
    """Return all pixels of one or two tensors of views."""
    return torch.cat([x.flatten() for x in views]) if isinstance(views, tuple) else views.flatten()


def sample(recipe, images, seed):
    torch.manual_seed(seed)
    random.seed(seed)
    return all_pixels(recipe(images))


@every_recipe
def test_views_are_determined_by_the_seed_and_images_stay_unchanged(images, recipe):
    original = images.clone()
    first, second, third = (sample(recipe, images, seed) for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(images, original)


@every_recipe
def test_a_pil_image_is_a_batch_of_one(images, recipe):
    assert torch.equal(sample(recipe, to_pil_image(images[0]), 7), sample(recipe, images[:1], 7))


@every_recipe
def test_equal_images_get_different_views(images, recipe):
    views = recipe(images[:1].expand(6, -1, -1, -1))
    for group in views if isinstance(views, tuple) else [views]:
        assert len(group.flatten(1).unique(dim=0)) == len(group)


@every_recipe
def test_views_stay_on_the_gpu(recipe):
    """On a fake GPU, an operation that mixes devices or reads a number back fails."""
    enable_autocast = patch("torch.cuda.amp.common.amp_definitely_not_available", bool)
    with FakeTensorMode(), enable_autocast:
        views = recipe(torch.zeros(4, 3, 40, 48, dtype=torch.uint8, device="cuda"))
        assert {x.device.type for x in (views if isinstance(views, tuple) else [views])} == {"cuda"}


@every_recipe
def test_views_are_the_same_under_autocast(images, recipe):
    """bf16 keeps 8 bits of a pixel; neither the crop nor the blur may be computed in it."""
    expected = sample(recipe, images, 0)
    with torch.autocast("cpu", torch.bfloat16):
        views = sample(recipe, images, 0)
    assert views.dtype == torch.float32
    assert torch.equal(views, expected)


def test_views_figure_has_a_row_per_image_and_a_column_per_view(images):
    figure = views_figure(images, *RECIPES["dino"](images), multi_view.simclr_views(images, 24), title="views")
    assert len(figure.axes) == 4 * (1 + 2 + 2 + 2)
    titles = [axis.get_title() for axis in figure.axes[:7]]
    assert all(size in title for size, title in zip(("16", "16", "8", "8", "24", "24"), titles[1:]))
    assert figure.get_suptitle() == "views"


def test_views_figure_shows_views_denormalized(images):
    figure = views_figure(images, functional.normalize(images))
    for image, view in zip(figure.axes[::2], figure.axes[1::2]):
        shown, expected = view.images[0].get_array(), image.images[0].get_array() / 255
        assert abs(shown - expected).max() < 1e-5


def test_views_figure_accepts_no_local_crops_and_rejects_an_incomplete_view(images):
    views = RECIPES["dino"](images, num_local_crops=0)
    assert len(views_figure(images, *views).axes) == 4 * 3
    with pytest.raises(InputError, match="7"):
        views_figure(images, torch.zeros(7, 3, 8, 8))


def test_views_benchmark_runs_and_compares_equal_distributions(images):
    """The two pipelines agree in the mean and standard deviation of their views."""
    from tests.benchmarks import views as benchmark

    rates = benchmark.compare(images, slices=2)
    assert list(rates) == ["minissl", "kornia", "torchvision"]
    assert all(rate.shape == (2,) and (rate > 0).all() for rate in rates.values())
    torch.manual_seed(0)
    random.seed(0)
    reference = benchmark.recipe(32, (0.4, 1.0), 1.0, 0.0)
    expected = torch.stack([reference(to_pil_image(image)) for image in images for _ in range(60)])
    views = multi_view.multi_crop(images.repeat(60, 1, 1, 1), 32, 16, 0, (0.4, 1.0), (0.05, 0.4))[0][:240]
    assert views.mean() == pytest.approx(expected.mean().item(), abs=0.08)
    assert views.std() == pytest.approx(expected.std().item(), rel=0.08)
