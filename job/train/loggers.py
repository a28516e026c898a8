"""Additional loggers, ``--trainer.logger``, beside that of TensorBoard."""

from __future__ import annotations

import hashlib
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from job import redact, storage
from job.config.trainer_options import listed
from job.errors import ConfigError, first_line

log = logging.getLogger(__name__)

PACKAGES = {
    "wandb": "wandb",
    "WandbLogger": "wandb",
    "mlflow": "mlflow",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "LitLogger": "litlogger",
}
"""Module that a logger needs, by its short name or class."""
SECRETS = frozenset(["api_key", "password", "token"])
"""Arguments that would be saved in config.yaml."""
FOLDER = "lightning_logs"
"""Local folder of the loggers of a run whose run_dir is in a bucket; Lightning's own name."""


class TolerantLogger(Logger):
    """A logger whose failure does not end the training: a warning says that it is switched off.

    What it logs is a copy of what TensorBoard and the report have.

    Args:
        inner: the logger.
    """

    def __init__(self, inner: Logger) -> None:
        super().__init__()
        self.inner = inner
        self._failed = False

    @property
    def name(self) -> str | None:
        """The name that the logger gives to the experiment."""
        return self.inner.name

    @property
    def version(self) -> int | str | None:
        """The version that the logger gives to the run."""
        return self.inner.version

    @property
    def save_dir(self) -> str | None:
        """Local folder of the logger."""
        return self.inner.save_dir

    @property
    def experiment(self) -> Any:
        """The logger's own object; None once it has failed."""
        return self._try(lambda: self.inner.experiment)  # type: ignore[attr-defined]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics."""
        self._try(self.inner.log_metrics, metrics, step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log hyperparameters."""
        self._try(self.inner.log_hyperparams, params, *args, **kwargs)

    def save(self) -> None:
        """Write what is waiting."""
        self._try(self.inner.save)

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """Tell of a checkpoint."""
        self._try(self.inner.after_save_checkpoint, checkpoint_callback)

    def finalize(self, status: str) -> None:
        """Close the logger.

        W&B ends its run by :mod:`atexit`, without which a process that has failed or was stopped ends.
        """
        self._try(self.inner.finalize, status)
        if isinstance(self.inner, WandbLogger) and status != "success":
            self._try(lambda: self.inner.experiment.finish(exit_code=1))  # type: ignore[attr-defined]

    def _try(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._failed:
            return None
        try:
            return method(*args, **kwargs)
        except Exception as error:
            self._failed = True
            kind = type(self.inner).__name__
            log.warning("%s failed and is switched off; training goes on: %s", kind, first_line(error))
            return None


def require_installed(chosen: Any) -> None:
    """Check the value of --trainer.logger before the classes that it names are created.

    Raises:
        ConfigError: a package is missing; the message names the command that installs it. Or the configuration would
            save a secret.
    """
    for name, arguments in _named(chosen):
        module = PACKAGES.get(name)
        if module is not None and find_spec(module) is None:
            package = module.replace("_", "-")
            raise ConfigError(f"--trainer.logger {name} needs the package {package}: pip install {package}")
        if secret := next((key for key in arguments if key in SECRETS and arguments[key] is not None), None):
            raise ConfigError(
                f"--trainer.logger.{secret} would be saved in config.yaml. Give it by the logger's own environment "
                "variable or login command."
            )


def additional_loggers(chosen: Any, run_dir: str) -> list[Logger]:
    """The loggers that --trainer.logger names.

    Args:
        chosen: a short name or a Logger, or a list of them, or None.
        run_dir: folder of the run.

    Raises:
        ConfigError: there is no local folder to write to, or a logger is one of TensorBoard.
    """
    loggers: list[Logger] = []
    for each in listed(chosen):
        logger = _logger(each, run_dir) if isinstance(each, str) else each
        if isinstance(logger, TensorBoardLogger) or type(logger).__module__.startswith("job."):
            raise ConfigError(
                f"--trainer.logger: {type(logger).__name__} is not supported: TensorBoard's events are always written, "
                "to run_dir/tensorboard. Leave it out."
            )
        loggers.append(TolerantLogger(logger))
    return loggers


def _logger(name: str, run_dir: str) -> Logger:
    folder, run = _folder(name, run_dir), storage.basename(run_dir) or "run"
    if name == "csv":  # each attempt has a folder of its own: Lightning's logger deletes what it finds
        return CSVLogger(save_dir=folder, name="csv")
    if name == "wandb":
        offline = os.environ.get("WANDB_MODE", "offline") != "online"
        run_id = hashlib.sha256(redact.identity(run_dir).encode()).hexdigest()[:16]  # of all attempts
        return WandbLogger(name=run, save_dir=folder, id=run_id, offline=offline)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{folder}/mlruns"
    return MLFlowLogger(experiment_name="job", run_name=run, tracking_uri=uri)


def _folder(name: str, run_dir: str) -> str:
    """run_dir if it is local, else a folder below the working directory."""
    if storage.is_local(run_dir):
        return str(storage.filesystem(run_dir)[1])
    folder = Path(FOLDER, storage.basename(run_dir)).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--trainer.logger {name} writes to a local folder, and {folder} cannot be created: {error.strerror}. Name "
            "the class of the logger with its save_dir instead."
        ) from error
    log.info("--trainer.logger %s writes to %s: it cannot write to a bucket", name, folder)
    return str(folder)


def _named(chosen: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Short name or class of each logger of a parsed configuration, with its arguments."""
    for each in listed(chosen):
        if isinstance(each, str):
            yield each, {}
        elif isinstance(path := getattr(each, "class_path", None), str):
            arguments = getattr(each, "init_args", None)
            yield path.rpartition(".")[2], vars(arguments) if arguments is not None else {}
