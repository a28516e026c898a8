"""Damage files of a format and read them by job's functions: ``mutants.py READER COUNT FOLDER [SEED]``.

Prints how many mutants ended in anything else than success or a :class:`~job.errors.JobError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from job.data.index.build import build, split
from job.data.index.file import load_index_info
from job.data.index.index import Index
from job.data.index.store import is_fresh, local_index
from job.errors import JobError

ROWS = 300
TOKENS = [
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"[" * 2000,
    b"9" * 400,
    b"-1",
    b"1e999",
    b"null",
    b",",
    b"\n",
    b"..",
    b"NaN",
    b"\x80",
]


def mutant(content: bytes, dice: random.Random) -> bytes:
    """``content`` with a few bits flipped, bytes replaced, parts cut, repeated or moved."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        start, kind = dice.randrange(len(data) + 1), dice.randrange(8)
        end = min(len(data), start + dice.choice((1, 2, 4, 8, 64, 512)))
        if kind == 0 and start < len(data):
            data[start] ^= 1 << dice.randrange(8)
        elif kind == 1 and start < len(data):
            data[start] = dice.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            data[start:end] = dice.randbytes(end - start)
        elif kind == 3:
            del data[start:end]
        elif kind == 4:
            data[start:start] = dice.choice(TOKENS)
        elif kind == 5:
            data[start:end] = dice.choice((b"\xff", b"\0", b"\x7f")) * (end - start)
        elif kind == 6:
            data[start:start] = data[start:end] * dice.choice((1, 3))
        elif kind == 7 and dice.random() < 0.3:
            del data[start:]
    return bytes(data)


def images(folder: Path) -> Path:
    """Two classes of small images."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    for name in ("blue", "red"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(8):
            (folder / name / f"{number}.png").write_bytes(buffer.getvalue())
    return folder


def use_index(folder: Path, cache: Path) -> None:
    """Read an index as a run does."""
    local_index(str(folder), cache)
    for part in load_index_info(folder).parts:
        index = Index(folder, part)
        index.labels, index.keys, index.fingerprint()
        index.class_counts(), index.rarest_labels()
        if len(index) and index.has_several_labels:
            index.multi_hot_of(np.arange(len(index)))
        if len(index):
            index.uri(len(index) - 1)
            index.rows([0, len(index) - 1])
        is_fresh(str(folder), load_index_info(folder), [index])


def index_reader(folder: Path, name: str, *, several: bool = False) -> tuple[bytes, Callable[[bytes], None]]:
    root, index = images(folder / "data"), folder / "index"
    index.mkdir()
    if several:
        labels = [[str(c) for c in range(4) if n >> c & 1] for n in range(16)]
        lines = [{"uri": f"{'red' if n & 8 else 'blue'}/{n % 8}.png", "label": labels[n]} for n in range(16)]
        root = root / "table.jsonl"
        root.write_text("\n".join(map(json.dumps, lines)))
    build({"root": [str(root)]}, index, "", "parts")
    original = (index / "index.json").read_bytes()

    def read(content: bytes) -> None:
        (index / name).write_bytes(content)
        if name != "index.json":  # whoever changes the one can change the other
            info = json.loads(original)
            info["parts"]["train"] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            (index / "index.json").write_text(json.dumps(info))
        use_index(index, folder / "cache")

    return (index / name).read_bytes(), read


def table_reader(folder: Path, suffix: str) -> tuple[bytes, Callable[[bytes], None]]:
    rows = [
        {
            "uri": f"images/{n}.jpg",
            "label": "ab"[n % 2],
            "split": ("train", "val")[n % 5 == 4],
            "more": {"x": [n], "y": "é"},
        }
        for n in range(ROWS)
    ]
    buffer = io.BytesIO()
    if suffix == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), buffer, compression="snappy")
    elif suffix == "csv":
        lines = [f'"{row["uri"]}",{row["label"]},{row["split"]},{n}' for n, row in enumerate(rows)]
        buffer.write("\n".join(["uri,label,split,more", *lines, ""]).encode())
    else:
        buffer.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def read(content: bytes) -> None:
        (folder / f"t.{suffix}").write_bytes(content)
        target = folder / "built"
        target.mkdir(exist_ok=True)
        info = build({"root": [str(folder / f"t.{suffix}")]}, target, "", "parts")
        if "val" not in info.parts:
            split(target, 0.2, 0)
        use_index(target, folder / "cache")

    return buffer.getvalue(), read


def feature_reader(folder: Path, name: str) -> tuple[bytes, Callable[[bytes], None]]:
    import torch

    from job.features.store import FeatureStore

    images(folder / "data")
    (folder / "index").mkdir()
    build({"root": [str(folder / "data")]}, folder / "index", "", "parts")
    dataset = SimpleNamespace(index=Index(folder / "index", "train"), preprocessing=SimpleNamespace(variants=2))

    def store() -> FeatureStore:
        return FeatureStore(dataset, folder / "here" / "x", str(folder / "there"), 12, torch.float32)  # type: ignore[arg-type]

    original_store = store()
    original_store.save(0, torch.randn(32, 12), torch.ones(32, dtype=torch.bool), {3: "cannot be read"})
    original_store.publish(0)
    chunk, manifest = folder / "there" / "train-000000.safetensors", folder / "there" / "train-000000.json"
    original, info = chunk.read_bytes(), json.loads(manifest.read_bytes())
    dice = random.Random(0)

    def read(content: bytes) -> None:
        if dice.random() < 0.3:
            manifest.write_bytes(mutant(json.dumps(info).encode(), dice))
        else:
            changed = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            manifest.write_text(json.dumps({**info, **changed}))
        chunk.write_bytes(content)
        reopened = store()
        if reopened.published() and reopened.fetch(0):
            reopened.open()
            reopened.on_disk()

    return original, read


def main() -> None:
    """Run it."""
    reader, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    logging.disable()
    kinds: dict[str, Callable[[], tuple[bytes, Callable[[bytes], None]]]] = {
        "index.json": lambda: index_reader(folder, "index.json"),
        "index.arrow": lambda: index_reader(folder, "train.arrow"),
        "labels.arrow": lambda: index_reader(folder, "train.arrow", several=True),
        "features": lambda: feature_reader(folder, ""),
    }
    content, read = kinds[reader]() if reader in kinds else table_reader(folder, reader)
    read(content)
    dice, escaped, refused = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else 0), 0, 0
    for number in range(count):
        changed = mutant(content, dice)
        (folder / "last").write_bytes(changed)
        try:
            read(changed)
        except JobError as error:
            refused += 1
            assert len(str(error)) < 20_000, len(str(error))
        except Exception:
            escaped += 1
            (folder / f"escaped-{number}").write_bytes(changed)
            if escaped <= 3:
                print(number, traceback.format_exc()[-1500:])
    with contextlib.suppress(FileNotFoundError):
        (folder / "last").unlink()
    print(f"{reader}: {count} mutants, {escaped} escaped, {refused} refused")


if __name__ == "__main__":
    main()
