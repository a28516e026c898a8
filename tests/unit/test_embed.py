"""Embeddings of images: files and folders of vectors, restarts, and the search for similar images."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import COLOURS, fit_here, picture, picture_files, run_here, write_files
from test_projector import Server

import job
from job.data.index.build import build
from job.data.index.index import Index
from job.embed import run
from job.embed.embedder import Embedder
from job.embed.file import Block, EmbeddingFile, Embeddings, FileInfo, VectorType
from job.embed.run import Totals, embed_to_folder
from job.embed.search import nearest
from job.errors import DataError, DivergedError
from job.features.network import bare_backbone
from job.predict.run import Reading
from job.predict.work import Work, prepare

SIZE = 32
MODEL = ("--model.backbone", "timm/test_resnet", "--model.weights", "none", "--image_size", SIZE, "--precision", "fp32")
INFO = FileInfo("f" * 16, "resnet18", "fp32")


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(bare_backbone("timm/test_resnet", "none", image_size=SIZE), "squash")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures in two class folders, one of which cannot be read."""
    files = {**picture_files(["blue", "red"], 30), "blue/007.jpg": b"no image"}
    return write_files(tmp_path_factory.mktemp("embed"), files)


def embed(*args: object, code: int = 0) -> str:
    result = run_here("embed", *args)
    assert result.returncode == code, result.output
    return result.output


def parts_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_file_of_vectors(images: Path, embedder: Embedder, tmp_path: Path) -> None:
    output = tmp_path / "vectors.parquet"
    command = (*MODEL, "--input", images, "--labels", "folders", "--output", output)
    printed = embed(*command, "--max_bad_samples", 1)
    assert f"59 vectors of {embedder.width} numbers in" in printed
    table = pq.read_table(output)
    assert table.schema.field("vector").type == pa.list_(pa.float32(), embedder.width)
    rows = table.to_pylist()
    assert [row["uri"] for row in rows] == [str(path) for path in sorted(images.rglob("*.jpg"))]
    assert [row["label"] for row in rows] == ["blue"] * 30 + ["red"] * 30
    for row in rows:
        if row["uri"].endswith("blue/007.jpg"):
            assert row["vector"] is None
            assert row["error"]
            continue
        pixels = embedder.preprocessing.decoded(Path(row["uri"]).read_bytes())
        expected = embedder.predict_batch(pixels[None])[0].vector
        np.testing.assert_allclose(row["vector"], expected, rtol=1e-4, atol=1e-5)
        assert row["error"] is None
    assert "1 unreadable image(s)" in embed(*command, code=2)


def work_of(embedder: Embedder, images: Path, output: Path, cache: Path) -> tuple[Work, Index]:
    def list_images(folder: Path) -> None:
        build({"all": [str(images)]}, folder, str(cache), "images")

    request = {"format": "parquet", "model": embedder.fingerprint}
    work, folder = prepare(str(output), request, list_images, 4, cache, kind="embeddings")
    return work, Index(folder, "all")


def test_each_image_once_over_ranks_and_restarts(
    images: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 of 3 is killed in its second part; then ranks 0 and 1 of 2 come, the first of which does all the rest."""
    output, cache, reading = tmp_path / "out", tmp_path / "cache", Reading(4, 1, str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "3")
    work, index = work_of(embedder, images, output, cache)
    monkeypatch.setenv("RANK", "2")
    for number, _ in enumerate(embed_to_folder(embedder, index, reading, str(output), work, "float32")):
        if number == 1:
            break
    assert 0 < len(list(output.glob("part-*.parquet"))) < work.parts
    committed: list[int] = []
    commit = run.commit_part

    def recorded(path: Path, folder: str, work: Work, part: int) -> None:
        committed.append(part)
        commit(path, folder, work, part)

    monkeypatch.setattr(run, "commit_part", recorded)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        again, index = work_of(embedder, images, output, cache)
        assert again == work
        computed = sum(len(rows) for rows in embed_to_folder(embedder, index, reading, str(output), work, "float32"))
        assert (computed > 0) == (rank == "0")
    assert len(committed) == len(set(committed)) == work.parts - 1
    assert [row["uri"] for row in parts_of(output)] == [str(path) for path in sorted(images.rglob("*.jpg"))]
    totals = Totals.of_folder(str(output), work, embedder.width)
    assert totals.images == 60
    assert [Path(bad.line.split(" ")[0]).name for bad in totals.unreadable] == ["007.jpg"]
    (output / work.name_of(1)).write_bytes((output / work.name_of(work.parts - 1)).read_bytes()[:-9])
    with pytest.raises(DataError, match="is no file of embeddings"):
        Totals.of_folder(str(output), work, embedder.width)


def test_a_run_its_folder_search_and_projector(images: Path, tmp_path: Path) -> None:
    run_dir, output = fit_here(tmp_path, trainer__max_epochs=1), tmp_path / "out"
    command = ("--run_dir", run_dir, "--output", output, "--precision", "fp32")
    query = images / "red" / "011.jpg"
    printed = embed(*command, "--input", images, "--max_bad_samples", 1, "--projector", 8, "--query", query, "--k", 3)
    lines = [line.split("│")[1:4] for line in printed.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in lines[0]] == ["1.0000", "red", str(query)]
    assert len(lines) == 3
    # Class folders of the run's classes are labels; the same folder is found again, and searched alone.
    assert {row["label"] for row in parts_of(output)} == {"blue", "red"}
    assert str(query) in embed(*command, "--query", query, "--k", 1)
    assert json.loads((output / "summary.json").read_bytes())["unreadable"] == 1
    server = Server(str(output))
    (embedding,) = json.loads(server.get("/info"))["embeddings"]
    assert embedding["tensorShape"][0] in (7, 8)
    assert server.get("/metadata").decode().splitlines()[0] == "class\tfile"
    assert "holds embeddings" in run_here("predict", run_dir, images, "--output", output).output
    refused = embed(*command, "--input", images, "--vector_type", "float16", code=2)
    assert "holds other embeddings: vector_type was float32, is float16" in refused
    other = embed(*MODEL, "--resize", "crop", "--output", output, "--query", query, code=2)
    assert "was computed by another backbone" in other


def test_vectors_of_lines(images: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "lines"
    paths = [images / "red" / "001.jpg", images / "blue" / "007.jpg", images / "blue" / "001.jpg"]
    lines.write_text("".join(f"{path}\n" for path in paths))
    with lines.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        printed = embed(*MODEL, "--from_stdin", "--max_bad_samples", 1)
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [row["uri"] for row in rows] == [str(path) for path in paths]
    assert "error" in rows[1]
    pixels = embedder.preprocessing.decoded(paths[0].read_bytes())
    np.testing.assert_allclose(rows[0]["vector"], embedder.predict_batch(pixels[None])[0].vector, rtol=1e-4, atol=1e-5)
    assert rows[0]["model"] == embedder.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x", "--output", "y"], "needs a backbone"),
        ([*MODEL, "--input", "x"], "needs a place"),
        ([*MODEL, "--output", "y"], "needs images"),
        ([*MODEL, "--input", "x", "--output", "y.csv"], "written as .parquet"),
        ([*MODEL, "--input", "x", "--output", "y", "--run_dir", "z"], "Leave --model.backbone out"),
        ([*MODEL, "--input", "x", "--output", "y.parquet", "--projector", "5"], "a folder as --output"),
        ([*MODEL, "--output", "none.parquet", "--query", "x"], "does not exist"),
        ([*MODEL, "--output", "none", "--query", "x"], "holds no embeddings"),
        ([*MODEL, "--from_stdin", "--output", "y"], "Leave --output out"),
        ([*MODEL, "--input", "x", "--output", "y", "--k", "0"], "--k must be at least 1"),
        ([*MODEL, "--input", "x", "--output", "y", "--num_workers", "-1"], "--num_workers must be at least 0"),
        ([*MODEL, "--input", "x", "--output", "y", "--model.std", "[1,0,1]"], "--model.std must be numbers above 0"),
        ([*MODEL, "--input", "x", "--output", "y", "--model.mean", "[.nan,0,1]"], "--model.mean must be finite"),
    ],
)
def test_options_that_cannot_work(
    arguments: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in embed(*arguments, code=2)
    assert not list(tmp_path.iterdir())


def write(path: Path, vectors: np.ndarray, vector_type: VectorType = "float32", valid: np.ndarray | None = None) -> str:
    valid = np.ones(len(vectors), np.bool_) if valid is None else valid
    with EmbeddingFile(path, vectors.shape[1], vector_type, INFO) as file:
        for start in range(0, len(vectors), 100):
            rows = slice(start, start + 100)
            count = len(vectors[rows])
            uris = [f"{path.stem}/{start + number}.jpg" for number in range(count)]
            errors = [None if good else "is no image" for good in valid[rows]]
            file.add(Block(uris, vectors[rows], valid[rows], [["a", "b"]] * count, errors))
    return str(path)


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
def test_the_nearest_images_are_those_of_a_full_comparison(
    vector_type: VectorType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.embed.file.ROWS_AT_ONCE", 64)
    monkeypatch.setattr("job.embed.file.GROUP_BYTES", 1 << 12)
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(500, 8)).astype(np.float32)
    valid = generator.random(500) > 0.1
    vectors[3] = 0  # has no direction: its cosine is 0
    valid[3] = True
    files = [
        Embeddings(write(tmp_path / "a.parquet", vectors[:300], vector_type, valid[:300])),
        Embeddings(write(tmp_path / "b.parquet", vectors[300:], vector_type, valid[300:])),
    ]
    assert [file.rows for file in files] == [300, 200]
    assert files[0].info == INFO
    queries = generator.normal(size=(2, 8)).astype(np.float32)
    for query, neighbours in zip(queries, nearest(queries, files, 20), strict=True):
        lengths = np.maximum(np.linalg.norm(vectors, axis=1) * np.linalg.norm(query), 1e-30)
        cosines = np.where(valid, vectors @ query / lengths, -np.inf)
        best = np.argsort(-cosines)[:20]
        expected = [f"a/{row}.jpg" if row < 300 else f"b/{row - 300}.jpg" for row in best]
        found = [each.uri for each in neighbours]
        if vector_type == "float32":
            assert found == expected
        assert len({*found} & {*expected}) >= 19
        np.testing.assert_allclose([each.similarity for each in neighbours], cosines[best], atol=2e-3)
        assert neighbours[0].labels == ("a", "b")
    (every,) = nearest(queries[:1], files, 10_000)
    assert len(every) == valid.sum()
    with pytest.raises(DataError, match="another backbone"):
        nearest(np.zeros((1, 7), np.float32), files, 3)


def test_a_vector_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--vector_type float32"):
        write(tmp_path / "a.parquet", np.full((3, 4), 1e6, np.float32), "float16")


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    net = bare_backbone("timm/test_resnet", "none", image_size=SIZE)
    next(net.backbone.parameters()).data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite"):
        Embedder(net, "squash").predict_batch(Embedder(net, "squash").preprocessing.decoded(png())[None])
    table = pa.table({"uri": ["x"], "vector": pa.array([[float("nan")]], pa.list_(pa.float32(), 1))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not finite"):
        list(Embeddings(str(tmp_path / "a.parquet")).blocks())


def png() -> bytes:
    return picture(COLOURS["red"], 0)


VECTOR = pa.array([[1.0]], pa.list_(pa.float32(), 1))
FILES: dict[str, pa.Table] = {
    "no vectors": pa.table({"uri": ["x"]}),
    "lists of any length": pa.table({"uri": ["x"], "vector": pa.array([[1.0]], pa.list_(pa.float32()))}),
    "whole numbers": pa.table({"uri": ["x"], "vector": pa.array([[1]], pa.list_(pa.int64(), 1))}),
    "no names": pa.table({"uri": [1], "vector": pa.array([[1.0]], pa.list_(pa.float32(), 1))}),
    "labels that are numbers": pa.table({"uri": ["x"], "vector": VECTOR, "labels": [[5]]}),
    "a label of bytes": pa.table({"uri": ["x"], "vector": VECTOR, "label": [b"x"]}),
    "a label without a name": pa.table({"uri": ["x"], "vector": VECTOR, "labels": [["a", None]]}),
    "an image without a name": pa.table({"uri": pa.array([None], pa.string()), "vector": VECTOR}),
    "metadata of another program": pa.table(
        {"uri": ["x"], "vector": pa.array([[1.0]], pa.list_(pa.float32(), 1))}
    ).replace_schema_metadata({"job.embeddings": '{"model": 3}'}),
}


@pytest.mark.parametrize("name", [*FILES, "no Parquet"])
def test_another_file_is_refused(name: str, tmp_path: Path) -> None:
    buffer = io.BytesIO(b"PAR1 no table PAR1")
    if name in FILES:
        pq.write_table(FILES[name], buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"a\.parquet is no file of embeddings"):
        list(Embeddings(str(tmp_path / "a.parquet")).blocks())


def test_a_checkpoint_of_the_same_frozen_backbone_has_the_same_fingerprint(tmp_path: Path) -> None:
    predictor = job.load(str(fit_here(tmp_path, trainer__max_epochs=1)))
    one = Embedder(predictor.net, predictor.resize).fingerprint
    predictor.net.head[0].weight.data.add_(1)  # type: ignore[index,union-attr,operator]
    assert Embedder(predictor.net, predictor.resize).fingerprint == one
    assert Embedder(predictor.net, "crop").fingerprint != one
