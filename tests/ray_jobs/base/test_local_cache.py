"""What several processes of a machine build once, and what none of them asks for any more."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock

from ray_jobs.base.local_cache import forget_unused, once, touch

ROOT = Path(__file__).parents[3]
DAY_S = 86400.0

KILLED = """
import os, signal, sys
from pathlib import Path
from ray_jobs.base.local_cache import once

def build(scratch):
    (scratch / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)

once(Path(sys.argv[1]), build)
"""


def test_what_a_killed_build_has_left_is_in_no_later_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "base"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "base").exists()
    assert list(tmp_path.glob("**/half"))
    once(tmp_path / "base", lambda scratch: (scratch / "whole").touch())
    assert [path.name for path in tmp_path.glob("**/*") if path.is_file() and path.suffix != ".lock"] == ["whole"]


def test_what_nobody_asks_for_is_forgotten_and_what_is_asked_for_is_not(tmp_path):
    for name in ("old", "asked", "locked", "young"):
        once(tmp_path / name, lambda scratch: (scratch / "file").touch())
        if name != "young":
            os.utime(tmp_path / name, (time.time() - 2 * DAY_S,) * 2)
    touch(tmp_path / "asked")
    with FileLock(f"{tmp_path / 'locked'}.lock"):
        forget_unused(tmp_path, DAY_S)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"asked", "locked", "young"}
    touch(tmp_path / "never-there")
    assert not (tmp_path / "never-there").exists()
