"""What a stage's ending says of the errors whose own words help nobody."""

import pytest

from stages.runtime.audit import AuditError
from stages.runtime.faults import ending_of
from stages.runtime.guards import TooManySkippedSteps
from stages.runtime.parity import ParityError

GLOO = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:4711: Connection reset by peer. GLHF!"


@pytest.mark.parametrize(
    "said", [GLOO, "gloo/pair.cc: Read error: GLHF!", "NCCL error: remote process exited or there was a network error"]
)
def test_a_rank_that_died_is_told_as_such_by_the_others(said, tmp_path):
    ending = ending_of(RuntimeError(said), "sft", tmp_path)
    assert (ending.state, ending.code, ending.quiet) == ("failed", 1, True)
    assert ending.lines[0].startswith("sft failed: another rank is gone")
    assert "GLHF" not in ending.lines[0]


def test_any_other_failure_keeps_its_own_words(tmp_path):
    ending = ending_of(RuntimeError("shape mismatch in gloo test"), "sft", tmp_path)
    assert ending.lines == ["sft failed: RuntimeError: shape mismatch in gloo test"]


@pytest.mark.parametrize("kind", [AuditError, ParityError, TooManySkippedSteps])
def test_a_stage_that_judges_its_own_work_says_so_in_one_line(kind, tmp_path):
    ending = ending_of(kind("nothing was learnt; train longer"), "sft", tmp_path)
    assert ending.lines == ["sft failed: nothing was learnt; train longer"]
    assert (ending.code, ending.quiet) == (1, True)
    assert "nothing was learnt" in ending.traceback  # kept for the log
