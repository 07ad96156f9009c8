"""Describe the processor, and count the CPUs that this process may use.

The count is that of the affinity mask, limited by the CPU quota of the control groups.
"""

from __future__ import annotations

import math
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SYSTEM = Path("/")
"""The folder that holds `proc/self` and the mount points named there."""

_INT8_INSTRUCTIONS: Final = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
_BF16_INSTRUCTIONS: Final = ("avx512_bf16", "amx_bf16")
INSTRUCTIONS: Final = ("avx2", "avx512f", "asimd", *_INT8_INSTRUCTIONS, *_BF16_INSTRUCTIONS)
"""Instruction sets that decide the speed of float32, int8 and bfloat16 products, as Linux names them."""


def available_cpus(root: Path = SYSTEM) -> int:
    """Return how many CPUs this process can keep busy, at least 1.

    A fractional quota is rounded up: with fewer threads a part of it could not be used.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, cpu_quota(root))))


def processor(root: Path = SYSTEM) -> tuple[str, list[str]]:
    """Return the name of the processor and which of `INSTRUCTIONS` it has; only Linux lists them."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        # The first processor is described first, and the others are alike.
        for line in (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    # Of x86 and of ARM.
    listed = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, [instruction for instruction in INSTRUCTIONS if instruction in listed]


def fast_precisions(instructions: Sequence[str]) -> list[str]:
    """Return the precisions whose products a processor with these of `INSTRUCTIONS` has instructions for."""
    needed = {"int8": _INT8_INSTRUCTIONS, "bf16": _BF16_INSTRUCTIONS}
    return ["fp32", *(precision for precision, any_of in needed.items() if set(any_of) & set(instructions))]


def cpu_quota(root: Path = SYSTEM) -> float:
    """Return the CPUs that the control groups of this process grant it, infinity without a limit.

    Both versions of control groups are read, as cgroups(7) describes them. The smallest quota of a group and of its
    parents counts.
    """
    return min((_quota_of(folder) for folder in _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folder of each control group that may limit the CPU, and those of its parents."""
    try:
        memberships, mounts = (_lines(root / "proc/self" / name) for name in ("cgroup", "mountinfo"))
    except OSError:
        # Not Linux, or /proc is not mounted.
        return
    group_of = {}
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        # The line of version 2 has no controllers, so its key is "".
        group_of.update(dict.fromkeys(controllers.split(","), path))
    for line in mounts:
        # proc_pid_mountinfo(5): the fourth field is the mounted part of the hierarchy, the fifth is the mount point.
        fields, _, source = (part.split() for part in line.partition(" - "))
        kind, options = source[0], source[-1].split(",")
        controller = "" if kind == "cgroup2" else "cpu"
        if controller not in group_of or not (kind == "cgroup2" or (kind == "cgroup" and "cpu" in options)):
            continue
        mounted, mount_point = (_unescaped(field).strip("/") for field in fields[3:5])
        inner = Path(group_of[controller].strip("/"))
        # In a container, the group may have its name on the host while only a part of the hierarchy is mounted.
        inner = inner.relative_to(mounted) if inner.is_relative_to(mounted) and ".." not in inner.parts else Path()
        yield from (root / mount_point / folder for folder in (inner, *inner.parents))


def _lines(path: Path) -> list[str]:
    """Return the lines of a file in `/proc`. `str.splitlines` would also split at other characters, inside of names."""
    return os.fsdecode(path.read_bytes()).split("\n")[:-1]


def _unescaped(field: str) -> str:
    """Decode the octal escapes with which mountinfo writes blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _quota_of(group: Path) -> float:
    """Return the CPUs that one control group grants, infinity without a limit."""
    # A group without this controller lacks these files; "max" and -1 mean no limit.
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return _ratio(quota, period)
    with suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        return _ratio(quota, period)
    return math.inf


def _ratio(quota: str, period: str) -> float:
    share = float(quota.replace("max", "inf"))
    return share / float(period) if share > 0 and float(period) > 0 else math.inf
