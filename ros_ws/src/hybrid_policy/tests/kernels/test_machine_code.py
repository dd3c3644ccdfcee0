"""What the readers of machine code see, on a few lines of it."""

from .machine_code import overwritten_operands

LINES = """
.L_x_1:
        /*0000*/                   HGMMA.64x56x16.F32.BF16 R24, R72, gdesc[UR12], R24, gsb0 ;
        /*0010*/                   HGMMA.64x56x16.F32.BF16 R24, R68, gdesc[UR12], R24, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/              @P0 LDS.128 R{register}, [R121] ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/              @!P4 BRA `(.L_x_1) ;
"""


def test_a_write_to_what_a_product_reads_is_found():
    # 72 to 75: of the product that has ended; 68 to 71: of the one under way; a load of four from 66 reaches into them
    assert overwritten_operands(LINES.format(register=72)) == []
    assert overwritten_operands(LINES.format(register=76)) == []
    for register in (66, 68, 71):
        assert set(overwritten_operands(LINES.format(register=register))) == {f"@P0 LDS.128 R{register}, [R121] "}


def test_a_product_that_loops_back_without_a_wait_is_followed():
    endless = LINES.replace("        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n", "")
    early = endless.replace(".L_x_1:\n", ".L_x_1:\n        /*fff0*/                   IMAD.U32 R70, RZ, RZ, R1 ;\n")
    assert overwritten_operands(endless.format(register=76)) == []
    assert overwritten_operands(early.format(register=76)) == ["IMAD.U32 R70, RZ, RZ, R1 "]
