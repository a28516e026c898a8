"""A run as a custom job of Vertex AI, which needs no cluster."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from job.errors import EXIT_PREEMPTED, EXIT_RETRY, ConfigError, JobError
from job.process import logs
from job.process.terminal import say
from job.submit.fit_options import flags_of
from job.submit.machine import tpu_topology
from job.submit.run import Run

if TYPE_CHECKING:
    from google.cloud.aiplatform_v1 import JobServiceClient

POLL_SECONDS = 20.0
SPOT_GRACE = 20
"""Seconds to save; a Spot machine has 30 in all."""
CHECKPOINT_MINUTES = {False: 10, True: 5}
"""Time between checkpoints, without and with Spot machines."""
TIMEOUT = "604800s"
_ENDED = {"JOB_STATE_SUCCEEDED": 0, "JOB_STATE_CANCELLED": EXIT_PREEMPTED}
_FAILED = ("JOB_STATE_FAILED", "JOB_STATE_EXPIRED", "JOB_STATE_PARTIALLY_SUCCEEDED")


class VertexError(JobError):
    """A request that Vertex AI refuses, or does not answer."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def arguments_of(run: Run) -> list[str]:
    """The arguments of ``python -m job`` in the containers.

    Raises:
        ConfigError: they name files, which Vertex AI has no place for.
    """
    if run.fit_files:
        raise ConfigError(
            "--vertex: Vertex AI takes no configuration files. Give options of fit, or the name of a recipe."
        )
    return [
        "launch",
        "fit",
        f"--run_dir={run.run_dir}",
        *([f"--data.root={run.data}"] if run.data else []),
        f"--checkpoint.every_minutes={CHECKPOINT_MINUTES[run.spot]}",
        *([f"--grace={SPOT_GRACE}"] if run.spot else []),
        *(["--trainer.accelerator=tpu"] if run.family == "tpu" else []),
        *(["--trainer.precision=bf16-mixed"] if run.family != "cpu" else []),
        *flags_of(run.fit_options),
        *run.fit_args,
    ]


def spec_of(run: Run) -> dict[str, Any]:
    """The CustomJobSpec, in the form of ``gcloud ai custom-jobs create --config``.

    Raises:
        ConfigError: Vertex AI has no such run.
    """
    if run.family == "tpu" and run.nodes > 1:
        raise ConfigError(f"--vertex takes one TPU host, not --nodes {run.nodes}. Use a cluster for slices of several.")
    machine: dict[str, Any] = {"machineType": run.machine.name}
    if run.family == "gpu":
        machine["acceleratorType"] = run.machine.accelerator.upper().replace("-", "_")
        machine["acceleratorCount"] = run.machine.accelerators
    elif run.family == "tpu":
        machine["tpuTopology"] = tpu_topology(run.machine, 1)
    pool = {
        "machineSpec": machine,
        "diskSpec": {"bootDiskSizeGb": run.disk_gb},
        "containerSpec": {"imageUri": str(run.image), "args": arguments_of(run)},
    }
    # Pool 0 is the first machine, pool 1 are all others.
    pools = [{**pool, "replicaCount": 1}]
    if run.nodes > 1:
        pools.append({**pool, "replicaCount": run.nodes - 1})
    return {
        "workerPoolSpecs": pools,
        "scheduling": {
            **({"strategy": "SPOT"} if run.spot else {}),
            "timeout": TIMEOUT,
            # A machine that comes back joins a run that has gone on from its checkpoint on all of them.
            "restartJobOnWorkerRestart": True,
        },
        **({"serviceAccount": run.service_account} if "@" in run.service_account else {}),
    }


def start(run: Run, project: str, region: str, *, wait: Callable[[float], None] = time.sleep) -> int:
    """Create the custom job, and wait for its end; returns the exit code of the run.

    Raises:
        ConfigError: Google's client is not installed, or there are no credentials.
        VertexError: Vertex AI refuses the job.
    """
    client = _client(region)
    from google.api_core.exceptions import GoogleAPICallError, ServerError, TooManyRequests
    from google.cloud.aiplatform_v1.types import CustomJob, CustomJobSpec

    spec = CustomJobSpec.from_json(json.dumps(spec_of(run)))
    job = CustomJob(display_name=run.name, job_spec=spec)
    try:
        created = client.create_custom_job(parent=f"projects/{project}/locations/{region}", custom_job=job)
    except GoogleAPICallError as error:
        code = EXIT_RETRY if isinstance(error, (ServerError, TooManyRequests)) else ConfigError.exit_code
        raise VertexError(f"Vertex AI does not take {run.name}: {error.message}", code) from error
    number = created.name.rpartition("/")[2]
    say(f"{created.name}\ngcloud ai custom-jobs stream-logs {number} --region={region} shows its log,")
    say(f"gcloud ai custom-jobs cancel {number} --region={region} stops it.")
    state = ""
    while True:
        try:
            current = client.get_custom_job(name=created.name)
        except (ServerError, TooManyRequests) as error:
            logs.report(f"Vertex AI does not answer: {error.message}", level=30)
        except GoogleAPICallError as error:
            raise VertexError(f"{created.name} cannot be looked up: {error.message}", EXIT_RETRY) from error
        else:
            if current.state.name != state:
                state = current.state.name
                say(f"{run.name}: {state.removeprefix('JOB_STATE_').lower()}")
            if state in _ENDED:
                return _ENDED[state]
            if state in _FAILED:
                logs.report(f"job: {run.name} has failed: {current.error.message}")
                return _exit_code(current.error.message)
        wait(POLL_SECONDS)


def _client(region: str) -> JobServiceClient:
    try:
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud.aiplatform_v1 import JobServiceClient
    except ImportError as error:
        raise ConfigError(
            "--vertex needs Google's client of Vertex AI. Install it: pip install '.[vertex]'. Or give --dry_run, "
            "and the output to gcloud ai custom-jobs create --config."
        ) from error
    try:
        return JobServiceClient(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})
    except DefaultCredentialsError as error:
        raise ConfigError("--vertex needs credentials: gcloud auth application-default login.") from error


def _exit_code(message: str) -> int:
    """The exit code of a failed container, from Vertex AI's message."""
    match = re.search(r"(?:non-zero status|exit (?:status|code))(?: of)?:? (\d{1,3})\b", message)
    return int(match[1]) if match and 0 < int(match[1]) < 256 else EXIT_RETRY
