"""PSICOV: the distances between the residues of a protein. NAS-Bench-360, 2D to 2D, regression.

Real data: PDNET (Adhikari 2020, Scientific Reports 10:13374; `protein.zip` of NAS-Bench-360, Tu et
al. 2022), 3456 chains of DeepCov to train on and 150 of PSICOV (Jones et al. 2012) to test on:
`protein/deepcov.lst` and `protein/psicov.lst` name them, `protein/SET/features/ID.pkl` is a dict of
features and `protein/SET/distance/ID-cb.npy` a pickled (L, sequence, distances of C-beta atoms).

x holds 57 maps: 27 numbers of residue j at (i, j), the same of residue i, and 3 of the pair. y is
the distance in angstrom, NaN outside the protein. Differs from the published code, which puts 100
there, crops x and y of a long chain at independent places and selects on half of the test set: here
one offset serves rows and columns of both, and the first 100 chains of DeepCov validate.

Simulated data: chains of helices and strands, packed and relaxed, with features like those that an
alignment of the protein's family gives. This is the only task whose simulated canvas (64) is
smaller than the real one (512): 57 x 512 x 512 is beyond two cores.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks import download, files, metrics

ARCHIVE = "psicov/protein.zip"
FILES = {ARCHIVE: download.nas_bench("protein.zip", 1.1e9, "GPL")}
SIDE, SIDE_REAL = 64, 512  # of the canvas
FEATURES = {  # of a chain of L residues
    "ss": (3, "L"),  # secondary structure: probabilities of coil, helix, strand
    "pssm": ("L", 22),  # shares of 20 amino acids and of gaps in the alignment, their entropy
    "sa": ("L",),  # solvent accessibility, 0 buried to 1 exposed
    "entropy": ("L",),  # of the column of the alignment
    "ccmpred": ("L", "L"),  # co-evolution: CCMpred (Seemayer et al. 2014)
    "freecon": ("L", "L"),  # co-evolution: FreeContact (Kajan et al. 2014)
    "potential": ("L", "L"),  # mean contact potential of the pair
}
COIL, HELIX, STRAND = range(3)
AMINO = "ARNDCQEGHILKMFPSTWYV"
# hydropathy (Kyte and Doolittle 1982), and liking for coil, helix, strand (Chou and Fasman 1978)
PREFERENCES = """
1.8 -4.5 -3.5 -3.5 2.5 -3.5 -3.5 -.4 -3.2 4.5 3.8 -3.9 1.9 2.8 -1.6 -.8 -.7 -.9 -1.3 4.2
.66 .95 1.56 1.46 1.19 .98 .74 1.56 .95 .47 .59 1.01 .60 .60 1.52 1.43 .96 .96 1.14 .50
1.42 .98 .67 1.01 .70 1.11 1.51 .57 1.00 1.08 1.21 1.16 1.45 1.13 .57 .77 .83 1.08 .69 1.06
.83 .93 .89 .54 1.19 1.10 .37 .75 .87 1.60 1.30 .74 1.05 1.38 .55 .75 1.19 1.37 1.47 1.70"""
HYDROPATHY, *LIKING = np.array(PREFERENCES.split(), float).reshape(4, 20)

# ---- 1. A chain's features and distances, simulated or real, on the canvas ----


def channels(features: dict) -> np.ndarray:
    """The 57 maps of a chain, float32 (57, L, L).

    Raises: ValueError if a feature is missing, has another shape, or holds values out of range.
    """
    length = len(features.get("seq", ""))
    for name, shape in FEATURES.items():
        want = tuple(length if size == "L" else size for size in shape)
        got = np.asarray(features.get(name, np.nan))
        if got.shape != want or got.dtype.kind not in "iuf" or not (np.abs(got) < 100).all():
            raise ValueError(f"'{name}' is no array {want} of numbers between -100 and 100")
    f = {name: np.asarray(features[name], dtype=np.float32) for name in FEATURES}
    single = np.concatenate([f["ss"], f["pssm"].T, f["sa"][None], f["entropy"][None]])  # (27, L)
    of_j = np.broadcast_to(single[:, None], (27, length, length))
    both = np.stack([of_j, of_j.transpose(0, 2, 1)], axis=1).reshape(54, length, length)
    return np.concatenate([both, np.stack([f["ccmpred"], f["freecon"], f["potential"]])])


def distances(cb: np.ndarray, length: int) -> np.ndarray:
    """The cleaned map, float32 (1, L, L): at least 1; each diagonal entry the mean of its row's
    neighbours, so that the map is smooth.

    Raises: ValueError unless cb is (length, length), symmetric and without negative values.
    """
    cb = np.asarray(cb)
    if cb.shape != (length, length) or length < 2 or cb.dtype.kind not in "iuf":
        raise ValueError(f"the map of distances is no array {(length, length)} of numbers")
    if not (cb >= 0).all() or not (cb <= 500).all() or not np.allclose(cb, cb.T, atol=0.1):
        raise ValueError("the map of distances is not symmetric, or not between 0 and 500 angstrom")
    d, i = np.maximum(cb.astype(np.float32), 1), np.arange(length)
    before, after = np.where(i > 0, i - 1, 1), np.where(i < length - 1, i + 1, length - 2)
    d[i, i] = (d[i, before] + d[i, after]) / 2
    return d[None]


def place(maps: np.ndarray, side: int, fill: float, start: int = 0) -> np.ndarray:
    """maps (C, L, L) in the top left corner of a canvas (C, side, side); what is longer is cropped
    to the residues from start on."""
    canvas = np.full((len(maps), side, side), fill, dtype=np.float32)
    maps = maps[:, start : start + side, start : start + side]
    canvas[:, : maps.shape[1], : maps.shape[2]] = maps
    return canvas


# ---- 2. Simulation ----


def layout(rng: np.random.Generator, length: int) -> list[tuple[int, int, int]]:
    """The helices and strands of a chain: [(kind, first residue, last residue + 1), ...]."""
    share = rng.choice([0.0, 0.5, 1.0])  # all beta, mixed, all alpha
    elements, at = [], int(rng.integers(1, 4))
    while True:
        kind = HELIX if rng.random() < share else STRAND
        end = at + int(rng.integers(9, 15) if kind == HELIX else rng.integers(5, 9))
        if end >= length:
            return elements
        elements.append((kind, at, end))
        at = end + int(rng.integers(3, 6))


def element(rng: np.random.Generator, kind: int, size: int) -> np.ndarray:
    """C-alpha atoms (size, 3) of a straight helix or strand along the third axis, centred."""
    t = np.arange(size) - (size - 1) / 2
    if kind == STRAND:  # pleated
        return np.stack([0 * t, 0.9 * (-1.0) ** np.arange(size), 3.3 * t], axis=1)
    angle = np.deg2rad(100) * t + rng.uniform(0, 2 * np.pi)  # 3.6 residues a turn of 5.4 angstrom
    return np.stack([2.3 * np.cos(angle), 2.3 * np.sin(angle), 1.5 * t], axis=1)


def fold(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A chain whose helices and strands run up and down, side by side in a random order.

    Returns: the C-alpha atoms, (L, 3) in angstrom; the kind of each residue, (L,).
    """
    elements = layout(rng, length)
    kinds, atoms = np.full(length, COIL), np.full((length, 3), np.nan)
    wide = np.array([10.0 if kind == HELIX else 4.8 for kind, _, _ in elements])
    layers = 1 + (wide.sum() > 20)  # of elements, 10 angstrom apart
    edge = np.full(layers, -wide.sum() / layers / 2)  # how far each layer is filled
    for nth, k in enumerate(rng.permutation(len(elements))):
        (kind, first, last), layer = elements[k], nth % layers
        at = edge[layer] + wide[k] / 2
        edge[layer] += wide[k]
        tilt = 0.03 * at + rng.normal(0, 0.1)  # sheets and bundles are twisted
        cos, sin, way = np.cos(tilt), np.sin(tilt), (-1) ** k  # up, then down
        axes = np.array([[cos, 0, sin], [0, way, 0], [-sin * way, 0, cos * way]])  # a rotation
        site = [at, 10 * layer, 0] + rng.normal(0, 0.7, 3)
        atoms[first:last], kinds[first:last] = element(rng, kind, last - first) @ axes + site, kind
    i, known = np.arange(length), np.flatnonzero(kinds != COIL)
    atoms = np.stack([np.interp(i, known, axis[known]) for axis in atoms.T], axis=1)
    return relax(atoms, kinds, rng), kinds


def relax(atoms: np.ndarray, kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shake the loops, then move all atoms until neighbours in the chain are 3.8 angstrom apart
    and others 4.2 or more; the pull of helices and strands on their atoms fades meanwhile."""
    apart = np.abs(np.subtract.outer(np.arange(len(atoms)), np.arange(len(atoms))))
    least = np.select([apart == 0, apart == 1], [0, 3.8], 4.2)
    most = np.where(apart == 1, 3.8, np.inf)
    loop = (kinds == COIL)[:, None]
    x = atoms + loop * rng.normal(0, 2, atoms.shape)
    for pull in np.linspace(0.1, 0, 60):
        square = (x**2).sum(axis=1)
        d = np.sqrt(np.maximum(square[:, None] + square - 2 * x @ x.T, 1e-6))
        push = 0.25 * (np.minimum(np.maximum(d, least), most) / d - 1)
        x = x + push.sum(axis=1, keepdims=True) * x - push @ x + pull * ~loop * (atoms - x)
    return x


def family(rng: np.random.Generator, kinds: np.ndarray, bury: np.ndarray) -> np.ndarray:
    """Shares of the amino acids in each column of an alignment, (L, 20): buried residues are
    hydrophobic, helices and strands prefer some; a column is dominated by a few."""
    likely = np.exp(2.5 * (bury[:, None] - 0.5) * HYDROPATHY / 4.5) * np.array(LIKING)[kinds] ** 1.5
    shares = rng.gamma(4 * likely / likely.sum(axis=1, keepdims=True)) + 1e-3
    return shares / shares.sum(axis=1, keepdims=True)


def coupling(rng: np.random.Generator, signal: np.ndarray) -> np.ndarray:
    """Co-evolution scores (L, L): of pairs with a signal (0 to 1), of chance pairs, and noise."""
    shape = signal.shape
    chance = rng.random(shape) < 2 / len(signal)
    score = 0.5 * rng.gamma(2, 0.5, shape) * np.maximum(signal, chance)
    score = np.triu(score + rng.normal(0, 0.2, shape), 1)
    column = rng.normal(0, 0.05, len(signal))  # entropy and phylogeny: whole rows and columns
    return score + score.T + column[:, None] + column


def measure(rng: np.random.Generator, atoms: np.ndarray, kinds: np.ndarray) -> tuple:
    """What PDNET's files hold of a folded chain: the features, and the C-beta distances."""
    length, pad = len(atoms), np.pad(atoms, ((1, 1), (0, 0)), mode="reflect", reflect_type="odd")
    out = 2 * atoms - pad[:-2] - pad[2:] + 1e-3
    cb = atoms + 2.4 * out / np.linalg.norm(out, axis=1, keepdims=True)  # away from both neighbours
    d = np.linalg.norm(cb[:, None] - cb, axis=2)
    bury = np.clip((d < 10).sum(axis=1) / 20, 0, 1)
    shares = family(rng, kinds, bury)
    entropy = -(shares * np.log(shares)).sum(axis=1)
    said = np.where(rng.random(length) < 0.8, kinds, rng.integers(0, 3, length))
    belief = np.exp(2 * np.eye(3)[said] + rng.normal(0, 0.5, (length, 3)))
    gaps, taste = rng.beta(1, 15, length)[:, None], shares @ HYDROPATHY / 4.5
    touch = 1 / (1 + np.exp(d - 8))  # what is close co-evolves
    seen = rng.random((3, length, length)) < 0.6  # each method finds 6 of 10 such pairs,
    seen[1] = np.where(seen[2], seen[0], seen[1])  # and the two mostly the same ones
    features = {
        "seq": "".join(AMINO[a] for a in shares.argmax(axis=1)),
        "ss": (belief / belief.sum(axis=1, keepdims=True)).T,
        "pssm": np.concatenate([shares * (1 - gaps), gaps, entropy[:, None]], axis=1),
        "sa": np.clip(1 - bury + rng.normal(0, 0.15, length), 0, 1),
        "entropy": entropy + rng.normal(0, 0.1, length),
        "ccmpred": coupling(rng, touch * seen[0]),
        "freecon": coupling(rng, touch * seen[1]),
        # Li, Tang and Wingreen 1997: contact potentials are sums and products of hydrophobicity
        "potential": -(taste[:, None] + taste + taste[:, None] * taste),
    }
    return features, d


def simulate(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n proteins of 40 to 64 residues: x, float32 (n, 57, 64, 64); y, float32 (n, 1, 64, 64)."""
    rng = np.random.default_rng(seed)
    x = np.zeros((n, 57, SIDE, SIDE), dtype=np.float32)
    y = np.full((n, 1, SIDE, SIDE), np.nan, dtype=np.float32)
    for i, length in enumerate(rng.integers(40, SIDE + 1, n)):
        features, d = measure(rng, *fold(rng, length))
        x[i] = place(channels(features), SIDE, 0)
        y[i] = place(distances(d, length), SIDE, np.nan)
    return x, y


# ---- 3. The real files ----


def identifiers(path: Path) -> list[str]:
    """The first word of each line of a list of chains."""
    if not path.exists():
        raise FileNotFoundError(
            f"no file {path}; it is part of PDNET (protein.zip of NAS-Bench-360, a chain's name a "
            "line): put it there, or run on simulated data (--data simulated)"
        )
    try:
        names = [line.split()[0] for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file; expected a chain's name a line") from None
    if not names:
        raise ValueError(f"{path}: no chain; expected a chain's name a line")
    return names


class Chains(Dataset):
    """Pairs (x, y) on the canvas of the real task, read from the files when asked for.

    A chain longer than the canvas is cropped to a stretch drawn anew at each access (by torch's
    generator, which its workers seed) if `vary`, else to its beginning.
    """

    def __init__(self, folder: Path, names: list[str], vary: bool):
        self.folder, self.names, self.vary = folder, names, vary
        for path in (path for name in names for path in self.paths(name)):
            if not path.exists():
                raise FileNotFoundError(
                    f"no file {path}, of a chain that the list names; it is part of PDNET "
                    "(protein.zip): put it there, or run on simulated data (--data simulated)"
                )

    def paths(self, name: str) -> tuple[Path, Path]:
        return self.folder / "features" / f"{name}.pkl", self.folder / "distance" / f"{name}-cb.npy"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        of_features, of_map = self.paths(self.names[index])
        features, content = files.read_pickled(of_features), files.read_pickled(of_map)
        try:
            if not isinstance(features, dict) or not isinstance(features.get("seq"), str):
                raise ValueError("expected a pickled dict with 'seq', a string")
            x = channels(features)
        except ValueError as error:
            raise ValueError(f"{of_features}: {error}") from None
        try:
            if getattr(content, "shape", None) != (3,) or str(content[1]) != features["seq"]:
                raise ValueError("expected (length, the sequence of the features, distances)")
            y = distances(content[2], x.shape[1])
        except ValueError as error:
            raise ValueError(f"{of_map}: {error}") from None
        spare = x.shape[1] - SIDE_REAL
        start = int(torch.randint(spare + 1, ())) if self.vary and spare > 0 else 0
        x, y = place(x, SIDE_REAL, 0, start), place(y, SIDE_REAL, np.nan, start)
        return torch.from_numpy(x), torch.from_numpy(y)


def read(root: Path, split: str) -> Dataset:
    """The real pairs of a split ("train", "val" or "test"), float32 (57, 512, 512) and
    (1, 512, 512), read lazily: all of them would take 200 GB.

    Raises: FileNotFoundError or ValueError, naming the file and what it should hold; for the
        content of a chain's files when that chain is asked for.
    """
    folder = download.unpacked(root, "psicov/protein", ARCHIVE, FILES[ARCHIVE])
    if split == "test":
        return Chains(folder / "psicov", identifiers(folder / "psicov.lst"), vary=False)
    names = identifiers(folder / "deepcov.lst")
    if len(names) <= 100:
        raise ValueError(f"{folder / 'deepcov.lst'}: {len(names)} chains, expected more than 100")
    names = names[100:] if split == "train" else names[:100]
    return Chains(folder / "deepcov", names, vary=split == "train")


TASK = {
    "title": "PSICOV: distances between the residues of a protein",
    "x_shape": (57, SIDE, SIDE),
    "y_shape": (1, SIDE, SIDE),
    "kind": "regression",
    "num_classes": 1,
    "loss": partial(metrics.mse, clip=16.0, scale=16.0),
    "metric": metrics.mae8,
    "metric_name": "MAE_8 (angstrom)",
    "sources": {"embedded": "shapes", "paper": "voc"},
    "splits": ("train", "val", "test"),
    "settings": {"align_samples": 96},  # more of 57 channels would take longer than all the rest
    "sizes": {"train": 240, "val": 60, "test": 120},
    "published": {
        "Hand-designed": 3.35,
        "NAS-Bench-360": 2.94,
        "DASH": 3.30,
        "Perceiver IO": 8.06,
        "FPT": 4.66,
        "NFT": 1.92,
        "ORCA": 1.91,
        "PaRe": 0.99,
    },
}
