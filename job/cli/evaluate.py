"""``python -m job validate`` and ``python -m job test``."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from typing import Literal

import yaml

from job import checkpoint, redact, storage
from job.check.start import check_evaluation
from job.checkpoint import confusion
from job.cli.arguments import canonical_arguments, option_value
from job.cli.parser import CONFIG_VARIABLE, ENV_PREFIX
from job.cli.training import TrainingCLI
from job.cluster import ranks
from job.config.run_config import FILE as CONFIG_FILE
from job.config.saved_config import read_saved_config
from job.errors import StorageError
from job.model.module import TransferLearningModel
from job.process.terminal import print_table
from job.storage.json_files import write_json
from job.train.errors import translate_errors
from job.train.trainer import evaluating_trainer

log = logging.getLogger("job")

EVALUATION_TIMEOUT = 1200.0
"""Timeout of collectives in validate, test and tune, in seconds."""


def validate(args: list[str]) -> None:
    """Run ``python -m job validate ARGS``: evaluate a checkpoint on the validation images."""
    _evaluate(args, "validate")


def test(args: list[str]) -> None:
    """Run ``python -m job test ARGS``: evaluate a checkpoint on the test images."""
    _evaluate(args, "test")


def _evaluate(args: list[str], verb: Literal["validate", "test"]) -> None:
    with with_saved_config(args) as configured:
        cli = TrainingCLI(verb, configured)
    options = cli.config_init
    model = TransferLearningModel(tta=options["tta"], pretrained=False, **vars(cli.model_config))
    with ranks.process_group(EVALUATION_TIMEOUT):
        uri = ranks.from_rank_zero(lambda: checkpoint.resolve(options["ckpt"] or options["run_dir"]))
        with translate_errors(cli.datamodule.global_batch_size):
            trainer = evaluating_trainer(dict(options["trainer"]), options["run_dir"])
            results = getattr(trainer, verb)(model, datamodule=cli.datamodule, ckpt_path=uri, verbose=False)
        if trainer.is_global_zero:
            rows = [(name, f"{value:.4f}") for name, value in results[0].items()]
            print_table(["metric", "value"], rows, title=f"{verb} {uri}", right=["value"])
            assert model.evaluation is not None  # each evaluation ends with one
            counts = confusion.as_json(model.evaluation.confusion, len(cli.datamodule.classes))
            write_json(
                storage.join(options["run_dir"], f"{verb}.json"),
                {"ckpt": redact.redact(uri), "metrics": results[0], "confusion_matrix": counts},
            )


def check(verb: str, args: list[str], *, writes: bool) -> None:
    """Check the options of ``python -m job validate ARGS``, or of ``test``, its checkpoint, and access to its data."""
    with with_saved_config(args) as configured:
        cli = TrainingCLI(verb, configured)
    options = cli.config_init
    check_evaluation(cli.datamodule, options["ckpt"] or options["run_dir"], options["run_dir"], writes=writes)


@contextlib.contextmanager
def with_saved_config(args: list[str], *, trains: bool = False) -> Iterator[list[str]]:
    """Prepend the configuration saved in run_dir to the arguments, unless the user names one.

    Args:
        args: arguments of a command.
        trains: use the saved ``model.weights``, too, and log that ``data.augment`` is not used.
    """
    canonical = canonical_arguments(args, options=("run_dir", "config", "help-all"), positional=("run_dir",))
    run_dir = option_value(canonical, "run_dir") or os.environ.get(f"{ENV_PREFIX}_RUN_DIR")
    config, variable = option_value(canonical, "config"), os.environ.get(CONFIG_VARIABLE)
    if "--help-all" in canonical:
        yield args
        return
    if config is not None or variable is not None:
        if run_dir is not None and _may_have_saved_config(run_dir):
            source = f"--config {config}" if config is not None else f"{CONFIG_VARIABLE}={variable}"
            log.info("%s is used, not the configuration saved in run_dir", source)
        yield args
        return
    saved = None if run_dir is None else read_saved_config(run_dir, trains=trains)
    if saved is None:
        yield args
        return
    with tempfile.NamedTemporaryFile("w", prefix="job-config-", suffix=".yaml") as file:
        yaml.safe_dump(saved, file)
        file.flush()
        yield ["--config", file.name, *args]


def _may_have_saved_config(run_dir: str) -> bool:
    """Whether there is a configuration in ``run_dir``, or this cannot be found out."""
    try:
        return storage.exists(storage.join(run_dir, CONFIG_FILE))
    except StorageError:
        return True
