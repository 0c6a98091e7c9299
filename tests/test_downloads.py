"""Downloads are whole or not there: cut, resumed, checked, unpacked in one step; and their formats are read."""

import hashlib
import http.server
import io
import pickle
import socket
import tarfile
import threading
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from minissl.data import downloads
from minissl.data.downloads import Archive, fetch, load_cifar10, load_imagenette, load_pets, load_stl10, obtain, unpack
from minissl.data.sources import NAMES, load
from minissl.errors import InputError
from tests.folders import picture


def md5(content):
    return hashlib.md5(content).hexdigest()


def packed(files):
    """A .tar.gz of {name: bytes}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


CONTENT = packed({"set/a.txt": b"hello" * 1000, "set/b/c.bin": np.random.default_rng(0).bytes(5000)})


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; knows ranges; may cut an answer short."""

    cut, asked = None, []

    def do_GET(self):
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.asked.append(start)
        body = CONTENT[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.cut is None else body[: self.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.cut, Server.asked = None, []
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/set.tar.gz"
        running.shutdown()
        thread.join()


def archive(url, content=CONTENT):
    return Archive(url, len(content), md5(content), "set")


def files_in(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_a_set_is_fetched_checked_and_unpacked_once(server, tmp_path):
    with patch.dict(downloads.ARCHIVES, {"some": (archive(server),)}):
        obtain("some", tmp_path)
        obtain("some", tmp_path)
    assert files_in(tmp_path) == ["set.tar.gz", "set/a.txt", "set/b/c.bin"]
    assert len(Server.asked) == 1


def test_a_cut_download_says_so_and_goes_on_where_it_stopped(server, tmp_path):
    Server.cut = 1000
    with pytest.raises(InputError, match=r"cut at 1,000 of|could not be fetched"):
        fetch(archive(server), tmp_path)
    assert files_in(tmp_path) == ["set.tar.gz.partial"]
    Server.cut = None
    fetch(archive(server), tmp_path)
    assert Server.asked == [0, 1000]
    assert (tmp_path / "set.tar.gz").read_bytes() == CONTENT


def test_a_wrong_checksum_is_said_and_nothing_is_unpacked(server, tmp_path):
    wrong = archive(server)._replace(md5="0" * 32)
    with pytest.raises(InputError, match=r"checksum .* and not 0000"):
        fetch(wrong, tmp_path)
    assert files_in(tmp_path) == []


def test_a_wrong_file_put_there_by_hand_is_said_and_kept(tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(b"something else")
    with pytest.raises(InputError, match="checksum"):
        fetch(archive("http://nowhere/set.tar.gz"), tmp_path)
    assert files_in(tmp_path) == ["set.tar.gz"]


def test_without_a_network_the_file_its_size_its_checksum_and_its_place_are_named(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/set.tar.gz"
        with pytest.raises(InputError) as error:
            fetch(archive(url), tmp_path)
    for word in ("set.tar.gz", "MB", md5(CONTENT), url, str(tmp_path), "by hand"):
        assert word in str(error.value)


def test_an_archive_put_there_by_hand_needs_no_network(tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(CONTENT)
    with patch.dict(downloads.ARCHIVES, {"some": (archive("http://nowhere/set.tar.gz"),)}):
        obtain("some", tmp_path)
    assert (tmp_path / "set" / "a.txt").exists()


def test_unpacking_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(CONTENT[: len(CONTENT) // 2])
    with pytest.raises(InputError, match="could not be unpacked"):
        unpack(archive("http://nowhere/set.tar.gz"), tmp_path)
    assert files_in(tmp_path) == ["set.tar.gz"]
    assert not (tmp_path / "set").exists()


def test_an_archive_cannot_write_outside_its_place(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "set.tar.gz").write_bytes(packed({"../evil.txt": b"x"}))
    with pytest.raises(InputError, match="could not be unpacked"):
        unpack(archive("http://nowhere/set.tar.gz"), tmp_path / "root")
    assert not (tmp_path / "evil.txt").exists()


def cifar(root, per_batch=3):
    """CIFAR-10 in torchvision's own layout, and torchvision's lists with the checksums of these files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random, sums = np.random.default_rng(0), {}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        pixels = random.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": pixels, "labels": random.integers(0, 10, per_batch).tolist()})
        (folder / name).write_bytes(content)
        sums[name] = md5(content)
    meta = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    return {
        "train_list": [[name, sums[name]] for name in names[:5]],
        "test_list": [["test_batch", sums["test_batch"]]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": md5(meta)},
    }


def test_cifar10_in_torchvisions_own_layout(tmp_path):
    with patch.multiple(torchvision.datasets.CIFAR10, **cifar(tmp_path)):
        train, test = (load_cifar10(split, 64, tmp_path) for split in ("train", "test"))
        assert train.images.shape == (15, 3, 32, 32)  # smaller than asked for, so as they are
        assert test.images.shape == (3, 3, 32, 32)
        assert train.images.dtype == torch.uint8
        assert len(train.classes) == 10
        assert load_cifar10("train", 16, tmp_path).images.shape == (15, 3, 16, 16)
        theirs = torchvision.datasets.CIFAR10(tmp_path, train=True)
        for i, (image, label) in enumerate(theirs):
            assert np.array_equal(train.images[i].permute(1, 2, 0).numpy(), np.asarray(image))
            assert train.labels[i] == label


def test_a_damaged_batch_is_not_unpickled(tmp_path):
    lists = cifar(tmp_path)
    evil = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    evil.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with patch.multiple(torchvision.datasets.CIFAR10, **lists), pytest.raises(InputError, match="damaged"):
        load_cifar10("train", 32, tmp_path)


def test_stl10_with_and_without_labels(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    random, lists = np.random.default_rng(0), {"train_list": [], "test_list": []}
    for name, n, part in (("train", 3, "train"), ("unlabeled", 5, "train"), ("test", 2, "test")):
        for file, content in (
            (f"{name}_X.bin", random.integers(0, 256, n * 27648, dtype=np.uint8).tobytes()),
            (f"{name}_y.bin", random.integers(1, 11, n, dtype=np.uint8).tobytes()),
        ):
            if file != "unlabeled_y.bin":
                (folder / file).write_bytes(content)
                lists[f"{part}_list"].append([file, md5(content)])
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    with patch.multiple(torchvision.datasets.STL10, **lists):
        assert load_stl10("train", 96, tmp_path).images.shape == (3, 3, 96, 96)
        assert load_stl10("test", 32, tmp_path).images.shape == (2, 3, 32, 32)
        unlabelled = load_stl10("train", 32, tmp_path, unlabelled=True)
        assert unlabelled.images.shape == (5, 3, 32, 32)
        assert unlabelled.labels is None


def test_imagenette_is_a_folder_with_names(tmp_path):
    wnids = ["n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413",
             "n03445777", "n03888257"]  # fmt: skip
    for split in ("train", "val"):
        for wnid in wnids:
            picture(tmp_path / "imagenette2-320" / split / wnid / "0.jpeg")
    train = load_imagenette("train", 16, tmp_path)
    assert train.images.shape == (10, 3, 16, 16)
    assert train.classes[int(train.labels[0])] == "tench"
    theirs = torchvision.datasets.Imagenette._WNID_TO_CLASS
    assert train.classes == tuple(theirs[wnid][0] for wnid in wnids)


def test_pets_have_masks(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations" / "trimaps").mkdir(parents=True)
    (base / "images").mkdir()
    lines = []
    for i, breed in enumerate(("Bombay", "pug")):
        picture(base / "images" / f"{breed}_1.jpg", seed=i)
        trimap = np.full((20, 24), 2, dtype=np.uint8)
        trimap[5:15, 6:18] = 1
        Image.fromarray(trimap).save(base / "annotations" / "trimaps" / f"{breed}_1.png")
        lines.append(f"{breed}_1 {i + 1} 1 1")
    for split in ("trainval", "test"):
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    pets = load_pets("train", 16, tmp_path)
    assert pets.images.shape == (2, 3, 16, 16)
    assert pets.masks.shape == (2, 16, 16)
    assert pets.masks[0, 8, 8] == 1
    assert pets.masks[0, 0, 0] == 0
    assert pets.labels.tolist() == [0, 1]


def test_every_name_is_known_and_another_is_said():
    assert set(NAMES) == {"scenes", "digits", "cifar10", "stl10", "stl10-unlabelled", "imagenette", "pets"}
    with pytest.raises(InputError, match=r"cifar10.*folder:PATH"):
        load("imagenet", "train", 32)


def test_the_checksums_are_torchvisions():
    sets = torchvision.datasets
    assert downloads.ARCHIVES["cifar10"][0].md5 == sets.CIFAR10.tgz_md5
    assert downloads.ARCHIVES["stl10"][0].md5 == sets.STL10.tgz_md5
    assert downloads.ARCHIVES["imagenette"][0].md5 == sets.Imagenette._ARCHIVES["320px"][1]
    assert [(a.url, a.md5) for a in downloads.ARCHIVES["pets"]] == list(sets.OxfordIIITPet._RESOURCES)


def test_some_of_a_set_has_all_its_classes():
    images = downloads.Images(torch.zeros(1000, 3, 1, 1, dtype=torch.uint8), torch.arange(1000) // 100)
    assert torch.bincount(images.some(50).labels).tolist() == [5] * 10
    assert len(images.some(2000)) == 1000
