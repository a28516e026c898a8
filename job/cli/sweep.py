"""``python -m job sweep``: train many heads of a frozen backbone at once, and keep the best."""

from __future__ import annotations

import inspect
from typing import Any

import yaml

from job.cli.arguments import aliases_of, canonical_arguments
from job.cli.evaluate import EVALUATION_TIMEOUT, with_saved_config
from job.cli.known_options import option_names
from job.cli.training import TrainingCLI
from job.cluster import ranks
from job.data.datamodule import ImageDataModule
from job.errors import ConfigError
from job.model.config import ModelConfig
from job.sweep.run import Sweep
from job.train.errors import translate_errors
from job.train.trainer import evaluating_trainer

INSTEAD = {
    "model.lr": "--sweep.lr",
    "model.hidden": "--sweep.hidden",
    "model.dropout": "--sweep.dropout",
    "model.label_smoothing": "--sweep.label_smoothing",
    "model.class_weights": "--sweep.class_weights",
    "model.optimizer": "--sweep.lr and --sweep.weight_decay, of AdamW",
    "model.lr_scheduler": "--sweep.lr, which falls to 0 along a cosine",
    "trainer.max_epochs": "--sweep.epochs",
}
"""Options of a fit, and those of a sweep that take their place."""
NO_EFFECT = ("model.mixup", "model.cutmix", "model.ema", "model.milestones", "model.train_bn", "init_from")
KEPT_MODEL_OPTIONS = ("task", "pooling", "mean", "std", "decay_norm_and_bias")
"""Options of the model that the recipe takes over, if they differ from their defaults."""
LEFT_OUT_DATA_OPTIONS = frozenset(["seed", "cache_dir", "allow", "global_batch_size"])
KEPT_TRAINER_OPTIONS = ("accelerator", "precision")


def sweep(args: list[str]) -> None:
    """Run ``python -m job sweep ARGS``."""
    _refuse_options_of_fit(args)
    with with_saved_config(args, trains=True) as configured:
        cli = TrainingCLI("sweep", configured)
    options = cli.config_init
    with ranks.process_group(EVALUATION_TIMEOUT), translate_errors(cli.datamodule.global_batch_size):
        trainer = evaluating_trainer(dict(options["trainer"]), options["run_dir"])
        changed = _changed_options(yaml.safe_load(cli.config_yaml()))
        Sweep(cli.model_config, cli.datamodule, options["sweep"], trainer, options["run_dir"], changed).run()


def _refuse_options_of_fit(args: list[str]) -> None:
    """Refuse options that a sweep sets itself.

    Raises:
        ConfigError: there is such an option.
    """
    names = option_names("sweep")
    for argument in canonical_arguments(args, options=names, aliases=aliases_of("sweep"), positional=("run_dir",)):
        name = argument.removeprefix("--").partition("=")[0]
        if instead := INSTEAD.get(name) or INSTEAD.get(".".join(name.split(".")[:2])):
            raise ConfigError(f"--{name} has no effect in a sweep. Use {instead}.")
        if name in NO_EFFECT:
            raise ConfigError(f"--{name} has no effect in a sweep, which trains heads of a frozen backbone.")


def _changed_options(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options that the recipe takes over: those that differ from their defaults."""
    data = {
        name: parameter.default
        for name, parameter in inspect.signature(ImageDataModule.__init__).parameters.items()
        if name != "self" and name not in LEFT_OUT_DATA_OPTIONS
    }
    model = {name: parameter.default for name, parameter in inspect.signature(ModelConfig).parameters.items()}
    return {
        "data": _changed(tree["data"], data),
        "model": _changed(tree["model"], {name: model[name] for name in KEPT_MODEL_OPTIONS}),
        "trainer": {
            name: tree["trainer"][name]
            for name in KEPT_TRAINER_OPTIONS
            if tree["trainer"].get(name) not in (None, "auto")
        },
    }


def _changed(section: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: section[name] for name, default in defaults.items() if name in section and section[name] != default}
