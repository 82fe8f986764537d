"""Rates and methods on the example, swept for real: `python -m benchmarks.sweeps`, two trainings at a time.

Each sweep is a `fineloop sweep`, and its record is kept in `benchmarks/swept/`. What all of them say is
`docs/method-figures.md`, which is written anew; `--write` does nothing else.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from components.records.sweep import MethodComparison, RateLoss, SweepResult, Trial, Tuned
from components.shared.machine import this_cpu

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).parent / "swept"
DOCUMENT = ROOT / "docs" / "method-figures.md"
LAYERS = {
    "layers-all": ("all linear layers", "all-linear"),
    "layers-feed-forward": ("the feed-forward's alone", '["gate_proj", "up_proj", "down_proj"]'),
    "layers-attention": ("the attention's alone", '["q_proj", "k_proj", "v_proj", "o_proj"]'),
}
"""What LoRA adapts, in words and as `method.target_modules`."""
SWEEPS = {
    "rates": ["--set", "tune.max_steps=8", "--set", "train.eval_records=32"],
    "methods": [
        *("--methods", "lora,qlora,rslora,dora,qdora,vera,dvora,loftq"),
        *("--set", "tune.max_steps=20", "--set", "train.batch_size=4", "--set", "train.micro_batch_size=4"),
        *("--set", "ray.num_workers=1", "--set", "train.eval_records=32"),
    ],
    **{
        name: [
            *("--methods", "lora", "--set", f"method.target_modules={modules}"),
            *("--set", "tune.max_steps=20", "--set", "train.batch_size=4", "--set", "train.micro_batch_size=4"),
            *("--set", "ray.num_workers=1", "--set", "train.eval_records=64", "--set", "tune.seeds=4"),
            *("--set", "tune.learning_rates=[1e-3, 3.16e-3, 1e-2]"),
        ]
        for name, (_, modules) in LAYERS.items()
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweeps", description=__doc__)
    parser.add_argument("sweeps", nargs="*", default=[*SWEEPS], metavar="SWEEP", help=" or ".join(SWEEPS))
    parser.add_argument("--write", action="store_true", help="only write the document, from the records that are kept")
    parser.add_argument("--home", type=Path, help="state of the sweeps, which then go on where they were cut off")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fineloop-sweeps-") as scratch:
        for name in () if options.write else options.sweeps:
            record = swept(SWEEPS[name], options.home or Path(scratch), run_id=name)
            (KEPT / f"{name}.json").write_text(record.model_dump_json(indent=1) + "\n")
    DOCUMENT.write_text(document(kept()))
    print(DOCUMENT.read_text())


def swept(arguments: Sequence[str], home: Path, *, run_id: str) -> SweepResult:
    """Sweep on this machine; the record says on which processor, and nothing of where its code lay."""
    command = [str(Path(sys.executable).parent / "fineloop"), "sweep", *arguments]
    subprocess.run([*command, "--home", str(home), "--run-id", run_id], cwd=home, env=os.environ, check=True)
    record = SweepResult.from_json((home / "runs" / run_id / SweepResult.FILE).read_bytes(), SweepResult.FILE)
    code = record.environment["code"]
    known = {"cpu": this_cpu().summary, "code": code and {key: code[key] for key in ("commit", "dirty")}}
    return record.model_copy(update={"environment": {**record.environment, **known}})


def kept() -> dict[str, SweepResult]:
    """The records that are kept, by the names of their sweeps."""
    paths = {name: KEPT / f"{name}.json" for name in SWEEPS}
    return {name: SweepResult.from_json(path.read_bytes(), path.name) for name, path in paths.items() if path.exists()}


def document(records: Mapping[str, SweepResult]) -> str:
    """The whole text."""
    lines = [
        "# Rates and methods on the example",
        "",
        "Written by `python -m benchmarks.sweeps` from the records that it keeps in `benchmarks/swept/`.",
        "So few steps of one small model show the order of things on this task, and no more. The kept records are of",
        "sweeps that began with three rates, compared methods on four seeds, and let all trainings of layers end.",
    ]
    for name, sections in (("rates", _rates), ("methods", _methods)):
        if name in records:
            lines += ["", *sections(records[name])]
    if layers := {name: records[name] for name in LAYERS if name in records}:
        lines += ["", *_layers(layers)]
    return "\n".join(lines) + "\n"


def _rates(result: SweepResult) -> list[str]:
    return ["## The rate of QLoRA", "", *_measured("rates", result), *_rates_table(result.best), "", result.verdict]


def _methods(result: SweepResult) -> list[str]:
    return [
        "## Every method at its own best rate",
        "",
        *_measured("methods", result),
        *_methods_table(result),
        "",
        f"Gain is over {_reference(result)}, seed by seed and record by record. Memory is planned, of one worker.",
        "Of rates half a decade apart, those marked * had a worse one on either side.",
        "",
        *_forgotten(result),
        result.verdict,
    ]


def _layers(results: Mapping[str, SweepResult]) -> Iterator[str]:
    first, *others = results
    yield "## LoRA on which layers"
    yield ""
    yield from _measured(first, results[first])
    yield "| LoRA on | best rate | loss of each seed | gain | 95 % interval |"
    yield "|---|---|---|---|---|"
    reference = _at_the_best(results[first])
    yield _layers_row(first, results[first], reference, " | ")
    for name in others:
        losses = _at_the_best(results[name])
        gains = np.subtract(reference, losses)
        mean, reach = float(gains.mean()), float(stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains))
        ends = _interval((mean - reach, mean + reach), sign="+")
        yield _layers_row(name, results[name], losses, f"{mean:+.3f} | {ends}")
    yield ""
    yield "The others differ in `method.target_modules` alone. Gain is over all linear layers, seed by seed on the"
    yield "same records, and its interval is that of Student's t over the seeds. Of rates half a decade apart, those"
    yield "marked * had a worse one on either side."


def _layers_row(name: str, result: SweepResult, losses: Sequence[float], gain: str) -> str:
    rate = f"{result.best.learning_rate:.3g}{'*' * result.best.is_inside}"
    return f"| {LAYERS[name][0]} | {rate} | {', '.join(map(_number, losses))} | {gain} |"


def _at_the_best(result: SweepResult) -> list[float]:
    """The loss of each seed at the best rate."""
    found = sorted(
        (trial.seed, trial.loss) for trial in result.trials if trial.learning_rate == result.best.learning_rate
    )
    return [loss for _, loss in found if loss is not None]


def _measured(name: str, result: SweepResult) -> list[str]:
    return [
        "```bash",
        shlex.join(["fineloop", "sweep", *SWEEPS[name]]),
        "```",
        "",
        f"On {result.environment['cpu']}, beside other work. Losses are nats per answer token on {result.records}",
        f"records that no training saw; the base's own is {_number(result.start_loss)}. A worker's first training took",
        f"its first step {_ready(result, first=True)} after it began, later ones {_ready(result, first=False)}.",
        "",
    ]


def _ready(result: SweepResult, *, first: bool) -> str:
    """How long loading and attaching took, at least and at most."""
    known = [trial.ready_s for trial in result.trials if trial.ready_s and (trial.waited_s is None) == first]
    return f"{min(known):.1f} to {max(known):.1f} s"


def _rates_table(tuned: Tuned) -> Iterator[str]:
    yield "| rate | validation loss | 95 % interval | outcome |"
    yield "|---|---|---|---|"
    for rate in tuned.rates:
        loss = _number(rate.loss)
        best = f"**{loss}**" if rate.learning_rate == tuned.learning_rate else loss
        yield f"| {rate.learning_rate:.3g} | {best} | {_interval(rate.ci95)} | {_outcome(rate)} |"


def _outcome(rate: RateLoss) -> str:
    return ", ".join(dict.fromkeys("stopped halfway" if each == "stopped" else each for each in rate.statuses))


def _methods_table(result: SweepResult) -> Iterator[str]:
    yield "| method | best rate | loss of each seed | gain | 95 % interval | time of a step | memory |"
    yield "|---|---|---|---|---|---|---|"
    comparisons = {each.method: each for each in result.comparisons}
    for tuned in sorted(result.tuned, key=lambda each: each.method != _reference(result)):
        yield _method_row(tuned, comparisons.get(tuned.method), _compared(result, tuned.method))


def _method_row(tuned: Tuned, comparison: MethodComparison | None, trials: Sequence[Trial]) -> str:
    losses = ", ".join(_number(trial.loss) for trial in trials)
    rate = f"{tuned.learning_rate:.3g}{'*' * tuned.is_inside}"
    memory = f"{tuned.memory_bytes / 2**30:.2f} GiB" if tuned.memory_bytes else ""
    gain = f"{comparison.gain:+.3f} | {_interval(comparison.ci95, sign='+')}" if comparison else " | "
    ratio = f"{comparison.time_ratio:.2f}" if comparison and comparison.time_ratio else "1"
    return f"| `{tuned.method}` | {rate} | {losses} | {gain} | {ratio} | {memory} |"


def _forgotten(result: SweepResult) -> Iterator[str]:
    known = [(each.method, each.forgotten) for each in result.tuned if each.forgotten]
    if not known:
        return
    (_, first), *_ = known
    yield f"What each forgets: the loss on {first.passages} passages of general text, in nats per token, of the base"
    yield f"alone and after each of these trainings. Reading them took {_reading(result)} of a training."
    yield ""
    yield "| method | base | loss of each seed | over the base | 95 % interval |"
    yield "|---|---|---|---|---|"
    for method, found in sorted(known, key=lambda each: each[0] != _reference(result)):
        base = f"{_number(found.base_loss)} in {found.base_format}"
        losses = ", ".join(map(_number, found.losses))
        yield f"| `{method}` | {base} | {losses} | {found.rise:+.3f} | {_interval(found.ci95, sign='+')} |"
    yield ""


def _reading(result: SweepResult) -> str:
    """The part of a training that compares methods that went to general text, at least and at most."""
    parts = [trial.general_s / trial.seconds for trial in result.trials if trial.general_s and trial.seconds]
    return f"{min(parts):.0%} to {max(parts):.0%}"


def _compared(result: SweepResult, method: str) -> list[Trial]:
    return [trial for trial in result.trials if trial.compares and trial.method == method]


def _reference(result: SweepResult) -> str:
    return result.comparisons[0].reference


def _number(value: float | None) -> str:
    return f"{value:.3f}" if value is not None else ""


def _interval(ends: tuple[float, float] | None, *, sign: str = "") -> str:
    return f"{ends[0]:{sign}.3f} to {ends[1]:{sign}.3f}" if ends else ""


if __name__ == "__main__":
    main()
