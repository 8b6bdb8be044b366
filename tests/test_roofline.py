"""The estimate of a compiled program, from HLO whose kernels can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compiled, roofline
from simplest_vit.errors import UserError

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


SLICES = """HloModule m

%gathers (x: f32[100,8], y: f32[100,8], z: f32[100,8], rows: s32[5]) -> (f32[5,8], f32[8]) {
  %x = f32[100,8] parameter(0)
  %y = f32[100,8] parameter(1)
  %z = f32[100,8] parameter(2)
  %rows = s32[5] parameter(3)
  %sum = f32[100,8] add(%x, %y)
  %some = f32[5,8] gather(%sum, %rows), slice_sizes={1,8}
  %product = f32[100,8] multiply(%y, %z)
  %slice = f32[10,8] slice(%z), slice={[0:10], [0:8]}
  %zero = f32[] constant(0)
  %all = f32[8] reduce(%slice, %zero), dimensions={0}
  ROOT %t = (f32[5,8], f32[8]) tuple(%some, %all)
}

%scatters (x: f32[100,8], rows: s32[5], updates: f32[5,8]) -> f32[100,8] {
  %x.1 = f32[100,8] parameter(0)
  %rows.1 = s32[5] parameter(1)
  %updates = f32[5,8] parameter(2)
  %double = f32[5,8] add(%updates, %updates)
  ROOT %scatter = f32[100,8] scatter(%x.1, %rows.1, %double)
}

ENTRY %main (a: f32[100,8], b: f32[100,8], c: f32[100,8], r: s32[5], u: f32[5,8]) -> f32[100,8] {
  %a = f32[100,8] parameter(0)
  %b = f32[100,8] parameter(1)
  %c = f32[100,8] parameter(2)
  %r = s32[5] parameter(3)
  %u = f32[5,8] parameter(4)
  %f = (f32[5,8], f32[8]) fusion(%a, %b, %c, %r), kind=kLoop, calls=%gathers
  %g = f32[100,8] fusion(%a, %r, %u), kind=kLoop, calls=%scatters
  ROOT %h = f32[100,8] scatter(%g, %r, %u)
}
"""


def test_of_what_is_gathered_or_updated_only_the_rows_are_read():
    gathers, fused, alone = roofline.read(SLICES).kernels
    # Five rows of a and b after the sum, ten of c, the indices, and both results. The product is of no use.
    assert gathers.bytes == 4 * (5 * 8 + 5 * 8 + 10 * 8 + 5 + 5 * 8 + 8)
    assert fused.bytes == 4 * (5 + 5 * 8 + 5 * 8)
    assert alone.bytes == 4 * 2 * 5 * 8


def test_a_failure_of_xla_is_one_line():
    with pytest.raises(UserError, match=r"^XLA cannot compile this: .*No such compile option: 'nothing'$"):
        compiled.compile_for(jax.devices()[0], jax.jit(jnp.negative), jnp.ones(1), options={"nothing": True})
