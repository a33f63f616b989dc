"""The common path of a compiled kernel, found on snippets of machine code."""

import textwrap

import pytest

pytest.importorskip("triton")

from tools.compiled.common_path import CommonPath, Work, common_path
from tools.compiled.disassembly import parse_amdgcn, parse_sass, reading

# ---- the path, NVIDIA -----------------------------------------------------------------------------------------------


def sass(*lines: str):
    """Code of a kernel `k` from lines "label:", "//## ..." or an instruction."""
    text = ['\t.section\t.text.k,"ax",@progbits', '\t.sectioninfo\t@"SHI_REGISTERS=8"', "k:", ".text.k:"]
    for i, line in enumerate(lines):
        plain = line.endswith(":") or line.startswith("//##")
        text.append(line if plain else f"        /*{16 * i:04x}*/                   {line} ;")
    return parse_sass("\n".join([*text, "\t.section\t.nv.info", "        /*0000*/    EXIT ;"]), "k")


def texts(path: CommonPath) -> list[str]:
    return [x.text for x in path.instructions]


def test_common_path_takes_wide_accesses_and_leaves_early_exits_tails_and_slow_paths():
    code = sass(
        "LDG.E.64 R2, desc[UR4][R4.64]",
        "@P0 EXIT",
        "@!P1 BRA `(.L_x_0)",
        "I2F.U32.RP R8, R9",
        "LDG.E.64 R4, desc[UR4][R4.64]",
        ".L_x_0:",
        "@P0 LDG.E.128 R16, desc[UR4][R2.64]",
        "@P0 BRA `(.L_x_1)",
        "LDG.E.U16 R16, desc[UR4][R2.64]",
        ".L_x_1:",
        "MUFU.RSQ R7, R8",
        "BSSY B0, `(.L_x_2)",
        "@!P1 BRA `(.L_x_3)",
        "MOV R9, 0x100",
        "CALL.REL.NOINC `($slow)",
        "BRA `(.L_x_4)",
        ".L_x_3:",
        "FMUL R1, R8, R7",
        ".L_x_4:",
        "BSYNC B0",
        ".L_x_2:",
        "@P0 STG.E.128 desc[UR4][R2.64], R16",
        "@P0 EXIT",
        "@P2 STG.E.U16 desc[UR4][R2.64], R16",
        "EXIT",
        "$slow:",
        "FADD R1, R1, R1",
        "RET.REL.NODEC R9 `(k)",
        ".L_x_5:",
        "BRA `(.L_x_5)",
    )
    path = common_path(code, Work(8, read=128, written=128))
    assert texts(path) == [
        "LDG.E.64 R2, desc[UR4][R4.64]",
        "@P0 EXIT",
        "@!P1 BRA `(.L_x_0)",
        "@P0 LDG.E.128 R16, desc[UR4][R2.64]",
        "@P0 BRA `(.L_x_1)",
        "MUFU.RSQ R7, R8",
        "BSSY B0, `(.L_x_2)",
        "@!P1 BRA `(.L_x_3)",
        "FMUL R1, R8, R7",
        "BSYNC B0",
        "@P0 STG.E.128 desc[UR4][R2.64], R16",
        "@P0 EXIT",
    ]
    assert (path.slots, path.times, path.mma) == (12, (), 0)
    assert (path.load_bits, path.store_bits) == (128, 128)
    # Where more has to be read, the narrower loads are part of it.
    assert common_path(code, Work(8, read=256, written=128)).load_bits == 64
    assert common_path(code, Work(8, read=1024, written=128)).load_bits == 0


def test_an_unavoidable_call_costs_its_shortest_way_and_a_call_of_a_block_is_a_jump():
    code = sass(
        "CALL.REL.NOINC `($helper)",
        "@!P0 CALL.REL.NOINC `(.L_x_1)",
        "BRA `(.L_x_0)",
        ".L_x_0:",
        "NOP",
        "NOP",
        ".L_x_1:",
        "STG.E.128 desc[UR4][R2.64], R4",
        "EXIT",
        "$helper:",
        "@P0 BRA `(.L_x_2)",
        "NOP",
        ".L_x_2:",
        "RET.REL.NODEC R4 `(k)",
    )
    path = common_path(code, Work(8, written=128))
    assert [x.split()[0] for x in texts(path)] == ["CALL.REL.NOINC", "@!P0", "STG.E.128", "EXIT"]
    assert path.slots == 4 + 2


def test_work_on_every_weight_behind_a_branch_counts_and_rare_cases_do_not():
    work = ["FFMA R1, R1, R2, R3"] * 8
    rare = ["FMUL R1, R1, R2", "F2I.NTZ R1, R1", "FADD R1, R1, R2"]
    code = sass(
        "@!P0 BRA `(.L_x_0)",
        *work,
        ".L_x_0:",
        "@!P1 BRA `(.L_x_1)",
        *rare,
        ".L_x_1:",
        "STG.E.128 desc[UR4][R2.64], R4",
        "EXIT",
    )
    assert common_path(code, Work(8, written=128)).slots == 1 + 8 + 1 + 2
    assert common_path(code, Work(32, written=128)).slots == 1 + 1 + 2


LOOPS = (
    "@!P0 BRA `(.L_x_9)",  # no stage
    ".L_x_1:",
    "IADD3 R1, R1, 0x1, RZ",
    "@!P1 BRA `(.L_x_3)",  # no draw
    ".L_x_2:",
    *["FFMA R1, R1, R2, R3"] * 4,
    "@P2 BRA `(.L_x_2)",
    ".L_x_3:",
    "HMMA.16816.F32.BF16 R4, R4, R8, R4",
    "@P3 BRA `(.L_x_1)",
    ".L_x_9:",
    "STG.E.128 desc[UR4][R2.64], R4",
    "EXIT",
)


def test_bodies_of_loops_over_weights_are_weighed_by_their_times():
    def path(*times: int) -> CommonPath:
        return common_path(sass(*LOOPS), Work(8, written=128, loops=times, fixed=2))

    assert path(1, 1).slots == 1 + 2 + 5 + 2 + 2
    assert path(3, 10).slots == 1 + 3 * (2 + 10 * 5 + 2) + 2
    assert path(3, 10).mma == 1 and path(3, 10).stored(128) == 128
    for times in ((), (1,), (1, 1, 1)):
        with pytest.raises(ValueError, match=f"2 loops over weights, {len(times)} are expected"):
            common_path(sass(*LOOPS), Work(8, written=128, loops=times, fixed=len(times)))


def test_a_loop_left_at_its_head_and_one_that_only_waits():
    code = sass(
        "BRA `(.L_x_0)",
        ".L_x_0:",
        "ISETP.GE.AND P0, PT, R1, R2, PT",
        "@P0 BRA `(.L_x_1)",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "STG.E.128 desc[UR4][R2.64], R4",
        "BRA `(.L_x_0)",
        ".L_x_1:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0",
        "@!P0 BRA `(.L_x_1)",
        "EXIT",
    )
    path = common_path(code, Work(8, read=7 * 128, written=7 * 128, loops=(7,), fixed=1))
    assert path.slots == 1 + 7 * 5 + 3
    assert path.loaded(128) == path.stored(128) == 7 * 128


@pytest.mark.parametrize(("peeled", "each", "times"), [(0, 1, 4), (0, 2, 2), (1, 1, 3), (4, 0, None)])
def test_times_of_loops_that_the_compiler_unrolled_or_peeled(peeled, each, times):
    store = "STG.E.128 desc[UR4][R2.64], R4"
    loop = [".L_x_0:", *[store] * each, "@P0 BRA `(.L_x_0)"] if each else []
    path = common_path(sass(*[store] * peeled, *loop, "EXIT"), Work(8, written=4 * 128, loops=(4,), fixed=0))
    assert path.times == (() if times is None else (times,))
    assert path.stored(128) == 4 * 128
    assert path.slots == peeled + (times or 0) * (each + 1) + 1


def test_masked_tails_are_left_out_with_the_loops_in_them():
    narrow = [x.replace("STG.E.128", "NOP").replace("_x_", "_x_4") for x in LOOPS[:-1]]
    code = sass(
        *LOOPS[:-1],
        "@!P0 BRA `(.L_x_8)",
        *["FFMA R1, R1, R2, R3"] * 8,
        ".L_x_7:",
        *narrow,
        "@P3 STG.E.U16 desc[UR4][R2.64], R4",
        "@P4 BRA `(.L_x_7)",
        ".L_x_8:",
        "EXIT",
    )
    path = common_path(code, Work(8, written=128, loops=(1, 1), fixed=2))
    assert path.slots == 1 + 2 + 5 + 2 + 1 + 1 + 1
    assert path.store_bits == 128 and not any(x.store == 16 for x in path.instructions)


def test_narrow_stores_that_cannot_be_avoided_are_an_error():
    code = sass("STG.E.128 desc[UR4][R2.64], R4", "@P3 STG.E.U16 desc[UR4][R2.64], R4", "EXIT")
    with pytest.raises(ValueError, match="less than 128 bits"):
        common_path(code, Work(8, written=128))


def test_only_loads_of_named_calls_are_loads_of_weights():
    code = sass(
        '//## File "/x/k.py", line 5 inlined at "/x/k.py", line 20',
        '//## File "/x/k.py", line 20',
        "LDG.E.128 R4, desc[UR4][R2.64]",
        '//## File "/x/k.py", line 6 inlined at "/x/k.py", line 21',
        '//## File "/x/k.py", line 21',
        "LDG.E.64 R4, desc[UR4][R2.64]",
        "LDG.E.64 R4, desc[UR4][R2.64]",
        '//## File "/x/k.py", line 22',
        "EXIT",
    )
    assert [x.places for x in code.instructions] == [("k.py:5", "k.py:20"), *[("k.py:6", "k.py:21")] * 2, ("k.py:22",)]
    assert common_path(code, Work(8, read=128)).load_bits == 128
    assert common_path(reading(code, {"k.py:21"}), Work(8, read=128)).load_bits == 64


def test_what_cannot_be_followed_is_an_error():
    with pytest.raises(ValueError, match="cannot follow 'BRX"):
        sass("BRX R2 -0x10", "EXIT")
    with pytest.raises(ValueError, match="cannot follow"):
        common_path(sass("CALL.ABS.NOINC R4", "EXIT"), Work(8))
    with pytest.raises(ValueError, match="no code of other"):
        parse_sass("\t.section\t.text.k,\n\tEXIT", "other")
    with pytest.raises(ValueError, match="no instruction of k"):
        sass()
    with pytest.raises(ValueError, match="no way"):
        common_path(sass(".L_x_0:", "BRA `(.L_x_0)"), Work(8))


# ---- the path, AMD --------------------------------------------------------------------------------------------------


def amdgcn(text: str):
    return parse_amdgcn(textwrap.dedent(text), "k")


def test_common_path_of_amdgcn():
    code = amdgcn("""
        \t.globl\tk
        k:                                      ; @k
        .Lfunc_begin0:
        \t.cfi_startproc
        \ts_load_dwordx2 s[2:3], s[0:1], 0x0
        \ts_cbranch_scc0 .LBB0_2
        ; %bb.1:
        \ts_endpgm
        .LBB0_2:
        \t.loc\t2 34 12 is_stmt 1               ; tiles.py:34:12 @[ dense.py:94:31 @[ dense.py:100:5 ] ]
        \tglobal_load_dword v9, v0, s[2:3]
        \ts_cbranch_vccz .LBB0_3
        .LBB0_4:                                ; one address of a wave after the other
        \tv_readfirstlane_b32 s8, v18
        \tbuffer_load_dwordx4 v[0:3], v12, s[8:11], 0 offen
        \ts_cbranch_execnz .LBB0_4
        .Ltmp3:
        \ts_branch .LBB0_5
        .LBB0_3:
        \tglobal_load_ushort v0, v[2:3], off
        .LBB0_5:
        \tv_pk_fma_f32 v[0:1], v[0:1], v[2:3], v[4:5]
        \tv_mfma_f32_32x32x8_bf16 v[2:17], v[18:19], v[106:107], 0
        \tglobal_store_dwordx2 v[4:5], v[0:1], off
        \tglobal_store_dwordx2 v[4:5], v[2:3], off offset:2048
        \ts_endpgm
        .Lfunc_end0:
        \ts_nop 0
    """)
    assert code.instructions[3].places == ("tiles.py:34", "dense.py:94", "dense.py:100")
    path = common_path(code, Work(8, read=128, written=128))
    assert [x.split()[0] for x in texts(path)] == [
        "s_load_dwordx2",
        "s_cbranch_scc0",
        "global_load_dword",
        "s_cbranch_vccz",
        "v_readfirstlane_b32",
        "buffer_load_dwordx4",
        "s_cbranch_execnz",
        "s_branch",
        "v_pk_fma_f32",
        "v_mfma_f32_32x32x8_bf16",
        "global_store_dwordx2",
        "global_store_dwordx2",
        "s_endpgm",
    ]
    assert (path.times, path.mma, path.load_bits, path.store_bits) == ((), 1, 128, 64)


def test_amdgcn_widths():
    names = [
        "global_load_dwordx3",
        "global_load_ubyte",
        "flat_load_short_d16_hi",
        "buffer_load_dword",
        "global_load_b128",
    ]
    code = amdgcn(
        "k:\n" + "".join(f"\t{name} v0, v1\n" for name in names) + "\tscratch_store_dword off, v0\n\ts_endpgm\n"
    )
    assert [x.load for x in code.instructions] == [96, 8, 16, 32, 128, 0, 0]
    assert [x.local for x in code.instructions] == [False] * 5 + [True, False]
    with pytest.raises(ValueError, match="cannot follow 's_setpc"):
        amdgcn("k:\n\ts_setpc_b64 s[30:31]\n")
