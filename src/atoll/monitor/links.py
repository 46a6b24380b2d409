"""The network as one node sees it: names, masters, certificates, clocks, and the way to the other nodes."""

from __future__ import annotations

import concurrent.futures
import email.utils
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from atoll import __version__
from atoll.model.errors import AtollError
from atoll.model.messages import PROTOCOL, compatible
from atoll.monitor.checks import Check, error, ok, warning
from atoll.runtime import certs, tls
from atoll.runtime.config import Config
from atoll.runtime.masters import read_masters

#: Seconds for each question to a master, and to reach another node.
ANSWER, REACH = 5.0, 3.0
#: Seconds by which clocks may differ: logs that are minutes apart tell nothing, and certificates allow an hour.
SKEW, BAD_SKEW = 5.0, 600.0
#: Days before its end at which a certificate is late, for it is renewed months before.
LATE, VERY_LATE = 30, 7
#: Linux's number of the option that tells the way's largest packet; Python has no name for it.
_IP_MTU = 14
#: Smaller packets than these are seen in tunnels.
_MTU = 1500


@dataclass
class Network:
    """What was found, and what the master told this node of the cluster (empty if none answered)."""

    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def look(config: Config, master: str = "") -> Network:
    """Look at everything. ``master``: the URL of a master that this machine does not know yet."""
    found = Network()
    joined = bool(config.node) and (config.tls_dir / "cert.pem").exists()
    found.checks += _own_address(config)
    if joined:
        found.checks += _certificates(config)
    urls = [master] if master else list(read_masters(config.state_dir) or config.masters)
    if not urls:
        what = "this machine belongs to no cluster yet" if not joined else "no master is configured"
        found.checks.append(
            warning("master", what, "nothing beyond this machine was looked at", "atoll doctor --master https://MASTER:7770")
        )
    for url in urls:
        _master(url, config, joined, found)
    found.checks += _peers(config, found.facts.get("peers", []))
    return found


# --- this node ---


def _own_address(config: Config) -> Iterator[Check]:
    if not config.address:
        return
    about = f"address {config.address}"
    family = socket.AF_INET6 if ":" in config.address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((config.address, 0))
    except OSError as failed:
        why = "the agent listens there, and others look for this node there"
        yield error(about, f"it is not this machine's: {failed.strerror}", why, "ip address; mend the address in /etc/atoll/atoll.toml")
        return
    try:
        with socket.create_connection((config.address, config.agent_port), REACH):
            yield ok("agent", f"something listens on {config.address}:{config.agent_port}")
    except OSError as failed:
        if config.node:
            why = "the master can ask nothing of this node; its guests go on"
            yield error("agent", f"nothing listens on {config.address}:{config.agent_port}: {failed}", why, "systemctl start atoll-agent")


def _certificates(config: Config) -> Iterator[Check]:
    for about, place in (("certificate of this node", config.tls_dir), ("certificate of the master", config.master_tls_dir)):
        if not (place / "cert.pem").exists():
            continue
        here = certs.current(place)
        try:
            ca, certificate, key = ((here / name).read_text() for name in certs.FILES)
            yield from _certificate(about, ca, certificate, key)
        except PermissionError:
            yield warning(about, "its files may not be read", "only root can look at it", "sudo atoll doctor")
        except (OSError, AtollError, ValueError) as failed:
            why = "without it nothing is said or heard in the cluster"
            yield error(about, f"it cannot be used: {failed}", why, "atoll node add NAME --rejoin, on the master")


def _certificate(about: str, ca: str, certificate: str, key: str) -> Iterator[Check]:
    renew = "atoll node renew NODE, on the master"
    if not certs.same_key(certificate, key):
        yield error(about, "its key is another's", "no connection can be made with it", renew)
    elif not any(certs.issued_by(certificate, pem) for pem in certs.split(ca)):
        yield error(about, "no CA that this node trusts made it", "others refuse it", "atoll node add NAME --rejoin, on the master")
    yield from _end(about, certs.expires(certificate), renew)
    yield from _end("certificate of the CA", min(certs.expires(pem) for pem in certs.split(ca)), "atoll cluster rotate-ca")


def _end(about: str, expires: float, command: str) -> Iterator[Check]:
    days = (expires - time.time()) / 86400
    if days < VERY_LATE:
        what = f"it ends in {days:.0f} days" if days >= 0 else f"it ended {-days:.0f} days ago"
        yield error(about, what, "after its end nobody talks to this node; guests go on", command)
    elif days < LATE:
        yield warning(about, f"it ends in {days:.0f} days", "it should have been renewed by itself", command)
    else:
        yield ok(about, f"good for {days:.0f} days")


# --- the master ---


def _master(url: str, config: Config, joined: bool, found: Network) -> None:
    parts = urlsplit(url)
    about, host, port = f"master {url}", parts.hostname or "", parts.port or 7770
    if parts.scheme != "https" or not host:
        found.checks.append(error(about, "this is no address of a master", "nothing can be asked of it", "https://HOST:7770"))
        return
    try:
        begun = time.monotonic()
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        took = time.monotonic() - begun
    except OSError as failed:
        found.checks.append(error(about, f"the name {host} is not known here: {failed}", "the master is not found", f"getent hosts {host}"))
        return
    if took > 1:
        why = "each connection waits for it"
        found.checks.append(warning(about, f"looking up {host} takes {took:.1f} s", why, f"time getent hosts {host}; cat /etc/resolv.conf"))
    try:
        context = _context(config, joined)
        before = time.time()
        connection = http.client.HTTPSConnection(host, port, timeout=ANSWER, context=context)
        try:
            connection.request("GET", "/agent/v1/facts")
            middle = (before + time.time()) / 2
            answer = connection.getresponse()
            content, date = answer.read(1 << 20), answer.headers.get("Date", "")
        finally:
            connection.close()
    except ssl.SSLError as failed:
        why = "both sides must have certificates by a CA that the other trusts, and clocks within an hour of each other"
        found.checks.append(error(about, f"the TLS handshake failed: {failed}", why, "date; atoll node add NAME --rejoin, on the master"))
        return
    except (OSError, http.client.HTTPException, AtollError) as failed:
        what = f"it does not answer: {failed or type(failed).__name__}"
        why = "nothing new can be begun; guests go on"
        found.checks.append(error(about, what, why, f"nc -vz {host} {port}; on the master: systemctl status atoll-master"))
        return
    found.checks.append(ok(about, "it answers" + (", with the cluster's certificate" if joined else "; who it is was not checked")))
    if answer.status == 200:
        found.facts = json.loads(content)
        found.checks += _versions(about, found.facts)
    elif answer.status == 403:
        why = "its certificate was replaced, or it was removed from the cluster"
        found.checks.append(error(about, "it refuses this node", why, "atoll node add NAME --rejoin, on the master"))
    theirs = found.facts.get("clock") or _seconds(date)
    if theirs is not None:
        found.checks += _clock(theirs - middle, coarse="clock" not in found.facts)


def _context(config: Config, joined: bool) -> ssl.SSLContext:
    if joined:
        return tls.client_context(config.tls_dir)
    # Nothing is sent that matters: before it joins, a machine knows no CA.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _seconds(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def _versions(about: str, facts: dict[str, Any]) -> Iterator[Check]:
    theirs = int(facts.get("protocol", 1))
    words = f"it has version {facts.get('version', '?')} (protocol {theirs}), this machine {__version__} (protocol {PROTOCOL})"
    if not compatible(theirs):
        yield error(about, words, "more than one version apart: nothing is asked of this node", "docs/howto/upgrade.md")
    elif theirs != PROTOCOL:
        yield warning(about, words, "one version apart is for the time of an upgrade", "docs/howto/upgrade.md")
    running = facts.get("reported", "")
    if running and running != __version__:
        what = f"the agent that runs has version {running}, the installed one is {__version__}"
        yield warning("agent", what, "the old code runs until it is restarted; guests go on", "systemctl restart atoll-agent")


def _clock(ahead: float, coarse: bool) -> Iterator[Check]:
    # HTTP's date has whole seconds only.
    off = abs(ahead) - (1.0 if coarse else 0.0)
    words = f"it is {abs(ahead):.1f} s {'behind' if ahead > 0 else 'ahead of'} the master's"
    command = "timedatectl timesync-status, or chronyc tracking"
    if off > BAD_SKEW:
        yield error("clock", words, "certificates allow an hour; beyond that nothing is heard", command)
    elif off > SKEW:
        yield warning("clock", words, "logs of nodes cannot be compared", command)
    else:
        yield ok("clock", "it agrees with the master's")


# --- other nodes ---


def _peers(config: Config, peers: list[dict[str, Any]]) -> Iterator[Check]:
    others = [peer for peer in peers if peer["name"] != config.node]
    if not others:
        return
    with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
        ways = list(pool.map(_way, others))
    for peer, (problem, mtu) in zip(others, ways, strict=True):
        about = f"way to {peer['name']}"
        where = f"{peer['address']}:{peer['port']}"
        if problem:
            why = "guests cannot migrate there, nor disks be copied"
            command = f"ping {peer['address']}; nc -vz {peer['address']} {peer['port']}"
            yield warning(about, f"{where} is not reached: {problem}", why, command)
        elif mtu and mtu < _MTU:
            why = "if it is smaller than both ends believe, large packets vanish and migrations hang"
            yield warning(about, f"packets of {mtu} bytes at most", why, f"ping -M do -s {mtu - 28} {peer['address']}")
        else:
            yield ok(about, f"{where} answers" + (f", packets up to {mtu} bytes" if mtu else ""))


def _way(peer: dict[str, Any]) -> tuple[str, int]:
    """Why it is not reached; and the largest packet, as far as the kernel knows."""
    try:
        with socket.create_connection((peer["address"], peer["port"]), REACH) as connection:
            v4 = connection.family == socket.AF_INET
            return "", connection.getsockopt(socket.IPPROTO_IP, _IP_MTU) if v4 else 0
    except OSError as failed:
        return str(failed) or type(failed).__name__, 0
