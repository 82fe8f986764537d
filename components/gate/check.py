"""Whether what is in production is still good: a look compares it with another version on records that came since, adds
them to those of earlier looks, and says so in the log.

The bound holds at all looks together, so that a look a night is wrong no more often than one at the end of the year.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from components.config.gate import GateConfig
from components.gate.comparisons import Evidence, read_evidence
from components.ray_cluster.submit import submit_step
from components.records import runs
from components.records.steps import Decision, Evaluation
from components.registry import looks, signing, versions
from components.registry.aliases import before
from components.registry.event_log import append_event
from components.registry.identity import version_key
from components.registry.looks import BASE, Compared
from components.shared import binomial
from components.shared.anytime import anytime_bounds, records_to_tell
from components.shared.errors import AliasConflict, DataError
from components.shared.metrics import RELATIVE, Metric, metric_of
from components.shared.paired import Bounds, Pairs, few_unseen, much_worse_unseen
from components.shared.protocol import counted
from components.step.step import StepRun

Verdict = Literal["still better", "as good", "worse", "cannot tell"]


@dataclass(frozen=True)
class Judged:
    """What all looks together show. The gain is production's over the other version; positive is better."""

    verdict: Verdict
    bounds: Bounds
    needed: int | None
    """How many more records, or groups, would tell, if the gain stays what it is; None unless undecided, or for more
    than a million."""


def judge(
    pairs: Pairs,
    drop: float,
    confidence: float,
    *,
    least: int,
    for_rare: int,
    largest: float = 0.0,
    rare_loss: float = 0.0,
) -> Judged:
    """Judge the records of all looks; pure.

    Still better: the gain's lower bound is above 0. As good: it is shown to have lost less than `drop`. Worse: it is
    shown to have lost, and not to have lost less than that. `least` is the fewest records to judge on, and `for_rare`
    the fewest to say as good on, since fewer may hold none of the rare large losses that make a version worse.
    `largest` is how much one record can gain, 0 where that is unknown. `rare_loss` is what a rare loss is taken for, by
    which as good allows for those that were not drawn; 0 allows for none. Raises DataError: a number is missing or not
    finite.
    """
    bounds = anytime_bounds(pairs, confidence, largest=largest)
    if bounds is None:
        raise DataError("the looks have no sound number on every record: check again")
    enough, loses_less = bounds.groups >= least, bounds.lower > -drop
    if enough and bounds.lower > 0:
        return Judged("still better", bounds, None)
    unseen = 0.0
    if rare_loss:
        unseen = max(much_worse_unseen(pairs), few_unseen(pairs, bounds, rare_loss, confidence))
    if enough and bounds.lower - unseen > -drop and pairs.num_effective >= for_rare:
        return Judged("as good", bounds, None)
    if enough and bounds.upper < 0 and not loses_less:
        return Judged("worse", bounds, None)
    to_show = records_to_tell(bounds, max(bounds.gain + drop, -bounds.gain), confidence)
    fewest = max(least, for_rare) if bounds.gain > -drop / 2 else least
    return Judged("cannot tell", bounds, to_show and max(to_show, fewest) - bounds.groups)


def pairs_of(
    evidences: Sequence[Evidence], metric: Metric, against: Literal["base", "champion"], *, relative: bool
) -> Pairs:
    """The records of all looks as one sample, each record, or group as one, as the first look that has it measured it.
    Raises DataError: a look measured no such metric of both versions, or its records have no ids."""
    names, parts = list[str](), list[Pairs]()
    for evidence in evidences:
        pairs = evidence.pairs(metric, against, relative=relative)
        if pairs is None or evidence.names is None:
            raise DataError(f"the look measured no {metric.label} of both versions on named records: check again")
        if evidence.unfit:
            raise DataError(
                f"{evidence.unfit} records of a look are logged answers that people chose by how good they were, on "
                "which no version can be compared: fineloop data audit draws what may judge"
            )
        is_new = ~np.isin(evidence.names, names)
        parts.append(pairs.where(is_new))
        names += evidence.names[is_new].tolist()
    ours, theirs, weights = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ours", "theirs", "weights")
    )
    groups = np.unique(names, return_inverse=True)[1]
    return replace(parts[0], ours=ours, theirs=theirs, weights=weights, groups=groups)


def check(step_run: StepRun, dataset_uri: str) -> bool:
    """Look at the version in production on the records of the dataset, if there is one, log the look, and return
    whether production is to go back.

    What all looks show becomes the step's result, by the keys that `fineloop adapters check --json` prints; nothing
    where there was never a look. The run is recorded as skipped, with that as its reason.

    Raises:
        FineloopError: the error that the job failed with.
        IntegrityError: what it measured is not of these versions, not whole, or not signed.
        DataError: a number is missing or not finite.
    """
    config, store, run_id = step_run.config, step_run.store, step_run.run_id
    adapter, gate = config.adapter, config.gate
    compared, holder = looks.compared(store, config)
    newer_than = [step.result.get("compared") for step in runs.steps(store, run_id) if step.step == "newer"]
    if newer_than not in ([], [[*compared]]):
        raise AliasConflict(f"{adapter.name}@{adapter.alias} moved while its records were read: check again")
    evaluations = [*looks.earlier(store, adapter.name, compared, run_id=run_id)]
    if dataset_uri:
        evaluation, sha256 = _measured(step_run, compared, dataset_uri)
        evaluations.append(evaluation)
    if not evaluations:
        _end(step_run, "nothing to check on: too few records came since")
        return False
    metric, relative = metric_of(compared.metric), gate.margins == "relative"
    evidences = [read_evidence(store, evaluation) for evaluation in evaluations]
    pairs = pairs_of(evidences, metric, compared.role, relative=relative)
    loss = float(pairs.theirs.sum() / pairs.weights.sum())
    drop = gate.total_budget if config.check.worse_by is None else config.check.worse_by
    judged = judge(
        pairs,
        drop,
        gate.confidence,
        least=gate.min_records,
        for_rare=records_for_rare(gate, loss),
        largest=1.0 if metric.is_share else 0.0,
        rare_loss=0.0 if metric.is_share or gate.much_worse_share == 1 else gate.rare_loss(loss),
    )
    bounds, sentence = judged.bounds, sentence_of(judged, compared, drop, gate)
    own = versions.evaluation(store, versions.resolve(store, f"{adapter.name}@{compared.version}"), to_show=True)
    shown = {
        "adapter": adapter.name,
        "alias": adapter.alias,
        **compared._asdict(),
        "worse_by": drop,
        "confidence": gate.confidence,
        "verdict": judged.verdict,
        "gain": bounds.gain,
        "lower": bounds.lower,
        "upper": bounds.upper,
        "records": bounds.groups,
        "needed": judged.needed,
        "new_records": evaluations[-1].records if dataset_uri else 0,
        "fresh": evaluations[-1].metric("candidate", metric.key),
        "held_out": own.metric("candidate", metric.key) if own else None,
        "reasons": [sentence],
    }
    if dataset_uri:
        append_event(store, adapter.name, "checked", {**shown, "run_id": run_id, "evaluation_sha256": sha256})
    _end(step_run, sentence)
    can_roll_back = judged.verdict == "worse" and compared.against == before(store, adapter.name, holder)
    step_run.result.update(shown, can_roll_back=can_roll_back)
    return can_roll_back and config.check.roll_back


def records_for_rare(gate: GateConfig, loss: float) -> int:
    """The fewest records to say as good on, beside a version with this loss: as many as hold, but for one chance in a
    hundred, a loss as rare as the gate allows for; 459 for one record in a hundred."""
    return binomial.least_without(gate.rare_share(loss), 0.99)


def _measured(step_run: StepRun, compared: Compared, dataset_uri: str) -> tuple[Evaluation, str]:
    """Have the two versions compared by a Ray job, which may run a base's code: so it has no key, and this step signs
    what it wrote, where the registry trusts keys. Return that with its sha256."""
    config, store, run_id = step_run.config, step_run.store, step_run.run_id
    signing.require_evaluation_keys(store)
    about = ("--dataset", dataset_uri, "--against", compared.against, "--config-digest", config.digest)
    uri = store.uri(version_key(config.adapter.name, compared.version))
    job_id = submit_step(step_run, "evaluate", "--version", uri, *about, ray=config.ray.for_evaluation())
    evaluation = runs.left_by(job_id, store, run_id, Evaluation)
    if store.trusted_keys and (key := signing.signer_from(os.environ, signing.OF_EVALUATIONS)):
        signing.sign_evaluation(store, config.adapter.name, run_id, key)
    sha256 = hashlib.sha256(store.get(runs.key_of(store, run_id, runs.EVALUATION))).hexdigest()
    looks.require_of(store, config.adapter.name, compared, evaluation, sha256)
    return evaluation, sha256


def sentence_of(judged: Judged, compared: Compared, drop: float, gate: GateConfig) -> str:
    """The verdict and its numbers, for people."""
    version, than = compared.version, "its base" if compared.against == BASE else compared.against
    metric = metric_of(compared.metric)
    amounts = RELATIVE if gate.margins == "relative" else metric
    verdict = {
        "still better": f"{version} is still better than {than}",
        "as good": f"{version} is as good as {than}: worse by less than {amounts.margin_text(drop)}",
        "worse": f"{version} is worse than {than}",
        "cannot tell": f"It cannot be told yet whether {version} is worse than {than}",
    }[judged.verdict]
    lies = amounts.range_text(judged.bounds.lower, judged.bounds.upper, confidence=gate.confidence)
    more = f"; {counted(judged.needed, 'more record')} would tell, if it stays so" if judged.needed else ""
    on = counted(judged.bounds.groups, "record")
    return f"{verdict}, on {on} that came since: the gain in {metric.label} lies {lies}{more}."


def _end(step_run: StepRun, sentence: str) -> None:
    ended = runs.find(step_run.store, step_run.run_id, Decision, to_show=True)
    reasons = dict.fromkeys([*(ended.reasons if ended else ()), sentence])
    step_run.record_skip(reasons, since_run=ended.since_run if ended else None)
    step_run.say(sentence)
