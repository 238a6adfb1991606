"""How much memory is free: of a GPU what its driver says, else the system's, or less where a container may use less.

Knows no model.
"""

from pathlib import Path

import psutil
import torch

# Files of a control group, version 2 and version 1: the limit, what is used, and of `memory.stat` the part of the use
# that is page cache and goes when memory is needed.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`; beside the CPU, no more than the process's control groups leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *left_by_limits()])


def left_by_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that each memory limit on this process leaves: that of its control group and those of the groups above.

    A container's limit is one, and the system's own figures do not show it. Empty where there is none, or no Linux.

    Args:
        root: where control groups are mounted.
        own: says which of them this process is in.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _V1) if controllers else (root, _V2)
        group = top / path.strip("/")
        above = len(group.relative_to(top).parts)
        for folder in [group, *group.parents][: above + 1]:
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # seen from within a container, its own group is the topmost
                continue
            if limit.isdecimal():  # `max` is none
                found.append(max(int(limit) - int(used) + int(stat.get(names[2], 0)), 0))
    return found
