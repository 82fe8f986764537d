"""A sweep that keeps the contract of `python -m ray_jobs.sweep` and trains nothing: it always finds the same."""

from components.records import runs
from components.records.sweep import RateLoss, SweepResult, Tuned
from components.shared.protocol import say
from components.store import folders
from tests.doubles.stub_jobs import asked


def sweep(config, store, options) -> None:  # type: ignore[no-untyped-def]
    """Three rates of the config's method, the best ten times the one in force."""
    say("tune", "| method rank batch rate seed loss steps outcome")
    say("tune", "| qlora 16 16 0.002 0 1.5000 4/4 finished in 3 s")
    prior = config.learning_rate
    rates = [
        RateLoss(learning_rate=rate, loss=loss, statuses=["finished"])
        for rate, loss in ((prior, 2.0), (10 * prior, 1.5), (100 * prior, 1.8))
    ]
    best = Tuned(
        method=config.method.name,
        rank=config.method.r,
        batch_size=config.train.batch_size,
        prior=prior,
        learning_rate=10 * prior,
        loss=1.5,
        below=rates[0],
        above=rates[2],
        is_inside=True,
        gain_over_prior=0.5,
        rates=rates,
    )
    manifest = folders.read_manifest(store, store.key(options.dataset).rstrip("/"))
    result = SweepResult(
        run_id=options.run_id,
        adapter=config.adapter.name,
        base={},
        dataset={"dataset_id": manifest.about["dataset_id"]},
        config_sha256=config.digest,
        environment={},
        records=10,
        start_loss=2.0,
        best=best,
        tuned=[best],
        verdict="a verdict",
        advised_method=config.method.name,
        trials=[],
    )
    runs.write(store, options.run_id, result)


if __name__ == "__main__":
    sweep(*asked())
