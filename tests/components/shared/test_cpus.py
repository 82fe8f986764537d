"""The class of a processor, from what Linux says of real ones: /proc/cpuinfo, cut to the flags that tell them apart."""

import pytest

from components.shared.machine import Cpu, cpu_of, this_cpu

SAPPHIRE_RAPIDS = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 avx avx2 fma avx512f avx512bw avx512_bf16 avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8
"""
ZEN_4 = """processor\t: 0
model name\t: AMD EPYC 9R14
flags\t\t: fpu sse2 avx avx2 fma avx512f avx512bw avx512_bf16 avx512_vnni
"""
CASCADE_LAKE = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz
flags\t\t: fpu sse2 avx avx2 fma avx512f avx512bw avx512_vnni
"""
ZEN_3 = """processor\t: 0
model name\t: AMD EPYC 7R13 Processor
flags\t\t: fpu sse2 avx avx2 fma vaes
"""
GRAVITON_3 = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes sve asimdfhm svei8mm svebf16 i8mm bf16
CPU implementer\t: 0x41
"""
GRAVITON_2 = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes atomics fphp asimdhp
CPU implementer\t: 0x41
"""


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "kind", "name"),
    [
        (SAPPHIRE_RAPIDS, "x86_64", "AMX", "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"),
        (ZEN_4, "x86_64", "AVX-512 BF16", "AMD EPYC 9R14"),
        (CASCADE_LAKE, "x86_64", "AVX-512", "Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz"),
        (ZEN_3, "x86_64", "AVX2", "AMD EPYC 7R13 Processor"),
        (GRAVITON_3, "aarch64", "ARM with BF16", "aarch64"),
        (GRAVITON_2, "aarch64", "ARM", "aarch64"),
        ("", "x86_64", "x86_64", "x86_64"),
        ("", "riscv64", "riscv64", "riscv64"),
    ],
)
def test_a_processor_is_named_by_what_it_makes_of_bfloat16(cpuinfo: str, machine: str, kind: str, name: str) -> None:
    assert cpu_of(cpuinfo, machine=machine, cores=2) == Cpu(name, kind, 2)


def test_this_machine_has_one_too() -> None:
    assert this_cpu().cores >= 1
    assert this_cpu().kind in this_cpu().summary
