"""Options of the commands that build a Trainer: fit, check, tune, validate, test, sweep and audit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

from jsonargparse.typing import PositiveFloat
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from job import checkpoint, storage
from job.audit.settings import AuditSettings
from job.checkpoint.resume import Resume
from job.checkpoint.settings import CheckpointSettings
from job.cli.arguments import FIT_COMMANDS, aliases_of
from job.cli.parser import ENV_PREFIX, ParserMixin
from job.config.reserved import RESERVED, reserved_error
from job.config.run_config import FILE as CONFIG_FILE
from job.config.run_config import read_mapping
from job.config.trainer_options import (
    add_trainer_arguments,
    list_supported_classes,
    require_seed,
    require_supported,
)
from job.data.datamodule import ImageDataModule
from job.errors import ConfigError
from job.features.callback import FeatureSettings
from job.model.config import ModelConfig
from job.model.image_size import own_image_size
from job.model.module import TransferLearningModel
from job.monitoring.settings import MonitoringSettings
from job.resilience.watchdog import WatchdogSettings
from job.sweep.trials import SweepSettings
from job.train.fit import FitSettings
from job.train.loggers import require_installed
from job.train.lr_finder import LRFinder


class TrainingParser(ParserMixin, LightningArgumentParser):
    """The parser of commands that build a Trainer; ``--help`` is :mod:`job.cli.help`'s."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--help-all", action="help", help="Show all options and exit.")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message; arguments of the Trainer that this package sets are named as such.

        Raises:
            ConfigError: always.
        """
        for name in re.findall(r"--trainer\.(\w+)", message):
            if name in RESERVED:
                raise reserved_error(name)
        super().error(message, ex)


class TrainingCLI(LightningCLI):
    """Options of fit, check, tune, validate, test, sweep and audit; see ``--help-all``.

    Attributes:
        config_init: the options, with instances of the classes that they name.
        datamodule: the data module.
        model_config: hyperparameters of the model.
    """

    def __init__(self, verb: str, args: list[str] | dict[str, Any]) -> None:
        self.verb = verb
        super().__init__(
            TransferLearningModel,
            ImageDataModule,
            args=args,
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=TrainingParser,
            parser_kwargs={
                "default_env": True,
                "env_prefix": ENV_PREFIX,
                "prog": f"python -m job {verb}",
                "usage": f"python -m job {verb} RUN_DIR [options]",
                "description": f"All options of {verb}.",
                "aliases": aliases_of(verb),
                "positional": ("run_dir",),
            },
            trainer_defaults={"max_epochs": 15, "log_every_n_steps": 10},
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed, a number: a random one would differ between starts and ranks."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="Seed of sample order, augmentation and the head's initial weights.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of Trainer (except reserved ones), model and data."""
        add_trainer_arguments(parser)
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        parser.add_class_arguments(
            TransferLearningModel,
            "model",
            fail_untyped=False,
            instantiate=False,
            sub_configs=True,
            skip={"tta", "pretrained", "init_from", "check_finite"},
        )
        parser.add_lightning_class_args(ImageDataModule, "data")
        list_supported_classes(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the other options."""
        parser.add_argument(
            "--run_dir", type=str, required=True, help="Folder of all results: an fsspec URI or a path."
        )
        if self.verb == "check":
            parser.add_argument("--json", action="store_true", help="Print the report as JSON.")
            parser.add_argument(
                "--price_per_hour",
                type=PositiveFloat | None,
                default=None,
                help="Price of all machines of the run per hour, in any currency. Default: no estimate of the price.",
            )
        if self.verb in FIT_COMMANDS:
            parser.add_argument(
                "--resume",
                type=Resume,
                default="auto",
                help="Resume from the newest checkpoint in run_dir: auto resumes if there is one, must fails if there "
                "is none, never fails if there is one. best goes back to the best checkpoint and abandons later ones, "
                "once: a restart with the same options continues from the newest since.",
            )
            parser.add_argument(
                "--grace",
                type=PositiveFloat,
                default=25.0,
                help="Seconds to save and exit after a signal (SIGTERM, SIGUSR1, Ctrl-C, SIGHUP). GKE Spot allows "
                "about 30 s in total, and torch elastic kills ranks 30 s after a SIGTERM.",
            )
            parser.add_argument(
                "--profile",
                action="store_true",
                help="Record ten steps with torch.profiler to run_dir/profile, and print a summary.",
            )
            parser.add_class_arguments(WatchdogSettings, "watchdog")
            parser.add_class_arguments(FeatureSettings, "features", sub_configs=True)
            parser.add_class_arguments(MonitoringSettings, "monitoring", sub_configs=True)
        elif self.verb == "sweep":
            parser.add_class_arguments(SweepSettings, "sweep", sub_configs=True)
        elif self.verb == "audit":
            parser.add_class_arguments(AuditSettings, "audit", sub_configs=True)
            parser.add_argument(
                "--ckpt",
                type=str | None,
                default=None,
                help="A checkpoint file, RUN_DIR/checkpoints/last, or a run_dir (its best checkpoint), whose backbone "
                "computes the features. Default: --model.backbone with its pretrained weights.",
            )
        elif self.verb == "tune":
            parser.add_lightning_class_args(LRFinder, "lr_finder")
        else:
            parser.add_argument(
                "--ckpt",
                type=str | None,
                default=None,
                help="A checkpoint file, RUN_DIR/checkpoints/last, or a run_dir (its best checkpoint). Default: the "
                "best checkpoint in run_dir.",
            )
            parser.add_argument(
                "--tta",
                type=Literal["none", "hflip"],
                default="none",
                help="Test-time augmentation: hflip averages predictions over horizontal flips.",
            )
        parser.add_class_arguments(CheckpointSettings, "checkpoint", sub_configs=True)
        parser.add_argument(
            "--early_stopping",
            type=int,
            default=0,
            help="Stop a fit after this many validations in a row without a better --checkpoint.monitor. 0 disables.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Start a new run from the weights of another one, with its head as far as classes agree: a run_dir "
            "(its best checkpoint), RUN_DIR/checkpoints/last or a checkpoint file. Only fit and tune use it.",
        )
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the options, and check the seed."""
        self.config = parser.parse_object(args) if isinstance(args, Mapping) else parser.parse_args(args)
        require_seed(self.config["seed_everything"])

    def instantiate_classes(self) -> None:
        """Create the data module, and check the options of model and Trainer, which the command builds."""
        if self.verb not in FIT_COMMANDS:
            self.config["trainer"]["logger"] = None
        require_installed(self.config["trainer"]["logger"])
        if self.config["data"]["image_size"] == "auto":
            self.config["data"]["image_size"] = self._own_image_size()
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule: ImageDataModule = self.config_init["data"]
        self.model_config = ModelConfig(**dict(self.config_init["model"]))
        require_supported(self.config_init["trainer"])

    def _own_image_size(self) -> int:
        """The image size of the weights that the run starts with; of a run with checkpoints, the one that it has."""
        model = self.config["model"]
        backbones, weights = model["backbone"].split(","), model["weights"].split(",")
        if len(backbones) == 1:
            source = self.config["init_from"] or model["weights"]
            return _saved_image_size(self.config["run_dir"], model["backbone"]) or own_image_size(backbones[0], source)
        weights = weights if len(weights) == len(backbones) else weights[:1] * len(backbones)  # a sweep's
        pairs = zip(backbones, weights, strict=True)
        sizes = {name.strip(): own_image_size(name.strip(), uri.strip()) for name, uri in pairs}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(f"the image sizes of the backbones differ: {listed}. Give --data.image_size a number.")
        return next(iter(sizes.values()))

    def fit_settings(self) -> FitSettings:
        """The settings of fit besides model and data."""
        options = self.config_init
        names = (
            "run_dir",
            "resume",
            "grace",
            "profile",
            "checkpoint",
            "features",
            "watchdog",
            "monitoring",
            "early_stopping",
            "init_from",
        )
        return FitSettings(
            trainer=dict(options["trainer"]), config=self.config_yaml(), **{name: options[name] for name in names}
        )

    def config_yaml(self) -> str:
        """The resolved configuration, for ``--config``; per-attempt options are excluded."""
        config = self.config.clone()
        for name in ("resume", "grace", "profile", "watchdog", "features", "monitoring", "json", "price_per_hour"):
            config.pop(name, None)
        text: str = self.parser.dump(config, skip_none=False, skip_validation=True)
        return text


def _saved_image_size(run_dir: str, backbone: str) -> int | None:
    """The image size of a run with this backbone that has checkpoints: its weights need not exist any more."""
    uri = storage.join(run_dir, CONFIG_FILE)
    if not storage.exists(uri) or not checkpoint.scan(run_dir).good:
        return None
    saved = read_mapping(uri)
    model, data = saved.get("model"), saved.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict) or model.get("backbone") != backbone:
        return None
    size = data.get("image_size")
    return size if isinstance(size, int) and not isinstance(size, bool) else None
