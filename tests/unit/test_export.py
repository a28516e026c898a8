"""Export: equality with the checkpoint, files for other programs, and what is refused."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from support import COLOURS, REPOSITORY, fit_here, picture, picture_files, run_here, write_files
from torch import nn

from job import checkpoint, load, storage
from job.data.augment import resize
from job.errors import CheckpointError, ConfigError, StorageError, StorageOutage
from job.export import (
    equality,
    hub,
    images,
    int8,
    markdown,
    onnx_model,
    onnx_preprocessing,
    output,
    torch_program,
    triton,
    weights,
)
from job.export.card import model_card
from job.export.errors import ExportError
from job.export.formats import InputKind, parse_formats
from job.export.manifest import Check, ExportManifest, FileEntry, FormatEntry, ModelDescription
from job.export.network import ProbabilityNetwork, TorchPreprocessing, TrainedModel
from job.model.backbone import build_backbone
from job.model.classifier import Classifier
from job.model.spec import TaskName
from job.monitoring.report.files import read_report

TWELVE = {
    "resnet18": 64,
    "efficientnet_b0": 64,
    "mobilenet_v3_small": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "vit_b_32": 64,
    "timm/resnet18": 64,
    "timm/tf_efficientnet_lite0": 64,
    "timm/mobilenetv4_conv_small": 64,
    "timm/convnext_atto": 64,
    "timm/swin_tiny_patch4_window7_224": 224,
    "timm/vit_tiny_patch16_224": 224,
}
"""Backbones of six families, from torchvision and timm, and their image size."""
SMALL = {"timm/test_resnet": 64, "timm/test_vit": 160}
FORMATS = "onnx,pt2,weights,int8,triton"


def model_of(
    name: str,
    size: int,
    *,
    classes: tuple[str, ...] = ("a", "b", "c"),
    hidden: tuple[int, ...] = (),
    task: TaskName = "classification",
    resize: str = "squash",
) -> TrainedModel:
    """A network of random weights."""
    torch.manual_seed(0)
    net = Classifier(
        build_backbone(name, image_size=size),
        name=name,
        classes=classes,
        hidden=hidden,
        image_size=size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        task=task,
    ).eval()
    with torch.no_grad():
        net.head[-1].weight.mul_(20)  # so that probabilities differ from image to image
    description = ModelDescription(
        backbone=name,
        hidden=list(hidden),
        task=task,
        classes=list(classes),
        thresholds=[0.5] * len(classes) if task == "multilabel" else [],
        image_size=size,
        resize="crop" if resize == "crop" else "squash",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        checkpoint="epoch=001-step=00000001.ckpt",
        checkpoint_sha256="0" * 64,
    )
    return TrainedModel(net, ProbabilityNetwork(net), description)


def require_all_formats_equal(
    model: TrainedModel, folder: Path, kinds: tuple[InputKind, ...] = ("image",)
) -> list[str]:
    """Export to ONNX, torch.export and weights, and compare; returns the files of the weights."""
    size = model.description.image_size
    pixels = images.generated(5, size)
    graph = onnx_model.network_graph(model)
    for kind in kinds:
        onnx_model.write_graph(onnx_model.complete_graph(graph, kind, model.description, {}), folder / "m.onnx")
        equality.require_equal(onnx_model.runner(folder / "m.onnx"), model, kind, pixels, "onnx")
    torch_program.write_program(model, "image", folder / "m.pt2")
    equality.require_equal(torch_program.runner(folder / "m.pt2"), model, "image", pixels, "pt2")
    files, _ = weights.write_weights(model, folder, pixels)
    equality.require_equal(weights.runner(folder, model.description), model, "normalised", pixels, "weights")
    assert float(model.probabilities(pixels).std()) > 0
    return files


@pytest.mark.parametrize("name", SMALL)
def test_formats_equal_the_checkpoint(name: str, tmp_path: Path) -> None:
    model = model_of(name, SMALL[name])
    files = require_all_formats_equal(model, tmp_path, ("image", "resized", "normalised"))
    assert files == ["config.json", "model.safetensors"]


@pytest.mark.long
@pytest.mark.parametrize("name", TWELVE)
def test_formats_equal_the_checkpoint_of_six_families(name: str, tmp_path: Path) -> None:
    assert require_all_formats_equal(model_of(name, TWELVE[name]), tmp_path) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("classes", "hidden", "task", "files"),
    [
        (("a", "b"), (), "classification", 2),
        (("a", "b"), (8, 4), "classification", 3),
        (("a", "b", "c"), (), "multilabel", 2),
        (("a",), (8,), "multilabel", 3),
    ],
)
def test_heads_and_tasks(
    classes: tuple[str, ...], hidden: tuple[int, ...], task: TaskName, files: int, tmp_path: Path
) -> None:
    model = model_of("timm/test_resnet", 64, classes=classes, hidden=hidden, task=task, resize="crop")
    assert len(require_all_formats_equal(model, tmp_path)) == files
    if files == 3:
        config = json.loads((tmp_path / "config.json").read_bytes())
        head = safetensors.torch.load_file(tmp_path / "head.safetensors")
        assert config["num_classes"] == 0
        assert config["head"]["widths"][1:] == [*hidden, len(classes)]
        assert len(head) == 2 * len(config["head"]["widths"]) - 2


@pytest.mark.parametrize("name", ["squeezenet1_1", "inception_v3", "vit_b_32", "timm/deit_tiny_distilled_patch16_224"])
@pytest.mark.long
def test_weights_of_architectures_with_a_head_of_their_own_kind(name: str, tmp_path: Path) -> None:
    """A convolution as classifier, an auxiliary head, an image size of its own, two heads."""
    size = {"vit_b_32": 96, "inception_v3": 96}.get(name, 224)
    model = model_of(name, size)
    pixels = images.generated(3, size)
    files, _ = weights.write_weights(model, tmp_path, pixels)
    assert ("head.safetensors" in files) == (name == "squeezenet1_1")
    equality.require_equal(weights.runner(tmp_path, model.description), model, "normalised", pixels, "weights")


def test_weights_load_into_torchvision(tmp_path: Path) -> None:
    model = model_of("mobilenet_v3_small", 64, classes=tuple("abcd"))
    pixels = images.generated(3, 64)
    weights.write_weights(model, tmp_path, pixels)
    config = json.loads((tmp_path / "config.json").read_bytes())
    network = torchvision.models.get_model(config["architecture"], num_classes=config["num_classes"]).eval()
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    with torch.inference_mode():
        probabilities = network(torch.from_numpy(model.input_of(pixels, "normalised"))).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, model.probabilities(pixels), atol=1e-5)


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("shape", [(200, 333), (333, 200), (97, 64), (64, 97), (64, 64), (301, 64), (129, 131)])
def test_networks_resize_as_training_does(mode: str, shape: tuple[int, int]) -> None:
    size = 64
    model = model_of("timm/test_resnet", size, resize=mode).description
    model = msgspec.structs.replace(model, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    photograph = Image.open(io.BytesIO(picture(COLOURS["red"], 3, size=(shape[1] // 2, shape[0] // 2))))
    pixels = np.asarray(photograph.resize(shape[::-1], Image.Resampling.BICUBIC))
    expected = resize(torch.from_numpy(pixels.copy()).permute(2, 0, 1), size, model.resize).float().numpy()
    graph = onnx_preprocessing.preprocessing_graph("image", model, 10)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    by_onnx = session.run(None, {"images": pixels[None]})[0][0]
    by_torch = TorchPreprocessing("image", size, mode, model.mean, model.std)(torch.from_numpy(pixels.copy())[None])
    for values in (by_onnx, by_torch[0].numpy()):
        assert np.abs(np.round(values) - expected).max() <= 1
        assert (np.round(values) != expected).mean() < 0.02


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_here(tmp_path_factory.mktemp("export"), model__hidden="[]", trainer__max_epochs=2)


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    result = run_here("export", run_dir, folder, "--format", FORMATS, "--max_int8_loss", 1)
    assert result.returncode == 0, result.output
    assert re.search(r"│ int8 +│", result.output)
    return folder


def test_export_lists_its_files_and_measurements(exported: Path, run_dir: Path) -> None:
    content = msgspec.json.decode((exported / "export.json").read_bytes(), type=ExportManifest)
    assert [entry.format for entry in content.formats] == FORMATS.split(",")
    present = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert {entry.path for entry in content.files} | {"export.json"} == present
    assert {path for entry in content.formats for path in entry.files} < present
    assert content.check.images == "run"
    assert content.model.checkpoint_sha256 == checkpoint.sha256(checkpoint.resolve(str(run_dir)))
    for entry in content.formats:
        assert entry.milliseconds > 0
        assert (entry.tolerance is None) == (entry.format == "int8")
        assert entry.tolerance is None or entry.difference <= entry.tolerance
    (small,) = (entry.quantization for entry in content.formats if entry.format == "int8")
    assert small is not None
    assert small.loss is not None
    assert small.calibration_images == 16
    assert small.validation_images == 4


def test_files_name_no_path_of_this_machine(exported: Path, run_dir: Path) -> None:
    for path in (each for each in exported.rglob("*") if each.is_file()):
        content = path.read_bytes()
        for private in (str(run_dir.parent), str(REPOSITORY), "site-packages"):
            assert private.encode() not in content, (path, private)


def test_onnx_has_labels_and_preprocessing(exported: Path, run_dir: Path) -> None:
    for name in ("model.onnx", "model.int8.onnx", "triton/model/1/model.onnx"):
        properties = {entry.key: entry.value for entry in onnx.load(str(exported / name)).metadata_props}
        assert json.loads(properties["classes"]) == ["blue", "red"]
        assert json.loads(properties["preprocessing"])["image_size"] == 32
        assert properties["calibration"] == "none"
        assert properties["checkpoint_sha256"] == checkpoint.sha256(checkpoint.resolve(str(run_dir)))
        assert "torch" in json.loads(properties["versions"])
        assert ("quantization" in properties) == ("int8" in name)


PROGRAMS = {
    "onnx": "import onnxruntime as o; run = lambda x: o.InferenceSession('model.onnx').run(None, {'images': x})[0]",
    "pt2": "import torch; m = torch.export.load('model.pt2').module(); run = lambda x: m(torch.from_numpy(x)).numpy()",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_files_run_without_this_package(name: str, exported: Path, run_dir: Path) -> None:
    content = picture(COLOURS["blue"], 77, (90, 50))
    (exported.parent / "image.jpg").write_bytes(content)
    program = (
        "import sys; sys.modules['job'] = None\n"
        "import json, numpy as np; from PIL import Image\n"
        "image = np.asarray(Image.open('../image.jpg').convert('RGB'))\n"
        f"{PROGRAMS[name]}\n"
        "print(json.dumps(run(np.stack([image] * 3)).tolist()))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=exported, capture_output=True, text=True, check=True)
    expected = list(load(str(run_dir), device="cpu").predict(content).probabilities.values())
    np.testing.assert_allclose(json.loads(result.stdout), [expected] * 3, atol=0.01)


def test_timm_loads_the_folder(exported: Path, run_dir: Path) -> None:
    network = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    assert network.pretrained_cfg["label_names"] == ["blue", "red"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(network.pretrained_cfg))
    content = picture(COLOURS["red"], 5)
    image = Image.open(io.BytesIO(content))
    with torch.inference_mode():
        probabilities = network(transform(image)[None]).softmax(1)[0].tolist()
    expected = list(load(str(run_dir), device="cpu").predict(content).probabilities.values())
    np.testing.assert_allclose(probabilities, expected, atol=0.01)
    plain = timm.create_model("test_resnet", num_classes=2)
    plain.load_state_dict(safetensors.torch.load_file(exported / "model.safetensors"))


def test_the_card_is_read_by_huggingface_hub(exported: Path, run_dir: Path) -> None:
    card = huggingface_hub.ModelCard.load(exported / "README.md")
    assert card.data.license == "unknown"
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    report = read_report(str(run_dir))
    (result,) = [each for each in card.data.eval_results if each.metric_type == "accuracy"]
    assert result.metric_value == round(report.metrics["val/accuracy"] or 0, 6)
    assert str(run_dir) not in card.content


HOSTILE = [
    "a|b",
    "c\nlicense: mit",
    "`d`",
    "---\nx: !!python/object:os.system",
    "<script>alert(1)</script>",
    "[e](x)",
    "é\u202e",
]


def test_names_of_classes_do_not_act_in_the_card(run_dir: Path) -> None:
    report = msgspec.structs.replace(read_report(str(run_dir)), classes=HOSTILE, images={"val|<b>\n# x": 1})
    model = msgspec.structs.replace(model_of("timm/test_resnet", 64).description, classes=HOSTILE)
    entry = FormatEntry("onnx", ["model.onnx"], "image", 1, 0.0, 1e-4, None, None, 1.0, 1.0)
    check = Check("run", 1, 1, "<b>|cpu\n", 1, 1.0, 1.0)
    text = model_card(ExportManifest(model, [entry], [], check, {}, ""), report)
    card = huggingface_hub.ModelCard(text)
    assert card.data.license == "unknown"
    table = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table if re.match(r"\| \d+ \|", line)} == {6}
    assert sum(bool(re.match(r"\| \d+ \|", line)) for line in table) == len(HOSTILE)
    assert not re.search(r"(?<!\\)<", card.text)
    assert "\u202e" not in text
    assert not [line for line in text.splitlines() if line.startswith("license: mit")]
    assert len(triton.labels(HOSTILE).splitlines()) == len(HOSTILE)


@pytest.mark.parametrize("text", ["", "\n", "   ", "x" * 10_000])
def test_escaped_text_is_one_bounded_line(text: str) -> None:
    result = markdown.escaped(text)
    assert result
    assert "\n" not in result
    assert len(result) <= 2 * markdown.MOST_CHARACTERS + 1


def test_int8_that_loses_too_much_is_refused(run_dir: Path, tmp_path: Path) -> None:
    model = model_of("timm/test_resnet", 32, classes=("blue", "red"))
    pixels = images.generated(8, 32)
    targets = np.eye(2, dtype=np.uint8)[model.probabilities(pixels).argmax(axis=1)]
    val = images.ImageSet(pixels, targets, has_labels=True)
    wrong = lambda batch: 1 - model.probabilities(torch.from_numpy(batch).permute(0, 3, 1, 2))  # noqa: E731
    with pytest.raises(ExportError, match=r"accuracy 0\.0000 on 8 validation images, where the checkpoint has 1\.0000"):
        int8.accuracy_loss(wrong, model, "resized", val, 1, 0.02)
    assert int8.accuracy_loss(wrong, model, "resized", val, 1, 1.0).loss == 1
    assert int8.accuracy_loss(wrong, model, "resized", None, 1, 0.02).loss is None


@pytest.mark.long
def test_int8_keeps_the_accuracy_on_digits(tmp_path: Path) -> None:
    from job.demo.digits import digit_images
    from job.demo.weights import BACKBONE, efficientnet_lite0

    files = {f"train/{key}": content for key, content in list(digit_images().items())[::3]}
    files |= {f"val/{key}": content for key, content in list(digit_images().items())[1::5]}
    data = write_files(tmp_path / "digits", files)
    (tmp_path / "lite0.safetensors").write_bytes(efficientnet_lite0())
    changes = {"model.backbone": BACKBONE, "model.weights": tmp_path / "lite0.safetensors", "model.hidden": "[64]"}
    arguments = [f"--{name}={value}" for name, value in changes.items()]
    fit = run_here(
        "fit", tmp_path / "run", f"--data.root={data}", *arguments, "--data.image_size=96", "--epochs=4", "--lr=0.01"
    )
    assert fit.returncode == 0, fit.output
    result = run_here("export", tmp_path / "run", tmp_path / "out", "--format=int8", threads=2)
    assert result.returncode == 0, result.output
    content = msgspec.json.decode((tmp_path / "out/export.json").read_bytes(), type=ExportManifest)
    assert content.formats[0].quantization is not None
    assert (content.formats[0].quantization.loss or 0) <= 0.02
    assert (content.formats[0].quantization.checkpoint or 0) > 0.8


def test_a_network_that_differs_is_refused() -> None:
    model = model_of("timm/test_resnet", 32)
    pixels = images.generated(4, 32)
    shifted = lambda batch: model.probabilities(torch.from_numpy(batch).permute(0, 3, 1, 2)) + 0.001  # noqa: E731
    with pytest.raises(ExportError, match=r"onnx network differs .* by 0\.001"):
        equality.require_equal(shifted, model, "resized", pixels, "onnx")
    files = [picture(COLOURS["red"], 1), picture(COLOURS["blue"], 2)]
    with pytest.raises(ExportError, match="--input resized"):
        equality.resize_difference(lambda batch: np.float32([[1, 0, 0]]), model, files)


def test_an_architecture_that_cannot_be_exported(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

    model = model_of("timm/test_resnet", 32)
    model.network.backbone = Branching()
    for export in (onnx_model.network_graph, lambda each: torch_program.write_program(each, "image", tmp_path / "x")):
        with pytest.raises(ExportError, match=r"timm/test_resnet cannot be exported .*--format weights"):
            export(model)


def test_a_folder_with_other_files_is_refused(exported: Path, run_dir: Path, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "out", {"notes.txt": b"mine"})
    result = run_here("export", run_dir, folder, "--format", "weights")
    assert result.returncode == 2
    assert "notes.txt" in result.output
    assert "--overwrite" in result.output
    result = run_here("export", run_dir, folder, "--format", "pt2", "--overwrite", "--input", "normalised")
    assert result.returncode == 0, result.output
    result = run_here("export", run_dir, folder, "--format", "weights", "--overwrite")
    assert result.returncode == 0, result.output
    names = {path.name for path in folder.iterdir()}
    assert names == {"notes.txt", "config.json", "model.safetensors", "labels.txt", "README.md", "export.json"}


def test_a_half_written_export_has_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = write_files(tmp_path / "local", {"a": b"a", "b": b"b"})
    entry = FormatEntry("onnx", ["a"], "image", 1, 0.0, 1e-4, None, None, 1.0, 1.0)
    model, check = model_of("timm/test_resnet", 32).description, Check("run", 1, 1, "", 1, 1.0, 1.0)
    content = ExportManifest(model, [entry], output.file_entries(local), check, {}, "")
    output.publish(local, content, str(tmp_path / "out"))
    assert (tmp_path / "out/export.json").exists()
    upload = storage.upload

    def failing(source: Path, uri: str) -> None:
        if uri.endswith("/b"):
            raise StorageOutage("no")
        upload(source, uri)

    monkeypatch.setattr(storage, "upload", failing)
    with pytest.raises(StorageOutage):
        output.publish(local, content, str(tmp_path / "out"))
    assert not (tmp_path / "out/export.json").exists()


@pytest.mark.parametrize("path", ["../victim", "/etc/victim", "a/../../victim", ".git/config", "a//b", "a\nb", "~/x"])
def test_an_earlier_manifest_names_no_file_outside(path: str, tmp_path: Path) -> None:
    write_files(tmp_path, {"victim": b"kept"})
    entry = {"path": path, "bytes": 1, "sha256": "0" * 64}
    write_files(tmp_path / "out", {"export.json": json.dumps({"files": [entry]}).encode()})
    local = write_files(tmp_path / "local", {"a": b"a"})
    model, check = model_of("timm/test_resnet", 32).description, Check("run", 1, 1, "", 1, 1.0, 1.0)
    content = ExportManifest(model, [], [FileEntry("a", 1, "0" * 64)], check, {}, "")
    with pytest.raises(CheckpointError, match="damaged"):
        output.publish(local, content, str(tmp_path / "out"))
    assert (tmp_path / "victim").read_bytes() == b"kept"


def test_images_of_another_place(run_dir: Path, tmp_path: Path) -> None:
    colours = picture_files(["blue", "red"], 3)
    files = {f"{part}/{key}": content for part in ("train", "val") for key, content in colours.items()}
    data = write_files(tmp_path / "data", files)
    result = run_here("export", run_dir, tmp_path / "out", "--format=pt2", "--data", data, "--input=resized")
    assert result.returncode == 0, result.output
    assert "images of --data" in result.output
    best = checkpoint.resolve(str(run_dir))
    (tmp_path / "alone.ckpt").write_bytes(Path(best).read_bytes())
    result = run_here("export", "--ckpt", tmp_path / "alone.ckpt", "--output", tmp_path / "out2", "--format=weights")
    assert result.returncode == 0, result.output
    assert "generated images" in result.output
    result = run_here("export", "--ckpt", tmp_path / "alone.ckpt", "--output", tmp_path / "out3", "--format=int8")
    assert result.returncode == 2
    assert "Give --data" in result.output
    assert not (tmp_path / "out3").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx,tflite"], "'tflite' is unknown"),
        (["--format", ","], "names no format"),
        (["--max_images", "0"], "--max_images must be at least 1"),
        (["--max_int8_loss", "1.5"], "--max_int8_loss must be between 0 and 1"),
        (["--push", "no-owner"], "OWNER/NAME"),
        (["--input", "bgr"], "--input"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, run_dir: Path, tmp_path: Path) -> None:
    result = run_here("export", run_dir, tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    result = run_here("export", run_dir, tmp_path / "out")
    assert result.returncode == 2
    assert 'needs onnxscript. Install them: pip install ".[export]"' in result.output
    assert parse_formats(["pt2", "weights,onnx"]) == ("onnx", "pt2", "weights")


TOKEN = "hf_" + "aB3" * 12


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, bytes]]]:
    """A stand-in for the Hub's API; yields (path, Authorization, body) of the requests."""
    requests: list[tuple[str, str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            requests.append((self.path, self.headers.get("Authorization", ""), body))
            status, answer = 200, {}
            if self.path == "/api/repos/create":
                name = json.loads(body)["name"]
                status = {"denied": 403, "broken": 500}.get(name, 200)
                answer = {"url": f"{url}/me/{name}", "error": f"no access with {TOKEN}"}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            elif "/commit/" in self.path:
                answer = {"commitUrl": f"{url}/me/model/commit/abc", "commitOid": "abc", "success": True}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_is_one_commit_without_a_token_in_the_output(
    hugging_face: list[tuple[str, str, bytes]], run_dir: Path, tmp_path: Path
) -> None:
    arguments = ("--format=weights", "--push", "me/model")
    result = run_here("export", run_dir, tmp_path / "out", *arguments)
    assert result.returncode == 0, result.output
    assert "/me/model/commit/abc" in result.output
    assert TOKEN not in result.output
    assert {authorization for _, authorization, _ in hugging_face} == {f"Bearer {TOKEN}"}
    created = json.loads(next(body for path, _, body in hugging_face if path == "/api/repos/create"))
    assert created["visibility"] == "private"
    (commit,) = (body for path, _, body in hugging_face if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    paths = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert paths == {path.name for path in (tmp_path / "out").iterdir()}
    assert "export.json" in paths


@pytest.mark.parametrize(("name", "kind"), [("denied", StorageError), ("broken", StorageOutage)])
def test_push_reports_what_the_hub_answers(
    name: str, kind: type[StorageError], hugging_face: list[tuple[str, str, bytes]], tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        hub.push(write_files(tmp_path, {"a": b""}), f"me/{name}")
    assert type(caught.value) is kind
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("name", ["model", "a/b/c", "../x/y", "a/b c", "https://huggingface.co/a/b", "a/", "a/b--c"])
def test_wrong_names_of_repositories(name: str) -> None:
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        hub.require_repository_name(name)
