"""Files of TensorBoard's projector, read back by its plugin."""

from __future__ import annotations

import io
import json
import time
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import COLOURS, fit_here
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from job import storage
from job.monitoring.tensorboard import projector
from job.monitoring.tensorboard.command import serve
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger
from job.monitoring.tensorboard.projector import SPRITE_SIZE, spread_samples, sprite_sheet, vectors
from job.monitoring.tensorboard.projector_paths import path_beside


class Server:
    """What the projector's plugin answers the browser.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: str) -> None:
        multiplexer = EventMultiplexer()
        multiplexer.AddRunsFromDirectory(folder)
        multiplexer.Reload()
        provider = MultiplexerDataProvider(multiplexer, folder)
        plugin = ProjectorPlugin(TBContext(data_provider=provider, multiplexer=multiplexer, logdir=folder))
        self.clients = {route: Client(app) for route, app in plugin.get_plugin_apps().items()}

    def get(self, route: str, **query: str) -> bytes:
        answer = self.clients[route].get(route, query_string={"run": ".", "name": "backbone features", **query})
        assert answer.status_code == 200, answer.data
        return answer.data


@pytest.mark.parametrize(("epochs", "features"), [(1, "always"), (2, "never")])
def test_the_plugin_serves_features_labels_and_images(tmp_path: Path, epochs: int, features: str) -> None:
    run_dir = fit_here(tmp_path, trainer__max_epochs=epochs, features__use=features, monitoring__projector=3)
    server = Server(str(run_dir / "tensorboard"))
    (embedding,) = json.loads(server.get("/info"))["embeddings"]
    rows, width = embedding["tensorShape"]
    assert rows == 3
    assert width <= projector.COMPONENTS
    tensor = np.frombuffer(server.get("/tensor"), np.float32).reshape(rows, width)
    assert np.isfinite(tensor).all()
    assert np.ptp(tensor[:, 0]) > 0
    header, *lines = server.get("/metadata").decode().splitlines()
    assert header.split("\t") == ["class", "predicted", "right", "confidence", "file"]
    assert len(lines) == rows
    sheet = Image.open(io.BytesIO(server.get("/sprite_image"))).convert("RGB")
    assert sheet.size == (2 * SPRITE_SIZE, 2 * SPRITE_SIZE)
    for number, line in enumerate(lines):
        name, predicted, right, _, file = line.split("\t")
        assert file.startswith(f"{name}/")
        assert right == ("yes" if name == predicted else "no")
        row, column = divmod(number, 2)
        tile = np.asarray(sheet)[row * SPRITE_SIZE :, column * SPRITE_SIZE :][8:40, 8:40]
        assert np.abs(tile.mean((0, 1)) - COLOURS[name]).max() < 40


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_job_tensorboard_serves_it_from_any_storage(tmp_path: Path, scheme: str) -> None:
    run_dir = f"{scheme}{tmp_path}/{uuid.uuid4().hex}"
    logger = BucketTensorBoardLogger(f"{run_dir}/tensorboard")
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    files = {
        "v.tsv": vectors(torch.eye(3)),
        "l.tsv": "class\tfile\nä\t1\nb\t2\nc\t3\n".encode(),
        "s.jpg": sprite_sheet(torch.zeros(3, 3, SPRITE_SIZE, SPRITE_SIZE, dtype=torch.uint8)),
        projector.CONFIG: projector.configuration("v.tsv", "l.tsv", "s.jpg"),
    }
    for name, content in files.items():
        storage.write_bytes(f"{run_dir}/tensorboard/{name}", content)
    with serve([run_dir], host="127.0.0.1", port=0) as (address, (run,)):

        def get(route: str) -> bytes:
            query = urllib.parse.urlencode({"run": run, "name": "backbone features"})
            return urllib.request.urlopen(f"{address.rstrip('/')}/data/plugin/projector/{route}?{query}").read()

        deadline = time.monotonic() + 120
        while not json.loads(get("runs")) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert json.loads(get("info"))["embeddings"][0]["tensorShape"] == [3, 3]
        assert len(get("tensor")) == 3 * 3 * 4
        assert get("metadata") == files["l.tsv"]
        assert get("sprite_image") == files["s.jpg"]


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", "", "..", "a/b"])
def test_a_configuration_names_no_file_elsewhere(file: str) -> None:
    with pytest.raises(ValueError, match="does not lie beside"):
        path_beside(file, "runs://1/projector_config.pbtxt")


def test_cached_features_are_those_of_the_network(tmp_path: Path) -> None:
    found = []
    for features in ("always", "never"):
        run_dir = fit_here(tmp_path / features, trainer__max_epochs=1, features__use=features, monitoring__projector=9)
        (file,) = (run_dir / "tensorboard").glob("projector-*-vectors.tsv")
        found.append(np.loadtxt(file))
    assert np.ptp(found[0][:, 0]) > 0.1
    assert np.allclose(np.abs(found[0]), np.abs(found[1]), rtol=1e-2, atol=1e-2)


def test_no_files_unless_wanted(tmp_path: Path) -> None:
    run_dir = fit_here(tmp_path, trainer__max_epochs=1)
    assert not list((run_dir / "tensorboard").glob("projector*"))


def test_an_error_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(projector, "vectors", lambda features: 1 / 0)
    monkeypatch.setattr(projector.log, "warning", lambda message, *values: warnings.append(message % values))
    run_dir = fit_here(tmp_path, trainer__max_epochs=1, monitoring__projector=3)
    assert warnings == ["there are no files for the projector: ZeroDivisionError: division by zero"]
    assert (run_dir / "report.json").exists()


@pytest.mark.parametrize(("size", "most", "count"), [(10, 3, 3), (3, 10, 3), (1, 5, 1), (50_000, 5000, 5000)])
def test_samples_are_spread_and_differ(size: int, most: int, count: int) -> None:
    samples = spread_samples(size, most)
    assert len(set(samples.tolist())) == len(samples) == count
    assert samples.min() == 0
    assert samples.max() == (size - 1 if count > 1 else 0)
    if count > 1000:
        assert abs(samples[:500].mean() - size / 2) < size / 10, "a part of them is spread, too"


def test_distances_survive_the_reduction_to_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 20, generator=generator) @ torch.randn(20, 128, generator=generator) + 7
    reduced = torch.from_numpy(np.loadtxt(io.BytesIO(vectors(features)))).float()
    assert reduced.shape == (200, 50)
    assert torch.allclose(torch.cdist(reduced, reduced), torch.cdist(features, features), rtol=1e-2, atol=0.5)


def test_images_of_noise_and_features_are_bounded() -> None:
    images = torch.randint(0, 256, (1000, 3, SPRITE_SIZE, SPRITE_SIZE), dtype=torch.uint8)
    content = sprite_sheet(images)
    assert len(content) <= 1000 * projector.SPRITE_BYTES
    assert Image.open(io.BytesIO(content)).size == (32 * SPRITE_SIZE, 32 * SPRITE_SIZE)
    assert len(vectors(torch.randn(5000, 64))) < 3_000_000


def test_names_are_cells_of_one_line(tmp_path: Path) -> None:
    class Index:
        has_several_labels = False

        def labels_of(self, samples: Any) -> Any:
            return np.array([0, 1])

        def rows(self, samples: list[int]) -> list[Any]:
            return [type("Row", (), {"key": f"a\tb\n{number}"}) for number in samples]

    class Module:
        net = type("Net", (), {"classes": ["x\ty", "line\nbreak"]})

    points = projector.Points(
        torch.tensor([0, 1]), torch.zeros(2, 3), torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.empty(0)
    )
    module: Any = Module()
    index: Any = Index()
    lines = projector.label_table(module, index, points).decode().splitlines()
    assert [line.split("\t") for line in lines[1:]] == [
        ["x\\x09y", "x\\x09y", "yes", "0.900", "a\\x09b\\x0a0"],
        ["line\\x0abreak", "x\\x09y", "no", "0.600", "a\\x09b\\x0a1"],
    ]
