"""What each state means; the words are checked against the code."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterable
from typing import Any

from atoll.model import objects
from atoll.model.messages import GuestStatus
from atoll.operations import instance_views, views
from refpages.markdown import page, table

JOB = {
    "queued": "It waits for its locks.",
    "running": "It works.",
    "undoing": "It failed or was cancelled, and takes back what it did.",
    "needs-attention": "It cannot decide safely. It holds what it touched until you `resume` or `undo` it.",
    "done": "It ended, and everything asked for has happened.",
    "undone": "It ended, and nothing of it is left.",
}
VOLUME = {
    "creating": "A job is making it.",
    "available": "It is there, and no instance has it.",
    "in-use": "It is a disk of an instance.",
    "deleting": "A job is removing it.",
    "error": "Something is wrong with it; `atoll cluster verify` says what.",
}
SNAPSHOT = {
    "pending": "A job is making it.",
    "completed": "It is there; volumes can be made from it.",
    "deleting": "A job is removing it.",
}
WRITERS = {
    "enforced": "The storage itself stops a second writer.",
    "advisory": "The storage tells who writes: a lock taken on one node was seen on another, and went when it was dropped.",
    "none": "The storage cannot tell. Only an agent's word or a proof of death lets a disk move to another node.",
}
POOL = {"ready": "It takes new volumes.", "closed": "It takes no new volumes; those it has go on."}
NODE = {
    "ok": "It answers, and takes instances.",
    "joining": "It answers, and its pools are being prepared.",
    "drained": "It answers, and gets nothing new.",
    "offline": "You said that nothing is asked of it.",
    "unreachable": "It has not been heard for 6 s. It may be alive: nothing is started elsewhere for that.",
    "dead-proved": "You said that it is off. It loses that state by itself when it answers again.",
}
INSTANCE = {
    "running": "It runs.",
    "stopped": "It does not run, and shall not. *Reason* says `by the guest` if it shut itself down.",
    "starting": "A job is starting it.",
    "stopping": "A job is stopping it.",
    "migrating": "It moves, or its memory is on the way. *Reason* names the target and the job.",
    "paused": "QEMU has stopped it. *Reason* says why: `io-error` names the pool; a full one is waited for, and then it goes on by itself.",
    "hung": "Its hypervisor process does not answer.",
    "unreachable": "Its node does not answer. It may be running.",
    "error": "It should run, and does not. The master tries again by itself, unless something holds it.",
}
GUEST = {
    "running": "It runs, and may write its disks.",
    "paused": "Stopped by somebody, or by an I/O error.",
    "incoming": "It waits for a migration.",
    "migrated": "It has given everything to the target, and never runs again here.",
    "shutdown": "The guest ended itself.",
    "hung": "The hypervisor does not answer.",
    "gone": "There is no process.",
}


def _same(meanings: dict[str, str], words: Iterable[str], what: str) -> dict[str, str]:
    found = set(words)
    assert set(meanings) == found, f"states of {what}: described {sorted(meanings)}, in the code {sorted(found)}"
    return meanings


def _listed(function: Any) -> set[str]:
    """The state words in the sentence of a docstring that lists them."""
    text = inspect.getdoc(function) or ""
    sentence = next(s for s in re.split(r"(?<=[.:])\s+", re.sub(r"\([^)]*\)", "", text)) if s.count(",") >= 3 and " or " in s)
    return {word.strip(" .") for word in re.split(r",| or ", sentence)}


def states() -> str:
    parts = (
        ("Instance", _same(INSTANCE, _listed(instance_views.instance_state), "an instance"), "Shown by `atoll instance list`."),
        ("Node", _same(NODE, _listed(views.node_state), "a node"), "Shown by `atoll node list`."),
        ("Volume", _same(VOLUME, (s.value for s in objects.VolumeState), "a volume"), "Shown by `atoll volume list`. The words are EBS's."),
        (
            "Snapshot",
            _same(SNAPSHOT, (s.value for s in objects.SnapshotState), "a snapshot"),
            "Shown by `atoll snapshot list`. `pending` and `completed` are EBS's words.",
        ),
        ("Pool", _same(POOL, typing.get_args(objects.Pool.model_fields["state"].annotation), "a pool"), "Shown by `atoll pool list`."),
        (
            "Writers of a pool",
            _same(WRITERS, (s.value for s in objects.Writers), "writers"),
            "Shown by `atoll pool list`; measured by `atoll pool add` and `atoll pool check`, never assumed.",
        ),
        ("Job", _same(JOB, (s.value for s in objects.JobState), "a job"), "Shown by `atoll job list`."),
        (
            "Guest",
            _same(GUEST, typing.get_args(GuestStatus.model_fields["state"].annotation), "a guest"),
            "What an agent reports of a guest; `atoll cluster verify` compares it with the instance.",
        ),
    )
    lines: list[str] = []
    for title, meanings, where in parts:
        lines += [f"## {title}", "", where, "", *table(("State", "Meaning"), ((f"`{w}`", t) for w, t in meanings.items()))]
    return page("States", *lines)
