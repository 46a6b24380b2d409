"""What labs of real nodes and labs of plain processes have in common."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from atoll.lab import services
from atoll.lab.host import marked, send
from atoll.lab.layout import MARKER_VARIABLE, marker
from atoll.lab.pid1.nodespec import NodeSpec
from atoll.model.errors import DeadlineExceeded, HostError, NodeUnavailable, NotFound, WrongState

#: The directory of the ``atoll`` package's parent: nodes run the same code as the lab's commands.
SOURCE = Path(__file__).resolve().parents[2]

Say = Callable[[str], None]


def quiet(_: str) -> None:
    """Progress for nobody."""


@dataclass
class LabRecord:
    """``lab.json``: what cannot be seen by looking at the system."""

    name: str
    nodes: list[str]
    rootless: bool
    #: The first three numbers of its addresses.
    net: str
    #: Spare disks per node.
    disks: int = 0
    #: Directories of the machine that nodes see besides those they always see.
    binds: list[str] | None = None
    #: Which of its nodes have a kernel of their own.
    kernel: list[str] | None = None
    #: A cluster was made in it, with this hypervisor.
    cluster: str = ""

    def write(self, directory: Path) -> None:
        """Whole or not at all."""
        partial = directory / "lab.json.new"
        partial.write_text(json.dumps(asdict(self), indent=1))
        os.replace(partial, directory / "lab.json")

    @classmethod
    def read(cls, directory: Path) -> LabRecord:
        """Raises NotFound when there is no such lab."""
        try:
            return cls(**json.loads((directory / "lab.json").read_text()))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            raise NotFound(f"there is no lab {directory.name} in {directory.parent}", hint="atoll lab list") from None


def environment(lab: str, node: str, config: str, *, rootless: bool = False) -> dict[str, str]:
    """What a node's programs find in their environment: the interpreter and code of the lab's commands first."""
    found = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOME": os.path.expanduser("~"),
        "ATOLL_CONFIG": config,
        MARKER_VARIABLE: marker(lab, node, rootless=rootless),
    }
    if SOURCE.name != "site-packages":
        found["PYTHONPATH"] = str(SOURCE)
    return found


class BaseNode(ABC):
    """One node of a lab. Nothing is kept in memory but its name: every question is put to the system."""

    #: Plain processes instead of namespaces.
    rootless = False
    #: Its programs do not run on this machine's kernel.
    own_kernel = False
    #: How many times as long as elsewhere its programs take; deadlines of those who wait for it grow with it.
    slowness = 1

    def __init__(self, directory: Path, lab: str) -> None:
        self.directory = directory
        self.lab = lab
        self.name = directory.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.lab}/{self.name}>"

    @property
    def spec(self) -> NodeSpec:
        """What its first process was told at the last boot."""
        try:
            return NodeSpec.read(self.directory)
        except FileNotFoundError:
            raise NotFound(f"the lab {self.lab} has no node {self.name}", hint=f"atoll lab status {self.lab}") from None

    @property
    def address(self) -> str:
        """By which the other nodes reach it."""
        return self.spec.address

    @property
    def run_dir(self) -> Path:
        """The node's run directory (sockets) as the machine sees it; empty after a boot."""
        return self.directory / "run"

    @property
    def log_dir(self) -> Path:
        """The node's logs as the machine sees them: one file per service, and ``init.log``. They survive everything but ``down``."""
        return self.directory / "log"

    @property
    @abstractmethod
    def config_path(self) -> str:
        """The node's atoll.toml, as the node sees it."""

    @abstractmethod
    def write_config(self, text: str) -> None:
        """Write the node's atoll.toml."""

    @property
    def running(self) -> bool:
        """Whether it has power."""
        return self._find() != 0

    @property
    def pid(self) -> int:
        """Its first process, as the machine sees it. Raises NodeUnavailable when it has no power."""
        found = self._find()
        if not found:
            raise NodeUnavailable(f"{self.name} of the lab {self.lab} has no power", hint=f"atoll lab boot {self.name}")
        return found

    def _find(self) -> int:
        # The one that starts a node carries the marker too, for a moment; it is no node.
        candidates = marked(self.lab, rootless=self.rootless).items()
        return next((pid for pid, known in candidates if known == (self.lab, self.name) and self._is_first(pid)), 0)

    @abstractmethod
    def _is_first(self, pid: int) -> bool: ...

    # --- programs in it ---

    @abstractmethod
    def command(self, argv: Sequence[str], *, bound: bool = True) -> list[str]:
        """The command line, on the machine, that runs ``argv`` in the node. ``bound``: the program dies when this command is killed."""

    def environ(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The caller's environment with the node's over it; settings for the machine's own Atoll do not pass."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ATOLL_")}
        return kept | self.spec.environment | dict(extra or {})

    def exec(
        self,
        argv: Sequence[str],
        *,
        check: bool = False,
        text: bool = True,
        capture_output: bool = True,
        timeout: float | None = 60.0,
        env: Mapping[str, str] | None = None,
        **more: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """``subprocess.run`` in the node. ``env`` is added to the node's. Raises DeadlineExceeded after ``timeout`` seconds.

        With ``check`` a program that fails raises HostError with its last words.
        """
        capture = capture_output and not {"stdout", "stderr"} & more.keys()
        try:
            done = subprocess.run(
                self.command(argv), check=False, text=text, capture_output=capture, timeout=timeout, env=self.environ(env), **more
            )
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"{argv[0]} on {self.name} did not end within {timeout} s", hint="look at its logs") from None
        if check and done.returncode:
            said = (done.stderr or done.stdout or "") if text else ""
            words = said.strip() or f"exit status {done.returncode}"
            raise HostError(f"{' '.join(argv[:6])} on {self.name}: {words}", hint=f"atoll lab exec {self.name} -- ...")
        return done

    def popen(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **more: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen`` in the node. Killing it kills the program, by SIGKILL whatever signal was sent."""
        return subprocess.Popen(self.command(argv), env=self.environ(env), **more)

    def host_pid(self, inside: int) -> int:
        """The machine's number for a process of the node, such as one from a pid file; 0 when it is gone."""
        return services.outside(self.pid, inside)

    # --- services ---

    def order(self, request: Mapping[str, Any], deadline: float = 20.0) -> list[dict[str, Any]]:
        """Give an order to its first process; the state of all services comes back. Raises NodeUnavailable, HostError."""
        return services.order(self.directory, request, deadline)

    def services(self) -> list[services.ServiceStatus]:
        """Raises NodeUnavailable when it has no power."""
        return services.statuses(self.directory, self.pid)

    def service_pid(self, name: str) -> int:
        """The pid of a service on the machine; 0 when it does not run at the moment."""
        services.require(self.directory, name)
        return next((status.pid for status in self.services() if status.name == name), 0)

    def kill_service(self, name: str, number: int) -> int:
        """Send a signal to a service (not to its children) and return its pid; unless it was SIGSTOP, the node starts it again.

        Raises WrongState when it does not run.
        """
        pid = self.service_pid(name)
        if not pid or not send(pid, number):
            raise WrongState(f"the service {name} of {self.name} does not run", hint=f"atoll lab status {self.lab}")
        return pid

    def set_service(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Define a service, started now (if the node has power) and at each boot; a known one gets the new command at its next start."""
        services.define(self.directory, name, argv, env)
        if self.running:
            self.order({"order": "load"})

    def stop_service(self, name: str, grace: float = 10.0) -> None:
        """SIGTERM, and SIGKILL ``grace`` seconds later; returns when it has ended. It stays stopped until started or the next boot."""
        services.require(self.directory, name)
        self.order({"order": "stop", "name": name, "grace": grace}, deadline=grace + 20)

    def start_service(self, name: str) -> None:
        """Start a stopped service, or one that waits to be started again."""
        services.require(self.directory, name)
        self.order({"order": "start", "name": name})

    # --- power and network ---

    @abstractmethod
    def kill(self) -> None:
        """Cut its power."""

    @abstractmethod
    def boot(self) -> None:
        """Give it power again."""

    @abstractmethod
    def cut(self) -> None:
        """Pull its network cable."""

    @abstractmethod
    def heal(self) -> None:
        """Plug its network cable in again."""

    def clear_run_dir(self) -> None:
        """What a boot does to the run directory. The directory itself stays: it may be in use as a mount's source."""
        for entry in self.run_dir.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


N = TypeVar("N", bound=BaseNode)


class BaseLab(ABC, Generic[N]):
    """A lab. ``create`` and ``load`` of the two kinds make one; several objects may speak of the same lab at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = directory.name
        self.record = LabRecord.read(directory)

    @property
    def nodes(self) -> list[N]:
        """In order."""
        return [self.node(name) for name in self.record.nodes]

    @property
    @abstractmethod
    def shared(self) -> str:
        """The shared directory, as nodes see it."""

    @abstractmethod
    def _node(self, name: str) -> N: ...

    def node(self, name: str) -> N:
        """Raises NotFound."""
        if name not in self.record.nodes:
            have = ", ".join(self.record.nodes)
            raise NotFound(f"the lab {self.name} has no node {name}; it has {have}", hint=f"atoll lab status {self.name}")
        return self._node(name)

    @abstractmethod
    def down(self) -> None:
        """Remove everything that belongs to it."""
