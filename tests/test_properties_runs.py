"""Properties of EMA teachers, schedules, views, checkpoints and whole runs: bounds and reproducibility.

Hypothesis generates the cases, the same ones in every run.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minissl.data import Images
from minissl.data.transforms import multi_view
from minissl.data.transforms.functional import IMAGENET_MEAN, IMAGENET_STD
from minissl.errors import InputError
from minissl.methods.dino import DINO
from minissl.models.ema import EMATeacher
from minissl.training import checkpoint, trainer
from minissl.training.config import TrainConfig
from minissl.training.sampler import seed_step
from minissl.training.schedules import cosine, linear, warmup_cosine
from tests.folders import class_folders
from tests.golden import tiny_vit
from tests.runs import read_files, train_tiny
from tests.test_properties import deterministic, numbers, seeds, unit_interval


def random_network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def weights_of(network):
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


@deterministic
@given(seeds, st.lists(unit_interval, min_size=1, max_size=5))
def test_a_teacher_is_the_weighted_mean_of_all_students(seed, momenta):
    teacher = EMATeacher(random_network(seed))
    expected = weights_of(teacher.network)
    for i, momentum in enumerate(momenta):
        student, before = random_network(seed + i + 1), weights_of(teacher.network)
        teacher.update(student, momentum)
        after, new = weights_of(teacher.network), weights_of(student)
        assert (after >= torch.minimum(before, new) - 1e-12).all()
        assert (after <= torch.maximum(before, new) + 1e-12).all()
        expected = momentum * expected + (1 - momentum) * new
    torch.testing.assert_close(weights_of(teacher.network), expected)
    assert torch.equal(weights_of(student), new)


@deterministic
@given(seeds, unit_interval, st.integers(1, 20))
def test_the_distance_to_a_constant_student_shrinks_by_the_momentum_in_each_update(seed, momentum, steps):
    teacher, student = EMATeacher(random_network(seed)), random_network(seed + 1)
    start, end = weights_of(teacher.network), weights_of(student)
    for _ in range(steps):
        teacher.update(student, momentum)
    torch.testing.assert_close(weights_of(teacher.network) - end, momentum**steps * (start - end))
    equal_teacher = EMATeacher(student)
    equal_teacher.update(copy.deepcopy(student), momentum)
    assert torch.equal(weights_of(equal_teacher.network), end)


def is_monotonic(values, increasing):
    return all((b - a) * (1 if increasing else -1) >= -1e-9 for a, b in itertools.pairwise(values))


@deterministic
@given(numbers, numbers, st.floats(0.01, 1))
def test_cosine_and_linear_schedules_are_monotonic_from_start_to_end(start, end, until):
    progress = [i / 50 for i in range(51)]
    for schedule in (lambda p: cosine(start, end, p), lambda p: linear(start, end, p, until)):
        values = [schedule(p) for p in progress]
        assert values[0] == pytest.approx(start)
        assert values[-1] == pytest.approx(end)
        assert is_monotonic(values, end > start)
        assert schedule(-0.5) == pytest.approx(start)
        assert schedule(1.5) == pytest.approx(end)
    assert cosine(start, end, 0.5) == pytest.approx((start + end) / 2)
    assert cosine(start, end, 0.25) + cosine(start, end, 0.75) == pytest.approx(start + end)


@deterministic
@given(numbers, numbers, numbers, st.floats(0.01, 0.99))
def test_a_warmup_is_linear_to_the_peak_and_continuous_with_the_cosine_after_it(start, peak, end, warmup):
    def value(progress):
        return warmup_cosine(start, peak, end, progress, warmup)

    assert value(0.0) == pytest.approx(start)
    assert value(warmup) == pytest.approx(peak)
    assert value(1.0) == pytest.approx(end)
    assert value(warmup - 1e-9) == pytest.approx(value(warmup + 1e-9), abs=1e-4)
    phases = (0, warmup), (warmup, 1)
    before, after = ([value(p) for p in torch.linspace(*phase, 40).tolist()] for phase in phases)
    assert is_monotonic(before[:-1], peak > start)
    assert is_monotonic(after[1:], end > peak)
    assert value(warmup / 2) == pytest.approx((start + peak) / 2)
    assert all(min(start, peak, end) - 1e-9 <= x <= max(start, peak, end) + 1e-9 for x in before + after)


RECIPES = {  # name: (images -> views, [(number of views per image, their size)])
    "simclr_views": (lambda x: [multi_view.simclr_views(x, 12)], [(2, 12)]),
    "multi_crop": (lambda x: multi_view.multi_crop(x, 16, 8, 3, (0.4, 1.0), (0.05, 0.4)), [(2, 16), (3, 8)]),
    "multi_crop_with_gram_crops": (
        lambda x: multi_view.multi_crop_with_gram_crops(x, 24, 16, 8, 1, (0.4, 1.0), (0.05, 0.4)),
        [(2, 16), (1, 8), (2, 24)],
    ),
}


@pytest.mark.parametrize(("recipe", "sizes"), RECIPES.values(), ids=RECIPES)
@deterministic
@given(seeds, st.integers(1, 5), st.integers(8, 40), st.integers(8, 40))
def test_views_have_the_given_sizes_and_depend_on_image_and_seed_only(recipe, sizes, seed, n, height, width):
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8)
    before = images.clone()
    seed_step(seed, 0)
    views = recipe(images)
    assert [(*x.shape, x.dtype) for x in views] == [(v * n, 3, s, s, torch.float32) for v, s in sizes]
    for x in views:
        pixels = x * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        assert -1e-5 <= pixels.min() <= pixels.max() <= 1 + 1e-5
    assert torch.equal(images, before)
    others = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    others[seed % n] = images[seed % n]  # the same image in another batch
    seed_step(seed, 0)
    for x, y, (v, _) in zip(views, recipe(others), sizes):
        view, again = (part.unflatten(0, (v, n))[:, seed % n] for part in (x, y))
        torch.testing.assert_close(view, again, rtol=0, atol=1e-5)
    seed_step(seed, 1)
    assert not all(torch.equal(x, y) for x, y in zip(views, recipe(images)))


def train_dino(seed, previous_seed):
    """Train a tiny DINO for six steps; `previous_seed` sets the generators before. Returns its state and history."""
    torch.manual_seed(0)
    sizes = {"crop_size": 16, "local_crop_size": 8, "num_local_crops": 1}
    method = DINO(tiny_vit(), **sizes, num_prototypes=8, hidden_dim=8, bottleneck_dim=4)
    dataset = Images(torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8))
    seed_step(previous_seed, previous_seed)
    config = TrainConfig(batch_size=4, precision="fp32", seed=seed, warmup_fraction=0.0)
    return method.state_dict(), trainer.learn(method, dataset, config, 6)


def test_a_training_depends_on_its_seed_only():
    (state, history), (repeated_state, repeated) = train_dino(0, 1), train_dino(0, 2)
    _, other = train_dino(1, 1)
    assert history == repeated
    assert all(torch.equal(state[name], repeated_state[name]) for name in state | repeated_state)
    assert history != other


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    data, output_dir = class_folders(tmp_path / "data", train=6, test=2), tmp_path / "run"
    assert train_tiny(data, output_dir) == 0
    before = read_files(output_dir)
    assert {"config.json", "log.jsonl", "checkpoint.safetensors", "encoder.safetensors"} <= set(before)
    for _ in range(2):
        assert train_tiny(data, output_dir, "--resume") == 0
        assert read_files(output_dir) == before


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)


@st.composite
def states(draw):
    """Generate tensors by name: of any dtype and shape, empty, scalar, contiguous or views of others."""
    dtypes = st.sampled_from(DTYPES)
    names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)
    shapes = draw(st.dictionaries(names, st.tuples(st.lists(st.integers(0, 3), max_size=3), dtypes), max_size=4))
    torch.manual_seed(draw(seeds))
    tensors = {
        name: (9 * torch.randn(*shape, 2)).to(dtype)[..., 0].mT
        for name, (shape, dtype) in shapes.items()
        if len(shape) > 1 and name != "__metadata__"
    }
    return tensors | {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items() if len(shape) < 2}


def equal_bits(tensors, others):
    first, second = ({name: (x.dtype, x.shape, x.tolist()) for name, x in state.items()} for state in (tensors, others))
    return first == second


infos = st.dictionaries(
    st.text(max_size=5), st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.none()
)


@deterministic
@given(states(), infos, seeds)
def test_a_checkpoint_is_read_as_it_was_written_or_refused_as_damaged(tmp_path_factory, tensors, info, seed):
    """Forty files with one flipped bit each."""
    path = tmp_path_factory.getbasetemp() / "checkpoint"
    checkpoint.save_tensors(path, tensors, info)
    content = path.read_bytes()
    checkpoint.save_tensors(path, dict(reversed(tensors.items())), info)
    assert path.read_bytes() == content  # the file does not depend on the order of the tensors
    loaded, loaded_info = checkpoint.load_tensors(path)
    assert loaded_info == info
    assert equal_bits(loaded, tensors)
    for i in range(40):
        damaged = bytearray(content)
        bit = (seed + i * 7919) % (8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded, loaded_info = checkpoint.load_tensors(path)
        except InputError:
            continue
        # The flipped bit is in the name of the checksum, or in the spelling of a character.
        assert info.items() <= loaded_info.items()
        assert equal_bits(loaded, tensors)
