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
    prior, method = config.learning_rate, config.method
    losses = {prior: 2.0, 10 * prior: 1.5, 100 * prior: 1.8}
    rates = [RateLoss(learning_rate=rate, loss=loss, statuses=["finished"]) for rate, loss in losses.items()]
    tuned = {"method": method.name, "rank": method.r, "batch_size": config.train.batch_size, "prior": prior}
    around = {"below": rates[0], "above": rates[2], "is_inside": True, "gain_over_prior": 0.5}
    best = Tuned(**tuned, **around, learning_rate=10 * prior, loss=1.5, rates=rates)
    manifest = folders.read_manifest(store, store.key(options.dataset).rstrip("/"))
    dataset = {"dataset_id": manifest.about["dataset_id"]}
    about = {"run_id": options.run_id, "adapter": config.adapter.name, "config_sha256": config.digest}
    found = {"best": best, "tuned": [best], "verdict": "a verdict", "advised_method": method.name, "trials": []}
    result = SweepResult(**about, **found, base={}, dataset=dataset, environment={}, records=10, start_loss=2.0)
    runs.write(store, options.run_id, result)


if __name__ == "__main__":
    sweep(*asked())
