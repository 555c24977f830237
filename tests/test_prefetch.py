"""Reading ahead: the same batches in the same order, faults where they are due, the wait counted."""

import threading
import time

import pytest

from data.prefetch import Prefetcher

ROWS = [slice(0, 2), slice(2, 4)]


class Source:
    """Remembers what it was asked for; each answer names its question."""

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def __call__(self, step, rows):
        if (step, rows.start) == self.fails_at:
            raise OSError(f"step {step}")
        self.asked.append((step, rows.start, rows.stop))
        return self.asked[-1]


def steps(batch, numbers):
    return [batch(step, rows) for step in numbers for rows in ROWS]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_every_call_is_answered_as_without(ahead):
    source = Source()
    batch = Prefetcher(source, steps=ahead, last_step=9)
    expected = [(step, rows.start, rows.stop) for step in range(9) for rows in ROWS]
    assert steps(batch, range(9)) == expected
    assert source.asked == expected, "each read once, none beyond the last step"
    batch.close()


def test_a_run_may_begin_anywhere_and_jump():
    batch = Prefetcher(Source(), steps=2, last_step=99)
    order = [5, 6, 7, 20, 21, 3, 4, 5]
    assert steps(batch, order) == [(step, rows.start, rows.stop) for step in order for rows in ROWS]
    assert batch(6, slice(0, 4)) == (6, 0, 4), "other rows than foreseen"
    batch.close()


def test_the_end_is_no_trap():
    batch = Prefetcher(Source(), steps=2, last_step=3)
    steps(batch, range(3))
    assert batch(3, ROWS[0]) == (3, 0, 2)
    batch.close()


def test_a_fault_comes_where_it_is_due_not_before():
    batch = Prefetcher(Source(fails_at=(4, 2)), steps=3, last_step=9)
    assert len(steps(batch, range(4))) == 8
    assert batch(4, ROWS[0]) == (4, 0, 2)
    with pytest.raises(OSError, match="step 4"):
        batch(4, ROWS[1])
    batch.close()


def test_the_position_is_that_of_the_batch_handed_out_not_of_the_one_read():
    # trap T6
    source = Source()
    batch = Prefetcher(source, steps=3, last_step=50, position=lambda: len(source.asked))
    for count in range(1, 21):
        batch((count - 1) // 2, ROWS[(count - 1) % 2])
        assert batch.position == count
    batch.close()


def test_no_thread_is_left_behind():
    before = threading.active_count()
    batch = Prefetcher(Source(), steps=2, last_step=10_000)
    steps(batch, range(3))
    assert threading.active_count() == before + 1
    batch.close()
    assert threading.active_count() == before


def test_waiting_is_counted():
    gate = threading.Event()

    def slow(step, rows):
        gate.wait(0.02)
        return step

    batch = Prefetcher(slow, steps=0, last_step=4)
    started = time.monotonic()
    for step in range(3):
        batch(step, slice(0, 1))
    assert 0.06 <= batch.waited_s <= time.monotonic() - started
