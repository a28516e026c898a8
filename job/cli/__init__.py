"""The command line: ``python -m job COMMAND``."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from job import checkpoint, redact, storage
from job.checkpoint import confusion
from job.checkpoint.callback import Checkpointer
from job.cluster import ranks
from job.cluster.environment import require_ranks
from job.config import bounded_yaml
from job.config.import_policy import denied_message, require_permitted, set_parsing_rules
from job.config.saved_config import read_saved_config
from job.config.trainer_options import add_trainer_arguments, list_supported_classes, require_seed, require_supported
from job.data.datamodule import ImageDataModule
from job.errors import (
    EXIT_INTERNAL_ERROR,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    CheckpointError,
    ConfigError,
    JobError,
    Preempted,
)
from job.features.callback import FeatureCache
from job.model.module import TransferLearningModel
from job.monitoring.report import Report, print_findings, print_summary
from job.monitoring.tensorboard import BucketTensorBoardLogger, events_uri
from job.process import temporary
from job.process.descendants import kill_descendants
from job.process.signals import Stopped, StopSignals
from job.process.terminal import escape, print_table, protect_output, say
from job.resilience import attempts
from job.resilience.divergence import last_checkpoint_named
from job.resilience.lease import Lease
from job.resilience.preemption import Preemption
from job.resilience.watchdog import Watchdog
from job.storage.json_files import write_json
from job.train.batch_size_finder import BatchSizeFinder
from job.train.errors import translate_errors, translated
from job.train.lr_finder import LRFinder
from job.train.trainer import evaluating_trainer, training_trainer, tuning_trainer

log = logging.getLogger("job")

ENV_PREFIX = "JOB"
EVALUATION_TIMEOUT = 1200.0
"""Seconds that ranks wait for one another in validate and test."""


class Parser(LightningArgumentParser):
    """jsonargparse's parser, whose errors suggest the nearest right option.

    Options cannot be abbreviated, and no class may be named that :mod:`job.config.import_policy` denies. Credentials in
    URIs are kept by :mod:`job.redact`; the values of options are without them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, without a traceback, and exit with 2."""
        if denied := re.search(r"Importing '([^']+)' is not allowed", message):
            key = re.search(r'Parser key "([^"]+)"', message)
            raise ConfigError(denied_message(denied[1], key[1] if key else ""))
        raise ConfigError(f"{message.strip()}{self._suggestion(message)}\nSee --help.")

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """The options, checked, with the credentials of their URIs kept aside."""
        self._check_limits(sys.argv[1:] if not args or args[0] is None else args[0])
        config = super().parse_args(*args, **kwargs)
        require_permitted(config.as_dict())
        for key, value in list(config.items()):
            config[key] = redact.walk(value, _without_credentials, key)
        return config

    def _check_limits(self, args: Any) -> None:
        """Refuse values that would be too large as YAML: jsonargparse reads each of them by two loaders."""
        values = [("a value on the command line", str(arg).partition("=")[2] or str(arg)) for arg in args]
        values += [(name, value) for name, value in os.environ.items() if name.startswith(f"{ENV_PREFIX}_")]
        for name, value in values:
            try:
                bounded_yaml.check_limits(value)
            except bounded_yaml.LimitExceeded as error:
                raise ConfigError(f"{name} is refused: {error}.") from error

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """The options as text, without credentials."""
        namespace = namespace.clone()
        for key, value in list(namespace.items()):
            namespace[key] = redact.walk(value, lambda _, text: redact.saved_form(text))
        text: str = super().dump(namespace, *args, **kwargs)
        return text

    def _suggestion(self, message: str) -> str:
        known = [action.dest for action in self._actions]
        for wrong in re.findall(r"(?:--|[\"'])([A-Za-z_][\w.]*)", message):
            close = difflib.get_close_matches(wrong, [k for k in known if k != wrong], n=1, cutoff=0.75)
            if close and wrong not in known:
                return f"\nDid you mean --{close[0]}?"
        return ""


def _without_credentials(key: str, text: str) -> str:
    """The value of an option as configurations and indexes may hold it.

    Raises:
        ConfigError: it is no text, or its credentials were removed when it was saved.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--{key}: {escape(text)} is not UTF-8. Rename the file or folder.") from error
    if redact.is_redacted(text):
        raise ConfigError(
            f"{text} was saved without its credentials, which this command needs again: give the whole URI by --{key}."
        )
    return redact.remember(text)


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

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed, a number: a random one would be another at each start, and on each rank."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="Seed of the order of samples, of augmentation and of the head's initial weights.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The Trainer's options, less the reserved ones, the model's and the data's."""
        add_trainer_arguments(parser)
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(TransferLearningModel, "model")
        parser.add_lightning_class_args(ImageDataModule, "data")
        list_supported_classes(parser)

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
                help="Seconds from a signal (SIGTERM, SIGUSR1, Ctrl-C, SIGHUP) to the end of the process, its state "
                "saved. GKE Spot gives about 30 in all, and torchrun kills its workers 30 s after a SIGTERM.",
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """The options, with a seed that NumPy takes."""
        super().parse_arguments(parser, args)
        require_seed(self.config["seed_everything"])

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Check its arguments alone: the trainer needs to know where the run resumes."""
        require_supported(self.config_init["trainer"])
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
        cli.datamodule.before_write = lease.require_held
        step, config = resumed.global_step if resumed else -1, cli.config_yaml()
        before = ranks.from_rank_zero(lambda: attempts.begin(run_dir, step, config, lease.require_held))
        with (
            attempts.counted(run_dir, before if ranks.rank() == 0 else None, lease.require_held),
            translate_errors(cli.datamodule.global_batch_size),
            last_checkpoint_named(run_dir, options["checkpoint"].io),
        ):
            trainer = training_trainer(
                dict(options["trainer"]),
                run_dir,
                config=config,
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
                cli.model.weights = "none"  # the checkpoint brings them
                log.info("going on after step %d, epoch %d", resumed.global_step, resumed.epoch)
            preemption.training = True
            trainer.fit(
                cli.model,
                datamodule=cli.datamodule,
                ckpt_path=storage.join(run_dir, checkpoint.FOLDER, resumed.file) if resumed else None,
            )
            preemption.training = False
            if trainer.is_global_zero:
                print_summary(run_dir, next(c.content for c in trainer.callbacks if isinstance(c, Report)))  # type: ignore[attr-defined]


def tune(args: list[str]) -> None:
    """Find a learning rate to begin with, and the largest batch that fits."""
    cli = TrainingCLI("tune", args)
    options = cli.config_init
    rates, batches = options["lr"], BatchSizeFinder()
    # What trains in the first epoch trains in all steps, at rates that no schedule sets.
    cli.model.lr_scheduler, cli.model.lr_interval = None, "epoch"
    cli.model.guard = None  # a sweep of learning rates diverges on purpose
    cli.model.milestones = [epoch if epoch == 0 else sys.maxsize for epoch in cli.model.milestones]
    with ranks.process_group(EVALUATION_TIMEOUT):
        with translate_errors(cli.datamodule.global_batch_size):
            trainer = tuning_trainer(dict(options["trainer"]), options["run_dir"], rates, batches)
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
            write_json(storage.join(options["run_dir"], "tune.json"), found)
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
    from job.data.index.build import main as index_main

    _function_parser("index", index_main, args, positional=True)


def checkpoints(args: list[str]) -> None:
    """List, verify or clean up the checkpoints of a run."""
    from job.cli.checkpoints import main as checkpoints_main

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
RANKED_VERBS = ("fit", "tune", "validate", "test")
"""Those that run on many processes."""


def main(argv: list[str] | None = None) -> None:
    """Run one verb, and exit by the table in README: 2 with one message for a user's mistake."""
    args = sys.argv[1:] if argv is None else argv
    _set_up_logging()
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if args else EXIT_USER_ERROR)
    # LightningCLI looks at sys.argv, and would warn of arguments given to it besides.
    sys.argv = [sys.argv[0]]
    waits = args[0] in ("launch", "demo")  # for processes that have a grace of their own
    try:
        with StopSignals(None, at_end=kill_descendants) if waits else StopSignals(at_end=temporary.remove_all):
            code = _exit_code(args)
    except Stopped as stopped:
        code = _report(stopped)
    if code:
        _exit(code)


def _exit_code(args: list[str]) -> int:
    """Run the verb ``args[0]``; report what ends it, and return the exit code."""
    try:
        if args[0] not in VERBS:
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown command {args[0]!r}.{hint}\n{_usage()}")
        if args[0] in RANKED_VERBS:
            require_ranks(os.environ)
        VERBS[args[0]](args[1:])
    except (Stopped, KeyboardInterrupt) as error:
        return _report(error)
    except Exception as error:
        return _report(translated(error))
    return 0


def _report(error: BaseException) -> int:
    """Tell the user what ended the process; returns the exit code."""
    rank = f" (rank {ranks.rank()})" if ranks.world_size() > 1 else ""
    if isinstance(error, Preempted):
        log.warning("%s", error)
        return error.exit_code
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        say(f"job: {error or 'stopped by SIGINT.'}{rank}", file=sys.stderr)
        return error.exit_code if isinstance(error, Stopped) else EXIT_INTERRUPTED
    if isinstance(error, JobError):
        say(f"job: error{rank}: {error}", file=sys.stderr)
        return error.exit_code
    log.error("this should not have happened:", exc_info=error)
    first_line = next(iter(str(error).splitlines()), "")
    say(
        f"job: unexpected error{rank}: {type(error).__name__}: {first_line}. The traceback above shows where: a fault "
        "of the job, or of a callback, transform or library that it was given.",
        file=sys.stderr,
    )
    return EXIT_INTERNAL_ERROR


def _exit(code: int) -> NoReturn:
    """End the process now: threads and process groups of a run that failed may wait for what never comes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe or terminal that is gone
            stream.flush()
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
        found = checkpoint.scan(run_dir)
        if count := len(found.good) + len(found.damaged) + len(found.newer):
            raise ConfigError(
                f"{run_dir} holds {count} checkpoint(s) of an earlier run, and --resume is never. "
                "Choose another --run_dir, or --resume=auto."
            )
        return None
    newest = checkpoint.newest_trusted(run_dir)
    if newest is None and resume == "must":
        raise CheckpointError(f"--resume is must, but {run_dir} holds no checkpoint.")
    return newest


def _evaluate(args: list[str], verb: Literal["validate", "test"]) -> None:
    with _with_saved_config(args) as configured:
        cli = TrainingCLI(verb, configured)
    options = cli.config_init
    # The checkpoint brings the weights: pretrained ones would be fetched in vain.
    cli.model.weights = "none"
    cli.model.mirror = options["mirror"]
    with ranks.process_group(EVALUATION_TIMEOUT):
        uri = ranks.from_rank_zero(lambda: checkpoint.resolve(options["ckpt"] or options["run_dir"]))
        with translate_errors(cli.datamodule.global_batch_size):
            trainer = evaluating_trainer(dict(options["trainer"]), options["run_dir"], options["checkpoint"])
            results = getattr(trainer, verb)(cli.model, datamodule=cli.datamodule, ckpt_path=uri, verbose=False)
        if trainer.is_global_zero:
            rows = [(name, f"{value:.4f}") for name, value in results[0].items()]
            print_table(["metric", "value"], rows, title=f"{verb} {uri}", right=["value"])
            matrix = cli.model.confusion
            counts = confusion.as_json(confusion.cells(matrix), len(matrix))
            write_json(
                storage.join(options["run_dir"], f"{verb}.json"),
                {"ckpt": redact.redact(uri), "metrics": results[0], "confusion_matrix": counts},
            )


@contextlib.contextmanager
def _with_saved_config(args: list[str]) -> Iterator[list[str]]:
    """Put what is taken of run_dir's own config.yaml before the arguments, unless the user names a configuration."""
    named = any(arg.split("=")[0] in ("--config", "--help") or re.match(r"-[ch]", arg) for arg in args)
    if named or f"{ENV_PREFIX}_CONFIG" in os.environ:
        yield args
        return
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--run_dir", default=os.environ.get(f"{ENV_PREFIX}_RUN_DIR"))
    run_dir = finder.parse_known_args(args)[0].run_dir
    saved = None if run_dir is None else read_saved_config(run_dir)
    if saved is None:
        yield args
        return
    with tempfile.NamedTemporaryFile("w", prefix="job-config-", suffix=".yaml") as file:
        yaml.safe_dump(saved, file)
        file.flush()
        yield ["--config", file.name, *args]


def _set_up_logging() -> None:
    # Python's own accountant of semaphores complains about processes that were killed; it is another process.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    rank = ranks.rank()
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
    protect_output()
    set_parsing_rules()
