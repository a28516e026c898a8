"""An audit of a data set with planted faults, each of which it must find, and a fit of the table without them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from support import COLOURS, FROZEN, fit_here, options, run_here, write_files, zip_of

from job.audit.result import AuditResult, Finding
from job.audit.settings import KINDS, AuditSettings
from job.errors import ConfigError

PER_CLASS = 24


def encoded(image: Image.Image, file_format: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **settings)
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def picture(
    colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (80, 64), file_format: str = "JPEG"
) -> bytes:
    """A picture of soft shapes in one colour; each seed gives another one."""
    shapes = np.random.default_rng(seed).normal(0, 40, (6, 7, 3))
    pixels = (np.asarray(colour) + shapes).clip(0, 255).astype(np.uint8)
    return encoded(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), file_format)


def pictures(classes: list[str], count: int, seed: int = 0) -> dict[str, bytes]:
    return {
        f"{name}/{number:03d}.jpg": picture(COLOURS[name], seed + 1000 * place + number)
        for place, name in enumerate(classes)
        for number in range(count)
    }


def planted() -> dict[str, bytes]:
    """Two parts of two classes, and one fault of each kind."""
    files = {f"train/{key}": content for key, content in pictures(["blue", "red"], PER_CLASS).items()}
    files |= {f"val/{key}": content for key, content in pictures(["blue", "red"], 6, seed=5000).items()}
    files["train/blue/flipped.jpg"] = picture(COLOURS["red"], 9001)
    files["val/red/flipped.jpg"] = picture(COLOURS["blue"], 9002)
    files["val/blue/leak.jpg"] = files["train/blue/000.jpg"]
    files["val/red/leak-re-encoded.jpg"] = encoded(opened(files["train/red/001.jpg"]), "JPEG", quality=60)
    files["train/blue/exact.jpg"] = files["train/blue/002.jpg"]
    files["train/blue/rotated.png"] = encoded(opened(files["train/blue/003.jpg"]).rotate(90, expand=True))
    files["train/red/mirrored.png"] = encoded(opened(files["train/red/004.jpg"]).transpose(Image.Transpose.TRANSPOSE))
    files["train/red/resized.png"] = encoded(opened(files["train/red/005.jpg"]).resize((200, 150)))
    files["train/blue/conflict.jpg"] = files["train/red/006.jpg"]
    for name in ("train/blue/gone.png", "train/blue/missing.png", "train/red/gone.png", "train/red/missing.png"):
        files[name] = encoded(opened(picture((120, 120, 120), 9003)))
    files["train/red/blank.png"] = encoded(Image.new("RGB", (40, 32), (180, 20, 20)))
    files["train/red/tiny.png"] = picture(COLOURS["red"], 9004, (6, 7), "PNG")
    files["train/blue/odd.png"] = picture(COLOURS["blue"], 9005, (240, 40), "PNG")
    files["train/blue/broken.jpg"] = b"\xff\xd8\xff no image"
    return files


PLANTED = {
    "leakage": {
        *("train/blue/000.jpg", "val/blue/leak.jpg", "train/red/001.jpg", "val/red/leak-re-encoded.jpg"),
    },
    "exact_duplicate": {"train/blue/002.jpg", "train/blue/exact.jpg"},
    "near_duplicate": {
        *("train/blue/003.jpg", "train/blue/rotated.png", "train/red/004.jpg", "train/red/mirrored.png"),
        *("train/red/005.jpg", "train/red/resized.png"),
    },
    "conflicting_labels": {"train/red/006.jpg", "train/blue/conflict.jpg"},
    "placeholder": {"train/blue/gone.png", "train/blue/missing.png", "train/red/gone.png", "train/red/missing.png"},
    "blank": {"train/red/blank.png"},
    "tiny": {"train/red/tiny.png"},
    "odd_aspect": {"train/blue/odd.png"},
    "unreadable": {"train/blue/broken.jpg"},
}


def findings_of(run_dir: Path, root: Path) -> dict[str, dict[str, Finding]]:
    """Findings by kind and by path below the data."""
    decoded = msgspec.json.Decoder(Finding).decode_lines((run_dir / "audit" / "audit.jsonl").read_bytes())
    found: dict[str, dict[str, Finding]] = {}
    for each in decoded:
        found.setdefault(each.kind, {})[str(Path(each.uri).relative_to(root))] = each
    return found


def summary_of(run_dir: Path) -> AuditResult:
    return msgspec.json.decode((run_dir / "audit" / "audit.json").read_bytes(), type=AuditResult)


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("audit")
    root, run_dir = write_files(folder / "images", planted()), folder / "run"
    result = run_here(
        "audit", *options(FROZEN, data__root=root, run_dir=run_dir), f"--write_manifest={folder / 'clean.csv'}"
    )
    assert result.returncode == 0, result.output
    return root, run_dir, result.output


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_faults(audited: tuple[Path, Path, str], kind: str) -> None:
    root, run_dir, _ = audited
    assert set(findings_of(run_dir, root)[kind]) == PLANTED[kind]


def test_flipped_labels(audited: tuple[Path, Path, str]) -> None:
    root, run_dir, output = audited
    errors = findings_of(run_dir, root)["label_error"]
    assert errors["train/blue/flipped.jpg"].suggested == ["red"]
    assert errors["val/red/flipped.jpg"].suggested == ["blue"]
    truth = {"train/blue/flipped.jpg", "val/red/flipped.jpg", "train/blue/conflict.jpg"}
    assert len(set(errors) - truth) <= 2
    assert "most certain label errors" in output


def test_groups_and_summary(audited: tuple[Path, Path, str]) -> None:
    root, run_dir, output = audited
    found, summary = findings_of(run_dir, root), summary_of(run_dir)
    leaks = found["leakage"]
    assert leaks["train/blue/000.jpg"].group == leaks["val/blue/leak.jpg"].group
    assert leaks["train/blue/000.jpg"].group != leaks["train/red/001.jpg"].group
    assert leaks["val/blue/leak.jpg"].score == 1.0
    assert next(iter(summary.findings)) == "leakage"
    assert {kind: len(each) for kind, each in found.items()} == summary.findings
    assert summary.images == {"train": 2 * PER_CLASS + 14, "val": 15}
    assert summary.labels_not_checked == {"unreadable": 1, "blank": 1}
    assert summary.labels_checked == sum(summary.images.values()) - 2
    assert "copies in several parts" in output


def test_fit_of_the_manifest(audited: tuple[Path, Path, str], tmp_path: Path) -> None:
    root, run_dir, output = audited
    table = run_dir.parent / "clean.csv"
    rows = list(csv.DictReader(table.open()))
    names = {str(Path(row["uri"]).relative_to(root)): row for row in rows}
    assert not names.keys() & (PLANTED["placeholder"] | PLANTED["conflicting_labels"] | PLANTED["blank"])
    assert not names.keys() & {"train/blue/flipped.jpg", "val/red/flipped.jpg", "train/blue/broken.jpg"}
    # The image that results are measured on stays, and one of each group.
    assert names["val/blue/leak.jpg"]["split"] == "val"
    assert "train/blue/000.jpg" not in names
    assert len(names.keys() & PLANTED["exact_duplicate"]) == 1
    assert len(names.keys() & PLANTED["near_duplicate"]) == 3
    assert {"train/blue/odd.png", "train/red/tiny.png"} <= names.keys()
    summary = summary_of(run_dir)
    assert summary.manifest is not None
    assert summary.manifest.images == len(rows)
    assert sum(summary.manifest.left_out.values()) + len(rows) == sum(summary.images.values())
    assert f"{len(rows)} images in {table}" in output
    left_out = ", ".join(f"{count} {kind}" for kind, count in summary.manifest.left_out.items())
    assert f"left out: {left_out}." in " ".join(output.split())
    fitted = run_here("fit", tmp_path / "fit", f"--data.root={table}", *options(FROZEN, trainer__max_epochs=1))
    assert fitted.returncode == 0, fitted.output
    assert f"train {sum(row['split'] == 'train' for row in rows)}" in fitted.output


def test_page_is_escaped_and_bounded(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    files = pictures(["blue", "red"], 12)
    files = {key.replace("blue", name): content for key, content in files.items()}
    files |= {f"red/copy{number}.jpg": files["red/000.jpg"] for number in range(12)}
    root = write_files(tmp_path / "images", files)
    result = run_here("audit", *options(FROZEN, data__root=root, run_dir=tmp_path / "run"), "--thumbnails=5")
    assert result.returncode == 0, result.output
    page = (tmp_path / "run" / "audit" / "audit.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    assert page.count("data:image/jpeg;base64,") == 5
    assert "default-src 'none'" in page
    assert "<script" not in page


def test_several_labels(tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", pictures(["blue", "red"], 40))
    rows = [
        {"uri": str(images / name / f"{number:03d}.jpg"), "label": [name]}
        for number in range(40)
        for name in ("blue", "red")
    ]
    rows[6]["label"], rows[9]["label"] = ["red", "blue"], []  # one too many, and one that is missing
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    settings = {"data__root": table, "model__task": "multilabel", "run_dir": tmp_path / "run"}
    clean = tmp_path / "clean.parquet"
    result = run_here("audit", *options(FROZEN, **settings), f"--write_manifest={clean}")
    assert result.returncode == 0, result.output
    found = findings_of(tmp_path / "run", images)["label_error"]
    assert found["blue/003.jpg"].suggested == ["blue"]
    assert found["red/004.jpg"].suggested == ["red"]
    assert len(found) <= 4
    fitted = run_here(
        "fit",
        *options(FROZEN, data__root=clean, model__task="multilabel", run_dir=tmp_path / "fit", trainer__max_epochs=1),
    )
    assert fitted.returncode == 0, fitted.output


def test_one_class_and_a_rare_class(tmp_path: Path) -> None:
    one = write_files(tmp_path / "one", pictures(["blue"], 10))
    result = run_here("audit", *options(FROZEN, data__root=one, run_dir=tmp_path / "run"))
    assert result.returncode == 2
    assert "--audit.labels=none" in result.output
    (one / "copy.jpg").write_bytes((one / "blue" / "003.jpg").read_bytes())
    result = run_here("audit", *options(FROZEN, data__root=one, run_dir=tmp_path / "run"), "--labels=none")
    assert result.returncode == 0, result.output
    assert summary_of(tmp_path / "run").labels_not_checked == {"without a label": 11}
    assert set(findings_of(tmp_path / "run", one)["exact_duplicate"]) == {"copy.jpg", "blue/003.jpg"}
    files = {f"train/{key}": content for key, content in pictures(["blue", "red"], 10).items()}
    files |= {f"val/{key}": content for key, content in pictures(["blue", "red"], 3, seed=500).items()}
    files["train/green/000.jpg"] = picture(COLOURS["green"], 1)
    rare = write_files(tmp_path / "rare", files)
    result = run_here("audit", *options(FROZEN, data__root=rare, run_dir=tmp_path / "rare-run"))
    assert result.returncode == 0, result.output
    reason = "of a class with fewer than two different images"
    assert summary_of(tmp_path / "rare-run").labels_not_checked == {reason: 1}
    assert f"1 image(s) were not checked: {reason}" in result.output


def test_run_dir_and_checkpoint_of_a_fit(tmp_path: Path) -> None:
    run_dir = fit_here(tmp_path)
    result = run_here("audit", run_dir)
    assert result.returncode == 0, result.output
    assert summary_of(run_dir).backbone == "timm/test_resnet"
    result = run_here("audit", run_dir, f"--ckpt={run_dir}", "--folds=0")
    assert result.returncode == 0, result.output
    summary = summary_of(run_dir)
    assert summary.labels_checked == 0
    assert summary.labels_not_checked == {"--audit.folds=0": 20}


def test_classes_that_features_cannot_tell_apart(tmp_path: Path) -> None:
    files = pictures(["blue", "red"], 20)
    generator = np.random.default_rng(0)
    for number in range(40):  # red under two names
        name = "red" if generator.random() < 0.5 else "crimson"
        files[f"{name}/more{number}.jpg"] = picture(COLOURS["red"], 7000 + number)
    root = write_files(tmp_path / "images", files)
    result = run_here("audit", *options(FROZEN, data__root=root, run_dir=tmp_path / "run"))
    assert result.returncode == 0, result.output
    assert [set(each.classes) for each in summary_of(tmp_path / "run").confused] == [{"crimson", "red"}]
    assert "hardly tell apart" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folds=1"], "--audit.folds must be between 2 and 100"),
        (["--similarity=1.5"], "--audit.similarity must be above 0"),
        (["--leave_out=blurred"], "'blurred' is no kind of finding"),
        (["--write_manifest=clean.txt"], "must end with .csv, .jsonl, .parquet"),
        (["--write_manifest=memory://bucket/clean.csv"], "a table in a bucket cannot name local files"),
        (["--trainer.precision=64-true"], "audit computes features at bf16-mixed or 32-true"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    root = write_files(tmp_path / "images", pictures(["blue", "red"], 3))
    result = run_here("audit", *options(FROZEN, data__root=root, run_dir=tmp_path / "run"), *arguments)
    assert result.returncode == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run" / "features").exists()


def test_a_manifest_cannot_name_members_of_an_archive(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    archive.write_bytes(zip_of(pictures(["blue", "red"], 10)))
    settings = options(FROZEN, data__root=archive, run_dir=tmp_path / "run")
    refused = run_here("audit", *settings, f"--write_manifest={tmp_path / 'clean.csv'}")
    assert refused.returncode == 2
    assert "Unpack it into a folder" in refused.output
    assert run_here("audit", *settings).returncode == 0


def test_all_images_are_one_picture_or_blank(tmp_path: Path) -> None:
    one, blank = picture(COLOURS["red"], 1), encoded(Image.new("RGB", (40, 40)))
    for name, content, kind in (("one", one, "placeholder"), ("blank", blank, "blank")):
        root = write_files(tmp_path / name, {f"{label}/{n}.png": content for label in ("a", "b") for n in range(12)})
        run_dir, table = tmp_path / f"run-{name}", tmp_path / f"{name}.csv"
        result = run_here("audit", *options(FROZEN, data__root=root, run_dir=run_dir), f"--write_manifest={table}")
        assert result.returncode == 2, result.output
        assert "every image is suspect" in result.output
        assert not table.exists()
        assert len(findings_of(run_dir, root)[kind]) == 24


def test_kinds_to_leave_out() -> None:
    assert AuditSettings(leave_out="all").left_out_kinds() == set(KINDS)
    assert AuditSettings(leave_out="none").left_out_kinds() == set()
    assert AuditSettings(leave_out="blank, tiny").left_out_kinds() == {"blank", "tiny"}
    assert set(KINDS) - AuditSettings().left_out_kinds() == {"outlier", "tiny", "odd_aspect"}
    with pytest.raises(ConfigError, match="no kind of finding"):
        AuditSettings(leave_out="blurred")
