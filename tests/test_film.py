"""A film holds what was seen, when it was seen, and plays back as it was recorded."""

import pytest
import torch

from minissl import film, runs
from minissl.__main__ import parse_run
from minissl.data import Images
from minissl.errors import InputError
from minissl.evaluate import fine_attention
from tests.benchmarks import emergence
from tests.golden import tiny_vit


@pytest.mark.parametrize(("steps", "n", "expected"), [
    (64, 7, [1, 2, 4, 8, 16, 32, 64]),
    (1000, 4, [1, 10, 100, 1000]),
    (3, 9, [1, 2, 3]),
    (1, 5, [1]),
])  # fmt: skip
def test_moments_lie_closer_at_the_start(steps, n, expected):
    assert film.moments(steps, n) == expected


def test_moments_begin_with_the_first_step_and_end_with_the_last():
    for steps in (2, 17, 1560):
        found = film.moments(steps, 14)
        assert (found[0], found[-1]) == (1, steps)
        assert found == sorted(set(found))
        assert len(found) <= 14
    with pytest.raises(InputError, match="1 moments"):
        film.moments(100, 1)


def test_a_snapshot_is_the_fine_attention_from_nothing_to_its_maximum():
    torch.manual_seed(0)
    encoder, images = tiny_vit(stem="conv", drop_path=0.5).train(), torch.randint(0, 256, (3, 3, 16, 16)).byte()
    state = {name: t.clone() for name, t in encoder.state_dict().items()}
    found = film.snapshot(encoder, images, 16)
    assert encoder.training
    assert all(torch.equal(t, state[name]) for name, t in encoder.state_dict().items())
    assert found.dtype == torch.uint8
    assert found.shape == (3, 4, 8, 8)
    assert (found.flatten(2).max(-1).values == 255).all()
    maps = fine_attention(encoder.eval(), images, 16)
    maps = maps / maps.amax((-2, -1), keepdim=True)
    whole = found.repeat_interleave(2, -2).repeat_interleave(2, -1)  # nothing is lost but the rounding
    assert (whole / 255 - maps).abs().max() <= 0.5 / 255 + 1e-5


def test_a_camera_looks_at_its_moments_only():
    seen = []
    camera = film.Camera(lambda: seen.append(camera.step) or torch.tensor(len(seen)), [1, 2, 5])
    assert [camera() for _ in range(6)] == [{}] * 6
    assert seen == [1, 2, 5]
    assert [int(one) for one in camera.maps] == [1, 2, 3]


def test_a_film_comes_back_as_it_was(tmp_path):
    maps, path = torch.randint(0, 256, (2, 3, 4, 8, 8)).byte(), tmp_path / "film.safetensors"
    film.save(film.Film(maps, [1, 64], {"head": 2}), path)
    found = film.load(path)
    assert torch.equal(found.maps, maps)
    assert (found.steps, found.about) == ([1, 64], {"head": 2})


def test_what_holds_no_film_is_said(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        film.load(tmp_path / "nowhere")
    (tmp_path / "cut").write_bytes(b"cut")
    with pytest.raises(InputError, match="not a whole"):
        film.load(tmp_path / "cut")
    film.checkpoint.save_tensors(tmp_path / "other", {"weights": torch.zeros(2)}, {})
    with pytest.raises(InputError, match="holds no film"):
        film.load(tmp_path / "other")


def some_scenes(self, split):
    generator = torch.Generator().manual_seed(len(split))
    masks = torch.zeros(24, 16, 16, dtype=torch.uint8)
    masks[:, 4:12, 4:12] = 1
    return Images(torch.randint(0, 256, (24, 3, 16, 16), generator=generator).byte(), masks=masks)


@pytest.mark.parametrize("limit", [emergence.LIMIT, 0])
def test_a_training_is_filmed(monkeypatch, limit):
    monkeypatch.setattr(runs.Run, "images", some_scenes)
    monkeypatch.setattr(emergence, "OTHERS", 8)
    monkeypatch.setattr(emergence, "LIMIT", limit)
    words = "dino --image_size 16 --size 16 --local_size 8 --encoder.patch_size 8 --prototypes 32 --hidden 16"
    words = [*words.split(), *"--bottleneck 8 --batch_size 8 --minutes 0 --epochs 2 --encoder.depth 2".split()]
    run, _ = parse_run([*words, "--device", "cpu", "--preset", "cpu"])
    found, layers = emergence.record(run, words, 3)
    assert layers.maps.shape[0] == len(layers.steps) == len(layers.about["shares"]) == 2
    assert found.steps == [1, 2, 6]
    assert found.maps.shape == (3, 16, 1 if limit == 0 else 4, 8, 8)
    assert found.about["head"] < found.maps.shape[2]
    assert [len(row) for row in found.about["shares"]] == [4] * 3
    assert found.about["command"].startswith("dino --image_size 16")
