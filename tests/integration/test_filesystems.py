"""Training on filesystems other than GCS: S3 (a server process), HTTP, memory."""

from __future__ import annotations

import functools
import gc
import os
import threading
import uuid
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import TINY, index_parts, options, picture_files, read, run_well, scalars, zip_of

from job import checkpoint, storage
from job.cli import main

pytestmark = pytest.mark.integration


def test_s3_to_s3(s3: str) -> None:
    storage.write_many(f"{s3}/colours", picture_files(["blue", "red"], 20))
    run_dir = f"{s3}/run-{uuid.uuid4().hex}"  # also where the test is run once more
    settings = {**TINY, "data.root": f"{s3}/colours", "run_dir": run_dir, "checkpoint.every_n_steps": 5}
    run_well("fit", *options(settings, trainer__max_epochs=2), processes=2)
    run_well("fit", *options(settings), processes=2)
    assert [step for step, _ in scalars(run_dir)["train/loss"]] == list(range(12))
    assert checkpoint.manifests(run_dir)[-1].global_step == 12
    assert not storage.exists(f"{run_dir}/lease.json")
    result = run_well("predict", "--ckpt", run_dir, "--input", f"{s3}/colours/red/000.jpg")
    assert "red/000.jpg" in result.stdout


def test_an_s3_compatible_store_without_credentials(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoint and anonymous access are set by fsspec's environment variables, as documented."""
    fs, _ = storage.filesystem(s3)
    fs.mkdir("public", acl="public-read")
    for key, content in picture_files(["blue", "red"], 10).items():
        fs.pipe_file(f"public/colours/{key}", content, ACL="public-read")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    settings = {**TINY, "data.root": "s3://public/colours", "trainer.max_epochs": 1, "run_dir": tmp_path / "run"}
    result = run_well(
        "fit",
        *options(settings, **{"data.cache_dir": tmp_path / "cache"}),
        fresh=True,
        FSSPEC_S3_ENDPOINT_URL=endpoint,
        FSSPEC_S3_ANON="true",
    )
    assert "2 classes; images: train 16, val 4" in result.stderr


def test_a_requester_pays_bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of job.storage set RequestPayer, as those of s3fs do."""
    storage.write_many(f"{s3}/paid", {"a.jpg": b"content"})
    requests: list[tuple[str, object]] = []
    reader = storage.Reader(f"{s3}/paid")
    fs = type(reader.store.fs)(requester_pays=True, skip_instance_cache=True)
    original = fs._call_s3

    async def call(method: str, *args: Any, **kwargs: Any) -> Any:
        requests.append((method, kwargs.get("RequestPayer")))
        return await original(method, *args, **kwargs)

    fs._call_s3 = call
    reader.store.fs = fs
    assert reader.read("a.jpg") == b"content"
    assert requests == [("get_object", "requester")]


def test_an_archive_by_its_url(tmp_path: Path) -> None:
    """The layout of the tutorial's archive: train/ and validation/ in one folder, beside a script."""
    parts = {"train": 10, "validation": 4}
    files = {f"w/{part}/{k}": c for part, n in parts.items() for k, c in picture_files(["blue", "red"], n).items()}
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "w.zip").write_bytes(zip_of({**files, "w/vectorize.py": b"print()"}))
    fetched: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form: str, *args: object) -> None:
            fetched.append(str(args[0]))

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {**TINY, "data.root": f"http://127.0.0.1:{server.server_port}/w.zip", "data.cache_dir": tmp_path / "c"}
    result = run_well("fit", *options(settings, run_dir=tmp_path / "run"), processes=2)
    server.shutdown()
    assert "2 classes; images: train 20, val 8" in result.stderr
    assert len([line for line in fetched if line.startswith("GET /w.zip ")]) == 1  # no ranges there: once a node


def test_memory_to_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    storage.write_many("memory://bucket/colours", picture_files(["blue", "red"], 10))
    monkeypatch.setattr("sys.argv", ["job"])
    main(["fit", *options(TINY, data__root="memory://bucket/colours", run_dir="memory://bucket/run")])
    assert "Finished" in capsys.readouterr().out
    assert len(checkpoint.manifests("memory://bucket/run")) >= 2
    assert scalars("memory://bucket/run")["train/loss"]


class FlippedBody:
    """The body of an S3 answer with one bit flipped."""

    def __init__(self, body: Any) -> None:
        self.close = body.close
        self._body = body

    async def read(self) -> bytes:
        content = await self._body.read()
        return bytes([content[0] ^ 1]) + content[1:]


def test_an_s3_object_is_held_against_its_etag(s3: str, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged object is requested again; an ETag that is not an MD5 is recognised by two equal responses."""
    storage.write_many(f"{s3}/checked", {"a.jpg": b"content", "b.jpg": b"content"})
    calls: list[str] = []

    def reader(flips: int, etag: str | None) -> storage.Reader:
        reader = storage.Reader(f"{s3}/checked")
        original = type(reader.store.fs)._call_s3.__get__(reader.store.fs)

        async def call(method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
            calls.append(method)
            answer: dict[str, Any] = await original(method, *args, **kwargs)
            if len(calls) <= flips:
                answer["Body"] = FlippedBody(answer["Body"])
            return {**answer, "ETag": etag or answer["ETag"]}

        reader.store.fs._call_s3 = call
        return reader

    assert reader(1, None).read("a.jpg") == b"content"
    assert calls == ["get_object"] * 2
    assert "checked/a.jpg: the content does not match its MD5" in caplog.text
    assert "ETags below" not in caplog.text
    calls.clear()
    other = reader(0, "0123456789abcdef0123456789abcdef")
    assert [other.read(key) for key in ("a.jpg", "b.jpg")] == [b"content"] * 2
    assert calls == ["get_object"] * 3
    assert f"ETags below {s3}/checked are not MD5 checksums" in caplog.text
    del other.store.fs._call_s3


def test_doubled_slashes_in_a_bucket(s3: str) -> None:
    """Tools that join paths carelessly create folders with empty names."""
    files = picture_files(["blue", "red"], 2)
    storage.write_many(f"{s3}/doubled", {f"/train/{key.replace('/', '//')}": each for key, each in files.items()})
    index = index_parts(f"{s3}/doubled")["train"]
    assert index.classes == ("blue", "red")
    assert sorted(index.keys) == [f"/train/{key.replace('/', '//')}" for key in sorted(files)]
    assert sorted(read(index, [0, 1, 2, 3])) == sorted(files.values())


def test_the_end_of_one_reader_leaves_the_connections_of_others(gcs: str) -> None:
    storage.write_bytes(f"{gcs}/shared/a", b"a")
    reader = storage.Reader(f"{gcs}/shared")
    assert reader.read("a") == b"a"
    reader.store.fs.clear_instance_cache()
    del reader
    gc.collect()  # closes its session
    assert storage.Reader(f"{gcs}/shared").read("a") == b"a"
