"""All eight methods on the real model and the example's data: trained by two ranks, published, pulled, loaded, merged.

Each trains in another way of sharing the work out, so that the main cells of the matrix meet real weights.
"""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from components.config import config_file
from components.config.methods import METHODS, BaseFormat
from components.config.schema import RunConfig
from components.prepare.rows import example_rows
from components.registry.versions import pull_version, resolve
from components.store import folders
from components.store.store import Store
from ray_jobs.adapters import build, dora, dvora, merge
from ray_jobs.base import base_model
from ray_jobs.text import chat_format
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import TokenizedSplit, collate, tokenize
from ray_jobs.training import checkpoint
from tests.doubles.datasets import validate
from tests.e2e.conftest import CHECKOUT, Home
from tests.models.train_group import fit_in_rank, in_group

pytestmark = [pytest.mark.e2e, pytest.mark.full]

STEPS, BATCH = 3, 8
RECORDS = 6  # held out, of some forty tokens each
NUM_ROWS = 8 * RECORDS  # of which `fit_in_rank` holds an eighth out
NOISE = 0.02  # what bfloat16 arithmetic in another order may change a loss by
ROUNDED = 0.05  # and where the trainer rounds an adapter's vectors to bfloat16 in its arithmetic, and peft does not
# A few steps need a high rate; VeRA's vectors a higher one.
RATES = {"lora": 3e-3, "dora": 3e-3, "vera": 1e-1, "dvora": 5e-2}
CELLS = {
    "lora": ["train.zero_stage=3"],
    "qlora": ["train.zero_stage=3", "train.cpu_offload=true"],
    "rslora": ["train.zero_stage=1"],
    "dora": ["train.zero_stage=2", "train.cpu_offload=true"],
    "qdora": ["train.zero_stage=2", "train.gradient_checkpointing=true"],
    "vera": ["train.zero_stage=0"],
    "dvora": ["train.zero_stage=1", "method.base=nf4"],
    "loftq": ["train.zero_stage=2"],
}
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


@dataclass(frozen=True)
class Trained:
    """A trained and published method."""

    config: RunConfig
    losses: list[float]
    eval_loss: float
    weights: dict[str, Any]
    """The adapter's weights in the trainer's memory."""
    stands_on: str


def train_and_publish(config_toml: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What each rank does."""
    from ray_jobs.training import publishing

    started_at = datetime.now(UTC)
    config = config_file.loads(config_toml)
    done = fit_in_rank(config, rows, run_id=config.method.name)
    if done.worker.rank == 0:
        publishing.publish(done.spec, done.store, done.fitted, done.worker, started_at=started_at)
    return {
        "losses": [record["loss"] for record in done.records if record["kind"] == "train"],
        "eval_loss": done.trained.eval_loss,
        "weights": {name: weight.float().numpy() for name, weight in done.trained.weights.items()},
        "stands_on": done.recipe["stands_on"],
    }


@pytest.fixture(scope="module", autouse=True)
def _cache(home: Home) -> Iterator[None]:
    """The converted base of the other tests on the real model."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FINELOOP_CACHE", str(home.path / "cache"))
        yield


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The same records for every method."""
    return random.Random(0).sample(list(example_rows()), NUM_ROWS)


class Trainings(dict[str, Trained]):
    """Every method by its name, trained when it is first asked for."""

    def __init__(self, rows: list[dict[str, Any]], bucket: str, new_folder: Callable[[str], Path]) -> None:
        self._rows, self._bucket, self._new_folder = rows, bucket, new_folder

    def config(self, name: str) -> RunConfig:
        """What it is trained with."""
        settings = [f"method.name={name}", f"adapter.name={name}", f"train.max_steps={STEPS}"]
        settings += [f"train.batch_size={BATCH}", f"train.micro_batch_size={BATCH // 2}", "train.evals_per_epoch=0"]
        settings += [f"train.learning_rate={RATES[METHODS[name].adapter]}", *CELLS[name]]
        settings += [f"registry.bucket={self._bucket}", "registry.prefix=tests/methods"]
        return config_file.load(CHECKOUT / "pipelines" / "configs" / "icd10.toml", settings)

    def __missing__(self, name: str) -> Trained:
        config, directory = self.config(name), self._new_folder(name)
        arguments = (config_file.dumps(config), self._rows)
        found = Trained(config, **in_group(train_and_publish, *arguments, directory=directory, num_workers=2)[0])
        self[name] = found
        return found


@pytest.fixture(scope="module")
def trained(rows: Any, s3_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(rows, s3_server.bucket, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def held_out(trained: Trainings, rows: Any) -> TokenizedSplit:
    """As `fit_in_rank` holds records out."""
    config = trained.config("qlora")
    chat = chat_format.load(base_model.resolve(config.model), config.model)
    return tokenize([validate(row).record for row in rows[NUM_ROWS * 7 // 8 :]], chat, config.model.max_length)


@torch.no_grad()
def loss_on(split: TokenizedSplit, model: Any) -> float:
    """Mean nats per answer token. In evaluation mode bitsandbytes would repack the weights, and no dropout is set."""
    batch = collate(split, list(range(len(split))), 0)
    return answer_nll(model.train(), batch["input_ids"], batch["labels"]).mean().item()


@pytest.fixture(scope="module")
def untrained(trained: Trainings, held_out: TokenizedSplit) -> dict[str, float]:
    """Held-out loss of the base alone, in each format."""
    model = trained.config("qlora").model
    base = base_model.resolve(model)
    formats: tuple[BaseFormat, ...] = ("bf16", "nf4")
    return {each: loss_on(held_out, base_model.load_model(base, model, each, use_gpu=False)) for each in formats}


def plain_base(one: Trained, folder: Path) -> Any:
    """As the model card says: transformers alone, on the original or on what LoftQ published."""
    store, method = Store.open(one.config.registry), one.config.method.row
    if method.init == "loftq":
        folders.pull(store, store.key(one.stands_on), folder / "base")
        return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    path = base_model.resolve(one.config.model).path
    settings: dict[str, Any] = {"quantization_config": NF4} if method.base == "nf4" else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **settings)


def in_float32(one: Trained, base: Any) -> Any:
    """The same weights dense and in float32, where only the order of additions is left to differ."""
    dense = AutoModelForCausalLM.from_pretrained(base_model.resolve(one.config.model).path, dtype=torch.float32)
    merge.dequantise_into(dense, base)
    return dense


@pytest.mark.parametrize("name", METHODS)
def test_a_method_lowers_the_held_out_loss(name, trained, untrained):
    one = trained[name]
    assert len(one.losses) == STEPS
    assert one.eval_loss < 0.8 * untrained[one.config.method.row.base]


def test_loftq_starts_with_a_lower_loss_than_qlora(trained):
    assert trained["loftq"].losses[0] < trained["qlora"].losses[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_pulled_version_is_to_plain_peft_what_was_trained_and_merged_it_says_the_same(
    name, trained, held_out, tmp_path
):
    one = trained[name]
    store = Store.open(one.config.registry)
    pull_version(store, resolve(store, name), tmp_path / "adapter")
    assert dvora.PEFT_TYPE == "DVORA"  # which needs its module imported; nothing else of Fineloop's loads below
    base = plain_base(one, tmp_path)
    dense = in_float32(one, base)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    is_rounded = one.config.method.row.adapter in ("vera", "dvora")
    assert loss_on(held_out, adapted) == pytest.approx(one.eval_loss, rel=ROUNDED if is_rounded else NOISE)
    dvora.unify_dtype(adapted, base.dtype)  # as the trainer computes; leaves other adapters as they are
    assert loss_on(held_out, adapted) == pytest.approx(one.eval_loss, rel=NOISE)

    pulled = PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "adapter").eval()
    ends = held_out.offsets[1 : RECORDS + 1]
    tokens = [torch.from_numpy(held_out.tokens[i:j]).long() for i, j in zip(held_out.offsets, ends, strict=False)]
    alone, before = list(merge.logits(dense, tokens)), list(merge.logits(pulled, tokens))
    fresh = build.attach(dense, one.config.method, base_reference="", seed=one.config.train.seed)
    build.to_training(fresh, torch.float32)  # where magnitudes are their change
    checkpoint.copy_weights({name: torch.from_numpy(weight) for name, weight in one.weights.items()}, fresh)
    dora.settle(fresh)
    in_memory = merge.agreement(merge.logits(fresh.eval(), tokens), before)
    merged = merge.agreement(before, merge.logits(merge.merge(pulled), tokens))
    for found in (in_memory, merged):
        assert found.positions > 150
        assert found.argmax_agreement >= 0.999
        assert found.mean_kl_nats < merge.MAX_MEAN_KL_NATS
    assert merge.agreement(alone, before).mean_kl_nats > 1e4 * merge.MAX_MEAN_KL_NATS
