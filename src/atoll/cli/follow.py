"""The event stream, for people: ``atoll job watch`` and ``atoll cluster events``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import click

from atoll.cli import work
from atoll.cli.client import Client, ConnectionLost
from atoll.model.errors import NotFound, NotLeader

#: Seconds without a sign of life after which the connection counts as broken; the master sends one each 15 s.
SILENCE = 45.0
#: Seconds that a master may be away, and between attempts.
AWAY, PAUSE = 120.0, 0.5

Event = tuple[str, int | None, dict[str, Any]]


def follow(client: Client, query: dict[str, Any], after: int | None = None) -> Iterator[Event]:
    """(name, id, data) of each event, for ever, across restarts of the master; nothing is missed between.

    Errors: those of the API; Unreachable when no master answers for two minutes.
    """
    lost: float | None = None
    while True:
        try:
            for name, ident, data in client.stream("/v1/events", query, after, timeout=SILENCE):
                lost = None
                after = ident if ident is not None else after
                if name == "end":
                    break
                if name:
                    yield name, ident, data
        except NotLeader:
            client.next_master()
        except ConnectionLost as error:
            client.close()
            client.next_master()
            lost = lost or time.monotonic()
            if time.monotonic() - lost > AWAY:
                raise client.unreachable(str(error)) from None
        # No event tells when a master is there again.
        time.sleep(PAUSE)


def job(client: Client, number: int) -> None:
    """Show a job's progress on stderr until it has ended or needs attention. Ctrl-C leaves the job alone and says so."""
    show = work.progress_shown()
    row: dict[str, Any] = {"id": number, "state": "", "summary": "", "progress": {}}
    try:
        for name, _, data in follow(client, {"job": number}):
            if name == "job":
                row.update(state=data.get("state", ""), summary=data.get("summary", ""))
            elif name == "progress":
                row["progress"] = data
            elif name == "reset":
                row.update(client.get(f"/v1/jobs/{number}"))
            if row["state"] in work.LAST or (name == "job" and data["change"] == "removed"):
                return
            if row["state"]:
                show.progress(row)
    except NotFound:
        # A master of the version before has no events; the job itself was found.
        return
    except KeyboardInterrupt:
        show.clear()
        click.echo(f"Job {number} goes on. Watch it: atoll job watch {number}. Stop it: atoll job cancel {number}.", err=True)
        raise
    finally:
        show.clear()


def jobs(client: Client, form: str) -> None:
    """What all jobs do, a line for each news, until Ctrl-C."""
    for row in reversed(client.get("/v1/jobs", {"limit": 100})["items"]):
        if row["state"] not in ("done", "undone"):
            _tell({"noun": "job", **{name: row[name] for name in ("id", "state", "summary", "reason")}}, form)
    last: dict[int, tuple[Any, ...]] = {}
    with suppress(KeyboardInterrupt):
        for name, _, data in follow(client, {"nouns": "job"}):
            number = data.get("id") or data.get("job") or 0
            news = (name, data.get("state"), data.get("text"), int((data.get("percent") or 0) // 10))
            # A job's record changes more often than what a person wants to know of it.
            if last.get(number) != news:
                last[number] = news
                _tell(data, form)


def events(client: Client, nouns: tuple[str, ...], after: int | None, form: str) -> None:
    """Everything that changes, a line each, until Ctrl-C."""
    # Ctrl-C is the way to end it, whatever it does at that moment: waiting or writing.
    with suppress(KeyboardInterrupt):
        for name, ident, data in follow(client, {"nouns": ",".join(nouns) or None}, after):
            if name != "progress" or not nouns or "job" in nouns:
                _tell(data | ({"event_id": ident} if form != "table" and ident is not None else {}), form)


def _tell(data: dict[str, Any], form: str) -> None:
    if form == "json":
        line = json.dumps(data, ensure_ascii=False)
    elif form == "yaml":
        import yaml

        line = "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip()
    else:
        line = f"{time.strftime('%H:%M:%S')}  {_words(data)}"
    click.echo(line)
    sys.stdout.flush()


def _words(data: dict[str, Any]) -> str:
    if "noun" not in data and "why" in data:
        return f"some events were missed: {data['why']}"
    if "job" in data and "noun" not in data:
        percent = f"{data['percent']:3.0f}%  " if data.get("percent") is not None else ""
        return f"job {data['job']}  {percent}{data.get('text', '')}".rstrip()
    parts = [f"{data['noun']} {data.get('name') or data['id']}", "removed" if data.get("change") == "removed" else data.get("state", "")]
    if data["noun"] == "job":
        parts.append(data.get("summary", ""))
    if not parts[1]:
        parts[1] = f"shall be {data['desired']}" if data.get("desired") else "changed"
    return "  ".join(part for part in [*parts, data.get("reason", "")] if part)
