"""Guests in QEMU, driven over QMP. Guests outlive the process that started them; everything needed to find them again is on the node."""

from atoll.hypervisor.qemu.hypervisor import QemuHypervisor
from atoll.hypervisor.qemu.tuning import Tuning

__all__ = ["QemuHypervisor", "Tuning"]
