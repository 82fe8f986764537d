import json
from dataclasses import replace

import pytest

from components.config import config_file
from components.config.ray import GPUS
from components.config.schema import RunConfig
from components.shared.errors import ConfigError
from ray_jobs import plan
from ray_jobs.planning import capacity
from ray_jobs.planning.capacity import (
    WorstBatch,
    advised,
    before_training,
    chosen,
    cluster_device,
    cpu_device,
    gpu_device,
    require_fit,
)
from ray_jobs.planning.memory import GIB, MARGIN
from ray_jobs.planning.rehearsal import Rehearsal
from ray_jobs.text.batching import TokenizedSplit
from tests.models import zoo
from tests.models.shapes import LLAMA_2_7B, LLAMA_2_70B, small
from tests.models.spec import changed
from tests.models.splits import split_of


def configured(base="llama-2-7b", *overrides: str) -> RunConfig:
    tables = {"adapter": {"name": "sums"}, "model": {"base": str(base)}, "data": {"source": "unused.jsonl"}}
    settings = ["model.max_length=512", "method.name=lora", "train.batch_size=16", "ray.use_gpu=true", "ray.gpu=A10G"]
    return config_file.validate(tables, [*settings, *overrides])


@pytest.fixture(scope="module")
def lora_7b() -> Rehearsal:
    return Rehearsal(LLAMA_2_7B, configured().method, reference="llama-2-7b")


def test_the_plan_says_what_the_command_line_promises(tmp_path):
    config = configured(tmp_path, "data.max_records=1000", "ray.num_workers=2", "train.epochs=3")
    body = json.loads(json.dumps(plan.planned(config, small(), gpu_device("A10G"))))
    assert {
        "method", "trainable_parameters", "trainable_share", "memory_bytes", "zero_stage", "micro_batch_size",
        "tokens_per_s", "time_s", "cost", "fits", "advice", "full_fine_tuning", "device",
    } <= body.keys()  # fmt: skip
    assert body["memory_bytes"].keys() == {
        "weights", "adapter", "gradients", "optimizer", "activations", "logits", "overhead", "total",
    }  # fmt: skip
    assert body["fits"] is True
    assert body["dtype"] == "bfloat16"
    steps = 3 * -(-900 // 16)
    assert body["most_tokens"] == steps * 16 * 512
    assert body["time_s"] == pytest.approx(body["most_tokens"] / body["tokens_per_s"])
    assert body["cost"] == pytest.approx(body["time_s"] / 3600 * 2 * GPUS["A10G"].price_per_hour)


def test_a_training_fits_a_gpu_when_a_margin_is_left_and_a_cpu_when_the_plan_does():
    gpu, cpu = gpu_device("A10G"), cpu_device("this machine", 12 * GIB, 2)
    assert gpu.holds(int(22.5 * GIB / (1 + MARGIN)))
    assert gpu.holds(int(22.5 * GIB / (1 + MARGIN)) + 10) is False
    assert cpu.holds(6 * GIB)
    assert cpu.holds(6 * GIB + 1) is False
    assert gpu_device(None).holds(1) is None


@pytest.mark.full
def test_the_plan_says_whether_its_evaluation_fits_and_with_how_many_records():
    config = configured("llama-2-7b", "method.name=qlora", "ray.gpu='T4'", "model.max_length=1024")
    body = plan.planned(config, LLAMA_2_7B, gpu_device("T4"))
    assert body["evaluation"]["fits"] is False  # 21 GB of keys and values, of a training that takes a fourth of that
    fitting = body["evaluation"]["fitting_batch_size"]
    assert 1 <= fitting < 32
    again = configured("llama-2-7b", "method.name=qlora", "model.max_length=1024", f"evaluate.batch_size={fitting}")
    assert plan.planned(again, LLAMA_2_7B, gpu_device("T4"))["evaluation"]["fits"]


@pytest.mark.full
def test_a_worker_that_offloads_more_than_its_pod_has_is_reported():
    rayjob = ["ray.cluster.kind=rayjob", "ray.cluster.image=a/b:1", "ray.cluster.worker.memory_gib=24"]
    offloaded = ["train.zero_stage=3", "train.cpu_offload=true", "ray.num_workers=2", *rayjob]
    body = plan.planned(configured("llama-2-70b", *offloaded), LLAMA_2_70B, gpu_device("A10G"))
    assert body["pod_memory_bytes"] == 24 * GIB
    assert body["host_memory_bytes"] > 60 * GIB  # half of 138 GB in 16 bits


def test_your_own_price_wins_and_without_a_number_of_records_it_is_for_a_million_tokens(tmp_path):
    config = configured(tmp_path, "ray.gpu_price_per_hour=0.25")
    body = plan.planned(changed(config, "train.max_steps=10"), small(1), gpu_device("A10G"))
    assert body["cost"] == pytest.approx(body["time_s"] / 3600 * 0.25)
    assert body["price_source"] == "ray.gpu_price_per_hour"
    body = plan.planned(config, small(1), gpu_device("A10G"))
    assert (body["time_s"], body["cost"], body["most_tokens"]) == (None, None, None)
    assert body["s_per_million_tokens"] == pytest.approx(1e6 / body["tokens_per_s"])


@pytest.mark.full
def test_every_method_of_the_table_is_compared_at_its_own_rank(tmp_path):
    rows = {row["method"]: row for row in plan.compared(configured(tmp_path, "train.learning_rate=0.5"), small())}
    assert len(rows) == 8
    assert rows["vera"]["rank"] == 256
    assert rows["dvora"]["trainable_parameters"] > rows["vera"]["trainable_parameters"]
    assert rows["qlora"]["memory_bytes"]["weights"] < rows["lora"]["memory_bytes"]["weights"]
    assert rows["vera"]["learning_rate"] == pytest.approx(30 * rows["lora"]["learning_rate"])
    for name in ("loftq", "qdora"):  # which share the rehearsals of LoRA and DoRA
        config = configured(tmp_path, f"method.name={name}")
        own = chosen(config, Rehearsal.of(config, small()), WorstBatch.planned(config))
        assert rows[name]["memory_bytes"] == own.parts.as_json()


def test_of_a_base_with_experts_each_method_that_does_not_go_with_it_says_why(tmp_path):
    rows = {row["method"]: row for row in plan.compared(configured(tmp_path), zoo.KINDS["Mixtral"].config())}
    assert {name for name, row in rows.items() if "refused" not in row} == {"lora", "rslora"}
    assert "method.base=bf16" in rows["qlora"]["refused"]
    assert "method.adapter=lora" in rows["dora"]["refused"]


def test_no_format_or_stage_is_advised_that_would_be_refused():
    rehearsal = Rehearsal(zoo.KINDS["Mixtral"].config(), configured().method, reference="Mixtral")
    choices = list(capacity._legal_choices(configured(), rehearsal, WorstBatch(64, 8)))
    assert {choice.config.method.row.base for choice in choices} == {"bf16"}
    assert max(choice.config.train.zero_stage for choice in choices) == 2


def test_adapted_experts_are_not_sharded_and_others_are(tmp_path):
    base = zoo.KINDS["Mixtral"].config()
    with pytest.raises(ConfigError, match=r"train\.zero_stage 3 shards the experts of .* set train\.zero_stage=2, or"):
        plan.planned(configured(tmp_path, "train.zero_stage=3"), base, gpu_device("A10G"))
    others = configured(tmp_path, "train.zero_stage=3", "method.target_modules=['q_proj']")
    assert plan.planned(others, base, gpu_device("A10G"))["zero_stage"] == 3


def test_a_training_plans_for_its_longest_records_and_answers_as_long_as_evaluation_lets_them_be(tmp_path):
    assert WorstBatch.of(split([40, 90, 20], [3, 5, 10]), 2) == WorstBatch(90, 8)
    assert WorstBatch.planned(configured(tmp_path)) == WorstBatch(512, 512)
    assert WorstBatch.planned(configured(tmp_path, "evaluate.max_new_tokens=32")) == WorstBatch(512, 32)


def test_advice_is_the_lowest_stage_then_no_recomputation_then_the_largest_micro_batch(lora_7b):
    config = configured()
    batch = WorstBatch(512, 64)
    roomy = advised(config, lora_7b, batch, 200 * GIB)
    assert (roomy.settings()["train.zero_stage"], roomy.settings()["train.micro_batch_size"]) == (0, 16)
    assert roomy.settings()["train.gradient_checkpointing"] is False
    tight = advised(config, lora_7b, batch, int(22.5 * GIB))
    assert tight.parts.total <= 22.5 * GIB < roomy.parts.total
    assert 1 <= tight.settings()["train.micro_batch_size"] < 16
    assert chosen(tight.config, lora_7b, batch).parts == tight.parts
    small_one = advised(config, lora_7b, batch, 12 * GIB)
    assert small_one.settings()["method.base"] == "nf4"
    assert small_one.changes(chosen(config, lora_7b, batch))["method.base"] == "nf4"
    assert advised(config, lora_7b, batch, 2 * GIB) is None


def test_activations_are_advised_into_host_memory_where_long_records_do_not_fit_otherwise(lora_7b):
    config = configured("llama-2-7b", "train.batch_size=1", "train.micro_batch_size=1")
    batch = WorstBatch(16384, 64)
    kept = {"train.max_tokens": 0, "train.micro_batch_size": 1, "train.gradient_checkpointing": True}
    kept["train.zero_stage"] = 0
    here = advised(config, lora_7b, batch, 200 * GIB)
    assert not here.settings()["train.activation_offloading"]
    recomputed = changed(config, "train.gradient_checkpointing=true", "train.zero_stage=0")
    least = chosen(recomputed, lora_7b, batch).parts
    choice = advised(config, lora_7b, batch, least.total - GIB)
    assert choice.settings() == {**kept, "method.base": "bf16", "train.activation_offloading": True}
    # 31 of 32 layers' inputs, each 16,384 x 4,096 x 2 bytes, are in host memory instead; a tenth more was for what the
    # allocator keeps of them.
    moved = 31 * 16384 * 4096 * 2
    assert choice.parts.host - least.host == moved
    assert least.total - choice.parts.total == pytest.approx(1.1 * moved, rel=1e-6)
    on_nf4 = advised(changed(config, "ray.use_gpu=false"), lora_7b, batch, least.total - GIB)
    assert not on_nf4.settings()["train.activation_offloading"]


def test_a_training_that_cannot_fit_is_refused_with_its_parts_and_what_would(lora_7b):
    config = configured("llama-2-7b", "ray.gpu='T4'", "train.micro_batch_size=16")
    with pytest.raises(ConfigError, match=r"weights 1\d\.\d") as refused:
        require_fit(config, lora_7b, WorstBatch(512, 64), gpu_device("T4"))
    assert "has 15.0" in str(refused.value)
    assert "method.base=nf4 train.zero_stage=0 train.micro_batch_size=2 it needs 10." in str(refused.value)


@pytest.mark.full
def test_where_no_setting_helps_a_smaller_base_or_more_workers_are_named():
    config = configured("llama-2-70b")
    rehearsal = Rehearsal(LLAMA_2_70B, config.method, reference="llama-2-70b")
    with pytest.raises(ConfigError, match=r"smaller model\.base, more workers .* train\.zero_stage=3"):
        require_fit(config, rehearsal, WorstBatch(512, 64), gpu_device("T4"))


def test_what_an_estimate_alone_speaks_against_is_not_refused(lora_7b):
    config = configured("llama-2-7b", "train.micro_batch_size=1")
    batch = WorstBatch(128, 16)
    parts = chosen(config, lora_7b, batch).parts
    just_tensors = replace(gpu_device("A10G"), memory=parts.total - parts.overhead)
    assert require_fit(config, lora_7b, batch, just_tensors).parts == parts
    assert require_fit(config, lora_7b, batch, gpu_device(None)).parts == parts


def test_a_cpu_refuses_only_what_all_its_memory_cannot_hold(lora_7b):
    config = configured("llama-2-7b", "ray.use_gpu=false", "ray.num_workers=2")
    require_fit(config, lora_7b, WorstBatch(512, 64), cpu_device("this cluster", 16 * GIB, 2))
    with pytest.raises(ConfigError, match="does not fit on this cluster"):
        require_fit(config, lora_7b, WorstBatch(512, 64), cpu_device("this cluster", 10 * GIB, 2))


def node(**resources: float) -> dict[str, object]:
    return {"Alive": True, "Resources": resources}


def test_the_gpu_of_a_cluster_is_what_its_nodes_say_unless_the_config_names_one():
    unnamed = configured().model_copy(update={"ray": configured().ray.model_copy(update={"gpu": None})})
    names = ("T4", "L4", "A100", "B300")
    t4, l4, a100, b300 = (node(GPU=8, **{f"accelerator_type:{name}": 1}) for name in names)
    assert cluster_device(unnamed, [t4, l4]).name == "L4"
    assert cluster_device(unnamed, [a100]).memory == gpu_device("A100-80G").memory
    assert cluster_device(unnamed, [b300, t4]).memory is None
    assert cluster_device(unnamed, [node(CPU=4, memory=1e9)]).memory is None
    assert cluster_device(configured(), [t4]).name == "A10G"


def test_the_memory_of_cpu_workers_is_the_clusters_shared_out():
    config = configured("x", "ray.use_gpu=false", "ray.num_workers=2")
    lost = {"Alive": False, "Resources": {"memory": 5e9}}
    head = node(memory=9e9, object_store_memory=1e9)
    device = cluster_device(config, [head, node(CPU=2, memory=6e9, object_store_memory=2e9), lost])
    assert (device.memory, device.whole) == (4e9, 8e9)
    assert cluster_device(config, [node(CPU=2)]).memory is None


def split(lengths: list[int], answers: list[int]) -> TokenizedSplit:
    return split_of(*(([0] * (n - a), [0] * a) for n, a in zip(lengths, answers, strict=True)))


def test_a_rank_above_the_full_rank_of_a_layer_is_said(tmp_path):
    small(1).save_pretrained(tmp_path)
    records = split([40, 90, 20], [3, 5, 10])

    def lines(*changes: str) -> list[str]:
        return before_training(configured(tmp_path, "ray.use_gpu=false", *changes), tmp_path, records, []).lines

    (line,) = [each for each in lines("method.rank=1024") if each.startswith("method.rank")]
    assert line.startswith("method.rank 1024 is above the full rank of 7 layers, 64 and more")
    assert not [each for each in lines("method.rank=64") if each.startswith("method.rank")]


def test_micro_batches_by_tokens_are_planned_for_as_many_as_their_longest_records_fill(lora_7b):
    def parts(*changes: str, length: int = 512):
        return chosen(configured("llama-2-7b", *changes), lora_7b, WorstBatch(length, 64)).parts

    assert parts("train.max_tokens=2048") == parts("train.micro_batch_size=4")
    assert parts("train.max_tokens=1600") == parts("train.micro_batch_size=4")  # of shorter ones there are more
    assert parts("train.max_tokens=100") == parts("train.micro_batch_size=1")
    assert parts("train.max_tokens=100000") == parts("train.micro_batch_size=16")  # a worker's part of a batch
    asked = chosen(configured("llama-2-7b", "train.max_tokens=8192"), lora_7b, WorstBatch(512, 64))
    better = advised(asked.config, lora_7b, WorstBatch(512, 64), gpu_device("A10G").safe)
    assert better.changes(asked)["train.max_tokens"] == 0


@pytest.mark.slow
def test_a_base_is_held_dense_on_cpus_where_the_plan_leaves_a_margin_for_it(tmp_path):
    small().save_pretrained(tmp_path)
    records = split([40, 90, 20], [3, 5, 10])

    def outlook(*changes: str, memory: int = 8 * GIB):
        config = configured(tmp_path, "ray.use_gpu=false", "method.name=qlora", *changes)
        return config, before_training(config, tmp_path, records, [node(CPU=2, memory=memory)])

    config, found = outlook()
    assert found.dense_base
    assert ", the base held dense, of 8.0 on this cluster: fits" in found.lines[1]
    dense = chosen(config, Rehearsal.of(config, small()), WorstBatch.of(records, 8), dense_base=True)
    needed = dense.parts.total * (1 + MARGIN)
    assert outlook(memory=int(needed) + 1)[1].dense_base
    tight = outlook(memory=int(needed) - 1)[1]
    assert not tight.dense_base
    assert tight.lines[1].endswith(": fits")
    assert "dense" not in tight.lines[1]
    assert not outlook("train.zero_stage=3", "ray.num_workers=2")[1].dense_base
    assert not before_training(configured(tmp_path), tmp_path, records, []).dense_base  # on a GPU


def test_a_base_that_cannot_be_planned_for_is_trained_all_the_same(tmp_path):
    shape = {"model_type": "rwkv", "hidden_size": 64, "num_hidden_layers": 2}  # without heads of attention
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (line,) = before_training(configured(tmp_path), tmp_path, split([10], [2]), []).lines
    assert "cannot be planned for" in line
