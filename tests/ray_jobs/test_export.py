"""Exports of published versions, read back by plain transformers and plain peft."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.config.schema import ModelConfig
from components.handover import serve_manifest
from components.shared.errors import ConfigError, FineloopError, IntegrityError, UserError
from ray_jobs.adapters import merge
from ray_jobs.base import base_model, local_cache
from ray_jobs.export import ExportRequest, export
from tests.models import zoo
from tests.models.tiny_gguf import build_package
from tests.models.tiny_version import RECORDS, on_its_base, publish

ROWS = merge.vocabulary_rows(256, count=20, length=64)


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def of(placed):
    """The config of a method."""
    return lambda name, *more: placed(f"method.name={name}", *more)


@pytest.fixture
def exported(of, store, tmp_path):
    """Publishes a version and exports it to the folder `out`: its config, the version, and the export's record."""

    def export_of(method, form, *settings, std=0.1, **how):
        config = of(method, *settings)
        version = publish(config, store, tmp_path, std=std)
        return config, version, export(config, version.name, ExportRequest(form, tmp_path / "out", **how))

    return export_of


def says(model, folder_or_base) -> merge.Agreement:
    return merge.agreement(merge.logits(model.eval(), ROWS), merge.logits(folder_or_base.eval(), ROWS))


def plain_answers(model, tokenizer) -> tuple[float, float]:
    """By transformers alone: the share of held-out records that it answers to the letter, and nats per answer token."""
    right, nats, tokens = 0, 0.0, 0
    for record in RECORDS[4:]:
        turns = [{"role": "user", "content": record.prompt[0].content}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        answer = torch.tensor([[*tokenizer(record.answer)["input_ids"], tokenizer.eos_token_id]])
        said = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        right += tokenizer.decode(said, skip_special_tokens=True) == record.answer
        with torch.inference_mode():
            logits = model(input_ids=torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, answer[0], reduction="sum"))
        tokens += answer.shape[1]
    return right / len(RECORDS[4:]), nats / tokens


@pytest.mark.parametrize("name", ["dvora", pytest.param("loftq", marks=pytest.mark.slow)])
def test_a_merged_version_is_a_transformers_folder_that_needs_nothing_else(name, exported, store, tmp_path):
    config, version, record = exported(name, "merged", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    found = says(on_its_base(config, store, tmp_path / f"adapter-{name}"), plain)
    assert found.is_same
    assert record["parity"]["merge"]["argmax_agreement"] >= 0.999
    assert record["parity"]["merge"]["positions"] > 500
    figures = record["answers"]["exported"]
    right, loss = plain_answers(plain, AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert figures["exact_match"] == pytest.approx(right)
    assert figures["loss"] == pytest.approx(loss, rel=1e-4)
    assert record["answers"]["adapter"]["loss"] == pytest.approx(loss, rel=0.05)  # on its 16 bits or fewer
    assert record["parity"]["compared_on"].startswith("56 held-out records of s3://")
    assert record == json.loads((tmp_path / "out" / "export.json").read_text())
    assert (record["version"], record["manifest_sha256"]) == (version.version, version.manifest_sha256)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "generation_config.json", "README.md", "export.json", "chat_template.jinja"} <= written
    assert {Path(name).suffix for name in written} == {".safetensors", ".json", ".md", ".jinja"}
    assert version.version in (tmp_path / "out" / "README.md").read_text()
    assert list(tmp_path.glob(".out-*")) == []


def test_a_base_with_code_runs_only_where_the_callers_own_config_allows_it(of, store, tmp_path):
    publish(of("rslora", "model.trust_remote_code=true"), store, tmp_path)
    asked = of("rslora")
    with pytest.raises(ConfigError, match=rf"its base {asked.model.base} comes with .* code.*model\.trust_remote_code"):
        export(asked, asked.adapter.name, ExportRequest("lora", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    export(of("rslora", "model.trust_remote_code=true"), asked.adapter.name, ExportRequest("lora", tmp_path / "out"))


def test_a_base_that_has_changed_since_the_training_is_not_stood_on(of, store, tmp_path, tiny_base):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = of("rslora", f"model.base={base}")
    publish(config, store, tmp_path)
    (base / "generation_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"with kind folder sha256 \w+, and today that is kind folder sha256"):
        export(config, config.adapter.name, ExportRequest("lora", tmp_path / "out"))


def by_hand(config, store, tmp_path) -> tuple[float, float]:
    """By plain peft in float32: what rounding every merged weight to bfloat16 moves, and what the adapter does."""
    adapted = on_its_base(config, store, tmp_path / "adapter-lora", load=PeftModel.from_pretrained)
    said = list(merge.logits(adapted.eval(), ROWS[:4]))
    with adapted.disable_adapter():
        effect = merge.agreement(said, merge.logits(adapted, ROWS[:4])).mean_kl_nats
    merged = adapted.merge_and_unload()
    for weight in merged.parameters():
        weight.data = weight.data.bfloat16().float()
    return merge.agreement(said, merge.logits(merged, ROWS[:4])).mean_kl_nats, effect


def test_rounding_that_eats_a_tenth_of_the_adapter_is_warned_of_and_float16_eats_less(of, store, tmp_path, capsys):
    config = of("lora")
    small = publish(config, store, tmp_path, std=0.001, with_data=False)
    lost, effect = by_hand(config, store, tmp_path)
    assert lost > 0.2 * effect
    (tmp_path / "small").mkdir()  # an empty folder is replaced
    record = export(config, f"{small.name}@{small.version}", ExportRequest("merged", tmp_path / "small"))
    assert (record["parity"]["compared_on"], record["answers"]) == ("random tokens", {})
    assert record["parity"]["merge"]["positions"] == 16 * 64
    assert record["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"
    figures = {name: record["parity"][name]["mean_kl_nats"] for name in ("rounded", "saved", "effect")}
    assert lost / 3 < figures["rounded"] < 3 * lost
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    saved = says(on_its_base(config, store, tmp_path / "adapter-lora"), plain).mean_kl_nats
    assert saved / 3 < figures["saved"] < 3 * saved
    assert effect / 3 < figures["effect"] < 3 * effect
    assert len(record["warnings"]) == 1
    printed = capsys.readouterr().out
    assert "the data is gone" in printed
    assert "warning: rounding the weights to bfloat16" in printed
    wish = ExportRequest("merged", tmp_path / "half", dtype="float16")
    half = export(config, f"{small.name}@{small.version}", wish)
    assert half["parity"]["rounded"]["mean_kl_nats"] < 0.1 * figures["rounded"]
    assert half["warnings"] == []
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize(
    ("method", "std", "how", "told"),
    [
        ("lora", 300, {"dtype": "float16"}, r"_proj\.weight does not fit into float16.*--dtype bfloat16"),
        ("lora", float("inf"), {}, "cannot be merged"),
        ("loftq", 0.1, {"base": "original"}, "use --base dequantised"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_not_written(method, std, how, told, exported, tmp_path):
    with pytest.raises(FineloopError, match=told):
        exported(method, "merged", std=std, **how)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out-*")) == []


def test_merging_into_the_original_weights_is_done_when_asked_and_its_error_measured(exported, tmp_path, tiny_base):
    _, _, record = exported("qlora", "merged", base="original", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert says(PeftModel.from_pretrained(original, tmp_path / "adapter-qlora"), plain).is_same
    assert record["base"] == "original"
    assert record["parity"]["merge"]["mean_kl_nats"] < 1e-8
    assert record["parity"]["saved"]["mean_kl_nats"] > 1e-4  # what quantising had changed


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_what_is_plain_already_is_copied_and_nothing_loaded(name, of, store, tmp_path, tiny_base):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = of(name, f"model.base={base}")
    version = publish(config, store, tmp_path)
    shutil.rmtree(base)
    record = export(config, config.adapter.name, ExportRequest("lora", tmp_path / "out"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / f"adapter-{name}" / file).read_bytes()
    assert record == {"form": "lora", "version": version.version, "exact": True}
    assert record == json.loads((tmp_path / "out" / "export.json").read_text())


def test_a_packaged_base_is_a_folder_that_plain_transformers_and_peft_read(
    exported, store, tmp_path, tiny_base, monkeypatch
):
    build_package(tiny_base, tmp_path / "site", "tiny_weights", "Tiny.gguf")
    about = tmp_path / "site" / "tiny_weights-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\nLicense: Apache-2.0\n")
    (about / "RECORD").write_text("tiny_weights/__init__.py,,\ntiny_weights-1.2.dist-info/LICENSE,,\n")
    (about / "LICENSE").write_text("as is")
    monkeypatch.syspath_prepend(tmp_path / "site")
    config, version, record = exported("lora", "base", "model.base=pkg://tiny_weights/Tiny.gguf")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "README.md", "export.json"} <= written
    assert local_cache.DIGESTS not in written
    assert record["base_model"]["license"] == "Apache-2.0"
    assert record["base_model"]["identity"]["package"] == "tiny-weights==1.2"
    assert serve_manifest.base_of(tmp_path / "out") == record["base_model"]["identity"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: Apache-2.0" in card
    assert f"serve-manifest {version.name}@{version.version} --for vllm" in card
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter-lora")
    assert says(on_its_base(config, store, tmp_path / "adapter-lora"), adapted).is_same
    stop = AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id
    decoding = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (decoding["do_sample"], decoding["eos_token_id"]) == (False, [stop])


@pytest.mark.parametrize(("name", "kind"), [("rslora", "Mixtral"), ("vera", "Llama, tied")])
def test_plain_lora_is_what_plain_peft_reads(name, kind, exported, store, tmp_path):
    config, _, record = exported(name, "lora", f"model.base={zoo.build(kind, tmp_path / 'base')}")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "out")
    assert not plain.peft_config["default"].use_rslora
    assert len(plain.targeted_parameter_names) == (4 if kind == "Mixtral" else 0)  # experts
    assert says(on_its_base(config, store, tmp_path / f"adapter-{name}"), plain).is_same
    assert record["exact"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"adapter_model.safetensors", "adapter_config.json", "README.md", "export.json"}


def test_the_nearest_lora_says_how_far_it_is(of, store, tmp_path):
    config = of("dora")
    publish(config, store, tmp_path)
    with pytest.raises(UserError, match="--approximate"):
        export(config, config.adapter.name, ExportRequest("lora", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    record = export(config, config.adapter.name, ExportRequest("lora", tmp_path / "out", approximate=16))
    assert (record["exact"], record["rank"]) == (False, 16)
    assert record["parity"]["converted"]["argmax_agreement"] < 0.99
    assert "not the adapter itself" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_holds_something_is_left_alone(exported, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="not empty: remove it or choose another --to"):
        exported("lora", "merged")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_weights_that_lie_the_other_way_round_are_merged_alike(exported, store, tmp_path):
    # GPT-2's are (in, out), and bitsandbytes stores them (out, in).
    base = zoo.build("GPT-2", tmp_path / "base")
    config, _, record = exported("qlora", "merged", f"model.base={base}", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert says(on_its_base(config, store, tmp_path / "adapter-qlora"), plain).is_same
    assert record["base"] == "dequantised"
    assert record["parity"]["saved"]["argmax_agreement"] == 1


def test_a_base_that_is_only_there_quantised_is_merged_too(exported, tmp_path, tiny_base):
    original = ModelConfig(base=str(tiny_base))
    quantised = base_model.load_model(base_model.resolve(original), original, "nf4", use_gpu=False)
    quantised.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "base")
    settings = (f"model.base={tmp_path / 'base'}", "method.base=nf4")
    _, _, record = exported("lora", "merged", *settings, dtype="float32")
    assert record["base_model"]["format"] == "nf4"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    # The same adapter on the same weights, dequantised into the model that they were made from.
    dense = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).float()
    merge.dequantise_into(dense, quantised)
    assert says(PeftModel.from_pretrained(dense, tmp_path / "adapter-lora"), plain).is_same
