"""Damaged, oversized and missing images are left out with a message, and wrong tensors are refused."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minissl.data import Images, folder
from minissl.data.folder import load_folder
from minissl.errors import InputError
from tests.folders import class_folders, write_image
from tests.runs import assert_same_bits, error_sentence, train_tiny


@pytest.fixture
def data(tmp_path):
    return class_folders(tmp_path / "data", train=6, test=2)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    """A run on the same images without faults."""
    out = tmp_path_factory.mktemp("reference")
    assert train_tiny(class_folders(out / "data", train=6, test=2), out / "run") == 0
    return out / "run"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
def test_float_images_are_refused(value):
    images = torch.rand(4, 3, 8, 8)
    images[1, 2, 3, 4] = value
    with pytest.raises(InputError, match=r"uint8 \(N, 3, S, S\), but these are float32 \(4, 3, 8, 8\)"):
        Images(images)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 1, 8, 8), (4, 8, 8, 3), (3, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"uint8 \(N, 3, S, S\), but these are uint8 \("):
        Images(torch.zeros(shape, dtype=torch.uint8))


def png(width, height, *chunks):
    """Return a PNG file with this size in its header, and further chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(height * (1 + 3 * width) if width < 100 else 0))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def add_unreadable_files(target):
    """Write files that are not images, or cannot be read, next to the good ones. Returns how many."""
    good = (target / "000.png").read_bytes()
    Image.open(target / "000.png").save(target / "a.dds")
    dds = bytearray((target / "a.dds").read_bytes())
    dds[80:84] = bytes(4)  # an invalid pixel format, for which Pillow raises NotImplementedError
    floats = np.full((20, 24), np.nan, np.float32)
    floats[::2] = np.inf
    Image.fromarray(floats).save(target / "floats.tif")
    Image.fromarray(np.full((20, 24), 70_000, np.int32)).save(target / "wide.tif")
    files = {
        "a.dds": dds,
        "damaged.png": good[:60] + bytes(40) + good[100:],
        "empty.jpg": b"",
        "floats.exr": b"\x76\x2f\x31\x01" + bytes(400),
        "huge.png": png(60_000, 60_000),
        "notes.txt": b"not an image",
        "text.png": png(24, 20, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),  # 97 kB expand to 100 MB
        "truncated.png": good[:200],
    }
    for name, content in files.items():
        (target / name).write_bytes(content)
    (target / "folder.png").mkdir()
    (target / "nowhere.png").symlink_to("nowhere")
    return len(files) + 2


def test_unreadable_files_are_counted_and_do_not_change_the_run(data, reference_run, tmp_path, capsys):
    num_bad = add_unreadable_files(data / "train" / "cat")
    assert train_tiny(data, tmp_path / "run") == 0
    captured = capsys.readouterr()
    assert f"{num_bad} of {12 + num_bad} files in {data}" in captured.out
    assert "Traceback" not in captured.err
    assert_same_bits(reference_run, tmp_path / "run")


def test_a_folder_without_readable_images_is_refused(data, tmp_path, capsys):
    num_bad = add_unreadable_files(data / "train" / "cat")
    for file in [*(data / "train").rglob("0*.png")]:
        file.unlink()
    message = error_sentence(capsys, train_tiny(data, tmp_path / "run"))
    assert f"None of the {num_bad} files in {data}" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gray.png", "gray.tif"])
def test_16_bit_gray_images_are_reduced_to_8_bits(tmp_path, name):
    gray = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for kind, pixels in (("8", gray.astype(np.uint8)), ("16", gray * 257)):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / name)
    images = [load_folder(tmp_path / kind, "train", 16).images for kind in ("8", "16")]
    assert torch.equal(*images)
    assert images[0].unique().numel() == 256


def test_a_file_that_disappears_during_reading_is_left_out(data, monkeypatch, capsys):
    decode_image = folder.decode_image

    def late(file, size):
        (data / "train" / "dog" / "003.png").unlink(missing_ok=True)
        return decode_image(file, size)

    monkeypatch.setattr(folder, "decode_image", late)
    assert len(load_folder(data, "train", 16)) == 11
    assert "1 of 12 files" in capsys.readouterr().out


def test_a_folder_that_disappears_during_listing_is_named(data, monkeypatch):
    def missing(root, pattern):
        raise FileNotFoundError(2, "No such file or directory", str(root / "cat"))

    monkeypatch.setattr(Path, "rglob", missing)
    with pytest.raises(InputError, match=r"cat cannot be listed \(No such file or directory\)"):
        load_folder(data, "train", 16)


def test_an_image_smaller_than_a_crop_is_named(data):
    write_image(data / "train" / "cat" / "small.png", (7, 9))
    with pytest.raises(InputError, match=r"small.png is 7 pixels .* --crop_size"):
        load_folder(data, "train", 16, min_size=8)


def test_training_and_test_images_are_disjoint(tmp_path):
    """For all layouts of a folder, which have the same classes in both splits."""
    for parts in (("train", "test"), ("train", "val"), ("train",), ("test",), ("val",), ("",)):
        root = tmp_path / ("-".join(parts) or "none")
        for part in (*parts, "") if parts in (("test",), ("val",)) else parts:
            for name in ("cat", "dog"):
                for i in range(10):
                    write_image(root / part / name / f"{i}.png", seed=i)
        train_files, test_files = (folder.list_files(root, split) for split in ("train", "test"))
        assert train_files
        assert test_files
        assert not set(train_files) & set(test_files)
        for split, files in (("train", train_files), ("test", test_files)):
            labels, classes = folder.read_labels(files, root, split)
            assert classes == ("cat", "dog")
            assert [classes[i] for i in labels] == [file.parent.name for file in files]


def test_hidden_folders_are_neither_classes_nor_images(tmp_path):
    for name in ("photos", "__MACOSX", ".ipynb_checkpoints", ".thumbnails/large"):
        for i in range(12):
            write_image(tmp_path / name / f"{i:02}.png", seed=i)
    (tmp_path / "nothing").mkdir()
    files = folder.list_files(tmp_path, "train")
    assert {file.parent.name for file in files} == {"photos"}
    assert folder.read_labels(files, tmp_path, "train") == (None, ())
    write_image(tmp_path / "other" / "broken.png")
    assert folder.read_labels(files, tmp_path, "train") == (None, ())  # no file of the other class can be read
