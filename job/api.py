"""Training from Python: :func:`fit`, for scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from job.cli.training import TrainingCLI
from job.cluster import ranks
from job.cluster.environment import require_ranks
from job.errors import EXIT_INTERRUPTED, ConfigError, Preempted
from job.monitoring.report.content import Report
from job.process.signals import Stopped
from job.train import fit as training
from job.train.errors import translate_errors


def fit(config: Mapping[str, Any] | str | os.PathLike[str]) -> Report:
    """Train as ``python -m job fit`` does, and continue the run in ``run_dir`` if it was interrupted.

    In the main thread, a first Ctrl-C (or SIGTERM) in training saves the state and raises Preempted, without a limit in
    time; a second one raises KeyboardInterrupt at once. Afterwards the signal handlers are
    those of before. The process is never ended; one that makes no progress prints its stacks, and only as one of
    several ranks is ended by the watchdog.

    Args:
        config: options by group, such as ``{"run_dir": "runs/1", "data": {"root": "images"}}``, or the path or URI of a
            YAML file of them, such as the ``config.yaml`` in a run_dir. Options that it leaves out come from ``JOB_…``
            environment variables, or have their defaults.

    Raises:
        JobError: a subclass says what is wrong; Preempted, that a signal stopped the training, its state saved, or its
            preparation, in which there was nothing to save.
        KeyboardInterrupt: Ctrl-C outside of training, or a second one.
    """
    with translate_errors():
        require_ranks(os.environ)
        cli = TrainingCLI("fit", _plain(config) if isinstance(config, Mapping) else [f"--config={os.fspath(config)}"])
        if (grace := cli.config["grace"]) != cli.parser.get_default("grace"):
            raise ConfigError(f"grace is {grace}, but job.fit never ends the process. Leave it out.")
    settings = replace(
        cli.fit_settings(),
        grace=None,
        ends_hanging_process=ranks.world_size() > 1,  # others would wait for it
        ends_at_second_interrupt=False,
    )
    try:
        with translate_errors(cli.datamodule.global_batch_size):
            return training.fit(cli.model_config, cli.datamodule, settings)
    except Stopped as stopped:
        if stopped.exit_code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt(str(stopped)) from None
        raise Preempted(str(stopped)) from None


def _plain(value: Any) -> Any:
    """``value`` with paths as text."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
