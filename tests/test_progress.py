"""The line of progress says when the first checkpoint is due, and nothing of checkpoints where there are none."""

import io

import pytest

from stages.runtime.progress import Progress

FACTS = {"tokens_per_step": 1, "flops_per_token": 1.0, "world_size": 1, "peak": None, "quiet": False}


def line(step, every, saved=None, max_steps=140):
    progress = Progress(max_steps=max_steps, **FACTS, stream=io.StringIO(), checkpoint_every_steps=every)
    figures = {"tokens_per_s": 1.0} | ({} if saved is None else {"checkpoint_age_s": saved})
    return progress.line(step, 1.0, 1e-3, figures, 0)


@pytest.mark.parametrize(
    ("step", "every", "saved", "end"),
    [
        (10, 50, None, "1 tok/s  first checkpoint at step 50"),
        (50, 50, None, "1 tok/s  first checkpoint at step 50"),
        (51, 50, None, "1 tok/s  first checkpoint at step 100"),
        (60, 50, 42.0, "1 tok/s  saved 42s ago"),
        (10, 0, None, "1 tok/s"),
        (10, 140, None, "1 tok/s"),
        (10, 500, None, "1 tok/s"),
    ],
)
def test_what_the_line_says_of_checkpoints(step, every, saved, end):
    assert line(step, every, saved).endswith(end)
    assert "no checkpoint" not in line(step, every, saved)
