"""Tests of feature extraction, dense patch features and RankMe."""

import pytest
import torch

from minissl.data.images import Images
from minissl.data.transforms.functional import normalize
from minissl.errors import InputError
from minissl.evaluation import dense_patches, extract_features, frame_patch_features, rank_me
from tests.golden import tiny_vit
from tests.toy_encoders import MeanColorEncoder


def random_images(n, side=16):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_extract_features_uses_evaluation_mode_and_restores_the_mode():
    torch.manual_seed(0)
    encoder, images = tiny_vit(drop_path=0.5).train(), random_images(7)
    features = extract_features(encoder, images, batch_size=3)
    assert encoder.training
    torch.testing.assert_close(features, encoder.eval()(normalize(images)).cls.detach())


def test_pooling_both_appends_the_mean_patch_token():
    encoder, images = tiny_vit().eval(), random_images(3)
    tokens = encoder(normalize(images))
    features = extract_features(encoder, images, pooling="both")
    assert torch.equal(features[:, :32], tokens.cls)
    mean = sum(tokens.patches[:, y, x] for y in range(4) for x in range(4)) / 16
    torch.testing.assert_close(features[:, 32:], mean)


@pytest.mark.parametrize("image_size", [None, 12])
@pytest.mark.parametrize("pooling", ["cls", "both"])
def test_float_images_have_the_features_of_uint8_images(image_size, pooling):
    encoder, images = tiny_vit(), random_images(5)
    expected = extract_features(encoder, images, image_size, pooling=pooling)
    features = extract_features(encoder, images.float() / 255, image_size, pooling=pooling)
    assert torch.equal(features, expected)
    assert features.std() > 0


def test_extract_features_resizes_images():
    assert extract_features(tiny_vit(), random_images(2, 40), image_size=16).shape == (2, 32)


def test_features_of_a_data_set_are_those_of_its_images():
    encoder, images = tiny_vit(), random_images(7)
    features = extract_features(encoder, Images(images), batch_size=3)
    assert torch.equal(features, extract_features(encoder, images, batch_size=3))


def test_a_data_set_is_read_batch_by_batch():
    sizes = []

    class Recorded(Images):
        def get_batch(self, indices):
            sizes.append(len(indices))
            return super().get_batch(indices)

    extract_features(tiny_vit(), Recorded(random_images(7)), batch_size=3)
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("arguments", [{"pooling": "mean"}, {"images": torch.zeros(0, 3, 16, 16)}])
def test_extract_features_rejects_bad_input(arguments):
    with pytest.raises(InputError):
        extract_features(tiny_vit(), **{"images": random_images(1)} | arguments)


def test_rank_me_is_the_number_of_directions():
    torch.manual_seed(0)
    assert rank_me(torch.randn(64, 1) @ torch.randn(1, 16)) == pytest.approx(1, abs=0.01)
    orthogonal = torch.linalg.qr(torch.randn(64, 16)).Q
    assert rank_me(orthogonal) == pytest.approx(16, rel=1e-3)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_dense_patches_describe_the_pixels_around_them(stride):
    images = random_images(2, 12)
    patches = dense_patches(MeanColorEncoder(), images, 12, stride)
    side = 12 // stride
    assert patches.shape == (2, side, side, 4)
    pixels = normalize(images)
    for row in range(side):
        for column in range(side):
            top, left = (i * stride + stride // 2 - 2 for i in (row, column))  # of a patch around the center
            if min(top, left) >= 0 and max(top, left) <= 8:
                expected = pixels[:, :, top : top + 4, left : left + 4].mean((-2, -1))
                torch.testing.assert_close(patches[:, row, column, :3], expected)
    if stride == 4:
        torch.testing.assert_close(patches, MeanColorEncoder()(pixels).patches)


def test_a_stride_of_0_gives_16_patches_along_each_axis():
    assert dense_patches(MeanColorEncoder(), random_images(1, 32), 32, 0).shape == (1, 16, 16, 4)


def test_a_stride_that_does_not_divide_the_patch_is_rejected():
    with pytest.raises(InputError, match="stride of 3"):
        dense_patches(MeanColorEncoder(), random_images(1, 12), 12, 3)


@pytest.mark.parametrize("size", [(16, 16), (8, 12)])
def test_frames_are_encoded_one_by_one(size):
    frames, encoder = random_images(3), MeanColorEncoder()
    patches = list(frame_patch_features(encoder, frames, size))
    assert [x.shape for x in patches] == [(size[0] // 4, size[1] // 4, 4)] * 3
    if size == (16, 16):
        assert torch.equal(torch.stack(patches), encoder(normalize(frames)).patches)
    else:
        assert torch.equal(
            torch.stack(list(frame_patch_features(encoder, frames.float() / 255, size))), torch.stack(patches)
        )
