"""Labs by name, whichever kind they are."""

from __future__ import annotations

import os

from atoll.lab import lab, layout, process
from atoll.lab.base import LabRecord
from atoll.lab.lab import Lab
from atoll.lab.process import ProcessLab
from atoll.model.errors import InvalidInput, NotFound

AnyLab = Lab | ProcessLab


def names() -> dict[str, bool]:
    """Every lab: name -> whether it is one of plain processes."""
    found = dict.fromkeys(process.names(), True)
    return dict(sorted((found | dict.fromkeys((name for name in lab.names() if name not in found or not _same_root()), False)).items()))


def load(name: str = "") -> AnyLab:
    """The lab of this name; without a name, the only one there is. Raises NotFound; InvalidInput when there are several."""
    if not name:
        known = list(names())
        if not known:
            raise NotFound("there is no lab", hint="atoll lab up")
        if len(known) > 1:
            raise InvalidInput(f"there are several labs: {', '.join(known)}", hint="say which: --name NAME")
        name = known[0]
    for rootless in (False, True):
        try:
            record = LabRecord.read(layout.lab_dir(name, rootless=rootless))
        except NotFound:
            continue
        return ProcessLab.load(name) if record.rootless else Lab.load(name)
    raise NotFound(f"there is no lab {name}", hint="atoll lab list; atoll lab up --name NAME")


def remove(name: str) -> None:
    """Remove a lab of either kind, or what is left of it. Fine when there is none."""
    layout.check_name(name)
    try:
        rootless = load(name).record.rootless
    except NotFound:
        # Its files are lost or were never written: only a look at the system can tell what there is.
        if os.geteuid() == 0:
            lab.remove(name)
        process.remove(name)
        return
    process.remove(name) if rootless else lab.remove(name)


def _same_root() -> bool:
    return layout.root() == layout.rootless_root()
