"""tasks/spherical.py: the geometry of the projection, the simulated images and the real ones."""

import gzip
import pickle
import time

import numpy as np
import pytest
import torch

from tasks import cifar100, spherical


@pytest.fixture(scope="module")
def simulated():
    return spherical.simulate(1200, [0, 0])


def plane(n=1):
    """Images whose channels are the coordinates x and y of the plane, and 1."""
    axis = (2 * np.arange(32) + 1) / 32 - 1
    x, y = np.meshgrid(spherical.HALF * axis, spherical.HALF * axis)
    return np.tile(np.stack([x, y, np.ones_like(x)]).astype(np.float32), (n, 1, 1, 1))


def test_the_grid_is_that_of_the_files():
    point = spherical.grid().reshape(60, 60, 3)
    np.testing.assert_allclose(np.linalg.norm(point, axis=2), 1, atol=1e-12)
    np.testing.assert_allclose(np.arccos(point[:, 0, 2]), np.pi * (2 * np.arange(60) + 1) / 120)
    np.testing.assert_allclose(np.arctan2(point[30, :30, 1], point[30, :30, 0])[15], np.pi / 2)


def test_points_eye_and_image_are_in_line():
    seen = spherical.project(plane(), np.eye(3)[None])[0].reshape(3, -1).T  # x, y, inside
    point = spherical.grid()
    inside = np.abs(seen[:, :2]).max(axis=1) < 1.4  # away from the edge of the image
    inside &= seen[:, 2] > 0.999
    eye = np.array([0, 0, spherical.EYE])
    met = np.column_stack([seen[inside, :2], -np.ones(inside.sum())])
    off = np.cross(met - eye, point[inside] - eye)
    assert inside.sum() > 500 and np.abs(off).max() < 1e-3
    assert (point[seen[:, 2] > 0, 2] < 0.1).all(), "the image lies around the south pole"
    assert (seen[-1, :2] ** 2).sum() < 0.01 and seen[0, 2] == 0


def test_turning_about_the_poles_rolls_the_columns():
    angle = 2 * np.pi * 7 / 60
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    images = np.random.default_rng(0).uniform(0, 1, (1, 3, 32, 32)).astype(np.float32)
    straight, turned = (spherical.project(images, r[None]) for r in (np.eye(3), turn))
    np.testing.assert_allclose(turned, np.roll(straight, -7, axis=3), atol=1e-3)


def test_rotations_put_the_middle_near_the_equator():
    r = spherical.rotations(4000, np.random.default_rng(0))
    np.testing.assert_allclose(
        r @ r.transpose(0, 2, 1), np.tile(np.eye(3), (4000, 1, 1)), atol=1e-9
    )
    np.testing.assert_allclose(np.linalg.det(r), 1)
    middle = r.transpose(0, 2, 1) @ [0, 0, -1]  # what is carried to the south pole
    latitude, azimuth = np.arcsin(middle[:, 2]), np.arctan2(-middle[:, 1], -middle[:, 0])
    for angle, half in ((latitude, spherical.LATITUDE), (azimuth, spherical.AZIMUTH)):  # uniform
        assert np.abs(angle).max() <= half
        np.testing.assert_allclose(angle.mean() / half, 0, atol=0.04)
        np.testing.assert_allclose((angle**2).mean() / half**2, 1 / 3, atol=0.02)
    np.testing.assert_allclose(r[:, 2] @ np.eye(3)[2], np.sin(-latitude), atol=1e-9)


def test_an_image_on_the_equator_keeps_its_shape():
    """Near the middle, the map is a scaling: a square in the image is a square on the grid."""
    image = np.zeros((1, 1, 96, 96), np.float32)
    image[:, :, 40:56, 40:56] = 1
    r = spherical.about(1, np.array([np.pi / 2])) @ spherical.about(2, np.array([-np.pi]))
    seen = spherical.project(image, r)[0, 0] > 0.5
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    height = np.ptp(rows) * np.pi / 60  # in radians: a row is pi / 60, a column 2 pi / 60
    width = np.ptp(columns) * 2 * np.pi / 60
    assert height == pytest.approx(width, abs=0.11) and 0.15 < height < 0.6
    assert abs(rows.mean() - 29.5) < 1 and abs(columns.mean() - 30) < 1


def test_simulated_images_have_the_real_form(simulated):
    x, y = simulated
    assert x.shape == (1200, 3, 60, 60) and x.dtype == np.float32 and y.dtype == np.int64
    assert np.bincount(y).tolist() == [12] * 100
    assert (x.min(axis=(1, 2, 3)) == 0).all() and (x.max(axis=(1, 2, 3)) == 1).all()
    assert np.array_equal(y, cifar100.simulate(1200, [0, 0])[1]), "labels are those of the images"


def test_images_lie_on_one_side_of_the_sphere(simulated):
    lit = (simulated[0] > 0).any(axis=1)
    area = np.sin(np.pi * (2 * np.arange(60) + 1) / 120)[:, None] * np.ones((60, 60))
    share = (lit * area).sum(axis=(1, 2)) / area.sum()  # the same wherever the image is
    np.testing.assert_allclose(share, share.mean(), rtol=0.08)
    across, down = lit.mean(axis=(0, 1)), lit.mean(axis=(0, 2))
    assert 25 <= across.argmax() <= 35 and across[:5].max() < 0.2  # the far side is dark
    assert down[20:40].min() > down[[0, -1]].max()


def test_simulated_images_follow_the_seed():
    a, b, c, d = (spherical.simulate(20, seed) for seed in (3, 3, 4, [3, 1]))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert not np.array_equal(a[0], c[0]) and not np.array_equal(a[0], d[0])


def test_difficulty_a_linear_model_beats_chance_and_is_far_from_perfect(simulated):
    (x, y), (x_test, y_test) = simulated, spherical.simulate(1000, [0, 2])
    x, x_test = (part.reshape(len(part), -1) - x.mean() for part in (x, x_test))
    gram = (x @ x.T).astype(float)
    weights = np.linalg.solve(gram + 3 * np.trace(gram) / len(x) * np.eye(len(x)), np.eye(100)[y])
    accuracy = ((x_test @ x.T @ weights).argmax(axis=1) == y_test).mean()
    assert 0.02 < accuracy < 0.2  # chance: 0.01, with a standard deviation of 0.003


def test_simulation_is_fast():
    start = time.process_time()
    spherical.simulate(sum(spherical.TASK["sizes"].values()), 0)
    assert time.process_time() - start < 10


# ---- the real file ----


def content(n=40, n_test=20):
    rng = np.random.default_rng(0)
    return {
        split: {
            "images": rng.integers(0, 256, (size, 3, 60, 60), dtype=np.uint8),
            "labels": rng.integers(0, 100, size),
        }
        for split, size in (("train", n), ("test", n_test))
    }


def save(root, made, protocol=2):
    path = root / "spherical" / "s2_cifar100.gz"
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wb", compresslevel=1) as file:
        pickle.dump(made, file, protocol)
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_read_gives_the_real_images(protocol, tmp_path):
    made = content()
    save(tmp_path, made, protocol)
    for split in spherical.TASK["splits"]:
        data, want = spherical.read(tmp_path, split), made[split]
        assert len(data) == len(want["labels"]) and data.tensors[0].dtype == torch.uint8
        x, y = zip(*data, strict=True)
        np.testing.assert_array_equal(torch.stack(x).numpy(), want["images"].astype("f4") / 255)
        assert x[0].dtype == torch.float32 and torch.stack(y).dtype == torch.int64
        assert torch.stack(y).tolist() == want["labels"].tolist()
    assert not list(tmp_path.rglob("*.pkl")), "the temporary file is left behind"


def changed(**entries):
    made = content()
    made["train"] |= entries
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([1, 2], "got something else for 'train'"),
        ({"test": content()["test"]}, "got something else for 'train'"),
        ({"train": {"images": np.zeros(3)}}, "got something else for 'train'"),
        (changed(images=np.zeros((40, 3, 60, 60))), "got images float64"),
        (changed(images=np.zeros((40, 60, 60, 3), np.uint8)), r"images uint8 \(40, 60, 60, 3\)"),
        (changed(images=np.zeros((0, 3, 60, 60), np.uint8)), r"images uint8 \(0,"),
        (changed(labels=np.zeros(39, int)), r"got labels int64 \(39,\)"),
        (changed(labels=np.full(40, np.nan)), "got labels float64"),
        (changed(labels=np.arange(40) + 61), "got labels 61..100"),
        (changed(labels=np.arange(40) - 1), "got labels -1..38"),
        (changed(labels=np.datetime64("2020-01-01")), "not a readable pickled array"),
    ],
)
def test_read_refuses_other_layouts(made, message, tmp_path):
    save(tmp_path, made)
    with pytest.raises(ValueError, match=f"s2_cifar100.gz: .*{message}") as error:
        spherical.read(tmp_path, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: f.unlink(), FileNotFoundError, "272 MB.*NAS-Bench-360.*--data simulated"),
        (lambda f: f.write_bytes(f.read_bytes()[:-999]), ValueError, "not a whole gzip file"),
        (lambda f: f.write_bytes(pickle.dumps(content())), ValueError, "not a whole gzip file"),
        (lambda f: f.write_bytes(gzip.compress(b"text")), ValueError, "not a readable pickled"),
        (lambda f: f.write_bytes(b""), ValueError, "not a readable pickled"),
    ],
)
def test_read_refuses_a_missing_or_damaged_file(change, error, message, tmp_path):
    change(save(tmp_path, content()))
    with pytest.raises(error, match=f"s2_cifar100.gz.*{message}") as caught:
        spherical.read(tmp_path, "test")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_record_is_complete():
    task = spherical.TASK
    assert task["num_classes"] == 100 and task["x_shape"] == (3, 60, 60) and task["y_shape"] == ()
    assert task["sources"] == {"embedded": "shapes", "paper": "tiny_imagenet"}
    assert task["published"]["PaRe"] == 0.2555 and set(task["sizes"]) == {"train", "val", "test"}
