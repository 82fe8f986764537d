"""This machine and process. Processors are those of what Linux says of real ones, cut to the flags that differ."""

import os
import subprocess

import pytest

from components.shared.machine import Cpu, account, cpu_of, in_environment, this_cpu

X86 = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu sse2 {}\n"
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd evtstrm {}\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "kind", "name"),
    [
        pytest.param(X86.format("avx2 avx512f avx512_bf16 amx_bf16"), "x86_64", "AMX", "Xeon", id="Sapphire Rapids"),
        pytest.param(X86.format("avx2 avx512f avx512_bf16"), "x86_64", "AVX-512 BF16", "Xeon", id="Zen 4"),
        pytest.param(X86.format("avx2 fma avx512f avx512_vnni"), "x86_64", "AVX-512", "Xeon", id="Cascade Lake"),
        pytest.param(X86.format("avx2 fma vaes"), "x86_64", "AVX2", "Xeon", id="Zen 3"),
        pytest.param(ARM.format("svebf16 i8mm bf16"), "aarch64", "ARM with BF16", "aarch64", id="Graviton 3"),
        pytest.param(ARM.format("asimdhp"), "aarch64", "ARM", "aarch64", id="Graviton 2"),
        ("", "x86_64", "x86_64", "x86_64"),
        ("", "riscv64", "riscv64", "riscv64"),
    ],
)
def test_a_processor_is_named_by_what_it_makes_of_bfloat16(cpuinfo: str, machine: str, kind: str, name: str) -> None:
    assert cpu_of(cpuinfo, machine=machine, cores=2) == Cpu(name, kind, 2)
    assert this_cpu().cores >= 1


def test_the_environment_names_who_works_here_and_else_the_machine_does() -> None:
    assert account({"FINELOOP_USER": "ann", "USER": "bob"}) == "ann"
    assert account({"USER": "", "LOGNAME": "bob"}) == "bob"
    assert account({}) == subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def test_variables_are_set_inside_and_as_before_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELD", "before")
    monkeypatch.delenv("UNSET", raising=False)
    with in_environment({"HELD": "inside"}):
        assert os.environ["HELD"] == "inside"
    assert os.environ["HELD"] == "before"
    with pytest.raises(KeyError), in_environment({"HELD": "inside", "UNSET": "inside"}):
        raise KeyError
    assert os.environ["HELD"] == "before"
    assert "UNSET" not in os.environ
    with in_environment({"UNSET": "inside"}):
        del os.environ["UNSET"]  # as whoever runs inside may
    assert "UNSET" not in os.environ
