"""The schema, and what a person reads who got it wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.config import config_file
from components.config.config_file import SYNONYMS
from components.config.schema import RunConfig
from components.shared.errors import ConfigError
from tests.components.config.loading import GOOD, message_of, set_in
from tests.frozen.training import to_come

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "pipelines" / "configs").glob("**/*.toml"))
FULL = r"""
[adapter]
name = "a.b_c-9"
[model]
base = "org/näme"
trust_remote_code = true
[data]
source = ["s3://bucket/a b/*.jsonl", 'C:\new "x".parquet']
[method]
target_modules = ["q_proj", "v_proj"]
[train]
learning_rate = 1e-4
seed = 4_294_967_295
[[gate.limits]]
metric = "exact_match"
min = 0.5
[[gate.limits]]
metric = "perplexity"
max = 30
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_is_valid_and_names_the_schema_beside_it(path: Path) -> None:
    assert config_file.load(path).adapter.name
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("#:schema ")
    assert (path.parent / first.removeprefix("#:schema ")).is_file()


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("trian.learning_rate=1", "unknown key trian: did you mean train?"),
        ("gate.limits=[{metrc='loss',metric='loss',max=1}]", "gate.limits.0.metrc: did you mean gate.limits.0.metric?"),
        ("gate.batch_size=1", "unknown key gate.batch_size: did you mean train.batch_size or evaluate.batch_size?"),
        ("data.zzz=1", "unknown key data.zzz: known here: source, eval_share, validation_share, group"),
        ("zzz.yyy=1", "unknown key zzz: known here: adapter, model, data"),
    ],
)
def test_an_unknown_key_at_any_depth_names_the_nearest_or_those_that_are_known(override: str, meant: str) -> None:
    assert meant in message_of(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=fast", "train.learning_rate = 'fast': should be a valid number"),
        ("train.learning_rate=1", "train.learning_rate = 1: should be less than 1"),
        ("train.cpu_offload=yes", "train.cpu_offload = 'yes': should be a valid boolean"),
        ("model.max_length=4", "model.max_length = 4: should be greater than or equal to 16"),
        ("method.name=loraa", "method.name = 'loraa': should be 'lora', 'qlora', 'rslora', 'dora', 'qdora'"),
        ("method.target_modules='('", "target_modules '(' is no regular expression: missing )"),
        ("adapter.name=Foo", "adapter.name = 'Foo': expected ^[a-z0-9]"),
        ("registry.prefix=/x/", "without slashes at either end"),
        ("data.source=1", "data.source = 1: expected a string or a list of strings"),
        ("method.target_modules=q_proj, v_proj", """write '["q_proj","v_proj"]'"""),
        ("train=[{epochs=1}]", "[{'epochs': 1}]: expected one section, headed once"),
        ("model=1", "model = 1: expected a section, with keys such as base"),
        ("gate.limits=1", "gate.limits = 1: expected a list of sections, each headed [[gate.limits]]"),
    ],
)
def test_a_wrong_value_is_named_with_its_field_and_what_that_takes(override: str, message: str) -> None:
    found = message_of(override)
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.batch_size=20", "train.micro_batch_size=4", "ray.num_workers=2"],
            "try train.batch_size=16, or train.micro_batch_size=2, which leaves every step as it is",
        ),
        (["train.batch_size=4"], "try train.batch_size=8"),
        (["train.batch_size=15", "train.max_tokens=512", "ray.num_workers=2"], "try train.batch_size=14"),
        (["ray.use_gpu=true", "ray.gpu=V100", "ray.cluster.kind=rayjob"], "has no kernels for it: take gpu=T4 or a"),
        (["model.attention=flash_attention_2"], "flash_attention_2 runs on GPUs alone: set ray.use_gpu=true"),
        (["ray.use_gpu=true", "ray.gpu=MI300X"], "ray.gpu"),
        (["ray.use_gpu=true", "ray.gpu=T4", "model.attention=flash_attention_2"], "of compute capability 7.5"),
        (["ray.use_gpu=true", "ray.gpu=T4", "method.name=loftq"], "(ray.gpu). Nearest to it: method.name=qlora"),
        (["ray.use_gpu=true", "train.dtype=float16", "method.name=loftq"], "in float16 (train.dtype)"),
        (["model.base=s3://b/f", "model.revision=main"], "remove model.revision"),
        (["model.base=pkg://p/f.gguf", "model.revision=main"], "model.base is pkg://p/f.gguf"),
        (["gate.limits=[{metric='loss',min=2,max=1}]"], "gate.limits.0: min 2.0 is above max 1.0"),
        (["gate.limits=[{metric='loss'}]"], "gate.limits.0: a limit needs min, max or both"),
        (["evaluate.max_new_tokens=64", "model.max_length=64"], "leaves no room for a prompt in model.max_length 64"),
        (
            ["ray.cluster.kind=jobs-api", "ray.cluster.disk_gib=5"],
            'disk_gib: it belongs to ray.cluster.kind = "rayjob"',
        ),
    ],
)
def test_what_cannot_go_together_is_refused(overrides: list[str], message: str) -> None:
    assert message in message_of(*overrides)


def test_what_only_just_goes_together_is_taken() -> None:
    shared = ["train.batch_size=20", "train.max_tokens=512", "train.micro_batch_size=8", "ray.num_workers=4"]
    lengths = ["model.revision=main", "evaluate.max_new_tokens=63", "model.max_length=64"]
    for attention, gpu in (("auto", "T4"), ("flash_attention_2", "A100-40G")):
        set_in("ray.use_gpu=true", f"ray.gpu={gpu}", f"model.attention={attention}")
    set_in("ray.use_gpu=true", "ray.gpu=T4", "method.name=loftq", "train.dtype=bfloat16")
    config = set_in(*shared, *lengths, "gate.limits=[{metric='loss',min=1,max=1}]")
    assert config.gate.limits[0].min == config.gate.limits[0].max == 1


def test_several_mistakes_are_said_in_one_message() -> None:
    assert "model.base is required: Hub id, local folder" in message_of(text=GOOD.replace('base = "org/name"', ""))
    found = message_of(text="[adapter]\n[model]\nbase = 1\n[trian]\n").splitlines()
    assert found[0] == "config:"
    expected = ["adapter.name is required", "model.base = 1", "section [data] is missing", "unknown key trian"]
    assert [line.strip().split(":")[0] for line in found[1:]] == expected


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.learning_rate=2e-4", "train.learning_rate", 2e-4),
        ("data.max_records=10_000", "data.max_records", 10000),
        ("train.cpu_offload=false", "train.cpu_offload", False),
        ('model.revision="7"', "model.revision", "7"),
        (r"data.source=C:\new\rows.jsonl", "data.source", r"C:\new\rows.jsonl"),
        ("data.source=['a.jsonl', 'b.jsonl']", "data.source", ["a.jsonl", "b.jsonl"]),
        (" data.source =rows.parquet", "data.source", "rows.parquet"),
        ("gate.limits=[]", "gate.limits", []),
        ("registry={bucket='bbb'}", "registry.bucket", "bbb"),
    ],
)
def test_set_takes_toml_values_and_bare_words(override: str, field: str, value: Any) -> None:
    section, key = field.split(".")
    found = getattr(getattr(set_in(override), section), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("override", ["train", "=1", "train.=1", "train..epochs=1"])
def test_a_set_that_is_no_assignment_says_how_to_write_one(override: str) -> None:
    assert "expected section.key=value, such as train.learning_rate=2e-4" in message_of(override)


@pytest.mark.parametrize("override", ['data.source=["a", "b"', 'data.source="a', "gate.limits=[{metric=loss}]"])
def test_a_list_or_string_that_was_not_finished_is_not_taken_for_a_bare_word(override: str) -> None:
    assert message_of(override).startswith(f"--set {override}: the value is not valid TOML")


def test_a_set_cannot_reach_into_a_value_or_a_list_nor_drop_a_second_line() -> None:
    assert r"train.epochs = '1\nseed = 2': should be a valid integer" in message_of("train.epochs=1\nseed = 2")
    assert "--set data.source.x=1: data.source is no section but 'rows.jsonl'" in message_of("data.source.x=1")
    limited = GOOD + "[[gate.limits]]\nmetric = 'loss'\nmax = 1\n"
    assert "gate.limits is no section but [{" in message_of("gate.limits.0.max=2", text=limited)
    assert "set it whole, as gate.limits=..." in message_of("gate.limits.0.max=2", text=limited)
    assert "expected a list of sections, each headed [[gate.limits]]" in message_of("gate.limits.0.max=2")


def test_what_other_tools_call_a_key_leads_to_ours() -> None:
    ours = set(config_file.key_paths(RunConfig))
    assert set(SYNONYMS.values()) <= ours
    assert not SYNONYMS.keys() & {path.rpartition(".")[2] for path in ours}
    assert "unknown key train.lr: did you mean train.learning_rate?" in message_of("train.lr=1")


def test_a_mistake_is_blamed_on_the_file_or_on_what_was_set(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    with pytest.raises(ConfigError, match=r"^--set train\.epochs=0: train\.epochs = 0"):
        config_file.load(path, ["train.epochs=0", "train.seed=1"])
    with pytest.raises(ConfigError, match=r"^--set:\n  unknown key data\.zzz.*\n  train\.epochs = 0"):
        config_file.load(path, ["train.epochs=0", "data.zzz=1"])
    with pytest.raises(ConfigError, match=r"mine\.toml with --set: train\.batch_size 16 is not a multiple"):
        config_file.load(path, ["ray.num_workers=7"])
    path.write_text(GOOD + "[train]\nepochs = 0\n")
    with pytest.raises(ConfigError, match=r"mine\.toml: train\.epochs = 0"):
        config_file.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"a = \n", r"is not valid TOML: Invalid value \(at line 1, column 5\)"),
        (b"[adapter]\nname = '\xff'\n", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_file_that_is_no_config_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"mine\.toml {message}"):
        config_file.load(path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert config_file.load(path) == config_file.loads(GOOD)


@pytest.mark.parametrize("text", [GOOD, FULL], ids=["defaults", "everything set"])
def test_a_config_survives_being_written_out(text: str) -> None:
    config = config_file.loads(text)
    again = config_file.loads(config_file.dumps(config))
    assert again == config
    assert again.digest == config.digest


def test_the_digest_follows_from_the_values_alone() -> None:
    digest = config_file.loads(GOOD).digest
    reordered = '[data]\nsource = "rows.jsonl"\n[model]\nbase = "org/name"\n[adapter]\nname = "sums"\n'
    assert config_file.loads(reordered).digest == digest
    assert set_in("train.epochs=1").digest == digest
    assert set_in("train.epochs=2").digest != digest


def test_every_field_has_a_description_in_the_json_schema() -> None:
    schema = json.loads(config_file.json_schema())
    sections = {"RunConfig": schema, **schema["$defs"]}
    silent = [
        f"{section}.{name}"
        for section, body in sections.items()
        for name, field in body["properties"].items()
        if not field.get("description") and not schema["$defs"].get(field.get("$ref", "")[8:], {}).get("description")
    ]
    assert silent == []


# The example as release 0.1.0 has it, and what that release computed as digests.
FROZEN = ROOT / "tests" / "frozen" / "icd10.toml"
EXAMPLE_IN_0_1_0 = "d149ebc1d6ad9d69ee4ad1707755af96dac5dd9fcc1eea4665497cca1ee996a1"
RAYJOB_IN_0_1_0 = "8ffa1d80e146ef4be2db84aa46892b2bf619a789620d9bf3fec9cf0f80defea3"
RAYJOB_ON_ITS_IMAGE_IN_0_1_0 = "c5ac090d891f78caf35e8aba3e60e66a30906be4018ad75ca3824a794d71f60d"
RSLORA_IN_0_1_0 = "8034b60351c0896e814da3eecdbbbd60c39814c1c01e7a1a4930a2f4f223bc61"
RSLORA_OF_RANK_64_IN_0_1_0 = "85b6e4e962288e37c8b67cc7ac6bf6386e5e05292ba86b735ba178b589de461a"
RAYJOB = ["ray.cluster.kind=rayjob", "ray.cluster.image=a/b:1", "gate.metric=exact_match"]


def test_the_digest_of_a_config_is_the_one_that_0_1_0_gave_it():
    assert config_file.load(FROZEN).digest == EXAMPLE_IN_0_1_0
    assert config_file.load(FROZEN, RAYJOB).digest == RAYJOB_IN_0_1_0
    on_its_image = config_file.load(FROZEN, ["ray.cluster.kind=rayjob", "ray.cluster.namespace=ml"])
    assert on_its_image.digest == RAYJOB_ON_ITS_IMAGE_IN_0_1_0


def test_a_key_that_is_added_with_a_default_leaves_every_digest_as_it_was():
    today = config_file.load(FROZEN)
    assert to_come(today).digest == today.digest != to_come(today, patience=4).digest


def test_an_added_key_that_is_set_changes_the_digest_and_a_note_does_not():
    assert config_file.load(FROZEN, ["ray.cpu_matmul_dtype=float32"]).digest != EXAMPLE_IN_0_1_0
    for unchanged in ("ray.cpu_matmul_dtype=auto", "adapter.note=half the data"):
        assert config_file.load(FROZEN, [unchanged]).digest == EXAMPLE_IN_0_1_0


def test_an_alpha_that_is_absent_does_not_depend_on_the_rank_where_its_root_divides_it():
    def alpha(name: str, rank: int, *more: str) -> float:
        return set_in(f"method.name={name}", f"method.rank={rank}", *more).method.lora_alpha

    assert [alpha("lora", rank) for rank in (8, 16, 256)] == [16, 32, 512]
    assert [alpha("rslora", rank) for rank in (8, 16, 256)] == [32, 32, 32]
    assert alpha("qdora", 64, "method.scaling=rslora") == 32
    assert alpha("rslora", 64, "method.alpha=128") == 128


def test_a_checkpoint_of_a_config_that_means_something_else_now_has_another_digest():
    # As 0.1.0 digested them, where alpha was 128 for the second.
    same, other = ["method.name=rslora"], ["method.name=rslora", "method.rank=64"]
    assert config_file.load(FROZEN, same).digest == RSLORA_IN_0_1_0
    assert config_file.load(FROZEN, other).digest != RSLORA_OF_RANK_64_IN_0_1_0
