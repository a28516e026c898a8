"""The command line: ``python -m job {fit,validate,test,predict,demo}``."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from job import storage
from job.data.datamodule import ImageDataModule
from job.errors import EXIT_USER_ERROR, CheckpointError, ConfigError, JobError
from job.logging.tensorboard import BucketTensorBoardLogger
from job.model.module import TransferLearningModel
from job.train import checkpoint
from job.train.checkpoint import Checkpointer
from job.train.report import print_summary
from job.train.trainer import build_trainer

log = logging.getLogger("job")

ENV_PREFIX = "JOB"
CONFIGS = Path(__file__).parent / "configs"


class Parser(LightningArgumentParser):
    """jsonargparse's parser, whose errors suggest the nearest right option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, without a traceback, and exit with 2."""
        raise ConfigError(f"{message.strip()}{self._suggestion(message)}\nSee --help.")

    def _suggestion(self, message: str) -> str:
        known = [action.dest for action in self._actions]
        for wrong in re.findall(r"(?:--|[\"'])([A-Za-z_][\w.]*)", message):
            close = difflib.get_close_matches(wrong, [k for k in known if k != wrong], n=1, cutoff=0.75)
            if close and wrong not in known:
                return f"\nDid you mean --{close[0]}?"
        return ""


OURS = {
    "logger",
    "default_root_dir",
    "use_distributed_sampler",
    "num_sanity_val_steps",
    "enable_model_summary",
    "enable_checkpointing",
    "barebones",
    "model_registry",
    "enable_autolog_hparams",
}
"""Trainer arguments that the job itself decides."""


class TrainingCLI(LightningCLI):
    """The options of fit, validate and test; see ``--help``."""

    def __init__(self, verb: str, args: list[str]) -> None:
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
            parser_class=Parser,
            parser_kwargs={"default_env": True, "env_prefix": ENV_PREFIX},
            trainer_defaults={"max_epochs": 15, "log_every_n_steps": 10},
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The Trainer's options, less those in :data:`OURS`, the model's and the data's."""
        parser.add_class_arguments(
            pl.Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True, skip=set(OURS)
        )
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(TransferLearningModel, "model")
        parser.add_lightning_class_args(ImageDataModule, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beside the Trainer's, the model's and the data's."""
        parser.add_argument(
            "--run_dir", type=str, required=True, help="Folder of all results: any fsspec URI, or a plain path."
        )
        if self.verb == "fit":
            parser.add_argument(
                "--resume",
                type=Literal["auto", "never", "must"],
                default="auto",
                help="Continue from the newest checkpoint in run_dir: if there is one (auto), else fail (must), or "
                "refuse a run_dir that has one (never).",
            )
        else:
            parser.add_argument(
                "--ckpt",
                type=str | None,
                default=None,
                help="A checkpoint file, RUN_DIR/checkpoints/last, or a run_dir, which means its best. Default: the "
                "best in run_dir.",
            )
        parser.add_lightning_class_args(Checkpointer, "checkpoint")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Nothing yet: the trainer needs to know where the run resumes."""
        return None  # type: ignore[return-value]

    def trainer_for(self, logger: BucketTensorBoardLogger | None) -> pl.Trainer:
        """The Trainer, with the logger of this start, if it logs."""
        settings = dict(self.config_init["trainer"])
        return build_trainer(settings, [self.config_init["checkpoint"]], self.config["run_dir"], logger)

    def config_yaml(self) -> str:
        """The resolved configuration, as ``--config`` of any verb takes it: how to resume is no part of it."""
        config = self.config.clone()
        config.pop("resume", None)
        text: str = self.parser.dump(config, skip_none=False, skip_validation=True)
        return text


def fit(args: list[str]) -> None:
    """Train, or continue training, a model into run_dir."""
    cli = TrainingCLI("fit", args)
    run_dir = cli.config["run_dir"]
    resumed = _resume_point(run_dir, cli.config["resume"])
    logger = BucketTensorBoardLogger(
        storage.join(run_dir, "tensorboard"), purge_step=resumed[1].global_step if resumed else 0
    )
    trainer = cli.trainer_for(logger)
    if trainer.is_global_zero:
        _save_config(run_dir, cli.config_yaml())
        if resumed:
            log.info("resuming after epoch %d, step %d, from %s", resumed[1].epoch, resumed[1].global_step, resumed[0])
    trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resumed[0] if resumed else None)
    if trainer.is_global_zero:
        print_summary(run_dir)


def validate(args: list[str]) -> None:
    """Measure a checkpoint on the validation part."""
    _evaluate(args, "validate")


def test(args: list[str]) -> None:
    """Measure a checkpoint on the test part."""
    _evaluate(args, "test")


def predict(args: list[str]) -> None:
    """Classify images with a checkpoint."""
    from job.predict import main as predict_main

    _function_parser(predict_main, args)


def demo(args: list[str]) -> None:
    """Run the whole job on this machine, with a bucket of its own."""
    from job.demo import main as demo_main

    _function_parser(demo_main, args)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "fit": fit,
    "validate": validate,
    "test": test,
    "predict": predict,
    "demo": demo,
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb; on a user's mistake print one message and exit with 2."""
    args = sys.argv[1:] if argv is None else argv
    _set_up_logging()
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if args else EXIT_USER_ERROR)
    # LightningCLI looks at sys.argv, and would warn of arguments given to it besides.
    sys.argv = [sys.argv[0]]
    try:
        if args[0] not in VERBS:
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown command {args[0]!r}.{hint}\n{_usage()}")
        VERBS[args[0]](args[1:])
    except JobError as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"job: error{rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)


def _usage() -> str:
    lines = [f"  {name:<10}{verb.__doc__}" for name, verb in VERBS.items()]
    return "usage: python -m job COMMAND [options]\n\n" + "\n".join(lines) + "\n\npython -m job COMMAND --help"


def _function_parser(function: Callable[..., None], args: list[str]) -> None:
    """Call ``function`` with its parameters as options."""
    parser = Parser(default_env=True, env_prefix=ENV_PREFIX, description=(function.__doc__ or "").split("\n")[0])
    parser.add_function_arguments(function)
    function(**parser.parse_args(args).as_dict())


def _resume_point(run_dir: str, resume: str) -> tuple[str, checkpoint.Manifest] | None:
    if resume == "never":
        if found := checkpoint.manifests(run_dir):
            raise ConfigError(
                f"{run_dir} holds {len(found)} checkpoint(s) of an earlier run, and --resume is never. "
                "Choose another --run_dir, or --resume=auto."
            )
        return None
    found_newest = checkpoint.newest_trusted(run_dir)
    if found_newest is None and resume == "must":
        raise CheckpointError(f"--resume is must, but {run_dir} holds no checkpoint.")
    return found_newest


def _save_config(run_dir: str, text: str) -> None:
    """Write config.yaml; an earlier one that differs is kept beside it, and the difference told."""
    uri = storage.join(run_dir, "config.yaml")
    if storage.exists(uri):
        before = storage.read_bytes(uri).decode()
        old, new = _flatten(yaml.safe_load(before)), _flatten(yaml.safe_load(text))
        changed = [f"{k}: {old.get(k)} → {new.get(k)}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        if changed:
            log.warning("settings changed since the last start: %s", "; ".join(changed))
            number = 1
            while storage.exists(kept := storage.join(run_dir, f"config.{number}.yaml")):
                number += 1
            storage.write_text(kept, before)
    storage.write_text(uri, text)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{name}".strip(".")).items()}


def _evaluate(args: list[str], verb: Literal["validate", "test"]) -> None:
    cli = TrainingCLI(verb, _with_saved_config(args))
    uri = checkpoint.resolve(cli.config["ckpt"] or cli.config["run_dir"])
    # The checkpoint brings the weights: pretrained ones would be fetched in vain.
    cli.model.weights = "none"
    trainer = cli.trainer_for(logger=None)
    results = getattr(trainer, verb)(cli.model, datamodule=cli.datamodule, ckpt_path=uri, verbose=False)
    if trainer.is_global_zero:
        table = Table(title=f"{verb} {uri}", title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in results[0].items():
            table.add_row(name, f"{value:.4f}")
        Console(soft_wrap=True).print(table)
        report = {"ckpt": uri, "metrics": results[0], "confusion_matrix": cli.model.confusion}
        storage.write_text(storage.join(cli.config["run_dir"], f"{verb}.json"), json.dumps(report, indent=2))


def _with_saved_config(args: list[str]) -> list[str]:
    """Put run_dir's own config.yaml before the arguments, unless they name one."""
    if any(arg.split("=")[0] in ("-c", "--config", "-h", "--help") for arg in args):
        return args
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--run_dir", default=os.environ.get(f"{ENV_PREFIX}_RUN_DIR"))
    run_dir = finder.parse_known_args(args)[0].run_dir
    if run_dir is None or not storage.exists(storage.join(run_dir, "config.yaml")):
        return args
    return ["--config", storage.join(run_dir, "config.yaml"), *args]


def _set_up_logging() -> None:
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(
        format=f"%(asctime)s {'' if rank == 0 else f'[rank {rank}] '}%(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if rank == 0 else logging.WARNING,
        stream=sys.stderr,
        force=True,
    )
    for name in ("httpx", "fsspec", "gcsfs", "google", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Values logged at validation come from synchronised metrics: they agree on all ranks already.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    # The frozen backbone is in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
    jsonargparse.set_parsing_settings(config_read_mode_fsspec_enabled=True)
