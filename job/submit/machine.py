"""The machine of a run: found by its name, and what a pod that has it to itself requests."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

from job.cluster.machines import GIB, SYSTEM_PODS, Machine, machines
from job.errors import ConfigError
from job.process.terminal import escape

Family = Literal["cpu", "gpu", "tpu"]

USED_SHARE = 0.9
"""Share of what is left beside GKE's own pods: :data:`SYSTEM_PODS` is an estimate, and other DaemonSets come."""
TMP_GIB = 15
"""Size of /tmp, which holds a checkpoint during its upload."""
TPU_TOPOLOGIES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
"""Topology of a slice of v5e or v6e by its chips: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus"""
TPU7X_TOPOLOGIES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
"""The same of TPU7x, whose slices have three dimensions."""


@dataclass(frozen=True)
class Requests:
    """What a pod requests, and is limited to.

    Attributes:
        cpus: processors.
        memory_gib: memory, that of /dev/shm included.
        shm_gib: size of /dev/shm.
        disk_gib: ephemeral storage: /tmp and the cache.
    """

    cpus: int
    memory_gib: int
    shm_gib: int
    disk_gib: int

    @property
    def cache_gib(self) -> int:
        """Size of the volume for cached samples."""
        return self.disk_gib - TMP_GIB

    @property
    def cache_gb(self) -> int:
        """``data.cache_gb``, in units of 10^9 bytes: a tenth of the volume is left for the file system."""
        return int(0.9 * self.cache_gib * GIB / 1e9)


def find_machine(name: str) -> Machine:
    """The machine of a name, or of a short name such as ``l4x8``.

    Raises:
        ConfigError: the table has no such machine.
    """
    table = machines()
    if name in table:
        return table[name]
    by_short_name = {short_name(machine): machine for machine in reversed(table.values())}
    if name in by_short_name:
        return by_short_name[name]
    known = {**table, **by_short_name}
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"It has {', '.join(sorted(known))}."
    raise ConfigError(f"--machine {escape(repr(name[:100]))} is not in the table of machines. {hint}")


def short_name(machine: Machine) -> str:
    """Accelerator and number: ``l4x8``, ``h100x8``, ``v5ex4``; the machine's own name where it has none."""
    if not machine.accelerators:
        return machine.name
    words = machine.accelerator.removeprefix("nvidia-").removeprefix("tesla-")
    if words.startswith("tpu-"):
        generation = re.match(r"tpu-?(v?\w+?)(-lite)?(-podslice|-slice|-device)?$", words)
        words = (generation[1] + ("e" if generation[2] else "")) if generation else words
    elif not words.startswith("a100"):  # which comes with 40 GB and with 80
        words = re.sub(r"-\d+gb$", "", words)
    return f"{words}x{machine.accelerators}"


def family(machine: Machine) -> Family:
    """Which manifests a machine needs."""
    if not machine.accelerators:
        return "cpu"
    return "tpu" if machine.accelerator.startswith("tpu") else "gpu"


def requests_of(machine: Machine, disk_gb: int) -> Requests:
    """What a pod requests that has the machine to itself.

    Args:
        disk_gb: size of the boot disk, as in ``gcloud container node-pools create --disk-size``.

    Raises:
        ConfigError: the disk or the machine is too small.
    """
    node = machine.allocatable(disk_gb)
    cpus = math.floor(USED_SHARE * (node.cpus - SYSTEM_PODS.cpus))
    memory = math.floor(USED_SHARE * (node.memory - SYSTEM_PODS.memory) / GIB)
    disk = math.floor((node.ephemeral_storage - SYSTEM_PODS.ephemeral_storage) / GIB)
    if disk <= TMP_GIB + 1:
        raise ConfigError(
            f"--disk_gb {disk_gb} leaves {max(disk, 0)} GiB for pods, and /tmp alone has {TMP_GIB}. Give 100 or more."
        )
    if cpus < 1 or memory < 4:
        raise ConfigError(
            f"--machine {machine.name} leaves {cpus} processors and {memory} GiB of memory for a pod, which is too few."
        )
    shm = min(16, max(memory // 4, 1)) if family(machine) == "gpu" else 1  # NCCL: 33 MB per pair of GPUs
    return Requests(cpus, memory, shm, disk)


def tpu_topology(machine: Machine, hosts: int) -> str:
    """The topology of a slice of ``hosts`` machines.

    Raises:
        ConfigError: there is no such slice.
    """
    chips = machine.accelerators * hosts
    topologies = TPU7X_TOPOLOGIES if machine.accelerator == "tpu7x" else TPU_TOPOLOGIES
    if chips not in topologies or (hosts > 1 and machine.accelerators != 4):
        counts = [count // 4 for count in topologies if count > 4]
        raise ConfigError(
            f"there is no TPU slice of {hosts} {machine.name}. A slice has one host, or "
            f"{', '.join(map(str, counts))} hosts of four chips: change --nodes or --machine."
        )
    return topologies[chips]
