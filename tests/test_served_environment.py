"""The environment of `make served` finds Fineloop, whose code it takes from the checkout beside .venv's packages."""

import re
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def test_the_served_environment_imports_fineloop_from_anywhere_without_a_pythonpath(tmp_path: Path) -> None:
    recipe = subprocess.run(
        ["make", "--dry-run", "--always-make", ".venv-served/ready"], cwd=CHECKOUT, capture_output=True, text=True
    ).stdout
    (path_file,) = re.findall(r"^.*?(\S+/python -c .*) > \$packages/beside\.pth", recipe, flags=re.MULTILINE)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    written = subprocess.run(["bash", "-c", path_file], cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout
    (packages / "beside.pth").write_text(written, encoding="utf-8")
    ask = [tmp_path / "venv/bin/python", "-c", "import components; print(components.__file__)"]
    found = subprocess.run(ask, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert found.stdout.strip() == str(CHECKOUT / "components" / "__init__.py"), found.stderr
