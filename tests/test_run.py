"""Run directories: their options, trainings from Python, and what was made in Python and cannot be built by name."""

import json
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from minissl.cli import main, parse_run
from minissl.data import Images
from minissl.errors import InputError
from minissl.hub import pretrained
from minissl.methods.registry import create_method
from minissl.models.factory import create_encoder, wrap_encoder
from minissl.training import checkpoint
from minissl.training.config import TrainConfig
from minissl.training.logger import read_log
from minissl.training.plan import Plan
from minissl.training.run import (
    RunConfig,
    check_run_dir,
    evaluate_run,
    export_run,
    load_run_method,
    read_run,
    start_run,
    train,
    visualize_run,
)
from tests.folders import TINY, class_folders
from tests.runs import ToyMethod, assert_same_bits, at_step, error_sentence, read_files, saved_step

CPU = ["--device", "cpu", "--preset", "cpu"]
FIGURES = {"attention.png", "pca.png", "curves.png", "collapse.png"}
CONFIG = TrainConfig(batch_size=4, epochs=4, precision="fp32", eval_minutes=9, save_minutes=0)  # 12 steps
METHOD_OPTIONS = {"crop_size": 16, "local_crop_size": 8, "num_prototypes": 32, "hidden_dim": 16, "bottleneck_dim": 8}


def random_images(n: int = 12, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(n) % 2, ("cat", "dog"))


def tiny_dino(seed=0, **options):
    torch.manual_seed(seed)
    return create_method("dino", create_encoder("nano", 8, 16), **METHOD_OPTIONS | options)


class PairDataset(Dataset):
    """A data set of another library: pairs of an image and a label."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return random_images().images[index] / 255, index % 2


def test_options_that_a_run_does_not_know_take_their_defaults(tmp_path):
    run, _ = parse_run(["dino", *CPU])
    checkpoint.write_json(tmp_path / "config.json", {"run": asdict(run), "plan": asdict(Plan(10, 0.1, 0))})
    content = json.loads((tmp_path / "config.json").read_text())
    for section, name in (("encoder", "depth"), ("method_options", "stop_gradient"), ("train", "compile")):
        del content["run"][section][name]
    del content["run"]["init_from"]
    checkpoint.write_json(tmp_path / "config.json", content)
    loaded, _ = read_run(tmp_path)
    assert json.loads(json.dumps(asdict(loaded))) == json.loads(json.dumps(asdict(run)))  # tuples become lists
    assert loaded.method_options["stop_gradient"] is True
    check_run_dir(run, tmp_path, resume=True)
    deeper, _ = parse_run(["dino", *CPU, "--encoder.depth", "3"])
    assert len(deeper.build().encoder.blocks) == 3
    with pytest.raises(InputError, match=r"encoder\.depth 0, not 3"):
        check_run_dir(deeper, tmp_path, resume=True)


def save_method(path, method):
    state = {f"method.{name}": t for name, t in method.state_dict().items()}
    checkpoint.save_tensors(path / "checkpoint.safetensors", state, {"step": 1})


def test_a_run_starts_from_another_one_at_another_size(tmp_path):
    """As in a final phase at high resolution: the same weights, with resampled position embeddings."""
    words = ["dinov2", *CPU]
    before, _ = parse_run([*words, "--crop_size", "32"])
    after, _ = parse_run([*words, "--crop_size", "64", "--init_from", "x"])
    assert after.init_from == "x"
    first, second = before.build(), after.build()
    with torch.no_grad():
        for p in first.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    save_method(tmp_path, first)
    pretrained.init_from_run(tmp_path, second)
    for (name, expected), t in zip(first.state_dict().items(), second.state_dict().values()):
        if not name.endswith("pos_embed"):
            assert torch.equal(expected, t), name
    assert second.encoder.pos_embed.shape == (1, 1 + 64, 128)
    images = torch.rand(2, 3, 64, 64)
    similarity = F.cosine_similarity(first.encoder.eval()(images).cls, second.encoder.eval()(images).cls)
    assert similarity.min() > 0.99  # the first resamples its position embeddings in the forward pass
    for other in (["simclr"], ["dinov2", "--encoder.depth", "2"], ["dinov2", "--num_prototypes", "8"]):
        with pytest.raises(InputError, match="another method or another encoder"):
            pretrained.init_from_run(tmp_path, parse_run([*other, *CPU])[0].build())


def test_modules_that_a_method_lacks_are_ignored_by_init_from(tmp_path):
    words = ["dinov3", *CPU]
    first, second = (parse_run([*words, *more])[0].build() for more in ([], ["--ibot_loss_weight", "0", "--seed", "1"]))
    save_method(tmp_path, first)
    pretrained.init_from_run(tmp_path, second)
    assert "patch_head" in first.student
    assert "patch_head" not in second.student
    for name, t in second.state_dict().items():
        assert torch.equal(first.state_dict()[name], t), name


def test_init_from_refuses_a_deeper_encoder(tmp_path):
    words = ["dinov3", *CPU]
    deep, shallow = (parse_run([*words, *more])[0].build() for more in (["--encoder.depth", "2"], []))
    save_method(tmp_path, deep)
    with pytest.raises(InputError, match="another method or another encoder"):
        pretrained.init_from_run(tmp_path, shallow)


def test_dinotxt_needs_a_pretrained_encoder():
    with pytest.raises(InputError, match=r"--encoder\.weights"):
        parse_run(["dinotxt", *CPU])[0].build()


@pytest.mark.slow
def test_training_from_python_gives_the_run_of_the_command_line(tmp_path):
    """The same checkpoint bit for bit, the same metrics and files."""
    data = class_folders(tmp_path / "data", train=6, test=2)
    words = [*TINY, "--epochs", "4", "--eval_minutes", "9", "--precision", "fp32", "--data", f"folder:{data}"]
    assert main(["train", "dino", *words, "--out", str(tmp_path / "cli")]) == 0
    config, _ = read_run(tmp_path / "cli")
    train_set, test_set = config.load_dataset("train"), config.load_dataset("test")
    run = train(
        config.build(), train_set, TrainConfig(**config.train), tmp_path / "python", test_set=test_set, device="cpu"
    )
    assert_same_bits(tmp_path / "cli", tmp_path / "python")
    assert run.metrics == checkpoint.read_json(tmp_path / "cli" / "metrics.json")
    assert read_files(tmp_path / "cli").keys() == read_files(tmp_path / "python").keys()
    assert {path.name for path in run.output_dir.iterdir()} >= FIGURES
    assert replace(run.config, encoder=config.encoder) == config  # whose encoder is that of create_encoder
    assert run.plan.steps == 12
    assert run.log == read_log(tmp_path / "python" / "log.jsonl")
    assert main(["train", "dino", *words, "--out", str(tmp_path / "python"), "--resume"]) == 0


@pytest.mark.slow
def test_a_training_from_python_is_resumed_with_the_same_bits(tmp_path):
    train(tiny_dino(), random_images(), CONFIG, tmp_path / "whole", device="cpu")
    with at_step(5, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        train(tiny_dino(), random_images(), CONFIG, tmp_path / "stopped", device="cpu")
    assert saved_step(tmp_path / "stopped") == 6
    with pytest.raises(InputError, match="--resume"):
        train(tiny_dino(), random_images(), CONFIG, tmp_path / "stopped", device="cpu")
    with pytest.raises(InputError, match="lr"):
        train(tiny_dino(), random_images(), replace(CONFIG, lr=1.0), tmp_path / "stopped", device="cpu", resume=True)
    run = train(tiny_dino(seed=1), random_images(), CONFIG, tmp_path / "stopped", device="cpu", resume=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")
    assert run.metrics == {}  # without test images
    assert not FIGURES & {path.name for path in run.output_dir.iterdir()}
    assert not (run.output_dir / "metrics.json").exists()


@pytest.mark.slow
def test_any_torch_data_set_is_trained_on(tmp_path):
    run = train(tiny_dino(), PairDataset(), CONFIG, tmp_path, test_set=PairDataset(), device="cpu")
    assert run.config.data == "custom"
    assert run.config.image_size == 16
    assert {"knn", "linear", "rank_me", "random_knn"} <= run.metrics.keys()
    assert run.encoder(torch.zeros(1, 3, 16, 16)).cls.shape == (1, 128)


@pytest.mark.slow
def test_a_run_on_a_data_set_made_in_python_is_evaluated_on_a_named_one(tmp_path, capsys):
    train(tiny_dino(), random_images(), CONFIG, tmp_path, device="cpu")
    for finish in (evaluate_run, visualize_run):
        with pytest.raises(InputError, match="--data"):
            finish(tmp_path)
    data = class_folders(tmp_path / "data", train=6, test=2)
    assert "--data" in error_sentence(capsys, main(["evaluate", str(tmp_path)]))
    metrics = evaluate_run(tmp_path, f"folder:{data}")
    assert metrics["test_images"] == 4
    visualize_run(tmp_path, data_name=f"folder:{data}")
    assert {path.name for path in tmp_path.iterdir()} >= FIGURES


def toy_method():
    torch.manual_seed(0)
    return ToyMethod()


@pytest.mark.slow
def test_a_method_made_in_python_is_trained_and_resumed(tmp_path):
    whole = train(toy_method(), random_images(), CONFIG, tmp_path / "whole", test_set=random_images(8, 1), device="cpu")
    with at_step(5, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        train(toy_method(), random_images(), CONFIG, tmp_path / "stopped", device="cpu")
    run = train(toy_method(), random_images(), CONFIG, tmp_path / "stopped", device="cpu", resume=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")
    weight = checkpoint.load_tensors(tmp_path / "whole" / "encoder.safetensors")[0]["linear.weight"]
    assert torch.equal(run.encoder.linear.weight, weight)
    assert not torch.equal(toy_method().encoder.linear.weight, weight)
    assert {"knn", "initial_knn"} <= whole.metrics.keys()
    assert {path.name for path in whole.output_dir.iterdir()} >= FIGURES


def test_the_directory_of_a_method_made_in_python_says_so(tmp_path, capsys):
    train(toy_method(), random_images(), CONFIG, tmp_path, device="cpu")
    run, _ = read_run(tmp_path)
    assert (run.method, run.encoder["name"]) == ("custom", "custom")
    assert "ToyMethod" in run.method_options["class"]
    assert "ToyEncoder" in run.encoder["class"]
    for load in (pretrained.load_encoder, load_run_method):
        with pytest.raises(InputError, match=r"ToyEncoder|in Python"):
            load(tmp_path)
    for command in ("evaluate", "visualize", "doctor"):
        error_sentence(capsys, main([command, str(tmp_path), *(["--data", "digits"] if command != "doctor" else [])]))
    with pytest.raises(InputError):
        export_run(tmp_path, tmp_path / "exported.safetensors")
    with pytest.raises(InputError, match="made in Python"):
        start_run(run, tmp_path, "cpu", resume=True)


class OtherMethod(ToyMethod):
    pass


def test_another_method_made_in_python_does_not_resume_the_run(tmp_path):
    train(toy_method(), random_images(), CONFIG, tmp_path, device="cpu")
    with pytest.raises(InputError, match="OtherMethod"):
        train(OtherMethod(), random_images(), CONFIG, tmp_path, device="cpu", resume=True)


@pytest.mark.slow
def test_a_wrapped_network_is_trained(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())  # (B, 8, 4, 4)
    method = create_method(
        "simclr", wrap_encoder(network, image_size=16), crop_size=16, hidden_dim=16, projection_dim=8
    )
    run = train(method, random_images(), CONFIG, tmp_path, test_set=random_images(8, 1), device="cpu")
    assert (run.config.method, run.config.encoder["name"]) == ("custom", "custom")
    assert run.config.crop_size == 16
    assert run.encoder(torch.zeros(1, 3, 16, 16)).patches.shape == (1, 4, 4, 8)


def test_a_method_that_was_changed_after_create_method_is_not_built_by_name(tmp_path):
    options = METHOD_OPTIONS | {"num_patch_prototypes": 32}
    method = create_method("dinov3", create_encoder("nano", 8, 16), **options)
    method.set_distillation_teacher(create_method("dinov2", create_encoder("nano", 8, 16, depth=2), **options))
    run = train(method, random_images(), CONFIG, tmp_path, device="cpu")
    assert run.config.method == "custom"
    assert run.config.encoder["name"] == "nano"  # the encoder can be
    assert isinstance(run.encoder, nn.Module)


def test_a_crop_larger_than_the_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="--crop_size"):
        train(tiny_dino(crop_size=32), random_images(), CONFIG, tmp_path, device="cpu")


@pytest.mark.slow
def test_a_method_of_a_file_is_trained_and_loaded_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from minissl.methods.simclr import SimCLR\n\n\nclass Mine(SimCLR):\n    '''My method.'''\n"
    )
    monkeypatch.chdir(tmp_path)
    assert RunConfig("./mine.py", "digits", 32, {"image_size": 32}, {}, {}).method == str(tmp_path / "mine.py")
    data = class_folders(Path("data"), train=6, test=2)
    words = [*CPU, "--image_size", "16", "--crop_size", "16", "--minutes", "0", "--epochs", "1", "--batch_size", "4"]
    assert main(["train", "./mine.py", *words, "--data", f"folder:{data.resolve()}", "--out", "run"]) == 0
    monkeypatch.chdir("/")
    method = load_run_method(tmp_path / "run")
    assert type(method).__name__ == "Mine"
    (tmp_path / "mine.py").unlink()
    with pytest.raises(InputError, match=r"mine\.py"):
        load_run_method(tmp_path / "run")
