"""What nvcc makes of the CUDA kernels: no slower machine code than before, on any device."""

from __future__ import annotations

import json

import machine_code
import pytest
import resources

# An outer loop (.L_x_1) whose inner loop (.L_x_2) spills, and a piece of the inner one that lies behind the end.
LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_1:
        /*0020*/                   STL [R1], R2 ;
.L_x_2:
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
        /*0040*/                   BRA.DIV UR4, `(.L_x_4) ;
.L_x_3:
        /*0050*/                   IMMA.16832.U8.S8 R4, R8.ROW, R10.COL, R4 ;
        /*0060*/                   LDL R5, [R1+0x4] ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/                   LDL.LU R5, [R1] ;
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   LDSM.16.MT88.4 R4, [R5] ;
        /*00c0*/                   BRA `(.L_x_3) ;
"""


def test_loops_are_found_in_machine_code() -> None:
    blocks = machine_code.functions(LISTING)["kernel"]
    inner, outer = sorted(
        [name for number in sorted(loop) for name in blocks[number].names] for loop in machine_code.loops(blocks)
    )
    assert outer[0] == "STL" and "LDL.LU" in outer and "EXIT" not in outer
    assert inner == [
        "LDGSTS.E.BYPASS.LTC128B.128",
        "BRA.DIV",
        "IMMA.16832.U8.S8",
        "LDL",
        "BRA",
        "LDSM.16.MT88.4",
        "BRA",
    ]


def test_what_speed_rests_on_is_counted() -> None:
    assert machine_code.summarize(machine_code.functions(LISTING)["kernel"]) == {
        "16-byte copies": 1,
        "other copies": 0,
        "mma": 1,
        "ldmatrix": 1,
        "spills in inner loops": 1,
    }


def test_kernels_take_no_more_than_the_table_says() -> None:
    try:
        lines = resources.differences()
    except resources.NotComparedError as error:
        pytest.skip(str(error))
    assert not lines, "python cuda/check/resources.py --write makes the table anew:\n" + "\n".join(lines)


def test_codes_are_copied_and_multiplied_as_the_hardware_does_best() -> None:
    devices = json.loads(resources.TABLE.read_text())["kernels"]["delta_multiply"]
    assert len(devices) == len(resources.CAPABILITIES)
    for counts in devices.values():
        assert counts["16-byte copies"] and counts["mma"] and counts["ldmatrix"] and "other copies" not in counts
