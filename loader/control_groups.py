"""The control groups that a process is in, on Linux: folders whose files say what it may take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")


def group_folders(controller: str, proc: Path = PROC) -> Iterator[tuple[Path, int]]:
    """Folders of the groups that limit `controller` (`memory`, `cpu`), and the version of their files: 1 or 2.

    All of them, from the group itself up to what is mounted: each has a limit of its own.
    """
    mounts = [*_mounts(proc)]
    for controllers, group in _own_groups(proc):
        for kind, options, root, mount in mounts:
            if kind == "cgroup2" and not controllers:
                version = 2
            elif kind == "cgroup" and controller in controllers and controller in options:
                version = 1
            else:
                continue
            # What is mounted may itself be a group below the root, as in a container.
            inside = group.removeprefix(root) if root != "/" and group.startswith(root) else group
            folder = mount / inside.strip("/")
            while not folder.is_dir() and folder != mount:
                folder = folder.parent
            yield from ((each, version) for each in (folder, *folder.parents) if each == mount or mount in each.parents)


def lines(path: Path) -> list[str]:
    """Those of a file; none where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _own_groups(proc: Path) -> Iterator[tuple[list[str], str]]:
    for line in lines(proc / "self/cgroup"):
        parts = line.split(":", 2)
        if len(parts) == 3:
            yield [name for name in parts[1].split(",") if name], parts[2]


def _mounts(proc: Path) -> Iterator[tuple[str, list[str], str, Path]]:
    """Kind, options, root and place of each file system of control groups that is mounted."""
    for line in lines(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, last = before.split(), after.split()
        if len(fields) > 4 and len(last) > 2 and last[0] in ("cgroup", "cgroup2"):
            yield last[0], last[2].split(","), fields[3], Path(fields[4])
