"""``atoll cluster backup`` and ``restore``: all that a master needs, in one file that is of no use without the master key.

The file is a tar archive: ``manifest.json`` (format, cluster, term, revision, node, time, sha256 of the rest), ``store`` (see
``store.image``), and ``keys.sealed``, the certificate authority, which only the master key (/etc/atoll/master.key) opens. That key is not
in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from atoll.agent.join import configured
from atoll.master.recall import TERM
from atoll.master.setup import MASTER_KEY, read_keyring
from atoll.master.succession import Copy, take_over
from atoll.model.errors import AtollError, HostError, InvalidInput
from atoll.model.ids import check_name, new_id
from atoll.model.objects import Group, Node
from atoll.runtime import certs
from atoll.runtime.config import Config, load
from atoll.runtime.files import fsync_dir
from atoll.runtime.secrets import SecretBox
from atoll.store import image
from atoll.store.sqlite_file import snapshot

FORMAT = 1
_CONTEXT = "backup:keys"
_PARTS = ("store", "keys.sealed")
_README = """\
A backup of the master of an Atoll cluster. To restore it: atoll cluster restore FILE
You also need the master key, /etc/atoll/master.key, of the day on which it was made. It is not in here.
"""
#: Bytes of a backup at most; what is larger is none.
_LARGEST = 4 << 30


def backup(path: Path, target: str) -> dict[str, Any]:
    """Write a backup of this master to the file ``target`` (0600, durable) or to stdout (``-``), beside its work. Gives the manifest.

    Errors: InvalidInput when this is no master; StoreError, HostError.
    """
    config = load(path)
    if not (config.store_dir / "atoll.db").exists():
        raise InvalidInput("this node is no master", hint="type it on the master; atoll node list shows which node that is")
    manifest, parts = _collect(config)
    try:
        if target == "-":
            with os.fdopen(os.dup(1), "wb") as out:
                _write(out, manifest, parts)
            return manifest
        final = Path(target)
        partial = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(handle, "wb") as out:
                _write(out, manifest, parts)
                os.fsync(out.fileno())
            partial.replace(final)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync_dir(final.parent)
    except OSError as error:
        raise HostError(f"cannot write {target}: {error.strerror}", hint="choose a directory with room: df") from None
    return manifest


def _collect(config: Config) -> tuple[dict[str, Any], dict[str, bytes]]:
    entries, revision = snapshot(config.store_dir / "atoll.db")
    keys = read_keyring(config)
    rest = json.dumps({name: text for name, text in keys.items() if name != MASTER_KEY})
    sealed = SecretBox.load_or_create(config.etc_dir / MASTER_KEY).seal(rest.encode(), _CONTEXT)
    parts = {"store": image.pack(entries, revision), "keys.sealed": sealed.encode()}
    values = {entry.key: entry.value for entry in entries}
    manifest = {
        "format": FORMAT,
        "cluster": Copy(values, {}).cluster.name,
        "ca_fingerprint": certs.fingerprint(keys["ca.pem"]),
        "node": config.node,
        "address": config.address,
        "term": int(values.get(TERM, b"0")),
        "revision": revision,
        "created": time.time(),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()},
    }
    return manifest, parts


def _write(out: IO[bytes], manifest: dict[str, Any], parts: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=out, mode="w|") as archive:
        for name, data in {"README": _README.encode(), "manifest.json": json.dumps(manifest, indent=1).encode(), **parts}.items():
            about = tarfile.TarInfo(f"atoll-backup/{name}")
            about.size, about.mode, about.mtime = len(data), 0o600, int(manifest["created"])
            archive.addfile(about, io.BytesIO(data))


def read_store(source: Path, config: Config) -> tuple[dict[str, Any], dict[str, bytes], dict[str, str]]:
    """A bare store, such as ``before-layout-N.db`` of an upgrade, on the machine that was its master: manifest, entries, keys."""
    entries, revision = snapshot(source)
    values = {entry.key: entry.value for entry in entries}
    about = {"cluster": Copy(values, {}).cluster.name, "node": config.node, "address": config.address, "revision": revision}
    return {**about, "created": source.stat().st_mtime}, values, read_keyring(config)


def _is_store(source: Path) -> bool:
    with open(source, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def read(source: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the parts of a backup, checked. Errors: InvalidInput when it is none or damaged, HostError."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(source, mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("atoll-backup/")
                content = archive.extractfile(member) if member.isreg() and member.size < _LARGEST else None
                if content is not None and name in (*_PARTS, "manifest.json"):
                    found[name] = content.read()
        manifest = json.loads(found["manifest.json"])
        parts = {name: found[name] for name in _PARTS}
        damaged = [name for name, data in parts.items() if hashlib.sha256(data).hexdigest() != manifest["sha256"][name]]
        newer = manifest["format"] > FORMAT
    except OSError as error:
        raise HostError(f"cannot read {source}: {error.strerror or error}", hint="name the backup") from None
    except (tarfile.TarError, KeyError, TypeError, ValueError, EOFError) as error:
        why = f"{source} is no backup of a master, or is damaged: {error}"
        raise InvalidInput(why, hint="atoll cluster backup FILE makes one") from None
    if newer:
        raise InvalidInput(f"{source} was made by a newer Atoll", hint="upgrade this node")
    if damaged:
        raise InvalidInput(f"{source} is damaged: {damaged[0]} is not what it was", hint="use another backup")
    return manifest, parts


def restore(
    path: Path, source: Path, dead: tuple[str, ...], *, master_key: Path | None, node: str, address: str, dry_run: bool = False
) -> list[str]:
    """Make this machine the master, with a backup. ``node``, ``address``: who it is; empty = as its configuration, or the backup, says.
    ``master_key``: where the master key is; None = where a master or a candidate has it. Gives lines for people.

    Errors: InvalidInput, HostError when the master key is not the right one; those of ``Succession.run``.
    """
    present = load(path) if path.exists() else Config()
    if _is_store(source):
        manifest, entries, keyring = read_store(source, present)
    else:
        manifest, parts = read(source)
        entries, keyring = image.unpack(parts["store"]), {}
    name = check_name(node or present.node or manifest["node"], "node name")
    where = address or present.address or (manifest["address"] if name == manifest["node"] else "")
    if not where:
        raise InvalidInput("nobody has said by which address other nodes reach this one", hint="give --address IP")
    config = configured(path, {}, node=name, address=where)
    if not keyring:
        keyring = _unseal(parts["keys.sealed"].decode(), _master_key(config, master_key))
    copy = Copy(entries, keyring)
    old = next((found for found in copy.nodes() if found.name == manifest["node"]), None)
    me = next((found for found in copy.nodes() if found.name == name), None) or _new_node(entries, name)
    me = me.model_copy(update={"address": where, "port": config.agent_port})
    me = _node_certificate(config, copy, me, dry_run)
    config = config.model_copy(update={"hypervisor": copy.cluster.hypervisor})
    copy = replace(copy, master=old.id if old is not None and old.id != me.id else "")
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest["created"]))
    lines = take_over(config, path, copy, me, dead, "cluster.restore", dry_run)
    return [f"The backup of cluster {manifest['cluster']} is of {made} (revision {manifest['revision']}).", *lines]


def _unseal(sealed: str, key_file: Path) -> dict[str, str]:
    try:
        keys: dict[str, str] = json.loads(SecretBox.load_or_create(key_file).open(sealed, _CONTEXT))
    except AtollError as error:
        raise InvalidInput(
            f"the master key in {key_file} does not open this backup: {error.message}",
            hint="bring the master.key of that day, and name it: --master-key FILE",
        ) from None
    return {**keys, MASTER_KEY: key_file.read_text()}


def _master_key(config: Config, named: Path | None) -> Path:
    for path in [named] if named else [config.etc_dir / MASTER_KEY, config.candidate_dir / MASTER_KEY]:
        if path.exists():
            return path
    raise InvalidInput(
        "a backup is of no use without the master key, and there is none here",
        hint="bring /etc/atoll/master.key of the old master (or /etc/atoll/candidate/master.key of a candidate): --master-key FILE",
    )


def _new_node(entries: dict[str, bytes], name: str) -> Node:
    """This machine is new to the cluster."""
    groups = [Group.model_validate_json(value) for key, value in sorted(entries.items()) if key.startswith("groups/")]
    if not groups:
        raise InvalidInput("the backup has no node group", hint="use another backup")
    return Node(id=new_id("node", random.SystemRandom()), name=name, group=groups[0].id, address="", roles=("master-candidate",))


def _node_certificate(config: Config, copy: Copy, me: Node, dry_run: bool) -> Node:
    """A node whose certificate is the one of the record keeps it; else it gets another, as when it joins."""
    present = config.tls_dir / "cert.pem"
    if present.exists() and certs.serial(present.read_text()) == me.certificate_serial:
        return me
    pair = certs.issue(copy.ca, "node", me.id, me.name, [me.address])
    if not dry_run:
        certs.save(config.tls_dir, copy.trusted, pair.cert_pem, pair.key_pem)
    return me.model_copy(
        update={
            "certificate_serial": certs.serial(pair.cert_pem),
            "previous_serial": "",
            "certificate_issued": certs.issued(pair.cert_pem),
            "certificate_expires": certs.expires(pair.cert_pem),
        }
    )
