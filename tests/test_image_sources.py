"""tasks/sources/cifar10.py, tiny_imagenet.py and voc.py, on small files in the real layouts."""

import hashlib
import importlib
import inspect
import pickle
import shutil
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from tasks.sources import cifar10, tiny_imagenet, voc

SOURCES = ("shapes", "cifar10", "tiny_imagenet", "voc")


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_all_image_sources_are_called_alike():
    calls = [importlib.import_module(f"tasks.sources.{name}").load for name in SOURCES]
    names = {tuple(inspect.signature(call).parameters) for call in calls}
    assert names == {("n", "size", "seed", "split", "root", "masks")}


# ---- CIFAR-10 ----


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """root/cifar-10-python.tar.gz with 5 x 8 + 20 images; torchvision believes it is the real one.

    Returns: root; {"train": (images, labels), "val": (images, labels)}.
    """
    root, rng, made = tmp_path / "data", np.random.default_rng(0), {}
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    root.mkdir()
    lists = {"train_list": [f"data_batch_{i}" for i in range(1, 6)], "test_list": ["test_batch"]}
    for which, names in lists.items():
        parts = []
        for k, name in enumerate(names):
            n = 8 if which == "train_list" else 20
            data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
            labels = [(k * n + i) % 10 for i in range(n)]
            (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}, 2))
            parts.append((data.reshape(n, 3, 32, 32), labels))
        made["train" if which == "train_list" else "val"] = (
            np.concatenate([part[0] for part in parts]),
            np.concatenate([part[1] for part in parts]),
        )
        hashes = [[name, md5(folder / name)] for name in names]
        monkeypatch.setattr(datasets.CIFAR10, which, hashes)
    meta = folder / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, 2))
    whole = {"filename": meta.name, "key": "label_names", "md5": md5(meta)}
    monkeypatch.setattr(datasets.CIFAR10, "meta", whole)
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    return root, made


@pytest.mark.parametrize("split", ["train", "val"])
def test_cifar10_gives_the_images_of_its_archive(split, cifar, capsys):
    root, made = cifar
    images, labels = made[split]
    x, y, classes = cifar10.load(20, 32, seed=1, split=split, root=root)
    assert (x.shape, x.dtype, y.dtype) == ((20, 3, 32, 32), np.float32, np.int64)
    assert np.bincount(y).tolist() == [2] * 10 and classes == list("abcdefghij")
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    found = np.rint(x * 255).astype(np.uint8)
    assert [known[image.tobytes()] for image in found] == y.tolist()
    assert len({image.tobytes() for image in found}) == 20, "an image occurs twice"
    np.testing.assert_array_equal(x, found / np.float32(255))
    assert capsys.readouterr().out == ""


def test_cifar10_follows_the_seed_and_scales_without_aliasing(cifar):
    root, _ = cifar
    a, b, c = (cifar10.load(10, 32, seed=s, root=root)[0] for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    small, large = (cifar10.load(10, size, root=root)[0] for size in (8, 64))
    assert small.shape == (10, 3, 8, 8) and large.shape == (10, 3, 64, 64)
    for scaled in (small, large):
        np.testing.assert_allclose(scaled.mean(axis=(2, 3)), a.mean(axis=(2, 3)), atol=0.04)
    # of white noise, the mean over 4 x 4 pixels keeps about a quarter of the deviation
    assert small.std() < 0.4 * a.std()


def test_cifar10_refuses_an_archive_with_another_checksum(cifar, monkeypatch):
    root, _ = cifar
    archive = root / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    before = md5(archive)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", None)
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz or .* is damaged, its md5") as e:
        cifar10.load(10, 32, root=root)
    assert "\n" not in str(e.value) and md5(archive) == before


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_cifar10_refuses_an_unpacked_file_with_another_checksum(name, cifar):
    root, _ = cifar
    cifar10.load(10, 32, root=root)
    with (root / "cifar-10-batches-py" / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="a file of cifar-10-batches-py is damaged"):
        cifar10.load(10, 32, root=root)


def test_cifar10_says_where_to_put_what_it_cannot_download(tmp_path):
    message = "cifar-10-python.tar.gz .170 MB.* cannot be had: no connection.*--source shapes"
    with pytest.raises(FileNotFoundError, match=message) as e:
        cifar10.load(10, 32, root=tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_cifar10_has_no_masks_and_no_more_images_than_it_has(cifar):
    root, _ = cifar
    with pytest.raises(ValueError, match="no masks; choose shapes or voc"):
        cifar10.load(10, 32, root=root, masks=True)
    with pytest.raises(ValueError, match="41 images asked for, but there are 40"):
        cifar10.load(41, 32, root=root)


def test_balanced_rows_are_different_and_even_as_far_as_there_are_any():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 50)
    rows = cifar10.balanced(labels, 30, np.random.default_rng(0))
    assert len(set(rows)) == 30 and np.bincount(labels[rows]).tolist() == [14, 3, 13]
    assert (np.diff(labels[rows]) < 0).any(), "sorted by class"
    with pytest.raises(ValueError, match="104 images asked for, but there are 103"):
        cifar10.balanced(labels, 104, np.random.default_rng(0))


# ---- Tiny ImageNet ----


def colour(k):
    """A colour for each class, which a JPEG keeps to within a few of 255."""
    return (k % 6 * 50, k // 6 % 6 * 50, k // 36 * 40)


@pytest.fixture
def tiny(tmp_path):
    """root/tiny-imagenet-200 with 2 training images and 1 validation image of each class."""
    folder, lines = tmp_path / "tiny-imagenet-200", []
    (folder / "val" / "images").mkdir(parents=True)
    for k in range(200):
        wnid = f"n{k:08d}"
        (folder / "train" / wnid / "images").mkdir(parents=True)
        picture = Image.new("RGB", (64, 64), colour(k))
        for i in range(2):
            picture.save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", "JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        place = 199 - k
        picture.save(folder / "val" / "images" / f"val_{place}.JPEG", "JPEG")
        lines.append(f"val_{place}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    grey = Image.new("L", (64, 64), 200)  # the real set has some
    grey.save(folder / "train" / "n00000007" / "images" / "n00000007_0.JPEG", "JPEG")
    grey.save(folder / "train" / "n00000007" / "images" / "n00000007_1.JPEG", "JPEG")
    return tmp_path


@pytest.mark.parametrize("split", ["train", "val"])
def test_tiny_imagenet_gives_the_images_of_its_classes(split, tiny):
    x, y, classes = tiny_imagenet.load(200, 16, seed=3, split=split, root=tiny)
    assert (x.shape, x.dtype, y.dtype) == ((200, 3, 16, 16), np.float32, np.int64)
    assert sorted(y) == list(range(200)) and classes[7] == "n00000007"
    want = np.array([colour(k) for k in y])
    if split == "train":
        want[y == 7] = 200
    np.testing.assert_allclose(255 * x.mean(axis=(2, 3)), want, atol=4)
    again, other = (tiny_imagenet.load(9, 16, s, split, tiny)[1] for s in (3, 4))
    assert np.array_equal(again, tiny_imagenet.load(9, 16, 3, split, tiny)[1])
    assert not np.array_equal(again, other)


def test_tiny_imagenet_reads_only_the_images_it_draws(tiny, monkeypatch):
    seen = []
    content = tiny_imagenet.content
    monkeypatch.setattr(
        tiny_imagenet, "content", lambda place, name: seen.append(name) or content(place, name)
    )
    tiny_imagenet.load(5, 16, root=tiny)
    assert len(seen) == 5


def zipped(root):
    """The folder as the zip file that is published, which leaves only that behind."""
    path = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((root / "tiny-imagenet-200").rglob("*")):
            archive.write(file, file.relative_to(root))
    (root / "tiny-imagenet-200").rename(root / "away")
    return path


@pytest.mark.parametrize("split", ["train", "val"])
def test_tiny_imagenet_is_the_same_from_its_zip_file(split, tiny, monkeypatch):
    x, y, classes = tiny_imagenet.load(30, 16, split=split, root=tiny)
    monkeypatch.setattr(tiny_imagenet, "MD5", md5(zipped(tiny)))
    again = tiny_imagenet.load(30, 16, split=split, root=tiny)
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1]) and classes == again[2]


def test_tiny_imagenet_refuses_a_zip_file_with_another_checksum(tiny):
    zipped(tiny)
    with pytest.raises(ValueError, match="tiny-imagenet-200.zip: not http.*md5 is 90528d7c"):
        tiny_imagenet.load(5, 16, root=tiny)


def test_tiny_imagenet_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tiny-imagenet-200.zip \(248 MB.*cs231n.*shapes"):
        tiny_imagenet.load(5, 16, root=tmp_path)
    with pytest.raises(ValueError, match="no masks; choose shapes or voc"):
        tiny_imagenet.load(5, 16, root=tmp_path, masks=True)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("split", "damage", "message"),
    [
        ("train", lambda f: (f / "train/n00000003").rename(f / "n00000003"), "199 classes"),
        (
            "train",
            lambda f: truncate(f / "train/n00000000/images/n00000000_1.JPEG"),
            "n00000000_1.JPEG: not a readable image .*truncated",
        ),
        ("val", lambda f: (f / "val/val_annotations.txt").unlink(), "no file val/val_annotations"),
        ("val", lambda f: (f / "val/val_annotations.txt").write_text("a b\n"), "is not lines of"),
        ("val", lambda f: (f / "val/val_annotations.txt").write_text(""), "is not lines of"),
        ("val", lambda f: (f / "val/images/val_0.JPEG").unlink(), "no file val/images/val_0.JPEG"),
        ("val", lambda f: (f / "val/images/val_9.JPEG").write_text("?"), "not a readable image"),
    ],
)
def test_tiny_imagenet_refuses_damaged_files(split, damage, message, tiny):
    damage(tiny / "tiny-imagenet-200")
    with pytest.raises(ValueError, match=message) as error:
        tiny_imagenet.load(400 if split == "train" else 200, 16, split=split, root=tiny)
    assert "\n" not in str(error.value)


# ---- VOC ----

FIRST = np.zeros((40, 60), dtype=np.uint8)  # a large cat (8), a small dog (12), an edge around
FIRST[10:30, 10:40], FIRST[12:28, 12:38], FIRST[0:4, 50:60] = 255, 8, 12
SECOND = np.full((60, 40), 20, dtype=np.uint8)  # nothing but a monitor


def save_mask(path, values):
    image = Image.fromarray(values)
    image.putpalette([n % 256 for n in range(768)])  # turns it into mode P, as the real ones are
    image.save(path)


@pytest.fixture
def devkit(tmp_path):
    """root/VOCdevkit/VOC2012 with two training images and one validation image."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for name, values, shade in (("a", FIRST, 50), ("b", SECOND, 150), ("c", FIRST, 250)):
        image = Image.new("RGB", values.shape[::-1], (shade, 0, shade))
        image.save(base / "JPEGImages" / f"{name}.jpg", "JPEG")
        save_mask(base / "SegmentationClass" / f"{name}.png", values)
    (base / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    (base / "ImageSets/Segmentation/val.txt").write_text("c\n")
    return tmp_path


def test_voc_gives_the_class_of_the_largest_object(devkit):
    x, y, classes = voc.load(2, 20, root=devkit)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((2, 3, 20, 20), np.float32, (2,), np.int64)
    assert sorted(classes[k] for k in y) == ["cat", "monitor"] and len(classes) == 20
    shade = np.where(y == classes.index("cat"), 50, 150)
    np.testing.assert_allclose(255 * x[:, 0].mean(axis=(1, 2)), shade, atol=4)
    order = {tuple(voc.load(2, 20, seed=s, root=devkit)[1]) for s in range(8)}
    assert len(order) == 2, "no seed gives another order"


def test_voc_masks_are_objects_background_and_unknown(devkit):
    x, y, _ = voc.load(1, 60, split="val", root=devkit, masks=True)
    assert (x.shape, y.shape, y.dtype) == ((1, 3, 60, 60), (1, 1, 60, 60), np.float32)
    rows = (2 * np.arange(60) + 1) * 40 // 120  # the row of FIRST below the middle of each of ours
    want = np.where(FIRST == 255, np.nan, FIRST > 0)[rows]
    np.testing.assert_array_equal(y[0, 0], want)
    assert np.isnan(y).any() and set(np.unique(y[~np.isnan(y)])) == {0.0, 1.0}


def test_voc_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"VOCtrainval_11.* \(2 GB.* https.*shapes"):
        voc.load(2, 20, root=tmp_path)
    (tmp_path / "VOCdevkit/VOC2012").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"train.txt; unpack https.*2 GB") as error:
        voc.load(2, 20, root=tmp_path)
    assert f"in {tmp_path}, or" in str(error.value)


def test_voc_is_unpacked_from_its_archive_if_that_is_the_published_one(devkit, monkeypatch):
    archive = devkit / voc.NAME
    with tarfile.open(archive, "w") as tar:
        tar.add(devkit / "VOCdevkit", "VOCdevkit")
    want = voc.load(2, 20, root=devkit)
    shutil.rmtree(devkit / "VOCdevkit")
    with pytest.raises(ValueError, match=f"md5 is not {voc.MD5} as published"):
        voc.load(2, 20, root=devkit)
    monkeypatch.setitem(voc.FILES, voc.NAME, replace(voc.FILES[voc.NAME], md5=md5(archive)))
    got = voc.load(2, 20, root=devkit)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "JPEGImages/a.jpg").unlink(), "no file .*a.jpg, though it is in the list"),
        (lambda f: truncate(f / "JPEGImages/b.jpg"), "b.jpg: not a readable image"),
        (lambda f: truncate(f / "SegmentationClass/b.png"), "b.png: not a readable image"),
        (lambda f: save_mask(f / "SegmentationClass/a.png", SECOND), r"for \(60, 40\) pixels"),
        (lambda f: save_mask(f / "SegmentationClass/b.png", SECOND + 1), "0..20 and 255, got 21"),
        (lambda f: save_mask(f / "SegmentationClass/b.png", 0 * SECOND), "b: no object is outl"),
        (lambda f: (f / "ImageSets/Segmentation/train.txt").write_text("\n"), "got none"),
        (lambda f: (f / "ImageSets/Segmentation/train.txt").write_text("a"), "VOC has 1; ask for"),
        (
            lambda f: Image.new("RGB", (40, 60)).save(f / "SegmentationClass/b.png"),
            "got mode RGB",
        ),
    ],
)
def test_voc_refuses_damaged_files(damage, message, devkit):
    damage(devkit / "VOCdevkit" / "VOC2012")
    with pytest.raises(ValueError, match=message) as error:
        voc.load(2, 20, root=devkit)
    assert "\n" not in str(error.value)
