"""The one error tree.

Every error has a stable ``code``, an HTTP ``status``, a process ``exit_code`` and a ``hint`` (what to type next). The table in
docs/reference/errors.md is generated from here. Messages say what happened and why; hints may name commands.
"""

from __future__ import annotations

from typing import Any, ClassVar


class AtollError(Exception):
    """Something went wrong that no narrower error describes."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = "atoll cluster verify"

    def __init__(self, message: str = "", *, hint: str | None = None, **details: Any) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())
        self.message = str(self)
        self.hint = self.default_hint if hint is None else hint
        self.details = details

    def to_wire(self) -> dict[str, Any]:
        """The error as JSON-able data; ``from_wire`` turns it back."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}


# --- what was asked for cannot be asked for (exit 2) ---


class InvalidInput(AtollError):
    """The request is not well formed."""

    code, status, exit_code, default_hint = "invalid_input", 422, 2, "see --help of the command"


class MalformedRequest(InvalidInput):
    """The request body is not JSON of the expected form."""

    code, status, default_hint = "malformed_request", 400, "send a JSON object; the schema is at /v1/openapi.json"


class RequestTooLarge(InvalidInput):
    """The request body is larger than 1 MiB."""

    code, status, default_hint = "request_too_large", 413, "send less than 1 MiB"


class MethodNotAllowed(InvalidInput):
    """This address exists, but not with this HTTP method."""

    code, status, default_hint = "method_not_allowed", 405, "the methods are at /v1/openapi.json"


class InvalidSize(InvalidInput):
    """A size is zero, negative, or larger than the driver can store."""

    code, default_hint = "invalid_size", "give a size with a unit, such as 10G"


class ShrinkRefused(InvalidSize):
    """A volume can grow only: the new size is smaller than the present one."""

    code, default_hint = "shrink_refused", "atoll volume info VOLUME shows the present size"


# --- who is asking (exit 3) ---


class Unauthenticated(AtollError):
    """No valid credential came with the request."""

    code, status, exit_code = "unauthenticated", 401, 3
    default_hint = "set ATOLL_TOKEN_FILE, or run as root on a master"


class Forbidden(AtollError):
    """This credential may not do that."""

    code, status, exit_code, default_hint = "forbidden", 403, 3, "ask for a token with a higher role"


class TokenInvalid(Unauthenticated):
    """The join token is unknown, expired, already used, or was made for another node."""

    code, status, default_hint = "token_invalid", 403, "atoll node token NAME"


class StaleTerm(AtollError):
    """A master with an older term gave an order; it has been replaced and is refused."""

    code, status, exit_code, default_hint = "stale_term", 409, 4, "atoll cluster info shows the present master"


class StaleGeneration(AtollError):
    """The order carries a generation that this node has promised to refuse."""

    code, status, exit_code, default_hint = "stale_generation", 409, 4, "atoll instance info INSTANCE"


class StaleTurn(AtollError):
    """A later job has worked on the instance here since; this order is a late copy of an earlier job's."""

    code, status, exit_code, default_hint = "stale_turn", 409, 4, "atoll job list"


class StepUndone(AtollError):
    """This step was undone already; a late copy of its order is refused."""

    code, status, exit_code, default_hint = "step_undone", 409, 4, "atoll job info JOB"


# --- names and existence (exit 5) ---


class NotFound(AtollError):
    """No such object."""

    code, status, exit_code, default_hint = "not_found", 404, 5, "list the objects of that kind"


class AlreadyExists(AtollError):
    """That name is taken."""

    code, status, exit_code, default_hint = "already_exists", 409, 5, "choose another name"


class AmbiguousPool(AtollError):
    """More than one pool fits."""

    code, status, exit_code, default_hint = "ambiguous_pool", 409, 5, "name one: -t DRIVER:POOL"


# --- state forbids it (exit 6) ---


class WrongState(AtollError):
    """The object is not in a state that allows this."""

    code, status, exit_code, default_hint = "wrong_state", 409, 6, "look at its state with info"


class InUse(WrongState):
    """The object is in use."""

    code, default_hint = "in_use", "info shows what uses it"


class DiskInUse(InUse):
    """Somebody writes to this disk, and it is not who should."""

    code, default_hint = "disk_in_use", "atoll cluster verify shows who; stop that writer first"


class NotSupported(WrongState):
    """The driver cannot do that."""

    code, default_hint = "not_supported", "atoll pool info POOL shows what its driver can"


class NotMobile(NotSupported):
    """The instance has disks that only its present node can reach."""

    code, default_hint = "not_mobile", "atoll instance move INSTANCE -n NODE copies the disks too"


class Held(WrongState):
    """A job that needs attention holds this."""

    code, status, default_hint = "held", 423, "atoll job info JOB shows the reason and what releases it"


class Conflict(WrongState):
    """It exists already, but differs from what was asked for."""

    code, default_hint = "conflict", "atoll cluster verify"


class KeyReused(Conflict):
    """This idempotency key came earlier with another request."""

    code, default_hint = "idempotency_key_reused", "use a new key for a new request"


class NeedsProof(WrongState):
    """Nothing proves that the guest does not run on a node that cannot be asked."""

    code, default_hint = "needs_proof", "make sure that the node is off, then repeat with --node-is-dead"


class NodeAnswers(WrongState):
    """The node was called dead, but it answers."""

    code, default_hint = "node_answers", "leave --node-is-dead away"


class StorageWouldStop(InUse):
    """Without this node, the storage cluster could not serve its clients any more."""

    code, default_hint = "storage_would_stop", "atoll storage status STORAGE"


class PreflightFailed(WrongState):
    """Something on the nodes stands against it; all of it is named, and nothing was changed."""

    code, default_hint = "preflight_failed", "put these right, then repeat the command"


# --- something is not there or full (exit 7) ---


class NodeUnavailable(AtollError):
    """The node is offline, drained, or cannot be reached."""

    code, status, exit_code, default_hint = "node_unavailable", 409, 7, "atoll node list"


class VersionMismatch(AtollError):
    """Master and agent are more than one version apart; nothing was done."""

    code, status, exit_code, default_hint = "version_mismatch", 409, 7, "see docs/howto/upgrade.md"


class NoPlace(AtollError):
    """No node can take this instance."""

    code, status, exit_code, default_hint = "no_place", 409, 7, "atoll node list shows memory and state"


class PoolNotReachable(AtollError):
    """The node group cannot reach this pool."""

    code, status, exit_code, default_hint = "pool_not_reachable", 409, 7, "atoll pool connect POOL GROUP"


class PoolUnavailable(AtollError):
    """The pool's storage is not there: not mounted, stopped, or not answering."""

    code, status, exit_code, default_hint = "pool_unavailable", 503, 7, "atoll pool check POOL"


class PoolFull(AtollError):
    """The pool has not enough free space."""

    code, status, exit_code, default_hint = "pool_full", 507, 7, "atoll pool info POOL"


class PoolObserved(AtollError):
    """The pool is only looked at: nothing is ever written to it."""

    code, status, exit_code, default_hint = "pool_observed", 409, 6, "docs/howto/observe-a-pool.md"


class PoolUnhealthy(AtollError):
    """The pool's storage says that it must not be given more now: it is nearly full, or not all of it works."""

    code, status, exit_code, default_hint = "pool_unhealthy", 503, 7, "atoll storage status"


# --- outcome not known, time, life of jobs (exit 8) ---


class Unreachable(AtollError):
    """No answer came; whether the order was carried out is not known."""

    code, status, exit_code, default_hint = "unreachable", 503, 8, "atoll node list"


class DeadlineExceeded(AtollError):
    """It took longer than allowed; whether it was carried out is not known."""

    code, status, exit_code, default_hint = "deadline_exceeded", 504, 8, "atoll job info JOB"


class TooManyStreams(AtollError):
    """As many clients follow the events as this master allows."""

    code, status, exit_code, default_hint = "too_many_streams", 503, 8, "close some, or ask now and then instead: atoll job info JOB"


class Cancelled(AtollError):
    """Somebody cancelled the job."""

    code, status, exit_code, default_hint = "cancelled", 409, 8, "nothing is left to do"


class NeedsAttention(AtollError):
    """The job cannot decide safely what to do next; a person has to."""

    code, status, exit_code, default_hint = "needs_attention", 409, 8, "atoll job info JOB"


class BrokenOff(AtollError):
    """The master was lost while this job was under way; what it left is not known."""

    code, status, exit_code, default_hint = "broken_off", 409, 8, "atoll cluster verify shows what is left of it"


class NotLeader(AtollError):
    """Another master leads, or this one was deposed."""

    code, status, exit_code, default_hint = "not_leader", 503, 8, "try the master that leads"


class Deposed(NotLeader):
    """Another master has taken over from this one."""

    code, status, exit_code = "deposed", 503, 10
    default_hint = "let this node be a candidate of the new master: systemctl disable --now atoll-master"


# --- the host (exit 9) ---


class HostError(AtollError):
    """The operating system refused something."""

    code, status, exit_code, default_hint = "host_error", 500, 9, "look at the message and the log of the agent"


class StorageRefused(HostError):
    """A storage cluster has refused a command; its words are in the message."""

    code, default_hint = "storage_refused", "atoll storage status STORAGE"


class StoreError(AtollError):
    """The store cannot be used."""

    code, status, exit_code, default_hint = "store_error", 500, 9, "see docs/howto/restore-the-master.md"


class StoreFull(StoreError):
    """The file system of the store is full. Nothing was written; reads are answered, and it goes on by itself once there is room."""

    code, status, default_hint = "store_full", 507, "make room on the master's /var/lib/atoll: df"


class StoreDamaged(StoreError):
    """The store's files are damaged, or changes that were acknowledged are missing from them; the master does not use them."""

    code = "store_damaged"
    default_hint = "atoll cluster master-failover on a candidate, or atoll cluster restore FILE: docs/howto/restore-the-master.md"


class StoreLocked(StoreError):
    """Another master uses this store."""

    code, default_hint = "store_locked", "stop the other master first"


class GuestError(AtollError):
    """The hypervisor refused or failed."""

    code, status, exit_code, default_hint = "guest_error", 500, 9, "atoll instance info INSTANCE; the agent's log has QEMU's words"


class MigrationFailed(GuestError):
    """The migration did not complete; the guest runs on at its source."""

    code, default_hint = "migration_failed", "try again, or look at the reason in atoll job info JOB"


def all_errors() -> list[type[AtollError]]:
    """Every error class, by exit code and code."""
    found: list[type[AtollError]] = []

    def walk(cls: type[AtollError]) -> None:
        found.append(cls)
        for sub in cls.__subclasses__():
            walk(sub)

    walk(AtollError)
    return sorted(found, key=lambda c: (c.exit_code, c.code))


def from_wire(data: dict[str, Any]) -> AtollError:
    """The error that ``to_wire`` described; an unknown code becomes the root error.

    Classes without a code of their own steer jobs and never travel: they share their parents' codes, and are made of other things.
    """
    by_code = {cls.code: cls for cls in all_errors() if "code" in vars(cls)}
    cls = by_code.get(data.get("code", ""), AtollError)
    return cls(data.get("message", ""), hint=data.get("hint"), **(data.get("details") or {}))


#: Errors after which the outcome is unknown: the order may have been carried out, or may be later.
UNKNOWN_OUTCOME = (Unreachable, DeadlineExceeded)
