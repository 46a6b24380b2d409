"""Copying the image of a stopped guest to another node: NBD over TLS, with QEMU's own tools.

The target serves one image to one peer (``qemu-nbd``); the source pushes (``qemu-img convert``). Both check the other's certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from atoll.model.errors import DeadlineExceeded, HostError
from atoll.model.messages import Progress
from atoll.runtime.process import alive, process_start_time

_NAMES = {
    "ca-cert.pem": "ca.pem",
    "server-cert.pem": "cert.pem",
    "server-key.pem": "key.pem",
    "client-cert.pem": "cert.pem",
    "client-key.pem": "key.pem",
}
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")


def credentials(tls_dir: Path, private: Path) -> Path:
    """The node's certificate under QEMU's names, in a private directory."""
    private.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, source in _NAMES.items():
        shutil.copyfile(tls_dir / source, private / name)
        (private / name).chmod(0o600)
    return private


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


async def serve(path: str, address: str, tls_dir: Path, peer: str, run_dir: Path) -> tuple[int, int]:
    """Serve the raw image to the node ``peer`` alone; (port, pid). Its process outlives the agent; ``unserve`` ends it.

    Errors: HostError with qemu-nbd's words.
    """
    tls = credentials(tls_dir, run_dir / "tls")
    port = _free_port(address)
    pid_file = run_dir / "nbd.pid"
    argv = ["qemu-nbd", "--fork", "--persistent", "--shared=1", "--format=raw", "--cache=none", "--aio=threads", "--export-name=disk"]
    argv += [f"--bind={address}", f"--port={port}", f"--pid-file={pid_file}"]
    argv += ["--object", f"tls-creds-x509,id=tls,dir={tls},endpoint=server,verify-peer=on", "--tls-creds=tls"]
    argv += ["--object", f"authz-simple,id=peer,identity=CN={peer}", "--tls-authz=peer", path]
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(20):
            _, said = await process.communicate()
    except TimeoutError:
        process.kill()
        raise DeadlineExceeded("qemu-nbd did not start within 20 s") from None
    if process.returncode:
        raise HostError(f"qemu-nbd cannot serve {path}: {said.decode(errors='replace').strip()}")
    pid = int(pid_file.read_text())
    (run_dir / "nbd.start").write_text(f"{pid} {process_start_time(pid)}")
    return port, pid


async def unserve(run_dir: Path) -> None:
    """End the server of this directory; none is success."""
    with contextlib.suppress(FileNotFoundError):
        pid, start = (int(word) for word in (run_dir / "nbd.start").read_text().split())
        if alive(pid, start):
            os.kill(pid, signal.SIGTERM)
            end = asyncio.get_running_loop().time() + 10
            while alive(pid, start):
                if asyncio.get_running_loop().time() > end:
                    os.kill(pid, signal.SIGKILL)
                    break
                await asyncio.sleep(0.05)
    shutil.rmtree(run_dir, ignore_errors=True)


async def push(
    path: str, host: str, port: int, server: str, tls_dir: Path, report: Callable[[Progress], None], run_dir: Path, deadline: float = 3600.0
) -> None:
    """Copy the raw image into the one that ``server`` (the node's name) serves; flushed there when this returns.

    Errors: HostError with qemu-img's words, DeadlineExceeded. If the waiting task is cancelled, the copying ends too.
    """
    private = run_dir / "tls"
    tls = credentials(tls_dir, private)
    target = f"driver=nbd,server.type=inet,server.host={host},server.port={port},export=disk,tls-creds=tls,tls-hostname={server}"
    argv = ["qemu-img", "convert", "-n", "-p", "-t", "none", "-T", "none", "-f", "raw"]
    argv += ["--object", f"tls-creds-x509,id=tls,dir={tls},endpoint=client,verify-peer=on", "--target-image-opts", path, target]
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(deadline):
            while part := await process.stdout.read(256):
                found = _PERCENT.findall(part)
                if found:
                    report(Progress(percent=float(found[-1]), text="copying the disk"))
            said = await process.stderr.read()
            if await process.wait():
                raise HostError(f"the copy failed: {said.decode(errors='replace').strip()}")
    except TimeoutError:
        raise DeadlineExceeded(f"the copy took longer than {deadline:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        shutil.rmtree(run_dir, ignore_errors=True)
