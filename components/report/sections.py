"""The sections of a run's page: what was decided and what to do now, answers, data, time and cost, and origin."""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jinja2.utils import htmlsafe_json_dumps

from components.config.config_file import key_paths
from components.config.schema import RunConfig
from components.records.runs import Replayed
from components.records.steps import ROLES, Role, StepRecord, Usage, left_out_text
from components.registry.aliases import PRODUCTION
from components.registry.lineage import of_record
from components.report.charts import Axis, Bar, axis_of, bar
from components.report.html import clipped, count, moment, parse_moment, share
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
ALPHA = 0.05
"""Probability that a bound of a version's share of good answers is wrong at any look."""
_PERSONAL = {
    "email": "e-mail addresses",
    "phone": "phone numbers",
    "card": "card numbers",
    "iban": "IBANs",
    "secret": "keys and tokens",
    "name": "names",
}


class Answer(NamedTuple):
    """What one model said to a prompt."""

    role: Role
    text: str
    right: bool


class Sample(NamedTuple):
    """One prompt with its reference and the models' answers."""

    prompt: Sequence[tuple[str, str]]
    """(role, text) of each turn; the role is empty for a single user turn."""
    reference: str
    answers: Sequence[Answer]
    change: str
    """`newly right`, `newly wrong` or empty: the candidate against the champion, or the base if there is none."""


def samples(run: RunFiles) -> list[Sample]:
    """Return the evaluation's sample answers, right or wrong by exact match."""
    result = []
    for sample in run.evaluation.samples if run.evaluation else []:
        reference, prompt = str(sample["reference"]), sample["prompt"]
        turns = [("", prompt)] if isinstance(prompt, str) else [(str(turn["role"]), turn["content"]) for turn in prompt]
        if len(turns) == 1 and turns[0][0] == "user":
            turns = [("", turns[0][1])]
        answers = [
            Answer(role, clipped(str(sample[role])), normal(str(sample[role])) == normal(reference))
            for role in ROLES
            if sample.get(role) is not None
        ]
        right = {answer.role: answer.right for answer in answers}
        before, after = right.get("champion", right.get("base")), right.get("candidate")
        change = "" if None in (before, after) or before == after else f"newly {'right' if after else 'wrong'}"
        shown = [(role, clipped(str(text))) for role, text in turns]
        result.append(Sample(shown, clipped(reference), answers, change))
    return result


def right_counts(shown: Sequence[Sample], called: Mapping[Role, str]) -> list[str]:
    """How many of the shown answers of each model are right, in words."""
    totals: dict[Role, int] = {}
    for answer in (answer for sample in shown for answer in sample.answers):
        totals[answer.role] = totals.get(answer.role, 0) + answer.right
    return [f"{called[role]} {right} of {len(shown)}" for role, right in totals.items()]


def wrong_answers(run: RunFiles) -> tuple[list[list[str]], str]:
    """Return the candidate's wrong answers: the rows that the page draws, and the others as JSON for a script."""
    texts = [
        [clipped(wrong.prompt), wrong.id, clipped(wrong.reference), clipped(wrong.answer) or "(empty answer)"]
        for wrong in run.wrong
    ]
    rest = texts[DRAWN:]
    return texts[:DRAWN], htmlsafe_json_dumps(rest, ensure_ascii=False, separators=(",", ":")) if rest else ""


def data_profile(profile: Mapping[str, Any] | None, replayed: Replayed | None = None) -> dict[str, Any] | None:
    """Return profile.json with its counts ready to show, and whose answers were replayed if production was asked; None
    if there is no profile."""
    if profile is None:
        return None
    rows, near = profile.get("rows", {}), profile.get("near_duplicates", {})
    train, held_out = (profile.get("splits", {}).get(name, {}) for name in ("train", "eval"))
    num_records = train.get("records", 0) + held_out.get("records", 0)
    top = train.get("most_frequent_answers", [])[:_MAX_ANSWERS]
    axis = Axis(0.0, max((answer["share"] for answer in top), default=1.0))

    def in_groups(records: str, split: Mapping[str, Any]) -> str:
        return f"{records} in {count(split['groups'])} groups" if split.get("groups") else records

    facts = [
        ("Rows read", count(rows.get("read"))),
        ("Training records", in_groups(count(train.get("records")), train)),
        ("Held-out records", in_groups(_part(held_out.get("records", 0), num_records), held_out)),
        ("Rejected rows", _part(rows.get("rejected", 0), rows.get("read", 0))),
        ("Columns not read", ", ".join(profile.get("extra_columns", ()))),
        ("Earlier records replayed", _replayed(replayed) if replayed else ""),
    ]
    dropped, personal = profile.get("dropped", {}).items(), profile.get("personal", {}).get("found", {}).items()
    alike = [(f"near “{cluster['begins']} …”", cluster["records"]) for cluster in near.get("most_are_near", [])]
    if stay := near.get("in_train"):
        alike.append(("training records that hardly differ from another, and stay", stay))
    unmatched = profile.get("logged", {}).get("feedback", {}).get("unmatched", 0)
    late = [("with feedback, and in no usable row of the log yet", unmatched)] if unmatched else []
    return {
        "facts": [(name, value) for name, value in facts if value],
        "rejected": profile.get("rejected", []),
        "counts": [
            ("Left out on purpose", [(left_out_text(name), num) for name, num in dropped if num]),
            ("Personal data in messages", [(_PERSONAL.get(kind, kind), number) for kind, number in personal]),
            ("Near-duplicates", alike),
            ("Logged answers", [*feedback_on(profile), *late]),
        ],
        "lengths": [
            (f"{title}, {words}", [split[key].get(f"p{percentile}") for percentile in (0, 50, 90, 99, 100)])
            for key, title in (("prompt_chars", "Prompt"), ("answer_chars", "Answer"))
            for words, split in (("training", train), ("held out", held_out))
            if split.get(key)
        ],
        "answers": [
            bar(axis, 0.0, answer["share"], kind="base", name=clipped(answer["answer"]), text=share(answer["share"]))
            for answer in top
        ],
        "distinct_answers": train.get("distinct_answers"),
        "sources": profile.get("sources", []),
    }


def feedback_on(profile: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What feedback says of each served version, and the number of its logged answers; none where nothing is logged.

    The bounds may be looked at every night, as the log grows.
    """
    from components.shared.anytime import share_bounds  # with numpy

    rows = []
    for version, uses in profile.get("logged", {}).get("served_by", {}).items():
        judged = sum(uses.get(use, 0) for use in ("good", "corrected", "rated_bad"))
        good = ""
        if judged:
            least, most = share_bounds(uses.get("good", 0), judged, ALPHA)
            good = f": {share(uses.get('good', 0) / judged)} of {count(judged)} judged ones good, {share(least)} to "
            good += f"{share(most)} at any look with {share(1 - ALPHA)} confidence"
        rows.append((f"by {version or 'a model that the log does not name'}{good}", sum(uses.values())))
    return rows


def _part(part: int, whole: int) -> str:
    return f"{count(part)} ({share(part / whole)})" if whole else count(part)


def _replayed(replayed: Replayed) -> str:
    num_asked, kept, version = count(replayed.asked), count(replayed.kept), replayed.version
    if version is None:
        return f"{num_asked} with their own answers: nothing was in production"
    if not replayed.kept:
        return f"{num_asked} with their own answers: {version} answered none rightly"
    others = ", the others with their own" if replayed.kept < replayed.asked else ""
    return f"{kept} of {num_asked} with right answers of {version}{others}"


def step_times(run: RunFiles) -> list[Bar]:
    """The steps on one time line, in the order they started."""
    started = [(start.timestamp(), step) for step in run.steps if (start := parse_moment(step.started_at))]
    if not started:
        return []
    axis = axis_of(end for start, step in started for end in (start, start + step.seconds))
    return [
        bar(axis, start, start + step.seconds, kind=step.status, name=step.step, text=duration(step.seconds))
        for start, step in sorted(started, key=lambda pair: pair[0])
    ]


def run_facts(run: RunFiles) -> list[tuple[str, str]]:
    """The line of facts under the headline."""
    starts = [start for step in run.steps if (start := parse_moment(step.started_at))]
    facts = [("Adapter", run.adapter), ("Candidate", run.version or "none"), ("Run", run.run_id), ("Note", run.note)]
    if run.decision and (run.decision.look or 0) > 1:
        facts.append(("Decisions on these records", f"{run.decision.look}, this one included"))
    if run.evaluation and "engine" in (by := run.evaluation.generation):
        facts.append(("Answers", f"by vLLM; the engine of training differs in {by['differing']} of {by['compared']}"))
    if starts:
        user = ((run.lineage or {}).get("started") or {}).get("user")
        facts.append(("Started", moment(min(starts)) + (f", by {user}" if user else "")))
        facts.append(("Time", duration(sum(step.seconds for step in run.steps))))
    return [(name, value) for name, value in facts if value]


def cost(run: RunFiles) -> str:
    """Return the cost of a training in one line; empty if the run does not record it.

    Workers are held from the start of the job to the last step; time outside steps goes into startup and checks. If a
    run resumed from a checkpoint, an earlier job may have taken some steps, so that shares would compare two jobs.
    """
    result = run.result("finetune")
    used = Usage.model_validate(result["usage"]) if result.get("usage") else None
    if used is None or not used.held_s:
        return ""
    unit = "GPU-hour" if used.gpu else "worker-hour"
    if result.get("resumed_from_step"):
        parts = [f"{used.hours:.2f} {unit}s of the job that took the last step"]
    else:
        parts = [f"{used.hours:.2f} {unit}s until the last step, {used.in_steps_s / used.held_s:.0%} of them in steps"]
        parts.append(f"{count(used.tokens / used.hours)} tokens a {unit}")
    if used.restarts:
        parts.append(f"{counted(used.restarts, 'restart')}, {counted(used.steps_repeated, 'step')} taken twice")
    if used.flops is not None:
        before = used.flops_with_parents != used.flops and used.flops_with_parents
        parts.append(f"{used.flops:.2g} FLOPs{f', {before:.2g} with what it went on from' if before else ''}")
    parts.append(
        f"{counted(used.s3_requests, 'S3 request')} of the workers, "
        f"{used.s3_read_bytes / 1e6:,.1f} MB read, {used.s3_written_bytes / 1e6:,.1f} MB written"
    )
    if used.price is not None:
        parts.append(f"${used.price:,.2f} ({used.price_source})")
    return "; ".join(parts)


def costs(run: RunFiles) -> list[tuple[str, str]]:
    """What the training cost, and what a run took before its first step and its first comparison."""
    facts = [("Training cost", cost(run))]
    if parts := run.until_first_step:
        parts_text = ", ".join(f"{part.part} {duration(part.seconds)}" for part in parts)
        facts.append(("First training step", f"after {duration(sum(part.seconds for part in parts))}: {parts_text}"))
    if run.until_compared_s is not None:
        facts.append(("First record compared", f"{duration(run.until_compared_s)} after training"))
    return [(name, value) for name, value in facts if value]


def origin(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    """Where the candidate comes from: groups of (name, value), from the evaluation and from lineage.json."""
    evaluation, champion, lineage = run.evaluation, run.model("champion"), dict(run.lineage or {})
    parts = {key: dict(lineage.pop(key)) for key in [*lineage] if isinstance(lineage[key], Mapping)}
    parts.pop("config", None)  # shown whole below
    environment = parts.pop("environment", {})
    packages = environment.get("packages") or {}
    groups = {
        "This run": {
            "version": run.version,
            "previous version": champion.version if champion else None,
            "run_id": run.run_id,
            "config_sha256": run.config_digest,
            **lineage,
        },
        "Dataset": {
            "dataset_id": run.dataset_id,
            "uri": evaluation.dataset_uri if evaluation else None,
            **parts.pop("dataset", {}),
        },
        "Base model": {**(evaluation.base if evaluation else {}), **parts.pop("base", {})},
        **{key.replace("_", " ").capitalize(): part for key, part in parts.items()},
        "Environment": {
            **environment,
            "packages": {name: packages[name] for name in SHOWN_PACKAGES if name in packages},
        },
    }
    return [(title, lines) for title, value in groups.items() if (lines := [*_flat(value)])]


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
            yield name, ", ".join(map(str, value))
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
    metric, rise = metric_of("general_loss"), ours - base
    if rise < LEAST_FORGOTTEN:
        result = (
            f"Nothing shows as forgotten: on general text the candidate's loss is {metric.text(ours)}, "
            f"and the base's {metric.text(base)}."
        )
    else:
        result = (
            "The candidate has forgotten some of what the base knows: on general text its loss is "
            f"{metric.amount_text(rise)} higher, so that it gives the right token "
            f"{100 * (1 - math.exp(-rise)):.0f} % less chance."
        )
    rule = next((rule for rule in run.rules if rule.metric == metric.key), None)
    if rule is None:
        return f"{result} No rule limits this: gate.worse_on_general_text_by would."
    kept = {"passed": "kept", "cannot tell": "neither shown to be kept nor to be broken"}.get(rule.short, "not kept")
    return f"{result} The gate's limit ({rule.bound_text}) is {kept}."


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


class Headline(NamedTuple):
    """Verdict, title, one sentence with numbers (empty if a step failed before there were any), and the reasons."""

    verdict: Literal["promote", "hold", "skipped", "failed", "open"]
    badge: str
    title: str
    lead: str
    consequence: str
    reasons: tuple[str, ...] = ()


def failed_step(run: RunFiles) -> StepRecord | None:
    """Return the step that the run failed in; a decision stands whatever fails after it, except for a promotion."""
    failed = (step for step in run.steps if not step.succeeded)
    of_interest = (step for step in failed if (step.step == "promote" if run.decision else step.step != "report"))
    return next(of_interest, None)


def headline(run: RunFiles) -> Headline:
    """Word the outcome of a run, however far it got."""
    decision, failed, adapter, alias = run.decision, failed_step(run), run.adapter, run.alias
    if failed is not None:
        error = failed.result.get("error") or {}
        message = str(error.get("message") or "The step's log says why.")
        consequence = f"Nothing was promoted: the alias {alias} is as it was before this run."
        if failed.moved_alias and decision is not None:
            consequence = (
                f"The alias {alias} did move: it points to {decision.version} now. Only what follows a promotion is "
                "missing, so run the step again."
            )
        title, lead = f"{adapter}: the {failed.step} step failed", _lead(run) if run.evaluation else ""
        return Headline("failed", "Failed", title, lead, consequence, (message,))
    if decision is None:
        far = (
            "The candidate was evaluated, but no gate was asked to decide"
            if run.evaluation
            else "The run ended before an evaluation"
        )
        consequence = f"{far}; the alias {alias} is as it was."
        return Headline("open", "No decision", f"{adapter}: no decision was made", _lead(run), consequence)
    if decision.decision == "skipped":
        title = f"{adapter}: there is too little new to train on"
        consequence = f"The alias {alias} is as it was. What is new counts again next time."
        return Headline("skipped", "Skipped", title, "Nothing was trained.", consequence, decision.reasons)
    version, champion = decision.version, decision.champion
    if decision.promoted:
        promotion = run.step("promote")
        if promotion is not None and promotion.succeeded:
            badge, title = "Promoted", f"{adapter}: a new version is in {alias}"
            before = f"{champion} before it" if champion else "nothing before it"
            consequence = f"The alias {alias} points to {version} now, and pointed to {before}."
        else:
            badge, title = "Promote", f"{adapter}: a new version may go to {alias}"
            consequence = f"The alias {alias} has not been moved by this run; {version} may take it."
        return Headline("promote", badge, title, _lead(run), consequence, decision.reasons)
    if decision.waits:
        consequence = (
            f"{alias.capitalize()} {f'keeps {champion}' if champion else 'stays empty'} until a person approves "
            f"{version}: fineloop adapters approve {adapter}@{version} --by NAME --reason TEXT{_on_alias(run)}"
        )
    elif champion and champion == version:
        consequence = f"This run made the same version again, so there was nothing to move {alias} to."
    else:
        keeps = f"{alias.capitalize()} keeps {champion}. " if champion else ""
        stays = f"The candidate {version} stays in the registry without an alias, so that it can be looked at."
        consequence = f"{keeps}{stays}"
    title = f"{adapter}: {alias} stays {'as it is' if champion else 'empty'}"
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
    if not sentences:
        sentences.append("The candidate's metrics were not measured.")
    for ancestor in of_record(run.lineage or {}):
        if ancestor.kind == "parent":
            sentences.append(f"It went on from {ancestor.name.rpartition('/')[2]}.")
            break
    return " ".join(sentences)


def _others(run: RunFiles, key: str) -> str:
    called: dict[Role, str] = {"champion": f"{run.alias}'s version so far", "base": "the base model"}
    values = {name: run.metric(role, key) for role, name in called.items()}
    others = [f"{metric_of(key).text(value)} for {name}" for name, value in values.items() if value is not None]
    return f", against {' and '.join(others)}" if others else ""


def _on_alias(run: RunFiles) -> str:
    return "" if run.alias == PRODUCTION else f" --alias {shlex.quote(run.alias)}"


HOME = ".fineloop"
"""The default of --home."""


def next_steps(run: RunFiles, *, home: str = HOME, verb: str = "run") -> list[tuple[str, str]]:
    """Commands that a reader may want to run next, each with its purpose; `home` and `verb` are those of the command
    that began the run."""
    option = "" if home == HOME else f" --home {shlex.quote(home)}"
    return [(f"fineloop {command}{option}", why) for command, why in _steps(run, home, verb)]


def _steps(run: RunFiles, home: str, verb: str) -> list[tuple[str, str]]:
    version, decision, failed = run.version, run.decision, failed_step(run)
    again = f"{verb} -c {shlex.quote(f'{home}/runs/{run.run_id}/config.toml')}"
    error = dict(failed.result.get("error") or {}) if failed else {}
    if isinstance(by_name(error.get("kind", ""), ""), UserError):  # the same config would fail again
        named = dict.fromkeys(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", error.get("message", "")))
        keys = [key for key in named if key in {*key_paths(RunConfig)}]
        changed = [(f"{again} --set {key}=VALUE", f"run it with another {key}") for key in keys]
        return changed or [(again, "run it again, once what the message names is mended")]
    if failed or (decision is None and run.evaluation is None):
        return [(f"{again} --run-id {run.run_id}", "go on from where it was")]
    if decision is not None and decision.decision == "skipped":
        return [(f"{again} --set data.min_new_records=0", "train all the same")]
    if version is None:
        return []
    reference, on_alias = f"{run.adapter}@{version}", _on_alias(run)
    steps = [
        (f"chat {reference}", "talk to the candidate, beside its base"),
        (f"adapters pull {reference} --with-base", "its files and its base, as vLLM and peft load them"),
        (
            f"adapters serve-manifest {reference} --for vllm",
            "the command of a server; `adapters export` has more forms",
        ),
    ]
    champion = run.model("champion")
    if champion is not None and champion.version and champion.version != version:
        compared = f"{run.adapter}@{champion.version} {reference}"
        steps.append((f"compare {compared} --html side-by-side.html", "lay it beside the version before it"))
    if decision is None:
        steps.append((f"adapters promote {reference}{on_alias}", f"put it into {run.alias}"))
    elif decision.waits:
        steps.append((f"adapters approve {reference} --by NAME --reason TEXT{on_alias}", f"put it into {run.alias}"))
    elif decision.promoted and decision.champion:
        steps.append((f"adapters rollback {run.adapter}{on_alias}", "go back to the version before it"))
    elif not decision.promoted:
        steps.append((f"replay {run.run_id}", "decide again by the same records"))
    return steps
