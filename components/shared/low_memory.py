"""Sums up Ray's message that it ended processes because their node ran out of memory; pure.

The message has fifty lines, and a reader notices the last ones: a table of processes.
"""

import re
from pathlib import PurePosixPath

# The message of the raylet of Ray 2.60.
_SAID = re.compile(
    r"killed due to the node running low on memory\. Memory on the node \(IP: ([^,\s]+)[^)]*\) was (\S+)GB used / "
    r"(\S+)GB limit"
)
_LARGEST = re.compile(r"Top \d+ memory users: PID\s+MEM\(GB\)\s+COMMAND\n((?:[ \t]*\d+\t[^\n]*\n?)+)")
_ROW = re.compile(r"(\d+)\t([\d.]+)\t?([^\s]*)[^\n]*\n?")
"""A process, its memory, and the first word of its command, which is missing if the process has ended."""
LARGEST_SHOWN = 3


def ran_low(text: str) -> str | None:
    """Say which node ran out of memory, what filled it, and the remedy, by the last such message; None without one.

    Only the names of programs are shown: their arguments may hold what not every reader of a report may see.
    """
    found = [*_SAID.finditer(text)]
    if not found:
        return None
    address, used, limit = found[-1].groups()
    said = f"node {address} ran out of memory ({used} of {limit} GB in use), and Ray ended processes of the run there"
    if largest := _LARGEST.search(text, found[-1].end()):
        rows = _ROW.findall(largest[1])[:LARGEST_SHOWN]
        shown = ", ".join(f"{gb} GB {PurePosixPath(name).name or 'unknown'} (pid {pid})" for pid, gb, name in rows)
        said += f"; the largest were {shown}"
    return (
        f"{said}. End other programs there, lower train.micro_batch_size or ray.num_workers, or give its pods more "
        "(ray.cluster.worker.memory_gib)"
    )
