"""Captions are read from the published layouts; a malformed file is named with its line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minissl.data.captions import load_captions
from minissl.errors import InputError
from tests.folders import write_image

NAMES = [f"{i:02}.jpg" for i in range(12)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def table(tmp_path):
    """Flickr8k as a table: two captions per image, some with commas and quotes."""
    for i, name in enumerate(NAMES):
        write_image(tmp_path / "Images" / name, seed=i)
    lines = [f'{name},a dog {name}\n{name},"a cat, ""Tom"""\n' for name in NAMES]
    write(tmp_path / "captions.txt", "image,caption\n" + "".join(lines))
    return tmp_path


@pytest.fixture
def tokens(tmp_path):
    """Flickr8k as its authors published it."""
    for i, name in enumerate(NAMES):
        write_image(tmp_path / "Flicker8k_Dataset" / name, seed=i)
    lines = [f"{name}#{k}\t{word} , {name} .\n" for name in NAMES for k, word in enumerate(("a dog", "a cat"))]
    write(tmp_path / "Flickr8k.token.txt", "".join(lines))
    return tmp_path


@pytest.fixture
def coco(tmp_path):
    """Four images for training and two for validation, with unordered ids."""
    for part, n in (("train2017", 4), ("val2017", 2)):
        for i in range(n):
            write_image(tmp_path / part / NAMES[i], seed=i)
        images = [{"id": 90 - i, "file_name": NAMES[i]} for i in range(n)]
        notes = [{"image_id": 90 - i, "caption": f" {word} {i}\n"} for word in ("a dog", "a cat") for i in range(n)]
        write(tmp_path / "annotations" / f"captions_{part}.json", json.dumps({"images": images, "annotations": notes}))
    return tmp_path


def error_message(name, folder, split="train"):
    """Return the one line with which a data set is refused."""
    with pytest.raises(InputError) as error:
        load_captions(f"{name}:{folder}", split, 8)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_table_gives_all_captions_of_each_image(table):
    train, test = (load_captions(f"flickr8k:{table}", split, 16) for split in ("train", "test"))
    assert (len(train), len(test)) == (11, 1)  # every tenth image is for testing
    assert train.images.shape == (11, 3, 16, 16)
    assert train.images.dtype == torch.uint8
    assert train.captions[0] == ("a dog 00.jpg", 'a cat, "Tom"')
    assert test.captions == (("a dog 09.jpg", 'a cat, "Tom"'),)


def test_an_image_stays_with_its_captions(table):
    for i, name in enumerate(NAMES):
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(table / "Images" / name)
    train = load_captions(f"flickr8k:{table}", "train", 8)
    shade = (train.images[:, 0].float().mean((1, 2)) / 20).round().long().tolist()
    assert [f"a dog {i:02}.jpg" for i in shade] == [captions[0] for captions in train.captions]


def test_max_images_keeps_the_first(table):
    assert load_captions(f"flickr8k:{table}", "train", 8, max_images=3).captions[2][0] == "a dog 02.jpg"


def test_an_unclosed_quote_in_the_last_line_is_named(table):
    path = write(table / "captions.txt", 'image,caption\n00.jpg,fine\n01.jpg,"never closed\n')
    assert f"{path}, line 3: " in error_message("flickr8k", table)


def test_unquoted_commas_and_empty_lines_are_accepted(table):
    write(table / "captions.txt", "image,caption\r\n00.jpg,one, two\r\n\r\n01.jpg,three\r\n")
    assert load_captions(f"flickr8k:{table}", "train", 8).captions == (("one, two",), ("three",))


@pytest.mark.parametrize(
    ("line", "number"),
    [(b"01.jpg", 3), (b",no name", 3), (b"01.jpg, ", 3), (b'01.jpg,"never closed', 3), (b"01.jpg,\xff\xfe", 3)],
)
def test_a_malformed_line_of_a_table_is_named(table, line, number):
    rest = b"02.jpg,and more\n" * 10_000  # longer than the limit of a csv field
    path = table / "captions.txt"
    path.write_bytes(b"image,caption\n00.jpg,fine\n" + line + b"\n" + rest)
    assert f"{path}, line {number}: " in error_message("flickr8k", table)


def test_token_files_are_read_with_the_published_split(tokens):
    write(tokens / "Flickr_8k.trainImages.txt", "03.jpg\n01.jpg\n")
    write(tokens / "Flickr_8k.devImages.txt", "02.jpg\n")
    train, val = (load_captions(f"flickr8k:{tokens}", split, 8) for split in ("train", "val"))
    assert train.captions == (("a dog , 03.jpg .", "a cat , 03.jpg ."), ("a dog , 01.jpg .", "a cat , 01.jpg ."))
    assert len(val) == 1
    # The test split is not made of a tenth of the other splits.
    assert "Flickr_8k.testImages.txt" in error_message("flickr8k", tokens, "test")


@pytest.mark.parametrize("line", ["01.jpg a dog", "01.jpg#0 a dog", "01.jpg#0\t", "#0\ta dog", "01.jpg#x\ta dog"])
def test_a_malformed_line_of_tokens_is_named(tokens, line):
    path = tokens / "Flickr8k.token.txt"
    path.write_text(path.read_text() + line + "\n")
    assert f"{path}, line 25: " in error_message("flickr8k", tokens)


def test_a_missing_image_is_left_out_and_counted(tokens, capsys):
    (tokens / "Flicker8k_Dataset" / "03.jpg").unlink()
    (tokens / "Flicker8k_Dataset" / "04.jpg").write_bytes(b"not an image")
    train = load_captions(f"flickr8k:{tokens}", "train", 8)
    assert [c[0][8:10] for c in train.captions] == ["00", "01", "02", "05", "06", "07", "08", "10", "11"]
    assert "2 of 11 files" in capsys.readouterr().out


def test_a_folder_without_images_is_refused(tokens):
    for file in (tokens / "Flicker8k_Dataset").iterdir():
        file.unlink()
    assert "None of the 11 files" in error_message("flickr8k", tokens)


def test_coco_is_read_in_the_order_of_its_annotations(coco):
    train, test = (load_captions(f"coco:{coco}", split, 8) for split in ("train", "test"))
    assert train.captions == tuple((f"a dog {i}", f"a cat {i}") for i in range(4))
    assert test.images.shape == (2, 3, 8, 8)
    expected = np.asarray(Image.open(coco / "val2017" / "01.jpg").resize((8, 8), box=(2, 0, 22, 20), resample=3))
    assert np.array_equal(test.images[1].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n"annotations": [,]}', "line 2: "),
        ('{"images": []}', "'annotations'"),
        ('{"images": [{"id": 1}], "annotations": []}', "'file_name'"),
        ('{"images": [], "annotations": [{"image_id": 7, "caption": "x"}]}', "7"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": 5}]}', "strip"),
        ("[]", "captions_train2017.json"),
        ('{"images": [], "annotations": []}', "no captions"),
    ],
)
def test_a_malformed_file_of_coco_is_named(coco, text, message):
    write(coco / "annotations" / "captions_train2017.json", text)
    assert message in error_message("coco", coco)


def test_missing_files_and_wrong_arguments_are_named(tmp_path):
    assert str(tmp_path / "nowhere") in error_message("coco", tmp_path / "nowhere")
    (tmp_path / "a" / "Images").mkdir(parents=True)
    assert "captions.txt or Flickr8k.token.txt" in error_message("flickr8k", tmp_path / "a")
    assert "Images or Flicker8k_Dataset" in error_message("flickr8k", tmp_path)
    assert "captions_train2017.json" in error_message("coco", tmp_path)
    assert "did you mean 'flickr8k'" in error_message("flickr30k", tmp_path)
    assert "split 'dev'" in error_message("coco", tmp_path, "dev")
