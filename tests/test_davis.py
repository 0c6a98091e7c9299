"""Clips in the layout of DAVIS are frames with a mask each; what is missing or damaged is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from minissl.data.davis import VOID, list_clips, load_clip
from minissl.errors import InputError
from tests.folders import write_image

T, H, W = 3, 20, 32


def mask_of(t):
    """Return a mask in which object 1 moves to the right, object 2 stays, and a line is void."""
    mask = np.zeros((H, W), dtype=np.uint8)
    mask[4:12, 2 + 4 * t : 10 + 4 * t] = 1
    mask[14:18, 20:28] = 2
    mask[13, 20:28] = VOID
    return mask


def save_mask(path, mask):
    """Save a mask as DAVIS does: numbers with a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    # With a shorter palette Pillow would drop the value 255.
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 3 * 253)
    image.save(path)


def clip(root, name, level="480p"):
    for t in range(T):
        write_image(root / "JPEGImages" / level / name / f"{t:05}.jpg", (H, W), seed=t)
        save_mask(root / "Annotations" / level / name / f"{t:05}.png", mask_of(t))


@pytest.fixture
def root(tmp_path):
    for name in ("swan", "bear"):
        clip(tmp_path, name)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("swan\n")
    return tmp_path


def error_message(call, *arguments):
    """Return the one line with which a call is refused."""
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_clips_are_listed(root):
    assert list_clips(root) == ["bear", "swan"]
    assert list_clips(root, "val") == ["swan"]
    assert "train.txt" in error_message(list_clips, root, "train")


def test_a_split_list_may_be_in_another_folder_and_list_frames(root):
    lists = root / "ImageSets"
    (lists / "480p").mkdir()
    lines = [f"/JPEGImages/480p/bear/{t:05}.jpg /Annotations/480p/bear/{t:05}.png" for t in range(T)]
    for split in ("train", "val"):
        (lists / "480p" / f"{split}.txt").write_text("\n".join(lines))
    assert list_clips(root, "train") == ["bear"]
    assert list_clips(root, "val") == ["swan"]  # 2017 comes first


def test_a_list_without_clips_is_named(root):
    file = root / "ImageSets" / "2017" / "val.txt"
    file.write_text("\n")
    assert f"{file} holds no clips" in error_message(list_clips, root, "val")
    file.write_bytes(b"\xff\xfe")
    assert f"{file} is not UTF-8" in error_message(list_clips, root, "val")
    (root / "alone" / "JPEGImages").mkdir(parents=True)
    assert "holds no clips" in error_message(list_clips, root / "alone")


@pytest.mark.parametrize("level", ["480p", "."])
def test_frames_and_masks_are_what_the_files_hold(tmp_path, level):
    clip(tmp_path, "swan", level)
    frames, masks = load_clip(tmp_path, "swan")
    assert list_clips(tmp_path) == ["swan"]
    assert frames.shape == (T, 3, H, W)
    assert frames.dtype == masks.dtype == torch.uint8
    assert np.array_equal(masks.numpy(), np.stack([mask_of(t) for t in range(T)]))
    file = tmp_path / "JPEGImages" / level / "swan" / "00001.jpg"
    assert np.array_equal(frames[1].permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))


@pytest.mark.parametrize(("size", "shape"), [(10, (10, 16)), (40, (40, 64)), (7, (7, 11))])
def test_the_short_side_is_resized_without_new_mask_values(root, size, shape):
    frames, masks = load_clip(root, "swan", size)
    assert frames.shape == (T, 3, *shape)
    assert masks.shape == (T, *shape)
    assert set(masks.unique().tolist()) <= {0, 1, 2, VOID}
    if size == 40:
        assert torch.equal(masks[:, ::2, ::2], load_clip(root, "swan").masks)


def test_a_missing_mask_is_named(root):
    mask = root / "Annotations" / "480p" / "swan" / "00001.png"
    mask.unlink()
    assert str(mask) in error_message(load_clip, root, "swan")


def test_a_mask_of_another_size_is_named(root):
    mask = root / "Annotations" / "480p" / "swan" / "00002.png"
    save_mask(mask, mask_of(2)[:, :-1])
    message = error_message(load_clip, root, "swan")
    assert str(mask) in message
    assert "31 x 20" in message
    assert "32 x 20" in message


def test_a_mask_of_colors_is_named(root):
    mask = root / "Annotations" / "480p" / "swan" / "00000.png"
    write_image(mask, (H, W))
    assert f"{mask} holds colors" in error_message(load_clip, root, "swan")


def test_a_damaged_frame_and_one_of_another_size_are_named(root):
    frame = root / "JPEGImages" / "480p" / "swan" / "00001.jpg"
    write_image(frame, (H + 1, W))
    save_mask(root / "Annotations" / "480p" / "swan" / "00001.png", np.zeros((H + 1, W), dtype=np.uint8))
    assert f"{frame} differs in size" in error_message(load_clip, root, "swan")
    frame.write_bytes(frame.read_bytes()[:100])
    assert f"{frame} cannot be read" in error_message(load_clip, root, "swan")


def test_a_damaged_mask_is_named(root):
    mask = root / "Annotations" / "480p" / "swan" / "00002.png"
    mask.write_bytes(mask.read_bytes()[:60])
    assert f"{mask} cannot be read" in error_message(load_clip, root, "swan")


def test_missing_folders_are_named(root, tmp_path):
    assert str(tmp_path / "nowhere" / "JPEGImages") in error_message(list_clips, tmp_path / "nowhere")
    assert str(root / "JPEGImages" / "480p" / "cow") in error_message(load_clip, root, "cow")
    (root / "JPEGImages" / "480p" / "cow").mkdir()
    assert str(root / "Annotations" / "480p" / "cow") in error_message(load_clip, root, "cow")
    (root / "Annotations" / "480p" / "cow").mkdir()
    assert "holds no frames" in error_message(load_clip, root, "cow")
