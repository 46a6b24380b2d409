"""A tiny guest for trying out and testing: Debian's cloud kernel, busybox, and a writer that acknowledges each durable record."""

from atoll.lab.guest.build import GuestImage, append, build
from atoll.lab.guest.ring import RingReport, acks, check_ring

__all__ = ["GuestImage", "RingReport", "acks", "append", "build", "check_ring"]
