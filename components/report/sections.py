"""The sections of a run's page: what was decided and what to do now, answers, data, time and cost, and origin."""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.utils import htmlsafe_json_dumps

from components.config import config_file
from components.config.config_file import key_paths
from components.config.ray import price_per_hour
from components.config.schema import RunConfig
from components.records.runs import Replayed
from components.records.steps import ROLES, Role, StepRecord, Usage
from components.registry.aliases import PRODUCTION
from components.report import run_files
from components.report.charts import Axis, Bar, axis_of, bar
from components.report.comparison import names
from components.report.html import clipped, count, moment, parse_moment
from components.report.run_files import RunFiles
from components.shared.errors import UserError, by_name
from components.shared.metrics import is_metric, metric_of, normal
from components.shared.protocol import counted, duration

DRAWN = 100
"""Number of answers in the page's table. A browser takes seconds to lay out thousands of rows, so a script draws the
others when they are found or asked for."""
SHOWN_PACKAGES = ("fineloop", "accelerate", "bitsandbytes", "deepspeed", "kfp", "peft", "ray", "torch", "transformers")
"""The packages that the page shows, of all that lineage.json names."""
_MAX_ANSWERS = 10
_PERSONAL = {
    "email": "e-mail addresses",
    "phone": "phone numbers",
    "card": "card numbers",
    "iban": "IBANs",
    "secret": "keys and tokens",
    "name": "names",
}
_DROPPED = {
    "personal_data": "records with personal data",
    "duplicate": "exact duplicates",
    "superseded_by_same_id": "older rows with the same id",
    "prompt_in_eval": "training rows whose prompt is held out",
    "near_duplicate_of_eval": "training rows that hardly differ from a held-out prompt",
    "before_window": "training rows from before data.window_days",
    "over_max_records": "beyond data.max_records",
}


@dataclass(frozen=True)
class Answer:
    """What one model said to a prompt."""

    role: str
    name: str
    text: str
    right: bool


@dataclass(frozen=True)
class Sample:
    """One prompt with its reference and the models' answers."""

    prompt: tuple[tuple[str, str], ...]
    """(role, text) of each turn; the role is empty for a single user turn."""
    reference: str
    answers: tuple[Answer, ...]
    change: str
    """`newly right`, `newly wrong` or empty: the candidate against the champion, or the base if there is none."""


def samples(run: RunFiles) -> list[Sample]:
    """Return the evaluation's sample answers, right or wrong by exact match."""
    called = names(run)
    result = []
    for sample in run.evaluation.samples if run.evaluation else []:
        reference = str(sample["reference"])
        answers = tuple(
            Answer(role, called[role], clipped(str(sample[role])), normal(str(sample[role])) == normal(reference))
            for role in ROLES
            if sample.get(role) is not None
        )
        result.append(Sample(_turns(sample["prompt"]), clipped(reference), answers, _change(answers)))
    return result


def _turns(prompt: object) -> tuple[tuple[str, str], ...]:
    if isinstance(prompt, str):
        return (("", clipped(prompt)),)
    turns = [(str(turn["role"]), clipped(str(turn["content"]))) for turn in prompt if isinstance(turn, Mapping)]  # type: ignore[attr-defined]
    return (("", turns[0][1]),) if len(turns) == 1 and turns[0][0] == "user" else tuple(turns)


def _change(answers: Sequence[Answer]) -> str:
    right = {answer.role: answer.right for answer in answers}
    before = right.get("champion", right.get("base"))
    after = right.get("candidate")
    if before is None or after is None or before == after:
        return ""
    return "newly right" if after else "newly wrong"


def right_counts(shown: Sequence[Sample]) -> list[str]:
    """How many of the shown answers of each model are right, in words."""
    totals: dict[str, int] = {}
    for sample in shown:
        for answer in sample.answers:
            totals[answer.name] = totals.get(answer.name, 0) + answer.right
    return [f"{name} {right} of {len(shown)}" for name, right in totals.items()]


def wrong_answers(run: RunFiles) -> tuple[list[list[str]], str]:
    """Return the candidate's wrong answers: the rows that the page draws, and the others as JSON for a script."""
    texts = [
        [clipped(each.prompt), each.id, clipped(each.reference), clipped(each.answer) or "(empty answer)"]
        for each in run.wrong
    ]
    rest = texts[DRAWN:]
    return texts[:DRAWN], htmlsafe_json_dumps(rest, ensure_ascii=False, separators=(",", ":")) if rest else ""


def data_profile(profile: Mapping[str, Any] | None, replayed: Replayed | None = None) -> dict[str, Any] | None:
    """Return counts, rejects, splits and answers of profile.json, ready to show, and whose answers were replayed if
    production was asked; None if there is no profile."""
    if profile is None:
        return None
    rows = profile.get("rows", {})
    splits = {name: profile.get("splits", {}).get(name, {}) for name in ("train", "eval")}
    near = profile.get("near_duplicates", {})
    stay = near.get("in_train", 0)
    num_records = sum(split.get("records", 0) for split in splits.values())
    top = splits["train"].get("most_frequent_answers", [])[:_MAX_ANSWERS]
    largest = max((answer["share"] for answer in top), default=1.0)
    return {
        "facts": [
            ("Rows read", count(rows.get("read"))),
            ("Training records", _in_groups(count(splits["train"].get("records")), splits["train"])),
            (
                "Held-out records",
                _in_groups(_with_share(splits["eval"].get("records", 0), num_records), splits["eval"]),
            ),
            ("Rejected rows", _with_share(rows.get("rejected", 0), rows.get("read", 0))),
            *([("Columns not read", ", ".join(extra))] if (extra := profile.get("extra_columns")) else []),
            *([("Earlier records replayed", _replayed(replayed))] if replayed else []),
        ],
        "rejected": [
            {"reason": each["reason"], "rows": count(each["rows"]), "example": each.get("example", "")}
            for each in profile.get("rejected", [])
        ],
        "dropped": [
            (_DROPPED.get(name, name.replace("_", " ")), count(rows))
            for name, rows in profile.get("dropped", {}).items()
            if rows
        ],
        "personal": [
            (_PERSONAL.get(kind, kind), count(found))
            for kind, found in profile.get("personal", {}).get("found", {}).items()
        ],
        # What near-duplicates of held-out prompts resemble, and those within training.
        "near": [
            *((f"near “{each['begins']} …”", count(each["records"])) for each in near.get("most_are_near", [])),
            *([("training records that hardly differ from another, and stay", count(stay))] if stay else []),
        ],
        "lengths": [
            (f"{title}, {words}", [count(splits[name][key].get(f"p{share}")) for share in (0, 50, 90, 99, 100)])
            for key, title in (("prompt_chars", "Prompt"), ("answer_chars", "Answer"))
            for name, words in (("train", "training"), ("eval", "held out"))
            if splits[name].get(key)
        ],
        "answers": [
            bar(
                Axis(0.0, largest),
                0.0,
                each["share"],
                kind="base",
                name=clipped(each["answer"]),
                text=f"{each['share']:.1%}".replace("%", " %"),
            )
            for each in top
        ],
        "distinct_answers": count(splits["train"].get("distinct_answers")),
        "sources": [
            f"{each['source']}: {count(each.get('rows'))} rows, {count(each.get('rejected', 0))} rejected"
            for each in profile.get("sources", [])
        ],
    }


def _with_share(part: int, whole: int) -> str:
    return f"{count(part)} ({part / whole:.1%})".replace("%", " %") if whole else count(part)


def _in_groups(counted: str, split: Mapping[str, Any]) -> str:
    return f"{counted} in {count(split['groups'])} groups" if split.get("groups") else counted


def _replayed(found: Replayed) -> str:
    if found.version is None:
        return f"{count(found.asked)} with their own answers: nothing was in production"
    if not found.kept:
        return f"{count(found.asked)} with their own answers: {found.version} answered none rightly"
    others = ", the others with their own" if found.kept < found.asked else ""
    return f"{count(found.kept)} of {count(found.asked)} with right answers of {found.version}{others}"


def step_times(run: RunFiles) -> list[Bar]:
    """The steps on one time line, in the order they started."""
    known = sorted(
        ((start.timestamp(), step) for step in run.steps if (start := parse_moment(step.started_at))),
        key=lambda each: each[0],
    )
    if not known:
        return []
    axis = axis_of(end for start, step in known for end in (start, start + step.seconds))
    return [
        bar(axis, start, start + step.seconds, kind=step.status, name=step.step, text=duration(step.seconds))
        for start, step in known
    ]


def run_facts(run: RunFiles) -> list[tuple[str, str]]:
    """The line of facts under the headline."""
    starts = [start for step in run.steps if (start := parse_moment(step.started_at))]
    seconds = sum(step.seconds for step in run.steps)
    facts = [("Adapter", run.adapter), ("Candidate", run.version or "none"), ("Run", run.run_id)]
    if run.note:
        facts.append(("Note", run.note))
    if run.evaluation and run.evaluation.fold:
        facts.append(("Judged by", f"fold {run.evaluation.fold} of {run.evaluation.folds} of what is held out"))
    if run.decision and (run.decision.look or 0) > 1:
        facts.append(("Decisions on these records", f"{run.decision.look}, this one included"))
    if starts:
        user = ((run.lineage or {}).get("started") or {}).get("user")
        facts.append(("Started", moment(min(starts)) + (f", by {user}" if user else "")))
    if seconds:
        facts.append(("Time", duration(seconds)))
    return facts


# What a training cost: the time that its workers were held, how much of it went into steps, and the price of that.


def cost(run: RunFiles) -> str:
    """Return the cost of a training in one line; empty if the run does not record its duration and hardware.

    Workers are held from the start of the job to the last step; time outside steps goes into startup and checks. If a
    run resumed from a checkpoint, an earlier job may have taken some steps, so that shares would compare two jobs.
    """
    step = run.step("finetune")
    result = step.result if step else {}
    hardware = (run.lineage or {}).get("hardware") or {}
    began, ended = parse_moment(result.get("began_at")), parse_moment(result.get("trained_at"))
    workers, seconds, tokens = hardware.get("workers"), result.get("train_seconds"), result.get("tokens")
    if not (began and ended and workers and seconds and tokens):
        return ""
    held_s = (ended - began).total_seconds()
    hours = workers * held_s / 3600
    unit = "GPU-hour" if hardware.get("gpu") else "worker-hour"
    if result.get("resumed_from_step"):
        parts = [f"{hours:.2f} {unit}s of the job that took the last step"]
    else:
        parts = [f"{hours:.2f} {unit}s until the last step, {seconds / held_s:.0%} of them in steps"]
        parts.append(f"{count(round(tokens / hours))} tokens a {unit}")
    if result.get("usage"):  # which an earlier release did not record
        used = Usage.model_validate(result["usage"])
        if used.restarts:
            parts.append(f"{counted(used.restarts, 'restart')}, {counted(used.steps_repeated, 'step')} taken twice")
        if used.flops is not None:
            before = used.flops_with_parents != used.flops and used.flops_with_parents
            parts.append(f"{used.flops:.2g} FLOPs{f', {before:.2g} with what it went on from' if before else ''}")
        parts.append(
            f"{counted(used.s3_requests, 'S3 request')} of the workers, "
            f"{used.s3_read_bytes / 1e6:,.1f} MB read, {used.s3_written_bytes / 1e6:,.1f} MB written"
        )
    # By the config's price or the list price for the workers' GPU model.
    config = config_file.loads(run.config_toml) if run.config_toml else None
    if config and (found := price_per_hour(config.ray, str(hardware.get("gpu", "")))):
        price, source = found
        parts.append(f"${hours * price:,.2f} at " + (f"${price:g} ({source})" if " " in source else source))
    return "; ".join(parts)


def costs(run: RunFiles) -> list[tuple[str, str]]:
    """What the training cost, and what a run took before its first step and its first comparison."""
    facts = []
    if cost_text := cost(run):
        facts.append(("Training cost", cost_text))
    if parts := run.until_first_step:
        parts_text = ", ".join(f"{each.part} {duration(each.seconds)}" for each in parts)
        facts.append(("First training step", f"after {duration(sum(each.seconds for each in parts))}: {parts_text}"))
    if run.until_compared_s is not None:
        facts.append(("First record compared", f"{duration(run.until_compared_s)} after training"))
    return facts


def origin(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    """Where the candidate comes from: groups of (name, value), from the evaluation and from lineage.json."""
    evaluation, lineage = run.evaluation, dict(run.lineage or {})
    champion = run.model("champion")
    base = {**(evaluation.base if evaluation else {}), **(lineage.pop("base", None) or {})}
    dataset = {"dataset_id": run.dataset_id, "uri": evaluation.dataset_uri if evaluation else None}
    dataset |= lineage.pop("dataset", None) or {}
    environment = dict(lineage.pop("environment", None) or {})
    packages = environment.pop("packages", None) or {}
    lineage.pop("config", None)  # shown whole below
    this_run = {
        "version": run.version,
        "previous version": champion.version if champion else None,
        "run_id": lineage.pop("run_id", run.run_id),
        "config_sha256": lineage.pop("config_sha256", run.config_digest),
        "parents": lineage.pop("parents", None),
    }
    groups = {
        "This run": this_run,
        "Code": environment.pop("code", None),
        "Dataset": dataset,
        "Base model": base,
        "Recipe": lineage.pop("recipe", None),
        "Training": lineage.pop("training", None),
        "Started": lineage.pop("started", None),
        "Hardware": lineage.pop("hardware", None),
        "Environment": {
            **environment,
            "packages": {name: packages[name] for name in SHOWN_PACKAGES if name in packages},
        },
        "Also recorded": {key: value for key, value in lineage.items() if key not in ("schema_version", "adapter")},
    }
    flat = [(title, list(_flat(value))) for title, value in groups.items()]
    return [(title, lines) for title, lines in flat if lines]


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested JSON as (path, text); lists of plain values stay on one line."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, (Mapping, list)) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{index}]")
    elif isinstance(value, list):
        if value:
            yield name, ", ".join(str(inner) for inner in value)
    elif value is not None and value != "":
        yield name, ("yes" if value else "no") if isinstance(value, bool) else str(value)


LEAST_FORGOTTEN = 0.005
"""The smallest rise of the loss that is reported as forgetting."""


def forgotten(run: RunFiles) -> str:
    """Whether the candidate has forgotten what its base knows of text outside the domain, in two sentences; empty if
    the loss on general text was not measured."""
    ours, base = run.metric("candidate", "general_loss"), run.metric("base", "general_loss")
    if ours is None or base is None:
        return ""
    metric = metric_of("general_loss")
    rise = ours - base
    if rise < LEAST_FORGOTTEN:
        found = f"Nothing shows as forgotten: on general text the candidate's loss is {metric.text(ours)}, "
        found += f"and the base's {metric.text(base)}."
    else:
        found = "The candidate has forgotten some of what the base knows: on general text its loss is "
        found += f"{metric.amount_text(rise)} higher, so that it gives the right token "
        found += f"{100 * (1 - math.exp(-rise)):.0f} % less chance."
    rule = next((each for each in (run.decision.rules if run.decision else ()) if each.metric == metric.key), None)
    if rule is None:
        return f"{found} No rule limits this; gate.worse_on_general_text_by would."
    kept = {"passed": "kept", "cannot tell": "neither shown to be kept nor to be broken"}.get(rule.short, "not kept")
    return f"{found} The gate's limit ({rule.bound_text}) is {kept}."


_NAT = (
    "A nat is the unit of surprise: a loss of 0 means that the model was sure of each word, and each 0.7 more that it "
    "gave the right one half the chance."
)
EXPLAINED = {
    "exact_match": "The share of answers that equal the reference, but for white space and how accents are coded.",
    "token_f1": "How many words an answer shares with its reference, from none to all: half right counts as half.",
    "loss": f"How surprised the model is by the right answer, on average over its tokens (pieces of words). {_NAT}",
    "perplexity": "e to the power of the loss: among so many equally likely tokens the model seems to choose.",
    "answer_loss": f"How surprised the model is by a whole right answer. {_NAT}",
    "prompt_gain": "How much less the model is surprised by an answer behind its own prompt than behind another "
    "record's. Near 0 it does not look at the question: it has learned answers, or the data pairs them wrongly. "
    f"{_NAT}",
    "answer_prompt_gain": f"The prompt gain of a whole answer, not of a token. {_NAT}",
    "general_loss": "The loss on text that has nothing to do with the training. Where it rises, the model forgets. "
    f"{_NAT}",
    "kl_from_base": "How far the answers to prompts of no domain have moved from the base's own: 0 where nothing has "
    f"changed. {_NAT}",
}
"""The metrics whose names do not say enough, for readers who have not trained models; shown at a click."""


# The top of the page: what was decided, what it changed, and why, in words for someone who reads nothing else.

Verdict = Literal["promote", "hold", "skipped", "failed", "open"]


@dataclass(frozen=True)
class Headline:
    """Verdict, title, one sentence with numbers (empty if a step failed before there were any), and the reasons."""

    verdict: Verdict
    badge: str
    title: str
    lead: str
    consequence: str
    reasons: tuple[str, ...]


def failed_step(run: RunFiles) -> StepRecord | None:
    """Return the step that the run failed in; a decision stands whatever fails after it, except for a promotion."""
    failed = (step for step in run.steps if not step.succeeded)
    of_interest = (step for step in failed if (step.step == "promote" if run.decision else step.step != "report"))
    return next(of_interest, None)


def headline(run: RunFiles) -> Headline:
    """Word the outcome of a run, however far it got."""
    decision, failed = run.decision, failed_step(run)
    if failed is not None:
        error = failed.result.get("error") or {}
        message = str(error.get("message") or "The step's log says why.")
        consequence = (
            f"The alias {run.alias} did move: it points to {decision.version} now. Only what follows a promotion is "
            "missing, so run the step again."
            if failed.moved_alias and decision is not None
            else f"Nothing was promoted: the alias {run.alias} is as it was before this run."
        )
        title = f"{run.adapter}: the {failed.step} step failed"
        return Headline("failed", "Failed", title, _lead(run) if run.evaluation else "", consequence, (message,))
    if decision is None:
        far = (
            "The candidate was evaluated, but no gate was asked to decide"
            if run.evaluation
            else ("The run ended before an evaluation")
        )
        consequence = f"{far}; the alias {run.alias} is as it was."
        return Headline("open", "No decision", f"{run.adapter}: no decision was made", _lead(run), consequence, ())
    if decision.decision == "skipped":
        title = f"{run.adapter}: there is too little new to train on"
        consequence = f"The alias {run.alias} is as it was. What is new counts again next time."
        return Headline("skipped", "Skipped", title, "Nothing was trained.", consequence, decision.reasons)
    version, champion = decision.version, decision.champion
    if decision.promoted:
        promotion = run.step("promote")
        moved = promotion is not None and promotion.succeeded
        before = f"{champion} before it" if champion else "nothing before it"
        consequence = (
            f"The alias {run.alias} points to {version} now, and pointed to {before}."
            if moved
            else f"The alias {run.alias} has not been moved by this run; {version} may take it."
        )
        title = f"{run.adapter}: a new version {'is in' if moved else 'may go to'} {run.alias}"
        return Headline("promote", "Promoted" if moved else "Promote", title, _lead(run), consequence, decision.reasons)
    title = f"{run.adapter}: {run.alias} stays {'as it is' if champion else 'empty'}"
    consequence = (
        f"{run.alias.capitalize()} keeps {champion}. " if champion else ""
    ) + f"The candidate {version} stays in the registry without an alias, so that it can be looked at."
    if champion and champion == version:
        consequence = f"This run made the same version again, so there was nothing to move {run.alias} to."
    if decision.waits:
        consequence = (
            f"{run.alias.capitalize()} {f'keeps {champion}' if champion else 'stays empty'} until a person approves "
            f"{version}: fineloop adapters approve {run.adapter}@{version} --by NAME --reason TEXT"
            f"{'' if run.alias == PRODUCTION else f' --alias {run.alias}'}"
        )
    badge = "Held" if decision.verdict in (None, "hold") else f"Held: {decision.verdict}"
    return Headline("hold", badge, title, _lead(run), consequence, decision.reasons)


def _lead(run: RunFiles) -> str:
    """What changed, candidate against champion and base, in at most two sentences; and where the training began."""
    if run.evaluation is None:
        return "There are no measurements of the candidate."
    sentences = []
    ours = run.metric("candidate", "exact_match")
    if ours is not None:
        sentences.append(
            f"On {count(run.evaluation.records)} held-out records the candidate gives the exact answer "
            f"{metric_of('exact_match').text(ours)} of the time{_others(run, 'exact_match')}."
        )
    key = (run.decision.policy if run.decision else {}).get("metric", "loss")
    value = run.metric("candidate", key)
    if value is not None and is_metric(key) and key != "exact_match":
        metric = metric_of(key)
        better = "lower" if metric.lower_is_better else "higher"
        sentences.append(f"Its {metric.label} ({better} is better) is {metric.text(value)}{_others(run, key)}.")
    text = " ".join(sentences) or "The candidate's metrics were not measured."
    return f"{text} {run_files.sentence(run)}".strip()


def _others(run: RunFiles, key: str) -> str:
    called: dict[Role, str] = {"champion": f"{run.alias}'s version so far", "base": "the base model"}
    values = {name: run.metric(role, key) for role, name in called.items()}
    others = [f"{metric_of(key).text(value)} for {name}" for name, value in values.items() if value is not None]
    return f", against {' and '.join(others)}" if others else ""


HOME = ".fineloop"
"""The default of --home."""


def next_steps(run: RunFiles, *, home: str = HOME, verb: str = "run") -> list[tuple[str, str]]:
    """Commands that a reader may want to run next, each with its purpose; `home` and `verb` are those of the command
    that began the run."""
    option = "" if home == HOME else f" --home {shlex.quote(home)}"
    return [(f"{command}{option}", why) for command, why in _steps(run, home, verb)]


def _steps(run: RunFiles, home: str, verb: str) -> list[tuple[str, str]]:
    version, decision = run.version, run.decision
    config = shlex.quote(f"{home}/runs/{run.run_id}/config.toml")
    failed = failed_step(run)
    error = dict(failed.result.get("error") or {}) if failed else {}
    if isinstance(by_name(error.get("kind", ""), ""), UserError):  # the same config would fail again
        named = dict.fromkeys(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", error.get("message", "")))
        keys = [key for key in named if key in {*key_paths(RunConfig)}]
        again = [(f"fineloop {verb} -c {config} --set {key}=VALUE", f"run it with another {key}") for key in keys]
        return again or [(f"fineloop {verb} -c {config}", "run it again, once what the message names is mended")]
    if failed or (decision is None and run.evaluation is None):
        return [(f"fineloop {verb} -c {config} --run-id {run.run_id}", "go on from where it was")]
    if version is None or (decision is not None and decision.decision == "skipped"):
        return []
    reference = f"{run.adapter}@{version}"
    on_alias = "" if run.alias == PRODUCTION else f" --alias {shlex.quote(run.alias)}"
    steps = [(f"fineloop chat {reference}", "talk to the candidate, beside its base")]
    champion = run.model("champion")
    if champion is not None and champion.version and champion.version != version:
        compared = f"{run.adapter}@{champion.version} {reference}"
        steps.append((f"fineloop compare {compared} --html side-by-side.html", "lay it beside the version before it"))
    if decision is None:
        steps.append((f"fineloop adapters promote {reference}{on_alias}", f"put it into {run.alias}"))
    elif decision.waits:
        approve = f"fineloop adapters approve {reference} --by NAME --reason TEXT{on_alias}"
        steps.append((approve, f"put it into {run.alias}"))
    elif decision.promoted and decision.champion:
        steps.append((f"fineloop adapters rollback {run.adapter}{on_alias}", "go back to the version before it"))
    elif not decision.promoted:
        steps.append((f"fineloop replay {run.run_id}", "decide again by the same records"))
    return steps
