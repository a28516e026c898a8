from __future__ import annotations

import asyncio
import ipaddress
import json
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support import TINY, index_parts, options, picture, picture_files, read, run_here, write_files

from job import storage
from job.cli.index import main
from job.data.datamodule import ImageDataModule
from job.data.index.access import Access, from_options, internal, literal_address
from job.data.index.build import build
from job.data.index.index import Index
from job.data.index.sources.table import Resolver
from job.errors import ConfigError, DataError
from job.redact import redact

REMOTE = "gs://bucket/tables/t.csv"
LOCAL = "/data/t.csv"


def problem(table: str, entry: str, access: Access | None = None) -> str:
    """Return the reason why a table may not name an entry; empty if it may."""
    try:
        Resolver(table, access or Access(typed=(table,))).resolve(entry, 7)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("table", [REMOTE, LOCAL, "https://example.com/t.csv"])
@pytest.mark.parametrize(
    "entry",
    [
        "gs://other/a.jpg",
        "s3://other/a/../b.jpg",
        "az://container/a.jpg",
        "hf://datasets/x/y/a.jpg",
        "https://example.com/a.jpg?sig=a/../b",
        "http://8.8.8.8/a.jpg",
        "http://10.1.2.3:9000/a.jpg",
        "a.jpg",
        "./photos/a b.jpg",
        "12:30.jpg",
    ],
)
def test_what_any_table_may_name(table: str, entry: str) -> None:
    assert problem(table, entry) == ""


@pytest.mark.parametrize("table", [REMOTE, "https://example.com/x/t.jsonl?generation=1", "memory://tables/t.csv"])
@pytest.mark.parametrize(
    "entry",
    [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file://localhost/etc/passwd",
        "file:/etc/passwd",
        "/etc/passwd",
        "//etc/passwd",
        "../../../etc/passwd",
        "photos/../../x.jpg",
        "local:///etc/passwd",
        "local:/etc/passwd",
        "simplecache::file:///etc/passwd",
        "filecache::gs://bucket/x",
        "zip://a.jpg::file:///etc/x.zip",
        "reference://a::file:///x.json",
        "gs://x::file:///etc/passwd",
        "github://owner:repo@main/a.jpg",
        "git://repo/a.jpg",
        "dir://a/b",
        "data://x/y",
        "data:image/png;base64,AAAA",
        "ssh://host/etc/passwd",
        "sftp://example.com/x.jpg",
        "ftp://example.com/x.jpg",
        "webdav+http://example.com/x.jpg",
        "jupyter://example.com/x.jpg",
        "smb://example.com/share/x.jpg",
    ],
)
def test_a_table_elsewhere_names_neither_local_files_nor_rarer_filesystems(table: str, entry: str) -> None:
    results = problem(table, entry)
    assert "row 7" in results
    assert redact(entry) in results
    assert "--data.allow" in results


def test_a_table_names_its_own_filesystem() -> None:
    assert problem("memory://tables/t.csv", "memory://tables/x.jpg") == ""
    assert problem("sftp://host/t.csv", "sftp://host/x.jpg") == ""
    assert "row 7" in problem("sftp://host/t.csv", "sftp://other/x.jpg")
    assert problem("http://127.0.0.1:8000/t.csv", "http://127.0.0.1:8000/x.jpg") == ""
    assert problem("http://127.0.0.1:8000/t.csv", "x.jpg") == ""
    assert "on this machine" in problem("http://127.0.0.1:8000/t.csv", "http://127.0.0.1:22/x.jpg")


INTERNAL = [
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/latest/",
    "http://0xa9fea9fe/a",
    "http://0251.0376.0251.0376/a",
    "http://169.254.43518/a",
    "http://[::ffff:169.254.169.254]/a",
    "http://[::ffff:a9fe:a9fe]/a",
    "http://[64:ff9b::a9fe:a9fe]/a",
    "http://[2002:7f00:1::]/a",
    "http://127.0.0.1/a.jpg",
    "https://127.1/a.jpg",
    "http://0/a.jpg",
    "http://0.0.0.0:80/a.jpg",
    "http://[::]/a.jpg",
    "http://[::1]:8080/a.jpg",
    "http://[fe80::1]/a.jpg",
    "http://[fe80::1%25eth0]/a.jpg",
    "http://[fd00:ec2::254]/latest",
    "http://100.100.100.200/latest",
    "http://168.63.129.16/machine",
    "http://localhost:6006/a.jpg",
    "http://LOCALHOST./a.jpg",
    "http://a.localhost/a.jpg",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://Metadata.Google.Internal./computeMetadata/v1/",
    "http://metadata/computeMetadata/v1/",
    "http://example.com@169.254.169.254/a.jpg",
    "http://example.com:80@127.0.0.1/a.jpg",
    "http://127.0.0.1#@example.com/a.jpg",
    "HTTP://127.0.0.1/a.jpg",
    "http://127.0.0.1./a.jpg",
    "http://１２７.0.0.1/a.jpg",
]


@pytest.mark.parametrize("table", [REMOTE, LOCAL])
@pytest.mark.parametrize("entry", [*INTERNAL, "http:///a.jpg", "http://[::1/a.jpg"])
def test_no_table_names_an_internal_address(table: str, entry: str) -> None:
    message = problem(table, entry)
    assert "row 7" in message
    assert "--data.allow" in message
    if entry in INTERNAL:
        host = entry.split("/")[2]
        assert problem(table, entry, from_options(host.split("#")[0].rpartition("@")[2], [table])) == ""


def test_a_local_table_names_local_files() -> None:
    resolver = Resolver("/data/set/t.csv", Access())
    for entry, expected in {
        "a.jpg": ("/data/set", "a.jpg"),
        "../b/./a.jpg": ("/", "data/b/./a.jpg"),
        "/etc/x.jpg": ("/", "etc/x.jpg"),
        "/data/../x.jpg": ("/", "x.jpg"),
        "file:///data/x.jpg": ("file:///", "data/x.jpg"),
        "memory://m/x.jpg": ("memory://m", "x.jpg"),
    }.items():
        root, key = resolver.resolve(entry, 0)
        assert (root, key) == (expected[0], expected[1].replace("/./", "/"))
    assert Resolver("t.csv", Access()).resolve("../b/a.jpg", 0) == ("../b", "a.jpg")


@pytest.mark.parametrize(
    ("allow", "entry", "allowed"),
    [
        ("/mnt/images", "file:///mnt/images/a.jpg", True),
        ("/mnt/images", "/mnt/images/a.jpg", True),
        ("file:///mnt/images/", "/mnt/images/a.jpg", True),
        ("/mnt/images", "/mnt/images2/a.jpg", False),
        ("/mnt/images", "/mnt/images/../../etc/passwd", False),
        ("sftp://host/data", "sftp://host/data/a.jpg", True),
        ("sftp://host/data", "sftp://host/other/a.jpg", False),
        ("127.0.0.1:8000", "http://127.0.0.1:8000/a.jpg", True),
        ("127.0.0.1:8000", "http://127.0.0.1:8001/a.jpg", False),
        ("127.0.0.1", "http://127.0.0.1:8001/a.jpg", True),
        ("http://127.0.0.1:8000/data", "http://127.0.0.1:8000/data/a.jpg", True),
        ("http://127.0.0.1:8000/data", "http://127.0.0.1:8000/other/a.jpg", False),
        ("[::1]", "http://[::1]/a.jpg", True),
    ],
)
def test_the_user_may_allow_more(allow: str, entry: str, allowed: bool) -> None:
    assert (problem(REMOTE, entry, from_options([allow, "x.example"], [REMOTE])) == "") == allowed


def test_an_index_names_no_more_than_what_is_allowed() -> None:
    """A later attempt checks the sources of the run's index again."""
    access = from_options("/mnt/images", [])
    assert Resolver("gs://b/t.csv", access).resolve("/mnt/images/cats/a.jpg", 0) == ("/mnt/images", "cats/a.jpg")
    access.require_sources(["/mnt/images"], "gs://b/run/index", local=False)


@pytest.mark.parametrize("value", ["", " 127.0.0.1", "simplecache::file:///", "a b", "[::1"])
def test_allow_takes_hosts_and_prefixes(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--data\.allow"):
        from_options(value, [])


def test_addresses() -> None:
    assert literal_address("example.com") is None
    assert literal_address("017700000001") == ipaddress.ip_address("127.0.0.1")
    for public in ("8.8.8.8", "10.0.0.1", "192.168.1.1", "2001:4860:4860::8888", "::ffff:8.8.8.8", "fd12::1"):
        assert internal(ipaddress.ip_address(public)) is None
    for private in ("127.8.8.8", "224.0.0.1", "::7f00:1", "ff02::1", "2001:0:0:0:0:0:80ff:fffe"):
        assert internal(ipaddress.ip_address(private)) is not None, private


@pytest.fixture
def serve() -> dict[str, bytes]:
    """Contents of the server below, by path; an image elsewhere."""
    return {}


@pytest.fixture
def server(serve: dict[str, bytes]) -> Iterator[str]:
    """A web server that stands for a public one (127.0.0.2); below /away/ it redirects to an internal address."""
    image = picture((9, 9, 9), 1)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".json"):
                self.send_error(404)
                return
            if self.path.startswith("/away/"):
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{served.server_port}/secret.jpg")
                self.end_headers()
                return
            self.send_response(200)
            content = serve.get(self.path, image)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    served = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"127.0.0.2:{served.server_port}"
    served.shutdown()


def test_redirects_and_names_lead_to_no_internal_address(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets of redirects and resolved addresses are checked too."""
    port = server.split(":")[1]
    uris = [f"http://{server}/a.jpg", f"http://{server}/away/b.jpg", f"http://named.example:{port}/c.jpg"]
    (tmp_path / "t.csv").write_text("uri,label\n" + "".join(f"{uri},{n % 2}\n" for n, uri in enumerate(uris)))

    async def resolve(self: object, host: str, port: int = 0, family: int = 0) -> list[dict[str, object]]:
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr("aiohttp.resolver.DefaultResolver.resolve", resolve)

    def contents(*allow: str) -> list[object]:
        access = from_options([server, *allow], [str(tmp_path / "t.csv")])
        folder = tmp_path / "-".join(("index", *allow)).replace(":", "_")
        folder.mkdir()
        build({"root": [str(tmp_path / "t.csv")]}, folder, str(tmp_path), "parts", access=access)
        index, message = Index(folder, "train", access), []
        for sample in range(3):
            try:
                message.append(read(index, [sample])[0])
            except DataError as error:
                message.append(str(error))
        return message

    first, redirected, named = contents()
    assert first == picture((9, 9, 9), 1)
    for refused in (redirected, named):
        assert "which is on this machine (127.0.0.1)" in str(refused)
        assert "--data.allow" in str(refused)
    assert contents(f"127.0.0.1:{port}", "named.example") == [first] * 3


def test_the_command_line_refuses_and_allows(server: str, tmp_path: Path, serve: dict[str, bytes]) -> None:
    serve["/t.csv"] = b"uri,label\na.jpg,x\nfile:///etc/hostname,y\n"
    for allow, code in (([], 2), (["--allow", "file:///etc/"], 0)):
        outcome = run_here("index", f"http://{server}/t.csv", "--output", tmp_path / "index", *allow)
        assert outcome.returncode == code, outcome.output
        assert code == 0 or (
            "row 1 (from 0) names file:///etc/hostname, which is a local file" in outcome.output
            and "--data.allow" in outcome.output
        )
    settings = {**TINY, "data.root": f"http://{server}/t.csv", "run_dir": tmp_path / "run"}
    assert "row 1 (from 0) names file:///etc/hostname" in run_here("fit", *options(settings)).output
    outcome = run_here("fit", *options(settings, data__allow="/etc", data__val_fraction=0.5))
    assert "has 1 image" in outcome.output  # the rows were taken; there are too few to hold some out


def test_the_guard_stays_within_its_context() -> None:
    access = Access()
    with access.guarded():
        guarded, _ = storage.filesystem("http://example.com/a")
    plain, _ = storage.filesystem("http://example.com/a")
    # fsspec keeps instances: that of an equal Access may be older.
    assert guarded.get_client.__func__ is Access.client
    assert guarded.get_client.__self__ == access
    assert getattr(plain.get_client, "__func__", None) is not Access.client

    async def connector() -> object:
        session = await access.client()
        await session.close()
        return session.connector

    assert asyncio.run(connector()) is None


def test_a_saved_index_is_bound_to_the_same_rules(tmp_path: Path) -> None:
    """In a bucket it may not name local files; a run's own index may name the sources on the command line."""
    root = write_files(tmp_path / "data", picture_files(["blue", "red"], 6))
    main(str(root), output="memory://given/index")
    with pytest.raises(DataError, match=r"is a local file.*--data\.allow"):
        index_parts("memory://given/index/index.json")
    data = ImageDataModule(root="memory://given/index/index.json", cache_dir=str(tmp_path / "c"), allow=[str(tmp_path)])
    data.setup("fit")
    assert len(data.parts["train"]) == 10


def test_a_runs_index_reads_what_the_command_line_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(write_files(tmp_path / "data", picture_files(["blue", "red"], 6)))
    run_dir = f"memory://{uuid.uuid4().hex}/run"
    monkeypatch.setattr(ImageDataModule, "_run_dir", lambda self: run_dir)

    def start() -> None:
        ImageDataModule(root=root, cache_dir=str(tmp_path / "cache")).setup("fit")

    start()
    (entry,) = [file for file in storage.list_files(run_dir) if file.key.endswith(".json")]
    info = json.loads(storage.read_bytes(f"{run_dir}/{entry.key}"))
    start()
    for uri, reason in (("/etc", "is a local file"), ("http://169.254.169.254/x", "link-local")):
        info["sources"][0]["uri"] = uri
        storage.write_text(f"{run_dir}/{entry.key}", json.dumps(info))
        with pytest.raises(DataError, match=reason):
            start()
