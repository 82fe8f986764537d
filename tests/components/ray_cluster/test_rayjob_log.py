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


def test_reading_a_log_takes_a_tenth_of_the_time_and_its_end_is_read_at_once() -> None:
    log = Log()
    while log.now < 1000:
        log.read({}, final=False)
        log.now += 0.25
    assert 95 <= log.num_looks <= 100
    log.read({}, final=True)
    assert log.output.getvalue() == "".join(f"line {n}\n" for n in range(log.num_looks))
    log.look_s = 60.0  # one slow look delays the next by a quarter of a minute
    log.read({}, final=True)
    num_looks, log.now = log.num_looks, log.now + 15.0
    log.read({}, final=False)
    assert log.num_looks == num_looks + 1
