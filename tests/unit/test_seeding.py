"""The file system of a seed."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pytest
from pycdlib import PyCdlib

from atoll.agent.seeding import iso

FILES = {"meta-data": "instance-id: i-1\n", "user-data": "#cloud-config\nname: Grüße\n", "network-config": "version: 2\n"}


def test_files_are_found_by_their_names_in_both_extensions() -> None:
    made = iso(FILES)
    assert len(made) % 2048 == 0
    assert len(made) < 1 << 20
    image = PyCdlib()
    image.open_fp(io.BytesIO(made))
    for kind in ("rr_path", "joliet_path"):
        for name, text in FILES.items():
            out = io.BytesIO()
            image.get_file_from_iso_fp(out, **{kind: f"/{name}"})
            assert out.getvalue().decode() == text
    image.close()


def test_the_largest_request_fits_on_the_seed() -> None:
    assert len(iso({name: "#" * (512 << 10) for name in FILES})) <= 4 << 20


@pytest.mark.skipif(not shutil.which("blkid"), reason="blkid is not installed")
def test_its_label_is_what_cloud_init_looks_for(tmp_path: Path) -> None:
    (tmp_path / "seed").write_bytes(iso(FILES).ljust(4 << 20, b"\0"))
    argv = ["blkid", "-o", "export", str(tmp_path / "seed")]
    found = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    assert "LABEL=cidata" in found
    assert "TYPE=iso9660" in found
