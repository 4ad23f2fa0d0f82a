"""Files of real data from the web: each comes into its place whole, or not at all.

A task or a source has a table FILES: {path under the data directory: Remote}. `fetch` downloads a
file that is missing; one that is there is not touched. What has arrived lies in NAME.part beside
the target until it is complete and its checksum right. A later try goes on from there, if the
server still has the same file (NAME.part.tag is its mark for it).

Where no checksum is published, nothing tells that the file is the right one. The sha256 of every
download is written to checksums.txt in the data directory (`sha256sum -c checksums.txt` checks it),
and a file that is downloaded again must have the sha256 that is written there.
"""

import contextlib
import hashlib
import http.client
import os
import shutil
import socket
import ssl
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

CONNECT_S, READ_S = 4, 30  # how long to wait for a connection, and for more of a file
TRIES, PAUSE_S = 4, 2  # tries in a row that brought next to nothing, the pause after the first
PROGRESS = 2**24  # bytes: a try that brought so many does not count as failed
BLOCK = 2**20  # bytes
LOCAL = ("127.0.0.1", "localhost", "::1")
SUMS = "checksums.txt"
SIMULATE = "run on simulated data (--data simulated)"
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)


@dataclass(frozen=True)
class Remote:
    """A file on the web."""

    url: str
    size: float | None  # bytes, about: as published, rounded
    licence: str
    page: str  # where else it is, or what it is part of
    md5: str | None = None  # of the publisher

    def __str__(self) -> str:
        return f"{bytes_of(self.size)}, licence: {self.licence}"


def nas_bench(name: str, size: float | None, licence: str) -> Remote:
    """A file of NAS-Bench-360 (Tu et al. 2022), which publishes no checksums."""
    page = "NAS-Bench-360, also in https://drive.google.com/drive/folders/"
    page += "1OOp6UrCiP79mTIkCrUdjjHWDo8K0bJUw"  # its authors moved there in October 2022
    return Remote(f"https://pde-xd.s3.amazonaws.com/{name}", size, licence, page)


def darus(number: int, size: float, md5: str) -> Remote:
    """A file of PDEBench (Takamoto et al. 2022)."""
    url = f"https://darus.uni-stuttgart.de/api/access/datafile/{number}"
    return Remote(url, size, "CC BY", "PDEBench, https://doi.org/10.18419/darus-2986", md5)


def bytes_of(size: float | None) -> str:
    """A size to read: '1.6 GB'."""
    if size is None:
        return "size unknown"
    unit, name = next(
        (u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u[0]), (1, "B")
    )
    return f"{size / unit:.3g} {name}"


# ---- 1. A file in its place ----


class Unavailable(Exception):
    """The server does not give the file, and will not if asked again."""


class Cut(Exception):
    """The connection broke, or the server is busy: another try may do."""


class _Switch:
    off = False


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Inside, nothing is downloaded: a file that is missing is a FileNotFoundError at once."""
    before, _Switch.off = _Switch.off, True
    try:
        yield
    finally:
        _Switch.off = before


def fetch(root: Path, name: str, remote: Remote, instead: str = SIMULATE) -> Path:
    """root/name, downloaded if it is not there.

    Args: instead: how to do without the file, for the error message.
    Raises: FileNotFoundError if it cannot be had; ValueError if what came is not it, or cannot be
        written: one line that says why, how large the file is, where it is from and what to do.
    """
    path = Path(root) / name
    if path.exists():
        return path
    if _Switch.off:
        raise FileNotFoundError(f"no file {path} ({remote}, {remote.url})")
    try:
        reach(remote.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            if not path.exists():  # another process may have fetched it meanwhile
                _download(path, remote)
                _finish(Path(root), name, remote)
    except (Unavailable, Cut) as error:
        part, kept = part_of(path), ""
        if part.exists():
            kept = f"; {part.name} has {bytes_of(part.stat().st_size)} of it, run again to go on"
        raise FileNotFoundError(
            f"no file {path} ({remote}), and {remote.url} cannot be had: {error}{kept}; get it by "
            f"hand ({remote.page}) and put it there, or {instead}"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path} ({bytes_of(remote.size)}) cannot be written: {_reason(error)}; what has "
            f"arrived is kept; make room or choose another --data-dir, or {instead}"
        ) from None
    return path


def part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _tag_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.tag")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let other processes that want files in folder wait, where the system can do that."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows has neither
        yield
        return
    try:
        with contextlib.suppress(OSError):  # not on every network's disk
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _finish(root: Path, name: str, remote: Remote) -> None:
    """Check a complete NAME.part, make it NAME and write down its sha256."""
    path = root / name
    part, sums = part_of(path), root / SUMS
    md5, sha256 = _hashes(part)
    known = dict(line.split(maxsplit=1)[::-1] for line in _lines(sums))
    wrong = None
    if remote.md5 and md5 != remote.md5:
        wrong = f"md5 is {md5}, not {remote.md5} as published"
    elif known.get(name, sha256) != sha256:
        wrong = f"sha256 is {sha256}, not {known[name]} as {sums} has it from an earlier download"
    if wrong:
        _discard(path)
        raise ValueError(
            f"{remote.url}: not the file that {path} should be, its {wrong}; it was deleted; run "
            f"again, or get it by hand ({remote.page})"
        )
    os.replace(part, path)
    _tag_of(path).unlink(missing_ok=True)
    if name not in known:
        with sums.open("a", encoding="utf-8") as file:
            file.write(f"{sha256}  {name}\n")


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines() if len(line.split(maxsplit=1)) == 2]


def _hashes(path: Path) -> tuple[str, str]:
    """md5 and sha256 of a file."""
    hashes = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            for one in hashes:
                one.update(block)
    return tuple(one.hexdigest() for one in hashes)


def _discard(path: Path) -> None:
    part_of(path).unlink(missing_ok=True)
    _tag_of(path).unlink(missing_ok=True)


# ---- 2. Over the network ----


def _download(path: Path, remote: Remote) -> None:
    """Bring NAME.part to its full length; the try after a cut goes on where that one ended."""
    part, failed = part_of(path), 0
    with tqdm(unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                _receive(path, remote, bar)
                return
            except Cut:
                after = part.stat().st_size if part.exists() else 0
                failed = 0 if after - before >= PROGRESS else failed + 1
                if failed == TRIES:
                    raise
            time.sleep(PAUSE_S * failed)


def _receive(path: Path, remote: Remote, bar: tqdm) -> None:
    """One request: write what comes to NAME.part, from where it ends.

    Raises: Cut if it ended early; Unavailable; OSError if the disk does not take it.
    """
    part, tag = part_of(path), _tag_of(path)
    have = part.stat().st_size if part.exists() else 0
    first = max(have - 1, 0)  # one byte twice: no server refuses that, even if all are there
    headers = {"User-Agent": "cross-modal-fine-tuning (urllib)", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={first}-"
        if tag.exists() and tag.read_text("utf-8"):
            headers["If-Range"] = tag.read_text("utf-8")
    with _open(remote.url, headers) as answer:
        went_on, mark = answer.status == 206, answer.headers.get("ETag", "W/")
        if mark.startswith("W/"):  # a weak mark is no promise
            mark = answer.headers.get("Last-Modified", "")
        total = _total(answer, first)
        changed = went_on and mark and tag.exists() and tag.read_text("utf-8") != mark
        if changed or answer.status == 416 or (went_on and total is None):
            _discard(path)
            raise Cut("the server has another file than before, or part of one")
        _check(answer, total, remote)
        if not went_on:
            first = 0  # careful: a server need not know of ranges, and then begins anew
            tag.write_text(mark, "utf-8")
        _check_space(path, total, first)
        if bar.total is None:  # the first try
            bar.write(f"{path}: downloading {bytes_of(total)} from {remote.url}", file=sys.stderr)
        bar.total = total
        bar.update(first - bar.n)
        with part.open("r+b" if went_on else "wb") as file:
            file.truncate(first)
            file.seek(first)
            for block in _blocks(answer, READ_S):
                if file.tell() == 0 and block.lstrip()[:9].lower().startswith(
                    (b"<!doctype", b"<html")
                ):
                    raise Unavailable("the server sends a web page (HTML) in its place")
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
            length = file.tell()
    if total is not None and length < total:
        raise Cut(f"the connection was cut after {bytes_of(length)} of {bytes_of(total)}")


def _total(answer: http.client.HTTPResponse, first: int) -> int | None:
    """The length of the whole file; None if the server does not say, or sends another part."""
    if answer.status == 206:
        unit, _, rest = answer.headers.get("Content-Range", "").partition(" ")
        begin, _, length = rest.partition("/")
        fits = unit == "bytes" and begin.startswith(f"{first}-") and length.isdecimal()
        return int(length) if fits else None
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _check(answer: http.client.HTTPResponse, total: int | None, remote: Remote) -> None:
    """Raise Unavailable if an answer cannot be the file."""
    if answer.headers.get_content_type() == "text/html":
        raise Unavailable("the server sends a web page (HTML) in its place")
    if total is None and not answer.chunked and remote.md5 is None:
        raise Unavailable("the server does not say how long the file is, a cut would go unnoticed")
    if total is not None and remote.size and not 0.1 < total / remote.size < 10:
        raise Unavailable(f"the server's file has {total} bytes, not about {remote.size:.0f}")


def _check_space(path: Path, total: int | None, have: int) -> None:
    free, need = shutil.disk_usage(path.parent).free, (total or 0) - have
    if need > free:
        raise OSError(f"it takes {bytes_of(need)} more, but {bytes_of(free)} are free")


def _blocks(answer: http.client.HTTPResponse, wait_s: float) -> Iterator[bytes]:
    """The content of an answer. Raises: Cut, lest an error of the network look like the disk's."""
    while True:
        try:
            block = answer.read1(BLOCK)
        except TimeoutError:
            raise Cut(f"no more of it came for {wait_s} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Cut(_reason(error)) from None
        if not block:
            return
        yield block


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow to https only; from http on this machine (tests) also to http there."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not _safe(newurl) or (newurl.startswith("http:") and req.type == "https"):
            raise Unavailable(f"it leads to {newurl[:200]}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _safe(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOCAL)


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """The answer to a request, of status 200, 206 or 416. Raises: Unavailable or Cut."""
    opener = urllib.request.build_opener(_Redirects)
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=READ_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        error.close()
        kind = Cut if error.code >= 500 or error.code == 429 else Unavailable
        raise kind(f"HTTP {error.code} {error.reason}".splitlines()[0].strip()) from None
    except TimeoutError:
        raise Cut(f"no answer within {READ_S} s") from None
    except (OSError, http.client.HTTPException) as error:
        untrusted = isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError)
        raise (Unavailable if untrusted else Cut)(_reason(error)) from None


def reach(url: str) -> None:
    """Raise Unavailable unless the server, or the proxy to it, can be connected to in CONNECT_S.

    In a thread, since to look up a name takes as long as it pleases where there is no network.
    """
    if not _safe(url):
        raise Unavailable("it is not https")
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    problem = [f"no connection to {address[0]} within {CONNECT_S} s"]

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=CONNECT_S).close()
            problem[0] = None
        except OSError as error:
            problem[0] = f"no connection to {address[0]} ({_reason(error)})"

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    if problem[0]:
        raise Unavailable(problem[0])


def _reason(error: Exception) -> str:
    """One line of what went wrong."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]


# ---- 3. Archives ----


def unpacked(root: Path, folder: str, name: str, remote: Remote, instead: str = SIMULATE) -> Path:
    """The folder root/FOLDER/..., from the zip or tar file root/name, which is fetched if need be.

    The archive's content comes beside it: root/folder should be part of that.
    Raises: FileNotFoundError or ValueError, as fetch; also if the archive is damaged.
    """
    target = Path(root) / folder
    if target.is_dir():
        return target
    was_there = (Path(root) / name).is_file()
    archive = fetch(root, name, remote, instead)
    again = f"delete it and run again, or get it by hand ({remote.page})"
    if was_there and remote.md5 and _hashes(archive)[0] != remote.md5:
        raise ValueError(f"{archive}: its md5 is not {remote.md5} as published; {again}")
    try:
        with _alone(archive.parent):
            if not target.is_dir():  # another process may have unpacked it meanwhile
                print(f"{archive}: unpacking", file=sys.stderr)
                _unpack(archive, target)
    except DAMAGED as error:
        raise ValueError(f"{archive}: not a whole archive ({_reason(error)}); {again}") from None
    except OSError as error:
        raise ValueError(f"{archive} cannot be unpacked: {_reason(error)}") from None
    if not target.is_dir():
        raise ValueError(f"{archive}: it holds no {folder}; {again}")
    return target


def _unpack(archive: Path, target: Path) -> None:
    """Put the content of an archive beside it; nothing that is there is replaced.

    It is first unpacked elsewhere, and what target is part of is moved last: where target is,
    everything is. A folder around it all, which some archives have, is left out.
    """
    scratch = archive.with_name(f"{archive.name}.unpacked")
    top = target.relative_to(archive.parent).parts[0]
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                _check_space(archive, sum(member.file_size for member in file.infolist()), 0)
                file.extractall(scratch)
        else:
            _check_space(archive, archive.stat().st_size, 0)
            with tarfile.open(archive) as file:
                file.extractall(scratch, filter="data")  # nothing outside of it, no devices
        inside = [place for place in (scratch, *scratch.glob("*")) if (place / top).is_dir()]
        for entry in sorted(inside[0].iterdir() if inside else (), key=lambda e: e.name == top):
            _move(entry, archive.parent / entry.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move(entry: Path, place: Path) -> None:
    if not place.exists():
        entry.replace(place)
    elif entry.is_dir() and place.is_dir():
        for inner in entry.iterdir():
            _move(inner, place / inner.name)
