"""What the master itself adds to the audit log: how jobs end. And what ``cluster verify`` tells of the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atoll.api.leader import Finding
from atoll.model.objects import Job, JobState, Stored
from atoll.runtime.audit import AuditLog


def ends_of_jobs(log: AuditLog) -> Callable[[Stored | None, Stored | None], None]:
    """A listener of the store: an entry when a job has ended, or needs attention."""

    def noticed(before: Stored | None, after: Stored | None) -> None:
        if not isinstance(after, Job) or (isinstance(before, Job) and before.state is after.state):
            return
        if after.state.ended or after.state is JobState.NEEDS_ATTENTION:
            entry: dict[str, Any] = {"event": "job", "job": after.number, "who": after.who, "operation": after.operation}
            entry |= {"summary": after.summary, "state": after.state.value}
            if after.error:
                entry["code"] = after.error.get("code", "")
            if after.reason:
                entry["reason"] = after.reason
            log.add(entry)

    return noticed


def findings(log: AuditLog) -> list[Finding]:
    """Whether it can be written."""
    if not log.trouble:
        return []
    why = f"{log.trouble}; {log.lost} entries are lost so far; requests go on"
    return [Finding("error", "the audit log cannot be written", "master", why, None, ("df -h /var/log/atoll",))]
