"""Whether a real vLLM answers as Fineloop does: `make served`, or `python -m benchmarks.served [--vllm FOLDER]`.

Trains a tiny base and a version of every method on it, each on another task, and asks one server for its greedy answers
to held-out prompts: by plain folders and by the names of the registry, for ranks up to vLLM's largest. DoRA and DVoRA
are asked as merged exports, and LoftQ, whose base in NF4 a vLLM for processors does not load. The server has to refuse
DoRA, a version that no alias ever held and a revoked one, and to see a promotion without a restart. An answer that is
not that of the evaluation's own engine is a near tie where vLLM's two likeliest tokens lie less than a quarter of a nat
apart, which bfloat16 hardly tells from each other; any other makes the command fail, except on NF4: vLLM has the base
in bfloat16.

With --home it is the version that a `fineloop run` there promoted: the very commands that `fineloop adapters
serve-manifest NAME --for vllm` prints are run, and the answers compared with those of `fineloop chat`.

vLLM has an environment of its own, FOLDER, and is no dependency; the Makefile makes it, for processors.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import example
from benchmarks.gpu_day import BUCKET, a_store
from benchmarks.vllm_server import Answer, asked, posted, serving
from components.config import config_file
from components.config.methods import VLLM_MAX_LORA_RANKS
from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record, load_split
from components.registry import aliases, signing
from components.registry.versions import Version, pull_version, read_lineage, resolve
from components.shared.machine import in_environment
from components.store.store import Store
from pipelines.configs import DEFAULT_CONFIG
from pipelines.local.local_services import local_services

NEAR_TIE = 0.25
"""In nats."""
MAX_NEW_TOKENS = 12
STEPS = 300
SERVED_WITH = ("--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "8")
CONFIG = """
[adapter]
name = "{name}"
[model]
base = "{base}"
max_length = 128
[data]
source = "unused.jsonl"
[method]
name = "{method}"
rank = {rank}
[evaluate]
max_new_tokens = {most}
[registry]
bucket = "{bucket}"
trusted_keys = ["{key}"]
[ray]
use_gpu = false
"""


def main() -> None:
    parser = example.parser("served", __doc__)
    parser.add_argument("--vllm", type=Path, default=Path(".venv-served"), help="a virtual environment with vLLM")
    parser.add_argument("--home", type=Path, help="where a `fineloop run` has promoted it")
    parser.add_argument("--name", default="icd10-chapters", help="with --home")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--served-with", default="--max-model-len 512 --enforce-eager", help="with --home, for vLLM")
    options = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{options.vllm.absolute() / 'bin'}:{os.environ['PATH']}"
    if options.home:
        of_home(options.home.absolute(), options)
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fineloop-served-") as scratch, a_store(Path(scratch)):
        os.environ["FINELOOP_CACHE"] = f"{scratch}/cache"
        rows, checks = Trial(Path(scratch), options.prompts).judged()
    checks["vLLM takes the ranks that serve-manifest names"] = _ranks(options.vllm) == list(VLLM_MAX_LORA_RANKS)
    print(f"\n{'version':<26}{'served':<20}{'answers':>8}{'equal':>7}{'near ties':>11}{'apart':>7}{'reference':>11}")
    print(*rows, sep="\n")
    print(*(f"{'yes' if right else 'NO':>4}  {what}" for what, right in checks.items()), sep="\n")
    print(f"{time.monotonic() - began:.0f} s in all")
    sys.exit(not all(checks.values()) or any(row.is_wrong for row in rows))


@dataclass(frozen=True)
class Row:
    """A version's answers by a server, beside those of the evaluation's engine."""

    version: str
    served: str
    method: str
    own: Sequence[str]
    answers: Sequence[Answer]
    right: int

    @property
    def margins(self) -> list[float]:
        """Of the answers that differ: how sure vLLM was of its own."""
        return [theirs.margin(ours) for ours, theirs in zip(self.own, self.answers, strict=True) if ours != theirs.text]

    @property
    def is_wrong(self) -> bool:
        return not _on_nf4(self.method) and any(margin > NEAR_TIE for margin in self.margins)

    def __str__(self) -> str:
        ties = [margin for margin in self.margins if margin <= NEAR_TIE]
        count, differing = len(self.answers), len(self.margins)
        tied = f"{len(ties)} ({max(ties):.2f})" if ties else "0"
        row = f"{self.version:<26}{self.served:<20}{count:>8}{count - differing:>7}{tied:>11}{differing - len(ties):>7}"
        return row + f"{self.right:>11}"


def _on_nf4(method: str) -> bool:
    """Whether vLLM's base, in bfloat16, is not the one that the version was trained on."""
    return method == "qlora"


@dataclass(frozen=True)
class Made:
    """A published version, and what the evaluation's engine answers with it."""

    config: RunConfig
    version: Version
    shift: int
    folder: Path
    own: list[str]


class Trial:
    """A registry with a version of each kind, and what servers of them answer."""

    def __init__(self, scratch: Path, num_prompts: int) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self.scratch, self._key = scratch, Ed25519PrivateKey.generate()
        self._records = {shift: coloured(48 + num_prompts, shift) for shift in range(6)}
        self._base = trained_base(scratch / "base", self._records[0][:48])
        self._made = 0

    def held_out(self, shift: int) -> list[Record]:
        return self._records[shift][48:]

    def make(self, name: str, method: str, rank: int, *, is_held: bool = True) -> Made:
        """Train a version on a task of its own, publish and sign it, and promote it unless it `is_held` by none."""
        from ray_jobs.base import base_model
        from ray_jobs.text import chat_format
        from tests.models.tiny_version import publish

        self._made += 1
        key = signing.public_text(self._key)
        text = CONFIG.format(
            name=name, base=self._base, method=method, rank=rank, most=MAX_NEW_TOKENS, bucket=BUCKET, key=key
        )
        config, shift = config_file.loads(text), 1 + self._made % 5
        store = Store.open(config.registry)
        chat = chat_format.load(base_model.resolve(config.model), config.model)
        scratch = self.scratch / f"made-{self._made}"
        rate = 10 * config.learning_rate * (min(1, 32 / rank) if method == "lora" else 1)  # high ranks diverge
        version = publish(
            config,
            store,
            scratch,
            change=lambda adapted: learn(adapted, chat, self._records[shift][:48], rate),
        )
        signing.sign(store, name, version.version, self._key, alias=aliases.PRODUCTION)
        if is_held:
            aliases.promote(store, name, version.version)
        folder = scratch / "pulled"
        pull_version(store, version, folder)
        made = Made(config, version, shift, folder, answers_of(config, store, folder, self.held_out(shift)))
        right = _right(made.own, self.held_out(shift))
        print(f"{name}: {method} of rank {rank} answers {right} of {len(made.own)} as the reference", flush=True)
        return made

    def row(self, url: str, model: str, made: Made, served: str) -> Row:
        """What the server answers as `model`."""
        records = self.held_out(made.shift)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda record: asked(url, model, record, MAX_NEW_TOKENS), records))
        texts = [answer.text for answer in answers]
        name, method = made.config.adapter.name, made.config.method.name
        return Row(f"{name}, rank {made.config.method.r}", served, method, made.own, answers, _right(texts, records))

    def judged(self) -> tuple[list[Row], dict[str, bool]]:
        """The rows of the table, and what else has to hold."""
        from ray_jobs.export import ExportRequest, export

        plain = [self.make(f"lora-{rank}", "lora", rank) for rank in (8, 24, 64, 128, 256, 320, 512)]
        plain += [self.make(method, method, 16) for method in ("qlora", "rslora")]
        loftq, vera = self.make("loftq", "loftq", 16), self.make("vera", "vera", 64)
        magnitudes = [self.make("dora", "dora", 16), self.make("dvora", "dvora", 64)]
        night = [self.make("night", "lora", 8) for _ in range(2)]
        unheld, revoked = self.make("night", "lora", 8, is_held=False), self.make("revoked", "lora", 8)
        store = Store.open(revoked.config.registry)
        aliases.rollback(store, "night")

        def exported(made: Made, form: Any, **how: Any) -> Path:
            target = self.scratch / f"{made.config.adapter.name}-{form}"
            export(made.config, made.config.adapter.name, ExportRequest(form, target, **how))
            return target

        base = exported(plain[0], "base")
        folders = {made.config.adapter.name: made.folder for made in plain}
        folders |= {"vera": exported(vera, "lora"), "near-dora": exported(magnitudes[0], "lora", approximate=16)}
        merged = [(made, exported(made, "merged")) for made in [loftq, *magnitudes]]
        rows, checks = [], dict[str, bool]()
        by_name = {"FINELOOP_LORA_FOLDER": f"{self.scratch}/copies", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true"}
        by_name |= {"FINELOOP_LORA_CONFIG": str(self.scratch / "served.toml"), "VLLM_PLUGINS": "fineloop"}
        (self.scratch / "served.toml").write_text(config_file.dumps(revoked.config))
        with serving(vllm(base, folders), self.scratch, by_name) as url:
            for made in plain:
                name = made.config.adapter.name
                rows.append(self.row(url, name, made, "a folder"))
                rows.append(self.row(url, f"{name}@{made.version.version}", made, "the resolver"))
            rows.append(self.row(url, "vera", vera, "a folder, --lora"))
            near = self.row(url, "near-dora", magnitudes[0], "its nearest LoRA")
            before = self.row(url, "night@production", night[0], "the resolver")
            aliases.promote(store, "night", night[1].version.version)
            after = self.row(url, f"night@{night[1].version.version}", night[1], "once promoted")
            rows += [before, after]
            kept = asked(url, "night@production", self.held_out(1)[0], MAX_NEW_TOKENS)
            posted(url, "/v1/unload_lora_adapter", {"lora_name": "night@production"})
            rows.append(self.row(url, "night@production", night[1], "once unloaded"))
            still = asked(url, f"night@{night[0].version.version}", self.held_out(1)[0], MAX_NEW_TOKENS)
            checks["what an alias meant is served until it is unloaded"] = kept.text == still.text
            signing.revoke(store, "revoked", revoked.version.version, self._key, reason="it tells names")
            for what, made in (
                ("DoRA", magnitudes[0]),
                ("a version that no alias held", unheld),
                ("a revoked version", revoked),
            ):
                reference = f"{made.config.adapter.name}@{made.version.version}"
                status, said = posted(url, "/v1/completions", {"model": reference, "prompt": "x"})
                checks[f"the resolver does not serve {what}: {status} {_short(said)}"] = status >= 400
            body = {"lora_name": "as-it-is", "lora_path": str(magnitudes[0].folder)}
            status, said = posted(url, "/v1/load_lora_adapter", body)
            checks[f"vLLM refuses a folder with DoRA: {status} {_short(said)}"] = status >= 400 and "DoRA" in said
        for made, folder in merged:
            with serving(["vllm", "serve", str(folder), *SERVED_WITH], self.scratch) as url:
                rows.append(self.row(url, str(folder), made, "merged"))
        print(f"for comparison, approximate: {near}")
        return rows, checks


def vllm(base: Path, folders: Mapping[str, Path]) -> list[str]:
    """The command that serves plain folders of adapters on a base."""
    modules = [f"{name}={folder}" for name, folder in folders.items()]
    rank = str(VLLM_MAX_LORA_RANKS[-1])
    command = ["vllm", "serve", str(base), *SERVED_WITH, "--enable-lora", "--max-lora-rank", rank]
    return [*command, "--lora-modules", *modules]


def coloured(count: int, shift: int) -> list[Record]:
    """Records of a task of its own: each thing has the colour of the one `shift` places on."""
    from tests.models.tiny import COLOURS, colour_rows

    colours = [COLOURS[thing] for thing in sorted(COLOURS)]
    return [
        Record(row["id"], [Message("user", row["prompt"])], colours[(index + shift) % len(colours)])
        for index, row in enumerate(colour_rows(count))
    ]


def trained_base(folder: Path, records: Sequence[Record]) -> Path:
    """A tiny base that has learnt a task; vLLM's attention on processors begins at heads of 32."""
    import torch
    from transformers import AutoModelForCausalLM

    from ray_jobs import entry
    from ray_jobs.base import base_model
    from ray_jobs.text import chat_format
    from tests.models.tiny import build_base

    entry.quiet_libraries()
    build_base(folder, width=128)
    text = CONFIG.format(name="base", base=folder, method="lora", rank=8, most=8, bucket=BUCKET, key="")
    model_config = config_file.loads(text.replace('trusted_keys = [""]', "")).model
    chat = chat_format.load(base_model.resolve(model_config), model_config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    learn(model, chat, records, 1e-3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def learn(model: Any, chat: Any, records: Sequence[Record], rate: float) -> None:
    """Train what of the model can be trained, until it knows the records or for STEPS steps."""
    import torch

    from ray_jobs.text.batching import tokenize

    rows = example.rows(tokenize(records, chat, 128))
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, pad: int) -> torch.Tensor:
        return torch.tensor([row[key] + [pad] * (width - len(row[key])) for row in rows])

    inputs, labels = padded("input_ids", chat.pad), padded("labels", -100)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    dtypes = [weight.dtype for weight in trained]
    for weight in trained:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        some = torch.randperm(len(rows), generator=generator)[:12]
        with torch.autocast("cpu", torch.bfloat16):  # VeRA's shared matrices have the base's dtype
            loss = model(input_ids=inputs[some], labels=labels[some]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if float(loss.detach()) < 0.005:
            break
    for weight, dtype in zip(trained, dtypes, strict=True):
        weight.data = weight.data.to(dtype)


def answers_of(config: RunConfig, store: Store, folder: Path, records: Sequence[Record]) -> list[str]:
    """The answers of the evaluation's engine, on the base that the version was trained on."""
    from ray_jobs.adapters import build, own_base
    from ray_jobs.base import base_model
    from ray_jobs.kernels import door
    from ray_jobs.scoring.generation import greedy
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import tokenize

    original = base_model.resolve(config.model)
    kernels = door.choose(config, base_model.load_config(original.path, config.model))
    stands_on = own_base.find(config, original, store, sha256="")
    base = door.load_model(stands_on, config.model, config.method.row.base, kernels, use_gpu=False)
    model = kernels.adopt(build.load(base, folder)).eval()
    chat = chat_format.load(original, config.model)
    return greedy(model, chat, tokenize(records, chat, config.model.max_length), 8, MAX_NEW_TOKENS)


def _right(answers: Sequence[str], records: Sequence[Record]) -> int:
    return sum(answer == record.answer for answer, record in zip(answers, records, strict=True))


def _ranks(vllm: Path) -> list[int]:
    """The values of --max-lora-rank in the installed vLLM."""
    (file,) = vllm.glob("lib/python3*/site-packages/vllm/config/lora.py")
    (listed,) = re.findall(r"^MaxLoRARanks = Literal\[(.*)\]", file.read_text(), re.MULTILINE)
    return [int(rank) for rank in listed.split(",")]


def _short(said: str) -> str:
    with contextlib.suppress(ValueError, LookupError, TypeError):
        said = json.loads(said)["error"]["message"]
    return " ".join(said.split())[:110]


def of_home(home: Path, options: argparse.Namespace) -> None:
    """The answers to the printed commands beside chat's."""
    config = config_file.load(DEFAULT_CONFIG)
    with local_services(home, bucket=config.registry.bucket, ray=False) as environment, in_environment(environment):
        store = Store.open(config.registry)
        version = resolve(store, options.name)
        split = load_split(store, read_lineage(store, version)["dataset"]["uri"], "eval")
    records = split[: options.prompts]
    chat = _fineloop(home, "chat", options.name, "--against", "none", "--turns", "alone", prompts=records)
    own = [turn["answers"][0]["text"] for turn in chat["turns"]]
    words = ["fineloop", "adapters", "serve-manifest", options.name, "--for", "vllm", "--home", str(home)]
    *before, serve = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    with tempfile.TemporaryDirectory() as folder:
        for line in before:
            print(f"$ {line}", flush=True)
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run(shlex.split(line), cwd=folder, check=True, **quiet)
        print(f"$ {serve}", flush=True)
        with serving([*shlex.split(serve), *shlex.split(options.served_with)], Path(folder)) as url:
            answers = [asked(url, version.version, record) for record in records]
    for record, ours, theirs in zip(records, own, answers, strict=True):
        if ours != theirs.text:
            nats = f"{theirs.margin(ours):.3f} nats"
            print(f"{record.prompt[-1].content!r}: chat {ours!r}, vLLM {theirs.text!r}, likelier by {nats}")
    same = sum(ours == theirs.text for ours, theirs in zip(own, answers, strict=True))
    right = _right([answer.text for answer in answers], records)
    print(f"{same} of {len(records)} greedy answers of vLLM are chat's; {right} of vLLM's are the reference")


def _fineloop(home: Path, *words: str, prompts: Sequence[Record]) -> dict[str, Any]:
    lines = "".join(f"{record.prompt[-1].content}\n" for record in prompts)
    command = ["fineloop", *words, "--home", str(home), "--json"]
    done = subprocess.run(
        command, input=lines, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    main()
