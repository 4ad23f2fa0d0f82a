"""FSD50K: which sounds are heard in a clip. NAS-Bench-360, 2D (log-mel images), 200 labels.

Real data: 51,197 clips from Freesound, labelled with 144 leaves and 56 inner nodes of the AudioSet
ontology (Fonseca et al. 2022, IEEE/ACM TASLP 30:829; NAS-Bench-360, Tu et al. 2022). `audio.zip`
holds them as chunks of one second at 22,050 Hz, overlapping by half: 16-bit mono wav files, listed
in `chunks/tr.csv`, `val.csv` and `eval.csv` (columns files, labels, ext: the path, the names of
the labels with commas between, the clip); `chunks/lbl_map.json` numbers the names. To train, a
clip is one of its chunks at random; to evaluate, a clip's score is the mean over its chunks.

Simulated data: one second with one to four events before pink noise, as in Scaper (Salamon et al.
2017, WASPAA). A leaf is a family of sounds, a register (an octave) and an envelope, 8 x 6 x 3 =
144; its parents are its family in its register and its family, 48 + 8 = 56 inner nodes.
"""

import csv
import json
import wave
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import scipy.fft
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks import download, metrics

ARCHIVE = "fsd50k/audio.zip"
FILES = {ARCHIVE: download.nas_bench("audio/audio.zip", 24e9, "CC BY 4.0")}
RATE = 22050  # samples a second; a chunk is one second
N_FFT, WINDOW, HOP, MELS = 1920, 661, 220, 96
SPLITS = {"train": "tr", "val": "val", "test": "eval"}  # a split: the name of its csv file

FAMILIES = ("hum", "reed", "bell", "wind", "clicks", "siren", "whistle", "chirps")
REGISTERS = 100.0 * 2.0 ** np.arange(6)  # Hz, the middle of each
ENVELOPES = ("steady", "struck", "trembling")
LEAVES = len(FAMILIES) * len(REGISTERS) * len(ENVELOPES)
PRIOR = np.random.default_rng(50).permutation(np.arange(1.0, LEAVES + 1) ** -0.7)  # Zipf's law
PRIOR /= PRIOR.sum()


# ---- 1. The feature, of simulated and real sound alike ----


@cache
def mel_filters() -> np.ndarray:
    """Triangles that overlap by half, equally wide in mel = 2595 log10(1 + f / 700): (961, 96)."""
    bins = np.linspace(0, RATE / 2, N_FFT // 2 + 1)
    mels = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), MELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    up = (bins[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    down = (edges[2:] - bins[:, None]) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(up, down)).astype(np.float32)


def log_mel(sound: np.ndarray) -> np.ndarray:
    """Decibels in 96 mel bands: sound, (n, 22050) in [-1, 1] -> float32 (n, 1, 96, 102).

    What is 80 dB below a chunk's loudest is cut off there; then its mean is taken away. 101 frames
    of 30 ms, the n-th around sample 220 n (reflected at the ends), then one of zeros.
    """
    x = np.zeros((len(sound), 1, MELS, 102), np.float32)
    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    for i in range(0, len(sound), 32):  # what fits a processor's cache
        block = np.pad(sound[i : i + 32], ((0, 0), (WINDOW // 2 + 1, WINDOW // 2)), "reflect")
        frames = np.lib.stride_tricks.sliding_window_view(block, WINDOW, axis=1)[:, ::HOP]
        spectrum = scipy.fft.rfft(frames.astype(np.float32) * window, N_FFT)
        power = (spectrum.real**2 + spectrum.imag**2) @ mel_filters()  # (n, 101, 96)
        db = 10 * np.log10(np.maximum(power, 1e-10))
        db = np.maximum(db, db.max(axis=(1, 2), keepdims=True) - 80)
        db -= db.mean(axis=(1, 2), keepdims=True)
        x[i : i + 32, 0, :, :101] = db.transpose(0, 2, 1)
    return x


# ---- 2. Simulated ----


def simulate(n: int, seed: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """n clips of a second: x, float32 (n, 1, 96, 102); y, float32 (n, 200), 0 or 1.

    The labels are the 144 leaves, then the 48 pairs of family and register, then the 8 families;
    a leaf's share of the events follows Zipf's law. Events are up to 12 dB louder than others, the
    noise 5 to 25 dB below an event of middling level.
    """
    rng = np.random.default_rng(seed)
    leaf = rng.choice(LEAVES, size=(n, 4), p=PRIOR)
    events = 1 + np.minimum(rng.poisson(0.7, n), 3)
    clip, slot = np.nonzero(np.arange(4) < events[:, None])
    y = np.zeros((n, 200), np.float32)
    for node in parents(leaf[clip, slot]):
        y[clip, node] = 1
    x = np.empty((n, 1, MELS, 102), np.float32)
    for i in range(0, n, 64):
        size = min(64, n - i)
        here = (clip >= i) & (clip < i + size)
        sound = pink(size, rng) * 10 ** (rng.uniform(-25, -5, (size, 1)) / 20)
        firsts = np.flatnonzero(slot[here] == 0)  # the first of each clip
        sound += np.add.reduceat(event(leaf[clip, slot][here], rng), firsts)
        x[i : i + size] = log_mel(sound)
    return x, y


def parents(leaf: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The labels of a leaf: itself, its family in its register, its family."""
    pair = leaf // len(ENVELOPES)
    return leaf, LEAVES + pair, LEAVES + 48 + pair // len(REGISTERS)


def pink(n: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with a power that falls as 1/f, of level 1: (n, 22050)."""
    spectrum = rng.standard_normal((n, RATE // 2 + 1, 2), np.float32).view(np.complex64)[..., 0]
    spectrum /= np.sqrt(np.maximum(np.arange(RATE // 2 + 1), 20), dtype=np.float32)
    sound = scipy.fft.irfft(spectrum, RATE)
    return sound / sound.std(axis=1, keepdims=True)


def event(leaf: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One event of each leaf, at its own pitch, time and level: (n, 22050)."""
    n = len(leaf)
    own = lambda low, high: rng.uniform(low, high, (n, 1)).astype(np.float32)  # noqa: E731
    pair, shape = leaf // len(ENVELOPES), leaf % len(ENVELOPES)
    family, register = pair // len(REGISTERS), pair % len(REGISTERS)
    pitch = REGISTERS[register][:, None].astype(np.float32) * 2 ** own(-0.25, 0.25)
    t = np.arange(RATE, dtype=np.float32) / RATE
    sound = np.empty((n, RATE), np.float32)
    for kind, name in enumerate(FAMILIES):
        of = np.flatnonzero(family == kind)
        sound[of] = waveform(name, pitch[of], t, rng)
    length = own(0.4, 1.0)
    since = t - own(0, 1) * (1 - length)  # the onset
    gate = np.clip(np.minimum(since, length - since) / 0.01, 0, 1)  # 10 ms to rise and to fall
    struck = np.exp(-np.maximum(since, 0) / own(0.06, 0.15))
    trembling = (0.5 + 0.5 * np.sin(2 * np.pi * (own(5, 9) * t + own(0, 1)))) ** 2
    gate *= np.select([shape[:, None] == 1, shape[:, None] == 2], [struck, trembling], 1.0)
    sound *= gate
    level = 10 ** (own(-6, 6) / 20)
    return sound * (level / np.sqrt((sound**2).mean(axis=1, keepdims=True)))


def waveform(family: str, pitch: np.ndarray, t: np.ndarray, rng) -> np.ndarray:
    """A second of a family's sound around pitch (n, 1), before its envelope: (n, 22050)."""
    n = len(pitch)
    own = lambda low, high: rng.uniform(low, high, (n, 1)).astype(np.float32)  # noqa: E731
    sine = lambda cycles: np.sin(2 * np.pi * (cycles - np.rint(cycles)))  # noqa: E731
    cycles = pitch * t + own(0, 1)
    if family in ("hum", "reed"):  # partials with amplitudes 1/h: all of them, or the odd ones
        partials = range(1, 11) if family == "hum" else range(1, 11, 2)
        return sum(sine(h * cycles) * (h * pitch < RATE / 2) / h for h in partials)
    if family == "bell":  # frequency modulation with no common fundamental (Chowning 1973)
        return sine(cycles + own(2, 5) / (2 * np.pi) * sine(1.4 * cycles))
    if family == "wind":  # a band of noise a quarter of the pitch wide: slow noise times a carrier
        slow = np.exp(-((np.fft.fftfreq(RATE, 1 / RATE).astype(np.float32) / (pitch / 8)) ** 2) / 2)
        slow = slow * rng.standard_normal((n, RATE, 2), np.float32).view(np.complex64)[..., 0]
        noise = scipy.fft.ifft(slow) * RATE**0.5
        return noise.real * sine(cycles) + noise.imag * sine(cycles + 0.25)
    if family == "clicks":  # each click rings a resonator
        rate = own(12, 25)
        since = np.mod(rate * t + own(0, 1), 1) / rate
        return np.exp(-since * pitch / 2) * sine(pitch * since)
    if family == "siren":  # a quarter up and down, once or twice a second
        rate = own(1, 2)
        return sine(cycles + 0.25 * pitch / (2 * np.pi * rate) * sine(rate * t + own(0, 1)))
    if family == "whistle":
        return sine(cycles)
    rate = own(4, 7)  # chirps: an octave down each time
    turn = np.mod(rate * t + own(0, 1), 1)
    return sine(pitch / rate * (1.4 * turn - 0.7 / 1.2 * turn**2)) * (turn < 0.6)


# ---- 3. Real ----


class Clips(Dataset):
    """Chunks read from their wav files when they are asked for: x (1, 96, 102), y (200,).

    Attributes: groups, int64 (len,): the number of the clip that an item is of. To train there is
        one item a clip, a chunk drawn anew each time by torch's generator; else one item a chunk.
    """

    def __init__(self, folder: Path, chunks: list[list[str]], groups: Tensor, y: Tensor):
        """chunks: of each item, the files to draw from; y: the labels of each clip."""
        self.folder, self.chunks, self.groups, self.y = folder, chunks, groups, y

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        files = self.chunks[i]
        file = files[int(torch.randint(len(files), ()))] if len(files) > 1 else files[0]
        x = log_mel(read_chunk(self.folder / file)[None])[0]
        return torch.from_numpy(x), self.y[self.groups[i]]


def read(root: Path, split: str) -> Clips:
    """The real clips of a split ("train", "val" or "test"); only the lists are read at once.

    Raises: FileNotFoundError or ValueError, naming the file and what it should hold; for a chunk,
        when it is read (the first one, here).
    """
    folder = download.unpacked(root, "fsd50k/chunks", ARCHIVE, FILES[ARCHIVE]).parent
    numbers = read_numbers(folder / "chunks" / "lbl_map.json")
    path = folder / "chunks" / f"{SPLITS[split]}.csv"
    clips, chunks, groups = {}, [], []
    for line, file, labels, clip in read_rows(path):
        number, first = clips.setdefault(clip, (len(clips), labels))
        _, _, chunk = file.partition("/")  # careful: the authors' copy lay in a folder data
        if labels != first or not numbers.keys() >= set(labels.split(",")) or not chunk:
            raise ValueError(
                f"{path}, line {line}: expected data/FOLDER/CHUNK.wav, labels of lbl_map.json, the "
                f"same for all chunks of a clip, and the clip; got {file}, {labels}, {clip}"
            )
        chunks.append(chunk)
        groups.append(number)
    read_chunk(folder / chunks[0])
    y = torch.zeros(len(clips), len(numbers))
    for number, labels in clips.values():
        y[number, [numbers[name] for name in labels.split(",")]] = 1
    if split != "train":
        return Clips(folder, [[chunk] for chunk in chunks], torch.tensor(groups), y)
    of_clip = [[] for _ in clips]
    for chunk, number in zip(chunks, groups, strict=True):
        of_clip[number].append(chunk)
    return Clips(folder, of_clip, torch.arange(len(clips)), y)


def present(path: Path, want: str) -> Path:
    """path, if it is a file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; expected {want}, part of the audio.zip of NAS-Bench-360: put the "
            "content of its folder data there, or run on simulated data (--data simulated)"
        )
    return path


def read_numbers(path: Path) -> dict[str, int]:
    """The number of each label's name."""
    want = "a JSON object that numbers 200 labels from 0 to 199"
    try:
        numbers = json.loads(present(path, want).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON; expected {want}") from None
    values = list(numbers.values()) if isinstance(numbers, dict) else []
    if not all(type(v) is int for v in values) or sorted(values) != list(range(200)):
        raise ValueError(f"{path}: expected {want}, got {len(values)} labels or other numbers")
    return numbers


def read_rows(path: Path) -> Iterator[tuple[int, str, str, str]]:
    """Line by line (there are half a million to train on): its number, file, labels and clip."""
    want = "a csv file with the columns files, labels, ext and a row for each chunk"
    problem = "no row"
    try:
        with present(path, want).open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            for row in table:
                problem = ""
                values = row.get("files"), row.get("labels"), row.get("ext")
                if not all(values):
                    problem = f"line {table.line_num} lacks one of them"
                    break
                yield table.line_num, *values
    except (UnicodeDecodeError, csv.Error) as error:
        problem = f"not readable ({error})"
    if problem:
        raise ValueError(f"{path}: {problem}; expected {want}")


def read_chunk(path: Path) -> np.ndarray:
    """A chunk's samples: float32 (22050,), in [-1, 1)."""
    want = f"a wav file of {RATE} samples at {RATE} Hz, 16 bit, mono"
    try:
        with wave.open(str(present(path, want)), "rb") as file:
            form, raw = tuple(file.getparams()[:4]), file.readframes(RATE)
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"{path}: not a wav file ({str(error) or 'cut short'}); expected {want}"
        ) from None
    if form != (1, 2, RATE, RATE) or len(raw) != 2 * RATE:
        channels, width, rate, samples = form
        raise ValueError(
            f"{path}: expected {want}; got {samples} samples at {rate} Hz, {8 * width} bit, "
            f"{channels} channels, in {len(raw)} bytes"
        )
    return np.frombuffer(raw, "<i2").astype(np.float32) / 32768


TASK = {
    "title": "FSD50K: sounds in a clip",
    "x_shape": (1, 96, 102),
    "y_shape": (200,),
    "kind": "labels",
    "num_classes": 200,
    "loss": partial(metrics.bce, pos_weight=10.0),
    "metric": metrics.mean_ap,
    "metric_name": "1 - mAP",
    "sources": {"embedded": "shapes", "paper": "cifar10"},
    "splits": ("train", "val", "test"),
    "sizes": {"train": 1000, "val": 200, "test": 400},
    "published": {
        "Hand-designed": 0.62,
        "NAS-Bench-360": 0.60,
        "DASH": 0.60,
        "Perceiver IO": 0.72,
        "FPT": 0.67,
        "NFT": 0.63,
        "ORCA": 0.56,
        "PaRe": 0.55,
    },
}
