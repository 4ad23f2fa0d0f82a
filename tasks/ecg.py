"""ECG: the heart's rhythm from 3.3 s of one lead at 300 Hz. NAS-Bench-360, 1D, 4 classes.

Real data: the PhysioNet/CinC challenge of 2017 (Clifford et al. 2017, Computing in Cardiology 44;
NAS-Bench-360, Tu et al. 2022), 8528 records of 9 to 61 s, each labelled N (normal), A (atrial
fibrillation), O (other rhythm) or ~ (too noisy). `challenge2017.pkl` is a pickled dict {"data":
8528 integer series, "label": 8528 of "N", "A", "O", "~"}. A sample is a window of a record.

Simulated data: a beat is a sum of five bumps P, Q, R, S, T over the phase between two R peaks
(McSharry et al. 2003, IEEE TBME 50:289; without their differential equation as in Sameni et al.
2007, IEEE TBME 54:2172). The classes differ in when beats come and in their shapes; f-waves
(Stridh and Sornmo 2001, IEEE TBME 48:105) and the recording's noise are added. Each record is cut
into windows by the function that cuts the real ones.
"""

from pathlib import Path

import numpy as np

from tasks import download, files, metrics

RATE = 300  # samples a second
LENGTH = 1000  # samples of a window
LABELS = ["N", "A", "O", "~"]
COUNTS = np.array([5076, 758, 2415, 279])  # real records of each class
STRIDE = np.array([500, 83, 250, 25])  # between windows: the rarer the class, the more of them
NAME = "ecg/challenge2017.pkl"
FILES = {NAME: download.nas_bench("ECG/challenge2017.pkl", 150e6, "ODC-BY 1.0")}
PER_RECORD = 3  # simulated windows of one record

# P, Q, R, S, T: angle in degrees (the beat is 360, R at 0), width in radians, height
ANGLE = np.array([-70.0, -15.0, 0.0, 15.0, 100.0])
WIDTH = np.array([0.25, 0.10, 0.10, 0.10, 0.40])
HEIGHT = np.array([0.25, -0.17, 1.0, -0.25, 0.40])
OTHERS = ("slow", "fast", "ectopic", "bigeminy", "long PR", "wide QRS")  # the rhythms of class O


# ---- 1. Records to windows, for real and simulated ones ----


def windows(record: np.ndarray, label: int) -> np.ndarray:
    """The windows of a record, scaled to mean 0 and standard deviation 1: float32 (m, 1000).

    They start every STRIDE[label] samples: rhythms that few people have are cut more densely, so
    that the four classes have about as many windows each, in the test set too.
    """
    z = (record - record.mean()) / record.std()
    every = np.lib.stride_tricks.sliding_window_view(z.astype(np.float32), LENGTH)
    return every[: -1 : STRIDE[label]]  # careful: the published windows leave out the very last


# ---- 2. Simulated records ----


def intervals(rng: np.random.Generator, rhythm: str, beats: int) -> np.ndarray:
    """The times from each R peak to the next, in seconds, (beats,)."""
    low, high = {"slow": (38, 56), "fast": (95, 150)}.get(rhythm, (50, 105))
    if rhythm == "fibrillation":  # no two intervals are related
        shape = rng.uniform(0.08, 0.25) ** -2.0  # of a gamma distribution: 1 / variation squared
        return 60 / rng.uniform(60, 140) * rng.gamma(shape, 1 / shape, beats)
    mean = 60 / rng.uniform(low, high)
    t, rr = mean * np.arange(beats), np.ones(beats)
    sd = rng.uniform(0.03, 0.10)  # of which 1/3 with blood pressure, 2/3 with breathing
    for hertz, share in ((0.1, 1 / 3), (0.25, 2 / 3)):
        turns = rng.normal(hertz, 0.01) * t + rng.random()
        rr += sd * np.sqrt(2 * share) * np.sin(2 * np.pi * turns)
    return mean * rr


def heartbeat(rng: np.random.Generator, rhythm: str, samples: int) -> np.ndarray:
    """A clean record, (samples,), in units of the height of R."""
    beats = 4 * samples // RATE + 4  # more than any heart here
    rr = intervals(rng, rhythm, beats)
    early = np.zeros(beats, dtype=bool)
    if rhythm == "ectopic":
        early = rng.random(beats) < rng.uniform(0.1, 0.3)
    if rhythm == "bigeminy":
        early[::2] = True
    early[1:] &= ~early[:-1]
    advance = np.where(early, rr * rng.uniform(0.25, 0.40), 0)[1:]
    rr[:-1] -= advance  # too early, then a pause that makes up for it
    rr[1:] += advance
    turn = beat_number(rng, rr, samples)
    beat = np.rint(turn).astype(int)
    phase = 2 * np.pi * (turn - beat)  # 0 at R
    height, angle, width = waves(rng, rhythm, rr, early)
    z = np.zeros(samples)
    for i in range(5):
        away = (phase - angle[i] + np.pi) % (2 * np.pi) - np.pi
        z += height[beat, i] * np.exp(-0.5 * (away / width[beat, i]) ** 2)
    return z + f_waves(rng, samples) if rhythm == "fibrillation" else z


def beat_number(rng: np.random.Generator, rr: np.ndarray, samples: int) -> np.ndarray:
    """How many R peaks there were until each moment, with fractions in between, (samples,)."""
    peaks = np.concatenate([[0], np.cumsum(rr)]) - rng.uniform(0, rr[0])
    return np.interp(np.arange(samples) / RATE, peaks, np.arange(len(peaks)))


def waves(
    rng: np.random.Generator, rhythm: str, rr: np.ndarray, early: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The waves P, Q, R, S, T: heights (beats, 5), angles (5,) and widths (beats, 5) in radians."""
    beats = len(rr)
    height = np.tile(HEIGHT * rng.lognormal(0, 0.35, 5), (beats, 1))
    rate = np.sqrt(1 / rr.mean())  # waves move apart and widen (in angle) as the heart goes faster
    angle = np.radians(ANGLE) * np.array([rate**0.5, rate, 1, rate, rate**0.5])
    width = np.tile(WIDTH * rate, (beats, 1))
    if rhythm == "long PR":
        angle[0] = np.radians(rng.uniform(-105, -85)) * rate**0.5
    if rhythm == "wide QRS":
        width[:, 1:4] *= rng.uniform(1.4, 2.2)
    height[early, 0] = 0  # from the ventricles: no P, a wide QRS, T upside down
    height[early, 4] *= -1
    width[early, 1:4] *= 2.5
    if rhythm == "fibrillation":
        height[:, 0] = 0
    return height, angle, width


def f_waves(rng: np.random.Generator, samples: int) -> np.ndarray:
    """The flicker of the atria: 4 to 9 Hz, drifting, with two harmonics, (samples,)."""
    t = np.arange(samples) / RATE
    drift = 0.3 * np.sin(2 * np.pi * (rng.uniform(0.05, 0.2) * t + rng.random()))
    turns = rng.uniform(4, 9) * t + drift
    wave = sum(np.sin(2 * np.pi * h * (turns + rng.random())) / h for h in (1, 2, 3))
    return rng.uniform(0.02, 0.10) * wave


def band(rng: np.random.Generator, samples: int, low: float, high: float) -> np.ndarray:
    """Gaussian noise between two frequencies in Hz, standard deviation 1."""
    hertz = np.fft.rfftfreq(samples, 1 / RATE)
    spectrum = rng.normal(size=(2, len(hertz))) * ((hertz >= low) & (hertz <= high))
    noise = np.fft.irfft(spectrum[0] + 1j * spectrum[1], samples)
    return noise / noise.std()


def disturbance(rng: np.random.Generator, samples: int) -> np.ndarray:
    """What electrodes add: drifting baseline, muscles, jumps that decay; standard deviation 1."""
    wander, muscle, jumps = rng.dirichlet([1, 1, 0.5])
    noise = np.sqrt(wander) * band(rng, samples, 0.05, 0.5)
    noise += np.sqrt(muscle) * band(rng, samples, 20, 140)
    since = np.arange(samples) / RATE - rng.uniform(0, samples / RATE, (4, 1))
    decay = np.where(since > 0, np.exp(-since.clip(0) / 0.5), 0)
    noise += np.sqrt(jumps) * 5 * (rng.normal(size=(4, 1)) * decay).sum(axis=0)
    return noise / noise.std()


def simulate_record(rng: np.random.Generator, label: int) -> np.ndarray:
    """A record of 30 s, or one in five of 9 s and more, of that class: int16 (samples,)."""
    samples = int(RATE * (rng.uniform(9, 30) if rng.random() < 0.2 else 30))
    beneath = rng.choice(3, p=COUNTS[:3] / COUNTS[:3].sum()) if label == 3 else label
    clean = heartbeat(rng, ("normal", "fibrillation", rng.choice(OTHERS))[beneath], samples)
    decibel = rng.uniform(-8, 3) if label == 3 else rng.uniform(0, 18)
    noise = clean.std() * 10 ** (-decibel / 20) * disturbance(rng, samples)
    sign = -1 if rng.random() < 0.1 else 1  # electrodes the wrong way round
    return (sign * 500 * (clean + noise)).round().astype(np.int16)


def simulate(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n windows, PER_RECORD of each record: x, float32 (n, 1, 1000); y, int64 (n,).

    The classes have the shares that they have among the real windows, about a quarter each: the
    dense strides make up for few records. Here the records are simulated in those shares, and each
    gives as many windows, so that a class rare in reality is not known from a few hearts only.
    """
    rng = np.random.default_rng(seed)
    records = -(-n // PER_RECORD)
    share = np.cumsum(COUNTS / STRIDE)
    labels = np.searchsorted(share / share[-1], (np.arange(records) + 0.5) / records)
    x = []
    for label in labels:
        cut = windows(simulate_record(rng, label), label)
        x.append(cut[rng.choice(len(cut), PER_RECORD, replace=False)])
    order = rng.permutation(records * PER_RECORD)[:n]
    return np.concatenate(x)[order, None], labels.repeat(PER_RECORD)[order].astype(np.int64)


# ---- 3. Real records ----


def read(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The real windows of a split: x, float32 (n, 1, 1000); y, int64 (n,). Takes 1 GB for "train".

    No record is in two splits. "test": the tenth of the records that the published code takes (it
    shuffles with scikit-learn, random_state=0: numpy's legacy generator); "val": the next tenth.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    records, labels = _records(download.fetch(root, NAME, FILES[NAME]))
    order, tenth = np.random.RandomState(0).permutation(len(labels)), -(-len(labels) // 10)
    parts = {"test": order[:tenth], "val": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    x = [windows(records[i], labels[i]) for i in parts[split]]
    return np.concatenate(x)[:, None], labels[parts[split]].repeat([len(cut) for cut in x])


def _records(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """The records, each (samples,), and their classes 0..3, int64 (n,), checked."""
    want = "a pickled dict {'data': series of more than 1000 numbers, 'label': as many of N A O ~}"
    content = files.read_pickled(path)
    if not isinstance(content, dict) or not {"data", "label"} <= set(content):
        raise ValueError(f"{path}: expected {want}, got {type(content).__name__}")
    records, labels = content["data"], content["label"]
    if not all(isinstance(part, list) or getattr(part, "ndim", 0) for part in (records, labels)):
        raise ValueError(f"{path}: expected {want}, got a single value")
    labels = [str(label) for label in labels]
    if len(labels) != len(records) or len(labels) < 10 or set(labels) != set(LABELS):
        raise ValueError(
            f"{path}: expected {want}, 10 or more and of every class, got {len(records)} series "
            f"and {len(labels)} labels of {len(set(labels))} classes"
        )
    for i, record in enumerate(records):
        if getattr(record, "ndim", 0) != 1 or record.dtype.kind not in "iuf":
            got = "is not a row of numbers"
        elif len(record) <= LENGTH:
            got = f"has {len(record)}"
        elif not np.isfinite(record).all() or record.min() == record.max():
            got = "holds values that are not finite, or all the same"
        else:
            continue
        raise ValueError(f"{path}: expected {want}, but series {i} {got}")
    return list(records), np.array([LABELS.index(label) for label in labels], dtype=np.int64)


TASK = {
    "title": "ECG: the rhythm of a heart from 3.3 s of one lead",
    "x_shape": (1, LENGTH),
    "y_shape": (),
    "kind": "classes",
    "num_classes": 4,
    "loss": metrics.cross_entropy,
    "metric": metrics.macro_f1,
    "metric_name": "1 - macro F1",
    "sources": {"embedded": "words", "paper": "conll2003"},
    "splits": ("train", "val", "test"),
    "settings": {"patches": 50},
    "sizes": {"train": 1500, "val": 300, "test": 600},
    "published": {
        "Hand-designed": 0.28,
        "NAS-Bench-360": 0.34,
        "DASH": 0.32,
        "Perceiver IO": 0.66,
        "FPT": 0.50,
        "NFT": 0.44,
        "ORCA": 0.28,
        "PaRe": 0.28,
    },
}
