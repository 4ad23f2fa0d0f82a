"""NinaPro: muscles are simulated as they should be, the real arrays are turned and checked."""

import time

import numpy as np
import pytest

from tasks import ninapro


def write(tmp_path, x, label, split="train"):
    (tmp_path / "ninapro").mkdir(exist_ok=True)
    np.save(tmp_path / "ninapro" / f"ninapro_{split}.npy", x)
    np.save(tmp_path / "ninapro" / f"label_{split}.npy", label)


def test_simulated_shapes_and_shares():
    x, y = ninapro.simulate(360, 0)
    assert x.shape == (360, *ninapro.TASK["x_shape"]) and x.dtype == np.float32
    assert y.dtype == np.int64 and np.bincount(y).tolist() == [20] * 18
    assert np.isfinite(x).all() and x.min() >= 0  # rectified


def test_same_seed_same_data():
    (x, y), again, other = (ninapro.simulate(36, seed) for seed in ([0, 1], [0, 1], [0, 2]))
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0])


def test_muscle_noise_has_its_band_strength_and_neighbours():
    noise = ninapro.muscle_noise(np.random.default_rng(0), 400)
    assert noise.shape == (400, 16, 52) and noise.std() == pytest.approx(1, abs=0.01)
    assert noise[..., 0].std() == pytest.approx(1, abs=0.03)  # the filter was warm
    power = (np.abs(np.fft.rfft(noise * np.hanning(52))) ** 2).mean(axis=(0, 1))
    hertz = np.fft.rfftfreq(52, 1 / ninapro.RATE)
    assert power[hertz < 10].mean() < 0.01 * power[(hertz > 30) & (hertz < 85)].mean()
    corr = np.corrcoef(noise.transpose(1, 0, 2).reshape(16, -1))
    for ring in (corr[:8, :8], corr[8:, 8:]):
        assert np.allclose([ring[i, (i + 1) % 8] for i in range(8)], 0.3, atol=0.04)
        assert np.allclose([ring[i, (i + 3) % 8] for i in range(8)], 0, atol=0.04)
    assert np.abs(corr[:8, 8:]).max() < 0.04


def test_rest_is_quiet_and_each_gesture_has_its_own_pattern():
    x, y = ninapro.simulate(3600, 0)
    level = x.mean(axis=(1, 2, 3))
    quiet = ninapro.NOISE * np.sqrt(2 / np.pi)  # the mean of |N(0, NOISE)|
    assert level[y == 0].mean() == pytest.approx(quiet, rel=0.03)
    assert level[y == 0].mean() < 0.9 * min(level[y == k].mean() for k in range(1, 18))
    pattern = np.stack([x[y == k].mean(axis=(0, 1, 3)) for k in range(1, 18)]) - quiet
    pattern /= np.linalg.norm(pattern, axis=1, keepdims=True)
    likeness = pattern @ pattern.T
    assert likeness[np.triu_indices(17, 1)].max() < 0.999
    assert np.allclose(ninapro.U[0], ninapro.REST) and (ninapro.U >= 0).all()


def test_a_synergy_is_local_on_the_arm():
    W = ninapro.W.mean(axis=0)  # over people
    assert ninapro.W.shape == (10, 16, 6) and (ninapro.W > 0).all()
    for ring in (W[:8], W[8:]):
        top = ring.argmax(axis=0)
        opposite = ring[(top + 4) % 8, np.arange(6)]
        assert (opposite < 0.05 * ring.max(axis=0)).all()


def test_difficulty_a_linear_model_learns_a_part():
    (x, y), (x_test, y_test) = ninapro.simulate(1080, [0, 0]), ninapro.simulate(540, [0, 2])
    mean = x.mean(axis=0)
    a, a_test = ((part - mean).reshape(len(part), -1) for part in (x, x_test))
    ridge = np.linalg.solve(a.T @ a + 100 * np.eye(832), a.T @ np.eye(18)[y])
    error = ((a_test @ ridge).argmax(axis=1) != y_test).mean()
    assert 0.4 < error < 0.8  # 0.94 by chance; a small convolutional network: below 0.2


def test_simulation_is_fast():
    start = time.process_time()
    ninapro.simulate(1836, 0)
    assert time.process_time() - start < 3


def test_reads_the_real_layout(tmp_path):
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(40, 52, 16)), np.arange(40) % 18
    for split in ninapro.TASK["splits"]:
        write(tmp_path, x, label.astype(float), split)  # whole numbers of any type
        got, y = ninapro.read(tmp_path, split)
        assert got.shape == (40, 1, 16, 52) and got.dtype == np.float32 and got.flags.c_contiguous
        np.testing.assert_array_equal(got[:, 0], x.transpose(0, 2, 1).astype(np.float32))
        assert y.dtype == np.int64 and np.array_equal(y, label)


GOOD, LABELS = np.zeros((36, 52, 16)), np.arange(36) % 18


@pytest.mark.parametrize(
    "x, label, words",
    [
        (np.zeros((36, 16, 52)), LABELS, r"ninapro_train.npy: expected \(n, 52, 16\).*36, 16, 52"),
        (np.zeros((0, 52, 16)), LABELS[:0], r"ninapro_train.npy: .*\(0, 52, 16\)"),
        (np.full((36, 52, 16), np.nan), LABELS, "ninapro_train.npy: .*not finite"),
        (np.full((36, 52, 16), "a"), LABELS, "ninapro_train.npy: .*got <U1"),
        (np.array({"x": 1}, dtype=object), LABELS, "ninapro_train.npy: .*got object"),
        (GOOD, LABELS[:-1], r"label_train.npy: expected \(36,\).*\(35,\)"),
        (GOOD, LABELS + 1, "label_train.npy: .*other labels"),
        (GOOD, LABELS + 0.5, "label_train.npy: .*other labels"),
        (GOOD, LABELS[:, None], r"label_train.npy: .*\(36, 1\)"),
    ],
)
def test_damaged_content_is_refused(tmp_path, x, label, words):
    write(tmp_path, x, label)
    with pytest.raises(ValueError, match=words) as caught:
        ninapro.read(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="ninapro_val.npy.*--data simulated"):
        ninapro.read(tmp_path, "val")
    write(tmp_path, GOOD, LABELS)
    label = tmp_path / "ninapro" / "label_train.npy"
    label.write_bytes(label.read_bytes()[:-40])
    with pytest.raises(ValueError, match="label_train.npy: not a readable"):
        ninapro.read(tmp_path, "train")
    label.unlink()
    with pytest.raises(FileNotFoundError, match="label_train.npy.*--data simulated"):
        ninapro.read(tmp_path, "train")
