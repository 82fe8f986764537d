"""`fineloop plan`."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import Answer, add_command, add_config, load_config, print_err

if TYPE_CHECKING:
    from components.config.schema import RunConfig

GIB = 2**30
BAR = 30  # characters of the largest part


def add(commands: Any) -> None:
    """Add the command."""
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
    return Answer(body, "\n".join(lines(config, body)), exit_code=0 if fits else 1)


def _fits_on_disk(config: "RunConfig", body: dict[str, Any]) -> bool | None:
    """Whether a pod's disk holds what it writes; None if no pod is created, or that is unknown."""
    from components.config.ray import RayJobCluster

    cluster = config.ray.cluster
    if not body["disk_bytes"] or not isinstance(cluster, RayJobCluster):
        return None
    return bool(body["disk_bytes"] <= cluster.disk_gib * GIB)


def lines(config: "RunConfig", body: dict[str, Any]) -> Iterator[str]:
    """The plan for a person."""
    from components.config.ray import RayJobCluster

    yield (
        f"{body['method']} on {body['model']}: trains {body['trainable_parameters']:,} of "
        f"{body['parameters'] + body['trainable_parameters']:,} parameters ({_percent(body['trainable_share'])})"
    )
    if body["max_workers"] > body["num_workers"]:
        workers = f"{body['num_workers']} to {body['max_workers']} workers"
        yield f"for {workers}: planned are the fewest, who have the most to hold each, and take the longest"
    yield ""
    yield from _memory_lines(body)
    if (fits_on_disk := _fits_on_disk(config, body)) is not None and isinstance(config.ray.cluster, RayJobCluster):
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
    from components.shared.durations import estimated_duration

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
