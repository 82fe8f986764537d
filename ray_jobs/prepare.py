"""Prepare a run's data on Ray, without a GPU: `python -m ray_jobs.prepare --config ... --run-id ID`.

Ray Data reads the files and validates their rows on the cluster's CPUs, in kept order. What has to see all records at
once - duplicates, the split, near-duplicates, the window, their order - is done here, in the driver, on disk and in as
little memory as `data.memory_gib` says, by the very functions that prepare data on one machine.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from components.config.schema import RunConfig
from components.prepare import prepare as preparing
from components.prepare.prepare import PreparedDataset, prepare_if_new
from components.prepare.reading import Batch, Reader, Rules, nothing_old_collected, read_here, rows_of
from components.prepare.sources import Source
from components.records import runs
from components.records.steps import Prepared
from components.shared.errors import FineloopError
from components.step.step import StepRun
from components.store.store import Store
from ray_jobs import entry

if TYPE_CHECKING:
    import pyarrow as pa

STEP = "prepare"
BLOCK_BYTES = 4 * 2**20
"""Of rows that one task validates, about: of one large file many tasks make their part."""
MOST_READERS = 256
"""Tasks that the files are shared out among."""
OF_READING, OF_VALIDATING = 0.25, 0.75
"""CPUs of a task. Tasks that ask for the same are made one by Ray Data, which would leave one large file to one CPU;
together they fit where there is but one."""


def main() -> None:
    """Parse the command line and run the job; the process ends with the exit code of `entry.run`."""
    parser = entry.parser(
        "ray_jobs.prepare",
        "Prepare a run's data, and leave what became of it in the run's folder.",
        "ray job submit --working-dir . -- python -m ray_jobs.prepare --config mine.toml --run-id ID",
    )
    parser.add_argument("--run-id", required=True, help="name of the run in the store")
    parser.add_argument("--decided", action="store_true", help="a gate decides at the end of the run")
    arguments = parser.parse_args()

    def job() -> None:
        config = entry.load_config(arguments.config, arguments.set)
        prepare_run(config, run_id=arguments.run_id, is_decided=arguments.decided)

    entry.run(STEP, job, uses_models=False)


def prepare_run(config: RunConfig, *, run_id: str, is_decided: bool = False) -> None:
    """Do what the prepare step does, and leave its result in runs/<run_id>/prepared.json.

    Raises:
        FineloopError: as `components.prepare.prepare.prepare_if_new`.
    """
    run = StepRun(STEP, run_id, config, Store.open(config.registry))
    prepare_if_new(run, is_decided=is_decided, reader=reader_of(config))
    runs.write(run.store, run_id, Prepared(result=run.result))


def prepare(config: RunConfig, store: Store) -> PreparedDataset:
    """Prepare the data in a job that was given no dataset.

    Raises:
        FineloopError: as `components.prepare.prepare.prepare`.
    """
    return preparing.prepare(config, store, reader=reader_of(config))


def reader_of(config: RunConfig) -> Reader:
    """What reads for this config."""
    return read_on_ray if config.data.engine == "ray" else read_here


def read_on_ray(sources: Sequence[Source], rules: Rules) -> Iterator[Batch]:
    """The reader that is the cluster of this driver, by Ray Data.

    A task that is lost with its worker is done again from the same file: what it gives does not depend on who does it.
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
    with ray.data.DataContext.current(context):
        files = ray.data.from_arrow(
            [_block(*placed[at : at + of_one_task]) for at in range(0, len(placed), of_one_task)]
        )
        rows = files.map_batches(_read, batch_size=None, batch_format="pyarrow", fn_args=(rules,), num_cpus=OF_READING)
        batches = rows.map_batches(
            _validate, batch_size=1, batch_format="pyarrow", fn_args=(rules,), num_cpus=OF_VALIDATING
        )
        for block in batches.iter_batches(batch_size=None, batch_format="pyarrow"):
            for found in block["item"].to_pylist():
                if isinstance(found, FineloopError):
                    raise found
                yield found


def _read(block: "pa.Table", rules: Rules) -> Iterator["pa.Table"]:
    """The rows of some sources as they were read, some at a time, each time with the source and its place."""
    placed = block["item"].to_pylist()
    with _errors_as_items() as failed, nothing_old_collected():
        for number, rows in rows_of([source for _, source in placed], rules):
            yield _block((*placed[number], rows))
    yield from failed


def _validate(block: "pa.Table", rules: Rules) -> Iterator["pa.Table"]:
    """What became of rows as they were read."""
    with _errors_as_items() as failed, nothing_old_collected():
        validation = rules.validation()
        for found in block["item"].to_pylist():
            if isinstance(found, FineloopError):
                yield _block(found)
            else:
                place, source, rows = found
                yield _block(Batch(place, len(rows.lines), validation.of(source, rows)))
    yield from failed


@contextlib.contextmanager
def _errors_as_items() -> Iterator[list["pa.Table"]]:
    """Puts an error of ours where the result of the rest would be: raised there, Ray would put it into one of its own,
    and the first to fail would be named, not the first in order."""
    failed: list[pa.Table] = []
    try:
        yield failed
    except FineloopError as exc:
        failed.append(_block(exc))


def _block(*items: object) -> "pa.Table":
    """What Ray Data hands on, with these objects as its rows."""
    import pyarrow as pa
    from ray.data.extensions import ArrowPythonObjectArray

    return pa.table({"item": ArrowPythonObjectArray.from_objects(items)})


if __name__ == "__main__":
    main()
