"""How much memory this machine has left for a process, its container's limit included."""

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # version 2; version 1 keeps the same figures under memory/
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def free_bytes() -> int | None:
    """None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return min([free, *left_by_container()])


def left_by_container(root: Path = _CGROUP) -> list[int]:
    """Bytes up to each limit that control groups set; none where there is none."""
    found = []
    for limit, used in _LIMITS:
        try:
            found.append(int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return [max(0, left) for left in found]
