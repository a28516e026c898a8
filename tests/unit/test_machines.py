"""What is left of a machine for pods."""

from __future__ import annotations

import re

import pytest

from job.cluster.machines import GIB, allocatable_local_ssd, allocatable_storage, machines


def test_storage_is_as_on_a_real_node() -> None:
    """A node with a boot disk of 100 GB: capacity 98831908Ki, allocatable 47060071478."""
    assert allocatable_storage(100) == pytest.approx(47060071478, rel=1e-6)


def test_local_ssds_take_the_boot_disk_s_place() -> None:
    """GKE reserves 50, 75 and 100 GiB with one, two and three or more of them."""
    machine = machines()["a3-highgpu-8g"]
    assert machine.local_ssd_gib == 6000
    assert machine.allocatable(100, machine.local_ssd_gib).ephemeral_storage == allocatable_local_ssd(6000)
    per_disk = 375 * 98831908 * 1024 / 100 * 0.9
    for disks, reserved in ((1, 50), (2, 75), (3, 100), (16, 100)):
        assert allocatable_local_ssd(375 * disks) == pytest.approx(disks * per_disk - reserved * GIB)


@pytest.mark.parametrize(
    ("name", "cpus", "memory_gib"),
    [
        # 4 processors: 0.06 + 0.01 + 2 x 0.005 are reserved. Memory: 1 + 0.8 + 0.8 GiB, 100 MiB, and the kernel's part.
        ("e2-standard-4", 3.92, 16 - 0.4 - 2.6 - 0.0977),
        # 0.08 + 92 x 0.0025; and 1 + 0.8 + 0.8 + 6.72 + 256 x 0.02 GiB.
        ("g2-standard-96", 95.69, 384 - 9.6 - 14.44 - 0.0977),
    ],
)
def test_what_gke_reserves(name: str, cpus: float, memory_gib: float) -> None:
    node = machines()[name].allocatable(100)
    assert node.cpus == pytest.approx(cpus)
    assert node.memory / GIB == pytest.approx(memory_gib, abs=0.01)


def test_every_machine_has_a_source_and_counts_its_accelerators() -> None:
    for machine in machines().values():
        assert machine.source.startswith("https://cloud.google.com/")
        assert bool(machine.accelerator) == (machine.accelerators > 0)
        assert machine.local_ssd_gib % 375 == 0


def test_the_name_of_a_machine_says_how_many_accelerators_it_has() -> None:
    for name, machine in machines().items():
        if number := re.search(r"(?:gpu-(\d+)g|-(\d+)t)$", name):
            assert machine.accelerators == int(number[1] or number[2]), name
