"""The emulator refuses what has no defined result on a GPU: a few instructions each, of PTX written here."""

import pytest
import torch

pytestmark = pytest.mark.emulated

# out[thread] = what the lane 32 places on (of two warps) or the next lane (of one) has put into shared memory
KERNEL = """
.visible .entry kernel(
  .param .u64 kernel_param_0
)
{
  .reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %rd<5>;
  ld.param.b64 %rd1, [kernel_param_0];
  mov.u32 %r1, %tid.x;
  shl.b32 %r2, %r1, 2;
  add.s32 %r3, %r2, BY;
  and.b32 %r4, %r3, MASK;
  cvt.u64.u32 %rd2, %r2;
  add.s64 %rd3, %rd1, %rd2;
  setp.eq.s32 %p1, %r1, 0;
  BODY
  ret;
}
"""
LOAD = "ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd3], %r5;"
COPY = "cp.async.ca.shared.global [%r2], [%rd3], 4;"


def run(body: str, warps: int = 1) -> torch.Tensor:
    """What the kernel leaves in out, which begins as 0, 1, 2 and so on."""
    from ptx.emulator import Device, Launch, Program
    from ptx.memory import GlobalMemory

    out = torch.arange(32 * warps, dtype=torch.int32)
    ptx = KERNEL.replace("BODY", body).replace("BY", "4" if warps == 1 else "128").replace("MASK", str(128 * warps - 1))
    program = Program(ptx, 128 * warps, warps, ["out"])
    Launch(program, [out.data_ptr()], GlobalMemory({"out": out}), (1, 1, 1), 0, warps, Device()).run()
    return out


@pytest.mark.parametrize(
    "body, warps",
    [
        (f"st.shared.b32 [%r2], %r1; bar.warp.sync -1; {LOAD}", 1),
        (f"st.shared.b32 [%r2], %r1; bar.sync 0; {LOAD}", 2),
        (f"{COPY} cp.async.commit_group; cp.async.wait_group 0; bar.sync 0; {LOAD}", 1),
    ],
    ids=["warp", "program", "copy"],
)
def test_barriers_order_accesses(body, warps):
    assert torch.equal(run(body, warps), torch.arange(32 * warps).roll(-1 if warps == 1 else 32).int())


@pytest.mark.parametrize(
    "body, warps, error",
    [
        (f"st.shared.b32 [%r2], %r1; {LOAD}", 1, "reads what another thread wrote"),
        (f"st.shared.b32 [%r2], %r1; bar.warp.sync -1; {LOAD}", 2, "reads what another thread wrote"),
        (f"st.shared.b32 [%r2], %r1; bar.warp.sync -1; {LOAD} st.shared.b32 [%r2], %r1;", 1, "what another thread read"),
        (f"{COPY} cp.async.commit_group; bar.sync 0; {LOAD}", 1, "reads bytes of a cp.async in flight"),
        (f"{COPY} cp.async.commit_group; cp.async.wait_group 1; bar.sync 0; {LOAD}", 1, "cp.async in flight"),
        (f"{COPY} {COPY}", 1, "two cp.async in flight to one byte"),
        ("st.shared.b32 [%r2+4], %r1;", 1, "shared address out of bounds"),
        ("ld.shared.v2.b32 {%r5, %r6}, [%r2+-4];", 1, "out of bounds"),
        ("@%p1 ld.shared.v2.b32 {%r5, %r6}, [%r2+4];", 1, "misaligned"),
        ("ld.global.b32 %r5, [%rd3+4];", 1, "byte 128 of out, which has 128"),
        ("st.global.b32 [%rd1], %r1;", 1, "different values to one byte of out"),
        ("st.global.b32 [%rd3], %r1; bar.sync 0; ld.global.b32 %r5, [%rd1];", 2, "stored to out in the same launch"),
        ("@%p1 bra $L_end; $L_end:", 1, "branch diverges"),
    ],
    ids=[
        *("no-barrier", "warp-barrier-only", "write-after-read", "no-wait", "wait-for-older", "two-copies"),
        *("shared-above", "shared-below", "shared-misaligned", "global-bounds", "global-conflict", "global-order", "branch"),
    ],
)
def test_undefined_results_are_refused(body, warps, error):
    from ptx.memory import EmulationError

    with pytest.raises(EmulationError, match=error):
        run(body, warps)
