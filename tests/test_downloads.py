"""Downloads are resumed, verified and unpacked atomically, and data sets equal what torchvision reads."""

import hashlib
import http.server
import io
import shutil
import socket
import struct
import tarfile
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from minissl.data import downloads
from minissl.data.archives import Archive, choose_archive, fetch, unpack
from minissl.data.downloads import cifar10, imagenette, pets, stl10, stl10_unlabeled
from minissl.data.registry import load_dataset
from minissl.errors import InputError
from tests.folders import class_folders, write_image

NOWHERE = "http://127.0.0.1:9/set.tar.gz"  # no server listens on this port


def md5(content):
    return hashlib.md5(content).hexdigest()


def packed(files):
    """Return a .tar.gz of {name: bytes}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


CONTENT = packed({"set/a.txt": b"hello" * 1000, "set/b/c.bin": np.random.default_rng(0).bytes(5000)})


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve `content`, at most `max_bytes` per response; `ranges` says whether it can resume."""

    content, max_bytes, ranges, starts = CONTENT, 10**9, True, []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) * self.ranges
        self.starts.append(start)
        if start >= len(self.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start : start + self.max_bytes])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Serving", (Handler,), {"starts": []})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}/set.tar.gz"
        handler.archive = Archive(address, len(CONTENT), md5(CONTENT), "set")
        yield handler
        running.shutdown()
        thread.join()


def names_in(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def error_message(call, *arguments, **options):
    """Return the one line with which a call is refused."""
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_archive_is_downloaded_and_unpacked_once(server, tmp_path):
    for _ in range(2):
        assert fetch(server.archive, tmp_path) == tmp_path / "set"
    assert names_in(tmp_path) == ["set", "set.tar.gz", "set/a.txt", "set/b", "set/b/c.bin"]
    assert server.starts == [0]


def test_an_interrupted_download_is_resumed(server, tmp_path):
    server.max_bytes = len(CONTENT) // 3 + 1
    fetch(server.archive, tmp_path)
    assert server.starts == [0, server.max_bytes, 2 * server.max_bytes]


def test_a_killed_download_is_resumed_by_the_next_run(server, tmp_path):
    (tmp_path / "set.tar.gz.partial").write_bytes(CONTENT[:1000])
    fetch(server.archive, tmp_path)
    assert server.starts == [1000]


def test_a_server_without_ranges_sends_the_whole_file(server, tmp_path):
    server.ranges = False
    (tmp_path / "set.tar.gz.partial").write_bytes(CONTENT[:1000])
    fetch(server.archive, tmp_path)
    assert (tmp_path / "set.tar.gz").read_bytes() == CONTENT


def test_a_truncated_download_is_reported_and_kept(server, tmp_path):
    server.content = CONTENT[:2000]
    message = error_message(fetch, server.archive, tmp_path)
    assert f"2,000 of {len(CONTENT):,} bytes" in message
    assert names_in(tmp_path) == ["set.tar.gz.partial"]


@pytest.mark.parametrize("content", [bytes(len(CONTENT)), CONTENT + b"more"])
def test_a_wrong_download_is_reported_and_deleted(server, tmp_path, content):
    server.content = content
    message = error_message(fetch, server.archive, tmp_path)
    assert ("MD5" if len(content) == len(CONTENT) else f"has {len(content):,} bytes") in message
    assert names_in(tmp_path) == []


def test_without_a_network_the_message_tells_how_to_download_by_hand(tmp_path):
    archive = Archive(NOWHERE, len(CONTENT), md5(CONTENT), "set")
    message = error_message(fetch, archive, tmp_path)
    for part in (f"{len(CONTENT):,} bytes", md5(CONTENT), NOWHERE, str(archive.file(tmp_path))):
        assert part in message
    archive.file(tmp_path).write_bytes(CONTENT)
    assert (fetch(archive, tmp_path) / "a.txt").is_file()


def test_a_server_that_is_not_a_web_server_is_reported(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def respond():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"log in first\r\n\r\n")

        thread = threading.Thread(target=respond)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/set.tar.gz"
        assert "could not be downloaded" in error_message(fetch, Archive(address, 9, "", "set"), tmp_path)
        thread.join()


def test_a_wrong_file_put_in_place_by_hand_is_reported_and_kept(tmp_path):
    archive = Archive(NOWHERE, len(CONTENT), md5(CONTENT), "set")
    (tmp_path / "set.tar.gz").write_bytes(CONTENT[:-1] + b"x")
    assert "MD5" in error_message(fetch, archive, tmp_path)
    (tmp_path / "set.tar.gz").write_bytes(CONTENT[:-1])
    assert f"{len(CONTENT) - 1:,} bytes" in error_message(fetch, archive, tmp_path)
    assert names_in(tmp_path) == ["set.tar.gz"]


@pytest.mark.parametrize(
    "content",
    [CONTENT[:4000], packed({"other/a.txt": b""}), packed({"set/a.txt": b"", "../evil": b""}), b"not an archive"],
    ids=["truncated", "another folder", "outside the folder", "not an archive"],  # archives contain the time
)
def test_an_archive_that_cannot_be_unpacked_leaves_nothing(tmp_path, content):
    file = tmp_path / "in" / "set.tar.gz"
    file.parent.mkdir()
    file.write_bytes(content)
    assert "cannot be unpacked" in error_message(unpack, file, file.with_name("set"))
    assert names_in(tmp_path) == ["in", "in/set.tar.gz"]


def test_an_interrupted_unpacking_leaves_no_folder(tmp_path, monkeypatch):
    (tmp_path / "set.tar.gz").write_bytes(CONTENT)
    extract, calls = tarfile.TarFile.extract, []

    def interrupted(self, path, **options):
        for member in self:
            extract(self, member, path, filter="data")
            calls.append(member)
            if len(calls) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, "extractall", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "set.tar.gz", tmp_path / "set")
    assert names_in(tmp_path) == ["set.tar.gz"]
    monkeypatch.undo()
    (tmp_path / "set.partial" / "set").mkdir(parents=True)  # left by a killed process
    (tmp_path / "set.partial" / "set" / "old.txt").touch()
    unpack(tmp_path / "set.tar.gz", tmp_path / "set")
    assert names_in(tmp_path) == ["set", "set.tar.gz", "set/a.txt", "set/b", "set/b/c.bin"]


def python2_batch(labels, pixels, fortran=False):
    """Return a batch file of CIFAR-10 as cPickle wrote it: labels in parts, pixels as one string."""
    rows = b"".join(bytes((0x4B, n)) for n in labels)
    head = b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05("
    shape = b"(K\x01M" + struct.pack("<H", len(pixels)) + b"M\x00\x0c\x86"
    array = (
        b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\tU\x01b\x87Rq\n"
        + shape + b"cnumpy\ndtype\nq\x0bU\x02u1K\x00K\x01\x87Rq\x0c"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )  # fmt: skip
    content = pixels.tobytes("F" if fortran else "C")
    flag = b"\x88" if fortran else b"\x89"
    half = len(rows) // 4 * 2
    end = b"tbU\tfilenamesq\r]q\x0e(U\x05a.pngq\x0fU\x05b.pngq\x10eu."
    return (
        head
        + rows[:half]
        + b"e("
        + rows[half:]
        + b"e"
        + array
        + flag
        + b"T"
        + struct.pack("<i", len(content))
        + content
        + end
    )


@pytest.fixture
def cifar(tmp_path):
    """Write both versions of a tiny CIFAR-10; returns their archives, training labels and training pixels."""
    random = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    labels, pixels = random.integers(0, 10, (6, 4)), random.integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    sums, both = {}, (tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-10-batches-py")
    for folder in both:
        folder.mkdir()
    for i, name in enumerate(names):
        rows = np.concatenate([labels[i][:, None].astype(np.uint8), pixels[i]], axis=1)
        (both[0] / f"{name}.bin").write_bytes(rows.tobytes())
        content = python2_batch(labels[i], pixels[i], fortran=i == 2)
        (both[1] / name).write_bytes(content)
        sums[name] = md5(content)
    archives = [replace(archive, files=sums if archive.files else {}) for archive in downloads.CIFAR10]
    return archives, labels[:5].reshape(-1), pixels[:5].reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("version", [0, 1])
def test_both_versions_of_cifar10_are_read(cifar, tmp_path, version):
    archives, labels, pixels = cifar
    dataset = cifar10("train", 64, root=tmp_path, archives=archives[version:][:1])
    assert np.array_equal(dataset.images.numpy(), pixels)
    assert dataset.labels.tolist() == labels.tolist()
    assert cifar10("test", 16, root=tmp_path, archives=archives).images.shape == (4, 3, 16, 16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::numpy.exceptions.VisibleDeprecationWarning")
def test_cifar10_equals_torchvision(cifar, tmp_path, monkeypatch):
    archives, _, _ = cifar
    kind = torchvision.datasets.CIFAR10
    sums = archives[1].files
    monkeypatch.setattr(kind, "train_list", [[n, sums[n]] for n in sums if n.startswith("data")])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "_load_meta", lambda self: None)
    theirs, ours = kind(tmp_path, train=True), cifar10("train", 32, root=tmp_path, archives=archives[1:])
    assert np.array_equal(theirs.data.transpose(0, 3, 1, 2), ours.images.numpy())
    assert theirs.targets == ours.labels.tolist()


def test_a_damaged_batch_is_reported_and_never_executed(cifar, tmp_path):
    archives, _, _ = cifar
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    evil = b"cos\nmkdir\n(S'" + str(tmp_path / "pwned").encode() + b"'\ntR."
    batch.write_bytes(evil)
    assert f"{batch} differs" in error_message(cifar10, "train", 32, root=tmp_path, archives=archives[1:])
    known = replace(archives[1], files=archives[1].files | {"data_batch_1": md5(evil)})
    with pytest.raises(ValueError, match="labels"):
        cifar10("train", 32, root=tmp_path, archives=[known])
    assert not (tmp_path / "pwned").exists()
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"x" * 3000)
    assert "truncated" in error_message(cifar10, "test", 32, root=tmp_path, archives=archives)


@pytest.fixture
def stl(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    random, sums = np.random.default_rng(0), {}
    for part, n in (("train", 3), ("unlabeled", 5), ("test", 2)):
        for name, content in (("X", random.bytes(n * 27648)), ("y", bytes(range(1, n + 1)))):
            if (part, name) != ("unlabeled", "y"):
                (folder / f"{part}_{name}.bin").write_bytes(content)
                sums[f"{part}_{name}.bin"] = md5(content)
    (folder / "class_names.txt").write_text("\n".join(downloads.STL10_CLASSES))
    return replace(downloads.STL10, files=sums)


def test_stl10_equals_torchvision(stl, tmp_path, monkeypatch):
    kind = torchvision.datasets.STL10
    pair = lambda *names: [[name, stl.files[name]] for name in names]  # noqa: E731
    monkeypatch.setattr(kind, "train_list", pair("train_X.bin", "train_y.bin", "unlabeled_X.bin"))
    monkeypatch.setattr(kind, "test_list", pair("test_X.bin", "test_y.bin"))
    for split in ("train", "test"):
        ours, theirs = stl10(split, 300, root=tmp_path, archive=stl), kind(tmp_path, split=split)
        assert np.array_equal(ours.images.numpy(), theirs.data)
        assert ours.labels.tolist() == theirs.labels.tolist()
    ours = stl10_unlabeled("train", 96, root=tmp_path, archive=stl)
    assert np.array_equal(ours.images.numpy(), kind(tmp_path, split="unlabeled").data)
    assert ours.labels is None
    assert stl10_unlabeled("test", 32, root=tmp_path, archive=stl).images.shape == (2, 3, 32, 32)
    assert "train, test, unlabeled" in error_message(stl10, "val", 32, root=tmp_path)


def test_imagenette_equals_torchvision(tmp_path):
    for split in ("train", "val"):
        for i, kind in enumerate(downloads.IMAGENETTE_CLASSES):
            write_image(tmp_path / "imagenette2-320" / split / kind / f"{i}.JPEG", seed=i)
    ours, theirs = imagenette("train", 16, root=tmp_path), torchvision.datasets.Imagenette(tmp_path, "train", "320px")
    assert ours.labels.tolist() == [label for _, label in theirs]
    assert ours.classes == tuple(names[0] for names in theirs.classes)
    assert len(imagenette("test", 400, root=tmp_path)) == 10  # a version that is present is preferred to a larger one


def test_the_smallest_sufficient_imagenette_is_downloaded(tmp_path):
    for size, name in (
        (64, "-160.tgz"),
        (160, "-160.tgz"),
        (161, "-320.tgz"),
        (256, "-320.tgz"),
        (448, "imagenette2.tgz"),
    ):
        archives = {
            side: replace(a, address=f"http://127.0.0.1:9/{a.name}") for side, a in downloads.IMAGENETTE.items()
        }
        assert name in error_message(imagenette, "train", size, root=tmp_path, archives=archives)


@pytest.fixture
def animals(tmp_path):
    base, lines = tmp_path / "oxford-iiit-pet", []
    (base / "annotations" / "trimaps").mkdir(parents=True)
    for i, name in enumerate(("Abyssinian_1", "american_bulldog_10", "Abyssinian_2")):
        write_image(base / "images" / f"{name}.jpg", seed=i)
        trimap = np.full((20, 24), 2, dtype=np.uint8)
        trimap[5:15, 6:18], trimap[10, 8:12] = 1, 3
        Image.fromarray(trimap).save(base / "annotations" / "trimaps" / f"{name}.png")
        lines.append(f"{name} {1 + i % 2} 1 1")
    for split in ("trainval", "test"):
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_pets_equal_torchvision_with_their_masks(animals):
    ours = pets("train", 20, root=animals)
    theirs = torchvision.datasets.OxfordIIITPet(animals, target_types=["category", "segmentation"])
    assert ours.classes == tuple(theirs.classes)
    for i, (image, (label, trimap)) in enumerate(theirs):
        assert ours.labels[i] == label
        assert np.array_equal(ours.images[i].permute(1, 2, 0).numpy(), np.asarray(image)[:, 2:22])
        assert np.array_equal(ours.masks[i].numpy(), np.asarray([0, 1, 0, 2])[np.asarray(trimap)[:, 2:22]])


def test_a_malformed_list_and_a_missing_mask_of_pets_are_reported(animals, capsys):
    known = animals / "oxford-iiit-pet" / "annotations"
    (animals / "oxford-iiit-pet" / "images" / "Abyssinian_1.jpg").unlink()
    assert pets("test", 8, root=animals).labels.tolist() == [1, 0]
    assert "1 of 3 files" in capsys.readouterr().out
    (known / "trimaps" / "Abyssinian_2.png").unlink()
    assert "Abyssinian_2.png is missing" in error_message(pets, "train", 8, root=animals)
    (known / "test.txt").write_text("Abyssinian_2 1 1 1\nAbyssinian\n")
    assert "test.txt, line 2: " in error_message(pets, "test", 8, root=animals)


def test_a_folder_of_cifar10_equals_the_published_files(cifar, tmp_path):
    archives, labels, pixels = cifar
    for i, (label, image) in enumerate(zip(labels, pixels)):
        file = tmp_path / "own" / "train" / downloads.CIFAR10_CLASSES[label] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
    # Without a test part, a tenth of the images would become the test split.
    shutil.copytree(file.parent, tmp_path / "own" / "test" / file.parent.name)
    own, theirs = (
        load_dataset(f"folder:{tmp_path / 'own'}", "train", 64),
        cifar10("train", 64, root=tmp_path, archives=archives),
    )
    order = theirs.labels.argsort(stable=True)
    assert torch.equal(own.images, theirs.images[order])
    assert [own.classes[i] for i in own.labels] == [theirs.classes[i] for i in theirs.labels[order]]


def test_names_lead_to_their_data_sets(animals):
    assert len(load_dataset("pets", "train", 8, root=animals)) == 3
    assert "did you mean 'imagenette'" in error_message(load_dataset, "imagenet", "train", 8)
    assert len(load_dataset(f"folder:{class_folders(animals / 'own', train=2)}", "train", 8).classes) == 2


def test_addresses_and_checksums_equal_torchvision():
    sets = torchvision.datasets
    binary, python = downloads.CIFAR10
    assert (python.address, python.md5) == (sets.CIFAR10.url, sets.CIFAR10.tgz_md5)
    assert python.files == dict(sets.CIFAR10.train_list + sets.CIFAR10.test_list)
    assert (downloads.STL10.address, downloads.STL10.md5) == (sets.STL10.url, sets.STL10.tgz_md5)
    assert downloads.STL10.files == dict(sets.STL10.train_list + sets.STL10.test_list)
    assert {(a.address, a.md5) for a in downloads.IMAGENETTE.values()} == set(sets.Imagenette._ARCHIVES.values())
    assert tuple((a.address, a.md5) for a in downloads.PETS) == sets.OxfordIIITPet._RESOURCES
    assert choose_archive([binary, python], downloads.DOWNLOAD_DIR / "nowhere") is binary
