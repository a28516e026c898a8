"""What is left of a machine for pods."""

from __future__ import annotations

import pytest

from job.cluster.machines import GIB, allocatable_storage, machines


def test_storage_is_as_on_a_real_node() -> None:
    """A node with a boot disk of 100 GB: capacity 98831908Ki, allocatable 47060071478."""
    assert allocatable_storage(100) == pytest.approx(47060071478, rel=1e-6)


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
