"""`fineloop run`, and what `fineloop train` shares with it."""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components.shared.errors import UserError
from pipelines.commands.arguments import (
    Answer,
    add_command,
    add_config,
    add_experiment,
    add_home,
    add_kubeflow,
    add_note,
    add_pipeline,
    connected,
    home_option,
    load_config,
    prepared,
    print_err,
)
from pipelines.configs import DEFAULT_CONFIG

if TYPE_CHECKING:
    from components.config.schema import RunConfig
    from pipelines.kubeflow.runs import Run


def add_run(commands: Any) -> None:
    run = add_command(
        commands,
        "run",
        _run,
        does="Run the whole pipeline on this machine.",
        more="It prepares the data, fine-tunes an adapter, compares it with the base model and with the version in "
        "production, and promotes it if the gate passes it. With no options it runs the built-in example; a second "
        "run in the same home is compared with the first one's version. With DATA alone it trains the example's base "
        "on all of it, as an adapter that is named after the file.",
        example="fineloop run FILE.jsonl --set train.learning_rate=5e-4",
    )
    add_run_options(run)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What runs, where its files lie, and its name."""
    parser.add_argument(
        "data", nargs="?", metavar="DATA", help="train on it: a file, a glob, a folder, s3:// or hf:// (data.source)"
    )
    add_config(parser)
    add_home(parser)
    add_note(parser)
    parser.add_argument("--run-id", default="", metavar="ID", help="name of the run (default: its time)")


def _run(options: argparse.Namespace) -> Answer:
    return run_here(options, "retrain")


def run_here(options: argparse.Namespace, what: Literal["retrain", "train"], *, address: str = "") -> Answer:
    """Run it on this machine to its end; a person watches on stderr."""
    from pipelines.local.run import Place, run, summary

    config = load_config(options)
    place = Place(options.home, sys.stderr, verbose=options.verbose, address=address)
    outcome = run(config, place, what=what, run_id=options.run_id)
    text = summary(outcome, home_option=home_option(options), program=_program())
    return Answer(outcome.as_json(), text, is_aside=True)


def _program() -> str:
    """What a person types to call us again: `make run` runs us from a virtual environment that is not on the path."""
    return "fineloop" if shutil.which("fineloop") else os.path.relpath(sys.argv[0])


# `fineloop train`.


def add_train(commands: Any) -> None:
    train = add_command(
        commands,
        "train",
        _train,
        does="Prepare, fine-tune and evaluate, without gate and alias.",
        more="The version is published, and `fineloop adapters promote` can put it into production.",
        example="fineloop train --set method.name=dora --set method.rank=32",
    )
    add_run_options(train)
    train.add_argument(
        "--address", default="", metavar="URL", help="Jobs API of a Ray cluster, such as http://HOST:8265"
    )


def _train(options: argparse.Namespace) -> Answer:
    return run_here(options, "train", address=options.address)


# `fineloop sweep`.


def add_sweep(commands: Any) -> None:
    sweep = add_command(
        commands,
        "sweep",
        _sweep,
        does="Find the best learning rate, and whether another method is worth more than plain LoRA.",
        more="Every trial is a training like a run's, judged on the records that checkpoints are chosen on. The "
        "grid of half decades around the current rate widens while the best rate is at its edge, and is then "
        "refined around it. With --methods each method is first tuned by itself, then all are compared at their "
        "best rates on further seeds. The config's section tune says what is tried, and when a run sweeps by "
        "itself. A sweep that was cut off is resumed by its --run-id, without the trials that have ended.",
        example="fineloop sweep -c mine.toml --set tune.max_steps=64 --apply\n"
        "  fineloop sweep --methods lora,dora,rslora --set tune.max_steps=64",
    )
    add_run_options(sweep)
    sweep.add_argument("--methods", default="", metavar="A,B", help="methods to compare, as tune.methods")
    sweep.add_argument("--apply", action="store_true", help="write the best rate to the config that -c names")
    sweep.add_argument(
        "--address", default="", metavar="URL", help="Jobs API of a Ray cluster, such as http://HOST:8265"
    )


def _sweep(options: argparse.Namespace) -> Answer:
    if options.apply and options.config.resolve() == DEFAULT_CONFIG:
        raise UserError(
            f"--apply would write into the built-in example, {DEFAULT_CONFIG}: name a config of your own with -c"
        )
    from pipelines.local.run import Place, apply, picture_path, sweep, sweep_lines

    if options.methods:
        names = [name.strip() for name in options.methods.split(",")]
        options.overrides = [*options.overrides, f"tune.methods={names}"]
    config = load_config(options)
    place = Place(options.home, sys.stderr, verbose=options.verbose, address=options.address)
    result = sweep(config, place, run_id=options.run_id)
    picture = str(picture_path(place, result.run_id))
    lines = [*sweep_lines(result), "", f"picture: {picture}"]
    body = {**result.model_dump(mode="json"), "picture": picture}
    if options.apply:
        body["applied"] = apply(options.config, config, result.best)
        lines.append(_applied_text(body["applied"], options.config))
    return Answer(body, "\n".join(lines))


def _applied_text(applied: dict[str, Any], path: Any) -> str:
    if not applied:
        return f"{path} trains at it already"
    return f"{path} now has {', '.join(f'{key} = {value}' for key, value in applied.items())}"


# `fineloop plan`.

GIB = 2**30
BAR = 30  # characters of the largest part


def add_plan(commands: Any) -> None:
    plan = add_command(
        commands,
        "plan",
        _plan,
        does="Estimate what a training will take: memory by part, speed, time and cost, before anything is started.",
        more="It reads the base's configuration, not its weights, and needs no GPU. It plans for the worst case: "
        "every record as long as model.max_length, and every token of it an answer unless evaluate.max_new_tokens "
        "says how long answers are. Name the GPU with ray.gpu, and its price with ray.gpu_price_per_hour if it is "
        "not the list price. Every training makes this plan for its real records first, and refuses what cannot "
        "fit; here that is exit code 1.",
        example="fineloop plan --set model.base=meta-llama/Llama-2-7b-hf --set method.name=qlora \\\n"
        "      --set ray.use_gpu=true --set ray.gpu=A10G --set ray.num_workers=1",
    )
    plan.add_argument("--all-methods", action="store_true", help="compare every method on this base, each at its rank")
    add_config(plan)


def _plan(options: argparse.Namespace) -> Answer:
    from pipelines.local.job import Job, answer

    config = load_config(options)  # a mistake in it is reported before PyTorch is loaded
    job = Job(
        "ray_jobs.plan",
        str(options.config.absolute()),
        ["--all-methods"] if options.all_methods else [],
        options.overrides,
    )
    body = answer(job, on_line=print_err, verbose=options.verbose)
    fits = body["fits"] is not False and _fits_on_disk(config, body) is not False
    return Answer(body, "\n".join(plan_lines(config, body)), exit_code=0 if fits else 1)


def _fits_on_disk(config: "RunConfig", body: dict[str, Any]) -> bool | None:
    """Whether a pod's disk holds what it writes; None if no pod is created, or that is unknown."""
    disk_gib = config.ray.cluster.disk_gib
    return None if not body["disk_bytes"] or disk_gib is None else bool(body["disk_bytes"] <= disk_gib * GIB)


def plan_lines(config: "RunConfig", body: dict[str, Any]) -> Iterator[str]:
    """The plan for a person."""
    yield (
        f"{body['method']} on {body['model']}: trains {body['trainable_parameters']:,} of "
        f"{body['parameters'] + body['trainable_parameters']:,} parameters ({_percent(body['trainable_share'])})"
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
    yield ""
    yield from _speed_lines(body)
    yield ""
    yield from _advice_lines(body)
    if "methods" in body:
        yield ""
        yield from _method_lines(body["methods"])


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
        yield f"  {name:<12} {size:7.2f}  {'#' * round(BAR * size / largest)}".rstrip()
    yield f"  {'total':<12} {total:7.2f}  {_verdict(body)}"
    if body["dense_base"]:
        yield "  the weights are held dense, for speed: train.dense_base=false leaves them as they are stored"
    if body["expert_bytes"] and body["base"] != "bf16":
        yield f"  of the weights, {body['expert_bytes'] / GIB:.2f} are experts, which bitsandbytes leaves in 16 bits"
    if body["host_memory_bytes"]:
        yield f"  {'in its host':<12} {body['host_memory_bytes'] / GIB:7.2f}  {_host_verdict(body)}".rstrip()
    yield f"  {'evaluation':<12} {body['evaluation']['memory_bytes']['total'] / GIB:7.2f}  {_evaluation_verdict(body)}"
    if body["cpu_offload"] and body["zero_stage"] == 3 and body["base"] == "nf4":
        yield "  of four bits, offloading the base was seen to save no GPU memory: none is planned for"
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


def _host_verdict(body: dict[str, Any]) -> str:
    pod = body["pod_memory_bytes"]
    if pod is None:
        return ""
    has = f"{pod / GIB:.1f} in its pod"
    return (
        f"fits: {has}"
        if body["host_memory_bytes"] <= pod
        else f"DOES NOT FIT: {has}: raise ray.cluster.worker.memory_gib"
    )


def _evaluation_verdict(body: dict[str, Any]) -> str:
    evaluation = body["evaluation"]
    text = f"of {evaluation['batch_size']} records at once, the base whole on one device"
    if evaluation["fits"] is False:
        fitting = evaluation["fitting_batch_size"]
        return f"{text}: DOES NOT FIT" + (
            f", evaluate.batch_size={fitting} does" if fitting else ", whatever the batch"
        )
    return text


def _speed_lines(body: dict[str, Any]) -> Iterator[str]:
    from components.shared.protocol import estimated_duration

    if body["tokens_per_s"] is None:
        yield f"speed, time and cost: unknown; {body['speed_unknown_because']}"
        return
    workers = body["num_workers"]
    on = f"{workers} x {body['device']}"
    trust = (
        "a rough figure: no published training like it is known, and the nearest are up to twice as fast"
        if body["speed_is_rough"]
        else "published trainings lie within a third of this"
    )
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
    from components.config.methods import setting

    advice = body["advice"]
    if advice is not None and advice["changes"]:
        changes = " ".join(setting(key, value) for key, value in advice["changes"].items())
        yield f"advised {changes}: {advice['memory_bytes']['total'] / GIB:.1f} GiB"
    elif advice is not None:
        yield "advised as it is"
    elif body["fits"] is False:
        yield (
            "advised a smaller model.base, a shorter model.max_length, a larger GPU, or more workers with "
            "train.zero_stage=3: not one record fits, on NF4 either"
        )
    yield (
        f"rate    train.learning_rate {body['learning_rate']:g} in force. Start with lora or qlora and tune the rate: "
        "tuned, the variants are within 1 to 2 % of each other (arXiv:2602.04998)"
    )


def _method_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "method   base  rank       trained     share  memory, GiB     rate"
    for row in rows:
        if "refused" in row:
            yield f"{row['method']:<8} {row['base']:<5} {row['rank']:>4}  refused: {row['refused']}"
            continue
        yield (
            f"{row['method']:<8} {row['base']:<5} {row['rank']:>4} {row['trainable_parameters']:>13,} "
            f"{_percent(row['trainable_share']):>9} {row['memory_bytes']['total'] / GIB:>12.2f} "
            f"{row['learning_rate']:>8g}"
        )


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"


# `fineloop submit`.

INTERRUPTED = 130


def add_submit(commands: Any) -> None:
    submit = add_command(
        commands,
        "submit",
        _submit,
        does="Run the pipeline on Kubeflow and follow it to its end.",
        more="The config is checked, and the pipeline compiled and uploaded, first; the run gets the resolved "
        "config as its parameter. Ctrl-C stops following, not the run. Exit code 1 also means that the run failed "
        "or was canceled.",
        example="fineloop submit -c pipelines/configs/icd10.toml --host http://localhost:8080 --set method.name=dora",
    )
    add_config(submit)
    add_kubeflow(submit)
    add_pipeline(submit)
    add_experiment(submit)
    add_note(submit)
    submit.add_argument("--run-name", default="", metavar="NAME", help="default: the adapter's name and the time")
    submit.add_argument("--no-wait", action="store_true", help="end as soon as the run is started")


def _submit(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow.runs import Recorded, as_json, follow, outcome_lines, start

    built, parameters = prepared(options)
    kubeflow = connected(options)
    run = start(
        kubeflow,
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
        text = (
            f"no longer followed; {run.name} goes on\n"
            f"  see it    fineloop runs show {run.run_id}\n  stop it   fineloop runs stop {run.run_id}"
        )
        return Answer({**_body(run), "interrupted": True}, text, INTERRUPTED, is_aside=True)
    body = {**_body(run), **as_json(run, recorded)}
    lines = [f"{run.name} {run.state.lower()}", *outcome_lines(run, recorded), run.url]
    return Answer(body, "\n".join(lines), 0 if run.succeeded else 1)


def _body(run: "Run") -> dict[str, Any]:
    steps = {task.name: task.state for task in run.task_runs()}
    return {**run.as_json(), "config_digest": run.config.digest, "message": "", "steps": steps}


# `fineloop compile`.


def add_compile(commands: Any) -> None:
    compile_ = add_command(
        commands,
        "compile",
        _compile,
        does="Write a pipeline as YAML for Kubeflow Pipelines.",
        more="`retrain` is the whole run, with the config as the default of its parameter `config`; `promotion` is for "
        "people who promote or roll back from the UI. The same config gives the same bytes.",
        example="fineloop compile -c pipelines/configs/icd10.toml -o retrain.yaml --image REGISTRY/fineloop@sha256:...",
        is_listed=False,
    )
    add_config(compile_)
    compile_.add_argument("--pipeline", choices=("retrain", "promotion"), default="retrain", help="default: retrain")
    compile_.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: PIPELINE.yaml)")
    compile_.add_argument("--image", default="", metavar="IMAGE", help="image of every step, pinned by digest")


def _compile(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow.compile import write_pipeline

    path = options.output or Path(f"{options.pipeline}.yaml")
    written = write_pipeline(path, load_config(options), pipeline=options.pipeline, image=options.image)
    return Answer(written, f"wrote {written['path']} (sha256 {written['sha256']})")
