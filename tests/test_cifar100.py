"""tasks/cifar100.py: the simulated images, the real ones, and the augmentation."""

import hashlib
import pickle
import tarfile
import time

import numpy as np
import pytest
import torch
from torchvision import datasets

import tasks
from tasks import cifar100
from tasks.augment import Augmented
from tasks.sources import shapes

OUTLINE = {name: k for k, name in enumerate(shapes.OUTLINES)}
TEXTURE = {name: k for k, name in enumerate(shapes.TEXTURES)}


@pytest.fixture(scope="module")
def simulated():
    return cifar100.simulate(1200, [0, 0])


def test_simulated_images_have_the_real_form(simulated):
    x, y = simulated
    assert x.shape == (1200, 3, 32, 32) and x.dtype == np.float32 and y.dtype == np.int64
    assert np.bincount(y).tolist() == [12] * 100 and (np.diff(y) < 0).any()
    assert x.min() >= 0 and x.max() <= 1 and 0.1 < x.std() < 0.4
    assert len(cifar100.simulate(7, 0)[0]) == 7


def test_simulated_images_follow_the_seed():
    a, b, c, d = (cifar100.simulate(50, seed) for seed in (3, 3, 4, [3, 1]))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert not np.array_equal(a[0], c[0]) and not np.array_equal(a[0], d[0])


def test_the_object_is_brighter_than_what_is_behind_it(simulated):
    x, y = simulated
    disc = x[y // 10 == OUTLINE["disc"]].mean(axis=1)
    brighter = disc[:, 8:24, 8:24].mean(axis=(1, 2)) - disc[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(
        1
    )
    assert brighter.mean() > 0.2
    hollow = x[y // 10 == OUTLINE["ring"]].mean(axis=1)
    assert hollow[:, 14:18, 14:18].mean() < disc[:, 14:18, 14:18].mean() - 0.1


def test_textures_differ_in_fineness(simulated):
    x, y = simulated
    steps = np.abs(np.diff(x.mean(axis=1), axis=2)).mean(axis=(1, 2))
    mean = {name: steps[y % 10 == k].mean() for name, k in TEXTURE.items()}
    assert mean["coarse waves"] < mean["waves"] < mean["fine waves"]
    assert mean["clouds"] < mean["fine stripes"]


def test_every_class_varies_around_its_hue(simulated):
    x, y = simulated
    middle = x[:, :, 10:22, 10:22].mean(axis=(2, 3))
    phase = np.exp(2j * np.pi * np.arange(3) / 3)
    got = (middle - middle.mean(axis=1, keepdims=True)) @ phase
    off = np.angle(got * np.exp(-2j * np.pi * cifar100.HUES[y])) / (2 * np.pi)  # in turns
    assert abs(off.mean()) < 0.02 and 0.1 < off.std() < 0.25


def test_difficulty_a_linear_model_beats_chance_and_is_far_from_perfect(simulated):
    (x, y), (x_test, y_test) = simulated, cifar100.simulate(1000, [0, 2])
    x, x_test = (part.reshape(len(part), -1).astype(float) - 0.5 for part in (x, x_test))
    gram = x @ x.T
    weights = np.linalg.solve(gram + 3 * np.trace(gram) / len(x) * np.eye(len(x)), np.eye(100)[y])
    accuracy = ((x_test @ x.T @ weights).argmax(axis=1) == y_test).mean()
    assert 0.06 < accuracy < 0.35


def test_simulation_is_fast():
    start = time.process_time()
    cifar100.simulate(sum(cifar100.TASK["sizes"].values()), 0)
    assert time.process_time() - start < 10


# ---- augmentation ----


def test_images_are_bytes_until_they_are_used():
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    data = cifar100.Images(images, np.array([5, 6]))
    x, y = data[1]
    assert len(data) == 2 and x.dtype == torch.float32 and int(y) == 6
    np.testing.assert_array_equal(x.numpy(), images[1].astype(np.float32) / 255)
    assert data.tensors[0].dtype == torch.uint8


def test_augmentation_is_a_crop_of_the_padded_image_or_of_its_mirror_image():
    image = np.random.default_rng(0).integers(1, 256, (1, 3, 32, 32), dtype=np.uint8)
    data = Augmented(cifar100.Images(image, np.array([0])))
    padded = np.pad(image[0], ((0, 0), (4, 4), (4, 4)))
    crops = {
        padded[:, top : top + 32, left : left + 32][:, :, ::step].tobytes(): (top, left, step)
        for top in range(9)
        for left in range(9)
        for step in (1, -1)
    }
    torch.manual_seed(0)
    seen = [crops[(data[0][0] * 255).round().byte().numpy().tobytes()] for _ in range(400)]
    top, left, step = (set(values) for values in zip(*seen, strict=True))
    assert top == left == set(range(9)) and step == {1, -1}
    assert 0.4 < np.mean([values[2] == 1 for values in seen]) < 0.6


def test_augmentation_follows_the_seed_of_torch():
    image = np.random.default_rng(0).integers(1, 256, (1, 3, 32, 32), dtype=np.uint8)
    data = Augmented(cifar100.Images(image, np.array([0])))
    looks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        looks.append(torch.stack([data[0][0] for _ in range(5)]))
    assert torch.equal(looks[0], looks[1]) and not torch.equal(looks[0], looks[2])
    assert not torch.equal(looks[0][0], looks[0][1])


@pytest.mark.parametrize("size", [None, 150])
def test_training_images_alone_are_augmented_and_only_if_asked_for(size):
    plain, other = (tasks.load_task("cifar100", train_size=size, augment=a) for a in (False, True))
    assert torch.equal(plain.train[3][0], plain.train[3][0])
    assert torch.equal(other.train.plain[3][0], plain.train[3][0])
    looks = torch.stack([other.train[3][0] for _ in range(8)])
    assert looks.shape == (8, 3, 32, 32) and looks.std(dim=0).max() > 0
    assert len(other.train) == len(plain.train) and other.train[3][1] == plain.train[3][1]
    for split in ("val", "test"):
        first, again = getattr(other, split)[0][0], getattr(other, split)[0][0]
        assert torch.equal(first, again) and torch.equal(first, getattr(plain, split)[0][0])
    for a, b in zip(tasks.statistics(plain), tasks.statistics(other), strict=True):
        assert torch.equal(a, b)  # of the images as they are


@pytest.mark.parametrize("name", ["satellite", "fsd50k", "darcy_2d"])
def test_what_has_no_class_to_keep_is_not_augmented(name):
    with pytest.raises(ValueError, match=f"'{name}' is not images with classes"):
        tasks.load_task(name, train_size=4 if name != "satellite" else 48, augment=True)


# ---- the real files ----


@pytest.fixture
def real(tmp_path, monkeypatch):
    """root/cifar100/cifar-100-python.tar.gz, which torchvision believes to be the real one.

    Returns: root; {"train": (images, fine labels), "test": ...}.
    """
    root, rng, made = tmp_path / "data", np.random.default_rng(0), {}
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (root / "cifar100").mkdir(parents=True)
    for name, n in (("train", 200), ("test", 30)):
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        fine = [int(label) for label in rng.permutation(n) % 100]
        entry = {"data": data, "fine_labels": fine, "coarse_labels": [k // 5 for k in fine]}
        (folder / name).write_bytes(pickle.dumps(entry, 2))
        made[name] = data.reshape(n, 3, 32, 32), fine
    names = {"fine_label_names": [str(k) for k in range(100)], "coarse_label_names": []}
    (folder / "meta").write_bytes(pickle.dumps(names, 2))
    archive = root / "cifar100" / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    md5 = lambda path: hashlib.md5(path.read_bytes()).hexdigest()  # noqa: E731
    kind = datasets.CIFAR100
    monkeypatch.setattr(kind, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(kind, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / "meta")})
    monkeypatch.setattr(kind, "tgz_md5", md5(archive))
    return root, made


def test_read_gives_the_real_images(real, capsys):
    root, made = real
    train, val, test = (cifar100.read(root, split) for split in cifar100.TASK["splits"])
    assert (len(train), len(val), len(test)) == (180, 20, 30)
    images, labels = made["test"]
    x, y = zip(*test, strict=True)
    np.testing.assert_array_equal(torch.stack(x).numpy(), images.astype(np.float32) / 255)
    assert x[0].dtype == torch.float32 and torch.stack(y).tolist() == labels
    images, labels = made["train"]
    np.testing.assert_array_equal(train.tensors[0].numpy(), images[:180])
    np.testing.assert_array_equal(val.tensors[0].numpy(), images[180:])
    assert train.tensors[1].tolist() + val.tensors[1].tolist() == labels
    assert capsys.readouterr().out == ""


def damage(path):
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: f.unlink(), FileNotFoundError, r"169 MB.*https.*cifar-100.*--data simulated"),
        (damage, ValueError, "cifar-100-python.tar.gz or a file of .* is damaged, its md5"),
        (lambda f: f.write_bytes(b""), ValueError, "is damaged, its md5"),
        (lambda f: f.write_text("<html>"), ValueError, "is damaged, its md5"),
    ],
)
def test_read_refuses_a_missing_or_damaged_archive(change, error, message, real):
    root, _ = real
    change(root / "cifar100" / "cifar-100-python.tar.gz")
    with pytest.raises(error, match=message) as caught:
        cifar100.read(root, "train")
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize("change", [damage, lambda f: f.unlink()])
def test_read_refuses_a_missing_or_damaged_member(name, change, real):
    root, _ = real
    cifar100.read(root, "train")
    change(root / "cifar100" / "cifar-100-python" / name)
    with pytest.raises(ValueError, match="a file of cifar-100-python is damaged"):
        cifar100.read(root, "train")


def test_the_record_is_complete():
    task = cifar100.TASK
    assert task["num_classes"] == 100 and task["x_shape"] == (3, 32, 32) and task["y_shape"] == ()
    assert task["sources"] == {"embedded": "shapes", "paper": "cifar10"}
    assert task["published"]["PaRe"] == 0.0625 and set(task["sizes"]) == {"train", "val", "test"}
    logits = torch.eye(100)[:4]
    assert task["metric"](logits, torch.arange(4)) == 0.0
    assert task["loss"](logits, torch.arange(4)).ndim == 0
