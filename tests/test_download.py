"""tasks/download.py against a server on this machine, good and bad; the tables FILES."""

import contextlib
import functools
import hashlib
import http.server
import importlib
import io
import os
import re
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

import tasks
from tasks import download, satellite
from tasks.download import Remote, fetch, part_of, unpacked

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5, SHA256 = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()
NAME = "set/some.bin"
SOURCES = ("cifar10", "tiny_imagenet", "voc", "conll2003")


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` in the way that the path names; counts the requests and notes their ranges.

    cut: after so many bytes; cuts: how many requests are cut.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.ranges = CONTENT, '"a"', []
        self.cut, self.cuts = 1_200_000, 0
        self.release = threading.Event()  # of requests that hang

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def handle_error(self, request, client_address):
        pass  # a connection that the client dropped


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, path = self.server, self.path.strip("/")
        server.ranges.append(self.headers.get("Range"))
        if path.isdecimal():
            return self.send_error(int(path))
        if path.startswith("to/") or path == "loop":
            self.send_response(302)
            self.send_header("Location", self.path[4:] if path != "loop" else self.path)
            return self.end_headers()
        if path == "hang":
            server.release.wait(10)
            return None
        content, first, kind = server.content, 0, "application/octet-stream"
        if path.startswith("page"):
            content = b"\n<!DOCTYPE html><html>Please log in</html>" * 1000
            kind = "text/html; charset=utf-8" if path == "page" else kind
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", server.etag) == server.etag
        if asked and path != "norange" and (same or path == "careless"):
            first = int(asked[1])
            if first >= len(content):
                return self.send_error(416)
            self.send_response(206)
            shift = 7 if path == "shifted" else 0
            last, length = len(content) - 1, len(content)
            self.send_header("Content-Range", f"bytes {first + shift}-{last}/{length}")
        else:
            self.send_response(200)
        if path != "nolength":
            self.send_header("Content-Length", str(len(content) - first))
        self.send_header("Content-Type", kind)
        self.send_header("ETag", server.etag)
        self.end_headers()
        rest = content[first:]
        if path == "stall":
            self.wfile.write(rest[:1000])
            return server.release.wait(10)
        if server.cuts > 0:
            server.cuts -= 1
            rest = rest[: server.cut]
        self.wfile.write(rest)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_S", 0)
    with Server() as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def remote(url, md5=MD5, size=3e6):
    return Remote(url, size, "CC0", "https://example.org/set", md5)


def left(root):
    """What is under a directory."""
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def good(root, server, path="file", **how):
    """Fetch, and check that the file is there, is right, and that nothing else is left."""
    got = fetch(root, NAME, remote(server.url(path), **how))
    assert got == root / NAME and got.read_bytes() == server.content
    assert left(root) == ["checksums.txt", NAME]


def bad(root, error, message, *args, **how):
    """Fetch, and check that it fails with one line and leaves no file in the target's place."""
    with pytest.raises(error, match=message) as caught:
        fetch(root, NAME, *args, **how)
    line = str(caught.value)
    assert "\n" not in line and str(root / NAME) in line
    assert line.endswith("(--data simulated)") or "run again" in line
    assert not (root / NAME).exists()
    return line


# ---- servers that serve ----


def test_a_file_comes_whole_with_its_sha256_and_only_once(server, tmp_path, capsys):
    good(tmp_path, server)
    shown = capsys.readouterr()
    assert shown.out == "" and "some.bin: downloading 3 MB from http://127.0.0.1" in shown.err
    assert (tmp_path / "checksums.txt").read_text() == f"{SHA256}  {NAME}\n"
    good(tmp_path, server)
    assert server.ranges == [None], "asked again for what is there"


def test_a_file_that_is_there_is_not_touched(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / NAME).write_bytes(b"made by hand")
    assert (
        fetch(tmp_path, NAME, remote("https://nowhere.invalid/x")).read_bytes() == b"made by hand"
    )
    assert left(tmp_path) == [NAME]


@pytest.mark.parametrize(("path", "md5"), [("file", MD5), ("file", None), ("careless", MD5)])
def test_a_connection_cut_twice_is_resumed(path, md5, server, tmp_path):
    server.cuts = 2
    good(tmp_path, server, path, md5=md5)
    first, second = server.cut - 1, 2 * server.cut - 2
    assert server.ranges == [None, f"bytes={first}-", f"bytes={second}-"]


def test_a_server_that_ignores_ranges_is_asked_anew(server, tmp_path):
    server.cuts = 1
    good(tmp_path, server, "norange")
    assert len(server.ranges) == 2


def test_a_server_that_sends_another_part_is_asked_anew(server, tmp_path):
    server.cuts = 1
    good(tmp_path, server, "shifted")
    assert server.ranges == [None, f"bytes={server.cut - 1}-", None]


def test_redirects_are_followed_and_still_resume(server, tmp_path):
    server.cuts = 1
    good(tmp_path, server, f"to/{server.url('file')}")
    assert server.ranges == [None, None] + [f"bytes={server.cut - 1}-"] * 2


def test_the_next_run_goes_on_where_this_one_ended(server, tmp_path):
    server.cut, server.cuts = 300_000, download.TRIES
    bad(
        tmp_path, FileNotFoundError, "cut after 1.2 MB of 3 MB; .*.part", remote(server.url("file"))
    )
    size = part_of(tmp_path / NAME).stat().st_size
    assert size == download.TRIES * 299_999 + 1
    server.ranges.clear()
    good(tmp_path, server)
    assert server.ranges == [f"bytes={size - 1}-"]


def test_a_part_that_is_complete_needs_no_more_than_its_last_byte(server, tmp_path):
    (tmp_path / "set").mkdir()
    part_of(tmp_path / NAME).write_bytes(CONTENT)
    good(tmp_path, server)
    assert server.ranges == [f"bytes={len(CONTENT) - 1}-"]


def test_a_part_that_is_too_long_is_thrown_away(server, tmp_path):
    (tmp_path / "set").mkdir()
    part_of(tmp_path / NAME).write_bytes(CONTENT + b"more")
    good(tmp_path, server)


@pytest.mark.parametrize("path", ["file", "careless"])
def test_a_file_that_changed_between_two_tries_is_not_mixed(path, server, tmp_path):
    server.cut, server.cuts = 300_000, download.TRIES
    bad(tmp_path, FileNotFoundError, "was cut", remote(server.url(path), md5=None))
    server.content, server.etag = CONTENT[::-1], '"b"'
    good(tmp_path, server, path, md5=None)


def test_no_length_is_enough_where_the_checksum_is_known(server, tmp_path):
    good(tmp_path, server, "nolength")


# ---- servers that do not ----


def test_always_cut(server, tmp_path):
    server.cut, server.cuts = 100_000, 99
    line = bad(tmp_path, FileNotFoundError, "connection was cut after", remote(server.url("file")))
    assert len(server.ranges) == download.TRIES and "some.bin.part has 400 kB of it" in line
    content = part_of(tmp_path / NAME).read_bytes()
    assert content == CONTENT[: len(content)] and len(content) == 4 * 99_999 + 1


def test_a_try_that_brought_much_does_not_count(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PROGRESS", 100_000)
    server.cut, server.cuts = 300_000, 8
    good(tmp_path, server)


def test_a_flipped_byte(server, tmp_path):
    server.content = CONTENT[:5000] + bytes([CONTENT[5000] ^ 1]) + CONTENT[5001:]
    line = bad(tmp_path, ValueError, f"not {MD5} as published", remote(server.url("file")))
    assert "it was deleted" in line and left(tmp_path) == []


def test_another_file_than_the_first_time(server, tmp_path):
    good(tmp_path, server, md5=None)
    (tmp_path / NAME).unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(ValueError, match=f"not {SHA256} as .*checksums.txt has it") as caught:
        fetch(tmp_path, NAME, remote(server.url("file"), md5=None))
    assert "\n" not in str(caught.value) and left(tmp_path) == ["checksums.txt"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("page", r"a web page \(HTML\) in its place"),
        ("page-that-claims-to-be-a-file", r"a web page \(HTML\) in its place"),
        ("403", "HTTP 403 Forbidden"),
        ("404", "HTTP 404 Not Found"),
        ("loop", "HTTP 302 The HTTP server returned a redirect error"),
        ("500", "HTTP 500 Internal Server Error"),
        ("to/ftp://127.0.0.1/file", "leads to ftp://127.0.0.1/file, which is not https"),
        ("to/http://example.org/file", "leads to http://example.org/file, which is not https"),
        ("to/file:///etc/hostname", "HTTP 302 .*'file:///etc/hostname' is not allowed"),
    ],
)
def test_pages_refusals_and_bad_redirects(path, message, server, tmp_path):
    before = remote(server.url(path), size=None)
    line = bad(tmp_path, FileNotFoundError, f"cannot be had: .*{message}", before)
    assert "https://example.org/set" in line and "CC0" in line
    assert len(server.ranges) == {"500": download.TRIES, "loop": 5}.get(path, 1)


def test_no_way_from_https_to_http(tmp_path):
    request = urllib.request.Request("https://127.0.0.1/file")
    with pytest.raises(download.Unavailable, match="leads to http://127.0.0.1/file"):
        redirects = download._Redirects()
        redirects.redirect_request(request, None, 302, "Found", {}, "http://127.0.0.1/file")
    bad(tmp_path, FileNotFoundError, "it is not https", remote("http://example.org/file"))


def test_a_certificate_that_is_not_trusted_is_not_tried_again(server, tmp_path, monkeypatch):
    def refuse(*args, **how):
        server.ranges.append("refused")
        raise urllib.error.URLError(ssl.SSLCertVerificationError("certificate verify failed"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    bad(tmp_path, FileNotFoundError, "certificate verify failed", remote(server.url("file")))
    assert server.ranges == ["refused"]


def test_a_length_that_cannot_be_it(server, tmp_path):
    bad(tmp_path, FileNotFoundError, "has 3000000 bytes, not about 1600000000",
        remote(server.url("file"), size=1.6e9))  # fmt: skip
    unknown = remote(server.url("nolength"), md5=None)
    bad(tmp_path, FileNotFoundError, "does not say how long", unknown)


def test_a_closed_port(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
    line = bad(tmp_path, FileNotFoundError, "no connection to 127.0.0.1", remote(url))
    assert "3 MB" in line and left(tmp_path) == [] == list(tmp_path.iterdir())


def test_a_server_that_does_not_answer_and_one_that_stops(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "READ_S", 0.1)
    monkeypatch.setattr(download, "TRIES", 2)
    bad(tmp_path, FileNotFoundError, "no answer within 0.1 s", remote(server.url("hang")))
    bad(tmp_path, FileNotFoundError, "no more of it came for 0.1 s", remote(server.url("stall")))
    assert part_of(tmp_path / NAME).read_bytes() == CONTENT[:1999]


def test_without_a_network_the_end_comes_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CONNECT_S", 0.2)
    over = threading.Event()

    def look_up(*args, **how):
        over.wait(10)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", look_up)
    start = time.monotonic()
    bad(tmp_path, FileNotFoundError, "no connection to .* within 0.2 s", remote("https://a.b/c"))
    assert time.monotonic() - start < 2
    over.set()


def test_a_full_disk(server, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: usage)
        line = bad(tmp_path, ValueError, "takes 3 MB more, but 1 kB", remote(server.url("file")))
        assert "another --data-dir" in line

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    bad(tmp_path, ValueError, "cannot be written: No space left", remote(server.url("file")))
    monkeypatch.undo()
    good(tmp_path, server)


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_disk_that_fills_up_leaves_a_beginning(server, tmp_path):
    code = (
        "import resource, signal, sys; from pathlib import Path; import download as d\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: d.fetch(Path(sys.argv[1]), 'set/some.bin', d.Remote(sys.argv[2], 3e6, '', ''))\n"
        "except ValueError as error: print(error)\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path), server.url("file")]
    said = subprocess.run(argv, capture_output=True, text=True, cwd=Path(download.__file__).parent)
    assert "cannot be written: File too large" in said.stdout, said
    assert part_of(tmp_path / NAME).read_bytes() == CONTENT[:1_000_000]
    good(tmp_path, server)


def test_a_file_is_in_the_way_of_the_directory(server, tmp_path):
    (tmp_path / "set").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        fetch(tmp_path, NAME, remote(server.url("file")))


def test_two_at_once_download_once(server, tmp_path):
    server.cuts = 1
    both = [threading.Thread(target=good, args=(tmp_path, server)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert left(tmp_path) == ["checksums.txt", NAME] and len(server.ranges) == 2


# ---- archives ----

MEMBERS = {"top/a.txt": b"a", "top/deep/b.txt": b"b", "beside/c.txt": b"c"}


def packed(kind, around=""):
    """The bytes of an archive of MEMBERS."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            for name, content in MEMBERS.items():
                file.writestr(around + name, content)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as file:
        for name, content in MEMBERS.items():
            member = tarfile.TarInfo(around + name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return out.getvalue()


def opened(root, server, **how):
    how = {"md5": None, "size": None} | how
    return unpacked(root, "set/top", "set/some.pack", remote(server.url("file"), **how))


@pytest.mark.parametrize("around", ["", "data/"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_archives_are_fetched_and_unpacked_once(kind, around, server, tmp_path, capsys):
    server.content = packed(kind, around)
    assert opened(tmp_path, server) == tmp_path / "set/top" == opened(tmp_path, server)
    inside = {name: (tmp_path / "set" / name).read_bytes() for name in MEMBERS}
    assert inside == MEMBERS and len(server.ranges) == 1
    assert {p.name for p in (tmp_path / "set").iterdir()} == {"top", "beside", "some.pack"}
    assert capsys.readouterr().out == ""
    (tmp_path / "set/some.pack").unlink()
    assert opened(tmp_path, server) == tmp_path / "set/top" and len(server.ranges) == 1


def test_what_is_there_is_not_replaced(server, tmp_path):
    (tmp_path / "set/beside").mkdir(parents=True)
    (tmp_path / "set/beside/c.txt").write_text("mine")
    server.content = packed("zip")
    opened(tmp_path, server)
    assert (tmp_path / "set/beside/c.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole archive"),
        (packed("tar")[:600], "not a whole archive"),
        (packed("tar.gz")[:100], "not a whole archive"),
        (packed("zip")[:-30], "not a whole archive"),
        (packed("zip").replace(b"top/", b"pot/"), "it holds no set/top"),
    ],
    ids=["empty", "tar", "tar.gz", "zip", "another folder"],
)
def test_damaged_and_other_archives(content, message, server, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/some.pack").write_bytes(content)
    with pytest.raises(ValueError, match=f"some.pack: {message}.*delete it and run again") as error:
        opened(tmp_path, server)
    assert "\n" not in str(error.value) and not server.ranges
    assert not (tmp_path / "set/top").exists()
    assert not list(tmp_path.rglob("*unpacked*"))


def test_an_archive_put_there_by_hand_must_be_the_published_one(server, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/some.pack").write_bytes(packed("zip"))
    with pytest.raises(ValueError, match=f"md5 is not {MD5} as published"):
        opened(tmp_path, server, md5=MD5)
    opened(tmp_path, server, md5=hashlib.md5(packed("zip")).hexdigest())


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_nothing_is_written_outside(kind, server, tmp_path):
    server.content = packed(kind, "../../")
    with contextlib.suppress(ValueError):
        opened(tmp_path / "root", server)
    assert {p.name for p in tmp_path.iterdir()} == {"root"}


# ---- the tables of the tasks and sources ----


def module_of(name):
    return importlib.import_module(f"tasks.{'sources.' if name in SOURCES else ''}{name}")


@pytest.mark.parametrize("name", (*tasks.NAMES, *SOURCES))
def test_every_set_has_addresses_under_https(name):
    table = module_of(name).FILES
    assert table
    for path, entry in table.items():
        assert urlsplit(entry.url).scheme == "https" and urlsplit(entry.url).hostname, path
        assert not Path(path).is_absolute() and ".." not in path
        assert entry.licence and entry.page and (entry.size is None or entry.size > 1000)
        assert entry.md5 is None or re.fullmatch("[0-9a-f]{32}", entry.md5)
        assert entry.size or name == "conll2003", "no size is known"


def test_no_file_has_two_addresses_and_no_address_two_files():
    tables = [module_of(name).FILES for name in (*tasks.NAMES, *SOURCES)]
    paths = [path for table in tables for path in table]
    urls = [entry.url for table in tables for entry in table.values()]
    assert len(set(paths)) == len(paths) and len(set(urls)) == len(urls)


@pytest.mark.parametrize("name", tasks.NAMES)
def test_a_task_without_its_files_says_all_one_needs_to_know(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        tasks.load_task(name, "real", tmp_path, published=name in tasks.PDES)
    line = str(caught.value)
    assert re.search(rf"no file {tmp_path}/\S+", line) and "https://" in line
    assert re.search(r"\d (GB|MB), licence: \S", line)
    assert line.endswith(f"(--data simulated): python orca.py --task {name}")
    assert "\n" not in line and len(line) < 540 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cifar10", "tiny_imagenet", "voc"])
def test_a_source_without_its_files_says_all_one_needs_to_know(name, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"GB|MB, licence.*https.*--source shapes"
    ) as caught:
        tasks.load_source(name, 5, root=tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_task_downloads_what_it_reads(server, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    part = {"data": rng.random((50, 46)), "label": rng.permutation(np.arange(50) % 24 + 1)}
    out = io.BytesIO()
    np.save(out, part, allow_pickle=True)  # as the published files are made
    server.content = out.getvalue()
    table = {path: remote(server.url("file"), None, None) for path in satellite.FILES}
    monkeypatch.setattr(satellite, "FILES", table)
    task = tasks.load_task("satellite", "real", tmp_path)
    assert len(task.train) + len(task.val) == 50 == len(task.test) and task.data == "real"
    assert set(left(tmp_path)) == {"checksums.txt", *table}
    tasks.load_task("satellite", "real", tmp_path)
    assert len(server.ranges) == 2


@pytest.mark.parametrize("name", ["satellite", "advection"])
def test_simulated_data_never_ask_the_network(name, monkeypatch):
    monkeypatch.setattr(download, "fetch", None)
    monkeypatch.setattr(socket, "create_connection", None)
    assert tasks.load_task(name, train_size=20).data == "simulated"


def test_where_downloads_are_off_a_missing_file_is_said_at_once(tmp_path):
    remote = download.Remote("https://127.0.0.1:9/a.npy", 1e6, "MIT", "https://example.org")
    with download.off(), pytest.raises(FileNotFoundError, match=r"no file .*a.npy \(1 MB"):
        download.fetch(tmp_path, "a.npy", remote)
    assert not list(tmp_path.iterdir()) and not download._Switch.off
