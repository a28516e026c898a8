"""``python -m job checkpoints``: list, verify or clean up the checkpoints of a run."""

from __future__ import annotations

from typing import Literal

from job import checkpoint, storage
from job.cli.parser import call_with_options
from job.errors import CheckpointError
from job.process.terminal import print_table, say
from job.resilience.lease import Lease


def checkpoints(args: list[str]) -> None:
    """Run ``python -m job checkpoints ARGS``."""
    call_with_options("checkpoints", main, args, positional=("action", "run_dir"))


def main(action: Literal["ls", "verify", "gc"], run_dir: str) -> None:
    """List, verify or clean up the checkpoints of a run.

    Args:
        action: "ls" lists them; "verify" reads each and compares it with its manifest; "gc" removes incomplete uploads
            of processes that were killed.
        run_dir: folder of the run.
    """
    if action == "gc":
        _collect_garbage(run_dir)
        return
    manifests = checkpoint.manifests(run_dir)
    if not manifests:
        raise CheckpointError(f"no checkpoint in {storage.join(run_dir, checkpoint.FOLDER)}.")
    columns = [
        "checkpoint",
        "epoch",
        "step",
        "bytes",
        manifests[-1].monitor,
        *(["state"] if action == "verify" else []),
    ]
    rows, problems = [], []
    for manifest in manifests:
        measured = manifest.measured(manifests[-1].monitor)
        value = "" if measured is None else f"{measured:.4f}"
        row = [manifest.file, str(manifest.epoch), str(manifest.global_step), f"{manifest.bytes:,}", value]
        if action == "verify":
            problem = _problem(run_dir, manifest)
            problems += [problem] if problem else []
            row.append("damaged" if problem else "good")
        rows.append(row)
    print_table(columns, rows)
    if problems:
        raise CheckpointError(
            f"{len(problems)} of {len(manifests)} checkpoints are damaged:\n  " + "\n  ".join(problems)
        )


def _problem(run_dir: str, manifest: checkpoint.Manifest) -> str | None:
    try:
        checkpoint.verify(run_dir, manifest)
    except CheckpointError as error:
        return str(error)
    return None


def _collect_garbage(run_dir: str) -> None:
    # A running job's upload in progress looks the same as an abandoned one.
    lease = Lease(run_dir)
    with lease.released_at_end():
        lease.acquire()
        leftovers = checkpoint.uncommitted(run_dir)
        for uri in leftovers:
            lease.require_held()
            storage.remove(uri)
            say(f"removed {uri}")
        say(f"{len(leftovers)} leftover(s) in {storage.join(run_dir, checkpoint.FOLDER)}")
