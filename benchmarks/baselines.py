"""What the benchmarks printed before, by kind of processor: baselines.json beside this file.

Ratios, which hold on any machine of a kind, and not speeds. `--record` writes what a benchmark finds.
"""

import json
import platform
from pathlib import Path

PATH = Path(__file__).with_name("baselines.json")
TOLERANCE = 0.05
FLAGS = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2"}
"""Flags in /proc/cpuinfo and what they are called here, the most capable first."""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The kind of processor that this is, as the table in docs/evidence.md has it."""
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.is_file() else []
    return next((kind for flag, kind in FLAGS.items() if flag in flags), platform.machine())


def compared(name: str, ratio: float, *, record: bool = False, kind: str | None = None, path: Path = PATH) -> str:
    """A line on how a ratio stands to the one that was recorded under this name for this kind of processor."""
    kind = kind or processor()
    known: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = known.get(kind, {}).get(name)
    if record:
        known.setdefault(kind, {})[name] = round(ratio, 2)
        path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if before is None:
        return f" baseline  none for {name} on {kind}" + ("; recorded" if record else "; --record writes it")
    if ratio < (1 - TOLERANCE) * before:
        return f"    WORSE  {name} is {1 - ratio / before:.0%} below the {before:.2f} recorded on {kind}"
    return f" baseline  {before:.2f} on {kind}"
