"""The output file of a job that may be interrupted: what it goes on with, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import resource
import signal
from typing import Any

import pytest

from deptjax.cli.answers import PartFile, open_output
from deptjax.errors import UserError

CHUNK = 3
LINES = [b'{"id": %d, "prediction": "%s"}\n' % (i, b"very " * i) for i in range(8)]
WHOLE = b"".join(LINES)
JOB: dict[str, Any] = {"input": {"size": 8}, "prompts": {"films": "abc"}, "flags": {}}


def heads() -> list[bytes]:
    """Returns the bytes with which each answer begins."""
    return [line[: line.index(b'"very') if b'"very' in line else line.index(b'""')] for line in LINES]


def run(path: pathlib.Path, job: dict[str, Any] = JOB, overwrite: bool = False, until: int = len(LINES)) -> int:
    """Runs a job up to a row, and returns the row it went on with."""
    with open_output(str(path), None, job, CHUNK, overwrite) as output:
        for head in heads():
            output.compare(head)
        done = output.start()
        for at in range(done, len(LINES), CHUNK):
            if at >= until:
                raise KeyboardInterrupt
            output.write(LINES[at : at + CHUNK])
        output.finish()
    return done


def interrupted(path: pathlib.Path, until: int = 6, **words: Any) -> pathlib.Path:
    """Runs a job that is interrupted, and returns its part."""
    with pytest.raises(KeyboardInterrupt):
        run(path, until=until, **words)
    return path.with_name(path.name + ".part")


def test_every_length_that_a_crash_can_leave_is_gone_on_with(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    part = interrupted(path)
    card = tmp_path / "out.jsonl.part.json"
    kept = card.read_bytes()
    third = len(b"".join(LINES[:CHUNK]))
    for length in range(len(WHOLE) + 1):
        part.write_bytes(WHOLE[:length])
        card.write_bytes(kept)
        assert run(path) == (0 if length < third else 3 if length < len(b"".join(LINES[:6])) else 6)
        assert path.read_bytes() == WHOLE
        assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]
        path.unlink()


def test_what_a_power_loss_leaves_is_cut_off(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    part = interrupted(path)
    data = part.read_bytes()
    for broken in (data + bytes(50), data + bytes(50) + b"}\n", data[:-40] + bytes(40), data + b"\xff\xfe}\n"):
        part.write_bytes(broken)
        assert run(path) == (6 if broken.startswith(data) else 3)
        assert path.read_bytes() == WHOLE
        path.unlink()
        part = interrupted(path)


def test_an_interruption_before_the_first_answer_leaves_nothing(tmp_path: pathlib.Path) -> None:
    interrupted(tmp_path / "out.jsonl", until=0)
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_told(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    part = interrupted(tmp_path / "out.jsonl")
    assert capfd.readouterr().err == f"deptjax: 6 answers are kept in {part}; the same command goes on behind them\n"
    interrupted(tmp_path / "piped.jsonl", job={**JOB, "input": None})
    assert capfd.readouterr().err == f"deptjax: 6 answers are kept in {tmp_path / 'piped.jsonl.part'}\n"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompts": {"films": "xyz"}}, "prompts.films was abc, is now xyz"),
        ({"input": {"size": 9}}, "input.size was 8, is now 9"),
        ({"flags": {"scores": True}}, "flags.scores was nothing, is now True"),
    ],
)
def test_another_jobs_part_is_left_alone(tmp_path: pathlib.Path, change: dict[str, Any], told: str) -> None:
    path = tmp_path / "out.jsonl"
    part = interrupted(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        run(path, {**JOB, **change})
    assert str(error.value) == (
        f"{part} holds the unfinished answers of another job ({told}); --overwrite starts anew, or choose another "
        "--output"
    )
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert run(path, {**JOB, **change}, overwrite=True) == 0
    assert path.read_bytes() == WHOLE


def test_another_jobs_part_stays_until_the_new_job_starts(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    before = interrupted(path).read_bytes()
    with pytest.raises(RuntimeError), open_output(str(path), None, {**JOB, "flags": {"a": 1}}, CHUNK, True):
        raise RuntimeError("a broken line")
    assert path.with_name("out.jsonl.part").read_bytes() == before
    assert run(path) == 6


@pytest.mark.parametrize("card", [None, b"", b"[1]", b"\xff"])
def test_a_part_that_nobody_knows_is_left_alone(tmp_path: pathlib.Path, card: bytes | None) -> None:
    part = tmp_path / "out.jsonl.part"
    part.write_text("a part of mine")
    if card is not None:
        (tmp_path / "out.jsonl.part.json").write_bytes(card)
    with pytest.raises(UserError, match=r"of another job \(out.jsonl.part.json does not say which\); --overwrite"):
        run(tmp_path / "out.jsonl")
    assert part.read_text() == "a part of mine"


def test_an_input_that_is_read_once_is_not_gone_on_with(tmp_path: pathlib.Path) -> None:
    job = {**JOB, "input": None}
    interrupted(tmp_path / "out.jsonl", job=job)
    with pytest.raises(UserError, match=r"another job \(its input can be read only once\); --overwrite starts anew"):
        run(tmp_path / "out.jsonl", job)
    assert run(tmp_path / "out.jsonl", job, overwrite=True) == 0


def test_answers_to_other_rows_are_not_gone_on_with(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    part = interrupted(path)
    part.write_bytes(part.read_bytes().replace(b'"id": 4', b'"id": 9'))
    before = part.read_bytes()
    with pytest.raises(UserError, match=r"out.jsonl.part, line 5 does not answer that row of the input, which has"):
        run(path)
    assert part.read_bytes() == before
    assert run(path, overwrite=True) == 0
    assert path.read_bytes() == WHOLE


def test_overwriting_replaces_the_old_file_when_the_new_one_is_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("mine")
    with pytest.raises(UserError, match=f"^--output {path} exists; choose another file, or add --overwrite$"):
        run(path)
    interrupted(path, overwrite=True)
    assert path.read_text() == "mine"
    with pytest.raises(UserError, match="exists; choose another file"):
        run(path)
    assert run(path, overwrite=True) == 6
    assert path.read_bytes() == WHOLE


def test_a_file_that_came_to_be_meanwhile_is_not_replaced(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_output(str(path), None, JOB, CHUNK, False) as output:
        output.start()
        output.write(LINES)
        path.write_text("theirs")
        with pytest.raises(UserError, match="exists; choose another file"):
            output.finish()
    assert path.read_text() == "theirs"
    path.unlink()
    assert run(path) == 6
    assert path.read_bytes() == WHOLE


def test_a_link_stays_a_link(tmp_path: pathlib.Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "out.jsonl"
    link.symlink_to(tmp_path / "far" / "real.jsonl")
    run(link)
    assert link.is_symlink()
    assert (tmp_path / "far" / "real.jsonl").read_bytes() == WHOLE


def test_one_process_at_a_time(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    first = PartFile(path, JOB, CHUNK, False)
    first.start()
    first.write(LINES[:CHUNK])
    with pytest.raises(UserError, match=f"^--output {path} is being written by another process; wait, or choose"):
        PartFile(path, JOB, CHUNK, True)
    first.close()
    assert run(path) == 3


def written_below(limit: int, path: str) -> None:
    """Writes a job in a process that the kernel kills when the file grows beyond the limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run(pathlib.Path(path))


def test_killed_by_the_kernel_in_the_middle_of_a_line(tmp_path: pathlib.Path) -> None:
    """At a place that no `except` and no `finally` sees. Each process gets a little further."""
    path = tmp_path / "out.jsonl"
    spawn = multiprocessing.get_context("spawn")
    limits = [len(b"".join(LINES[:4])) + 9, len(b"".join(LINES[:7])) + 20]
    for limit in limits:
        process = spawn.Process(target=written_below, args=(limit, str(path)))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGXFSZ
        assert (tmp_path / "out.jsonl.part").read_bytes() == WHOLE[:limit]
        assert not path.exists()
    assert run(path) == 6
    assert path.read_bytes() == WHOLE


def test_a_pipe_is_written_to(tmp_path: pathlib.Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert run(pipe, overwrite=False) == 0
    assert os.read(reader, 1 << 16) == WHOLE
    os.close(reader)
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_folders_that_are_not_there_or_not_to_be_written(tmp_path: pathlib.Path) -> None:
    for name, told in (
        (tmp_path, f"--output {tmp_path} is a folder; name a file in it"),
        (
            tmp_path / "no" / "x",
            f"--output {tmp_path / 'no' / 'x'}: there is no folder {tmp_path / 'no'}; make it first",
        ),
        ("/proc/x", "cannot write /proc/x: No such file or directory; choose another --output"),
    ):
        with pytest.raises(UserError) as error:
            run(pathlib.Path(name))
        assert str(error.value) == told
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="Permission denied; choose another --output"):
            run(tmp_path / "x")


@pytest.mark.parametrize("ending", ["", ".part", ".part.json"])
def test_the_input_is_never_written_over(tmp_path: pathlib.Path, ending: str) -> None:
    source = tmp_path / f"rows.jsonl{ending}"
    source.write_text(json.dumps({"text": "mine"}))
    with (
        pytest.raises(UserError, match=r"would be written over the input .*; choose another file"),
        open_output(str(tmp_path / "rows.jsonl"), source, JOB, CHUNK, True) as output,
    ):
        output.start()
    assert json.loads(source.read_text()) == {"text": "mine"}
