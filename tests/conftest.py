"""Settings that every test shares: CPU, one thread, no network, no tracker account."""

import os
import signal
import sys

import pytest

# Before torch is imported: tiny models are about ten times slower on two threads than on one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)
os.environ["TOKENIZERS_PARALLELISM"] = "false"


# A shell starts background jobs with SIGINT ignored, and every child would inherit that: Ctrl-C is tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def environment_of_each_file():
    """Launchers' variables that training libraries set in this process do not reach the next file's children."""
    kept = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(kept)
    if torch := sys.modules.get("torch"):
        # DeepSpeed's ZeRO-3 puts its own in this place, which a compiled block of a later file would meet.
        torch.nn.functional.linear = torch._C._nn.linear


@pytest.fixture
def cli(tmp_path):
    """The command line over the toy recipe in a folder of the test's own."""
    from fake_chain import RECIPE, STAGES, write_recipe

    from pipelines.run import main

    def run(*argv, text=RECIPE):
        return main([*argv, "--pipeline", str(write_recipe(tmp_path, text)), "--runs", str(tmp_path / "runs")], STAGES)

    return run
