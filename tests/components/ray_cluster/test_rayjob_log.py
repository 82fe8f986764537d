import io

from components.ray_cluster.backend import LogCopy
from components.ray_cluster.rayjob import JobLog


class Log(JobLog):
    """The log of a job for which each look takes a second, or another time."""

    look_s = 1.0

    def __init__(self) -> None:
        self.now, self.num_looks, self.output = 0.0, 0, io.StringIO()
        super().__init__(None, "r", LogCopy(self.output), clock=lambda: self.now)  # type: ignore[arg-type]

    def _dashboard(self, status: object) -> str:
        self.now += self.look_s
        self.num_looks += 1
        return "".join(f"line {n}\n" for n in range(self.num_looks))


def test_reading_a_log_again_and_again_takes_a_tenth_of_the_time() -> None:
    log = Log()
    while log.now < 1000:
        log.read({}, final=False)
        log.now += 0.25
    assert 95 <= log.num_looks <= 100
    assert log.output.getvalue() == "".join(f"line {n}\n" for n in range(log.num_looks))


def test_the_end_of_a_log_is_read_at_once() -> None:
    log = Log()
    log.read({}, final=False)
    log.read({}, final=True)
    assert log.num_looks == 2


def test_a_log_that_was_slow_once_is_read_again_within_a_quarter_of_a_minute() -> None:
    log = Log()
    log.look_s = 60.0
    log.read({}, final=False)
    log.look_s, log.now = 1.0, log.now + 15.0
    log.read({}, final=False)
    assert log.num_looks == 2
