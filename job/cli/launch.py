"""``python -m job launch``: run another command in all processes of this node."""

from __future__ import annotations

import os
from collections.abc import Sequence

from job.cli import COMMANDS, HELP_OPTIONS, check, run, run_command
from job.cli.arguments import canonical_arguments, option_value
from job.cli.known_options import require_known_options
from job.config.recipes import local_config
from job.errors import ConfigError
from job.process.ending import end_process

OPTIONAL_LIBRARIES = {"gs://": "gcsfs", "gcs://": "gcsfs", "s3://": "s3fs", "timm/": "timm"}
"""Libraries that take a second or more to import, by the text in the options that needs them."""

HELP = """\
usage: python -m job launch COMMAND [options of the command]

Run a command in one process per GPU of this node, or in one process, by torch elastic. Environment variables say which
node of how many this is: on Kubeflow Trainer, Vertex AI, GKE's TPU hosts, a Kubernetes Indexed Job or a single machine.

example:
  python -m job launch fit --config head --data.root gs://BUCKET/data --run_dir gs://BUCKET/runs/1

environment variables to set:
  LAUNCH_PROCESSES    Number of processes per node. Default: the number of GPUs, or 1.
  LAUNCH_RESTARTS     Number of times that failed ranks are restarted in place. Default: 0.
  LAUNCH_NODES        Number of nodes of an Indexed Job. Default: 1.
  LAUNCH_COORDINATOR  HOST or HOST:PORT of node 0 of an Indexed Job with several nodes.
  LAUNCH_ID           Name that distinguishes this job from others with the same coordinator (Indexed Job, TPU,
                      Kubeflow).
  JOB_LOG             text, json or auto, as --log; JOB_LOG_SECONDS is --log_seconds.
  LAUNCH_WAIT_SECONDS Limit of the wait for the other nodes. Default: none.
  OMP_NUM_THREADS     CPU threads per process. Default: the CPU cores of the container, divided by the processes.

environment variables of the platforms, which set them:
  JOB_COMPLETION_INDEX                   Indexed Job: the index of this node.
  PET_NNODES, PET_NODE_RANK, PET_*       Kubeflow Trainer and PyTorchJob: nodes, processes, restarts.
  CLUSTER_SPEC                           Vertex AI: worker pools, and the task of this node.
  TPU_WORKER_ID, TPU_WORKER_HOSTNAMES,
  MEGASCALE_*                            TPU hosts on GKE: hosts of a slice, and slices.
  RANK, LOCAL_RANK, WORLD_SIZE,
  LOCAL_WORLD_SIZE, MASTER_ADDR/_PORT    torchrun: this process is one of its ranks, and runs the command itself.
"""


def launch(args: list[str]) -> None:
    """Run ``python -m job launch ARGS``.

    Raises:
        ConfigError: no command to launch is given.
    """
    if args and args[0] in HELP_OPTIONS:
        print(HELP, end="")
        return
    if not args or args[0] not in COMMANDS or args[0] in ("launch", "demo"):
        raise ConfigError("launch takes another command and its options: python -m job launch fit --data.root …")
    if not HELP_OPTIONS.isdisjoint(args[1:]):
        run_command(args[0], args[1:])
        return
    require_known_options(args[0], args[1:])
    from job.cluster.launch import launch as start

    command = COMMANDS[args[0]]
    # Imported once for all ranks of the node.
    modules = [command.module, *optional_libraries(args[1:])] if command.on_ranks else []
    # The interpreter's own end, which collects the garbage of torch, takes seconds of the grace.
    end_process(start(args, run, modules, check if command.has_check else None))


def optional_libraries(args: Sequence[str]) -> list[str]:
    """Libraries that a command is likely to need, by its options; a rank itself imports any other."""
    config = option_value(canonical_arguments(args, options=("config",)), "config") or os.environ.get("JOB_CONFIG")
    variables = [value for name, value in os.environ.items() if name.startswith("JOB_")]
    text = "\n".join([*args, *variables, local_config(config) if config else ""])
    return list(dict.fromkeys(library for mark, library in OPTIONAL_LIBRARIES.items() if mark in text))
