"""Whether what is in production is still good: a look compares it with another version on records that came since, adds
them to those of earlier looks, and says so in the log.

The bound holds at all looks together, so that a look a night is wrong no more often than one at the end of the year.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from components.gate.comparisons import Evidence, read_evidence
from components.ray_cluster.submit import submit_step
from components.records import runs
from components.records.steps import Decision, Evaluation
from components.registry import looks, signing, versions
from components.registry.aliases import before
from components.registry.event_log import append_event
from components.registry.identity import version_key
from components.registry.looks import BASE, Series
from components.shared.anytime import Moments, margin, records_for, rho2_for
from components.shared.errors import AliasConflict, DataError, IntegrityError, JobError, ObjectMissing
from components.shared.metrics import METRICS, Metric, metric_of
from components.shared.paired import Pairs
from components.shared.protocol import counted
from components.step.step import StepRun

Verdict = Literal["still better", "as good", "worse", "cannot tell"]
LEAST_SPREAD = 1e-12
"""Of models that answer alike: in place of zero, by which nothing can be divided."""


@dataclass(frozen=True)
class Judged:
    """What all looks together show. The gain is production's over the other version; positive is better."""

    verdict: Verdict
    gain: float
    lower: float
    upper: float
    records: int
    """Independent ones: records, or groups of them."""
    needed: int | None
    """How many more would tell, if the gain stays what it is; None unless undecided, or for more than ten million."""


def judge(samples: Sequence[Moments], drop: float, *, alpha: float, least: int, largest: float = 0.0) -> Judged:
    """Judge the looks, oldest first, each a sample of (gain, weight) pairs; pure.

    Worse: the gain's upper bound is below 0, and it is not shown to have lost less than `drop`. As good: it is shown to
    have lost less, and still better if it lost nothing. Each of the two bounds is wrong at any look of an endless
    series with probability `alpha`. `least` is the fewest records to judge on, which also fix how the bound is tuned;
    `largest` is how much one record can gain, 0 where that is unknown.
    """
    total, tuned = Moments(), Moments()
    for sample in samples:
        total += sample
        tuned = tuned if tuned.count >= least else total
    spread = max(total.spread(largest), LEAST_SPREAD)
    rho2 = rho2_for(drop / max(tuned.spread(largest), LEAST_SPREAD), alpha)
    gain, width = total.mean, float(spread * margin(total.count, rho2, alpha))
    judged = Judged("cannot tell", gain, gain - width, gain + width, total.count, None)
    if total.count >= least and judged.lower > -drop:
        return replace(judged, verdict="still better" if judged.lower > 0 else "as good")
    if total.count >= least and judged.upper < 0:
        return replace(judged, verdict="worse")
    enough = records_for(max(gain + drop, -gain) / spread, rho2, alpha)
    return replace(judged, needed=enough and max(enough, least) - total.count)


def sample_of(evidence: Evidence, metric: Metric, against: str, counted_before: set[str]) -> tuple[Moments, Pairs]:
    """A look's pairs, a group of records as one, without those that `counted_before` names; it gets the new ones.

    Raises:
        DataError: a number is missing or not finite, or records have no ids.
    """
    pairs = evidence.pairs(metric, "base" if against == BASE else "champion")
    if pairs is None or evidence.names is None:
        raise DataError(f"the look measured no {metric.label} of both versions on named records: check again")
    if (
        not all(np.isfinite(each).all() for each in (pairs.ours, pairs.theirs, pairs.weights))
        or min(pairs.weights) <= 0
    ):
        raise DataError(f"the look's {metric.label} is no sound number on every record: check again")
    names, index = np.unique(evidence.names, return_inverse=True)
    is_new = np.array([str(name) not in counted_before for name in names])
    counted_before.update(map(str, names))
    better = (pairs.theirs - pairs.ours) * (1.0 if pairs.lower_is_better else -1.0)
    gains, weights = (np.bincount(index, weights=each)[is_new] for each in (better, pairs.weights))
    return Moments.of(gains, weights), pairs


def check(step_run: StepRun, dataset_uri: str) -> dict[str, Any] | None:
    """Look at the version in production on the records of the dataset, if there is one, log the look, and return what
    all looks show, by the keys that `fineloop adapters check --json` prints; None where there was never a look.

    The run is recorded as skipped, as it trains nothing, with what the look shows as its reason.

    Raises:
        FineloopError: the error that the job failed with.
        IntegrityError: what it measured is not of these versions, not whole, or not signed.
        DataError: a number is missing or not finite.
    """
    config, store, run_id = step_run.config, step_run.store, step_run.run_id
    series, holder = looks.series_of(store, config)
    newer_than = [step.result.get("series") for step in runs.steps(store, run_id) if step.step == "newer"]
    if newer_than not in ([], [series.as_json()]):
        raise AliasConflict(
            f"{config.adapter.name}@{config.adapter.alias} moved while its records were read: check again"
        )
    evaluations = [*looks.earlier(store, config, series, run_id=run_id)]
    if dataset_uri:
        evaluations.append(_measured(step_run, series, dataset_uri))
    if not evaluations:
        _end(step_run, "nothing to check on: too few records came since")
        return None
    metric, samples, met = metric_of(series.metric), list[Moments](), set[str]()
    metric = METRICS[metric.repeats] if metric.exponential and metric.repeats else metric
    drop, fresh = series.worse_by, math.nan
    for evaluation in evaluations:
        sample, pairs = sample_of(read_evidence(store, evaluation), metric, series.against, met)
        fresh = float(pairs.ours.sum() / pairs.weights.sum())
        if not samples:
            drop = _drop(series, float(pairs.theirs.sum() / pairs.weights.sum()))
        samples.append(sample)
    judged = judge(
        samples,
        drop,
        alpha=1 - series.confidence,
        least=config.gate.min_records,
        largest=1.0 if metric.is_share else 0.0,
    )
    own = versions.evaluation(store, versions.resolve(store, f"{config.adapter.name}@{series.version}"), to_show=True)
    goes_back = judged.verdict == "worse" and series.against == before(store, config.adapter.name, holder)
    sentence = sentence_of(judged, series, metric, drop)
    shown = {
        "adapter": config.adapter.name,
        "alias": config.adapter.alias,
        "version": series.version,
        "against": series.against,
        "metric": metric.key,
        "worse_by": drop,
        "confidence": series.confidence,
        **asdict(judged),
        "new_records": samples[-1].count if dataset_uri else 0,
        "fresh": fresh,
        "held_out": own.metric("candidate", metric.key) if own else None,
        "reasons": [sentence],
    }
    if dataset_uri:
        sha256 = hashlib.sha256(store.get(runs.key_of(store, run_id, runs.EVALUATION))).hexdigest()
        about = {"run_id": run_id, "series": series.as_json(), "evaluation_sha256": sha256}
        append_event(store, config.adapter.name, "checked", {**shown, **about})
    _end(step_run, sentence)
    step_run.result.update(shown, can_roll_back=goes_back)
    return {**shown, "rolls_back": goes_back and config.check.roll_back}


def _measured(step_run: StepRun, series: Series, dataset_uri: str) -> Evaluation:
    """Have the two versions compared by a Ray job, which may run a base's code: so it has no key, and this step signs
    what it wrote, where the registry trusts keys."""
    config, store, run_id = step_run.config, step_run.store, step_run.run_id
    signing.require_evaluation_keys(store)
    about = ("--dataset", dataset_uri, "--against", series.against, "--config-digest", config.digest)
    uri = store.uri(version_key(config.adapter.name, series.version))
    job = submit_step(step_run, "evaluate", "--version", uri, *about, ray=config.ray.for_evaluation())
    try:
        evaluation = runs.read(store, run_id, Evaluation)
    except ObjectMissing as exc:
        raise JobError(f"Ray job {job} succeeded without its result: {exc}") from exc
    if evaluation.run_id != run_id or evaluation.dataset_uri != dataset_uri:
        raise IntegrityError(f"Ray job {job} left an evaluation of run {evaluation.run_id} on {evaluation.dataset_uri}")
    if store.trusted_keys and (key := signing.signer_from(os.environ, signing.OF_EVALUATIONS)):
        signing.sign_evaluation(store, config.adapter.name, run_id, key)
    sha256 = hashlib.sha256(store.get(runs.key_of(store, run_id, runs.EVALUATION))).hexdigest()
    looks.require_of(store, config, series, evaluation, sha256)
    return evaluation


def _drop(series: Series, theirs: float) -> float:
    """The drop in the unit that is compared: of a relative one the share of the other version's value in the first
    look, of one in perplexity the nats per token."""
    exponential = metric_of(series.metric).exponential
    value = math.exp(theirs) if exponential else theirs
    drop = series.worse_by * (value if series.margins == "relative" else 1.0)
    return math.log1p(drop / value) if exponential else drop


def sentence_of(judged: Judged, series: Series, metric: Metric, drop: float) -> str:
    """The verdict and its numbers, for people."""
    than = "its base" if series.against == BASE else series.against
    on = f"on {counted(judged.records, 'record')} that came since"
    lies = metric.range_text(judged.lower, judged.upper, confidence=series.confidence)
    verdict = {
        "still better": f"{series.version} is still better than {than}",
        "as good": f"{series.version} is as good as {than}: worse by less than {metric.margin_text(drop)}",
        "worse": f"{series.version} is worse than {than}",
        "cannot tell": f"It cannot be told yet whether {series.version} is worse than {than}",
    }[judged.verdict]
    more = f"; {counted(judged.needed, 'more record')} would tell, if it stays so" if judged.needed else ""
    return f"{verdict}, {on}: the gain in {metric.label} lies {lies}{more}."


def _end(step_run: StepRun, sentence: str) -> None:
    adapter, store = step_run.config.adapter, step_run.store
    ended = runs.find(store, step_run.run_id, Decision, to_show=True)
    if ended is None or ended.decision != "skipped":  # whoever trains may write there
        ended = Decision(
            decision="skipped", adapter=adapter.name, alias=adapter.alias, reasons=(), run_id=step_run.run_id
        )
    if sentence not in ended.reasons:
        runs.write(store, step_run.run_id, ended.model_copy(update={"reasons": (*ended.reasons, sentence)}))
    step_run.say(sentence)
