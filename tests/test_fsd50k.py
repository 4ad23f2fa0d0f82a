"""tasks/fsd50k.py: the log-mel feature, simulated clips, and small files in the real layout."""

import json
import time
import wave

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tasks import fsd50k

SECOND = np.arange(22050) / 22050
BANDS = fsd50k.mel_filters().argmax(axis=0) * 22050 / 1920  # Hz, where each band is highest


@pytest.fixture(scope="module")
def simulated():
    """Half the default training set and a test set, and the processor time of a clip."""
    start = time.process_time()
    train, test = fsd50k.simulate(500, [0, 0]), fsd50k.simulate(200, [0, 2])
    return train, test, (time.process_time() - start) / 700


# ---- the feature ----


def test_the_feature_is_what_torch_computes():
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 22050)).astype(np.float32)
    sound[1] *= np.exp(-30 * SECOND)  # its end is more than 80 dB down
    window = torch.hann_window(661)
    spectrum = torch.stft(torch.from_numpy(sound), 1920, 220, 661, window, return_complex=True)
    assert spectrum.shape == (3, 961, 101)  # reflected at the ends
    power = torch.einsum("nft,fm->nmt", spectrum.abs() ** 2, torch.tensor(fsd50k.mel_filters()))
    db = 10 * torch.log10(power.clamp(min=1e-10))
    db = torch.maximum(db, db.amax(dim=(1, 2), keepdim=True) - 80)
    db = db - db.mean(dim=(1, 2), keepdim=True)
    x = fsd50k.log_mel(sound)
    assert x.shape == (3, 1, 96, 102) and x.dtype == np.float32
    np.testing.assert_allclose(x[:, 0, :, :101], db.numpy(), atol=0.02)
    assert (x[..., 101] == 0).all() and np.ptp(x[1, ..., :101]) == pytest.approx(80, abs=0.01)


def test_the_filters_are_triangles_even_in_mel():
    filters = fsd50k.mel_filters()
    assert filters.shape == (961, 96) and 0 <= filters.min() and filters.max() <= 1
    mel = 2595 * np.log10(1 + BANDS / 700)
    assert np.abs(np.diff(mel[40:]) - mel[-1] / 96).max() < 8  # as even as the bins allow
    inside = slice(int(filters[:, 0].argmax()), int(filters[:, -1].argmax()))
    np.testing.assert_allclose(filters[inside].sum(axis=1), 1, atol=1e-5)


def test_a_tone_lies_in_its_band_and_silence_is_zero():
    for hertz in (300, 1000, 5000):
        x = fsd50k.log_mel(np.sin(2 * np.pi * hertz * SECOND)[None])
        assert BANDS[x[0, 0, :, 50].argmax()] == pytest.approx(hertz, rel=0.06)
    assert (fsd50k.log_mel(np.zeros((1, 22050))) == 0).all()


def test_loudness_does_not_matter():
    sound = np.random.default_rng(0).normal(0, 0.1, (2, 22050))
    np.testing.assert_allclose(fsd50k.log_mel(sound), fsd50k.log_mel(sound / 8), atol=1e-3)


# ---- simulated ----


def test_it_is_simulated_in_the_real_shape(simulated):
    (x, y), _, _ = simulated
    assert x.shape == (500, 1, 96, 102) and y.shape == (500, 200)
    assert x.dtype == np.float32 and y.dtype == np.float32 and np.isfinite(x).all()
    assert x.shape[1:] == fsd50k.TASK["x_shape"] and y.shape[1:] == fsd50k.TASK["y_shape"]
    assert set(np.unique(y)) == {0, 1} and np.abs(x.mean(axis=(1, 2, 3))).max() < 1e-3
    assert np.ptp(x, axis=(1, 2, 3)).max() <= 80.01 and (x[..., 101] == 0).all()


def test_it_follows_the_seed():
    a, b, c = (fsd50k.simulate(70, s) for s in (3, 3, [3, 1]))
    assert all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))
    assert not np.array_equal(a[0], c[0]) and not np.array_equal(a[1], c[1])


def test_the_default_sizes_are_simulated_quickly(simulated):
    assert simulated[2] * sum(fsd50k.TASK["sizes"].values()) < 30


def test_labels_form_a_tree_with_the_numbers_of_the_real_one(simulated):
    (_, y), _, _ = simulated
    leaf, pair, family = y[:, :144], y[:, 144:192], y[:, 192:]  # 144 leaves, 56 inner nodes
    assert np.array_equal(leaf.reshape(-1, 48, 3).max(axis=2), pair)
    assert np.array_equal(pair.reshape(-1, 8, 6).max(axis=2), family)
    assert leaf.sum(axis=1).min() == 1 and leaf.sum(axis=1).max() == 4
    assert 1.5 < leaf.sum(axis=1).mean() < 1.8  # 1 + Poisson(0.7) events, some of one leaf


def test_leaves_follow_zipfs_law(simulated):
    (_, y), (_, y_test), _ = simulated
    share = np.sort(fsd50k.PRIOR)[::-1]
    np.testing.assert_allclose(share / share[0], np.arange(1, 145) ** -0.7)
    counts = np.concatenate([y, y_test])[:, :144].sum(axis=0)
    assert np.corrcoef(counts, fsd50k.PRIOR)[0, 1] > 0.9


def leaves(family: str, register: int, envelope: str, n: int) -> np.ndarray:
    pair = fsd50k.FAMILIES.index(family) * 6 + register
    return np.full(n, pair * 3 + fsd50k.ENVELOPES.index(envelope))


def test_the_register_of_a_sound_is_the_middle_of_its_spectrum():
    rng = np.random.default_rng(0)
    for family in ("wind", "clicks", "siren", "whistle"):
        for register in (2, 4):
            sound = fsd50k.event(leaves(family, register, "steady", 12), rng)
            power = (np.abs(np.fft.rfft(sound)) ** 2).mean(axis=0)
            middle = np.searchsorted(power.cumsum() / power.sum(), 0.5)
            assert middle == pytest.approx(fsd50k.REGISTERS[register], rel=0.2)


def test_families_have_the_spectra_of_their_names():
    rng, pitch = np.random.default_rng(0), np.full((4, 1), 400, np.float32)
    at = {}
    for family in fsd50k.FAMILIES:
        sound = fsd50k.waveform(family, pitch, SECOND.astype(np.float32), rng)
        assert sound.shape == (4, 22050) and np.isfinite(sound).all()
        at[family] = np.abs(np.fft.rfft(sound)).mean(axis=0)
    for h in range(2, 11):  # partials at multiples of the pitch, with amplitudes 1/h
        assert at["hum"][400 * h] == pytest.approx(at["hum"][400] / h, rel=0.02)
    assert at["reed"][1200] == pytest.approx(at["reed"][400] / 3, rel=0.02)
    assert at["reed"][800] < 0.01 * at["reed"][400]
    sidebands = [400 + 560 * k for k in (1, 2, 3)]  # a modulator 1.4 times as fast as the carrier
    assert min(at["bell"][sidebands]) > 10 * np.median(at["bell"])
    assert at["whistle"][380:421].argmax() == 20
    assert np.flatnonzero(at["wind"] > at["wind"].max() / 4).std() > 10  # a band, not a line


def test_envelopes_differ_as_their_names():
    rng = np.random.default_rng(0)
    level = {}
    for envelope in fsd50k.ENVELOPES:
        sound = fsd50k.event(leaves("whistle", 3, envelope, 40), rng)
        level[envelope] = (sound.reshape(40, 50, 441) ** 2).mean(axis=2)  # in steps of 20 ms
    heard = {k: (v > v.max(axis=1, keepdims=True) / 4).sum(axis=1) for k, v in level.items()}
    assert heard["steady"].min() >= 18 and heard["struck"].max() < 12
    turns = {k: (np.diff(np.sign(np.diff(v, axis=1)), axis=1) < 0).sum(1) for k, v in level.items()}
    assert turns["trembling"].mean() > turns["struck"].mean() + 1


def ridge(x: np.ndarray, y: np.ndarray, x_new: np.ndarray, alpha: float) -> np.ndarray:
    """Predictions of a linear model with a quadratic penalty, in its dual form."""
    mean, level = x.mean(axis=0), y.mean(axis=0)
    x, x_new = x - mean, x_new - mean
    gram = x @ x.T + alpha * np.eye(len(x), dtype=x.dtype)
    return x_new @ x.T @ np.linalg.solve(gram, y - level) + level


def test_a_linear_model_beats_a_constant_but_is_far_from_perfect(simulated):
    (x, y), (x_test, y_test), _ = simulated
    out = ridge(x.reshape(len(x), -1), y, x_test.reshape(len(x_test), -1), 1e6)
    error = lambda out: fsd50k.TASK["metric"](torch.tensor(out), torch.tensor(y_test))  # noqa: E731
    constant, linear = error(np.zeros_like(y_test)), error(out.astype(np.float32))
    assert constant > 0.95 and 0.6 < linear < constant - 0.1


def test_the_loss_weighs_positives_ten_times():
    out, y = torch.zeros(2, 200), torch.ones(2, 200)
    assert fsd50k.TASK["loss"](out, y).item() == pytest.approx(10 * np.log(2), rel=1e-6)
    assert fsd50k.TASK["loss"](out, 1 - y).item() == pytest.approx(np.log(2), rel=1e-6)


# ---- real ----

# the clips of each csv file: their labels, how many chunks
MADE = {
    "tr": {"11": (["Bark", "Dog"], 3), "12": (["Rain"], 1)},
    "val": {"21": (["Dog"], 2)},
    "eval": {"31": (["Rain"], 2), "32": (["Bark", "Dog"], 1), "33": (["Rain", "Dog"], 3)},
}
NUMBERS = {"Bark": 7, "Dog": 0, "Rain": 199}


def write_wav(path, samples, rate=22050, channels=1, width=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", None))
        file.writeframes(samples.tobytes())


def write_files(root):
    """Clips of one second or more in the layout of the real files; returns all samples."""
    rng, folder, samples = np.random.default_rng(0), root / "fsd50k", {}
    (folder / "chunks").mkdir(parents=True)
    others = (f"label {i}" for i in range(200))
    numbers = {**NUMBERS}
    numbers.update({next(others): i for i in range(200) if i not in NUMBERS.values()})
    (folder / "chunks" / "lbl_map.json").write_text(json.dumps(numbers))
    for name, clips in MADE.items():
        chunks = "eval_chunks" if name == "eval" else "dev_chunks"
        rows = []
        for clip, (labels, count) in clips.items():
            for i in range(count):
                file = f"{chunks}/{clip}_{i:04d}.wav"
                samples[file] = rng.integers(-9000, 9000, 22050, dtype="<i2")
                write_wav(folder / file, samples[file])
                rows.append(f'data/{file},"{",".join(labels)}",{clip}')
        rng.shuffle(rows)
        (folder / "chunks" / f"{name}.csv").write_text("\n".join(["files,labels,ext", *rows]))
    return samples


def images(samples, clip):
    """The inputs of the chunks of a clip."""
    sound = np.stack([v for k, v in samples.items() if f"/{clip}_" in k]) / 32768
    return fsd50k.log_mel(sound.astype(np.float32))


def test_every_chunk_of_the_evaluated_clips_is_read(tmp_path):
    samples = write_files(tmp_path)
    data = fsd50k.read(tmp_path, "test")
    assert len(data) == 6 and data.groups.dtype == torch.int64
    assert sorted(data.groups.bincount().tolist()) == [1, 2, 3]
    for group in range(3):
        mine = [data[int(i)] for i in torch.nonzero(data.groups == group)]
        clip = {2: "31", 1: "32", 3: "33"}[len(mine)]
        got = {x.numpy().tobytes() for x, _ in mine}
        assert got == {x.tobytes() for x in images(samples, clip)}
        want = sorted(NUMBERS[name] for name in MADE["eval"][clip][0])
        assert all(torch.nonzero(y)[:, 0].tolist() == want for _, y in mine)
    x, y = next(iter(DataLoader(data, batch_size=6)))
    assert x.shape == (6, 1, 96, 102) and y.shape == (6, 200) and x.dtype == y.dtype
    assert len(fsd50k.read(tmp_path, "val")) == 2


def test_to_train_a_clip_is_one_of_its_chunks_by_the_seed(tmp_path):
    samples = write_files(tmp_path)
    data = fsd50k.read(tmp_path, "train")
    assert len(data) == 2 and data.groups.tolist() == [0, 1]
    i = next(i for i in range(2) if data[i][1][0] == 1)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append([data[i][0].numpy().tobytes() for _ in range(20)])
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {x.tobytes() for x in images(samples, "11")}


def test_only_the_first_chunk_is_read_before_it_is_asked_for(tmp_path):
    write_files(tmp_path)
    data = fsd50k.read(tmp_path, "test")
    path = data.folder / data.chunks[-1][0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"no file {path}; expected a wav file"):
        data[5]
    (data.folder / data.chunks[0][0]).unlink()
    with pytest.raises(FileNotFoundError, match="_chunks.*audio.zip.*--data simulated"):
        fsd50k.read(tmp_path, "test")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("lbl_map.json", "{", "not JSON"),
        ("lbl_map.json", b"\xff", "not JSON"),
        ("lbl_map.json", "[1, 2]", "got 0 labels"),
        ("lbl_map.json", '{"Dog": 0, "Rain": 1}', "numbers 200 labels.*got 2 labels"),
        ("lbl_map.json", json.dumps({str(i): i + 1 for i in range(200)}), "other numbers"),
        ("lbl_map.json", json.dumps({str(i): float(i) for i in range(200)}), "other numbers"),
        ("val.csv", "", "no row; expected a csv file with the columns files, labels, ext"),
        ("val.csv", "files,labels,ext\n", "no row"),
        ("val.csv", "files,labels\na/b.wav,Dog\n", "line 2 lacks"),
        ("val.csv", "files,labels,ext\na/b.wav,Dog,1\na/c.wav,D", "line 3 lacks"),
        ("val.csv", b"files,labels,ext\n\xff/b.wav,Dog,1\n", "not readable"),
        ("val.csv", "files,labels,ext\na/b.wav,Cat,1\n", "line 2: expected.*labels.*got.*Cat"),
        ("val.csv", "files,labels,ext\nb.wav,Dog,1\n", "line 2: expected data/FOLDER"),
        ("val.csv", "files,labels,ext\na/b,Dog,1\na/c,Rain,1\n", "line 3: .*same for all chunks"),
    ],
)
def test_it_refuses_other_lists(file, content, message, tmp_path):
    write_files(tmp_path)
    path = tmp_path / "fsd50k" / "chunks" / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{file}.*{message}") as error:
        fsd50k.read(tmp_path, "val")
    assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no file .*{file}.*--data simulated"):
        fsd50k.read(tmp_path, "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": np.zeros(22000, "<i2")}, "got 22000 samples at 22050 Hz, 16 bit, 1 channels"),
        ({"rate": 44100}, "at 44100 Hz"),
        ({"samples": np.zeros(44100, "<i2"), "channels": 2}, "2 channels"),
        ({"samples": np.zeros(22050, "u1"), "width": 1}, "8 bit"),
    ],
)
def test_it_refuses_other_sound(change, message, tmp_path):
    path = tmp_path / "1_0000.wav"
    write_wav(path, **{"samples": np.zeros(22050, "<i2"), **change})
    with pytest.raises(ValueError, match=f"1_0000.wav: expected a wav file.*{message}"):
        fsd50k.read_chunk(path)


def test_it_refuses_what_is_damaged(tmp_path):
    path = tmp_path / "1_0000.wav"
    write_wav(path, np.zeros(22050, "<i2"))
    whole = path.read_bytes()
    for size, message in ((0, "cut short"), (30, "not a wav file"), (9999, "in 9955 bytes")):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"1_0000.wav: .*{message}"):
            fsd50k.read_chunk(path)
    path.write_bytes(b"ID3" + whole)
    with pytest.raises(ValueError, match="not a wav file.*RIFF"):
        fsd50k.read_chunk(path)
