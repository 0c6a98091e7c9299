"""Clips are the same on every machine, and every object keeps its number."""

import hashlib

import pytest
import torch
from torch.utils.data import DataLoader

from minissl.data.synthetic.clips import Clip, Clips
from minissl.errors import InputError

GOLDEN = "a8ae8e0da585f440"  # of the first clip of "train", 32 pixels, 8 frames


@pytest.fixture(scope="module")
def clips():
    return [Clips("train", size=32, frames=24, n=40)[i] for i in range(40)]


def test_a_clip_equals_the_published_one():
    clip = Clips("train", size=32, frames=8)[0]
    assert clip.frames.shape == (8, 3, 32, 32)
    assert clip.masks.shape == (8, 32, 32)
    content = clip.frames.numpy().tobytes() + clip.masks.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN


def test_a_data_loader_batches_clips():
    batch = next(iter(DataLoader(Clips("train", size=16, frames=3, n=4), batch_size=2)))
    assert isinstance(batch, Clip)
    assert batch.frames.shape == (2, 3, 3, 16, 16)
    assert batch.masks.shape == (2, 3, 16, 16)


@pytest.mark.slow
def test_there_are_one_to_three_objects(clips):
    counts = torch.tensor([int(clip.masks.max()) for clip in clips])
    assert set(counts.tolist()) == {1, 2, 3}


def test_frames_change_a_little_at_a_time(clips):
    for clip in clips:
        steps = (clip.frames[1:].float() - clip.frames[:-1].float()).abs().mean((1, 2, 3))
        assert 0 < steps.max() < 40  # of 255: no cut


def test_an_object_keeps_its_number(clips):
    """Its color in one frame is nearer to its color in the next than to those of the other objects."""
    same = different = 0
    for clip in (c for c in clips if c.masks.max() > 1):
        for before, after, m, n in zip(clip.frames, clip.frames[1:], clip.masks, clip.masks[1:]):
            for i in range(1, 4):
                for j in range(1, 4):
                    if (m == i).sum() > 20 and (n == j).sum() > 20:
                        gap = (before[:, m == i].float().mean(1) - after[:, n == j].float().mean(1)).abs().mean()
                        same, different = (same + gap, different) if i == j else (same, different + gap)
    assert same < 0.5 * different


def test_some_objects_are_occluded_or_leave(clips):
    areas = [[(clip.masks == i).sum((1, 2)) for i in range(1, 4) if (clip.masks == i).any()] for clip in clips]
    assert any((a.min() < 0.5 * a.max()) for per_clip in areas for a in per_clip)


def test_a_clip_depends_on_its_index_and_seed_only():
    first, again, other = (Clips("test", size=16, frames=3, seed=s)[2] for s in (0, 0, 1))
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="train, val, test"):
        Clips("all")
    with pytest.raises(InputError, match="0 frames"):
        Clips("train", frames=0)
    with pytest.raises(IndexError, match="3 clips"):
        Clips("train", n=3)[3]
