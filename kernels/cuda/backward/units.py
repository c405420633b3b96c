"""The unit that dS is counted in where it is rounded to float16.

dS has the size of dO times that of v, and P spreads it over the selected keys. If a loss is a mean over a batch, dO
may be 1e-6, and then float16 holds no digit of dS; scaled up for mixed precision it may be 1e4. So dS is divided by a
power of two near the largest dO of its rows, which changes no digit, and the sum is multiplied by it in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def half_unit(peak):
    """Return a power of two, 2 to 4 times peak, the largest |dO|, and its inverse; 1 if peak is 0, NaN or inf.

    A row's dO . v is then at most half the sum of |v| over its dims, in units.
    """
    power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 4.0
    # a gradient that is not finite stays so, by itself
    power = tl.where((power > 0.0) & (power < 1e30), power, 1.0)
    return power, 1.0 / power
