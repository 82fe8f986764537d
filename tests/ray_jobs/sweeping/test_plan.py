"""Which rates a sweep tries, from made-up losses, what it says of them, and its intervals against scipy's own."""

import math

import numpy as np
import pytest
from scipy import stats

from components.records import runs
from components.records.steps import TextLosses
from components.records.sweep import Trial, Tuned
from components.shared.errors import ConfigError, JobError
from ray_jobs import sweep
from ray_jobs.sweeping import verdict
from ray_jobs.sweeping.plan import Grid, Plan, at_rate, point_of, servable_as, swept_methods, trial_config
from ray_jobs.sweeping.trial import Ledger
from ray_jobs.sweeping.verdict import forgotten_by, interval
from tests.models.spec import changed

TOKENS = [2, 3, 1, 4]


def ended(point, config, loss):
    """The trial of a point, which has diverged where there is no end to the loss; each of its records has the loss."""
    trained, finished = trial_config(config, point, 160), math.isfinite(loss)
    return Trial(
        name=point.name, config_digest=trained.digest, method=point.method, learning_rate=point.learning_rate,
        rank=trained.method.r, batch_size=trained.train.batch_size, seed=point.seed,
        compares=point.compares, status="finished" if finished else "diverged", loss=loss if finished else None,
        record_nll=[tokens * loss for tokens in TOKENS] if finished else [], record_tokens=TOKENS if finished else [],
        step_s=1.0,
    )  # fmt: skip


def swept(config, loss_of, ended_before=()):
    """Run a plan to its end; gives it and the names of the points in the order in which they were begun."""
    plan, begun = Plan(config, swept_methods(config), ended_before), []
    while (point := plan.next()) != "done":
        assert point != "wait"  # one at a time: there is always something to do
        begun.append(point.name)
        plan.add(ended(point, config, loss_of(point)))
    return plan, begun


def bowl(center):
    """Losses with their least at a rate, and divergence a decade and a half above it."""

    def loss_of(point):
        decades = math.log10(point.learning_rate / center)
        return math.inf if decades > 1.4 else 1 + decades**2

    return loss_of


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ({}, [-4, -2, 0, 2, 4]),  # half decades around the prior
        ({-4: 5, -2: 4, 0: 3}, [2, 4]),  # what is missing of them
        ({-4: 5, -2: 4, 0: 3, 2: 2, 4: 4}, [1, 3]),  # the peak is inside: quarter decades beside it
        ({-4: 5, -2: 4, 0: 3, 2: 2, 4: 1}, [6]),  # at the upper end: wider
        ({-4: 1, -2: 2, 0: 3, 2: 4, 4: math.inf}, [-6]),  # at the lower end
        ({-4: 5, -2: 4, 0: 3, 2: 2, 4: 1, 6: 1, 8: 1, 10: 1, 12: 0.5}, [11]),  # no wider than two decades beyond
        ({-4: 5, -2: 4, 0: 3, 1: 1, 2: 2, 3: 4, 4: 4}, []),  # refined once
        ({place: math.inf for place in (-4, -2, 0, 2, 4)}, [-6]),  # everything diverged: lower
    ],
)
def test_the_grid_widens_at_its_ends_and_narrows_at_its_peak(losses, wanted):
    assert Grid(1e-5).wanted(losses) == wanted


def test_a_peak_beyond_the_first_grid_is_found_and_told_with_its_neighbours(config):
    start = changed(config, "train.learning_rate=1e-4")
    plan, begun = swept(start, bowl(6e-3))
    found = plan.tuned(*swept_methods(start))
    assert (found.learning_rate, found.below.learning_rate, found.above.learning_rate) == (5.62e-3, 3.16e-3, 1e-2)
    assert found.is_inside
    assert found.gain_over_prior == pytest.approx(math.log10(60) ** 2 - math.log10(6 / 5.62) ** 2, abs=1e-3)
    assert len(begun) == len(set(begun)) == 9


def test_a_plan_made_from_the_trials_that_have_ended_begins_none_of_them_again(config):
    whole, begun = swept(config, bowl(1e-2))
    for cut in (1, 4, len(begun)):
        before = [whole.trials[name] for name in begun[:cut]]
        resumed, rest = swept(config, bowl(1e-2), before)
        assert rest == begun[cut:]
        assert resumed.tuned(*swept_methods(config)) == whole.tuned(*swept_methods(config))
    failed = whole.trials[begun[0]].model_copy(update={"status": "failed", "loss": None})
    assert begun[0] in swept(config, bowl(1e-2), [failed])[1]


def test_of_one_validation_record_a_rate_is_found_without_an_interval(config):
    plan, _ = swept(config, bowl(1e-2))
    alone = [
        trial.model_copy(update={"record_nll": trial.record_nll[:1], "record_tokens": trial.record_tokens[:1]})
        for trial in plan.trials.values()
    ]
    found = swept(config, bowl(1e-2), alone)[0].tuned(*swept_methods(config))
    assert found.learning_rate == 1e-2
    assert {rate.ci95 for rate in found.rates} == {None}
    assert Tuned.model_validate_json(found.model_dump_json()) == found


def test_several_seeds_count_by_their_mean_and_one_that_diverges_rules_the_rate_out(config):
    many = changed(config, "tune.seeds=2", "tune.learning_rates=[1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]")

    def loss_of(point):
        if point.learning_rate == 1e-2 and point.seed == 1:
            return math.inf
        return bowl(9e-3)(point) + (0.5 if point.seed else 0.0)

    plan, begun = swept(many, loss_of)
    found = plan.tuned(*swept_methods(many))
    assert len(begun) == 10  # none but those that the config names
    assert found.learning_rate == 3.16e-3
    assert found.loss == pytest.approx(bowl(9e-3)(_at(many, 3.16e-3)) + 0.25)
    assert next(rate for rate in found.rates if rate.learning_rate == 1e-2).statuses == ["finished", "diverged"]


def _at(config, rate):
    return point_of(config, *swept_methods(config), rate, 0)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("failed", "2 of 2 failed; the first, .*-0.003-.*: torn"),
        ("diverged", "all 2 .* diverged, at rates down to 0.003"),
    ],
)
def test_a_sweep_in_which_no_trial_ends_well_fails_with_the_cause(config, status, told):
    two = changed(config, "tune.learning_rates=[3e-3, 1e-2]")
    plan, _ = swept(two, lambda _: math.inf)
    for name, trial in plan.trials.items():
        plan.trials[name] = trial.model_copy(update={"status": status, "why": "torn"})
    with pytest.raises(JobError, match=told):
        sweep._result(two, plan, {"lora": None}, "s1", None, None, 4, 1.0)


def test_methods_are_compared_at_their_own_rates_on_seeds_that_the_search_has_not_seen(config):
    both = changed(config, 'tune.methods=["vera", "lora"]', "method.rank=8")
    best = {"lora": 1e-2, "vera": 0.316}

    def loss_of(point):
        return bowl(best[point.method])(point) - (0.1 if point.method == "vera" else 0.0) + 0.01 * point.seed

    plan, _ = swept(both, loss_of)
    lora, vera = (plan.tuned(method) for method in ("lora", "vera"))
    assert (lora.rank, vera.rank) == (8, 256)
    assert (lora.learning_rate, vera.learning_rate) == (1e-2, 0.316)
    assert [trial.seed for trial in plan.seeds_of("vera")] == [1, 2, 3]
    found = verdict.compare(vera, plan.seeds_of("vera"), lora, plan.seeds_of("lora"))
    assert found.gain == pytest.approx(0.1)
    assert [servable_as(both, method) for method in swept_methods(both)] == ["lora-export", "lora"]
    unsure = found.model_copy(update={"ci95": (0.005, 0.2)})
    assert verdict.advised([found], "lora") == "vera"
    assert verdict.advised([unsure], "lora") == "lora"
    assert verdict.verdict(lora, [lora, vera], [unsure], "lora").startswith("Keep lora")
    assert verdict.verdict(vera, [lora, vera], [found], "lora").startswith(
        "Take vera: its gain over lora is at least 0.1"
    )


def read(base_format, seeds_NLL, base=(20.0, 60.0)):
    """The trials of a method's seeds, each with what it makes of two passages of 10 and 30 tokens."""
    known = {"config_digest": "", "method": "m", "learning_rate": 0.1, "rank": 1, "batch_size": 1, "status": "finished"}
    nll = {"base": list(base)} if base else {}
    return [
        Trial(
            name=f"{base_format}-{seed}", seed=seed, **known,
            general_text=TextLosses(
                text_sha256="0", base_format=base_format, tokens=[10, 30], nll={**nll, "candidate": list(candidate)}
            ),
        )
        for seed, candidate in enumerate(seeds_NLL)
    ]  # fmt: skip


def test_what_a_method_forgets_is_the_rise_of_its_seeds_losses_on_general_text_above_the_base():
    trials = read("bf16", [(25.0, 75.0), (27.0, 81.0), (29.0, 87.0)])
    found = forgotten_by(trials, trials)
    assert (found.base_loss, found.losses, found.passages) == (2.0, pytest.approx([2.5, 2.7, 2.9]), 2)
    assert found.rise == pytest.approx(0.7)
    # Both passages rise alike by token, so that all of the interval is the seeds': a t-test of their three rises.
    reference = stats.ttest_1samp([0.5, 0.7, 0.9], 0).confidence_interval(0.95)
    assert found.ci95 == pytest.approx((reference.low, reference.high))


def test_a_base_of_the_method_s_own_is_no_model_to_forget_of():
    """The original in the same format is, where the sweep has read as that."""
    loftq = read("nf4", [(30.0, 90.0), (31.0, 92.0)], base=None)
    lora, qlora = read("bf16", [(25.0, 75.0)]), read("nf4", [(26.0, 80.0)], base=(22.0, 66.0))
    alike, other = forgotten_by(loftq, [*lora, *loftq, *qlora]), forgotten_by(loftq, [*lora, *loftq])
    assert (alike.base_format, alike.base_loss) == ("nf4", 2.2)
    assert (other.base_format, other.base_loss) == ("bf16", 2.0)
    assert forgotten_by(loftq, loftq) is None
    assert forgotten_by([], lora) is None


def test_the_time_left_is_that_of_the_trainings_to_come_at_the_pace_so_far(config):
    three = changed(config, "tune.learning_rates=[1e-3, 3e-3, 1e-2]")
    clock = iter([100.0, 220.0])
    plan = Plan(three, swept_methods(three))
    progress = Ledger(plan, print, print, clock=lambda: next(clock))
    first, second = (ended(_at(three, rate), three, 1.5) for rate in (1e-3, 3e-3))
    half = {"status": "running", "steps": 4, "num_steps": 8, "seconds": 70.0, "ready_s": 40.0}
    # Half a training in the 30 s after its start-up.
    assert progress.line(first.model_copy(update=half)) == (
        "0/3 trials, about 2 min left; lora 0.001 step 4/8: loss 1.5000"
    )
    plan.add(first)
    # One and a half in 150 s, and as much is to come.
    assert progress.line(second.model_copy(update=half)).startswith("1/3 trials, about 2 min left; lora 0.003 ")


def test_a_rate_that_is_no_legal_config_is_refused_by_its_method(config):
    with pytest.raises(ConfigError, match=r"^sweeping lora: train\.learning_rate = -1\.0"):
        at_rate(config, "lora", -1.0)


def test_a_trial_takes_the_steps_of_a_run_on_one_worker_that_holds_the_base(config):
    run = changed(config, "train.zero_stage=3", "tune.max_steps=20", "train.evals_per_epoch=1")
    trial = trial_config(run, _at(run, 3e-3), num_records=1600)
    assert (trial.ray.num_workers, trial.train.zero_stage, trial.train.checkpoint_every_steps) == (1, 2, 0)
    assert (trial.learning_rate, trial.train.max_steps, trial.train.evals_per_epoch) == (3e-3, 20, 20)


def test_a_sweep_goes_on_from_the_stored_trials_of_its_own_config_alone(config, store):
    methods = swept_methods(config)
    mine, older = (ended(_at(config, rate), config, 2.0) for rate in (1e-3, 3.16e-3))
    for trial in (mine, older.model_copy(update={"config_digest": "0" * 64})):
        runs.write(store, "sweep", trial)
    assert sweep._ended(config, methods, store, "sweep", 160) == [mine]
    assert sweep._ended(changed(config, "train.weight_decay=0.3"), methods, store, "sweep", 160) == []


def test_one_seed_with_a_token_each_is_the_students_interval_of_the_records():
    nll = np.random.default_rng(0).normal(1.0, 0.3, 40)
    mean, low, high = interval([nll], np.ones(40))
    expected = stats.ttest_1samp(nll, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([mean, low, high], [nll.mean(), *expected], rtol=1e-9)


def test_the_interval_of_a_gain_holds_it_as_often_as_it_says():
    rng, true, held = np.random.default_rng(1), 0.05, 0
    tokens = rng.integers(1, 6, 60)
    for _ in range(400):
        records, seeds, rest = rng.normal(0, 0.2, 60), rng.normal(0, 0.03, (3, 1)), rng.normal(0, 0.2, (3, 60))
        gain, low, high = interval((true + records + seeds + rest) * tokens, tokens)
        assert low <= gain <= high
        held += low <= true <= high
    assert held / 400 > 0.93  # and 0.95 less two standard errors of 400 draws is 0.928
