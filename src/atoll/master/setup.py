"""Making a cluster: its CA, its store and its first node."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from atoll.agent.hostsetup import settle_in
from atoll.agent.join import configured, forget_other_cluster
from atoll.master.authority import sealed
from atoll.model.errors import AlreadyExists, HostError
from atoll.model.ids import check_name, new_id
from atoll.model.objects import Cluster, Group, Node
from atoll.operations.parameters import split
from atoll.operations.storage_options import Options, check, merged
from atoll.runtime import certs
from atoll.runtime.config import Config, dump
from atoll.runtime.files import write_durably
from atoll.runtime.masters import forget_masters
from atoll.runtime.secrets import SecretBox
from atoll.store.cache import LeaderStore
from atoll.store.sqlite import SqliteStore

#: The file under whose key secrets are sealed, in the node's configuration directory.
MASTER_KEY = "master.key"


def store_dir(config: Config) -> Path:
    """Where this master's store is."""
    return config.store_dir


def own_url(config: Config) -> str:
    """Where the master of this node serves."""
    host = f"[{config.address}]" if ":" in config.address else config.address
    return f"https://{host}:{config.master_port}"


def read_keyring(config: Config) -> dict[str, str]:
    """What a candidate needs of this master, by file name: the certificate authority (``ca*`` of the master's directory) and the key that
    seals secrets. Errors: HostError."""
    try:
        files = {path.name: path for path in sorted(config.master_tls_dir.glob("ca*")) if path.is_file()}
        return {name: path.read_text() for name, path in {**files, MASTER_KEY: config.etc_dir / MASTER_KEY}.items()}
    except OSError as error:
        raise HostError(f"the keys of this master cannot be read: {error}") from None


def init(
    name: str,
    node: str,
    address: str,
    config: Path,
    hypervisor: str,
    overrides: dict[str, str],
    storage_options: Options | None = None,
    driver_options: Options | None = None,
) -> list[str]:
    """Make a cluster whose first node and master is this machine. ``storage_options``: kind -> option -> value; ``driver_options``: driver
    -> default of new pools or disk parameter -> value.

    Errors: AlreadyExists, InvalidInput, StoreError.
    Gives what was done on this host, for people. Repeating it after a crash in the middle starts over; once
    the cluster's record is written it refuses.
    """
    check_name(name, "cluster name")
    check_name(node, "node name")
    check(storage_options or {})
    split(driver_options or {}, pools=True)
    settings = configured(config, overrides, node=node, address=address, hypervisor=hypervisor)
    if not settings.masters:
        settings = settings.model_copy(update={"masters": (own_url(settings),)})
    forget_masters(settings.state_dir)
    asyncio.run(_init(name, settings, storage_options or {}, driver_options or {}))
    config.parent.mkdir(parents=True, exist_ok=True)
    write_durably(config, dump(settings), 0o644)
    return settle_in(settings, config, ("master", "agent"))


async def _init(name: str, config: Config, storage_options: Options, driver_options: Options) -> None:
    defaults, parameters = split(driver_options, pools=True)
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = await SqliteStore.open(store_dir(config))
    try:
        leader = await LeaderStore.open(store)
        if leader.get(Cluster, "cluster") is not None:
            raise AlreadyExists(
                f"this machine is already a master of cluster {leader.require(Cluster, 'cluster').name}", hint="atoll cluster info"
            )
        rng = random.SystemRandom()
        group = Group(id=new_id("group", rng), name="default")
        ident = new_id("node", rng)
        ca = certs.create_ca(name)
        pair = certs.issue(ca, "node", ident, config.node, [config.address])
        forget_other_cluster(config, ident)
        certs.save(config.tls_dir, ca.cert_pem, pair.cert_pem, pair.key_pem)
        master = certs.issue(ca, "master", ident, config.node, [config.address])
        certs.save(config.master_tls_dir, ca.cert_pem, master.cert_pem, master.key_pem)
        write_durably(config.master_tls_dir / "ca.key", ca.key_pem, 0o600)
        box = SecretBox.load_or_create(config.etc_dir / MASTER_KEY)
        first = Node(
            id=ident,
            name=config.node,
            group=group.id,
            address=config.address,
            port=config.agent_port,
            roles=("master-candidate", "storage-controller", "vm"),
            certificate_serial=certs.serial(pair.cert_pem),
            certificate_issued=certs.issued(pair.cert_pem),
            certificate_expires=certs.expires(pair.cert_pem),
        )
        cluster = Cluster(
            id="cluster",
            name=name,
            ca_fingerprint=certs.fingerprint(ca.cert_pem),
            hypervisor=config.hypervisor,
            driver_options=merged({}, defaults),
            disk_parameters=merged({}, parameters),
            storage_options=merged({}, storage_options),
        )
        await leader.write(put=[cluster, group, first, sealed(box, ca)])
    finally:
        await store.close()
