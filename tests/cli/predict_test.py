"""`deptjax predict` of a file: interrupted in every way, it ends with the bytes of a job that nothing interrupted."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from tests.cli.conftest import Command, Tuned
from tests.cli.train_test import ROOT, environment, program

ROWS = 1200
CHUNK = 32  # with --batch-size 4
THINGS = ("film", "story", "plot", "actor")


def texts(count: int) -> str:
    """Returns lines of different texts, of different lengths."""
    return "".join(f"the {THINGS[i % 4]} number {i} was {'very ' * (i % 7)}good\n" for i in range(count))


@pytest.fixture
def words(tuned: Tuned, tmp_path: pathlib.Path) -> list[object]:
    """The words of a job of many small batches."""
    file = tmp_path / "texts.txt"
    file.write_text(texts(ROWS))
    output = tmp_path / "out.jsonl"
    return ["predict", "--prompt", tuned.prompt, file, "--output", output, "--scores", "--batch-size", 4]


def wait_for(file: pathlib.Path, size: int, process: subprocess.Popen[str]) -> None:
    """Returns when a file is larger than `size`."""
    while not file.exists() or file.stat().st_size <= size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """Has no file grow beyond `size` bytes, as on a disk that is full then."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def names(folder: pathlib.Path) -> set[str]:
    """Returns the names of the files in a folder."""
    return {file.name for file in folder.iterdir()}


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    deptjax: Command, words: list[object], tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert deptjax(*words).status == 0
    whole = output.read_bytes()
    assert whole.count(b"\n") == ROWS
    output.unlink()

    part = tmp_path / "out.jsonl.part"
    for share in (0, 0.4):
        with program(*words) as process:
            wait_for(part, int(share * len(whole)), process)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        assert names(tmp_path) == {"texts.txt", "out.jsonl.part", "out.jsonl.part.json"}
    with part.open("ab") as file:  # and in the middle of a line
        file.write(b'{"prediction": "posi')
    done = part.read_bytes().count(b"\n") // CHUNK * CHUNK
    ended = deptjax(*words)
    assert (ended.status, ended.out) == (0, "")
    assert f"deptjax: resuming at row {done + 1:,} of 1,200, behind the answers in {part}\n" in ended.err
    assert output.read_bytes() == whole
    assert names(tmp_path) == {"texts.txt", "out.jsonl"}


@pytest.mark.parametrize(("number", "count"), [(signal.SIGINT, 10), (signal.SIGTERM, 80)])
def test_a_signal_ends_it_in_a_line_and_keeps_what_is_answered(
    tuned: Tuned, tmp_path: pathlib.Path, number: signal.Signals, count: int
) -> None:
    part = tmp_path / "out.jsonl.part"
    with program("predict", "--prompt", tuned.prompt, "--output", tmp_path / "out.jsonl", "--batch-size", 4) as process:
        assert process.stdin is not None
        process.stdin.write(texts(count))  # less than a chunk, or two and a half; then it waits for the rest
        process.stdin.flush()
        wait_for(part, -1, process)
        while count > CHUNK and part.read_bytes().count(b"\n") < 2 * CHUNK:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    if count < CHUNK:
        assert err == "deptjax: stopped\n"
        assert not names(tmp_path)
    else:
        assert err == f"deptjax: 64 answers are kept in {part}\ndeptjax: stopped\n"
        assert names(tmp_path) == {"out.jsonl.part", "out.jsonl.part.json"}


def test_one_process_writes_a_file(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path) -> None:
    file, output = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    file.write_text(texts(3))
    asked = ("predict", "--prompt", tuned.prompt, file, "--output", output)
    told = f"--output {output} is being written by another process; wait, or choose another file"
    with program("predict", "--prompt", tuned.prompt, "--output", output) as first:
        assert first.stdin is not None
        first.stdin.write(texts(1))  # from which it tells the format; then it waits
        first.stdin.flush()
        wait_for(tmp_path / "out.jsonl.part", -1, first)
        assert deptjax(*asked).error == told
        assert deptjax(*asked, "--overwrite").error == told
        first.communicate(texts(4), timeout=60)
    assert first.returncode == 0
    assert output.read_bytes().count(b"\n") == 5


def test_a_full_disk_is_told_and_gone_on_from(deptjax: Command, words: list[object], tmp_path: pathlib.Path) -> None:
    output = tmp_path / "out.jsonl"
    assert deptjax(*words).status == 0
    whole = output.read_bytes()
    output.unlink()
    with room_for(len(whole) // 2):
        ended = deptjax(*words)
    assert ended.error == f"no room on the disk while writing {output}; free some, then run the same command again"
    assert f"answers are kept in {output}.part; the same command goes on behind them\n" in ended.err
    assert (tmp_path / "out.jsonl.part").stat().st_size == len(whole) // 2
    assert "resuming at row" in deptjax(*words).err
    assert output.read_bytes() == whole


def test_other_flags_or_another_input_are_another_job(
    deptjax: Command, words: list[object], tmp_path: pathlib.Path
) -> None:
    part, file = tmp_path / "out.jsonl.part", tmp_path / "texts.txt"
    with room_for(5000):
        assert deptjax(*words).status == 2
    before = part.read_bytes()
    others: list[tuple[list[object], str]] = [
        (["--scores", "--batch-size", 8], "flags.batch_size was 4, is now 8"),
        (["--batch-size", 4], "flags.scores was True, is now nothing"),
        ([*words[6:], "--dtype", "bfloat16"], "flags.load_backbone.dtype was nothing, is now bfloat16"),
        ([*words[6:], "--prompt", f"again={words[2]}"], "prompts.again was nothing, is now "),
    ]
    for flags, told in others:
        flags = [*flags, "--task", "films"] if "prompts" in told else flags
        error = deptjax(*words[:6], *flags).error
        assert error.startswith(f"{part} holds the unfinished answers of another job (")
        assert told in error
        assert error.endswith("); --overwrite starts anew, or choose another --output")
    file.write_text(texts(ROWS - 1))
    assert "input.size was" in deptjax(*words).error
    assert part.read_bytes() == before
    file.write_text(texts(5))
    assert deptjax(*words, "--overwrite").status == 0
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 5
    assert names(tmp_path) == {"texts.txt", "out.jsonl"}


@pytest.mark.parametrize("field", ["prediction", "scores"])
def test_a_field_that_the_answer_has_too_is_refused_before_any_work(
    deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path, field: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n' * 600 + json.dumps({"text": "b", field: 1}) + "\n")
    words = ("predict", "--prompt", tuned.prompt, "--model", tmp_path / "nowhere", file, "--scores")
    ended = deptjax(*words)
    assert ended.error == f"{file}, line 601: the answer has a field '{field}' too; rename that of the input"
    assert ended.out == ""


def test_a_field_scores_is_only_in_the_way_of_scores(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "scores": [1, 2], "odd": "\\ud800"}\n')
    row = json.loads(deptjax("predict", "--prompt", tuned.prompt, file).out)
    assert list(row) == ["text", "scores", "odd", "prediction"]
    assert (row["scores"], row["odd"]) == ([1, 2], "\ud800")


def test_the_output_is_not_the_input(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text(texts(3))
    (tmp_path / "link").symlink_to(file)
    for name in (file, tmp_path / "link"):
        error = deptjax("predict", "--prompt", tuned.prompt, file, "--output", name, "--overwrite").error
        assert error == f"--output {name} would be written over the input {file}; choose another file"
    assert file.read_text() == texts(3)


def test_folders_are_told(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text(texts(3))
    asked = ("predict", "--prompt", tuned.prompt, file, "--output")
    assert "cannot write /proc/out: No such file or directory; choose another" in deptjax(*asked, "/proc/out").error
    assert deptjax("predict", "--prompt", tuned.prompt, tmp_path).error == f"{tmp_path} is a folder; name a file in it"
    assert names(tmp_path) == {"texts.txt"}


PEAK = (
    "import pathlib, sys; from deptjax.cli.main import main; status = main(sys.argv[1:]);"
    "print(pathlib.Path('/proc/self/status').read_text()); sys.exit(status)"
)


def most_memory(words: list[object]) -> int:
    """Returns the most bytes that a process had in memory at once.

    As it says itself: what `wait4` tells of a child counts what its parent had when the child was made.
    """
    ended = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    found = re.search(r"VmHWM:\s+(\d+) kB", ended.stdout)
    assert found is not None, ended.stdout
    return int(found[1]) * 1024


def test_memory_does_not_grow_with_the_file(tuned: Tuned, tmp_path: pathlib.Path) -> None:
    """A file of 200 MB takes hardly more than one of three rows: neither it nor its answers are ever in memory."""
    used = []
    for name, count in (("small", 3), ("large", 200)):
        file = tmp_path / f"{name}.jsonl"
        with file.open("w") as out:
            for _ in range(count):
                out.write(json.dumps({"text": "film", "note": "x" * 1_000_000}) + "\n")
        output = tmp_path / f"{name}.out"
        used.append(most_memory(["predict", "--prompt", tuned.prompt, file, "--output", output, "--batch-size", 1]))
        assert output.stat().st_size > count * 1_000_000
    assert used[1] - used[0] < 80_000_000


def seen_on_a_terminal(name: str, words: list[object]) -> str:
    """Runs a command with a terminal for its standard error, and returns what that showed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", f"deptjax.{name}", *map(str, words)]
    seen = b""
    with subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # what Linux says of a terminal whose other end is closed
            while more := os.read(ours, 4096):
                seen += more
    os.close(ours)
    assert process.returncode == 0, seen
    return seen.decode()


def test_a_terminal_sees_rate_and_time_left(tuned: Tuned, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": "positive"}) + "\n" for text in texts(100).splitlines()))
    words = ["--prompt", tuned.prompt, "--batch-size", 4]
    told = seen_on_a_terminal("predict", [*words, file, "--output", tmp_path / "out.jsonl"])
    assert re.search(r"predicting: 100%.* 100/100 \[\d+:\d+<00:00, .* rows/s\]", told), told
    told = seen_on_a_terminal("evaluate", [*words, "--test-file", file])
    assert re.search(r"evaluating: 100%.* 100/100 \[\d+:\d+<00:00, .* rows/s\]", told), told
