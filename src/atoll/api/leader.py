"""What an API needs of the master that leads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from atoll.api.events import Hub
from atoll.model.messages import NodeReport, Progress
from atoll.model.objects import Job
from atoll.operations.state import State


@dataclass(frozen=True)
class Submission:
    """The answer to a request: the job, or what it would do (``dry_run``). ``repeated``: this key was submitted before."""

    job: int | None
    summary: str
    repeated: bool = False
    shared: tuple[str, ...] = ()
    exclusive: tuple[str, ...] = ()
    #: What a dry run of some operations tells besides: ``lines``, ``survives`` and ``warnings``.
    plan: dict[str, list[str]] | None = None


@dataclass(frozen=True)
class Finding:
    """Something that ``cluster verify`` found: what, on which object, since when, and what to type."""

    severity: str
    what: str
    about: str
    why: str
    since: float | None
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Caller:
    """Who asks: a name for the audit and a role."""

    name: str
    role: str


@dataclass(frozen=True)
class JoinAnswer:
    """What a node gets when it joins: its certificate, the CA's, and its place in the cluster."""

    node: str
    cluster: str
    certificate: str
    ca: str
    masters: tuple[str, ...] = ()
    hypervisor: str = "qemu"
    extra: dict[str, str] = field(default_factory=dict)


class Leader(Protocol):
    """The master that leads. All calls raise AtollError; NotLeader when another leads."""

    @property
    def state(self) -> State:
        """The cluster as it is: stored objects (``state.store``) and what agents report (``state.alive``, ``state.report``)."""

    @property
    def events(self) -> Hub:
        """What changes, as it changes."""

    async def submit(
        self, operation: str, target: str, request: dict[str, Any], *, who: Caller, key: str = "", dry_run: bool = False
    ) -> Submission:
        """Check a request and make it a job, durably. ``target`` is a name or id, or empty. The same key and request give the same
        job again; the same key with another request is KeyReused."""

    async def cancel_job(self, job: int) -> None:
        """Ask a job to stop: it is undone; past its commit it goes on. Ended = WrongState."""

    async def resume_job(self, job: int, node_is_dead: str | None = None) -> None:
        """Let a job that needs attention try again. ``node_is_dead``: the human's word for this node, refused if it answers."""

    async def undo_job(self, job: int) -> None:
        """Undo a job that needs attention. Past its commit: WrongState."""

    async def wait_job(self, job: int, seconds: float) -> tuple[Job, Progress]:
        """The job and how far it is, when it has changed (state or progress) or after ``seconds``."""

    def job_progress(self, job: int) -> Progress:
        """How far a job is."""

    async def verify(self) -> list[Finding]:
        """Look at everything: strangers, half-made things, missing things, held things."""

    def facts(self, node: str) -> dict[str, Any]:
        """What a node (by id) needs to look at itself."""

    async def doctor(self) -> list[dict[str, Any]]:
        """What each node finds when it looks at itself: ``node``, ``level`` (error, warning, ok), ``about``, ``what``, ``why``,
        ``commands``."""

    async def logs(self, node: str) -> dict[str, str]:
        """The end of the logs of a node (by id), by name, without secrets. Errors: Unreachable, NotFound (its agent is too old)."""

    async def os_definitions(self) -> list[dict[str, Any]]:
        """The OS definitions on the nodes, as they tell of them now: name, variants, parameters, nodes, and problems."""

    async def storage_status(self, target: str) -> dict[str, Any]:
        """What a storage cluster says of itself now: health, quorum, daemons.

        Errors: NotFound; Unreachable when none of its nodes can tell."""

    async def pool_images(self, target: str) -> list[dict[str, Any]]:
        """What lies in a pool now, other people's images included: name, size, who has it open, its snapshots, and the volume that it is.

        Errors: NotFound, NotSupported; those of the storage."""

    async def join_token(self, name: str, group: str | None, rejoin: bool = False) -> str:
        """A token with which the node ``name`` may join once within 15 minutes. ``rejoin``: a node of the cluster that does not answer
        comes back with it. Errors: AlreadyExists, NodeAnswers."""

    async def api_token(self, name: str, role: str, days: int | None = None) -> str:
        """A new API token; shown once, kept as a hash. Good for ``days``, or until it is revoked. Errors: AlreadyExists."""

    def api_tokens(self) -> list[dict[str, Any]]:
        """The API tokens by name: role, when they were made and when they end; never the token itself."""

    async def revoke_token(self, name: str) -> None:
        """Forget an API token; it is refused from now on. Errors: NotFound."""

    async def join(self, token: str, name: str, address: str, port: int, csr: str) -> JoinAnswer:
        """A node joins. Errors: TokenInvalid, AlreadyExists."""

    async def report(self, node: str, report: NodeReport) -> dict[str, Any]:
        """A node's heartbeat; the answer tells the term and what the agent should know."""

    def caller_of_token(self, token: str) -> Caller:
        """Who has this API token. Errors: Unauthenticated."""

    def node_of_serial(self, serial: str, ident: str = "", issued: float = 0.0) -> str:
        """The id of the node with this certificate, which says that it is for ``ident`` and was ``issued`` then.
        Errors: Forbidden (removed nodes, and replaced certificates, are refused by serial)."""
