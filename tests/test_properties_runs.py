"""What has to be true of teachers, schedules, views, checkpoints and whole runs: bounds, and the same again.

Hypothesis draws the cases, the same ones every time.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minissl.training import checkpoint, trainer
from minissl.data.transforms import multi_view
from minissl.data.transforms.functional import IMAGENET_MEAN, IMAGENET_STD
from minissl.data import Images
from minissl.errors import InputError
from minissl.methods.dino import DINO
from minissl.training.sampler import seed_step
from minissl.models.ema import EMATeacher
from minissl.training.schedules import cosine, linear, warmup_cosine
from minissl.training.config import TrainConfig
from tests.folders import class_folders
from tests.golden import tiny_vit
from tests.test_faults import contents
from tests.test_faults_runs import go
from tests.test_properties import seeds, stable, unit, value


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def numbers(network):
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


@stable
@given(seeds, st.lists(unit, min_size=1, max_size=5))
def test_a_teacher_is_the_weighted_mean_of_all_students_so_far(seed, momenta):
    teacher = EMATeacher(network(seed))
    expected = numbers(teacher.network)
    for i, momentum in enumerate(momenta):
        student, before = network(seed + i + 1), numbers(teacher.network)
        teacher.follow(student, momentum)
        after, new = numbers(teacher.network), numbers(student)
        assert (after >= torch.minimum(before, new) - 1e-12).all()
        assert (after <= torch.maximum(before, new) + 1e-12).all()
        expected = momentum * expected + (1 - momentum) * new
    torch.testing.assert_close(numbers(teacher.network), expected)
    assert torch.equal(numbers(student), new)


@stable
@given(seeds, unit, st.integers(1, 20))
def test_a_student_that_stays_is_come_closer_to_by_a_power_of_the_momentum(seed, momentum, steps):
    teacher, student = EMATeacher(network(seed)), network(seed + 1)
    start, end = numbers(teacher.network), numbers(student)
    for _ in range(steps):
        teacher.follow(student, momentum)
    torch.testing.assert_close(numbers(teacher.network) - end, momentum**steps * (start - end))
    still = EMATeacher(student)
    still.follow(copy.deepcopy(student), momentum)
    assert torch.equal(numbers(still.network), end)


def rises_or_falls(found, up):
    return all((b - a) * (1 if up else -1) >= -1e-9 for a, b in itertools.pairwise(found))


@stable
@given(value, value, st.floats(0.01, 1))
def test_cosine_and_line_go_one_way_from_end_to_end_and_stay_there(start, end, until):
    times = [i / 50 for i in range(51)]
    for schedule in (lambda p: cosine(start, end, p), lambda p: linear(start, end, p, until)):
        found = [schedule(p) for p in times]
        assert found[0] == pytest.approx(start)
        assert found[-1] == pytest.approx(end)
        assert rises_or_falls(found, end > start)
        assert schedule(-0.5) == pytest.approx(start)
        assert schedule(1.5) == pytest.approx(end)
    assert cosine(start, end, 0.5) == pytest.approx((start + end) / 2)
    assert cosine(start, end, 0.25) + cosine(start, end, 0.75) == pytest.approx(start + end)


@stable
@given(value, value, value, st.floats(0.01, 0.99))
def test_a_warm_up_is_a_line_to_the_peak_without_a_jump_and_then_a_cosine(start, peak, end, warmup):
    def rate(progress):
        return warmup_cosine(start, peak, end, progress, warmup)

    assert rate(0.0) == pytest.approx(start)
    assert rate(warmup) == pytest.approx(peak)
    assert rate(1.0) == pytest.approx(end)
    assert rate(warmup - 1e-9) == pytest.approx(rate(warmup + 1e-9), abs=1e-4)
    rising, falling = ([rate(p) for p in torch.linspace(*ends, 40).tolist()] for ends in ((0, warmup), (warmup, 1)))
    assert rises_or_falls(rising[:-1], peak > start)
    assert rises_or_falls(falling[1:], end > peak)
    assert rate(warmup / 2) == pytest.approx((start + peak) / 2)
    assert all(min(start, peak, end) - 1e-9 <= x <= max(start, peak, end) + 1e-9 for x in rising + falling)


RECIPES = {
    "simclr": (lambda x: [multi_view.simclr_views(x, 12)], [(2, 12)]),
    "multi_crop": (lambda x: multi_view.multi_crop(x, 16, 8, 3, (0.4, 1.0), (0.05, 0.4)), [(2, 16), (3, 8)]),
    "anchored_crop": (
        lambda x: multi_view.multi_crop_with_gram_crops(x, 24, 16, 8, 1, (0.4, 1.0), (0.05, 0.4)),
        [(2, 16), (1, 8), (2, 24)],
    ),
}


@pytest.mark.parametrize(("recipe", "kinds"), RECIPES.values(), ids=RECIPES)
@stable
@given(seeds, st.integers(1, 5), st.integers(8, 40), st.integers(8, 40))
def test_views_are_of_their_size_are_pictures_and_are_the_seeds_alone(recipe, kinds, seed, n, height, width):
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8)
    before = images.clone()
    seed_step(seed, 0)
    found = recipe(images)
    assert [(*x.shape, x.dtype) for x in found] == [(v * n, 3, s, s, torch.float32) for v, s in kinds]
    for x in found:
        pixels = x * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        assert -1e-5 <= pixels.min() <= pixels.max() <= 1 + 1e-5
    assert torch.equal(images, before)
    others = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    others[seed % n] = images[seed % n]  # in another company
    seed_step(seed, 0)
    for x, y, (v, _) in zip(found, recipe(others), kinds):
        mine, again = (part.unflatten(0, (v, n))[:, seed % n] for part in (x, y))
        torch.testing.assert_close(mine, again, rtol=0, atol=1e-5)
    seed_step(seed, 1)
    assert not all(torch.equal(x, y) for x, y in zip(found, recipe(images)))


def trained(seed, chance):
    """What a tiny DINO has become, and said, after a few steps; `chance` is where the generators were before."""
    torch.manual_seed(0)
    method = DINO(tiny_vit(), crop_size=16, local_crop_size=8, num_local_crops=1, num_prototypes=8, hidden_dim=8, bottleneck_dim=4)
    data = Images(torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8))
    seed_step(chance, chance)
    history = trainer.learn(method, data, TrainConfig(batch_size=4, precision="fp32", seed=seed, warmup_fraction=0.0), 6)
    return method.state_dict(), history


def test_a_training_is_its_seed_alone():
    (weights, history), (again, repeated), (_, other) = trained(0, 1), trained(0, 2), trained(1, 1)
    assert history == repeated
    assert all(torch.equal(weights[name], again[name]) for name in weights | again)
    assert history != other


def test_a_finished_run_that_goes_on_changes_nothing_however_often(tmp_path):
    data, out = class_folders(tmp_path / "data", train=6, test=2), tmp_path / "run"
    assert go(data, out) == 0
    before = contents(out)
    assert {"config.json", "log.jsonl", "checkpoint.safetensors", "encoder.safetensors"} <= set(before)
    for _ in range(2):
        assert go(data, out, "--resume") == 0
        assert contents(out) == before


@st.composite
def states(draw):
    """Tensors by their names: of any type and shape, empty ones and single numbers, whole or parts of others."""
    kinds = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8])
    names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)
    shapes = draw(st.dictionaries(names, st.tuples(st.lists(st.integers(0, 3), max_size=3), kinds), max_size=4))
    torch.manual_seed(draw(seeds))
    tensors = {name: (9 * torch.randn(*shape, 2)).to(kind)[..., 0].mT for name, (shape, kind) in shapes.items()
               if len(shape) > 1 and name != "__metadata__"}  # fmt: skip
    return tensors | {name: torch.randn(shape).to(kind) for name, (shape, kind) in shapes.items() if len(shape) < 2}


def alike(found, tensors):
    """Whether they are the same to the bit, by the same names."""
    kinds = [{name: (x.dtype, x.shape, x.tolist()) for name, x in some.items()} for some in (found, tensors)]
    return kinds[0] == kinds[1]


infos = st.dictionaries(
    st.text(max_size=5), st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.none()
)


@stable
@given(states(), infos, seeds)
def test_a_checkpoint_gives_back_what_was_saved_or_says_that_it_is_damaged(tmp_path_factory, tensors, info, place):
    path = tmp_path_factory.getbasetemp() / "checkpoint"
    checkpoint.save_tensors(path, tensors, info)
    whole = path.read_bytes()
    checkpoint.save_tensors(path, dict(reversed(tensors.items())), info)
    assert path.read_bytes() == whole  # equal ones are equal files
    found, said = checkpoint.load_tensors(path)
    assert said == info
    assert alike(found, tensors)
    for i in range(40):
        damaged = bytearray(whole)
        bit = (place + i * 7919) % (8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found, said = checkpoint.load_tensors(path)
        except InputError:
            continue
        assert info.items() <= said.items()  # what was hit is the name of the sum, or how a letter is spelt
        assert alike(found, tensors)
