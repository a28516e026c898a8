"""The command line: ``python -m job COMMAND``."""

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
from jsonargparse.typing import PositiveFloat
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from job import storage, temporary
from job.cluster import ranks
from job.data.datamodule import ImageDataModule
from job.errors import EXIT_USER_ERROR, CheckpointError, ConfigError, JobError, Preempted
from job.logging.tensorboard import BucketTensorBoardLogger, events_uri
from job.model.module import TransferLearningModel
from job.train import checkpoint
from job.train.batch_size_finder import BatchSizeFinder
from job.train.checkpointer import Checkpointer
from job.train.explanations import explained
from job.train.feature_cache import FeatureCache
from job.train.lease import Lease
from job.train.lr_finder import LRFinder
from job.train.preemption import Preemption
from job.train.report import print_findings, print_summary
from job.train.trainer import evaluating_trainer, training_trainer, tuning_trainer
from job.train.watchdog import Watchdog

log = logging.getLogger("job")

ENV_PREFIX = "JOB"
EVALUATION_TIMEOUT = 1200.0
"""Seconds that ranks wait for one another in validate and test."""
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
    "devices",
    "num_nodes",
    "max_steps",
    "min_steps",
    "fast_dev_run",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
}
"""Trainer arguments that the job itself decides, or that would break an exact resume."""


class TrainingCLI(LightningCLI):
    """The options of fit, tune, validate and test; see ``--help``."""

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
            parser_kwargs={"default_env": True, "env_prefix": ENV_PREFIX, "prog": f"python -m job {verb}"},
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
            parser.add_argument(
                "--grace",
                type=PositiveFloat,
                default=25.0,
                help="Seconds from SIGTERM or SIGUSR1 to the end of the process, its state saved. GKE Spot gives about "
                "30 in all, and torchrun kills its workers 30 s after a SIGTERM.",
            )
            parser.add_argument(
                "--profile",
                action="store_true",
                help="Record ten steps by torch's profiler into run_dir/profile, and say where their time went.",
            )
            parser.add_class_arguments(Watchdog, "watchdog")
            parser.add_lightning_class_args(FeatureCache, "features")
        elif self.verb == "tune":
            parser.add_lightning_class_args(LRFinder, "lr")
        else:
            parser.add_argument(
                "--ckpt",
                type=str | None,
                default=None,
                help="A checkpoint file, RUN_DIR/checkpoints/last, or a run_dir, which means its best. Default: the "
                "best in run_dir.",
            )
            parser.add_argument(
                "--mirror",
                type=bool,
                default=False,
                help="Average what is said of each image and of its mirror image.",
            )
        parser.add_lightning_class_args(Checkpointer, "checkpoint")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Nothing yet: the trainer needs to know where the run resumes."""
        return None  # type: ignore[return-value]

    def config_yaml(self) -> str:
        """The resolved configuration, as ``--config`` of any verb takes it: what is of one start is no part of it."""
        config = self.config.clone()
        for name in ("resume", "grace", "profile", "watchdog", "features"):
            config.pop(name, None)
        text: str = self.parser.dump(config, skip_none=False, skip_validation=True)
        return text


def fit(args: list[str]) -> None:
    """Train, or continue training, a model into run_dir."""
    cli = TrainingCLI("fit", args)
    options = cli.config_init
    run_dir, lease = options["run_dir"], Lease(options["run_dir"])
    with (
        options["watchdog"].stopped_at_end(),
        Preemption(options["grace"]) as preemption,
        ranks.process_group(options["watchdog"].startup_seconds),
        lease.released_at_end(),
    ):
        ranks.from_rank_zero(lease.acquire)
        if ranks.local_rank() == 0:
            temporary.sweep()
        resumed = ranks.from_rank_zero(lambda: _resume_point(run_dir, options["resume"]))
        trainer = training_trainer(
            dict(options["trainer"]),
            run_dir,
            config=cli.config_yaml(),
            checkpointer=options["checkpoint"],
            features=options["features"],
            profile=options["profile"],
            watchdog=options["watchdog"],
            preemption=preemption,
            lease=lease,
            logger=BucketTensorBoardLogger(
                events_uri(run_dir),
                purge_step=resumed.global_step if resumed else 0,
                before_write=lease.require_held,
            ),
        )
        if resumed:
            log.info("going on after step %d, epoch %d", resumed.global_step, resumed.epoch)
        preemption.training = True
        with explained(cli.datamodule.global_batch_size):
            trainer.fit(
                cli.model,
                datamodule=cli.datamodule,
                ckpt_path=storage.join(run_dir, checkpoint.FOLDER, resumed.file) if resumed else None,
            )
        if trainer.is_global_zero:
            print_summary(run_dir)


def tune(args: list[str]) -> None:
    """Find a learning rate to begin with, and the largest batch that fits."""
    cli = TrainingCLI("tune", args)
    options = cli.config_init
    rates, batches = options["lr"], BatchSizeFinder()
    # What trains in the first epoch trains in all steps, at rates that no schedule sets.
    cli.model.lr_scheduler = None
    cli.model.milestones = [epoch if epoch == 0 else sys.maxsize for epoch in cli.model.milestones]
    with ranks.process_group(EVALUATION_TIMEOUT):
        trainer = tuning_trainer(dict(options["trainer"]), options["run_dir"], rates, batches)
        with explained(cli.datamodule.global_batch_size):
            trainer.fit(cli.model, datamodule=cli.datamodule)
        suggestion, world_size = rates.suggestion(), ranks.world_size()
        if trainer.is_global_zero:
            found = {
                "lr": suggestion,
                "global_batch_size_at_most": batches.per_rank * world_size,
                "bytes_an_image": batches.bytes_each,
                "world_size": world_size,
                "optimizer": rates.optimizer,
                "rates": rates.rates,
                "losses": rates.losses,
            }
            storage.write_text(storage.join(options["run_dir"], "tune.json"), json.dumps(found, indent=2))
            print_findings(found)


def validate(args: list[str]) -> None:
    """Measure a checkpoint on the validation part."""
    _evaluate(args, "validate")


def test(args: list[str]) -> None:
    """Measure a checkpoint on the test part."""
    _evaluate(args, "test")


def predict(args: list[str]) -> None:
    """Classify images with a checkpoint."""
    from job.predict import main as predict_main

    _function_parser("predict", predict_main, args)


def index(args: list[str]) -> None:
    """List a data set ahead of training."""
    from job.data.build import main as index_main

    _function_parser("index", index_main, args, positional=True)


def checkpoints(args: list[str]) -> None:
    """List, verify or clean up the checkpoints of a run."""
    from job.train.housekeeping import main as checkpoints_main

    _function_parser("checkpoints", checkpoints_main, args, positional=True)


def launch(args: list[str]) -> None:
    """Start the ranks of this node by torchrun: launch fit …, in a container of any platform."""
    from job.cluster.launch import launch as start

    if not args or args[0] not in VERBS or args[0] in ("launch", "demo"):
        raise ConfigError("launch takes another command and its options: python -m job launch fit --data.root …")
    sys.exit(start(args))


def demo(args: list[str]) -> None:
    """Run the whole job on this machine, with a bucket of its own."""
    from job.demo import main as demo_main

    _function_parser("demo", demo_main, args)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "fit": fit,
    "tune": tune,
    "validate": validate,
    "test": test,
    "predict": predict,
    "index": index,
    "checkpoints": checkpoints,
    "launch": launch,
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
    except Preempted as error:
        log.warning("%s", error)
        _exit(error.exit_code)
    except JobError as error:
        rank = f" (rank {ranks.rank()})" if ranks.world_size() > 1 else ""
        print(f"job: error{rank}: {error}", file=sys.stderr, flush=True)
        _exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _exit(code: int) -> NoReturn:
    """End the process now: threads and process groups of a run that failed may wait for what never comes."""
    sys.stdout.flush()
    sys.stderr.flush()
    if ranks.world_size() > 1:
        temporary.remove_all()
        os._exit(code)
    sys.exit(code)


def _usage() -> str:
    lines = [f"  {name:<10}{verb.__doc__}" for name, verb in VERBS.items()]
    return "usage: python -m job COMMAND [options]\n\n" + "\n".join(lines) + "\n\npython -m job COMMAND --help"


def _function_parser(verb: str, function: Callable[..., None], args: list[str], *, positional: bool = False) -> None:
    """Call ``function`` with its parameters as options, or those it requires by position."""
    parser = Parser(
        prog=f"python -m job {verb}",
        default_env=True,
        env_prefix=ENV_PREFIX,
        description=(function.__doc__ or "").split("\n")[0],
    )
    parser.add_function_arguments(function, as_positional=positional)
    function(**parser.parse_args(args).as_dict())


def _resume_point(run_dir: str, resume: str) -> checkpoint.Manifest | None:
    if resume == "never":
        if found := checkpoint.manifests(run_dir):
            raise ConfigError(
                f"{run_dir} holds {len(found)} checkpoint(s) of an earlier run, and --resume is never. "
                "Choose another --run_dir, or --resume=auto."
            )
        return None
    newest = checkpoint.newest_trusted(run_dir)
    if newest is None and resume == "must":
        raise CheckpointError(f"--resume is must, but {run_dir} holds no checkpoint.")
    return newest


def _evaluate(args: list[str], verb: Literal["validate", "test"]) -> None:
    cli = TrainingCLI(verb, _with_saved_config(args))
    options = cli.config_init
    # The checkpoint brings the weights: pretrained ones would be fetched in vain.
    cli.model.weights = "none"
    cli.model.mirror = options["mirror"]
    with ranks.process_group(EVALUATION_TIMEOUT):
        uri = ranks.from_rank_zero(lambda: checkpoint.resolve(options["ckpt"] or options["run_dir"]))
        trainer = evaluating_trainer(dict(options["trainer"]), options["run_dir"], options["checkpoint"])
        with explained(cli.datamodule.global_batch_size):
            results = getattr(trainer, verb)(cli.model, datamodule=cli.datamodule, ckpt_path=uri, verbose=False)
        if trainer.is_global_zero:
            table = Table(title=f"{verb} {uri}", title_justify="left")
            table.add_column("metric")
            table.add_column("value", justify="right")
            for name, value in results[0].items():
                table.add_row(name, f"{value:.4f}")
            Console(soft_wrap=True).print(table)
            report = {"ckpt": uri, "metrics": results[0], "confusion_matrix": cli.model.confusion}
            storage.write_text(storage.join(options["run_dir"], f"{verb}.json"), json.dumps(report, indent=2))


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
    # Python's own accountant of semaphores complains about processes that were killed; it is another process.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(
        format=f"%(asctime)s {'' if rank == 0 else f'[rank {rank}] '}%(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if rank == 0 else logging.WARNING,
        stream=sys.stderr,
        force=True,
    )
    for name in ("httpx", "fsspec", "google", "torch.distributed", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs a traceback for each request that fails; our own error says what failed.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Values logged at validation come from synchronised metrics: they agree on all ranks already.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    # The frozen backbone is in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
    jsonargparse.set_parsing_settings(config_read_mode_fsspec_enabled=True)
