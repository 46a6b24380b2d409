"""``atoll cluster support-bundle``: all that somebody who helps needs to know, in one file, without secrets."""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from atoll import __version__
from atoll.cli.client import Client, path_of
from atoll.cli.settings import config_option
from atoll.model.errors import AtollError, HostError

#: How many jobs (the newest, and all that have not ended) come with their steps; and entries of the audit log.
JOBS, AUDIT = 200, 2000
NOUNS = ("node", "group", "pool", "volume", "snapshot", "instance")
_README = """\
A support bundle of an Atoll cluster, made by: atoll cluster support-bundle

versions.json     versions of Atoll, Python, the kernel and packages where it was made
doctor.json       what each node finds when it looks at itself; doctor-here.json: this one
verify.json       what `atoll cluster verify` finds
cluster.json      the cluster, with the sizes and counts of its store in store.json
objects/          nodes, groups, pools, volumes, instances
jobs/             the newest jobs with their steps; all.json: every job
audit.json        who asked for what
configuration/    this node's configuration
logs/NODE/        the end of the logs of each node
problems.txt      what could not be had, and why

Keys, tokens, passwords and what cloud-init was given are not in it, and what looks like one of these was replaced by ***. Names, addresses
and paths are in it. Look through it before you give it away.
"""


@click.command("support-bundle")
@click.argument("path", required=False, type=click.Path(dir_okay=True))
@config_option
def support_bundle(path: str | None, config: str) -> None:
    """Gather versions, findings, jobs, configuration and logs of all nodes in one file, PATH (.tar.gz), without secrets.

    What cannot be had, such as the logs of a node that does not answer, is named in it. It also works when no master does.
    """
    runtime = import_module("atoll.runtime.config")
    try:
        known = runtime.load(config) if Path(config).exists() else runtime.Config()
    except AtollError:
        known = runtime.Config()
    gathered = Bundle(known, config)
    gathered.gather()
    target = _target(path, gathered.cluster)
    _write(target, gathered.files)
    size = target.stat().st_size
    click.echo(f"{target} has {len(gathered.files)} files, {max(1, size >> 10)} KiB; only you can read it.")
    for problem in gathered.problems:
        click.echo(f"not in it: {problem}", err=True)
    click.echo(f"Next: look through it (tar tf {target}) before you give it away", err=True)


def _target(path: str | None, cluster: str) -> Path:
    name = f"atoll-support-{cluster or 'node'}-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz"
    if path is None:
        return Path(name)
    return Path(path) / name if Path(path).is_dir() else Path(path)


class Bundle:
    """Collects files. Nothing that fails keeps the rest away."""

    def __init__(self, config: Any, path: str) -> None:
        self._config, self._path = config, path
        self._client = Client()
        scrub = import_module("atoll.runtime.scrub")
        self._scrubber = scrub.Scrubber(scrub.secrets_of(config))
        self.files: dict[str, bytes] = {}
        self.problems: list[str] = []
        self.cluster = ""
        #: When no master answers, that is said once.
        self._alone = ""

    def gather(self) -> None:
        """Everything."""
        self._json("versions.json", self._versions)
        cluster = self._ask("cluster.json", "/v1/cluster")
        self.cluster = str((cluster or {}).get("name", ""))
        self._ask("verify.json", "/v1/cluster/verify", timeout=300.0)
        self._ask("doctor.json", "/v1/cluster/doctor", timeout=150.0)
        self._json("doctor-here.json", lambda: import_module("atoll.cli.doctor").here(self._path))
        self._json("store.json", self._store)
        for noun in NOUNS:
            self._json(f"objects/{noun}s.json", partial(self._client.all, noun), master=True)
        self._jobs()
        self._ask("audit.json", "/v1/cluster/audit", query={"limit": AUDIT})
        self._configuration()
        self._logs()
        if self._alone:
            self.problems.insert(0, f"anything that only a master knows: {self._alone}")
        self._add("README", _README)
        self._add("problems.txt", "".join(f"{problem}\n" for problem in self.problems) or "none\n")

    # --- parts ---

    def _versions(self) -> dict[str, Any]:
        metadata = import_module("importlib.metadata")
        packages = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
        host = {"kernel": platform.release(), "machine": platform.machine(), "python": sys.version, "node": self._config.node}
        return {"atoll": __version__, "made": time.time(), **host, "packages": dict(sorted(packages.items()))}

    def _store(self) -> dict[str, Any]:
        """What the store on this node takes: files, and objects by kind. Their contents stay where they are."""
        found: dict[str, Any] = {}
        for name, place in (("store", self._config.store_dir), ("copy", self._config.replica_dir)):
            if place.is_dir():
                found[name] = {"directory": str(place), "files": {p.name: p.stat().st_size for p in sorted(place.iterdir()) if p.is_file()}}
        if (self._config.store_dir / "atoll.db").exists():
            entries, revision = import_module("atoll.store.sqlite_file").snapshot(self._config.store_dir / "atoll.db")
            kinds: dict[str, dict[str, int]] = {}
            for entry in entries:
                kind = kinds.setdefault(entry.key.partition("/")[0], {"objects": 0, "bytes": 0})
                kind["objects"] += 1
                kind["bytes"] += len(entry.value)
            found |= {"revision": revision, "kinds": kinds}
        return found

    def _jobs(self) -> None:
        jobs = self._json("jobs/all.json", lambda: self._client.all("job"), master=True)
        newest = sorted(jobs or [], key=lambda job: job["id"], reverse=True)
        chosen = [job for number, job in enumerate(newest) if number < JOBS or job["state"] not in ("done", "undone")]
        for job in chosen:
            self._ask(f"jobs/{job['id']}.json", path_of("job", str(job["id"])))

    def _configuration(self) -> None:
        for source in (Path(self._path), *(Path("/etc/systemd/system").glob("atoll*"))):
            if source.is_file():
                self._text(f"configuration/{source.name}", source.read_text)

    def _logs(self) -> None:
        logs = import_module("atoll.monitor.logs")
        here = self._config.node or "here"
        nodes = [] if self._alone else [str(row["name"]) for row in json.loads(self.files.get("objects/nodes.json", b"[]"))]
        for node in {here, *nodes}:
            found = self._part(f"logs/{node}", partial(logs.collect, self._config)) if node == here else self._remote(node)
            for name, text in (found or {}).items():
                self._add(f"logs/{node}/{_plain(name)}", text)

    def _remote(self, node: str) -> dict[str, str] | None:
        answer = self._part(f"logs/{node}", lambda: self._client.get(path_of("node", node, "logs"), timeout=90.0), master=True)
        return answer["logs"] if answer else None

    # --- helpers ---

    def _part(self, name: str, get: Callable[[], Any], *, master: bool = False) -> Any:
        """What ``get`` gives; None, and a problem, if it fails."""
        if master and self._alone:
            return None
        try:
            return get()
        except AtollError as error:
            if master and error.code in ("unreachable", "not_leader"):
                self._alone = error.message
            else:
                self.problems.append(f"{name}: {error.message}")
        except (OSError, ValueError) as error:
            self.problems.append(f"{name}: {error}")
        return None

    def _json(self, name: str, get: Callable[[], Any], *, master: bool = False) -> Any:
        data = self._part(name, get, master=master)
        if data is not None:
            text = json.dumps(self._scrubber.data(data), indent=1, ensure_ascii=False, default=str)
            self.files[name] = text.encode()
        return data

    def _ask(self, name: str, path: str, *, query: dict[str, Any] | None = None, timeout: float = 90.0) -> Any:
        return self._json(name, lambda: self._client.get(path, query, timeout=timeout), master=True)

    def _text(self, name: str, get: Callable[[], str]) -> None:
        text = self._part(name, get)
        if text is not None:
            self._add(name, text)

    def _add(self, name: str, text: str) -> None:
        self.files[name] = self._scrubber.text(text).encode(errors="replace")


def _plain(name: str) -> str:
    """A file name of what a node has sent: it must not lead out of the bundle."""
    return name.replace("/", "_").lstrip(".") or "log"


def _write(target: Path, files: dict[str, bytes]) -> None:
    """One file with mode 0600, whole or not at all. Errors: HostError."""
    import tarfile

    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "wb") as out:
                with tarfile.open(fileobj=out, mode="w:gz") as archive:
                    for name, data in sorted(files.items()):
                        about = tarfile.TarInfo(f"atoll-support/{name}")
                        about.size, about.mode, about.mtime = len(data), 0o600, int(time.time())
                        archive.addfile(about, io.BytesIO(data))
                out.flush()
                os.fsync(out.fileno())
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise HostError(f"cannot write {target}: {error.strerror}", hint="name a file in a directory with room: df") from None
