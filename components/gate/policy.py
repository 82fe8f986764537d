"""The gate's rules: an evaluation and its records in, a decision with its reasons out. No I/O.

A rule passes, fails, or, where it compares models, is undecided. A candidate is promoted when all pass; one that fails
any is held; where none fails and some are undecided, the gate cannot tell, and the candidate is held as well. A
candidate that no other rule holds may still need a person's approval. A new rule is a function here or in `comparisons`
that writes its own text, called in `decide`; its bound is a key of `GateConfig`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from components.config.gate import ApprovalConfig, GateConfig, Limit
from components.config.schema import AdapterConfig
from components.config.section import identity
from components.gate import comparisons, slices, suites
from components.gate.comparisons import (
    ROUNDING,
    Compared,
    few_get_much_worse,
    not_worse_than_champion,
    number,
    unmeasured_number,
)
from components.gate.evidence import Evidence
from components.records.steps import Decision, Evaluation, Lead, Measured, Role, RuleResult, Verdict, finite
from components.registry.event_log import confidence_at
from components.shared.errors import DataError
from components.shared.metrics import Metric, metric_of, metrics_of
from components.store.store import decode_json, encode_json

BEFORE: Mapping[str, Any] = {"much_worse_share": 1.0}
"""The values that policies recorded before a key existed stand for, where they differ from the key's default."""


def decide(
    evaluation: Evaluation,
    evidence: Evidence,
    policy: GateConfig,
    adapter: AdapterConfig,
    *,
    look: int = 1,
    passed_before: int = 0,
    lead: Lead | None = None,
    revision: int = comparisons.REVISION,
) -> Decision:
    """Apply every rule of the policy to an evaluation, which is the `look`-th decision on its test set.

    `passed_before` is how many earlier decisions replaced a version; `lead` is the champion's lead among them.
    `revision` is that of the rules on rare losses.

    Raises:
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
        *_compared(evaluation, evidence, policy, adapter, look, best_confidence, lead, revision),
        *_limited(candidate, evidence, policy),
    ]
    rules += _broken_numbers(candidate, {rule.metric for rule in rules})
    rules += _approval(policy.approval, evaluation, adapter.alias)
    verdict, decisive = verdict_of(rules)
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
        anchor=_anchor(rules, candidate.version, best),
        look=look,
        passed_before=passed_before,
        lead=lead,
        test_set=evaluation.test_set,
        policy=policy.model_dump(mode="json"),
        revision=revision,
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
    revision: int,
) -> list[RuleResult]:
    """The rules that compare the candidate with other models."""
    candidate, champion = _required(evaluation, "candidate"), evaluation.model("champion")

    def against(role: Role, metric: str, confidence: float = policy.confidence) -> Compared:
        called = {"base": "the base model", "anchor": "the best version"}.get(role, adapter.alias)
        relative = policy.margins == "relative" and metric == policy.metric
        return Compared(evaluation, evidence, metric_of(metric), role, called, confidence, relative, revision)

    rules: list[RuleResult] = []
    if champion is not None and champion.version is not None and candidate.version is not None:
        rules.append(_is_new(candidate.version, champion.version, adapter.alias))
    rules.extend(_too_few_records(evidence, policy.min_records))
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
        if (sliced := slices.no_slice_is_worse(policy, against("champion", policy.metric))) is not None:
            rules.append(sliced)
    if policy.worse_on_general_text_by is not None:
        rules.append(comparisons.remembers(policy.worse_on_general_text_by, against("base", "general_loss")))
    if policy.suite_worse_by is not None:
        rules.append(suites.no_suite_is_worse(policy.suite_worse_by, policy, evaluation))
    if policy.kl_from_base_at_most is not None:
        rules.append(comparisons.stays_near_base(policy.kl_from_base_at_most, against("base", "kl_from_base")))
    return rules


def _limited(candidate: Measured, evidence: Evidence, policy: GateConfig) -> Iterator[RuleResult]:
    """The rules that bound the candidate's own metrics."""
    for index, limit in enumerate(policy.limits):
        metric = metric_of(limit.metric)
        prompts = evidence.prompts(metric) if metric.of_prompts and limit.max is None else None
        if limit.min is not None and prompts is not None:
            yield comparisons.depends_on_prompts(limit.min, index, metric, candidate, prompts, policy.confidence)
        else:
            yield from _within(limit, index, candidate)


def verdict_of(rules: Sequence[RuleResult]) -> tuple[Verdict, Sequence[RuleResult]]:
    """The verdict, and the rules that it follows from."""
    failed = [rule for rule in rules if not (rule.passed or rule.undecided or rule.needs_approval)]
    undecided = [rule for rule in rules if rule.undecided]
    waiting = [rule for rule in rules if rule.needs_approval]
    if failed:
        return "hold", failed
    if undecided:
        return "cannot tell", undecided
    return ("needs approval", waiting) if waiting else ("promote", rules)


def _anchor(rules: Sequence[RuleResult], candidate: str, best: Measured | None) -> str | None:
    """The best version once the candidate is promoted: the candidate if there was none or it is sure to be better."""
    gained = next((rule.lower for rule in rules if rule.name == "not_worse_than_best"), None)
    return candidate if best is None or (gained is not None and gained > 0) else best.version


def _basis_sha256(evaluation: Evaluation, policy: GateConfig, decision: Decision) -> str:
    """The sha256, in hex, of a decision's policy, inputs and outcome. It covers no texts, which a release may change,
    and no key that a release adds and the policy leaves at its default."""
    basis = {
        "adapter": [decision.adapter, decision.alias],
        "policy": _asked(policy),
        **({"revision": decision.revision} if decision.revision else {}),
        "dataset": evaluation.dataset_id,
        "records_sha256": evaluation.records_sha256,
        "look": decision.look,
        **({"passed_before": decision.passed_before} if decision.passed_before > 1 else {}),
        **({"lead": decision.lead.model_dump(mode="json")} if decision.lead else {}),
        "base": evaluation.base,
        **evaluation.model_dump(
            mode="json", include={"general_text", "own_answers", "changed_answers"}, exclude_none=True
        ),
        **(
            {"suites": [[each.name, each.sha256, each.passes] for each in evaluation.suites]}
            if evaluation.suites
            else {}
        ),
        "models": decode_json(evaluation.model_dump_json(include={"models"}).encode(), Evaluation.FILE),
        "rules": [[rule.name, rule.field, rule.passed, rule.undecided] for rule in decision.rules],
        "verdict": decision.verdict,
    }
    return hashlib.sha256(encode_json(basis)).hexdigest()


def _asked(policy: GateConfig) -> dict[str, Any]:
    """The keys that identify a policy. A rule that asks for nothing is left out, as in decisions older than it."""
    return {key: value for key, value in identity(policy).items() if BEFORE.get(key) != value}


def _required(evaluation: Evaluation, role: Role) -> Measured:
    measured = evaluation.model(role)
    if measured is None:
        found = ", ".join(name for name, model in evaluation.models.items() if model) or "nothing"
        raise DataError(f"the evaluation has no metrics for the {role}: models holds {found}")
    return measured


def _is_new(version: str, champion: str, alias: str) -> RuleResult:
    passed = version != champion
    return RuleResult(
        name="new_version",
        field="adapter.alias",
        title="Is a new version",
        passed=passed,
        text=f"The candidate is a new version; {alias} points to {champion}."
        if passed
        else f"Nothing changed: the candidate is {version}, the very version that {alias} points to now.",
    )


def _too_few_records(evidence: Evidence, minimum: int) -> Iterator[RuleResult]:
    found, kind = evidence.num_independent, "records" if evidence.groups is None else "groups of records"
    if found < minimum:
        yield RuleResult(
            name="enough_records",
            field="gate.min_records",
            title="Enough held-out records",
            bound_text=f"at least {minimum}",
            passed=False,
            undecided=True,
            records_needed=minimum,
            text=f"The models were compared on {found} {kind}, and at least {minimum} are asked for: raise "
            "data.eval_share or evaluate.records, or add data.",
        )


def _within(limit: Limit, index: int, candidate: Measured) -> Iterator[RuleResult]:
    metric = metric_of(limit.metric)
    ours = number(candidate, metric)
    for side, bound, words in (("min", limit.min, "at least"), ("max", limit.max, "at most")):
        if bound is None:
            continue
        if ours is None:
            passed = False
            text = unmeasured_number(metric, candidate, "candidate")
        else:
            passed = ours >= bound - ROUNDING if side == "min" else ours <= bound + ROUNDING
            text = _limit_text(metric, side, ours, bound, passed=passed)
        enough = f"{metric.title} {'high' if side == 'min' else 'low'} enough"
        yield RuleResult(
            name=f"limit_{side}",
            field=f"gate.limits[{index}].{side}",
            title="Answers depend on their prompts" if metric.of_prompts and side == "min" else enough,
            metric=metric.key,
            candidate=ours,
            bound=bound,
            bound_text=f"{words} {metric.bound_text(bound)}",
            line=bound,
            line_text=f"limit: {words} {metric.text(bound)}",
            passed=passed,
            text=text,
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
    yield RuleResult(
        name="approval",
        field="gate.approval.changed_answers_above",
        title="Changes few enough answers to need no approval",
        bound=bound,
        bound_text=f"at most {bound * 100:.10g} % changed",
        passed=passed,
        needs_approval=not passed,
        text=f"{how}; above {bound * 100:.10g} % a person has to approve that.",
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


def _limit_text(metric: Metric, side: str, ours: float, bound: float, *, passed: bool) -> str:
    shown = metric.with_unit(ours, bound)
    demand = f"{'at least' if side == 'min' else 'at most'} {metric.bound_text(bound)} is required"
    if not metric.of_prompts or side != "min":
        direction = "within" if passed else "below" if side == "min" else "above"
        return f"The candidate's {metric.label} of {shown} is {direction} the limit: {demand}."
    if passed:
        return (
            f"Answers depend on their prompts: seeing its own prompt instead of another record's helps by {shown}; "
            f"{demand}."
        )
    return (
        f"Answers do not depend on their prompts: seeing its own prompt instead of another record's helps by {shown}; "
        f"{demand}. Are prompts and answers shuffled or mislabelled in the data?"
    )
