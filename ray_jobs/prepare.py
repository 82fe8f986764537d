"""Prepare a run's data on Ray, without a GPU: `python -m ray_jobs.prepare --config ... --run-id ID`.

Ray Data reads the files and validates their rows on the cluster's CPUs, in kept order. What has to see all records at
once - duplicates, the split, near-duplicates, the window, their order - is done here, in the driver, on disk and in as
little memory as `data.memory_gib` says, by the very functions that prepare data on one machine.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from components.config.schema import RunConfig
from components.prepare import prepare as preparing
from components.prepare.prepare import prepare_if_new
from components.prepare.sources import Source, rows_of
from components.prepare.validate import Reader, Rules, Validated, Validation, read_here
from components.records import runs
from components.records.steps import Prepared
from components.shared import garbage
from components.shared.errors import FineloopError
from components.shared.protocol import say
from components.step.step import StepRun
from components.store.store import Store
from ray_jobs import entry

STEP = "prepare"
BLOCK_BYTES = 4 * 2**20
"""Approximate size of the blocks of rows that tasks validate: one large file is split into many blocks."""
MOST_READERS = 256
"""Maximum number of tasks that read files."""
OF_READING, OF_VALIDATING = 0.25, 0.75
"""CPUs that a reading task and a validating task request. The two differ because Ray Data fuses operators with equal
requests, which would leave a large file to one CPU. Together they fit on one CPU."""


def main() -> None:
    """Run the job of this command line, and exit with its code."""
    parser = entry.parser("ray_jobs.prepare", __doc__)
    parser.add_argument("--run-id", required=True, help="name of the run in the store")
    parser.add_argument("--decided", action="store_true", help="a gate decides at the end of the run")
    arguments = parser.parse_args()

    def job() -> None:
        config = entry.load_config(arguments.config, arguments.set)
        prepare_run(config, run_id=arguments.run_id, is_decided=arguments.decided)

    entry.run(STEP, job, uses_models=False)


def prepare_run(config: RunConfig, *, run_id: str, is_decided: bool = False) -> None:
    """Run the prepare step, and write its result to runs/<run_id>/prepared.json."""
    run = StepRun(STEP, run_id, config, Store.open(config.registry))
    prepare_if_new(run, is_decided=is_decided, reader=reader_of(config))
    runs.write(run.store, run_id, Prepared(result=run.result))


def prepare(config: RunConfig, step: str) -> str:
    """Prepare the data in a job that was given no dataset; returns the dataset's URI. Raises as
    `components.prepare.prepare.prepare`."""
    say(step, f"preparing {config.data.source}")
    prepared = preparing.prepare(config, Store.open(config.registry), reader=reader_of(config))
    say(step, prepared.summary)
    return prepared.uri


def reader_of(config: RunConfig) -> Reader:
    """The reader for `data.engine`: Ray Data, or this process."""
    return read_on_ray if config.data.engine == "ray" else read_here


def read_on_ray(sources: Sequence[Source], rules: Rules) -> Iterator[tuple[int, Validated]]:
    """Read and validate the sources with Ray Data, on the cluster of this driver.

    A task that is lost with its worker is retried from the same file: its result does not depend on the worker.
    """
    entry.connect()
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    placed = [*enumerate(sources)]
    of_one_task = -(-len(placed) // MOST_READERS)
    how: dict[str, Any] = {"batch_format": "pyarrow", "fn_args": (rules,)}
    with ray.data.DataContext.current(context):
        files = ray.data.from_arrow(
            [_block(*placed[at : at + of_one_task]) for at in range(0, len(placed), of_one_task)]
        )
        rows = files.map_batches(_read, batch_size=None, num_cpus=OF_READING, **how)
        batches = rows.map_batches(_validate, batch_size=1, num_cpus=OF_VALIDATING, **how)
        for block in batches.iter_batches(batch_size=None, batch_format="pyarrow"):
            for result in block["item"].to_pylist():
                if isinstance(result, FineloopError):
                    raise result
                yield result


def _read(block: pa.Table, rules: Rules) -> Iterator[pa.Table]:
    """Read some sources, and yield their raw rows in portions, each with its source and the source's index."""
    placed = block["item"].to_pylist()
    with _errors_as_items() as failed, garbage.of_new_objects():
        for number, rows in rows_of([source for _, source in placed], rules.columns_read):
            yield _block((*placed[number], rows))
    yield from failed


def _validate(block: pa.Table, rules: Rules) -> Iterator[pa.Table]:
    """Validate raw rows, and yield the result of each portion; errors are passed on."""
    with _errors_as_items() as failed, garbage.of_new_objects():
        validation = Validation(rules)
        for item in block["item"].to_pylist():
            if isinstance(item, FineloopError):
                yield _block(item)
            else:
                place, source, rows = item
                yield _block((place, validation.of(source, rows)))
    yield from failed


@contextlib.contextmanager
def _errors_as_items() -> Iterator[list[pa.Table]]:
    """Turn a FineloopError in the body into a last item of the results. If it were raised, Ray would wrap it in its own
    exception, and report the first task to fail instead of the first in order."""
    failed: list[pa.Table] = []
    try:
        yield failed
    except FineloopError as exc:
        failed.append(_block(exc))


def _block(*items: object) -> pa.Table:
    """An Arrow table whose rows are these objects, as Ray Data passes them between tasks."""
    from ray.data.extensions import ArrowPythonObjectArray

    return pa.table({"item": ArrowPythonObjectArray.from_objects(items)})


if __name__ == "__main__":
    main()
