"""Clips are the same everywhere, and who is who in them stays so."""

import hashlib

import pytest
import torch

from minissl.data.video import Clips
from minissl.errors import InputError

GOLDEN = "a8ae8e0da585f440"  # of the first clip of "train", 32 pixels, 8 frames


@pytest.fixture(scope="module")
def clips():
    return [Clips("train", size=32, frames=24, n=40)[i] for i in range(40)]


def test_a_clip_is_the_one_that_was_measured():
    clip = Clips("train", size=32, frames=8)[0]
    assert clip.frames.shape == (8, 3, 32, 32)
    assert clip.masks.shape == (8, 32, 32)
    whole = clip.frames.numpy().tobytes() + clip.masks.numpy().tobytes()
    assert hashlib.sha256(whole).hexdigest()[:16] == GOLDEN


def test_there_are_one_to_three_objects(clips):
    most = torch.tensor([int(clip.masks.max()) for clip in clips])
    assert set(most.tolist()) == {1, 2, 3}


def test_things_move_a_little_from_frame_to_frame(clips):
    for clip in clips:
        steps = (clip.frames[1:].float() - clip.frames[:-1].float()).abs().mean((1, 2, 3))
        assert 0 < steps.max() < 40  # of 255: no cut


def test_an_object_keeps_its_number(clips):
    """Its colour in one frame is nearer to its colour in the next than to the other objects'."""
    near = far = 0
    for clip in (c for c in clips if c.masks.max() > 1):
        for before, after, m, n in zip(clip.frames, clip.frames[1:], clip.masks, clip.masks[1:]):
            for i in range(1, 4):
                for j in range(1, 4):
                    if (m == i).sum() > 20 and (n == j).sum() > 20:
                        gap = (before[:, m == i].float().mean(1) - after[:, n == j].float().mean(1)).abs().mean()
                        near, far = (near + gap, far) if i == j else (near, far + gap)
    assert near < 0.5 * far


def test_objects_are_hidden_and_come_back(clips):
    """In some clip an object is half as large as in another frame because something is before it, or it leaves."""
    areas = [[(clip.masks == i).sum((1, 2)) for i in range(1, 4) if (clip.masks == i).any()] for clip in clips]
    assert any((a.min() < 0.5 * a.max()) for per_clip in areas for a in per_clip)


def test_the_same_clip_comes_again_and_another_seed_is_another():
    first, again, other = (Clips("test", size=16, frames=3, seed=s)[2] for s in (0, 0, 1))
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)


def test_what_is_not_there_is_said():
    with pytest.raises(InputError, match="train, val, test"):
        Clips("all")
    with pytest.raises(InputError, match="one frame"):
        Clips("train", frames=0)
    with pytest.raises(IndexError, match="3 clips"):
        Clips("train", n=3)[3]
