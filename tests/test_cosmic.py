"""tasks/cosmic.py: what is simulated looks like what it names; the files are read as they are."""

import time

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import DataLoader

from tasks import cosmic, metrics

SKY = [50.0, 70.0]  # of the two exposures of the small files
FOLDERS = ("f435w/10342/3", "f435w/12058/1b")


def test_simulated_form_and_seeds():
    x, y = cosmic.simulate(8, [5, 0])
    assert x.shape == y.shape == (8, 1, 128, 128) and x.dtype == y.dtype == np.float32
    assert np.isfinite(x).all() and set(np.unique(y[~np.isnan(y)])) == {0, 1}
    again, other = cosmic.simulate(8, [5, 0]), cosmic.simulate(8, [5, 1])
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1], equal_nan=True)
    assert not np.array_equal(x, other[0]) and not np.array_equal(y, other[1], equal_nan=True)
    record = cosmic.TASK
    assert record["x_shape"] == x.shape[1:] and record["y_shape"] == y.shape[1:]
    assert record["loss"] is metrics.bce and record["metric"] is metrics.auroc


def test_deposit_adds_up_what_lies_inside():
    rows, columns = np.array([[0], [3], [-1]]), np.array([[1, 1, 4, -2]])
    got = cosmic.deposit((4, 4), (rows, columns), np.array([[1.0], [2.0], [4.0]]))
    want = np.zeros((4, 4))
    want[0, 1], want[3, 1] = 2, 4
    np.testing.assert_array_equal(got, want)


def test_rays_have_the_published_number_size_and_charge():
    charge = cosmic.rays(np.full(60, 1000.0), np.random.default_rng(0))
    assert charge.shape == (60, 128, 128) and charge.min() >= 0
    # the mean of a Moyal law is 1.2704 scales above its peak; of 1 / cos(zenith), 2 without the
    # cut at 40 pixels, 1.975 with it; 3 % of the tracks are 25 pixels long instead
    expected = 60 * (900 + 150 * 1.2704) * (0.97 * 1.975 + 0.03 * 25.02)
    assert charge.sum(axis=(1, 2)).mean() == pytest.approx(expected, rel=0.06)
    assert 0.015 < (charge > 40).mean() < 0.03  # of the pixels in 1000 s: ACS ISR 2002-07
    sizes = [np.bincount(ndimage.label(c > 40, np.ones((3, 3)))[0].ravel())[1:] for c in charge]
    assert np.bincount(np.concatenate(sizes)).argmax() == 4  # pixels, likewise


def test_rays_come_from_everywhere_and_follow_the_exposure():
    seconds = np.repeat([300.0, 1200.0], 60)
    charge = cosmic.rays(seconds, np.random.default_rng(1))
    short, long = charge[:60].sum(), charge[60:].sum()
    assert long / short == pytest.approx(4, rel=0.25)
    down, right = (np.abs(np.diff(charge, axis=axis)).sum() for axis in (1, 2))
    assert down / right == pytest.approx(1, rel=0.05)
    corners = charge.reshape(120, 2, 64, 2, 64).sum(axis=(0, 2, 4)) / charge.sum()
    assert corners == pytest.approx(np.full((2, 2), 0.25), abs=0.03)


def test_scene_is_wider_than_the_rays():
    rng = np.random.default_rng(2)
    scene = np.stack([cosmic.stars(rng) for _ in range(20)])
    rays = cosmic.rays(np.full(20, 800.0), rng)
    width = []
    for image in (scene, rays):
        peak = (ndimage.maximum_filter(image, (0, 9, 9)) == image) & (image > 300)
        width.append(np.median(ndimage.uniform_filter(image, (0, 3, 3))[peak] / image[peak]))
    assert width[0] > 1.2 * width[1]  # a star fills the pixels around it, a track its line


def test_masks_follow_the_charge_and_ignore_what_is_full_or_broken():
    x, y = cosmic.simulate(60, 0)
    assert 0.02 < np.nanmean(y) < 0.045
    assert 0.0008 < np.isnan(y).mean() < 0.002
    full = x > cosmic.SATURATED  # by the sky added later, which lifts a few over that were not full
    assert full.any() and np.isnan(y[full]).mean() > 0.8
    level = np.median(x, axis=(2, 3), keepdims=True)
    assert np.mean((x - level)[y == 1]) > 5 * np.mean((x - level)[y == 0])


def error(score, y):
    return metrics.auroc(torch.from_numpy(score.astype(np.float32)), torch.from_numpy(y))


def windows(x):
    """The 7 x 7 pixels around each and a 1: (n, 128, 128, 50)."""
    padded = np.pad(x[:, 0], ((0, 0), (3, 3), (3, 3)), mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), (1, 2)).reshape(-1, 49)
    return np.hstack([around, np.ones((len(around), 1))]).astype(np.float64)


def test_linear_filter_is_between_chance_and_perfect():
    (x, y), (x_test, y_test) = cosmic.simulate(24, [0, 0]), cosmic.simulate(16, [0, 1])
    known = ~np.isnan(y.ravel())
    A, b = windows(x)[known], y.ravel()[known]
    normal = A.T @ A
    weights = np.linalg.solve(normal + 1e-6 * np.trace(normal) / 50 * np.eye(50), A.T @ b)
    assert 0.1 < error((windows(x_test) @ weights).reshape(y_test.shape), y_test) < 0.35
    assert 0.1 < error(x_test, y_test) < 0.35  # brightness alone


def test_default_sizes_are_simulated_in_seconds():
    start = time.process_time()
    cosmic.simulate(30, 0)
    per_sample = (time.process_time() - start) / 30
    assert per_sample * sum(cosmic.TASK["sizes"].values()) < 30


def image(seed, planes=3, width=256):
    rng = np.random.default_rng(seed)
    masks = rng.random((planes - 1, width, width)) < 0.1
    return np.concatenate([rng.normal(100, 20, (1, width, width)), masks])


def write(root, split):
    """Two visits with two exposures of two images, as the tar has them; returns the paths."""
    names = []
    for k, folder in enumerate(FOLDERS):
        visit = root / "cosmic" / f"npy_{split}" / folder
        visit.mkdir(parents=True)
        np.save(visit / "sky.npy", np.array(SKY) + k)
        for exposure in (1, 2):
            for number in (0, 17):
                file = f"{exposure}_{number}.npy"
                np.save(visit / file, image(100 * k + 10 * exposure + number))
                names.append(f"./cosmic/npy_{split}/{folder}/{file}")
    array = np.empty(len(names), dtype=object)
    array[:] = names
    np.save(root / "cosmic" / f"{split}_dirs.npy", array)
    return names


def test_reads_the_real_layout(tmp_path):
    names = write(tmp_path, "test")
    data = cosmic.read(tmp_path, "test")
    assert len(data) == len(names) == 8
    for i, name in enumerate(names):
        content = np.load(tmp_path / name)[:, 64:192, 64:192]
        x, y = data[i]
        assert x.shape == y.shape == (1, 128, 128) and x.dtype == y.dtype == torch.float32
        known = content[2] == 0
        np.testing.assert_array_equal(y[0].isnan().numpy(), ~known)
        np.testing.assert_array_equal(y[0].numpy()[known], content[1][known])
        added = x[0].double().numpy() - content[0]
        sky = SKY[int(name.split("/")[-1][0]) - 1] + FOLDERS.index("/".join(name.split("/")[3:6]))
        assert np.ptp(added) < 1e-3 and -0.9 <= added.mean() / sky <= 3
        assert torch.equal(data[i][0], x) and torch.equal(cosmic.read(tmp_path, "test")[i][0], x)


def test_training_images_get_another_sky_each_time(tmp_path):
    names = write(tmp_path, "train")
    np.save(tmp_path / "cosmic" / "train_dirs.npy", names)  # numpy's fixed-width strings will do
    data = cosmic.read(tmp_path, "train")
    torch.manual_seed(0)
    first = [float(data[3][0].mean()) for _ in range(200)]
    torch.manual_seed(0)
    assert first == [float(data[3][0].mean()) for _ in range(200)]
    share = (np.array(first) - np.load(tmp_path / names[3])[0, 64:192, 64:192].mean()) / SKY[1]
    assert -0.9 <= share.min() < -0.7 and 2.8 < share.max() <= 3.001
    assert share.mean() == pytest.approx(1.05, abs=0.25)
    x, y = next(iter(DataLoader(data, batch_size=8)))
    assert x.shape == y.shape == (8, 1, 128, 128)
    assert torch.isfinite(metrics.bce(torch.zeros_like(y), y))


def test_images_without_an_ignore_plane_are_all_known(tmp_path):
    names = write(tmp_path, "test")
    np.save(tmp_path / names[0], image(0, planes=2, width=192))
    assert not cosmic.read(tmp_path, "test")[0][1].isnan().any()


def with_value(plane, value):
    array = image(0)
    array[plane, 100, 100] = value
    return array


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (image(0, width=191), r"expected numbers \(3, W, W\).*\(3, 191, 191\)"),
        (image(0)[:, :200], r"\(3, 200, 256\)"),
        (image(0, planes=4), r"\(4, 256, 256\)"),
        (image(0)[0], r"\(256, 256\)"),
        (image(0).astype("U9"), "got ndarray"),
        ({"image": image(0)}, "got dict"),
        (with_value(0, np.nan), "not finite"),
        (with_value(1, 2), "not 0/1"),
        (with_value(2, 0.5), "not 0/1"),
    ],
)
def test_refuses_other_images(content, message, tmp_path):
    name = write(tmp_path, "test")[2]
    np.save(tmp_path / name, content)
    data = cosmic.read(tmp_path, "test")
    with pytest.raises(ValueError, match=f"2_0.npy: .*{message}") as found:
        data[2]
    assert "\n" not in str(found.value)


def test_refuses_cut_images(tmp_path):
    path = tmp_path / write(tmp_path, "test")[0]
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="1_0.npy: not a readable"):
        cosmic.read(tmp_path, "test")[0]


@pytest.mark.parametrize("sky", [np.array([50.0]), np.array([50.0, np.nan]), np.ones((2, 2)), "x"])
def test_refuses_other_skies(sky, tmp_path):
    path = tmp_path / write(tmp_path, "test")[2]
    np.save(path.with_name("sky.npy"), sky)
    with pytest.raises(ValueError, match="sky.npy: expected a list of finite.*exposure to 2"):
        cosmic.read(tmp_path, "test")[2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (np.zeros((2, 2)), r"got ndarray \(2, 2\)"),
        (np.array([], dtype=object), r"got ndarray \(0,\)"),
        (np.array([1.0]), "got np.float64"),
        (np.array(["./cosmic/npy_train/f435w/1/2/1_0.npy"]), "npy_train"),
        (np.array(["/cosmic/npy_test/f435w/1/2/1_0.npy"]), "'/cosmic"),
        (np.array(["./cosmic/npy_test/../../1_0.npy"]), r"\.\./"),
        (np.array(["./cosmic/npy_test/f435w/1/2/sky.npy"]), "sky.npy"),
        (np.array(["./cosmic/npy_test/f435w/1/2/0_1.npy"]), "0_1.npy"),
    ],
)
def test_refuses_other_lists(names, message, tmp_path):
    write(tmp_path, "test")
    np.save(tmp_path / "cosmic" / "test_dirs.npy", names)
    with pytest.raises(ValueError, match=f"test_dirs.npy: expected a list of paths.*{message}"):
        cosmic.read(tmp_path, "test")


def test_says_which_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_dirs.npy.*--data simulated"):
        cosmic.read(tmp_path, "train")
    names = write(tmp_path, "train")
    (tmp_path / names[5]).unlink()
    with pytest.raises(FileNotFoundError, match="1b/1_17.npy.*train_dirs.*--data simulated"):
        cosmic.read(tmp_path, "train")
    (tmp_path / names[0]).with_name("sky.npy").unlink()
    with pytest.raises(FileNotFoundError, match="3/sky.npy"):
        cosmic.read(tmp_path, "train")
