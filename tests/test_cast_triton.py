"""The kernel that casts to 8 bits and turns, interpreted: every number in its place, and the scale.

The interpreter rounds to 8 bits wrongly, so the numbers here are powers of two; rounding is tests/test_gpu_fp8.py's.
"""

import pytest
import torch
from triton_cases import kernels

from model import fp8


# The last has more tiles below each other than are taken before the next column of tiles.
@pytest.mark.parametrize("shape", [(16, 16), (130, 70), (256, 48), (1300, 200)])
@pytest.mark.parametrize("dtype", [fp8.FORWARD, fp8.BACKWARD])
def test_each_number_is_in_both_places_at_its_scale(shape, dtype):
    exponents = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(1))
    signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    x = (signs * 2.0**exponents).bfloat16()
    x[1, 2] = torch.finfo(dtype).max / 2  # so the scale is two
    wide = [-(-size // 16) * 16 for size in shape]
    narrow, turned, unscale = kernels("cast_triton").cast_by(x, x.abs().amax(-1), dtype, 1e-12, *wide)
    expected = torch.zeros(wide)
    expected[: shape[0], : shape[1]] = 2 * x.float()
    assert unscale == 0.5
    assert torch.equal(narrow.float(), expected)
    assert torch.equal(turned.float(), expected.T)


def test_other_precisions_are_refused():
    with pytest.raises(TypeError, match=r"half precision; got torch\.float32"):
        kernels("cast_triton").cast_by(torch.zeros(16, 16), torch.zeros(16), fp8.FORWARD, 1e-12, 16, 16)
