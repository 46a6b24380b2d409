"""Commands to Ceph's monitors, from a node with the administrator's key."""

from __future__ import annotations

import asyncio
import errno
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from atoll.model.errors import AtollError, DeadlineExceeded, HostError, StorageRefused, Unreachable
from atoll.runtime import process

CONF = "/etc/ceph/ceph.conf"
#: Seconds that the monitors have to answer one attempt; and between looks.
TIMEOUT, PAUSE = 10, 0.25


@dataclass(frozen=True)
class Command:
    """``words`` as Ceph's JSON commands have them; ``input`` goes with it, and is the place for keys."""

    prefix: str
    words: dict[str, Any]
    input: str = ""
    #: Whether the manager answers it, which may be away.
    manager: bool = False


def command(prefix: str, input: str = "", **words: Any) -> Command:
    """A command such as ``osd pool create``."""
    return Command(prefix, words, input)


async def ask(*commands: Command, pool: str = "", deadline: float = 30.0) -> list[str]:
    """Put commands, in order; what each printed.

    Errors: StorageRefused (Ceph's words), Unreachable (no monitor answers), DeadlineExceeded.
    """
    wanted = {
        "conf": CONF,
        "user": "admin",
        "timeout": TIMEOUT,
        "pool": pool,
        "commands": [
            {"command": {"prefix": c.prefix, "format": "json", **c.words}, "input": c.input, "manager": c.manager} for c in commands
        ],
    }
    argv = [sys.executable, "-m", "atoll.deploy.ceph.adminmain"]
    done = await process.run(argv, deadline=deadline, input=json.dumps(wanted), check=False)
    if done.rc == 3:
        raise Unreachable(f"Ceph's monitors give no answer: {done.stderr.strip()}", hint="atoll storage status")
    if done.rc:
        raise HostError(f"asking Ceph failed: {done.stderr.strip()[-500:]}")
    answers = json.loads(done.stdout)
    for asked, answer in zip(commands, answers, strict=False):
        if answer["rc"]:
            number = abs(answer["rc"])
            words = answer["err"] or errno.errorcode.get(number, str(number))
            raise StorageRefused(f"Ceph refused {asked.prefix!r}: {words}", errno=number)
    return [answer["out"] for answer in answers]


async def look(prefix: str, **words: Any) -> Any:
    """The answer of one command, as data."""
    return json.loads((await ask(command(prefix, **words)))[0])


async def until(prefix: str, good: Callable[[Any], bool], what: str, deadline: float, tell: Callable[[Any], None] = lambda _: None) -> Any:
    """Ask again and again until the answer is good. Errors: DeadlineExceeded with what was wanted."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    last = "no answer yet"
    while True:
        try:
            answer = await look(prefix)
            if good(answer):
                return answer
            last = ""
            tell(answer)
        except (Unreachable, DeadlineExceeded) as error:
            last = error.message
        except AtollError:
            raise
        if loop.time() > end:
            raise DeadlineExceeded(f"not within {deadline:.0f} s: {what}{f' ({last})' if last else ''}", hint="look at /var/log/ceph there")
        await asyncio.sleep(PAUSE)
