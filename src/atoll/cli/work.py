"""Commands that make jobs: submit with a fresh idempotency key, then wait and show progress."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import click

from atoll.cli.client import Client, path_of
from atoll.cli.output import duration, kind_of, print_data, text
from atoll.model.errors import AtollError, NeedsAttention, from_wire

#: Seconds of one long poll, and how long a master may be away while we watch, and how long
#: a job that tells nothing is waited for in silence.
POLL, AWAY, GRACE = 20.0, 120.0, 0.5
LAST = ("done", "undone", "needs-attention")


def run(
    noun: str,
    verb: str,
    target: str = "",
    body: dict[str, Any] | None = None,
    *,
    submit: bool = False,
    dry_run: bool = False,
    format: str = "table",
) -> dict[str, Any] | None:
    """Ask for an operation. Gives the ended job; None with ``--submit`` and ``--dry-run``. Errors: the job's."""
    client = Client()
    # A job that ends at once needs no second request.
    answer = ask(client, noun, verb, target, body, dry_run, wait=None if submit or dry_run else GRACE)
    if dry_run:
        _tell_dry_run(answer, format)
        return None
    if submit:
        print_data(answer, format) if format != "table" else click.echo(str(answer["job"]))
        return None
    return finish(client, answer["job"], format, known=answer.get("ended"))


def run_many(
    noun: str,
    verb: str,
    targets: tuple[str, ...],
    body: dict[str, Any],
    *,
    submit: bool = False,
    dry_run: bool = False,
    format: str = "table",
) -> None:
    """The same for several objects: all jobs are submitted, then each is waited for; the first error is told at the end."""
    targets = tuple(dict.fromkeys(targets))
    if len(targets) == 1:
        run(noun, verb, targets[0], body, submit=submit, dry_run=dry_run, format=format)
        return
    client = Client()
    failed: list[AtollError] = []
    answers = []
    for name in targets:
        try:
            answers.append(ask(client, noun, verb, name, body, dry_run))
        except AtollError as error:
            failed.append(error)
    for answer in answers:
        try:
            if dry_run:
                _tell_dry_run(answer, format)
            elif submit:
                click.echo(str(answer["job"]))
            else:
                finish(client, answer["job"], format)
        except AtollError as error:
            failed.append(error)
    for other in failed[1:]:
        click.echo(f"Error: {other.message}", err=True)
    if failed:
        raise failed[0]


def ask(
    client: Client, noun: str, verb: str, target: str, body: dict[str, Any] | None, dry_run: bool = False, wait: float | None = None
) -> dict[str, Any]:
    """Submit an operation: the API's answer. Parameters that are None are left out. ``wait``: seconds for the job to end."""
    import uuid

    sent = {name: value for name, value in (body or {}).items() if value is not None}
    query = {"dry_run": "true" if dry_run else None, "wait": wait}
    method, path = _address(noun, verb, target)
    answer: dict[str, Any] = client.send(method, path, sent, key=str(uuid.uuid4()), query=query)
    return answer


def _address(noun: str, verb: str, target: str) -> tuple[str, str]:
    if noun == "cluster":
        return "POST", f"/v1/cluster/{verb}"
    if verb in ("add", "create"):
        return "POST", f"/v1/{noun}s"
    if verb == "import":
        return "POST", f"/v1/{noun}s/{verb}"
    if verb in ("remove", "delete"):
        return "DELETE", path_of(noun, target)
    return "POST", path_of(noun, target, verb)


def _tell_dry_run(answer: dict[str, Any], format: str) -> None:
    if format != "table":
        print_data(answer, format)
        return
    click.echo(f"Would {answer['summary']}.")
    if "plan" in answer:
        tell_plan(answer["plan"])


def tell_plan(plan: dict[str, list[str]]) -> None:
    """What would be, what that survives, and what to mind."""
    for line in plan["lines"]:
        click.echo(f"  {line}")
    for head, lines in (("It survives:", plan["survives"]), ("Mind:", plan["warnings"])):
        if lines:
            click.echo(head)
        for line in lines:
            click.echo(f"  - {line}")


def finish(
    client: Client, number: int, format: str = "table", *, quiet: bool = False, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Wait for a job and tell its end. ``known``: the job, where it has ended already. Errors: the job's own; NeedsAttention."""
    job = known or watch(client, number)
    if format != "table":
        print_data(job, format)
    if job["state"] == "needs-attention":
        commands = job["commands"] or [f"atoll job info {number}"]
        raise NeedsAttention(f"job {number} ({job['summary']}) needs attention: {job['reason']}", hint="; ".join(commands))
    if job["state"] == "undone":
        raise _error_of(job)
    if format == "table" and not quiet:
        took = duration((job["ended"] or 0) - (job["started"] or job["created"]))
        click.echo(f"Job {number} done: {job['summary']} ({took})")
        _tell_result(job["result"])
    return job


def _error_of(job: dict[str, Any]) -> AtollError:
    known = job["error"] or {"code": "cancelled", "message": "it was cancelled"}
    details = {k: v for k, v in (known.get("details") or {}).items() if k not in ("message", "hint")}
    message = f"{job['summary']}: {known.get('message', '')} (job {job['id']} was undone)"
    return from_wire({**known, "message": message, "details": details})


#: Ids that only repeat what the command itself named; scripts find them with --format json.
_KNOWN = re.compile(r"(node|i|pool|group)-[0-9a-f]{17}")


def _tell_result(result: Any, indent: str = "  ") -> None:
    """What a job gave, without ids that only repeat the command."""
    if isinstance(result, dict):
        for name, value in result.items():
            if value in (None, "", [], {}) or name == "name" or _KNOWN.fullmatch(str(value)):
                continue
            if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
                click.echo(f"{indent}{name}:")
                for key, inner in value.items():
                    click.echo(f"{indent}  {key}: {text(inner)}")
            elif isinstance(value, dict):
                click.echo(f"{indent}{name}:")
                _tell_result(value, indent + "  ")
            else:
                click.echo(f"{indent}{name}: {text(value, kind_of(name))}")
    elif isinstance(result, list):
        for value in result:
            click.echo(f"{indent}{text(value)}")
    elif result is not None and not isinstance(result, bool):
        click.echo(f"{indent}{result}")


def watch(client: Client, number: int) -> dict[str, Any]:
    """Show a job's progress on stderr until it has ended or needs attention. Ctrl-C leaves the job alone and says so."""
    show = progress_shown()
    try:
        job: dict[str, Any] = client.get(f"/v1/jobs/{number}", patience=AWAY)
        began = time.monotonic()
        while job["state"] not in LAST:
            # A job that ends at once needs no line that says it is queued.
            early = time.monotonic() - began < GRACE
            if not early or (job.get("progress") or {}).get("text"):
                show.progress(job)
            job = client.get(f"/v1/jobs/{number}", {"wait": GRACE if early else POLL}, patience=AWAY)
    except KeyboardInterrupt:
        show.clear()
        click.echo(f"Job {number} goes on. Watch it: atoll job watch {number}. Stop it: atoll job cancel {number}.", err=True)
        raise
    finally:
        show.clear()
    return job


def progress_shown() -> _Lines:
    """What shows a job's progress on stderr: one line that is written over on a terminal, else a line per news."""
    return _Line() if sys.stderr.isatty() else _Lines()


def _words(job: dict[str, Any]) -> str:
    progress = job.get("progress") or {}
    percent = f" {progress['percent']:.0f}%" if progress.get("percent") is not None else ""
    state = job["state"]
    said = progress.get("text") or {"queued": "queued", "undoing": "is being undone"}.get(state, "")
    if state == "undoing" and progress.get("text"):
        said = f"undoing: {said}"
    return f"Job {job['id']}: {job['summary']}{percent}{' - ' + said if said else ''}"


class _Lines:
    """Progress where no terminal is: a line when the text changes, at most one per ten percent of the same text."""

    def __init__(self) -> None:
        self._last: tuple[str, str, int] | None = None

    def progress(self, job: dict[str, Any]) -> None:
        progress = job.get("progress") or {}
        now = (job["state"], progress.get("text") or "", int((progress.get("percent") or 0) // 10))
        if now != self._last:
            self._last = now
            click.echo(_words(job), err=True)

    def clear(self) -> None:
        """Nothing to clear."""


class _Line(_Lines):
    """Progress on a terminal: one line, written over."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = False

    def progress(self, job: dict[str, Any]) -> None:
        import shutil

        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{_words(job)[:width]}")
        sys.stderr.flush()
        self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
