"""Copying the image of a stopped guest to another node: NBD over TLS, with QEMU's own tools.

The target serves one image to one peer (``qemu-nbd``); the source pushes (``qemu-img convert``). Both check the other's certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.model.errors import DeadlineExceeded, HostError, PoolFull
from atoll.model.messages import Progress
from atoll.runtime.certs import current

_NAMES = {
    "ca-cert.pem": "ca.pem",
    "server-cert.pem": "cert.pem",
    "server-key.pem": "key.pem",
    "client-cert.pem": "cert.pem",
    "client-key.pem": "key.pem",
}
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")
_PID_FILE = "nbd.pid"
#: Seconds for a server to start, and to end when it is asked to.
_START, _GRACE = 20.0, 10.0
#: Seconds for the last flush.
_FLUSH = 120.0


def credentials(tls_dir: Path, private: Path) -> Path:
    """The node's certificate under QEMU's names, as links in a private directory. Errors: HostError (there is none)."""
    missing = [name for name in sorted(set(_NAMES.values())) if not (tls_dir / name).is_file()]
    if missing:
        raise HostError(
            f"this node has no certificate for copies: {', '.join(missing)} missing in {tls_dir}",
            hint="atoll node join makes one; disks are never copied unencrypted",
        )
    shutil.rmtree(private, ignore_errors=True)
    private.mkdir(parents=True, mode=0o700)
    # Looked up once: a renewal may replace all three meanwhile.
    place = current(tls_dir).absolute()
    for name, source in _NAMES.items():
        (private / name).symlink_to(place / source)
    return private


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Image:
    """A raw image as the pool's own worker has seen it: the agent itself must not touch storage that may hang. ``direct``: its file system
    can do without the page cache; ``sparse``: not all of its blocks are there. ``blockdev``: how QEMU opens an image that has no path,
    and ``secrets`` what that refers to (``Attached``)."""

    path: str
    direct: bool
    sparse: bool
    blockdev: Mapping[str, Any] | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)


def _cache(image: Image) -> str:
    """QEMU's cache mode: past the page cache where the file system can. Both modes keep the order to flush."""
    return "none" if image.direct else "writeback"


def _options(image: Image) -> str:
    """The image in QEMU's words: zeros that come over the wire make holes in a sparse one, and keep the blocks of a preallocated one."""
    path, discard = image.path, "unmap" if image.sparse else "ignore"
    if image.blockdev is not None:
        return f"driver=raw,discard={discard},{_flat('file', {**image.blockdev, 'discard': discard})}"
    # In both layers: qemu-nbd's own option leaves the lower one at unmap.
    return f"driver=raw,discard={discard},file.driver=file,file.discard={discard},file.aio=threads,file.filename={path.replace(',', ',,')}"


def _flat(name: str, value: Any) -> str:
    """A block node in QEMU's option syntax."""
    if isinstance(value, Mapping):
        return ",".join(_flat(f"{name}.{key}", inner) for key, inner in value.items())
    word = ("on" if value else "off") if isinstance(value, bool) else str(value)
    return f"{name}={word.replace(',', ',,')}"


def _secrets(image: Image) -> list[str]:
    """QEMU's objects for what opening the image takes; it reads them from files."""
    found = sorted(image.secrets.items())
    return [word for name, path in found for word in ("--object", f"secret,id={name},format=base64,file={path.replace(',', ',,')}")]


async def serve(image: Image, address: str, tls_dir: Path, peer: str, run_dir: Path) -> tuple[int, int]:
    """Serve the raw image to the node ``peer`` alone; (port, pid). Its process outlives the agent; ``unserve`` ends it.

    Errors: HostError with qemu-nbd's words, DeadlineExceeded.
    """
    tls = credentials(tls_dir, run_dir / "tls")
    pid_file = run_dir / _PID_FILE
    argv = ["qemu-nbd", "--fork", "--persistent", "--shared=1", "--image-opts", "--export-name=disk"]
    argv += _secrets(image)
    argv += [f"--cache={_cache(image)}", f"--bind={address}", f"--pid-file={pid_file}"]
    argv += ["--object", f"tls-creds-x509,id=tls,dir={tls},endpoint=server,verify-peer=on", "--tls-creds=tls"]
    argv += ["--object", f"authz-simple,id=peer,identity=CN={peer}", "--tls-authz=peer"]
    options = _options(image)
    for _ in range(5):
        port = _free_port(address)
        code, said = await _start([*argv, f"--port={port}", options], run_dir)
        if code == 0:
            return port, int(pid_file.read_text())
        # Somebody else may take the port between our look and its use.
        if "Address already in use" not in said:
            break
    raise HostError(f"qemu-nbd cannot serve {image.path}: {said}")


async def _start(argv: list[str], run_dir: Path) -> tuple[int, str]:
    """Run a program that goes into the background: its code and its words. They go to a file: the server keeps its stderr."""
    words = run_dir / "nbd.log"
    with words.open("wb") as log:
        try:
            process = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log)
        except FileNotFoundError:
            raise HostError(f"there is no command {argv[0]}", hint="apt install qemu-utils") from None
    try:
        async with asyncio.timeout(_START):
            code = await process.wait()
    except TimeoutError:
        await unserve(run_dir)
        raise DeadlineExceeded(f"qemu-nbd did not start within {_START:g} s") from None
    finally:
        await _end(process)
    return code, words.read_text(errors="replace").strip()


@contextlib.contextmanager
def _server(run_dir: Path) -> Iterator[int | None]:
    """A handle on the server of this directory, None when there is none. The handle stays its own, whatever becomes of its number."""
    pid_file = run_dir / _PID_FILE
    try:
        pid = int(pid_file.read_text())
        handle = os.pidfd_open(pid)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        yield None
        return
    try:
        # The number may be another process' by now; what names this very file is the server.
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        yield handle if f"--pid-file={pid_file}".encode() in command else None
    except (FileNotFoundError, ProcessLookupError):
        yield None
    finally:
        os.close(handle)


async def unserve(run_dir: Path) -> None:
    """End the server of this directory, letting it flush; none is success. Errors: HostError when it does not go."""
    with _server(run_dir) as handle:
        if handle is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, number)
                if await _gone(handle):
                    break
            else:
                raise HostError(f"the server of a copy does not end (its pid is in {run_dir / _PID_FILE})", hint="look at the kernel log")
    shutil.rmtree(run_dir, ignore_errors=True)


async def _gone(handle: int) -> bool:
    """Whether the process ends within the grace."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    if select.select([handle], [], [], 0)[0]:
        return True
    loop.add_reader(handle, ended.set)
    try:
        async with asyncio.timeout(_GRACE):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(handle)
    return True


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill it if it still runs, and wait for it: not for ever, since it may hang in the kernel."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
                await process.wait()


async def push(
    image: Image | str,
    host: str,
    port: int,
    server: str,
    tls_dir: Path,
    report: Callable[[Progress], None],
    run_dir: Path,
    deadline: float = 3600.0,
    *,
    inherit: tuple[int, ...] = (),
) -> None:
    """Copy the raw image into the one that ``server`` (the node's name) serves; flushed there when this returns. ``image`` may also be a
    ``json:`` description of another one (``sources.as_qemu``), with the descriptors that its reader must ``inherit``.

    Errors: HostError with the words of QEMU's tools, DeadlineExceeded. If the waiting task is cancelled, the copying ends too.
    """
    tls = credentials(tls_dir, run_dir / "tls")
    target = f"driver=nbd,server.type=inet,server.host={host},server.port={port},export=disk,tls-creds=tls,tls-hostname={server}"
    secure = ["--object", f"tls-creds-x509,id=tls,dir={tls},endpoint=client,verify-peer=on"]
    copying = ["qemu-img", "convert", "-n", "-p", "-t", "none", *_reading(image), *secure, "--target-image-opts", _source(image), target]
    # qemu-img does not tell whether its last flush failed; this does.
    flushing = ["qemu-io", *secure, "--image-opts", "-c", "flush", target]
    try:
        await _run(copying, deadline, report, inherit)
        await _run(flushing, _FLUSH, report)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def _reading(image: Image | str) -> list[str]:
    """How ``qemu-img convert`` reads its source: an image of ours is raw, whatever its first bytes say."""
    return ["-T", "writeback"] if isinstance(image, str) else ["-T", _cache(image), "-f", "raw"]


def _source(image: Image | str) -> str:
    return image if isinstance(image, str) else image.path


async def convert(
    source: Image | str, target: Image, report: Callable[[Progress], None], deadline: float = 3600.0, *, inherit: tuple[int, ...] = ()
) -> None:
    """Copy an image (as in ``push``) into the raw one ``target``, which is there already; durable when this returns.

    Errors: HostError with the words of QEMU's tools, DeadlineExceeded. If the waiting task is cancelled, the copying ends too.
    """
    opening = [*_secrets(target), "--target-image-opts"]
    copying = ["qemu-img", "convert", "-n", "-p", "-t", _cache(target), *_reading(source), *opening, _source(source)]
    await _run([*copying, _options(target)], deadline, report, inherit)
    # qemu-img does not tell whether its last flush failed; who asks next is told. In a process: it may hang.
    flushing = ["qemu-io", *_secrets(target), "--image-opts", "-c", "flush", _options(target)]
    await _run(flushing if target.blockdev is not None else ["sync", target.path], _FLUSH, report)


async def _run(argv: list[str], deadline: float, report: Callable[[Progress], None], inherit: tuple[int, ...] = ()) -> None:
    # setpriv: the copying ends with the agent; the next one begins anew.
    process = await asyncio.create_subprocess_exec(
        "setpriv",
        "--pdeathsig=KILL",
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=inherit,
    )
    out, err = process.stdout, process.stderr
    assert out is not None
    assert err is not None
    words = asyncio.create_task(err.read())
    rest = b""
    try:
        async with asyncio.timeout(deadline):
            while part := await out.read(4096):
                rest = rest[-64:] + part
                if found := _PERCENT.findall(rest):
                    report(Progress(percent=float(found[-1]), text="copying the disk"))
            said = await words
            if await process.wait():
                why = f"the copy failed: {said.decode(errors='replace').strip()}"
                raise PoolFull(why) if "No space left on device" in why else HostError(why)
    except TimeoutError:
        raise DeadlineExceeded(f"the copy took longer than {deadline:g} s") from None
    finally:
        words.cancel()
        await _end(process)
