"""`fineloop completion`: what a real bash offers with it."""

import subprocess
from pathlib import Path

import pytest

from pipelines.cli import main

OFFERED = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_shtab_fineloop
printf "%s\\n" "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["ad"], {"adapters"}),
        (["adapters", "ro"], {"rollback"}),
        (["adapters", "export", "--conf"], {"--config"}),
        (["completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes_commands_options_and_choices(
    typed: list[str], offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "fineloop").write_text(capsys.readouterr().out)
    command = ["bash", "-c", OFFERED, "bash", str(tmp_path / "fineloop"), "fineloop", *typed]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {line.strip() for line in done.stdout.splitlines()} == offered
