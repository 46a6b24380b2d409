"""What Atoll has to do with systemd: its units, and telling that a daemon is ready."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from atoll.model.errors import HostError
from atoll.runtime.config import DEFAULT_PATH

_MASTER = """\
[Unit]
Description=Atoll master: decides about the cluster
Documentation=man:atoll-master(8)
After=network-online.target time-sync.target
Wants=network-online.target
# A master that cannot start now may be able to in a minute: never give up.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={bin}/atoll-master
{environment}Restart=always
RestartSec=1
# Deposed: another master has taken over, and this one never leads again.
RestartPreventExitStatus=10
TimeoutStartSec=120
TimeoutStopSec=30
UMask=0077
LimitNOFILE=65536
OOMScoreAdjust=-900
NoNewPrivileges=yes
ProtectHome=yes
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""

_AGENT = """\
[Unit]
Description=Atoll agent: runs guests and disks of this node
Documentation=man:atoll-agent(8)
After=network-online.target remote-fs.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={bin}/atoll-agent
{environment}Restart=always
RestartSec=1
TimeoutStartSec=120
TimeoutStopSec=30
# Only the agent itself is stopped: guests run in its control group and must outlive it.
KillMode=process
# The default would stop the agent when the kernel kills a guest for want of memory.
OOMPolicy=continue
OOMScoreAdjust=-900
UMask=0077
LimitNOFILE=1048576
LimitMEMLOCK=infinity
TasksMax=infinity

[Install]
WantedBy=multi-user.target
"""


def units(bin_dir: str = "/usr/bin", config: str = DEFAULT_PATH) -> dict[str, str]:
    """File name -> text of the units; they belong in /etc/systemd/system."""
    environment = "" if config == DEFAULT_PATH else f"Environment=ATOLL_CONFIG={config}\n"
    return {
        "atoll-master.service": _MASTER.format(bin=bin_dir, environment=environment),
        "atoll-agent.service": _AGENT.format(bin=bin_dir, environment=environment),
    }


def notify(state: str) -> bool:
    """Send lines such as ``STATUS=...`` (sd_notify(3)) to systemd; False when nobody asked for them. Errors: HostError."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(5)
            sock.sendto(state.encode(), address)
    except OSError as error:
        raise HostError(f"cannot tell systemd {state!r}: {error}") from None
    return True


def notify_ready() -> bool:
    """Tell systemd that the daemon serves now; without systemd this does nothing."""
    return notify("READY=1")


def running_under_systemd() -> bool:
    """Whether systemd started this process as a service."""
    return "INVOCATION_ID" in os.environ and booted_with_systemd()


def booted_with_systemd() -> bool:
    """Whether systemd runs this machine (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()
