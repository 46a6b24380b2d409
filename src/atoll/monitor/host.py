"""What a machine must have to be a node: an accelerator, QEMU and its tools, a kernel and packages that fit, the guests' user."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.metadata
import os
import platform
import pwd
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from atoll.hypervisor.qemu.command import BINARY
from atoll.hypervisor.qemu.files import account
from atoll.hypervisor.qemu.probe import works
from atoll.model.errors import HostError
from atoll.monitor.checks import Check, error, ok, warning
from atoll.runtime.config import GUEST_UID, Config

#: The oldest QEMU whose options are used, that of Debian 12.
QEMU = (7, 2)
#: Commands that an agent runs, and Debian's package for each.
TOOLS = {"qemu-img": "qemu-utils", "qemu-nbd": "qemu-utils", "qemu-io": "qemu-utils", "setsid": "util-linux", "ip": "iproute2"}
#: QEMU's objects without which migrations are not encrypted.
OBJECTS = ("tls-creds-x509", "authz-simple", "throttle-group")
#: Seconds for a program to say what it can.
_WORDS = 10.0


def machine(config: Config) -> list[Check]:
    """The operating system, Python and its packages, the kernel."""
    found = [*_system(), *_python(), *_kernel()]
    if os.geteuid() != 0:
        why = "what only root may see was left out: keys, other users' processes, the pools' directories"
        found.append(warning("user", f"you are uid {os.geteuid()}, not root", why, "sudo atoll doctor"))
    return found


def _system() -> Iterator[Check]:
    about = "operating system"
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    name = release.get("PRETTY_NAME", "an unknown system")
    number = release.get("VERSION_ID", "")
    if release.get("ID") != "debian" or (number.isdigit() and int(number) < 12):
        yield warning(about, name, "Atoll is tried on Debian 12 and later only", "run nodes on Debian 12 or later")
    else:
        yield ok(about, name)


def _python() -> Iterator[Check]:
    yield ok("Python", platform.python_version())
    try:
        wanted = importlib.metadata.requires("atoll") or []
    except importlib.metadata.PackageNotFoundError:
        yield warning("Python packages", "atoll is not installed as a package", "its requirements cannot be checked", "pip install atoll")
        return
    names = [re.split(r"[^A-Za-z0-9._-]", text)[0] for text in wanted if "extra ==" not in text]
    missing = [name for name in names if not _installed(name)]
    if missing:
        why = "what needs them fails when it is used"
        yield error("Python packages", f"missing: {', '.join(missing)}", why, f"pip install {' '.join(missing)}")
    else:
        yield ok("Python packages", f"all {len(names)} are there")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _kernel() -> Iterator[Check]:
    lacks = []
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        lacks.append("pidfd_open")
    if not _open_file_locks():
        lacks.append("open file description locks")
    if not Path("/proc/self/fdinfo").is_dir():
        lacks.append("/proc")
    release = platform.release()
    if lacks:
        yield error("kernel", f"{release} lacks {', '.join(lacks)}", "processes and images are guarded by these", "boot Debian 12's kernel")
    else:
        yield ok("kernel", f"{release} {platform.machine()}")
    if not Path("/dev/net/tun").exists():
        why = "network cards with mode=bridged need it; those with mode=user do not"
        yield warning("network devices", "there is no /dev/net/tun", why, "modprobe tun")


def _open_file_locks() -> bool:
    try:
        with open("/proc/self/exe", "rb") as file:
            # struct flock: type, whence, start, length, pid.
            fcntl.fcntl(file, fcntl.F_OFD_GETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0))
    except OSError:
        return False
    return True


def guests(config: Config) -> list[Check]:
    """QEMU, what it can do here, and the user that guests run as."""
    found = list(_user(config))
    if config.hypervisor == "fake":
        return [*found, ok("hypervisor", "fake: no QEMU is needed")]
    found += _tools()
    if shutil.which(BINARY):
        found += [*_qemu(), *_accelerator(config)]
    return found


def _tools() -> Iterator[Check]:
    wanted = {BINARY: "qemu-system-x86", **TOOLS}
    missing = {name: package for name, package in wanted.items() if not shutil.which(name)}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        yield error("programs", f"missing: {', '.join(missing)}", "guests and copies of disks need them", f"apt install {packages}")
    else:
        yield ok("programs", "all are there")


def _said(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=_WORDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _qemu() -> Iterator[Check]:
    words = _said(BINARY, "--version")
    match = re.search(r"version (\d+)\.(\d+)[^\s,]*", words)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < QEMU:
        what = words.splitlines()[0] if words.strip() else f"{BINARY} --version says nothing"
        why = f"options of QEMU {QEMU[0]}.{QEMU[1]} are used; all nodes of a group should have the same"
        yield error("QEMU", what, why, "apt install qemu-system-x86")
        return
    objects = _said(BINARY, "-object", "help")
    lacks = [name for name in OBJECTS if name not in objects]
    if "sandbox" not in _said(BINARY, "-h"):
        lacks.append("-sandbox")
    if lacks:
        why = "guests are not started, or not migrated, without"
        yield error("QEMU", f"it was built without {', '.join(lacks)}", why, "apt install qemu-system-x86")
    else:
        yield ok("QEMU", match[0].removeprefix("version ") if match else words)


def _accelerator(config: Config) -> Iterator[Check]:
    about = "accelerator"
    try:
        owner = account(config.guest_user)
    except HostError:
        owner = None
    if os.access("/dev/kvm", os.R_OK | os.W_OK) and asyncio.run(works("kvm", owner)):
        yield ok(about, "kvm works: a guest ran with it")
        return
    slow = "guests are emulated: ten times slower, or worse"
    if not asyncio.run(works("tcg", owner)):
        what = "no guest comes to its end, neither with kvm nor emulated"
        yield error(about, what, "nothing can run here", f"{BINARY} -version; dmesg | tail")
    elif not Path("/dev/kvm").exists():
        flags = set(re.findall(r"\b(?:vmx|svm)\b", _read("/proc/cpuinfo")))
        next_ = ("modprobe kvm_intel || modprobe kvm_amd",) if flags else ("switch virtualisation on in the machine's firmware",)
        yield warning(about, "there is no /dev/kvm", slow, *next_)
    else:
        user = owner.name if owner else "root"
        allowed = (f"usermod -aG kvm {user}",) if owner else ()
        what = f"/dev/kvm is there, but no guest runs with it as {user}"
        yield warning(about, what, slow, *allowed, "ls -l /dev/kvm; dmesg | grep -i kvm")


def _user(config: Config) -> Iterator[Check]:
    about = "guests' user"
    if not config.guest_user:
        yield ok(about, "guests run as the agent's user")
        return
    try:
        entry = pwd.getpwnam(config.guest_user)
    except KeyError:
        # Before a node joins that is as it should be.
        why = "guests run as this user; joining makes it"
        command = f"useradd --system --no-create-home --uid {GUEST_UID} --user-group {config.guest_user}"
        yield (error if config.node else warning)(about, f"there is no user {config.guest_user}", why, command)
        return
    if entry.pw_uid == 0:
        why = "a guest that breaks out of QEMU would own the node"
        yield error(about, f"{config.guest_user} is root", why, "set guest_user to another user in /etc/atoll/atoll.toml")
    elif entry.pw_uid != GUEST_UID and config.guest_user == "atoll-guest":
        why = f"on other nodes it may be {GUEST_UID}: files on a share then belong to different users"
        command = f"with no guest here: usermod -u {GUEST_UID} {config.guest_user}"
        yield warning(about, f"{config.guest_user} has uid {entry.pw_uid}", why, command)
    else:
        yield ok(about, f"{config.guest_user} (uid {entry.pw_uid})")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
