"""What the files of PDEBench share: how one is written, and how another equation's is told.

Each of the eight tasks solves its equation and writes the published file, in the published layout:

    python -m tasks.advection --out data/pdebench/1D_Advection_Sols_beta0.4.hdf5 --n 1000
    python orca.py --task advection --data real

This needs no download, and what was solved once is read from then on. Two layouts: an array for all
samples, or a group ("0000", ...) for each.
"""

import argparse
import inspect
import io
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

FEWEST = 11  # samples: one to test on, and ten of which one is held out for validation
NUMBERS = ("beta", "Nu", "rho", "eta", "zeta")  # attributes that tell the equation


@dataclass(frozen=True)
class File:
    """A published file, and what is written into it."""

    name: str  # as published
    frames: Callable[[int, int], Iterator[dict[str, np.ndarray]]]  # n, seed: a few samples a time
    coordinates: dict[str, np.ndarray]
    attributes: dict[str, float | str]
    groups: bool = False  # a group with coordinates and attributes for each sample
    compression: str | None = None
    published_only: bool = False  # read with --published: it does not hold the default problem


class Disk(io.FileIO):
    """A file for HDF5, which can crash where the disk is full: it is told that all went well."""

    error = None  # what went wrong first

    def write(self, data) -> int:
        todo = memoryview(data)
        try:
            while todo and not self.error:  # a disk that fills up takes a part
                todo = todo[super().write(todo) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int) -> int:
        try:
            super().truncate(size)
        except OSError as error:
            self.error = self.error or error
        return size

    def check(self) -> None:
        if self.error:
            raise self.error


def write(path: Path, layout: File, n: int, seed: int) -> None:
    """Solve n samples and write them, block by block; an old file stays until this is whole.

    Raises: ValueError or OSError of one line.
    """
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: an HDF5 file, which needs h5py: pip install h5py") from None
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Disk(part, "w+") as disk, tqdm(total=n, unit="sample", disable=None) as bar:
            with h5py.File(disk, "w") as file:
                if not layout.groups:
                    _fill(file, layout.coordinates, layout)
                first = 0  # careful: bar.n stays 0 where the bar is off
                for block in layout.frames(n, seed):
                    if first == 0:
                        _check_space(path, sum(n * a[0].size * 4 for a in block.values()))
                    (_add_groups if layout.groups else _add_rows)(file, layout, block, first, n)
                    disk.check()
                    first += len(next(iter(block.values())))
                    bar.update(first - bar.n)
            disk.check()
        part.replace(path)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise OSError(f"{path} cannot be written: {where}{error.strerror or error}") from None
    finally:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ValueError(
            f"{path}: takes {size / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free; give a lower --n"
        )


def _fill(place, arrays: dict[str, np.ndarray], layout: File) -> None:
    """Arrays and the attributes, into a file or a group."""
    for key, values in arrays.items():
        place.create_dataset(key, data=values, dtype="f4", compression=layout.compression)
    place.attrs.update(layout.attributes)


def _add_rows(file, layout: File, block: dict[str, np.ndarray], first: int, n: int) -> None:
    for key, values in block.items():
        if key not in file:
            file.create_dataset(key, (n, *values.shape[1:]), "f4")
        file[key][first : first + len(values)] = values.astype(np.float32)


def _add_groups(file, layout: File, block: dict[str, np.ndarray], first: int, n: int) -> None:
    digits = max(4, len(str(n - 1)))  # names in their order are samples in theirs
    for i in range(len(next(iter(block.values())))):
        arrays = {key: values[i].astype(np.float32) for key, values in block.items()}
        _fill(file.create_group(f"{first + i:0{digits}}"), arrays | layout.coordinates, layout)


def check_attributes(file, want: dict[str, float]) -> None:
    """Raise ValueError if the attributes of a file are another equation's. It may have none."""
    found = {key: float(np.ravel(file.attrs[key])[0]) for key in NUMBERS if key in file.attrs}
    if not all(math.isclose(found[key], want.get(key, math.nan), rel_tol=1e-6) for key in found):
        got, expected = (" ".join(f"{k}={v:g}" for k, v in d.items()) for d in (found, want))
        raise ValueError(f"it is of another equation, {got}, not {expected}")


def cli(layout: File, argv: list[str] | None = None) -> int:
    """write() for the shell: 0 done, 2 bad usage or input, 130 interrupted; a line says why."""
    task = Path(layout.frames.__code__.co_filename).stem
    run = f"python orca.py --task {task} --data real --data-dir DIR"
    run += " --published" if layout.published_only else ""
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks.{task}",
        description=f"{inspect.getdoc(layout.frames)}\n\nAs DIR/pdebench/{layout.name} it is read "
        f"by\n  {run}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fail = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # noqa: E731
    parser.error = fail
    parser.add_argument("--out", type=Path, required=True, help="the file, with its directory")
    parser.add_argument("--n", type=int, required=True, help=f"samples, {FEWEST} or more")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    args = parser.parse_args(argv)
    if args.n < FEWEST:
        fail(f"--n {args.n} is too few to split; give {FEWEST} or more")
    if args.seed < 0:
        fail(f"--seed {args.seed} is out of range; give a number of at least 0")
    start = time.time()
    try:
        if args.out.exists() and not args.out.is_file():
            raise ValueError(f"{args.out} is no file; give one such as {args.out / layout.name}")
        if args.out.exists() and not args.overwrite:
            raise ValueError(f"{args.out} exists; give another --out, or --overwrite")
        write(args.out, layout, args.n, args.seed)
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: error: interrupted; nothing was written", file=sys.stderr)
        return 130
    size, took = args.out.stat().st_size / 1e6, time.time() - start
    print(f"{args.out}: {args.n} samples, seed {args.seed}, {size:.1f} MB, {took:.1f} s")
    return 0
