from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from support import TINY, options, picture_files, run_here, scalars, write_files

from job import checkpoint, predict, storage
from job.data.datamodule import ImageDataModule
from job.errors import CheckpointError
from job.model.classifier import build_classifier
from job.model.config import ModelConfig
from job.model.loading import read_pretrained
from job.model.module import TransferLearningModel
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger

ONE_EPOCH = {"trainer.max_epochs": 1, "data.num_workers": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("trained")
    root = write_files(folder / "two", picture_files(["blue", "red"], 12))
    run_dir, cache = str(folder / "run"), str(folder / "cache")
    settings = {**TINY, **ONE_EPOCH, "data.root": root, "data.cache_dir": cache, "model.mean": "[0.4,0.4,0.4]"}
    outcome = run_here("fit", *options({**settings, "run_dir": run_dir}))
    assert outcome.returncode == 0, outcome.output
    return {"root": str(root), "run_dir": run_dir, "folder": str(folder), "cache": cache}


def test_a_module_is_loaded_from_a_checkpoint(trained: dict[str, str]) -> None:
    uri = checkpoint.resolve(trained["run_dir"])
    for path in (uri, Path(uri), trained["run_dir"]):
        module = TransferLearningModel.load_from_checkpoint(path).eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    predictor = predict.load(uri)
    with torch.no_grad():
        assert torch.equal(module(images), predictor.net(images))
    assert module.net.classes == ("blue", "red")


def test_hyperparameters_are_plain_values(trained: dict[str, str]) -> None:
    saved = torch.load(checkpoint.resolve(trained["run_dir"]), weights_only=True)
    assert saved["hyper_parameters"]["backbone"] == "timm/test_resnet"
    module = TransferLearningModel.load_from_checkpoint(trained["run_dir"], ema=0.5)
    assert module.hparams["milestones"] == [1, 2]
    assert module.hparams.hidden == [8]
    assert module.hparams.ema == module.config.ema == 0.5
    logger = BucketTensorBoardLogger(f"{trained['folder']}/events/tensorboard")
    logger.log_hyperparams(module.hparams)
    logger.log_metrics({"x": 1.0}, 0)
    logger.finalize("success")
    assert scalars(f"{trained['folder']}/events")["x"] == [(0, 1.0)]


def test_hyperparameters_have_no_credentials() -> None:
    module = TransferLearningModel(weights="s3://key:secret@bucket/w.pth?X-Goog-Signature=secret")
    assert module.hparams["weights"] == "s3://bucket/w.pth"


def test_a_restored_module_is_measured_by_any_trainer(trained: dict[str, str], tmp_path: Path) -> None:
    module = TransferLearningModel.load_from_checkpoint(trained["run_dir"])
    data = ImageDataModule(
        root=trained["root"], image_size=32, global_batch_size=8, num_workers=0, cache_dir=trained["cache"]
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet)  # type: ignore[arg-type]
    (results,) = trainer.validate(module, datamodule=data, verbose=False)
    assert 0 <= results["val/accuracy"] <= 1


def test_no_checkpoint_is_one_message(trained: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "w.ckpt").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "w.ckpt"):
        with pytest.raises(CheckpointError):
            TransferLearningModel.load_from_checkpoint(path)


@pytest.mark.parametrize(
    "damage", [{"milestones": "abc"}, {"ema": "x"}, {"self": 1}, {"hidden": 3, "label_smoothing": []}]
)
def test_damaged_hyperparameters_are_one_message(
    damage: dict[str, object], trained: dict[str, str], tmp_path: Path
) -> None:
    content = checkpoint.load(checkpoint.resolve(trained["run_dir"]))
    torch.save({**content, "hyper_parameters": damage}, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match="hyperparameters of"):
        TransferLearningModel.load_from_checkpoint(tmp_path / "w.ckpt")


@pytest.mark.parametrize("which", ["", "/checkpoints/last"])
def test_a_run_starts_from_the_backbone_of_another_run(which: str, trained: dict[str, str], tmp_path: Path) -> None:
    root = write_files(tmp_path / "three", picture_files(["blue", "green", "red"], 8))
    settings = {**TINY, **ONE_EPOCH, "data.root": root, "data.cache_dir": trained["cache"], "run_dir": tmp_path / "run"}
    settings |= {"model.weights": trained["run_dir"] + which, "model.milestones": "[9]"}
    outcome = run_here("fit", *options(settings))
    assert outcome.returncode == 0, outcome.output
    assert "without the prefix net.backbone." in outcome.output
    first, second = predict.load(trained["run_dir"]).net, predict.load(str(tmp_path / "run")).net
    weight = "layer1.0.conv1.weight"
    assert torch.equal(first.backbone.get_parameter(weight), second.backbone.get_parameter(weight))
    assert torch.equal(first.mean, second.mean)
    validated = run_here("validate", f"--run_dir={tmp_path / 'run'}")
    assert validated.returncode == 0, validated.output


def test_a_run_dir_of_pretrained_weights_is_read_once(trained: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For the weights and for their normalisation."""
    read_uris, read_bytes = list[str](), storage.read_bytes

    def counted(uri: str) -> bytes:
        read_uris.append(uri)
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", counted)
    config, weights = ModelConfig(backbone="timm/test_resnet"), read_pretrained(trained["run_dir"])
    net = build_classifier(config, weights, classes="ab", image_size=32, device_type="cpu")
    assert net.mean.flatten().tolist() == pytest.approx([0.4, 0.4, 0.4])
    assert [uri for uri in read_uris if uri.endswith(".ckpt")] == [checkpoint.resolve(trained["run_dir"])]


def test_lr_is_the_optimizers_learning_rate(trained: dict[str, str], tmp_path: Path) -> None:
    settings = {**TINY, **ONE_EPOCH, "data.root": trained["root"], "data.cache_dir": trained["cache"]}
    settings |= {"run_dir": tmp_path / "run"}
    assert run_here("fit", *options({**settings, "model.lr": 0.25})).returncode == 0
    saved = torch.load(checkpoint.resolve(str(tmp_path / "run")), weights_only=True)
    assert saved["hyper_parameters"]["lr"] == 0.25
    assert saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.25
    same = run_here("fit", *options({**settings, "trainer.max_epochs": 2}), "--model.optimizer.lr=0.25")
    assert same.returncode == 0, same.output
    other = run_here("fit", *options({**settings, "trainer.max_epochs": 3, "model.lr": 0.5}))
    assert other.returncode == 2
    assert "'lr': 0.25" in other.output
    assert "'lr': 0.5" in other.output


def test_networks_with_versioned_layers_resume(trained: dict[str, str], tmp_path: Path) -> None:
    settings = {**TINY, **ONE_EPOCH, "data.root": trained["root"], "data.cache_dir": trained["cache"]}
    settings |= {"model.backbone": "mnasnet0_5", "run_dir": tmp_path / "run"}
    for epochs in (1, 2):
        outcome = run_here("fit", *options({**settings, "trainer.max_epochs": epochs}))
        assert outcome.returncode == 0, outcome.output
    assert predict.load(str(tmp_path / "run")).classes == ("blue", "red")


def test_a_damaged_checkpoint_is_one_message(trained: dict[str, str], tmp_path: Path) -> None:
    content = checkpoint.load(checkpoint.resolve(trained["run_dir"]))
    damage = {"shape": content["state_dict"] | {"net.head.0.weight": torch.ones(3)}, "name": {}}
    for name, state in damage.items():
        torch.save({**content, "state_dict": state}, tmp_path / f"{name}.ckpt")
    torch.save({**content, "classifier": {**content["classifier"], "image_size": 10**6}}, tmp_path / "size.ckpt")
    for name in ("shape", "name", "size"):
        for verb in ("validate", "predict"):
            where = {"run_dir": trained["run_dir"]} if verb == "validate" else {"input": trained["root"]}
            outcome = run_here(verb, *options({**where, "ckpt": tmp_path / f"{name}.ckpt"}))
            assert outcome.returncode == 2, outcome.output
            assert "Traceback" not in outcome.output
