"""The public API: what `import minissl` offers, torch data sets, foreign networks, and the Python way to train."""

import subprocess
import sys

import pytest
import torch
import torchvision
from torch.utils.data import DataLoader, Dataset

import minissl
from minissl.data import Scenes

SMALL = {"patch_size": 8, "image_size": 32, "stem": "conv"}
BRIEF = minissl.TrainConfig(epochs=1, batch_size=8, precision="fp32")


class Squares(Dataset):
    """A list-backed data set of one's own: float images and labels."""

    def __init__(self, n=24):
        generator = torch.Generator().manual_seed(0)
        self.items = [(torch.rand(3, 40, 40, generator=generator), i % 3) for i in range(n)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_the_api_is_listed_and_every_name_exists():
    assert set(dir(minissl)) == set(minissl.__all__)
    for name in minissl.__all__:
        assert getattr(minissl, name) is not None
    with pytest.raises(AttributeError):
        minissl.no_such_name  # noqa: B018


def test_import_loads_nothing_but_itself():
    code = "import sys, minissl; print(sorted(m for m in sys.modules if m.startswith(('minissl', 'torch'))))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "['minissl']\n"


@pytest.mark.slow
def test_lists_hold_what_can_be_made():
    assert {"dino", "simclr", "mae", "rotation", "colorization", "inpainting"} <= set(minissl.list_methods())
    assert {"scenes", "cifar10"} <= set(minissl.list_datasets())
    for name in minissl.list_encoders():
        encoder = minissl.create_encoder(name, patch_size=16, image_size=32)
        tokens = encoder.eval()(torch.zeros(1, 3, 32, 32))
        assert tokens.cls.shape == (1, encoder.embed_dim) == (1, tokens.patches.shape[-1])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: minissl.create_encoder("vit_smal"), "small"),
        (lambda: minissl.create_method("dinov4", minissl.create_encoder("nano", 8, 32)), "dinov3"),
        (lambda: minissl.create_method("dino", minissl.create_encoder("nano", 8, 32), prototypes=9), "num_prototypes"),
        (lambda: minissl.load_encoder("dinov2_vits14"), "dinov2_vits14"),
        (lambda: minissl.load_dataset("cifar", "train", 32), "cifar10"),
    ],
)
def test_wrong_names_get_a_suggestion(call, named):
    with pytest.raises(minissl.InputError, match=named):
        call()


def test_scenes_go_through_a_data_loader():
    batch = next(iter(DataLoader(Scenes("train", n=20), batch_size=8)))
    assert batch["image"].shape == (8, 3, 64, 64)
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].shape == (8,)
    assert torch.equal(batch["image"], Scenes("train", n=20).images[:8])


def datasets():
    fake = torchvision.datasets.FakeData(24, (3, 40, 40), 3)
    return {"torchvision": fake, "own": Squares(), "scenes": Scenes("train", size=32, n=24)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "own", "scenes"])
def test_training_on_any_data_set(name, tmp_path):
    method = minissl.create_method("simclr", minissl.create_encoder("nano", **SMALL), crop_size=32)
    run = minissl.train(method, datasets()[name], BRIEF, output_dir=tmp_path / "run")
    assert (tmp_path / "run" / "encoder.safetensors").is_file()
    assert run.plan.steps == 3
    features = minissl.extract_features(run.encoder, minissl.from_dataset(datasets()[name], 32))
    assert features.shape == (24, 128)
    assert features.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:resnet18", "wrapped resnet50"])
def test_training_any_network(name, tmp_path):
    if name.startswith("timm:"):
        encoder = minissl.create_encoder(name, image_size=32)
    else:
        network = torchvision.models.resnet50()
        network.fc = torch.nn.Identity()
        encoder = minissl.wrap_encoder(network, image_size=32)
    method = minissl.create_method("simclr", encoder, crop_size=32)
    before = [p.clone() for p in encoder.parameters()]
    minissl.train(method, Squares(), BRIEF, output_dir=tmp_path / "run")
    assert any(not torch.equal(a, b) for a, b in zip(before, encoder.parameters()))
    assert minissl.extract_features(encoder, Squares(4).items[0][0][None], 32).shape == (1, encoder.embed_dim)


@pytest.mark.slow
def test_a_run_is_resumed_and_loaded_by_its_folder(tmp_path):
    method = minissl.create_method("simclr", minissl.create_encoder("nano", **SMALL), crop_size=32)
    minissl.train(method, Squares(), BRIEF, output_dir=tmp_path / "run")
    encoder = minissl.load_encoder(str(tmp_path / "run"))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoder(images).cls, method.encoder.eval()(images).cls)
    with pytest.raises(minissl.InputError, match="resume"):
        minissl.train(method, Squares(), BRIEF, output_dir=tmp_path / "run")


@pytest.mark.slow
def test_evaluate_gives_numbers():
    encoder = minissl.load_encoder("scenes/dino")
    train_set, test_set = Scenes("train", size=32, n=300), Scenes("test", size=32, n=100)
    metrics = minissl.evaluate(encoder, train_set, test_set)
    assert metrics["knn"] > 0.3
    assert minissl.evaluate(encoder, train_set, test_set) == metrics


@pytest.mark.slow
def test_torch_hub_serves_the_encoders():
    root = str(minissl.__path__[0]) + "/.."
    encoder = torch.hub.load(root, "scenes_dino", source="local")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoder(images).cls, minissl.load_encoder("scenes/dino")(images).cls)
