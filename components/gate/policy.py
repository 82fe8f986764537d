"""The gate's rules: an evaluation and its records in, a decision with its reasons out. No I/O.

A rule passes, fails, or, where it compares models, is undecided. A candidate is promoted when all pass; one that fails
any is held; where none fails and some are undecided, the gate cannot tell, and the candidate is held as well. A
candidate that no other rule holds may still need a person's approval. A new rule is a function here or in `comparisons`
that writes its own text, called in `decide`; its bound is a key of `GateConfig`.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from components.config.gate import MAY_FORGET, READS_GENERAL_TEXT, ApprovalConfig, GateConfig
from components.config.schema import AdapterConfig
from components.config.section import identity
from components.gate import comparisons
from components.gate.comparisons import (
    ROUNDING,
    Compared,
    Evidence,
    few_get_much_worse,
    not_worse_than_champion,
    unmeasured,
    within,
)
from components.records.steps import (
    Decision,
    Evaluation,
    HarnessScores,
    Lead,
    Measured,
    Role,
    RuleResult,
    SliceResult,
    TaskScore,
    Verdict,
    finite,
    score_text,
)
from components.registry.event_log import confidence_at
from components.shared.errors import DataError
from components.shared.metrics import metric_of, metrics_of
from components.shared.paired import Pairs, bounds, shown_worse
from components.store.store import decode_json, encode_json

LEGACY_POLICY: Mapping[str, Any] = {"much_worse_share": 1.0}
"""The values that policies recorded before a key existed stand for, where they differ from the key's default."""


def in_force(policy: GateConfig, evaluation: Evaluation) -> GateConfig:
    """The policy with the limit on forgetting that holds where none is set; a decision records it, so that decisions
    from before there was one stay what they are."""
    loss = evaluation.metric("base", "general_loss")
    if policy.worse_on_general_text_by is not None or loss is None or loss > READS_GENERAL_TEXT:
        return policy
    return policy.model_copy(update={"worse_on_general_text_by": MAY_FORGET})


def decide(
    evaluation: Evaluation,
    evidence: Evidence,
    policy: GateConfig,
    adapter: AdapterConfig,
    *,
    look: int = 1,
    passed_before: int = 0,
    lead: Lead | None = None,
) -> Decision:
    """Apply every rule of the policy to an evaluation, which is the `look`-th decision on its test set.

    `passed_before` is how many earlier decisions replaced a version; `lead` is the champion's lead among them. Raises
    DataError: the evaluation lacks the candidate or the base, or the candidate is no published version.
    """
    candidate, _ = _required(evaluation, "candidate"), _required(evaluation, "base")
    champion = evaluation.model("champion")
    if candidate.version is None:
        raise DataError(
            f"the evaluation of run {evaluation.run_id} names no candidate version: publish it, then evaluate it"
        )
    _, best = _best(evaluation)
    best_confidence = confidence_at(look, policy.confidence, passed_before)
    rules = [
        *_compared(evaluation, evidence, policy, adapter, look, best_confidence, lead),
        *(
            rule
            for index, limit in enumerate(policy.limits)
            for rule in within(limit, index, candidate, evidence, policy.confidence)
        ),
    ]
    rules += _broken_numbers(candidate, {rule.metric for rule in rules})
    rules += _approval(policy.approval, evaluation, adapter.alias)
    verdict, decisive = verdict_of(rules)
    gained = next((rule.lower for rule in rules if rule.name == "not_worse_than_best"), None)
    is_better = gained is not None and gained > 0
    decision = Decision(
        decision="promote" if verdict == "promote" else "hold",
        verdict=verdict,
        adapter=adapter.name,
        alias=adapter.alias,
        run_id=evaluation.run_id,
        reasons=tuple(rule.text for rule in decisive),
        rules=tuple(rules),
        version=candidate.version,
        champion=champion.version if champion is not None else None,
        anchor=candidate.version if best is None or is_better else best.version,
        look=look,
        passed_before=passed_before,
        lead=lead,
        test_set=evaluation.test_set,
        policy=policy.model_dump(mode="json"),
        revision=1,  # of the rules on rare losses
    )
    return decision.model_copy(update={"basis_sha256": _basis_sha256(evaluation, policy, decision)})


def _best(evaluation: Evaluation) -> tuple[Role, Measured | None]:
    """The best version so far, and its role: the champion where no other was measured."""
    role: Role = "champion" if evaluation.model("anchor") is None else "anchor"
    return role, evaluation.model(role)


def _compared(
    evaluation: Evaluation,
    evidence: Evidence,
    policy: GateConfig,
    adapter: AdapterConfig,
    look: int,
    best_confidence: float,
    lead: Lead | None,
) -> list[RuleResult]:
    candidate, champion = _required(evaluation, "candidate"), evaluation.model("champion")

    def against(role: Role, metric: str, confidence: float = policy.confidence) -> Compared:
        called = {"base": "the base model", "anchor": "the best version"}.get(role, adapter.alias)
        relative = policy.margins == "relative" and metric == policy.metric
        return Compared(evaluation, evidence, metric_of(metric), role, called, confidence, relative)

    rules: list[RuleResult] = []
    if champion is not None and champion.version is not None:
        is_new = candidate.version != champion.version
        text = f"The candidate is a new version; {adapter.alias} points to {champion.version}."
        if not is_new:
            text = (
                f"Nothing changed: the candidate is {candidate.version}, the very version that {adapter.alias} points "
                "to now."
            )
        rules.append(
            RuleResult(name="new_version", field="adapter.alias", title="Is a new version", passed=is_new, text=text)
        )
    rules.extend(_too_few_records(evidence, policy.min_records))
    rules.extend(_unfit_records(evidence))
    rules.append(comparisons.better_than_base(policy, against("base", policy.metric)))
    rules.append(not_worse_than_champion(policy, champion, against("champion", policy.metric), lead))
    best_role, best = _best(evaluation)
    # Where the best version is the champion itself, a broken rule about the champion has already said as much.
    if best is not None and best.version is not None and (best_role == "anchor" or rules[-1].passed):
        compared = against(best_role, policy.metric, best_confidence)
        rules.append(comparisons.not_worse_than_best(policy, compared, version=best.version, look=look))
    if champion is not None:
        of_rare = policy.metric if policy.much_worse_share is None else "loss"
        if (rare := few_get_much_worse(policy, against("champion", of_rare))) is not None:
            rules.append(rare)
        rules.extend(
            comparisons.guarded(guard, index, against("champion", guard.metric))
            for index, guard in enumerate(policy.guards)
            if guard.metric != policy.metric
        )
        if (sliced := no_slice_is_worse(policy, against("champion", policy.metric))) is not None:
            rules.append(sliced)
    if policy.worse_on_general_text_by is not None:
        rules.append(comparisons.remembers(policy.worse_on_general_text_by, against("base", "general_loss")))
    if policy.lm_eval_worse_by:
        rules.append(no_task_is_worse(policy, evaluation.harness or HarnessScores(lm_eval="", tasks=())))
    if policy.kl_from_base_at_most is not None:
        rules.append(comparisons.stays_near_base(policy.kl_from_base_at_most, against("base", "kl_from_base")))
    return rules


def verdict_of(rules: Sequence[RuleResult]) -> tuple[Verdict, Sequence[RuleResult]]:
    """The verdict, and the rules that it follows from."""
    if failed := [rule for rule in rules if not (rule.passed or rule.undecided or rule.needs_approval)]:
        return "hold", failed
    if undecided := [rule for rule in rules if rule.undecided]:
        return "cannot tell", undecided
    waiting = [rule for rule in rules if rule.needs_approval]
    return ("needs approval", waiting) if waiting else ("promote", rules)


def _basis_sha256(evaluation: Evaluation, policy: GateConfig, decision: Decision) -> str:
    """The sha256, in hex, of a decision's policy, inputs and outcome. It covers no texts, which a release may change,
    and no key that a release adds and the policy leaves at its default."""
    basis = {
        "adapter": [decision.adapter, decision.alias],
        # A rule that asks for nothing is left out, as in decisions older than it.
        "policy": {key: value for key, value in identity(policy).items() if LEGACY_POLICY.get(key) != value},
        **({"revision": decision.revision} if decision.revision else {}),
        "dataset": evaluation.dataset_id,
        "records_sha256": evaluation.records_sha256,
        "look": decision.look,
        **({"passed_before": decision.passed_before} if decision.passed_before > 1 else {}),
        **({"lead": decision.lead.model_dump(mode="json")} if decision.lead else {}),
        "base": evaluation.base,
        **evaluation.model_dump(
            mode="json",
            include={"general_text", "own_answers", "changed_answers", *(["harness"] * bool(policy.lm_eval_worse_by))},
            exclude_none=True,
        ),
        "models": decode_json(evaluation.model_dump_json(include={"models"}).encode(), Evaluation.FILE),
        "rules": [[rule.name, rule.field, rule.passed, rule.undecided] for rule in decision.rules],
        "verdict": decision.verdict,
    }
    return hashlib.sha256(encode_json(basis)).hexdigest()


def _required(evaluation: Evaluation, role: Role) -> Measured:
    measured = evaluation.model(role)
    if measured is None:
        measured_roles = ", ".join(name for name, model in evaluation.models.items() if model) or "nothing"
        raise DataError(f"the evaluation has no metrics for the {role}: models holds {measured_roles}")
    return measured


def _too_few_records(evidence: Evidence, minimum: int) -> Iterator[RuleResult]:
    records, kind = evidence.num_independent, "records" if evidence.groups is None else "groups of records"
    if records < minimum:
        yield RuleResult(
            name="enough_records",
            field="gate.min_records",
            title="Enough held-out records",
            bound_text=f"at least {minimum}",
            passed=False,
            undecided=True,
            records_needed=minimum,
            text=f"The models were compared on {records} {kind}, and at least {minimum} are asked for: raise "
            "data.eval_share or evaluate.records, or add data.",
        )


def _unfit_records(evidence: Evidence) -> Iterator[RuleResult]:
    if evidence.unfit:
        yield RuleResult(
            name="fit_records",
            field="data.feedback",
            title="Records that nobody chose by how they were answered",
            bound_text="all of them",
            passed=False,
            undecided=True,
            text=f"{evidence.unfit} of {len(evidence.tokens)} records are logged answers that people chose by how good "
            "they were: on these any version looks better than the one that answered. Prepare the data again; "
            "`fineloop data audit` draws what may judge.",
        )


def _approval(policy: ApprovalConfig, evaluation: Evaluation, alias: str) -> Iterator[RuleResult]:
    if policy.always:
        yield RuleResult(
            name="approval",
            field="gate.approval.always",
            title="Approved by a person",
            passed=False,
            needs_approval=True,
            text="A person has to approve every version of this adapter.",
        )
    bound, changed = policy.changed_answers_above, evaluation.changed_answers
    if bound is None:
        return
    passed = changed is not None and changed <= bound + ROUNDING
    if evaluation.model("champion") is None:
        how = f"The alias {alias} points to no version yet, so everything changes"
    elif changed is None:
        how = f"How many of {alias}'s answers change was not measured"
    else:
        how = f"{changed * 100:.1f} % of the answers are other ones than {alias}'s"
    per_cent = f"{bound * 100:.10g} %"
    yield RuleResult(
        name="approval",
        field="gate.approval.changed_answers_above",
        title="Changes few enough answers to need no approval",
        bound=bound,
        bound_text=f"at most {per_cent} changed",
        passed=passed,
        needs_approval=not passed,
        text=f"{how}; above {per_cent} a person has to approve that.",
    )


def _broken_numbers(candidate: Measured, compared: set[str | None]) -> Iterator[RuleResult]:
    """A NaN or an infinity in a metric that no rule compares still means that the evaluation cannot be trusted."""
    for metric in metrics_of(candidate.metrics):
        key, value = metric.key, candidate.metrics[metric.key]
        if key not in compared and value is not None and finite(value) is None:
            yield RuleResult(
                name="finite_numbers",
                field="evaluate",
                title=f"{metric.title} is a sound number",
                metric=key,
                passed=False,
                text=f"The candidate's {metric.label} is {value}: the evaluation is not sound.",
            )


# Multiple comparisons with one error rate for all of them together, by Holm's procedure (Scandinavian Journal of
# Statistics 6, 1979): the more comparisons, the higher the confidence of each.


def holm_level(confidence: float, comparisons: int) -> float:
    """The confidence that each of this many comparisons needs, for `confidence` in all of them together."""
    return 1 - (1 - confidence) / comparisons


def significant(comparisons: int, confidence: float, shows: Callable[[int, float], bool]) -> set[int]:
    """The indices of the significant comparisons; `shows(index, level)` tells whether one is significant at a level.

    First all comparisons share the error rate, then only those that no earlier step has found.
    """
    result: set[int] = set()
    while len(result) < comparisons:
        at = holm_level(confidence, comparisons - len(result))
        more = {index for index in range(comparisons) if index not in result and shows(index, at)}
        if not more:
            break
        result |= more
    return result


def no_slice_is_worse(policy: GateConfig, compared: Compared) -> RuleResult | None:
    """Check that no slice shows the candidate worse than the champion by more than allowed, since an unchanged mean may
    hide that one kind of record got worse; None without slices.

    A slice of fewer records than `gate.min_records` is not judged.
    """
    slices = list(_slices(policy, compared))
    if not slices:
        return None
    margin, level = policy.total_budget, holm_level(policy.confidence, len(slices))
    at_once = [bounds(pairs, level) for _, _, pairs in slices]

    def shows(index: int, at: float) -> bool:
        between = at_once[index] if at == level else bounds(slices[index][2], at)
        return between is not None and between.upper < -margin - ROUNDING

    worse = significant(len(slices), policy.confidence, shows)
    results = [
        SliceResult(
            kind=kind,
            name=name,
            records=between.records,
            gain=between.gain,
            # Not finite where the slice's records are so few, or so alike, that some resamples have no spread.
            lower=finite(between.lower),
            upper=finite(between.upper),
            worse=index in worse,
        )
        for index, ((kind, name, _), between) in enumerate(zip(slices, at_once, strict=True))
        if between is not None
    ]
    results.sort(key=lambda result: result.gain)
    allowed, measured = compared.margin_text(margin), len(results) == len(slices)

    def described(result: SliceResult) -> str:
        lies = compared.amounts.range_text(result.lower, result.upper)
        return f"{result.kind} {result.name!r} ({result.records} records, gain {lies})"

    ours, than = compared.metric.label, f"worse than {compared.called}'s by more than {allowed}"
    if not measured:
        text = unmeasured(compared)
    elif worse:
        named = "; ".join(described(result) for result in results if result.worse)
        text = f"The candidate's {ours} is {than} in {len(worse)} of {len(results)} slices of the records: {named}."
    else:
        text = (
            f"In none of {len(results)} slices of the records is the candidate's {ours} shown to be {than}; lowest is "
            f"{described(results[0])}."
        )
    return RuleResult(
        name="slices",
        field="gate.slices",
        title="No kind of record gets worse",
        metric=compared.metric.key,
        against=compared.against,
        bound=margin,
        bound_text=f"in no slice shown to be worse by more than {allowed}",
        confidence=level,
        relative=compared.relative,
        slices=tuple(results),
        passed=measured and not worse,
        text=text,
    )


def _slices(policy: GateConfig, compared: Compared) -> Iterator[tuple[str, str, Pairs]]:
    pairs = compared.pairs
    if pairs is None:
        return
    for kind in policy.slices:
        of_records = compared.evidence.slices.get(kind)
        names = () if of_records is None else np.unique(of_records)
        for name in names if len(names) > 1 else ():
            part = pairs.where(of_records == name)
            if part.num_independent >= policy.min_records:
                yield kind, str(name), part


# The rule that the candidate has not unlearned what the base can do outside the domain.


def no_task_is_worse(policy: GateConfig, harness: HarnessScores) -> RuleResult:
    """Check that no task of lm-eval shows the candidate worse than the base by more than the task's margin.

    A task is not judged if the base passes so few documents that losing them all would not show. If none is judged, the
    gate cannot tell. The judged tasks share one error rate (Holm).
    """
    pairs = {task: (harness.main("candidate", task), harness.main("base", task)) for task in policy.lm_eval_worse_by}
    scores = {task: (ours, theirs) for task, (ours, theirs) in pairs.items() if ours and theirs}
    judged = [
        (task, *both)
        for task, both in scores.items()
        if not (passes := both[1].passes)
        or shown_worse(0, sum(passes), len(passes), policy.lm_eval_worse_by[task], policy.confidence)
    ]

    def shows(index: int, level: float) -> bool:
        task, ours, theirs = judged[index]
        return _is_worse(ours, theirs, policy.lm_eval_worse_by[task], level)

    worse = [judged[index] for index in sorted(significant(len(judged), policy.confidence, shows))]
    unmeasured = sorted(pairs.keys() - scores.keys())
    listed = "; ".join(
        f"{task} ({ours.metric} {score_text(ours)} against {score_text(theirs)})"
        for task, ours, theirs in worse or judged
    )
    unjudged = sorted(scores.keys() - {task for task, *_ in judged})
    more = f" Of {', '.join(unjudged)} the base passes too little for a loss to show." if unjudged else ""
    if unmeasured:
        why = f", {harness.left_out}" if harness.left_out else ""
        text = f"Of {', '.join(unmeasured)} it is not known what base and candidate score{why}."
    elif not judged:
        text = f"No task of lm-eval can tell whether the candidate unlearned anything.{more}"
    else:
        how = "scores worse than the base" if worse else "is not shown to score worse than the base"
        count = f"{len(worse or judged)} of {len(pairs)} tasks"
        text = f"The candidate {how} by more than is allowed in {count}: {listed}.{more}"
    return RuleResult(
        name="lm_eval",
        field="gate.lm_eval_worse_by",
        title="Can still do what the base can",
        against="base",
        bound_text="in no task shown to be worse by more than its margin",
        confidence=holm_level(policy.confidence, max(1, len(judged))),
        passed=bool(judged) and not worse and not unmeasured,
        undecided=not judged and not unmeasured,
        text=text,
    )


def _is_worse(ours: TaskScore, theirs: TaskScore, margin: float, confidence: float) -> bool:
    """Whether a loss above the margin shows: by the documents that only one model passes, else by standard errors."""
    if ours.passes and len(ours.passes) == len(theirs.passes):
        pairs = list(zip(ours.passes, theirs.passes, strict=True))
        return shown_worse(pairs.count((True, False)), pairs.count((False, True)), len(pairs), margin, confidence)
    loss = ((theirs.value or 0.0) - (ours.value or 0.0)) * (-1 if ours.lower_is_better else 1)
    error = math.hypot(ours.stderr or 0.0, theirs.stderr or 0.0)
    return loss > margin + NormalDist().inv_cdf(confidence) * error
