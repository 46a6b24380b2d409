"""Which accelerator really works here, found by running a guest: a /dev/kvm that exists may be good for nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import tempfile
from pathlib import Path

from atoll.hypervisor.qemu.command import BINARY, SANDBOX
from atoll.hypervisor.qemu.files import Account

#: probe.S, assembled.
CODE = base64.b64decode(
    "ArCtGwAAAQD+T1HkAAAQAAAAEAAAAAAAAAAAACAAEAC/AAAgADHAuQAMAADzq8cFAAAgAAMQIADHBQAQIAADICAAxwUAICAAgwAAAMcFCCAgAIMA"
    "IAC4AAAgAA8i2A8g4A0gBgAADyLguYAAAMAPMg0AAQAADzAPIMCD4PsNAwAAgA8iwA8BFfAAEADqkwAQAAgAvAAAMADzD28EJGYP1MDzD39EJBAx"
    "wDHSSMdEJCAAAAAASMdEJCgAAAAA8EgPx0wkIHUNuYDw+gL/yXX8sBDrArAgZrr0AO70Dx9EAAAAAAAAAAAAAP//AAAAm68ADwDgABAA"
)
#: What QEMU ends with when the guest has come to its end.
_ARRIVED = 33
#: For each accelerator, in seconds. Real hardware takes 0.1, emulation 0.2.
_DEADLINE = 4.5


async def accelerator(run_dir: Path, owner: Account | None) -> str:
    """``kvm``, ``tcg`` or ``none``. The answer is kept until the node boots again, or QEMU is replaced."""
    kept = run_dir / "accelerator.json"
    stamp = _stamp()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        data = json.loads(kept.read_text())
        if data["stamp"] == stamp:
            return str(data["accelerator"])
    found = "none"
    for candidate in ("kvm", "tcg"):
        if (candidate != "kvm" or os.access("/dev/kvm", os.R_OK | os.W_OK)) and await works(candidate, owner):
            found = candidate
            break
    with contextlib.suppress(OSError):
        run_dir.mkdir(parents=True, exist_ok=True)
        aside = run_dir / ".accelerator.new"
        aside.write_text(json.dumps({"stamp": stamp, "accelerator": found}))
        os.replace(aside, kept)
    return found


async def works(candidate: str, owner: Account | None) -> bool:
    """Whether a guest comes to its end with this accelerator, in less than five seconds."""
    with tempfile.TemporaryDirectory(prefix="atoll-probe-") as place:
        code = Path(place) / "probe.bin"
        code.write_bytes(CODE)
        code.chmod(0o644)
        Path(place).chmod(0o755)
        argv = [BINARY, "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX, "-accel", candidate, "-cpu", "qemu64"]
        argv += ["-machine", "q35,hpet=off,smbus=off,sata=off,usb=off", "-m", "32M", "-no-reboot", "-kernel", str(code)]
        argv += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        null = asyncio.subprocess.DEVNULL
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=null,
                stdout=null,
                stderr=null,
                user=owner.uid if owner else None,
                group=owner.gid if owner else None,
                extra_groups=owner.groups if owner else None,
            )
        except OSError:
            return False
        try:
            return await asyncio.wait_for(process.wait(), _DEADLINE) == _ARRIVED
        except TimeoutError:
            return False
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


def _stamp() -> list[str]:
    """Differs after a reboot, and after an upgrade of QEMU."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for place in os.environ.get("PATH", os.defpath).split(":"):
        with contextlib.suppress(OSError):
            return [boot, str(os.stat(os.path.join(place, BINARY)).st_mtime_ns), str(os.path.exists("/dev/kvm"))]
    return [boot, "", ""]
