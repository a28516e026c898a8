"""Predictions of the lines of a pipe."""

from __future__ import annotations

import functools
import http.server
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import COLOURS, REPOSITORY, environment, fit_here, picture, run_here, write_files

import job
from job import storage
from job.data.index.access import Access
from job.data.index.sources.base import LONGEST_KEY
from job.predict.predictor import Predictor
from job.predict.stream import predict_lines, read_lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_here(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return job.load(str(trained))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    files = {f"{n:02d} x.jpg": picture(COLOURS["blue" if n % 3 else "red"], n) for n in range(30)}
    return [str(path) for path in sorted(write_files(tmp_path_factory.mktemp("images"), files).iterdir())]


def rows_of(predictor: Predictor, lines: list[bytes], access: Access | None = None, **options: int) -> list[Any]:
    settings = {"batch_size": 8, "num_workers": 2, **options}
    batches = predict_lines(predictor, lines, access or Access(), **settings)
    return [row.as_json(predictor) for rows in batches for row in rows]


def test_rows_come_in_the_order_of_lines_and_equal_the_python_api(predictor: Predictor, images: list[str]) -> None:
    rows = rows_of(predictor, [uri.encode() for uri in images])
    assert [row["uri"] for row in rows] == images
    for row, prediction in zip(rows, predictor.predict(images), strict=True):
        assert row["label"] == prediction.label
        assert row["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)


def test_paths_relative_to_the_folder_and_uris_of_all_kinds(
    predictor: Predictor, images: list[str], gcs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(images[0]).parent)
    content = Path(images[0]).read_bytes()
    storage.write_bytes(f"{gcs}/stream/a b#1.jpg", content)
    lines = [Path(images[0]).name, f"./{Path(images[0]).name}", Path(images[0]).as_uri(), f"{gcs}/stream/a b#1.jpg"]
    rows = rows_of(predictor, [line.encode() for line in lines])
    assert [row.get("error") for row in rows[:2] + rows[3:]] == [None] * 3
    assert len({json.dumps(row["probabilities"]) for row in rows[:2] + rows[3:]}) == 1


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"/etc/hostname", "is no image"),
        (b"/dev/zero", "no regular file"),
        (b"/nowhere/a.jpg", "does not exist"),
        (b"/tmp", "no regular file"),
        (b"gs://tests/nothing.jpg", "does not exist"),
        (b"http://169.254.169.254/computeMetadata/v1/a.jpg", "metadata server|link-local"),
        (b"http://metadata.google.internal/a.jpg", "metadata server"),
        (b"http://127.0.0.1:1/a.jpg", "on this machine"),
        (b"http://2130706433/a.jpg", "on this machine"),
        (b"http://[::1]/a.jpg", "on this machine"),
        (b"http://localhost/a.jpg", "on this machine"),
        (b"http://localtest.invalid/a.jpg", "Cannot connect to host localtest.invalid"),
        (b"sftp://host/a.jpg", "neither in an object store nor on a web server"),
        (b"memory://a.jpg", "neither in an object store nor on a web server"),
        (b"file:///etc/hostname::gs://b/c", "."),
        (b"zip://a.jpg::http://127.0.0.1/a.zip", "chains filesystems"),
        (b"http://", "."),
        (b"gs://", "."),
        (b"a\0b.jpg", "holds a zero byte"),
        (b"\xff\xfe.jpg", "not UTF-8"),
        (b"x" * (LONGEST_KEY + 1), "more than 8,192 bytes"),
        (b"\x1b]0;owned\x07.jpg", "does not exist"),
        (b"--allow=127.0.0.1", "does not exist"),
    ],
)
def test_a_line_that_names_no_image_is_a_row_with_an_error(
    line: bytes, error: str, predictor: Predictor, images: list[str], gcs: str
) -> None:
    good = images[0].encode()
    before, row, after = rows_of(predictor, [good, line, good])
    assert "error" not in before | after
    assert set(row) == {"uri", "error"}
    assert re.search(error, row["error"]), row
    assert json.dumps(row).isascii()


def test_allowed_hosts_may_be_named(predictor: Predictor, images: list[str]) -> None:
    folder = str(Path(images[0]).parent)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/00%20x.jpg".encode()
        assert "on this machine" in rows_of(predictor, [uri])[0]["error"]
        (row,) = rows_of(predictor, [uri], Access(("127.0.0.1",)))
        assert "error" not in row, row
        server.shutdown()


def test_credentials_are_not_written(predictor: Predictor) -> None:
    rows = rows_of(predictor, [b"https://user:hunter2@localhost/a.jpg?X-Goog-Signature=hunter2"])
    assert "hunter2" not in json.dumps(rows)


def test_lines_are_split_as_they_are_written() -> None:
    long = b"y" * 10_000_000
    stream = io.BytesIO(b"\xef\xbb\xbfa b.jpg\r\n\n\r\nb\n" + long + b"\n" + b"z" * LONGEST_KEY + b"\r\nlast")
    lines = list(read_lines(stream))
    assert [line[:10] for line in lines] == [b"a b.jpg", b"b", b"y" * 10, b"z" * 10, b"last"]
    assert len(lines[2]) > LONGEST_KEY
    assert len(lines[3]) == LONGEST_KEY


def test_a_batch_does_not_wait_for_lines_that_do_not_come(predictor: Predictor, images: list[str]) -> None:
    go = threading.Event()

    def lines() -> Iterator[bytes]:
        yield from (uri.encode() for uri in images[:3])
        go.wait(60)
        yield images[3].encode()

    batches = predict_lines(predictor, lines(), Access(), 64, 2)
    assert [row.uri for row in next(batches)] == images[:3]
    go.set()
    assert [row.uri for rows in batches for row in rows] == images[3:4]


def test_no_more_lines_are_read_than_can_be_answered(predictor: Predictor, images: list[str]) -> None:
    read = 0

    def lines() -> Iterator[bytes]:
        nonlocal read
        for _ in range(10_000):
            read += 1
            yield images[0].encode()

    batches = predict_lines(predictor, lines(), Access(), 4, 2)
    next(batches)
    time.sleep(0.5)
    assert read < 40
    batches.close()  # type: ignore[attr-defined]


def test_a_failure_to_read_lines_is_raised(predictor: Predictor) -> None:
    def lines() -> Iterator[bytes]:
        yield b"a.jpg"
        raise OSError("the pipe broke")

    with pytest.raises(OSError, match="the pipe broke"):
        list(predict_lines(predictor, lines(), Access(), 4, 2))


@pytest.mark.parametrize("extra", [["--input", "x"], ["--output", "x"], ["--columns", "uri=x"]])
def test_options_that_contradict_the_pipe(extra: list[str], trained: Path) -> None:
    result = run_here("predict", trained, "--from-stdin", *extra)
    assert result.returncode == 2
    assert f"Leave {extra[0]} out" in result.output


def start(trained: Path, *options: str, **pipes: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "job", "predict", str(trained), "--from_stdin", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=pipes.get("stderr", subprocess.PIPE),
        text=True,
        env=environment(),
        cwd=REPOSITORY,
    )


@pytest.mark.integration
def test_a_real_pipe_answers_each_line_before_the_next_is_written(trained: Path, images: list[str]) -> None:
    process = start(trained, "--top-k", "1")
    assert process.stdin is not None
    assert process.stdout is not None
    for uri in (*images[:3], "/nowhere.jpg"):
        process.stdin.write(f"{uri}\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["uri"] == uri
    process.stdin.close()
    assert process.stdout.read() == ""
    assert process.wait(300) == 2
    assert process.stderr is not None
    assert "1 line(s) name no readable image, 0 allowed" in process.stderr.read()


@pytest.mark.integration
def test_a_reader_that_leaves_and_a_writer_that_never_ends(trained: Path, images: list[str]) -> None:
    process = start(trained, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{images[0]}\n")
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write(f"{images[0]}\n")
    process.stdin.flush()
    assert process.wait(300) == 0  # although its standard input is still open

    process = start(trained)
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdin.write(f"{images[0]}\n")
    process.stdin.flush()
    process.stdout.readline()
    process.terminate()
    assert process.wait(300) == 143
    assert process.stderr is not None
    assert "Traceback" not in (errors := process.stderr.read()), errors
    assert "Fatal" not in errors
