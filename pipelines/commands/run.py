"""`fineloop run`, `train`, `sweep`, `plan`, `submit` and `compile`."""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components.config.methods import setting
from components.config.schema import RunConfig
from components.shared.errors import UserError
from components.shared.protocol import estimated_duration
from pipelines.commands.arguments import (
    ADDRESS,
    CONFIG,
    EXPERIMENT,
    HOME,
    IMAGE,
    KUBEFLOW,
    NOTE,
    PIPELINE,
    Answer,
    answer_of,
    command,
    connected,
    load_config,
    option,
    prepared,
    print_err,
)
from pipelines.configs import DEFAULT_CONFIG
from pipelines.local import run as local
from pipelines.local.run import Place

if TYPE_CHECKING:
    from pipelines.kubeflow.runs import Run

RUNS = (
    option("data DATA", "train on it: a file, a glob, a folder, s3:// or hf:// (data.source)", nargs="?"),
    *CONFIG,
    HOME,
    NOTE,
    option("--run-id ID", "name of the run (default: its time)"),
)


@command("run", *RUNS, example="fineloop run FILE.jsonl --set train.learning_rate=5e-4")
def run(options: argparse.Namespace) -> Answer:
    """Run the whole pipeline on this machine.

    It prepares the data, fine-tunes an adapter, compares it with the base model and with the version in production, and
    promotes it if the gate passes it. With no options it runs the built-in example; a second run in the same home is
    compared with the first one's version. With DATA alone it trains the example's base on all of it, as an adapter that
    is named after the file.
    """
    return _run_here(options, Place(options.home, sys.stderr, verbose=options.verbose), "retrain")


@command("train", *RUNS, ADDRESS, example="fineloop train --set method.name=dora --set train.start_from=base")
def train(options: argparse.Namespace) -> Answer:
    """Prepare, fine-tune and evaluate, without gate and alias.

    The version is published, and `fineloop adapters promote` can put it into production.
    """
    place = Place(options.home, sys.stderr, verbose=options.verbose, address=options.address)
    return _run_here(options, place, "train")


def _run_here(options: argparse.Namespace, place: Place, what: Literal["retrain", "train"]) -> Answer:
    """Run it on this machine to its end; a person watches on stderr."""
    outcome = local.run(load_config(options), place, what=what, run_id=options.run_id)
    # What a person types to call us again: `make run` runs us from a virtual environment that is not on the path.
    program = "fineloop" if shutil.which("fineloop") else os.path.relpath(sys.argv[0])
    text = local.summary(outcome, home=options.home, program=program)
    return Answer(outcome.as_json(), text, is_aside=True)


@command(
    "sweep",
    *RUNS,
    option("--methods A,B", "methods to compare, as tune.methods"),
    option("--apply", "write the best rate to the config that -c names"),
    ADDRESS,
    example="fineloop sweep -c mine.toml --set tune.max_steps=64 --apply\n"
    "  fineloop sweep --methods lora,dora,rslora --set tune.max_steps=64",
)
def sweep(options: argparse.Namespace) -> Answer:
    """Find the best learning rate, and whether another method is worth more than plain LoRA.

    Every trial is a training like a run's, judged on the records that checkpoints are chosen on. The grid of half
    decades around the current rate widens while the best rate is at its edge, and is then refined around it. With
    --methods each method is first tuned by itself, then all are compared at their best rates on further seeds. The
    config's section tune says what is tried, and when a run sweeps by itself. A sweep that was cut off is resumed by
    its --run-id, without the trials that have ended.
    """
    if options.apply and options.config.resolve() == DEFAULT_CONFIG:
        raise UserError("--apply would write into the built-in example: name a config of your own with -c")
    if options.methods:
        names = [name.strip() for name in options.methods.split(",")]
        options.overrides = [*options.overrides, f"tune.methods={names}"]
    config = load_config(options)
    place = Place(options.home, sys.stderr, verbose=options.verbose, address=options.address)
    result = local.sweep(config, place, run_id=options.run_id)
    picture = str(local.picture_path(place, result.run_id))
    lines = [*local.sweep_lines(result), "", f"picture: {picture}"]
    body = {**result.model_dump(mode="json"), "picture": picture}
    if options.apply:
        applied = body["applied"] = local.apply(options.config, config, result.best)
        changes = ", ".join(f"{key} = {value}" for key, value in applied.items())
        lines.append(f"{options.config} now has {changes}" if applied else f"{options.config} trains at it already")
    return Answer(body, "\n".join(lines))


GIB = 2**30


@command(
    "plan",
    option("--all-methods", "compare every method on this base, each at its rank"),
    *CONFIG,
    example="fineloop plan --set model.base=meta-llama/Llama-2-7b-hf --set method.name=qlora \\\n"
    "      --set ray.use_gpu=true --set ray.gpu=A10G --set ray.num_workers=1",
)
def plan(options: argparse.Namespace) -> Answer:
    """Estimate what a training will take: memory by part, speed, time and cost, before anything is started.

    It reads the base's configuration, not its weights, and needs no GPU. It plans for the worst case: every record as
    long as model.max_length, and every token of it an answer unless evaluate.max_new_tokens says how long answers are.
    Name the GPU with ray.gpu, and its price with ray.gpu_price_per_hour if it is not the list price. Every training
    makes this plan for its real records first, and refuses what cannot fit; here that is exit code 1.
    """
    config = load_config(options)  # a mistake in it is reported before PyTorch is loaded
    body = answer_of(options, "ray_jobs.plan", *(["--all-methods"] if options.all_methods else []))
    fits = body["fits"] is not False and _fits_on_disk(config, body) is not False
    return Answer(body, "\n".join(plan_lines(config, body)), exit_code=0 if fits else 1)


def _fits_on_disk(config: RunConfig, body: dict[str, Any]) -> bool | None:
    """Whether a pod's disk holds what it writes; None if no pod is created, or that is unknown."""
    disk_gib = config.ray.cluster.disk_gib
    return None if not body["disk_bytes"] or disk_gib is None else bool(body["disk_bytes"] <= disk_gib * GIB)


def plan_lines(config: RunConfig, body: dict[str, Any]) -> Iterator[str]:
    """The plan for a person."""
    yield (
        f"{body['method']} on {body['model']}: trains {body['trainable_parameters']:,} of "
        f"{body['parameters'] + body['trainable_parameters']:,} parameters ({body['trainable_share'] * 100:.3g} %)"
    )
    if body["max_workers"] > body["num_workers"]:
        workers = f"{body['num_workers']} to {body['max_workers']} workers"
        yield f"for {workers}: planned are the fewest, who have the most to hold each, and take the longest"
    yield ""
    yield from _memory_lines(body)
    if (fits_on_disk := _fits_on_disk(config, body)) is not None:
        fits = "fits" if fits_on_disk else "DOES NOT FIT"
        has = f"{config.ray.cluster.disk_gib} in ray.cluster.disk_gib"
        yield f"disk of a pod in GiB: {body['disk_bytes'] / GIB:.1f} for the base (or a checkpoint), {fits}: {has}"
    if start := body["start"]:
        parts = ", ".join(f"{name} {estimated_duration(seconds)}" for name, seconds in start["seconds"].items())
        yield f"start   {parts}: {start['node_bytes'] / GIB:.1f} GiB a node, at 10 Gbit/s, and 2 GB/s from its disk"
    yield ""
    yield from _speed_lines(body)
    yield ""
    yield from _advice_lines(body)
    if "methods" in body:
        yield "\nmethod   base  rank       trained     share  memory, GiB     rate"
        yield from map(_method_line, body["methods"])


def _memory_lines(body: dict[str, Any]) -> Iterator[str]:
    parts = {name: size / GIB for name, size in body["memory_bytes"].items()}
    total = parts.pop("total")
    largest = max(parts.values())
    checkpointing = f"{'with' if body['gradient_checkpointing'] else 'no'} gradient checkpointing"
    offloading = " and activations in host memory" if body["activation_offloading"] else ""
    yield (
        f"memory of one worker in GiB, {body['micro_batch_size']} records of {body['max_length']:,} tokens at once, "
        f"{checkpointing}{offloading}, ZeRO stage {body['zero_stage']}"
    )
    for name, size in parts.items():
        yield f"  {name:<12} {size:7.2f}  {'#' * round(30 * size / largest)}".rstrip()
    yield f"  {'total':<12} {total:7.2f}  {_verdict(body)}"
    if body["dense_base"]:
        yield "  the weights are held dense, for speed"
    if body["expert_bytes"] and body["base"] != "bf16":
        yield f"  of the weights, {body['expert_bytes'] / GIB:.2f} are experts, which bitsandbytes leaves in 16 bits"
    if host := body["host_memory_bytes"]:
        line = f"  {'in its host':<12} {host / GIB:7.2f}"
        if pod := body["pod_memory_bytes"]:
            fits = "fits" if host <= pod else "DOES NOT FIT"
            line += f"  {fits}: {pod / GIB:.1f} in its pod" + (
                "" if host <= pod else ": raise ray.cluster.worker.memory_gib"
            )
        yield line
    evaluation = body["evaluation"]
    size, records = evaluation["memory_bytes"]["total"] / GIB, evaluation["batch_size"]
    line = f"  {'evaluation':<12} {size:7.2f}  of {records} records at once, the base whole on one device"
    if evaluation["fits"] is False:
        fitting = evaluation["fitting_batch_size"]
        line += ": DOES NOT FIT, " + (f"evaluate.batch_size={fitting} does" if fitting else "whatever the batch")
    yield line
    if body["activations_are_rough"]:
        yield "  activations are a rough estimate: this architecture cannot be rehearsed"
    full = body["full_fine_tuning"]
    yield (
        f"  full fine-tuning: {full['memory_bytes']['total'] / GIB:.1f}, {full['times']:.1f} times as much "
        f"({full['times_between_steps']:.0f} times without what the batch takes)"
    )


def _verdict(body: dict[str, Any]) -> str:
    if body["fits"] is None:
        return "on an unnamed GPU: set ray.gpu to learn whether it fits"
    has = f"{body['device_memory_bytes'] / GIB:.1f} on {body['device']}"
    if body["fits"]:
        return f"fits: {has}"
    if body["memory_bytes"]["total"] <= body["device_memory_bytes"]:
        return f"TOO TIGHT: {has}, and published trainings take up to {body['margin']:.0%} more than planned"
    return f"DOES NOT FIT: {has}"


def _speed_lines(body: dict[str, Any]) -> Iterator[str]:
    if body["tokens_per_s"] is None:
        yield f"speed, time and cost: unknown; {body['speed_unknown_because']}"
        return
    rough = "a rough figure: published trainings that are not like it are up to twice as fast"
    trust = rough if body["speed_is_rough"] else "published trainings lie within a third of this"
    on = f"{body['num_workers']} x {body['device']}"
    yield f"speed   about {body['tokens_per_s']:,.0f} tokens/s on {on}; {trust}"
    if body["dtype"] == "float16":
        yield "        in float16, with its loss scaled (train.dtype)"
    elif not body["has_bf16"]:
        yield f"        {body['device']} has no bfloat16 matrix units: expect far less"
    price = f"${body['price_per_hour']:g} per GPU and hour ({body['price_source']})"
    for_a_million = estimated_duration(body["s_per_million_tokens"])
    million = f"{for_a_million} and ${body['cost_per_million_tokens']:.2f} per million tokens"
    if body["time_s"] is None:
        yield f"time    {million}, at {price}; data.max_records says how many records to plan for"
        return
    time = estimated_duration(body["time_s"])
    yield f"time    at most {time}: {body['most_tokens']:,} tokens if every record is that long"
    yield f"cost    at most ${body['cost']:.2f}, at {price}; {million}"


def _advice_lines(body: dict[str, Any]) -> Iterator[str]:
    advice = body["advice"]
    if advice is not None and advice["changes"]:
        changes = " ".join(setting(key, value) for key, value in advice["changes"].items())
        yield f"advised {changes}: {advice['memory_bytes']['total'] / GIB:.1f} GiB"
    elif advice is not None:
        yield "advised as it is"
    elif body["fits"] is False:
        ways = "a smaller model.base, a shorter model.max_length, a larger GPU, or more workers with train.zero_stage=3"
        yield f"advised {ways}: not one record fits, on NF4 either"
    yield (
        f"rate    train.learning_rate {body['learning_rate']:g} in force. Start with lora or qlora and tune the rate: "
        "tuned, the variants are within 1 to 2 % of each other (arXiv:2602.04998)"
    )


def _method_line(row: dict[str, Any]) -> str:
    name = f"{row['method']:<8} {row['base']:<5} {row['rank']:>4}"
    if "refused" in row:
        return f"{name}  refused: {row['refused']}"
    share, memory = f"{row['trainable_share'] * 100:.3g} %", row["memory_bytes"]["total"] / GIB
    return f"{name} {row['trainable_parameters']:>13,} {share:>9} {memory:>12.2f} {row['learning_rate']:>8g}"


@command(
    "submit",
    *(*CONFIG, *KUBEFLOW, *PIPELINE, EXPERIMENT, NOTE),
    option("--run-name NAME", "default: the adapter's name and the time"),
    option("--no-wait", "end as soon as the run is started"),
    example="fineloop submit -c pipelines/configs/icd10.toml --host http://localhost:8080 --set method.name=dora",
)
def submit(options: argparse.Namespace) -> Answer:
    """Run the pipeline on Kubeflow and follow it to its end.

    The config is checked, and the pipeline compiled and uploaded, first; the run gets the resolved config as its
    parameter. Ctrl-C stops following, not the run. Exit code 1 also means that the run failed or was canceled.
    """
    from pipelines.kubeflow.runs import Recorded, as_json, follow, outcome_lines, start

    built, parameters = prepared(options)
    run = start(
        connected(options),
        built,
        parameters=parameters,
        experiment=options.experiment,
        run_name=options.run_name or f"{built.config.adapter.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        service_account=options.service_account,
    )
    print_err(f"run {run.run_id}: {run.url}")
    if options.no_wait:
        return Answer(_body(run), f"{run.name} is started; fineloop runs show {run.run_id}")
    recorded = Recorded(run)
    try:
        run = follow(run, print_err, progress=recorded.progress)
    except KeyboardInterrupt:
        follow_up = f"  see it    fineloop runs show {run.run_id}\n  stop it   fineloop runs stop {run.run_id}"
        text = f"no longer followed; {run.name} goes on\n{follow_up}"
        return Answer({**_body(run), "interrupted": True}, text, 130, is_aside=True)
    body = {**_body(run), **as_json(run, recorded)}
    lines = [f"{run.name} {run.state.lower()}", *outcome_lines(run, recorded), run.url]
    return Answer(body, "\n".join(lines), 0 if run.succeeded else 1)


def _body(run: "Run") -> dict[str, Any]:
    steps = {task.name: task.state for task in run.task_runs()}
    return {**run.as_json(), "config_digest": run.config.digest, "message": "", "steps": steps}


@command(
    "compile",
    *CONFIG,
    option("--pipeline", "default: retrain", choices=("retrain", "promotion"), default="retrain"),
    option("-o --output FILE", "where to (default: PIPELINE.yaml)", type=Path),
    IMAGE,
    example="fineloop compile -c pipelines/configs/icd10.toml -o retrain.yaml --image REGISTRY/fineloop@sha256:...",
)
def compile_(options: argparse.Namespace) -> Answer:
    """Write a pipeline as YAML for Kubeflow Pipelines.

    `retrain` is the whole run, with the config as the default of its parameter `config`; `promotion` is for people who
    promote or roll back from the UI. The same config gives the same bytes.
    """
    from pipelines.kubeflow.compile import write_pipeline

    path = options.output or Path(f"{options.pipeline}.yaml")
    written = write_pipeline(path, load_config(options), pipeline=options.pipeline, image=options.image)
    return Answer(written, f"wrote {written['path']} (sha256 {written['sha256']})")
