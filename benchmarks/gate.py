"""The losses that the gate's tests resample, measured on the real model: `python -m benchmarks.gate`.

Trains and evaluates each of TASKS with its seeds as `fineloop train` does, and writes what every held-out record cost
into tests/components/gate/measured/<task>.parquet: twenty minutes on two cores.
"""

import ast
import hashlib
import io
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import example
from benchmarks.gpu_day import BUCKET, a_store
from components.config import config_file
from components.prepare.icd10 import rows as example_rows
from components.store.store import Store
from pipelines.configs import DEFAULT_CONFIG

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "tests" / "components" / "gate" / "measured"
OF_A_RECORD = ("nll", "other_prompt_nll", "exact_match")
DOCSTRING_CHARS = range(600, 1001)

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Records, and the settings of every model of them."""

    rows: Callable[[], Iterator[Row]]
    seeds: int
    settings: Mapping[str, Any]


def main() -> None:
    example.parser("gate", __doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="fineloop-gate-") as scratch, a_store(Path(scratch)):
        for name, task in TASKS.items():
            measured = [_measure(name, seed, Path(scratch)) for seed in range(task.seeds)]
            pq.write_table(
                _table(measured), MEASURED / f"{name}.parquet", use_dictionary=["reference"], compression="zstd"
            )


def _measure(name: str, seed: int, scratch: Path) -> pa.Table:
    """The run's evaluation_records.parquet."""
    task, run_id = TASKS[name], f"{name}-seed{seed}"
    source = scratch / f"{run_id}.jsonl"
    settings = {**task.settings, "data.source": source, "registry.bucket": BUCKET}
    settings |= {"adapter.name": name, "train.seed": seed}
    chosen = [f"{key}={value}" for key, value in settings.items()]
    config = config_file.load(DEFAULT_CONFIG, chosen)
    source.write_text("".join(json.dumps(row) + "\n" for row in task.rows()))
    command = [sys.executable, "-m", "pipelines.cli", "train", "--json", "--home", str(scratch / "home")]
    command += ["--run-id", run_id, *(part for each in chosen for part in ("--set", each))]
    answer = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    for role, metrics in answer["metrics"].items():
        print(run_id, role, metrics, flush=True)
    store = Store.open(config.registry)
    return pq.read_table(io.BytesIO(store.get(f"runs/{run_id}/evaluation_records.parquet")))


def _table(measured: Sequence[pa.Table]) -> pa.Table:
    """Columns of the records and the base, and those of the candidate of each seed."""
    first, columns = measured[0], dict[str, Any]()
    columns["id"] = [hashlib.sha256(each.encode()).hexdigest()[:8] for each in first["id"].to_pylist()]
    references = first["reference"].to_pylist()
    if len(set(references)) < len(references) / 2:
        columns["reference"] = references
    columns["answer_tokens"] = first["answer_tokens"].to_pylist()
    of_models = [("base", "base", first), *((f"seed{seed}", "candidate", of) for seed, of in enumerate(measured))]
    for name, role, of in of_models:
        assert of["id"] == first["id"], f"{name} was measured on other records"
        values = {kept: of[f"{role}_{kept}"] for kept in OF_A_RECORD if f"{role}_{kept}" in of.column_names}
        columns |= {f"{name}_{kept}": value.cast(pa.float32()) for kept, value in values.items()}
    return pa.table(columns)


def docstrings() -> Iterator[Row]:
    """Python's own functions and torch's, each with its docstring of about two hundred tokens."""
    import torch

    for root in (Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            place = path.relative_to(root)
            if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(place.parts):
                continue
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    said = ast.get_docstring(node) or ""
                    if len(said) in DOCSTRING_CHARS:
                        asked = f"{place}: def {node.name}({ast.unparse(node.args)})"
                        turns = (("user", asked), ("assistant", said))
                        messages = [{"role": role, "content": content} for role, content in turns]
                        yield {"id": f"{root.name}/{place}/{node.name}", "messages": messages}


TASKS = {
    "icd10": Task(
        example_rows,
        2,
        {"data.max_records": 3250, "data.eval_share": 0.385, "evaluate.records": 1000, "data.validation_share": 0.2},
    ),
    "docstrings": Task(
        docstrings,
        1,
        {
            "data.max_records": 540,
            "data.eval_share": 0.4,
            "evaluate.records": 170,
            "evaluate.max_new_tokens": 1,
            "model.max_length": 512,
            "train.evals_per_epoch": 1,
        },
    ),
}


if __name__ == "__main__":
    main()
