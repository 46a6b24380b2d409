"""From a guest's spec to QEMU's command line. Pure: the same spec gives the same machine on every node.

Everything that a migration compares is written out here, and must never change for an existing machine type: device ids, PCI addresses,
the number of root ports. A disk in slot N sits behind root port N, whether it was there at start or was plugged later.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from atoll.hypervisor.qemu.files import GuestFiles
from atoll.model.errors import InvalidInput
from atoll.model.messages import GuestDisk, GuestSpec

BINARY = "qemu-system-x86_64"
#: Disks that a guest can have; each has a root port of its own from the start, because only those can be plugged into.
SLOTS = 24
#: Network cards that a guest can have.
NICS = 8
#: PCI device numbers on the root bus: 2-4 root ports (eight functions each), 8-15 network cards, then the others.
_PORTS, _NICS, _RNG, _BALLOON = 0x2, 0x8, 0x1C, 0x1D
_UUIDS = uuid.UUID("6a0f6f6c-6c1a-4b55-9c5e-61746f6c6c00")
_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,25}\Z")
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
#: Left out of q35: nothing here uses them, and each costs time at boot.
_STRIPPED = "hpet=off,smbus=off,sata=off,usb=off,vmport=off,dump-guest-core=off"


def command(spec: GuestSpec, files: GuestFiles, taps: Sequence[int | None], *, incoming: bool) -> list[str]:
    """The whole command line. ``taps``: for each network card the descriptor of its tap, None for QEMU's own NAT. Errors: InvalidInput."""
    argv = [BINARY, "-nodefaults", "-no-user-config", "-only-migratable", "-display", "none", "-sandbox", SANDBOX]
    argv += ["-name", f"guest={_quote(spec.instance)},debug-threads=on", "-uuid", str(uuid.uuid5(_UUIDS, spec.instance))]
    argv += ["-pidfile", str(files.pidfile), "-msg", "timestamp=on"]
    argv += _machine(spec)
    argv += _monitors(files)
    for port in range(SLOTS):
        many = ",multifunction=on" if port % 8 == 0 else ""
        where = f"addr=0x{_PORTS + port // 8:x}.{port % 8}{many}"
        argv += ["-device", f"pcie-root-port,id={port_id(port)},bus=pcie.0,{where},chassis={port + 1},slot={port + 1}"]
    first = min((disk.slot for disk in spec.disks), default=-1)
    for disk in sorted(spec.disks, key=lambda d: d.slot):
        device = disk_device(disk)
        if disk.slot == first and not spec.boot.kernel:
            device["bootindex"] = 1
        for secret in secrets(disk):
            argv += ["-object", json.dumps(secret)]
        argv += ["-blockdev", json.dumps(disk_node(disk)), "-device", json.dumps(device)]
    argv += _nics(spec, taps)
    argv += ["-object", "rng-builtin,id=rng0", "-device", f"virtio-rng-pci,id=rng-device0,rng=rng0,bus=pcie.0,addr=0x{_RNG:x}"]
    argv += ["-device", f"virtio-balloon-pci,id=balloon0,bus=pcie.0,addr=0x{_BALLOON:x}"]
    if spec.boot.kernel:
        argv += ["-kernel", spec.boot.kernel]
        argv += ["-initrd", spec.boot.initrd] if spec.boot.initrd else []
        argv += ["-append", spec.boot.append] if spec.boot.append else []
    # Stopped at first: the guest runs when we say so, not when QEMU is ready. A guest that powers itself off leaves its process, so that
    # it can be told from one whose process died.
    argv += ["-S", "-no-shutdown"]
    argv += ["-incoming", "defer"] if incoming else []
    return argv


def _machine(spec: GuestSpec) -> list[str]:
    accelerator = "tcg,tb-size=64" if spec.pin.accelerator == "tcg" else spec.pin.accelerator
    memory = f"{spec.memory >> 20}M" if spec.memory % (1 << 20) == 0 else f"{spec.memory}B"
    return [
        *("-machine", f"{_quote(spec.pin.machine)},{_STRIPPED}", "-accel", accelerator, "-cpu", spec.pin.cpu_model, "-m", f"size={memory}"),
        *("-smp", f"cpus={spec.vcpus},sockets=1,cores={spec.vcpus},threads=1", "-rtc", "base=utc", "-boot", "strict=on"),
        # A guest that suspends to memory or disk by itself cannot be told from one that hangs.
        *("-global", "ICH9-LPC.disable_s3=1", "-global", "ICH9-LPC.disable_s4=1"),
    ]


def _monitors(files: GuestFiles) -> list[str]:
    argv = []
    # A QMP socket serves one client at a time: the watchdog of a migration needs its own.
    for name, path in (("qmp0", files.qmp), ("qmp1", files.watchdog_qmp)):
        argv += ["-chardev", f"socket,id={name},path={_quote(str(path))},server=on,wait=off", "-mon", f"chardev={name},mode=control"]
    log = f"logfile={_quote(str(files.console_log))},logappend=on"
    argv += ["-chardev", f"socket,id=serial0,path={_quote(str(files.serial))},server=on,wait=off,{log}"]
    return [*argv, "-device", "isa-serial,id=serial-device0,chardev=serial0,index=0"]


def _nics(spec: GuestSpec, taps: Sequence[int | None]) -> list[str]:
    if len(spec.nics) > NICS:
        raise InvalidInput(f"a guest can have {NICS} network cards, not {len(spec.nics)}")
    argv = []
    for index, (nic, tap) in enumerate(zip(spec.nics, taps, strict=True)):
        backend = f"user,id=net{index}" if tap is None else f"tap,id=net{index},fd={tap}"
        # No option ROM: guests do not boot from the network, and ROMs of different versions break migrations.
        card = f"virtio-net-pci,id=nic{index},netdev=net{index},mac={nic.mac},romfile=,bus=pcie.0,addr=0x{_NICS + index:x}"
        argv += ["-netdev", backend, "-device", card]
    return argv


def port_id(slot: int) -> str:
    """The root port of a slot."""
    return f"slot{slot}"


def disk_node(disk: GuestDisk) -> dict[str, Any]:
    """The block node of a disk, named as its volume. Errors: InvalidInput (not attached, or a name that QEMU cannot take)."""
    if not _NODE_NAME.match(disk.volume):
        raise InvalidInput(f"{disk.volume!r} cannot be the name of a disk in QEMU", hint="use the volume's id")
    attached = disk.attached
    if attached is None or (attached.blockdev is None and attached.path is None):
        raise InvalidInput(f"the volume {disk.volume} is not attached on this node")
    if attached.blockdev is not None:
        protocol = dict(attached.blockdev)
    else:
        path = str(attached.path)
        protocol = {"driver": "host_device" if path.startswith("/dev/") else "file", "filename": path}
    # The page cache of one node would hide from another what a guest has written.
    protocol.setdefault("cache", {"direct": True, "no-flush": False})
    protocol.setdefault("discard", "unmap")
    read_only = disk.mode == "ro"
    common = {"read-only": read_only, "cache": protocol["cache"], "discard": protocol["discard"]}
    protocol |= {"read-only": read_only, "node-name": f"{disk.volume}-file"}
    return {"driver": "raw", "node-name": disk.volume, **common, "file": protocol}


def secrets(disk: GuestDisk) -> list[dict[str, Any]]:
    """The secrets that opening the disk takes, as QEMU's objects: it reads them from files, so that no command line holds any."""
    found = disk.attached.secrets if disk.attached is not None else {}
    return [{"qom-type": "secret", "id": name, "format": "base64", "file": path} for name, path in sorted(found.items())]


def disk_device(disk: GuestDisk) -> dict[str, Any]:
    """The device of a disk. A failed write stops the guest: it must never go on as if it had been written. Errors: InvalidInput."""
    if not 0 <= disk.slot < SLOTS:
        raise InvalidInput(f"slot {disk.slot} does not exist: a guest has the slots 0 to {SLOTS - 1}")
    return {
        "driver": "virtio-blk-pci",
        "id": disk.volume,
        "drive": disk.volume,
        "bus": port_id(disk.slot),
        "addr": "0x0",
        "serial": disk.volume[:20],
        "werror": "stop",
        "rerror": "stop",
    }


def disk_path(disk: GuestDisk) -> str:
    """The file or device that QEMU itself opens, if there is one."""
    if disk.attached is None:
        return ""
    blockdev = disk.attached.blockdev
    return str(blockdev.get("filename", "")) if blockdev is not None else str(disk.attached.path or "")


def _quote(text: str) -> str:
    """A value in QEMU's own option syntax, where a comma ends it."""
    return text.replace(",", ",,")
