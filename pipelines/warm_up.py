"""``--warm-up --stage NAME``: compile and tune what a pretraining stage will run, and keep it; no artifact is made."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.chain import Chain, Node
from pipelines.preflight import refuse_early
from stages.base import EXIT_DONE, ConfigError, Fault
from stages.runtime import distributed
from stages.runtime.artifact import has_gpu


def warm(chain: Chain, names: Sequence[str]) -> int:
    """Warm up the one stage in ``names`` and return the exit code 0.

    Raises:
        ConfigError: for a stage that cannot be warmed up, and for what a run would refuse.
    """
    node = _node(chain, names)
    refuse_early(chain, [node], distributed.world_size(), has_gpu())
    assert node.job.model is not None, "check() refuses a recipe without a model"
    with distributed.note_launcher():
        distributed.settle_threads()
        from stages.runtime.warm_up import warm_up

        warm_up(node.stage.fitted(node.job.config, distributed.world_size()), node.job.model, node.job.seed)
    return EXIT_DONE


def _node(chain: Chain, names: Sequence[str]) -> Node:
    node = chain.nodes[names[0]]
    if len(names) > 1 or node.job.kind != "pretrain":
        message = f"must name one pretrain stage with --warm-up; got {', '.join(names)}; fine-tuning does not compile"
        raise ConfigError(Fault("--stage", message))
    return node
