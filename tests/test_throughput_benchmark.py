"""What `benchmarks/throughput.py` makes of a profile."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def throughput(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import throughput

    return throughput


def test_idle_time_is_what_no_kernel_of_any_stream_covers(throughput):
    # Ends at 12, the second stream's stretch lies within the first's: 12 to 15 and 20 to 21 are idle.
    assert throughput.idle_us([(15.0, 20.0), (0.0, 12.0), (3.0, 5.0), (21.0, 22.0)]) == 4.0
    assert throughput.idle_us([]) == 0.0


def test_kernels_are_counted_by_kind(throughput):
    assert throughput.kernel_class("nvjet_sm90_qrtst_128x160_TNT") == "matrix products"
    assert throughput.kernel_class("conv_silu_backward_kernel") == "convolution"
    assert throughput.kernel_class("cast_kernel") == "8-bit casts"
    assert throughput.kernel_class("Memset (Device)") == "other"
