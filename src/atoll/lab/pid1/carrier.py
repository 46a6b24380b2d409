"""The first process, outside, of a kernel node: carries an emulated machine in namespaces of its own, and its end is a power cut.

first process (namespaces: mount, pid; the switch's network)
  virtiofsd root   this machine's root, which the guest mounts to be read
  virtiofsd lab    the node's directory and the shared storage, to be written
  qemu             Debian's kernel; its ``ready`` port tells when the node inside is made
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
from pathlib import Path

from atoll.lab.pid1.nodespec import KernelSpec, NodeSpec
from atoll.lab.pid1.syscalls import MNT_DETACH, MS_BIND, MS_NOSUID, MS_REC, MS_SLAVE, mount, mount_disk, umount

#: How many programs can be run in the node at the same time from outside; others wait for their turn.
PORTS = 16
_PROGRAM = Path(__file__).with_name("inside.py")
#: Seconds until the node inside is made.
_BOOT = 150.0
#: RDRAND, as Linux waits for random numbers at its start; no AES, whose emulation the kernel's driver does not survive.
_CPU = "qemu64,+rdrand,+ssse3,+sse4.1,+sse4.2,+popcnt"


def carry(spec: NodeSpec, directory: Path) -> int:
    """Start it all; the pid of QEMU when the node inside has said that it is ready. The caller is alone in fresh namespaces.

    Raises OSError or RuntimeError with what the guest or QEMU said.
    """
    kernel = spec.kernel
    assert kernel is not None
    mount("none", "/", flags=MS_REC | MS_SLAVE)
    _let_go(directory)
    shown = directory / "root"
    mount("atoll-node", str(shown), "tmpfs", MS_NOSUID, "mode=700,size=1m")
    for name in ("node", "shared"):
        (shown / name).mkdir()
    mount(str(directory), str(shown / "node"), flags=MS_BIND)
    mount_disk(spec.shared, str(shown / "shared"), "xfs")
    sockets = directory / "run"
    os.chdir(sockets)
    _serve_files(kernel, "root.sock", "/", ["cache=always", "no_posix_lock", "no_flock"])
    _serve_files(kernel, "lab.sock", str(shown), ["cache=none", "posix_lock", "flock", "allow_direct_io", "announce_submounts"])
    with socket.socket(socket.AF_UNIX) as told:
        told.bind("ready.sock")
        told.listen(1)
        qemu = subprocess.Popen(_command(spec, kernel), stdin=subprocess.DEVNULL)
        _hear(told, qemu)
    return qemu.pid


def _let_go(directory: Path) -> None:
    """Hold nothing that others have mounted for a while: what is unmounted outside would stay in use here, where that is not told."""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as table:
        points = [line.split()[1].encode("utf-8", "surrogateescape").decode("unicode_escape") for line in table]
    for point in reversed(points):
        if point.startswith(("/tmp/", "/var/tmp/")) and not f"{directory}/".startswith(f"{point}/"):
            umount(point, MNT_DETACH)


def end_with(pid: int) -> None:
    """Return when this child has ended, reaping every other meanwhile."""
    while os.waitpid(-1, 0)[0] != pid:
        pass


def _serve_files(kernel: KernelSpec, name: str, source: str, options: list[str]) -> None:
    """QEMU connects to the socket, which is bound here: one that virtiofsd binds is locked by its name, machine-wide."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name)
        listening.listen(1)
        argv = [kernel.virtiofsd, f"--fd={listening.fileno()}", "--thread-pool-size=0", "-f"]
        for option in (f"source={source}", "sandbox=chroot", *options):
            argv += ["-o", option]
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=[listening.fileno()])


def _command(spec: NodeSpec, kernel: KernelSpec) -> list[str]:
    words = ["console=ttyS0", "quiet", "nokaslr", "mitigations=off", "panic=1", "reboot=t", "random.trust_cpu=on", "net.ifnames=0"]
    words += [f"lab.modules={kernel.modules}", f"lab.python={kernel.python}", f"lab.program={_PROGRAM}"]
    argv = ["qemu-system-x86_64", "-name", f"{spec.lab}-{spec.node}", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-accel", "tcg,tb-size=128", "-cpu", _CPU, "-smp", "1", "-m", str(kernel.memory)]
    argv += ["-machine", "q35,hpet=off,smbus=off,sata=off,usb=off,memory-backend=ram"]
    argv += ["-object", f"memory-backend-memfd,id=ram,share=on,size={kernel.memory}M"]
    argv += ["-kernel", kernel.kernel, "-initrd", kernel.initrd, "-append", " ".join(words)]
    argv += ["-chardev", "file,id=console,path=../log/console.log,append=on", "-serial", "chardev:console"]
    argv += ["-qmp", "unix:qmp.sock,server=on,wait=off"]
    for tag in ("root", "lab"):
        argv += ["-chardev", f"socket,id={tag},path={tag}.sock", "-device", f"vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"]
    argv += ["-device", f"virtio-serial-pci,max_ports={PORTS + 2}", "-device", "virtio-rng-pci"]
    argv += ["-chardev", "socket,id=ready,path=ready.sock", "-device", "virtserialport,chardev=ready,name=lab.ready"]
    for number in range(1, PORTS + 1):
        argv += ["-chardev", f"socket,id=p{number},path=port{number}.sock,server=on,wait=off"]
        argv += ["-device", f"virtserialport,chardev=p{number},name=lab.port{number}"]
    argv += ["-netdev", f"tap,id=cable,ifname={spec.node},script=no,downscript=no"]
    argv += ["-device", f"virtio-net-pci,netdev=cable,mac={kernel.mac},romfile="]
    for number, path in enumerate(kernel.disks):
        # What the guest has flushed outlives it; what its kernel had not written out is lost with it.
        argv += ["-drive", f"file={path.replace(',', ',,')},if=none,id=d{number},format=raw,cache=writeback,discard=unmap"]
        argv += ["-device", f"virtio-blk-pci,drive=d{number}"]
    return argv


def _hear(told: socket.socket, qemu: subprocess.Popen[bytes]) -> None:
    """Until the node inside says ``ready``. QEMU connects at its start and hangs up at its end, whichever way that comes."""
    ended = os.pidfd_open(qemu.pid)
    try:
        if told.fileno() not in select.select([told.fileno(), ended], [], [], _BOOT)[0]:
            raise RuntimeError("its machine does not start; see log/init.log")
        connection = told.accept()[0]
        with connection:
            connection.settimeout(_BOOT)
            said = connection.recv(4096).decode(errors="replace")
    except TimeoutError:
        raise RuntimeError(f"it did not boot within {_BOOT:.0f} s; see log/console.log") from None
    finally:
        os.close(ended)
    if said != "ready":
        raise RuntimeError(said or "its machine ended; see log/console.log and log/init.log")
