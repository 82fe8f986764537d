"""What Ray says where it ended processes because their node had run out of memory, in a sentence; pure.

Its own message has fifty lines, of which a person's eye falls on the last: a table of processes.
"""

import re
from pathlib import PurePosixPath

# As the raylet of Ray 2.60 writes it.
_SAID = re.compile(
    r"killed due to the node running low on memory\. Memory on the node \(IP: ([^,\s]+)[^)]*\) was (\S+)GB used / "
    r"(\S+)GB limit"
)
_LARGEST = re.compile(r"Top \d+ memory users: PID\s+MEM\(GB\)\s+COMMAND\n((?:[ \t]*\d+\t[^\n]*\n?)+)")
_ROW = re.compile(r"(\d+)\t([\d.]+)\t?([^\s]*)[^\n]*\n?")
"""Process, memory, and the first word of its command, which is missing where the process has ended."""
LARGEST_SHOWN = 3


def ran_low(text: str) -> str | None:
    """Which node it was, what filled it, and the remedy; None where the text has no such message. The last counts.

    Of other programs the names alone are shown: arguments may hold what is not for everyone who reads a report.
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
