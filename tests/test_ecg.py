"""ECG: rhythms are simulated as they should be, records are cut as published and never shared."""

import pickle
import time

import numpy as np
import pytest
import torch

from tasks import ecg


def records(count, seed=0):
    """count simulated records, and their classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    return [ecg.simulate_record(rng, label) for label in labels], labels


def write(tmp_path, content):
    (tmp_path / "ecg").mkdir(exist_ok=True)
    (tmp_path / "ecg" / "challenge2017.pkl").write_bytes(pickle.dumps(content))


def as_published(series, labels):
    data = np.empty(len(series), dtype=object)
    data[:] = series
    return {"data": data, "label": np.array(ecg.LABELS)[labels]}


@pytest.fixture(scope="module")
def simulated():
    return ecg.simulate(600, 0)


def test_simulated_shapes_and_shares(simulated):
    x, y = simulated
    assert x.shape == (600, *ecg.TASK["x_shape"]) and x.dtype == np.float32
    assert y.shape == (600,) and y.dtype == np.int64 and np.isfinite(x).all()
    share = ecg.COUNTS / ecg.STRIDE / (ecg.COUNTS / ecg.STRIDE).sum()
    np.testing.assert_allclose(np.bincount(y) / 600, share, atol=0.01)
    assert x.mean() == pytest.approx(0, abs=0.05) and x.std() == pytest.approx(1, abs=0.05)


def test_same_seed_same_data():
    (x, y), again, other = (ecg.simulate(31, seed) for seed in ([0, 1], [0, 1], [0, 2]))
    assert len(x) == 31 and np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0])
    assert len(np.unique(x[:, 0], axis=0)) == 31  # no window twice


def test_intervals_are_irregular_in_fibrillation_only():
    def variation(rhythm):
        rr = [ecg.intervals(np.random.default_rng(s), rhythm, 60) for s in range(60)]
        neighbours = np.mean([np.corrcoef(r[:-1], r[1:])[0, 1] for r in rr])
        return np.mean([r.std() / r.mean() for r in rr]), neighbours

    regular, irregular = variation("normal"), variation("fibrillation")
    assert regular[0] == pytest.approx(0.065, abs=0.01)  # mean of U(0.03, 0.10)
    assert irregular[0] == pytest.approx(0.165, abs=0.02)  # mean of U(0.08, 0.25)
    assert abs(irregular[1]) < 0.1  # one interval says nothing about the next
    slow = [60 / ecg.intervals(np.random.default_rng(s), "slow", 60).mean() for s in range(20)]
    assert 35 < min(slow) and max(slow) < 60


def test_beats_have_a_p_wave_except_in_fibrillation_and_extra_beats():
    rr, early = np.ones(8), np.arange(8) == 3
    height, angle, width = ecg.waves(np.random.default_rng(0), "ectopic", rr, early)
    assert (height[~early, 0] > 0).all() and height[3, 0] == 0
    assert height[3, 4] < 0 and width[3, 2] == pytest.approx(2.5 * width[0, 2])
    assert (ecg.waves(np.random.default_rng(0), "fibrillation", rr, early)[0][:, 0] == 0).all()
    np.testing.assert_allclose(np.degrees(angle), ecg.ANGLE)  # at 60 beats a minute
    fast = ecg.waves(np.random.default_rng(0), "normal", rr / 4, early)[1]
    assert fast[1] == pytest.approx(2 * angle[1]) and fast[4] == pytest.approx(2**0.5 * angle[4])


def test_a_clean_heartbeat_peaks_once_every_interval(monkeypatch):
    monkeypatch.setattr(ecg, "intervals", lambda rng, rhythm, beats: np.full(beats, 0.8))
    z = ecg.heartbeat(np.random.default_rng(1), "normal", 3000)
    top = z[1:-1] * (z[1:-1] > z[:-2]) * (z[1:-1] >= z[2:])
    peaks = np.flatnonzero(top > 0.9 * z.max())
    np.testing.assert_array_equal(np.diff(peaks), 240)  # 0.8 s at 300 Hz


def test_windows_are_cut_by_class_and_scaled_by_record():
    record = np.random.default_rng(0).normal(3, 7, 9000)
    for label, count in enumerate((16, 97, 32, 320)):
        cut = ecg.windows(record, label)
        assert cut.shape == (count, 1000) and cut.dtype == np.float32
    z = (record - record.mean()) / record.std()
    np.testing.assert_allclose(ecg.windows(record, 2)[3], z[750:1750], rtol=1e-5, atol=1e-6)
    assert len(ecg.windows(record[:1500], 0)) == 1  # a window at 500 would be the very last
    assert len(ecg.windows(record[:1501], 0)) == 2


def test_difficulty_a_linear_model_on_spectra_learns_something():
    def spectra(x):  # up to 60 Hz, and a column of ones
        log = np.log(np.abs(np.fft.rfft(x[:, 0]))[:, 1:200] + 1e-3)
        return np.column_stack([np.ones(len(x)), log])

    (x, y), (x_test, y_test) = ecg.simulate(900, [0, 0]), ecg.simulate(400, [0, 2])
    a = spectra(x)
    ridge = np.linalg.solve(a.T @ a + 1000 * np.eye(200), a.T @ np.eye(4)[y])
    out = torch.from_numpy(spectra(x_test) @ ridge).float()
    assert 0.25 < ecg.TASK["metric"](out, torch.from_numpy(y_test)) < 0.6
    always = torch.eye(4)[[3]].expand(400, 4)
    assert ecg.TASK["metric"](always, torch.from_numpy(y_test)) > 0.85


def test_simulation_is_fast():
    start = time.process_time()
    ecg.simulate(240, 0)
    assert time.process_time() - start < 1.5  # a tenth of the default sizes


def test_reads_the_real_layout_and_keeps_records_apart(tmp_path):
    series, labels = records(40)
    write(tmp_path, as_published(series, labels))
    order, owner = np.random.RandomState(0).permutation(40), {}
    for split, expected in (("test", order[:4]), ("val", order[4:8]), ("train", order[8:])):
        x, y = ecg.read(tmp_path, split)
        assert x.dtype == np.float32 and x.shape == (len(y), 1, 1000) and y.dtype == np.int64
        cut = [ecg.windows(series[i], labels[i]) for i in expected]
        np.testing.assert_array_equal(x[:, 0], np.concatenate(cut))
        np.testing.assert_array_equal(y, np.repeat(labels[expected], [len(c) for c in cut]))
        owner[split] = set(expected)
    assert len(owner["train"] | owner["val"] | owner["test"]) == 40


def broken(change):
    series, labels = records(12)
    content = as_published(series, labels)
    change(content)
    return content


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.pop("label"), "expected a pickled dict"),
        (lambda c: c.update(label=c["label"][:-1]), "12 series and 11 labels"),
        (lambda c: c.update(label=np.full(12, "N")), "of 1 classes"),
        (lambda c: c.update(label=np.array([*"NAO~X"] * 3)[:12]), "of 5 classes"),
        (lambda c: c.update(data=c["data"][:4], label=c["label"][:4]), "10 or more"),
        (lambda c: c.update(data=7), "a single value"),
        (lambda c: c["data"].__setitem__(5, np.arange(1000)), "series 5 has 1000"),
        (lambda c: c["data"].__setitem__(5, np.full(3000, np.nan)), "series 5 .* not finite"),
        (lambda c: c["data"].__setitem__(5, np.zeros(3000)), "series 5 .* all the same"),
        (lambda c: c["data"].__setitem__(5, np.ones((2, 3000))), "series 5 is not a row"),
        (lambda c: c["data"].__setitem__(5, "record"), "series 5 is not a row"),
    ],
)
def test_damaged_content_is_refused(tmp_path, change, words):
    write(tmp_path, broken(change))
    with pytest.raises(ValueError, match=rf"challenge2017.pkl: .*{words}") as caught:
        ecg.read(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="challenge2017.pkl.*--data simulated"):
        ecg.read(tmp_path, "train")
    write(tmp_path, as_published(*records(12)))
    file = tmp_path / "ecg" / "challenge2017.pkl"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match="challenge2017.pkl: not a readable pickled array"):
        ecg.read(tmp_path, "train")
