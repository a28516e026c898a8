"""Credentials in URIs are sent to the server only; names are escaped on the terminal."""

from __future__ import annotations

import base64
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from support import TINY, options, picture, picture_files, run_here, write_files, zip_of

from job import redact

pytestmark = pytest.mark.integration

SIGNATURE = "b0a7c1f2e3d4secretsignature"
PASSWORD = "correct-horse-battery"


class Private(BaseHTTPRequestHandler):
    """Serve files and pages of links to requests with the signature or the password."""

    files: ClassVar[dict[str, bytes]] = {}
    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        url = urlsplit(self.path)
        type(self).paths.append(unquote(url.path))
        expected = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        if parse_qs(url.query).get("sig") != [SIGNATURE] and self.headers.get("Authorization") != expected:
            self.send_error(403)
            return
        path = unquote(url.path).strip("/")
        content = self.files.get(path)
        below = {key[len(path) + 1 :].partition("/") for key in self.files if key.startswith(f"{path}/")}
        kind = "application/octet-stream"
        if content is None and below:
            kind, links = "text/html", sorted(name + slash for name, slash, _ in below)
            content = "".join(f'<a href="{link}">{link}</a>' for link in links).encode()
        if content is None:
            self.send_error(404)
            return
        status, total = 200, len(content)
        if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, content = 206, content[int(byte_range[1]) : int(byte_range[2] or total) + 1]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {byte_range[1]}-{int(byte_range[1]) + len(content) - 1}/{total}")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    images = picture_files(["blue", "red"], 10)
    rows = "".join(f"images/{key},{key.partition('/')[0]}\n" for key in images)
    Private.files = {
        "data/colours.zip": zip_of(images),
        "data/table.csv": f"uri,label\n{rows}".encode(),
        **{f"data/images/{key}": content for key, content in images.items()},
    }
    Private.paths = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Private)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{running.server_port}"
    running.shutdown()
    redact.forget()


def files_with_secrets(*folders: Path) -> list[Path]:
    secrets = [
        secret.encode() for secret in (SIGNATURE, PASSWORD, base64.b64encode(f"me:{PASSWORD}".encode()).decode())
    ]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(s in path.read_bytes() or s in os.fsencode(path) for s in secrets)]


@pytest.mark.parametrize("dataset", ["data/colours.zip", "data/table.csv", "data/images"])
@pytest.mark.parametrize("kind", ["signed", "password"])
def test_credentials_of_a_uri_are_never_written(dataset: str, kind: str, server: str, tmp_path: Path) -> None:
    query = f"?sv=2024&sr=d&se=2030-01-01&sig={SIGNATURE}" if kind == "signed" else ""
    uri = f"http://me:{PASSWORD}@{server}/{dataset}" if kind == "password" else f"http://{server}/{dataset}{query}"
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    settings = options(TINY, data__root=uri, data__cache_dir=cache, run_dir=run_dir, trainer__max_epochs=1)
    results = [run_here("fit", *settings)]
    results.append(run_here("validate", "--run_dir", run_dir, "--data.root", uri, "--data.cache_dir", cache))
    output = tmp_path / "out" / "predictions.jsonl"
    results.append(run_here("predict", "--ckpt", run_dir, "--input", uri, "--output", output, "--cache_dir", cache))
    for result in results:
        assert result.returncode == 0, result.output
        assert SIGNATURE not in result.output
        assert PASSWORD not in result.output
    assert files_with_secrets(run_dir, cache, output.parent) == []
    assert not [path for path in Private.paths if "sig=" in path or "***" in path]
    assert f"http://{server}/data/" in output.read_text()


def test_a_rotated_signature_changes_no_index_and_no_cache(server: str, tmp_path: Path) -> None:
    def settings(extra: str, epochs: int) -> list[str]:
        uri = f"http://{server}/data/images?sv={extra}&se={extra}&sig={SIGNATURE}"
        more = {"data__cache_dir": tmp_path / "cache", "trainer__max_epochs": epochs}
        return options(TINY, data__root=uri, run_dir=tmp_path / "run", **more)

    assert run_here("fit", *settings("1", 1)).returncode == 0
    redact.forget()
    indexes, cached = (sorted((tmp_path / name).rglob("*")) for name in ("run/index", "cache"))
    result = run_here("fit", *settings("2", 2))
    assert result.returncode == 0, result.output
    assert "settings changed" not in result.output.replace("trainer.max_epochs: 1 → 2", "").replace(
        "settings changed since the last attempt: \n", ""
    )
    assert sorted((tmp_path / "run/index").rglob("*")) == indexes
    assert sorted((tmp_path / "cache").rglob("*")) == cached


def test_the_message_names_the_option_to_repeat(server: str, tmp_path: Path) -> None:
    uri = f"http://{server}/data/colours.zip?sv=1&sig={SIGNATURE}"
    settings = options(TINY, data__root=uri, data__cache_dir=tmp_path / "cache", run_dir=tmp_path / "run")
    assert run_here("fit", *settings).returncode == 0
    redact.forget()
    for verb in ("validate", "test"):
        result = run_here(verb, "--run_dir", tmp_path / "run")
        assert result.returncode == 2
        assert "--data.root" in result.output
        assert "without its credentials" in result.output


def test_errors_of_the_server_do_not_repeat_the_credentials(server: str, tmp_path: Path) -> None:
    for uri in (
        f"http://{server}/data/missing.zip?sv=1&sig={SIGNATURE}",
        f"http://me:{PASSWORD}x@{server}/data/colours.zip",
        f"http://127.0.0.1:9/x.zip?X-Goog-Signature={SIGNATURE}",
        f"s3://{PASSWORD}:{SIGNATURE}@bucket/x",
        f"nonsense://me:{PASSWORD}@host/x?token={SIGNATURE}",
    ):
        result = run_here("fit", *options(TINY, data__root=uri, run_dir=tmp_path / "run"))
        assert result.returncode in (2, 75), result.output
        assert PASSWORD not in result.output
        assert SIGNATURE not in result.output


HOSTILE = ["[bold red]x", "[blue]", "a\x1b[31mred", "line\nfeed 00:00:00 forged", "\u202egnp.exe", "\x9b2J", ":smile:"]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    files = {
        f"{name}/[/b]{n}{name}.png": picture((200, 40, 30), n, file_format="PNG") for name in HOSTILE for n in range(4)
    }
    return write_files(tmp_path / "[b]\x1b[2Jdata", files)


def assert_harmless(output: str) -> None:
    assert "\x1b" not in output.replace("\x1b[0m", "")
    assert not set(output) & set("\x9b\u202e")
    assert not re.search(r"^feed 00:00:00 forged", output, re.MULTILINE)


def test_names_are_escaped_on_the_terminal(hostile: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "exp[lr=0.1]"
    (hostile / HOSTILE[0] / "bad\x1b[b]\n.png").write_bytes(b"text")
    changes = {"data__max_bad_samples": 1, "trainer__max_epochs": 1}
    result = run_here("fit", *options(TINY, data__root=hostile, run_dir=run_dir, **changes))
    assert result.returncode == 0, result.output
    assert_harmless(result.output)
    assert f"predict '{run_dir}'" in result.output
    result = run_here("validate", "--run_dir", run_dir)
    assert result.returncode == 0, result.output
    assert_harmless(result.output)
    result = run_here("predict", "--ckpt", run_dir, "--input", hostile, "--output", tmp_path / "p.jsonl")
    assert result.returncode == 2
    assert "1 unreadable image(s)" in result.output
    assert_harmless(result.output)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 4 * len(HOSTILE) + 1
    assert run_here("checkpoints", "ls", run_dir).returncode == 0


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    colours = write_files(tmp_path / "data", picture_files(["blue", "red"], 10))
    run_dir = tmp_path / "run"
    assert run_here("fit", *options(TINY, data__root=colours, run_dir=run_dir, trainer__max_epochs=1)).returncode == 0
    odd = tmp_path / os.fsdecode(b"odd\xff")
    (colours / "red" / os.fsdecode(b"\xff.jpg")).write_bytes(picture((1, 2, 3), 1))
    for args in (
        ["predict", "--ckpt", run_dir, "--input", colours],
        ["fit", *options(TINY, data__root=colours, run_dir=tmp_path / "other", trainer__max_epochs=1)],
    ):
        result = run_here(*args)
        assert result.returncode == 0
        assert "files whose names are not UTF-8: 1" in result.output, result.output
    for args in (
        ["predict", "--ckpt", run_dir, "--input", colours / "red" / os.fsdecode(b"\xff.jpg")],
        ["predict", "--ckpt", run_dir, "--input", odd],
        ["fit", *options(TINY, data__root=odd, run_dir=tmp_path / "other")],
        ["fit", *options(TINY, data__root=colours, run_dir=odd)],
    ):
        result = run_here(*args)
        assert result.returncode == 2
        assert re.search(r"\\udcff\S* is not UTF-8", result.output), result.output
