"""`fineloop data erase --user` against a store with a dataset of logged requests, whose truth the generator keeps."""

import json
from collections import Counter
from typing import Any

import pytest

from components.prepare.dataset import load_split
from components.prepare.prepare import prepare
from components.registry.between_runs import require_none_erased, user_hash
from components.shared.errors import DataError
from pipelines.cli import main
from tests.components.prepare import logged


def test_a_user_is_erased_by_name_and_what_saw_him_is_listed(store, config_path, make_config, tmp_path, capsys):
    made, files = logged.generated(200, seed=3), []
    for name, rows in (("log", made.rows), ("feedback", made.feedback)):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(f"data.source={json.dumps(str(files[0]))}", f"data.feedback={json.dumps(str(files[1]))}")
    user, other = (name for name, _ in Counter(truth.user for truth in made.truth.values()).most_common(2))

    def erase(*arguments: str) -> dict[str, Any]:
        assert main(["data", "erase", *arguments, "-c", str(config_path), "--json"]) == 0
        answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return answer

    def records(uri: str) -> dict[str, tuple[str, str]]:
        return {r.id: (r.user, r.rater) for side in ("train", "eval") for r in load_split(store, uri, side)}

    before = prepare(config, store)
    theirs = {name for name, people in records(before.uri).items() if user_hash(user) in people}
    assert theirs <= made.of_user(user)
    assert theirs

    tried = erase("--user", user, "--dry-run")
    assert (tried["erased"], tried["users"]) == ([], [])
    require_none_erased(store, before.uri)
    done = erase("--user", user, "--by", "ada")
    (holder,) = done["datasets"]
    assert (holder["dataset_id"], set(holder["ids"])) == (before.dataset_id, theirs)
    assert holder == tried["datasets"][0]
    (erasure,) = done["users"]
    assert (erasure["user"], erasure["record"], erasure["by"]) == (user, user_hash(user), "ada")
    assert (erasure["is_new"], erase("--user", user)["users"][0]["is_new"]) == (True, False)
    assert not any(user in key for key in (info.key for info in store.list("erased/")))

    with pytest.raises(DataError, match=f"{len(theirs)} records? that w"):
        require_none_erased(store, before.uri)
    after = prepare(config, store)
    assert records(after.uri).keys() & made.of_user(other)
    assert not records(after.uri).keys() & made.of_user(user)
    assert main(["data", "erase", "--user", other, "-c", str(config_path)]) == 0
    assert "1 user erased for good" in capsys.readouterr().out
