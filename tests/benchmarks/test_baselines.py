"""That a benchmark says what got worse."""

from pathlib import Path

from benchmarks import baselines


def test_what_is_five_percent_below_its_baseline_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "baselines.json"

    def printed(ratio: float, *, kind: str = "amx", record: bool = False) -> str:
        return baselines.compared("training", ratio, record=record, kind=kind, path=path)

    assert "none for training on amx; --record writes it" in printed(2.0)
    assert "recorded" in printed(2.0, record=True)
    assert printed(1.91) == printed(3.0) == " baseline  2.00 on amx"
    assert "WORSE  training is 6% below the 2.00 recorded on amx" in printed(1.88)
    assert "none" in printed(2.0, kind="avx2")


def test_a_processor_is_known_by_the_most_that_it_can(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : sse2 avx2 avx512f avx512_bf16 amx_bf16\n", encoding="utf-8")
    assert baselines.processor(cpuinfo) == "amx"
    cpuinfo.write_text("flags : sse2 avx2\n", encoding="utf-8")
    assert baselines.processor(cpuinfo) == "avx2"
