"""How much less memory an adapter needs than full fine-tuning: `python -m benchmarks.memory`.

As planned for Llama-2-7B, part by part, for every method. No GPU, no download.
"""

from benchmarks import example
from components.config.methods import METHODS
from components.config.schema import MethodConfig
from ray_jobs import entry
from ray_jobs.planning.memory import GIB, Layout, Parts, plan
from ray_jobs.planning.rehearsal import ModelStats, Rehearsal
from ray_jobs.training import zero
from tests.models.shapes import LLAMA_2_7B

ALONE = Layout(num_workers=1, zero_stage=0)
LENGTH = 512


def main() -> None:
    example.parser("memory", __doc__).parse_args()
    entry.quiet_libraries()
    zero.prepare_environment(use_gpu=False)

    print(f"Llama-2-7B, planned: one record of {LENGTH} tokens, gradient checkpointing, GiB")
    full = _planned(None)
    print(f"{'':<10}{'trained':>14}{'share':>9}{''.join(f'{part:>12}' for part in full[1].as_json())}{'less':>8}")
    print(_row("full", *full, full[1].total))
    for name in METHODS:
        print(_row(name, *_planned(MethodConfig(name=name)), full[1].total))


def _planned(method: MethodConfig | None) -> tuple[ModelStats, Parts]:
    rehearsal = Rehearsal(LLAMA_2_7B, method, reference="llama-2-7b")
    step = rehearsal.step(1, LENGTH, checkpointing=True)
    base = method.row.base if method else "bf16"
    parts = plan(rehearsal.stats, step, base=base, answers=LENGTH, layout=ALONE, trains_base=method is None)
    return rehearsal.stats, parts


def _row(name: str, stats: ModelStats, parts: Parts, full: int) -> str:
    parameters = stats.parameters + stats.trainable + stats.frozen_adapter
    share = "" if name == "full" else f"{stats.trainable / parameters:.3%}"
    sizes = "".join(f"{size / GIB:>12.2f}" for size in parts.as_json().values())
    return f"{name:<10}{stats.trainable:>14,}{share:>9}{sizes}{full / parts.total:>7.1f}x"


if __name__ == "__main__":
    main()
