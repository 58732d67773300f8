"""Device nodes and CDI names of granted GPUs, as the drivers and container runtimes of a host have them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from ...schemas.requests import Grant

CDI_FOLDERS: Final = (Path("/etc/cdi"), Path("/var/run/cdi"))
"""Where container runtimes read CDI files (the specification of the Container Device Interface)."""
_NVIDIA_COMMON: Final = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")
_NVIDIA_UUIDS: Final = ("GPU-", "MIG-")
_KIND: Final = re.compile(r"""["']?\bkind["']?\s*:\s*["']?([\w.-]+/[\w.-]+)""")
_NAME: Final = re.compile(r"""["']?\bname["']?\s*:\s*["']?([\w.:-]+)""")


def device_nodes(grants: Sequence[Grant], root: Path = Path("/")) -> list[str]:
    """Device nodes of the granted GPUs, with those that all GPUs of their vendor need.

    Args:
        grants: devices of a lease on this host.
        root: of the file system.
    """
    held = [grant for grant in grants if grant.device]
    if not held:
        return []
    minors = _nvidia_minors(root)
    nvidia = [grant for grant in held if (grant.mig_parent or grant.device) in minors]
    nodes: list[str] = []
    if nvidia:
        nodes += [f"/dev/nvidia{minors[grant.mig_parent or grant.device]}" for grant in nvidia]
        nodes += [path for path in _NVIDIA_COMMON if (root / path[1:]).exists()]
        if any(grant.mig_parent for grant in nvidia) and (root / "dev/nvidia-caps").is_dir():
            # Instances are chosen by the capability files, which the driver checks itself.
            nodes.append("char-nvidia-caps")
    if len(nvidia) < len(held) and (root / "dev/kfd").exists():
        # The kernel driver has one node for all; which render node is whose, only ROCm says.
        nodes += ["/dev/kfd", "char-drm"]
    return list(dict.fromkeys(nodes))


def _nvidia_minors(root: Path) -> dict[str, str]:
    """Number of the device node by the uuid of the GPU, from the driver's files in `/proc`."""
    found: dict[str, str] = {}
    for file in root.glob("proc/driver/nvidia/gpus/*/information"):
        try:
            lines = file.read_text("utf-8", "replace").splitlines()
        except OSError:
            continue
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "GPU UUID" in fields and "Device Minor" in fields:
            found[fields["GPU UUID"]] = fields["Device Minor"]
    return found


def cdi_names(grants: Iterable[Grant], folders: Sequence[Path] = CDI_FOLDERS) -> list[str]:
    """CDI names of the granted GPUs, such as `nvidia.com/gpu=GPU-1234…`.

    Raises:
        ValueError: the files of this host name none for a device; the message says what to do.
    """
    known = _cdi_devices(folders)
    names: list[str] = []
    for grant in grants:
        if grant.device:
            # Numbers are those of the vendor's own devices; instances have none.
            given = (grant.device,) if grant.mig_parent else (grant.device, str(grant.index))
            is_nvidia = grant.device.startswith(_NVIDIA_UUIDS)
            kinds = [kind for kind in known if kind.startswith("nvidia.") == is_nvidia]
            found = next((f"{kind}={name}" for name in given for kind in kinds if name in known[kind]), None)
            if found is None:
                places = " or ".join(map(str, folders))
                raise ValueError(
                    f"no CDI file in {places} names {grant.device}: `nvidia-ctk cdi generate` or `amd-ctk cdi generate`"
                    " writes one"
                )
            names.append(found)
    return names


def _cdi_devices(folders: Sequence[Path]) -> dict[str, set[str]]:
    """Names in CDI files, by kind: only these of a file's names are ever asked for that are uuids or numbers."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*")) if folder.is_dir() else ():
            if file.suffix in (".yaml", ".yml", ".json"):
                text = file.read_text("utf-8", "replace")
                if kind := _KIND.search(text):
                    found.setdefault(kind[1], set()).update(_NAME.findall(text))
    return found
