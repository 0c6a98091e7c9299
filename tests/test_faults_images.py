"""What goes wrong with images: broken ones, endless ones, and such as are no numbers."""

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
from tests.folders import class_folders, picture
from tests.test_faults_runs import go, sentence
from tests.test_train import assert_same_bits


@pytest.fixture
def data(tmp_path):
    return class_folders(tmp_path / "data", train=6, test=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run on the same images that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    assert go(class_folders(out / "data", train=6, test=2), out / "run") == 0
    return out / "run"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.5])
def test_images_that_are_floats_are_refused_before_any_work(number):
    found = torch.rand(4, 3, 8, 8)
    found[1, 2, 3, 4] = number
    with pytest.raises(InputError) as refused:
        Images(found)
    assert str(refused.value) == (
        "Images are kept as uint8 (N, 3, S, S), and these are float32 (4, 3, 8, 8); scale them to 0 .. 255."
    )


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 1, 8, 8), (4, 8, 8, 3), (3, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"uint8 \(N, 3, S, S\), and these are uint8 \("):
        Images(torch.zeros(shape, dtype=torch.uint8))


def png(width, height, *chunks):
    """A PNG file whose header says that it is so large, and what is in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        *chunks,
        (b"IDAT", zlib.compress(bytes(height * (1 + 3 * width) if width < 100 else 0))),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def break_images(target):
    """Files that are no images, or none that can be read, beside the good ones. Returns how many."""
    good = (target / "000.png").read_bytes()
    Image.open(target / "000.png").save(target / "a.dds")
    dds = bytearray((target / "a.dds").read_bytes())
    dds[80:84] = bytes(4)  # a format of pixels that is none: Pillow says so by a NotImplementedError
    floats = np.full((20, 24), np.nan, np.float32)
    floats[::2] = np.inf
    Image.fromarray(floats).save(target / "floats.tif")
    Image.fromarray(np.full((20, 24), 70_000, np.int32)).save(target / "wide.tif")
    files = {
        "a.dds": dds,
        "cut.png": good[:200],
        "damaged.png": good[:60] + bytes(40) + good[100:],
        "empty.jpg": b"",
        "floats.exr": b"\x76\x2f\x31\x01" + bytes(400),
        "huge.png": png(60_000, 60_000),
        "notes.txt": b"not an image",
        "text.png": png(24, 20, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),  # 97 kB that become 100 MB
    }
    for name, content in files.items():
        (target / name).write_bytes(content)
    (target / "folder.png").mkdir()
    (target / "nowhere.png").symlink_to("nowhere")
    return len(files) + 2


def test_images_that_cannot_be_read_are_counted_and_the_run_is_that_of_the_others(data, whole, tmp_path, capsys):
    bad = break_images(data / "train" / "cat")
    assert go(data, tmp_path / "run") == 0
    said = capsys.readouterr()
    assert f"{bad} of {12 + bad} files in {data} are not images that can be read; left out." in said.out
    assert "Traceback" not in said.err
    assert_same_bits(whole, tmp_path / "run")


def test_when_no_image_can_be_read_it_is_said_what_one_is(data, tmp_path, capsys):
    bad = break_images(data / "train" / "cat")
    for file in [*(data / "train").rglob("0*.png")]:
        file.unlink()
    assert sentence(capsys, go(data, tmp_path / "run")) == (
        f"None of the {bad} files in {data} is an image that can be read: whole, of 8 or 16 bits a channel, and not "
        "too large for Pillow."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_sixteen_bits_of_grey_are_the_first_eight_and_not_white(tmp_path, name):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for kind, pixels in (("eight", grey.astype(np.uint8)), ("sixteen", grey * 257)):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / name)
    found = [load_folder(tmp_path / kind, "train", 16).images for kind in ("eight", "sixteen")]
    assert torch.equal(*found)
    assert found[0].unique().numel() == 256


def test_a_file_that_goes_while_the_folder_is_read_is_left_out(data, monkeypatch, capsys):
    honest = folder.decode

    def late(file, size):
        (data / "train" / "dog" / "003.png").unlink(missing_ok=True)
        return honest(file, size)

    monkeypatch.setattr(folder, "decode", late)
    assert len(load_folder(data, "train", 16)) == 11
    assert "1 of 12 files" in capsys.readouterr().out


def test_a_folder_that_goes_while_it_is_listed_is_said(data, monkeypatch):
    def gone(root, pattern):
        raise FileNotFoundError(2, "No such file or directory", str(root / "cat"))

    monkeypatch.setattr(Path, "rglob", gone)
    with pytest.raises(InputError, match=r"cat cannot be listed \(No such file or directory\); was .*train being mov"):
        load_folder(data, "train", 16)


def test_no_picture_is_both_learnt_from_and_tested_on(tmp_path):
    """Whichever of the parts a folder has; the classes are the same ones in both."""
    for parts in (("train", "test"), ("train", "val"), ("train",), ("test",), ("val",), ("",)):
        root = tmp_path / ("-".join(parts) or "none")
        for part in (*parts, "") if parts in (("test",), ("val",)) else parts:
            for kind in ("cat", "dog"):
                for i in range(10):
                    picture(root / part / kind / f"{i}.png", seed=i)
        learnt, tested = (folder.list_files(root, split) for split in ("train", "test"))
        assert learnt
        assert tested
        assert not set(learnt) & set(tested)
        for split, files in (("train", learnt), ("test", tested)):
            labels, classes = folder.read_labels(files, root, split)
            assert classes == ("cat", "dog")
            assert [classes[i] for i in labels] == [file.parent.name for file in files]


def test_what_a_system_or_an_editor_hid_is_no_class_and_no_picture(tmp_path):
    for kind in ("photos", "__MACOSX", ".ipynb_checkpoints", ".thumbnails/large"):
        for i in range(12):
            picture(tmp_path / kind / f"{i:02}.png", seed=i)
    (tmp_path / "nothing").mkdir()
    files = folder.list_files(tmp_path, "train")
    assert {file.parent.name for file in files} == {"photos"}
    assert folder.read_labels(files, tmp_path, "train") == (None, ())
    picture(tmp_path / "other" / "broken.png")
    assert folder.read_labels(files, tmp_path, "train") == (None, ())  # the others cannot be read
