"""The rules that compare the candidate with another model, on bounds of the gain and not on the gain itself.

A comparison passes when the gain is sure to be as large as required, fails when it is sure not to be, and is undecided
in between. Where a number is missing or not finite, it fails: nothing is promoted on a guess.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from annotated_types import Le

from components.config.gate import MUCH_WORSE, GateConfig, Guard, Limit
from components.config.schema import EvaluateConfig
from components.records import runs
from components.records.steps import Decision, Evaluation, Lead, Measured, Role, RuleResult, TextLosses, finite
from components.shared import binomial
from components.shared.errors import IntegrityError, ObjectMissing
from components.shared.metrics import METRICS, RELATIVE, Metric, are_labels, metric_of
from components.shared.paired import (
    Array,
    Bounds,
    Pairs,
    bounds,
    few_unseen,
    mcnemar,
    much_worse_unseen,
    records_to_decide,
    wins_and_losses,
)
from components.shared.parquet import table_of
from components.shared.protocol import counted
from components.store.store import Store

# The evidence that the gate decides on: each model's values on each held-out record (evaluation_records.parquet).

Names = npt.NDArray[np.str_]

TOKENS, ID, GROUP, SOURCE = "answer_tokens", "id", "group", "source"
ORIGIN, DRAWN = "origin", "drawn"


@dataclass(frozen=True)
class Evidence:
    """Columns of numbers, a row for each held-out record that was used."""

    tokens: Array
    columns: Mapping[str, Array]
    """One value per record, by `<role>_<quantity>`; NaN where it was not measured."""
    groups: npt.NDArray[np.int64] | None = None
    """The index of each record's group, from 0; None where each record stands for itself."""
    slices: Mapping[str, Names] = field(default_factory=dict)
    """For each kind of slice, the name of each record's slice."""
    texts: Mapping[str, "Evidence"] = field(default_factory=dict)
    """By kind, the same for texts that are not records; only the kinds that were read."""
    names: Names | None = None
    """Of each record its group's name, or where records have none its id; None of texts."""
    unfit: int = 0
    """Records that must not judge: logged answers that people chose by how good they were."""

    @property
    def num_independent(self) -> int:
        return len(self.tokens) if self.groups is None else int(self.groups.max()) + 1

    def pairs(self, metric: Metric, against: Role, *, relative: bool = False) -> Pairs | None:
        """The candidate's and another model's values on every record, or text; None where either was not measured."""
        of = self.texts.get(metric.probe) if metric.probe else self
        if of is None:
            return None
        column = metric.column or metric.key
        return of._paired(
            metric,
            f"candidate_{column}",
            f"{against}_{column}",
            lower_is_better=metric.lower_is_better,
            exponential=metric.exponential,
            relative=relative,
        )

    def prompts(self, metric: Metric) -> Pairs | None:
        """The candidate's losses given each record's own prompt and another's; None where they were not measured."""
        return self._paired(metric, "candidate_nll", "candidate_other_prompt_nll", lower_is_better=True)

    def _paired(self, metric: Metric, ours: str, theirs: str, **kind: bool) -> Pairs | None:
        if ours not in self.columns or theirs not in self.columns:
            return None
        weights = self.tokens if metric.per_token else np.ones(len(self.tokens))
        return Pairs(self.columns[ours], self.columns[theirs], weights, self.groups, **kind)


def read_evidence(store: Store, evaluation: Evaluation) -> Evidence:
    """The records behind an evaluation. Raises ObjectMissing: they are not there; IntegrityError: they are not what the
    evaluation was made of."""
    lying = runs.lying(store, evaluation.run_id, runs.EVALUATION_RECORDS)
    if lying is None:
        key = runs.key_of(store, evaluation.run_id, runs.EVALUATION_RECORDS)
        raise ObjectMissing(f"{store.uri(key)} does not exist")
    body, uri = lying[0], store.uri(lying[1])
    again = f"evaluate {evaluation.run_id} again"
    sha256 = hashlib.sha256(body).hexdigest()
    if sha256 != evaluation.records_sha256:
        raise IntegrityError(
            f"{uri} has sha256 {sha256}, but the evaluation was made of {evaluation.records_sha256}: {again}"
        )
    evidence = parse_evidence(body, uri)
    if len(evidence.tokens) != evaluation.records:
        records = len(evidence.tokens)
        raise IntegrityError(f"{uri} has {records} records, and the evaluation is of {evaluation.records}: {again}")
    return replace(evidence, texts=dict(of_texts(evaluation)))


def of_texts(evaluation: Evaluation) -> Iterator[tuple[str, Evidence]]:
    """Yield each kind of text with its evidence: a row per passage of general text, or per answer of the base's own."""
    for kind in filter(None, (metric.probe for metric in METRICS.values())):
        texts = getattr(evaluation, kind, None)
        if isinstance(texts, TextLosses):
            columns = {f"{role}_nll": np.array(nll) for role, nll in texts.nll.items()}
            yield kind, Evidence(np.array(texts.tokens, dtype=float), columns)


def parse_evidence(body: bytes, uri: str) -> Evidence:
    """The numbers of evaluation_records.parquet. Raises IntegrityError: it is not Parquet, or has no column of answer
    tokens."""
    try:
        table = table_of(body)
        tokens = table.column(TOKENS).to_numpy().astype(float)
    except (pa.ArrowException, KeyError) as exc:
        raise IntegrityError(f"{uri} holds no evaluated records: {exc}") from exc
    columns = {
        name: table.column(name).to_numpy().astype(float)
        for name, kind in zip(table.schema.names, table.schema.types, strict=True)
        if pa.types.is_floating(kind)
    }
    groups = names = None
    if GROUP in table.schema.names:
        names = np.array(table.column(GROUP).to_pylist(), np.str_)
        _, groups = np.unique(names, return_inverse=True)
    elif ID in table.schema.names:
        names = np.array(table.column(ID).to_pylist(), np.str_)
    unfit = 0
    if ORIGIN in table.schema.names:
        origins = table.column(ORIGIN).to_pylist()
        drawn = table.column(DRAWN).to_pylist() if DRAWN in table.schema.names else [""] * len(origins)
        unfit = sum(bool(origin) and not why for origin, why in zip(origins, drawn, strict=True))
    return Evidence(tokens, columns, groups, dict(_slices(table)), names=names, unfit=unfit)


def _slices(table: Any) -> Iterator[tuple[str, Names]]:
    texts = {
        name: [str(value) for value in table.column(name).to_pylist()]
        for name in ("prompt", "reference", SOURCE)
        if name in table.schema.names
    }
    if (references := texts.get("reference")) and are_labels(len(set(references)), len(references)):
        yield "label", np.array(references)
    if SOURCE in texts:
        yield "source", np.array(texts[SOURCE])
    if "prompt" in texts and references:
        lengths = np.array([len(a) + len(b) for a, b in zip(texts["prompt"], references, strict=True)])
        short, long = np.quantile(lengths, [1 / 3, 2 / 3], method="nearest")
        thirds = [f"up to {short} characters", f"{short + 1} to {long} characters"]
        yield "length", np.select([lengths <= short, lengths <= long], thirds, f"more than {long} characters")


# The winner's curse: a champion was chosen on the very records that later candidates are compared on, so on these it
# looks better than it is. Its score is shrunk towards the scores of all decisions on these records, by the share of
# their variance that is due to the records (empirical Bayes: Efron, Tweedie's formula and selection bias, JASA 106,
# 2011; the share is estimated as in Morris, JASA 78, 1983).

FEWEST = 8
"""The smallest number of decisions to estimate a variance from."""


def lead_of(champion: str | None, metric: str, earlier: Sequence[Decision]) -> Lead | None:
    """The champion's lead over the candidates of `earlier` decisions on these records, given in their order: the
    distance of its gain over the base from a line fitted to all, because a recipe whose data grows gets better.

    None if the champion is not among them, or they are fewer than FEWEST.
    """
    sign = -1.0 if metric_of(metric).lower_is_better else 1.0
    judged = [
        (decision.version, sign * (rule.candidate - rule.other))
        for decision in earlier
        for rule in decision.rules
        if rule.name == "better_than_base" and rule.metric == metric
        if rule.candidate is not None and rule.other is not None
    ]
    place = max((index for index, (version, _) in enumerate(judged) if version == champion), default=None)
    if place is None or len(judged) < FEWEST:
        return None
    nights, gains = np.arange(len(judged)), np.array([gain for _, gain in judged])
    above = gains - np.polyval(np.polyfit(nights, gains, 1), nights)
    return Lead(gain=float(above[place]), variance=float(above @ above) / (len(judged) - 2), decisions=len(judged))


def luck_of(lead: Lead | None, error: float) -> float:
    """The part of the lead that is expected to be luck. `error` is the standard error of the candidate's gain over the
    champion: of two models, so half of its square is the records' part in the variance of one model's score.
    """
    if lead is None or lead.gain <= 0 or lead.variance <= 0:
        return 0.0
    degrees = lead.decisions - 2
    return lead.gain * min(1.0, (degrees - 2) / degrees * error**2 / 2 / lead.variance)


# Bounds are inclusive in decimal numbers: 0.30 - 0.25 counts as 0.05, although it is less in binary floating point.
ROUNDING = 1e-9
TEXTS: dict[str, tuple[str, str]] = {
    "general_text": ("passages", "general_passages"),
    "own_answers": ("answers", "own_answers"),
}
"""By kind of text: the noun for its texts, and the key of `evaluate` that sets their number."""


@dataclass(frozen=True)
class Compared:
    """The candidate and another model, which a rule compares."""

    evaluation: Evaluation
    evidence: Evidence
    metric: Metric
    against: Role
    called: str
    """What people call the other model."""
    confidence: float
    relative: bool = False
    """Whether the required gain is a share of the other model's metric."""

    @property
    def allows_for_rare(self) -> bool:
        """Whether its bounds need rules of their own on rare losses; the score bounds of right and wrong do not."""
        return self.pairs is None or not self.pairs.are_binary

    @property
    def amounts(self) -> Metric:
        """The metric in whose unit differences are stated."""
        return RELATIVE if self.relative else self.metric

    def margin_text(self, amount: float) -> str:
        """A difference in words, with what a relative one is a share of."""
        text = self.amounts.margin_text(amount)
        return f"{text} of {self.called}'s" if self.relative else text

    @property
    def ours(self) -> float | None:
        return self.evaluation.metric("candidate", self.metric.key)

    @property
    def theirs(self) -> float | None:
        return self.evaluation.metric(self.against, self.metric.key)

    @cached_property
    def pairs(self) -> Pairs | None:
        """Both models' values, record by record; None where a number is missing."""
        if self.ours is None or self.theirs is None:
            return None
        return self.evidence.pairs(self.metric, self.against, relative=self.relative)

    @cached_property
    def bounds(self) -> Bounds | None:
        """The confidence bounds of the gain; None where a number is missing or not finite."""
        return bounds(pairs, self.confidence) if (pairs := self.pairs) else None

    def result(self, *, passed: bool, text: str = "", **fields: Any) -> RuleResult:
        """The result of a rule, with the numbers that were compared, and their bounds where they are known."""
        fields = {
            "metric": self.metric.key,
            "against": self.against,
            "candidate": self.ours,
            "other": self.theirs,
            **fields,
        }
        if self.bounds is None:
            return RuleResult(**fields, passed=passed, text=text or unmeasured(self))
        ends = {name: getattr(self.bounds, name) for name in ("gain", "lower", "upper")}
        numbers = {**ends, "confidence": self.confidence, "relative": self.relative}
        return RuleResult(**fields, **numbers, passed=passed, text=text)


def better_than_base(policy: GateConfig, compared: Compared) -> RuleResult:
    """The candidate is sure to be better than the base by the policy's minimum."""
    margin = policy.better_than_base_by
    at_least = f"better by at least {compared.margin_text(margin)}"
    return _required(
        compared,
        margin,
        demand=f"it has to be {at_least}",
        name="better_than_base",
        field="gate.better_than_base_by",
        title=f"{compared.metric.title} better than the base model's",
        bound=margin,
        bound_text=at_least,
        line_words=", to beat the base",
    )


def not_worse_than_best(policy: GateConfig, compared: Compared, *, version: str, look: int) -> RuleResult:
    """The candidate is sure to be worse than the best version so far by no more than the total budget."""
    result = not_worse(
        compared,
        policy.total_budget,
        name="not_worse_than_best",
        field="gate.worse_than_best_by",
        title=f"{compared.metric.title} not worse than the best version's",
        line_words=", not to fall behind the best so far",
    )
    times = "the first decision" if look == 1 else f"decision {look}"
    text = f"{result.text} The best version so far is {version}; this is {times} on this test set."
    return result.model_copy(update={"text": text})


def remembers(tolerance: float, compared: Compared) -> RuleResult:
    """On general text, the candidate is sure to be worse than the base by no more than is allowed."""
    return not_worse(
        compared,
        tolerance,
        name="remembers",
        field="gate.worse_on_general_text_by",
        title="Remembers what the base knows",
        line_words=", not to forget what the base knows",
    )


def stays_near_base(most: float, compared: Compared) -> RuleResult:
    """On the base's own answers, the candidate is sure to have moved from it by no more than `most`.

    The base's own divergence is 0, so the gain is the divergence with its sign reversed.
    """
    metric, between = compared.metric, compared.bounds
    at_most = f"at most {metric.bound_text(most)}"
    result = not_worse(
        compared,
        most,
        name="near_base",
        field="gate.kl_from_base_at_most",
        title="Answers as its base outside the domain",
        line_words=", to answer as the base does",
    )
    text = result.text
    if between is not None and compared.ours is not None:
        low, high = (metric.text(0.0 - end, most) for end in (between.upper, between.lower))
        text = (
            f"The candidate's {metric.label} is {metric.with_unit(compared.ours, most)} on {between.records} of the "
            f"base's own answers, between {low} and {high}, each with {compared.confidence * 100:.6g} % confidence; it "
            f"may be {at_most}."
        )
        if result.undecided:
            text += f" {_not_enough(compared, result.records_needed)}"
    return result.model_copy(update={"bound_text": at_most, "text": text})


def guarded(guard: Guard, index: int, compared: Compared) -> RuleResult:
    """The candidate does not fall behind the champion on a metric that does not decide by itself."""
    metric, called = compared.metric, compared.called
    title = f"{metric.title} not below {called}'s" if not metric.lower_is_better else f"{metric.title} as {called}'s"
    if guard.worse_than_champion_by is not None:
        return not_worse(
            compared,
            guard.worse_than_champion_by,
            name="guard",
            field=f"gate.guards[{index}].worse_than_champion_by",
            title=title,
            line_words=f", not to fall behind {called}",
        )
    passed, text, between, pairs = False, "", compared.bounds, compared.pairs
    if between is not None and pairs is not None:
        how = _how(compared, between.gain)
        if pairs.are_binary:
            won, lost = wins_and_losses(pairs)
            chance, error = mcnemar(won, lost), 1 - compared.confidence
            passed = chance > error
            text = (
                f"{how}: it alone is right on {won} records, and {called} alone on {lost}, which by chance happens "
                f"with probability {chance:.2g} if they are equally good (McNemar's exact test); below {error:.2g} it "
                "counts as worse."
            )
        else:
            passed = between.upper >= -ROUNDING
            text = f"{how}. {_sure(compared, between)}; it must not be shown to be worse."
    return compared.result(
        name="guard",
        field=f"gate.guards[{index}]",
        title=title,
        bound_text="not shown to be worse",
        passed=passed,
        text=text,
    )


def within(
    limit: Limit, index: int, candidate: Measured, evidence: Evidence, confidence: float
) -> Iterator[RuleResult]:
    """Bound one of the candidate's own metrics. That answers depend on their prompts has to be sure, where the losses
    of single records given other prompts were measured."""
    metric = metric_of(limit.metric)
    ours = finite(candidate.metrics.get(metric.key))
    pairs = evidence.prompts(metric) if metric.of_prompts and limit.max is None else None
    between = bounds(pairs, confidence) if pairs else None
    for side, bound, words in (("min", limit.min, "at least"), ("max", limit.max, "at most")):
        if bound is None:
            continue
        is_min, on_prompts = side == "min", metric.of_prompts and side == "min"
        fields: dict[str, Any] = {
            "name": f"limit_{side}",
            "field": f"gate.limits[{index}].{side}",
            "title": "Answers depend on their prompts"
            if on_prompts
            else f"{metric.title} {'high' if is_min else 'low'} enough",
            "metric": metric.key,
            "candidate": ours,
            "bound": bound,
            "bound_text": f"{words} {metric.bound_text(bound)}",
            "line": bound,
            "line_text": f"limit: {words} {metric.text(bound)}",
        }
        if ours is None or (pairs and between is None):
            yield RuleResult(**fields, passed=False, text=unmeasured_number(metric, candidate, "candidate"))
            continue
        lower, gain, upper = (between.lower, between.gain, between.upper) if between else (ours, ours, ours)
        passed = lower >= bound - ROUNDING if is_min else ours <= bound + ROUNDING
        undecided = on_prompts and not passed and upper >= bound - ROUNDING
        demand = f"{words} {metric.bound_text(bound)} is required."
        if on_prompts:
            ends, doubt = "", "may not " if undecided else "do not "
            if between:
                sure = f"each with {confidence * 100:.6g} % confidence"
                ends = f", between {metric.text(lower)} and {metric.text(upper)}, {sure}"
                fields |= {"gain": gain, "lower": lower, "upper": upper, "confidence": confidence}
                fields["records_needed"] = records_to_decide(between, bound, confidence) if undecided else None
            text = (
                f"Answers {'' if passed else doubt}depend on their prompts: seeing its own prompt instead of another "
                f"record's helps by {metric.with_unit(gain, bound)}{ends}; {demand}"
            )
            text += "" if passed else " Are prompts and answers shuffled or mislabelled in the data?"
        else:
            beyond, shown = "below" if is_min else "above", metric.with_unit(ours, bound)
            where = "within" if passed else beyond
            text = f"The candidate's {metric.label} of {shown} is {where} the limit: {demand}"
        yield RuleResult(**fields, passed=passed, undecided=undecided, text=text)


def unmeasured(compared: Compared) -> str:
    """The sentence about a comparison for which a number is missing."""
    model, metric = compared.evaluation.model, compared.metric
    if compared.ours is None:
        return unmeasured_number(metric, model("candidate"), "candidate")
    if compared.theirs is None:
        name = "base model" if compared.against == "base" else f"{compared.called} version"
        return unmeasured_number(metric, model(compared.against), name)
    return f"The {metric.label} of single records is unknown, so this rule cannot be checked and counts as failed."


def unmeasured_number(metric: Metric, measured: Measured | None, name: str) -> str:
    """The sentence about a number that is missing or not finite."""
    value = measured.metrics.get(metric.key) if measured else None
    seen = "was not measured" if value is None else f"is {value}, not a finite number"
    return f"The {name}'s {metric.label} {seen}, so this rule cannot be checked and counts as failed."


def not_worse(compared: Compared, tolerance: float, *, luck: float = 0.0, **words: Any) -> RuleResult:
    """The candidate is sure to be worse by no more than `tolerance` plus the other model's `luck`."""
    allowed = at_most(compared, tolerance)
    demand = f"it may be {allowed}" if tolerance else "it may not be worse at all"
    return _required(compared, -tolerance - luck, demand=demand, bound=tolerance, bound_text=allowed, **words)


def at_most(compared: Compared, tolerance: float) -> str:
    """The demand that `tolerance` makes, in words."""
    return f"worse by at most {compared.margin_text(tolerance)}"


def _required(
    compared: Compared, required: float, *, demand: str, line_words: str, unseen: float = 0.0, **words: Any
) -> RuleResult:
    """The gain is sure to be `required` or more, even if it is lower by `unseen`."""
    metric, between = compared.metric, compared.bounds
    if compared.theirs is not None and compared.ours is not None:
        gain = required * abs(compared.theirs) if compared.relative else required
        words["line"] = line = metric.better_by(compared.theirs, gain)
        words["line_text"] = f"{'at most' if metric.lower_is_better else 'at least'} {metric.text(line)}{line_words}"
    if between is None:
        return compared.result(**words, passed=False)
    passed = between.lower - unseen >= required - ROUNDING
    undecided = not passed and between.upper >= required - ROUNDING
    may_tell = undecided and math.isfinite(between.lower)
    needed = records_to_decide(between, required + unseen, compared.confidence) if may_tell else None
    text = f"{_how(compared, between.gain, abs(required))}; {demand}. {_sure(compared, between, required)}."
    if undecided:
        text += f" {_not_enough(compared, needed)}"
    return compared.result(**words, passed=passed, undecided=undecided, records_needed=needed, text=text)


def _how(compared: Compared, gain: float, *beside: float) -> str:
    metric, ours, theirs = compared.metric, compared.ours, compared.theirs
    assert ours is not None
    assert theirs is not None
    if abs(gain) < ROUNDING:
        how = f"the same as {compared.called}'s"
    else:
        amount = compared.amounts.amount_text(gain, *beside)
        how = f"{'better' if gain > 0 else 'worse'} than {compared.called}'s {metric.text(theirs, ours)} by {amount}"
    return f"The candidate's {metric.label} of {metric.with_unit(ours, theirs)} is {how}"


def _sure(compared: Compared, between: Bounds, *beside: float) -> str:
    independent = "of them" if between.groups == between.records else f"in {between.groups} groups"
    lies = compared.amounts.range_text(between.lower, between.upper, *beside, confidence=compared.confidence)
    one = "Passage by passage" if compared.metric.probe else "Record by record"
    return f"{one} ({between.records} {independent}), the gain lies {lies}"


def _not_enough(compared: Compared, needed: int | None) -> str:
    evaluation = compared.evaluation
    if compared.metric.probe:
        what, field = TEXTS[compared.metric.probe]
        # The key's upper bound: as many texts as come with Fineloop.
        most = next(str(rule.le) for rule in EvaluateConfig.model_fields[field].metadata if isinstance(rule, Le))
        used = f"evaluate.{field} gave {len(compared.evidence.texts[compared.metric.probe].tokens)} of {most}"
    else:
        there = "" if evaluation.held_out is None else f", and the dataset holds out {evaluation.held_out}"
        what, used = "held-out records", f"evaluate.records gave {evaluation.records}{there}"
    if compared.bounds is not None and not math.isfinite(compared.bounds.lower):
        return f"That does not tell: the two differ on too few of the {what} ({used})."
    if needed is None:
        return f"That is too near the line to tell, with any number of {what} ({used})."
    return f"That does not tell: about {needed} {what} would ({used})."


def not_worse_than_champion(
    policy: GateConfig, champion: Measured | None, compared: Compared, lead: Lead | None = None
) -> RuleResult:
    """Check that the candidate is sure to be worse than the champion by no more than the policy allows.

    The part of the champion's `lead` that is taken for luck does not count against the candidate; the expected cost of
    losses that are rarer than those drawn does.
    """
    tolerance, called = policy.worse_than_champion_by, compared.called
    words: dict[str, Any] = {"name": "not_worse_than_champion", "field": "gate.worse_than_champion_by"}
    if champion is None:
        return compared.result(
            **words,
            title=f"No version in {called} to be worse than",
            bound=tolerance,
            bound_text=at_most(compared, tolerance),
            passed=True,
            text=f"The alias {called} points to no version yet, so there is none that the candidate could be worse "
            "than.",
        )
    luck, unseen, pairs, between, theirs = 0.0, 0.0, compared.pairs, compared.bounds, compared.theirs
    if between is not None and pairs is not None and theirs is not None:
        if lead and theirs:
            unit = abs(theirs) if compared.relative else 1.0
            luck = luck_of(lead, between.error * unit) / unit
        if policy.much_worse_share != 1 and compared.allows_for_rare:
            few = few_unseen(pairs, between, policy.rare_loss(theirs), compared.confidence)
            unseen = max(much_worse_unseen(pairs), few)
    result = not_worse(
        compared,
        tolerance,
        luck=luck,
        unseen=unseen,
        **words,
        title=f"{compared.metric.title} not worse than {called}'s",
        line_words=f", not to fall behind {called}",
    )
    text = result.text
    if luck and lead is not None:
        text += (
            f" {called.capitalize()} was chosen on these records: beside the {lead.decisions} candidates that they "
            f"judged, {compared.margin_text(luck)} of its lead is luck, which is not asked of this one."
        )
    if result.undecided and between is not None and between.lower >= -tolerance - luck - ROUNDING:
        text += (
            f" Large losses are rare: beyond those drawn they are expected to cost {compared.margin_text(unseen)}, and "
            "the bound holds only without that."
        )
    return result.model_copy(update={"luck": luck or None, "unseen": unseen or None, "text": text})


# What a mean over a few hundred records cannot show: a small share of records that gets much worse. If one record in a
# hundred loses two nats a token, a draw of 240 contains none of them in one case of eleven, and no bound of the mean
# shows the loss. So there have to be enough records to show such a share, by the exact binomial distribution of their
# effective number: the longer an answer, the likelier it is to go wrong, and the more it weighs. A share that was drawn
# counts in the mean's own bounds; a separate limit can be set for it.


def few_get_much_worse(policy: GateConfig, compared: Compared) -> RuleResult | None:
    """Check that a share of records, or groups, that gets much worse than with the champion would be seen, and is
    within `gate.much_worse_share` if that is set, which limits losses alone. None if the policy asks for neither."""
    is_other = metric_of(policy.metric).column != compared.metric.column
    if is_other or policy.much_worse_share == 1 or not compared.allows_for_rare:
        return None
    words: dict[str, Any] = {
        "name": "much_worse",
        "field": "gate.much_worse_share",
        "title": "Few records get much worse",
        "metric": compared.metric.key,
        "against": compared.against,
        "confidence": compared.confidence,
    }
    pairs, theirs, confidence = compared.pairs, compared.theirs, compared.confidence
    if pairs is None or theirs is None or not np.isfinite([pairs.ours, pairs.theirs]).all():
        return RuleResult(**words, passed=False, text=unmeasured(compared))
    share, is_limit = policy.rare_share(theirs), policy.much_worse_share is not None
    independent, kind = pairs.num_independent, "record" if pairs.groups is None else "group"
    beyond = pairs.ours - pairs.theirs - MUCH_WORSE * pairs.weights
    of_each = beyond if pairs.groups is None else np.bincount(pairs.groups, weights=beyond)
    seen = int((of_each > 0).sum()) if is_limit else 0
    of = independent if is_limit else int(pairs.num_effective + ROUNDING)
    most, least = binomial.upper(seen, of, confidence), binomial.lower(seen, of, confidence)
    passed, failed = most <= share, least > share
    per_cent, sure = 100 * share, f"{confidence * 100:.6g} %"
    size = counted(independent, kind) + ("" if of == independent else f", which weigh as {of:,} of one length")
    if is_limit:
        text = (
            f"{seen} of {size} lose more than {MUCH_WORSE:.10g} nats per answer token against "
            f"{compared.called}'s. At least {100 * least:.3g} % and at most {100 * most:.3g} % of all {kind}s do, each "
            f"with {sure} confidence; {per_cent:.3g} % may."
        )
    elif passed:
        text = f"If {per_cent:.3g} % of all {kind}s got much worse, {size} would show some, with {sure} confidence."
    else:
        text = (
            f"Even if up to {100 * most:.3g} % of all {kind}s got much worse, {size} may show none, at {sure} "
            f"confidence; {per_cent:.3g} % may."
        )
    needed = None
    if not (passed or failed or seen):
        needed = math.ceil(binomial.least_without(share, confidence) * independent / of)
        text += f" {needed} {kind}s would tell (evaluate.records gave {compared.evaluation.records})."
    return RuleResult(
        **words,
        bound=share,
        bound_text=f"at most {per_cent:.3g} % of {kind}s{'' if is_limit else ' unseen'}",
        passed=passed,
        undecided=not (passed or failed),
        records_needed=needed,
        text=text,
    )
