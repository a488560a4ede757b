"""What holds a local sandbox to its limits: control groups where writable, else rlimits."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

from sandbox_pipeline.config import SandboxConfig
from sandbox_pipeline.sandboxes.base import Resources

DEFAULT_MAX_PROCESSES = 4096
MIB = 1 << 20
CPU_PERIOD_US = 100_000
# A tenth of what a group has by default: where agents want more than there is, whoever follows them
# all goes first. A niceness does not do that where the kernel groups processes by session
# (sched(7), autogroups), since it holds within a group only.
CPU_WEIGHT = {1: ("cpu.shares", "102"), 2: ("cpu.weight", "10")}
REMOVE_SECONDS = 0.5
CONTROLLERS = ("cpu", "cpuacct", "memory", "pids")


@dataclass(frozen=True)
class LimitStatus:
    """Whether one limit can be held on this machine.

    Attributes:
        limit: name of the field of `SandboxConfig`.
        mechanism: what holds it, such as `cgroup v1 pids`.
        note: why not, or how far.
    """

    limit: str
    mechanism: str
    in_force: bool
    note: str


@dataclass(frozen=True)
class LimitPlan:
    """What the supervisor sets up for one sandbox.

    Attributes:
        cgroups: folders to make, join and remove.
        cgroup_values: file and value, in order.
        rlimits: name without `RLIMIT_` and value.
    """

    cgroups: tuple[Path, ...]
    cgroup_values: tuple[tuple[Path, str], ...]
    rlimits: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Hierarchy:
    """Where control groups with one controller can be made."""

    parent: Path
    version: int

    def offers(self, controller: str) -> bool:
        """Whether groups made here have this controller and processes may be put into them."""
        if self.version == 2:
            enabled = _read_text(self.parent / "cgroup.subtree_control").split()
            if controller not in enabled:
                return False
        probe = self.parent / f"sandbox-pipeline-probe-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError:
            return False
        return os.access(self.parent / "cgroup.procs", os.W_OK)


def plan_limits(config: SandboxConfig, name: str) -> LimitPlan:
    """How to hold a sandbox to its limits here.

    Args:
        config: what the limits are.
        name: of the sandbox's control groups, unique on this machine.
    """
    folders: dict[Path, None] = {}
    values: list[tuple[Path, str]] = []
    wanted = _wanted_values(config)
    for controller, hierarchy in _hierarchies().items():
        folder = hierarchy.parent / name
        folders[folder] = None
        values += [
            (folder / file, value)
            for file, value in wanted.get((controller, hierarchy.version), ())
        ]
    rlimits = [("CORE", 0)]
    if config.disk_mb is not None:
        rlimits.append(("FSIZE", config.disk_mb * MIB))
    if config.max_processes is not None and "pids" not in _hierarchies() and os.geteuid() != 0:
        rlimits.append(("NPROC", config.max_processes))
    return LimitPlan(tuple(folders), tuple(values), tuple(rlimits))


def _wanted_values(config: SandboxConfig) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """File and value by controller and version of control groups."""
    pids = [("pids.max", str(config.max_processes or DEFAULT_MAX_PROCESSES))]
    values = {("pids", 1): pids, ("pids", 2): pids}
    values |= {("cpu", version): [weight] for version, weight in CPU_WEIGHT.items()}
    if config.memory_mb is not None:
        size = str(config.memory_mb * MIB)
        # The file for memory and swap together is missing where the kernel doesn't count swap.
        values["memory", 1] = [
            ("memory.limit_in_bytes", size),
            ("memory.memsw.limit_in_bytes", size),
        ]
        values["memory", 2] = [("memory.max", size), ("memory.swap.max", "0")]
    if config.cpu is not None:
        quota = str(max(1000, int(config.cpu * CPU_PERIOD_US)))
        values["cpu", 1] += [
            ("cpu.cfs_period_us", str(CPU_PERIOD_US)),
            ("cpu.cfs_quota_us", quota),
        ]
        values["cpu", 2] += [("cpu.max", f"{quota} {CPU_PERIOD_US}")]
    return values


def cgroup_usage(cgroups: tuple[Path, ...]) -> Resources:
    """What the processes of these control groups used; None for what none of them tells."""
    cpu_seconds = peak = None
    for folder in cgroups:
        nanoseconds = _read_int(folder / "cpuacct.usage")
        if nanoseconds is not None:
            cpu_seconds = nanoseconds / 1e9
        with contextlib.suppress(OSError, ValueError, IndexError):
            line = (folder / "cpu.stat").read_text(encoding="ascii").split("\n", 1)[0].split()
            if line[0] == "usage_usec":
                cpu_seconds = int(line[1]) / 1e6
        for file in ("memory.max_usage_in_bytes", "memory.peak"):
            found = _read_int(folder / file)
            peak = peak if found is None else found
    return Resources(cpu_seconds=cpu_seconds, peak_memory_bytes=peak)


def remove_cgroups(cgroups: tuple[Path, ...]) -> None:
    """Remove what a supervisor that was killed could not; blocks for a moment at most."""
    end = time.monotonic() + REMOVE_SECONDS
    for folder in cgroups:
        while folder.exists():
            try:
                folder.rmdir()
            except OSError:
                # Its last processes may still be dying.
                if time.monotonic() > end:
                    break
                time.sleep(0.005)


def limits_in_force() -> list[LimitStatus]:
    """Each limit of `SandboxConfig` and whether the local provider can hold it on this machine."""
    hierarchies = _hierarchies()
    statuses: list[LimitStatus] = []
    for limit, controller in (("cpu", "cpu"), ("memory_mb", "memory"), ("max_processes", "pids")):
        found = hierarchies.get(controller)
        if found is not None:
            note = f"control groups below {found.parent}"
            if limit == "max_processes":
                note += f"; {DEFAULT_MAX_PROCESSES} where nothing is set"
            statuses.append(LimitStatus(limit, f"cgroup v{found.version} {controller}", True, note))
        elif limit == "max_processes" and os.geteuid() != 0:
            note = "counts all processes of this user; only where max_processes is set"
            statuses.append(LimitStatus(limit, "RLIMIT_NPROC", True, note))
        else:
            note = f"no control group with '{controller}' is writable for this user"
            statuses.append(LimitStatus(limit, "none", False, note))
    note = (
        "size of a single file at once, of the whole home at the next look (every second or more)"
    )
    statuses.append(LimitStatus("disk_mb", "RLIMIT_FSIZE and supervisor", True, note))
    return statuses


@functools.cache
def _hierarchies() -> dict[str, _Hierarchy]:
    """By controller, where this process can make control groups; tried once, for real."""
    found: dict[str, _Hierarchy] = {}
    mounts = _cgroup_mounts()
    for line in _read_text(Path("/proc/self/cgroup")).splitlines():
        _, names, own = line.split(":", 2)
        if not names:
            places = [_Hierarchy(place, 2) for place in _v2_parents(mounts.get("", []), own)]
            names = ",".join(CONTROLLERS)
        else:
            mounted = [mount for name in names.split(",") for mount in mounts.get(name, [])]
            parents = [_below(mount, own) for mount in mounted]
            places = [_Hierarchy(place, 1) for place in parents if place is not None]
        for place in places:
            for controller in names.split(","):
                if (
                    controller not in found
                    and controller in CONTROLLERS
                    and place.offers(controller)
                ):
                    found[controller] = place
    return found


def _v2_parents(mounts: list[tuple[str, Path]], own: str) -> list[Path]:
    """The own group and the one above: a group with processes can't hand on controllers itself."""
    places = [_below(mount, group) for mount in mounts for group in (own, str(Path(own).parent))]
    return [place for place in places if place is not None]


def _below(mount: tuple[str, Path], group: str) -> Path | None:
    """Where a control group is seen through a mount of which only a part may be mounted."""
    root, point = mount
    try:
        place = point / Path(group).relative_to(root)
    except ValueError:
        place = point
    return place if place.is_dir() else None


def _cgroup_mounts() -> dict[str, list[tuple[str, Path]]]:
    """By controller (v2: the empty name), the group that is mounted and where."""
    mounts: dict[str, list[tuple[str, Path]]] = {}
    for line in _read_text(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(kind) < 3 or len(fields) < 5:
            continue
        place = (fields[3], Path(fields[4]))
        if kind[0] == "cgroup2":
            mounts.setdefault("", []).append(place)
        elif kind[0] == "cgroup":
            for option in kind[2].split(","):
                mounts.setdefault(option, []).append(place)
    return mounts


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
