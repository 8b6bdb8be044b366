"""The bound of a compiled program, from HLO whose kernels can be counted by hand."""

from benchmarks import roofline

HLO = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %y = f32[8] negate(%x)
  ROOT %t = (s32[], f32[8]) tuple(%n, %y)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]) parameter(0)
  ROOT %c = pred[] constant(false)
}

ENTRY %main (a: bf16[16,32], b: bf16[32,64], s: (s32[], f32[8])) -> bf16[16,64] {
  %a = bf16[16,32] parameter(0)
  %b = bf16[32,64] parameter(1)
  %s = (s32[], f32[8]) parameter(2)
  %w = (s32[], f32[8]) while(%s), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %u = (s32[], f32[8]) while(%w), condition=%condition, body=%body
  ROOT %d = bf16[16,64] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_launches_bytes_flops_and_waits_are_counted():
    program = roofline.read(HLO)
    known, unknown, product = program.kernels
    assert (known.times, known.bytes, unknown.times) == (5, 64, 1)
    assert program.host_waits == 1
    assert product.flops == {"bf16": 2 * 16 * 32 * 64}
    assert product.bytes == 2 * (16 * 32 + 32 * 64 + 16 * 64)
    assert product.seconds == product.bytes / roofline.BYTES_PER_S
    assert known.seconds == 5 * 64 / roofline.BYTES_PER_S
