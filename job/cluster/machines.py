"""Machines of GKE, and what pods can request of them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from job import typed

TABLE = Path(__file__).with_name("machines.toml")
GIB = 2**30
LOCAL_SSD_GIB = 375
"""Size of one local SSD."""

_CPU_SHARES = ((1, 0.06), (1, 0.01), (2, 0.005), (float("inf"), 0.0025))
"""Reserved shares of the first processor, the next one, the next two, and all others."""
_MEMORY_SHARES = ((4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06), (float("inf"), 0.02))
"""Reserved shares of the first 4 GiB, the next 4 GiB, and so on."""
_MEMORY_EVICTION_GIB = 100 / 1024
_DISK_EVICTION_SHARE = 0.1
_FILE_SYSTEM_SHARE = 98831908 * 1024 / (100 * GIB)
"""Capacity of the pods' file system, measured on a GKE node with a boot disk of 100 GB; the share grows with it."""
_KERNEL_SHARE = 0.025
"""Share of the memory that the kernel keeps, so that it is no capacity: 2.3 % on an e2-standard-4, less on larger."""


@dataclass(frozen=True)
class Resources:
    """Amounts of the resources that pods request.

    Attributes:
        cpus: processors.
        memory: bytes.
        ephemeral_storage: bytes.
    """

    cpus: float
    memory: float
    ephemeral_storage: float


SYSTEM_PODS = Resources(cpus=1.0, memory=2 * GIB, ephemeral_storage=2 * GIB)
"""Allowance for GKE's DaemonSets: logging, metrics, network, device plugin. An estimate; GKE publishes no figures."""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine type.

    Attributes:
        name: the cloud's name of it.
        cpus: virtual processors.
        memory_gib: memory.
        source: page with these figures.
        accelerator: value of the node label ``cloud.google.com/gke-accelerator`` or ``gke-tpu-accelerator``, or empty.
        accelerators: GPUs, or TPU chips.
        local_ssd_gib: local SSDs that belong to the machine.
    """

    name: str
    cpus: Annotated[int, msgspec.Meta(gt=0)]
    memory_gib: Annotated[int, msgspec.Meta(gt=0)]
    source: str
    accelerator: str = ""
    accelerators: Annotated[int, msgspec.Meta(ge=0)] = 0
    local_ssd_gib: Annotated[int, msgspec.Meta(ge=0)] = 0

    def allocatable(self, disk_gb: int, local_ssd_gib: int = 0) -> Resources:
        """What GKE leaves for pods, its own DaemonSets included.

        Source: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes

        Args:
            disk_gb: size of the boot disk, as in ``gcloud container node-pools create --disk-size``; those are GiB.
            local_ssd_gib: local SSDs of ``--ephemeral-storage-local-ssd``, which then take the boot disk's place.
        """
        memory_gib = self.memory_gib * (1 - _KERNEL_SHARE) - _reserved(self.memory_gib, _MEMORY_SHARES)
        return Resources(
            cpus=self.cpus - _reserved(self.cpus, _CPU_SHARES),
            memory=(memory_gib - _MEMORY_EVICTION_GIB) * GIB,
            ephemeral_storage=allocatable_local_ssd(local_ssd_gib) if local_ssd_gib else allocatable_storage(disk_gb),
        )


def allocatable_storage(disk_gb: int) -> float:
    """Bytes of ephemeral storage that pods can request on a GKE node with a boot disk of ``disk_gb``.

    Source: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes#local_ephemeral_storage_reservation
    """
    reserved = min(0.5 * disk_gb, 6 + 0.35 * disk_gb, 100)
    return (disk_gb * _FILE_SYSTEM_SHARE * (1 - _DISK_EVICTION_SHARE) - reserved) * GIB


def allocatable_local_ssd(gib: int) -> float:
    """Bytes of ephemeral storage that pods can request on a GKE node with ``gib`` of local SSDs for it.

    Source: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes#local_ephemeral_storage_reservation
    """
    disks = max(gib // LOCAL_SSD_GIB, 1)
    reserved = {1: 50, 2: 75}.get(disks, 100)
    return (gib * _FILE_SYSTEM_SHARE * (1 - _DISK_EVICTION_SHARE) - reserved) * GIB


def machines() -> dict[str, Machine]:
    """The table, by the machines' names."""
    table = typed.from_builtins(tomllib.loads(TABLE.read_text()), dict[str, list[Machine]])
    return {machine.name: machine for machine in table["machines"]}


def _reserved(amount: float, shares: tuple[tuple[float, float], ...]) -> float:
    total, start = 0.0, 0.0
    for width, share in shares:
        total += share * min(max(amount - start, 0.0), width)
        start += width
    return total
