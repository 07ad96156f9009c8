"""The number of CPUs that a process may use: its affinity mask, and the CPU quota of its control groups."""

from __future__ import annotations

import math
import os

import pytest

from samekit.backends.cpu import available_cpus, cpu_quota

# The lines are of real machines, shortened: cgroups(7) and proc_pid_mountinfo(5) describe their fields.
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 32 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime master:11 - cgroup cgroup rw,cpu,cpuacct"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
OTHER = """21 1 0:20 / /tmp rw - tmpfs  rw
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,discard
36 31 0:33 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"""
OF_V1 = "12:cpuset:{path}\n5:cpu,cpuacct:{path}\n1:name=systemd:{path}\n0::{path}"

# The groups of a process, what is mounted, and the files of control groups; then the quota in CPUs.
MACHINES = {
    "no /proc": (None, None, {}, math.inf),
    "no control groups": ("", OTHER, {}, math.inf),
    "version 2, docker run --cpus 2": ("0::/", V2, {"cpu.max": "200000 100000\n"}, 2),
    "version 2, no limit": ("0::/", V2, {"cpu.max": "max 100000\n"}, math.inf),
    "version 2, half a CPU": ("0::/", V2, {"cpu.max": "50000 100000\n"}, 0.5),
    "version 2, the host's root, without the file": ("0::/", V2, {}, math.inf),
    "version 2, a systemd unit": (
        "0::/system.slice/samekit.service",
        V2,
        {"system.slice/samekit.service/cpu.max": "150000 100000\n", "system.slice/cpu.max": "max 100000\n"},
        1.5,
    ),
    "version 2, the outer group is tighter": (
        "0::/outer/inner",
        V2,
        {"outer/inner/cpu.max": "800000 100000\n", "outer/cpu.max": "300000 100000\n"},
        3,
    ),
    "version 2, groups of other processes": (
        "0::/mine",
        V2,
        {"mine/cpu.max": "max 100000\n", "others/cpu.max": "100000 100000\n"},
        math.inf,
    ),
    "version 2, outside of its namespace": ("0::/../other", V2, {"cpu.max": "100000 100000\n"}, 1),
    "version 1, docker run --cpus 2": (
        OF_V1.format(path="/docker/0123"),
        V1.format(root="/docker/0123"),
        {"cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "version 1, no limit": (
        OF_V1.format(path="/"),
        V1.format(root="/"),
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        math.inf,
    ),
    "version 1, nested": (
        OF_V1.format(path="/a/b"),
        V1.format(root="/"),
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "50000\n"},
        5,
    ),
    "both versions, the CPU under version 1": (
        OF_V1.format(path="/"),
        f"{V1.format(root='/')}\n{HYBRID}",
        {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        3,
    ),
    "a blank in a name": (
        "0::/my group",
        V2.replace("/sys/fs/cgroup ", r"/sys/fs/my\040groups "),
        {"../my groups/my group/cpu.max": "100000 100000\n"},
        1,
    ),
    "a mount whose name splits lines": (
        "0::/",
        f"23 22 0:30 / /media/a\u2028b\rc rw - ext4 /dev/sdb1 rw\n{V2}",
        {"cpu.max": "200000 100000\n"},
        2,
    ),
    "files that say nothing": ("0::/", V2, {"cpu.max": "\n"}, math.inf),
    "a period of nothing": ("0::/", V2, {"cpu.max": "100000 0\n"}, math.inf),
}


@pytest.fixture
def machine(tmp_path, request):
    """Return a folder with the files of a machine's root, and the expected quota."""
    groups, mounts, files, quota = MACHINES[request.param]
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups + "\n" * bool(groups))
        (tmp_path / "proc/self/mountinfo").write_text(f"{OTHER}\n{mounts}\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path, quota


@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_quota(machine):
    root, quota = machine
    assert cpu_quota(root) == quota


@pytest.mark.parametrize("machine", MACHINES, indirect=True)
@pytest.mark.parametrize("affinity", [1, 2, 64])
def test_quota_and_affinity_both_count(machine, monkeypatch, affinity):
    root, quota = machine
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    # A part of a CPU counts as one more CPU.
    assert available_cpus(root) == min(affinity, math.inf if quota == math.inf else math.ceil(quota))
