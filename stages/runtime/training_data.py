"""Where a pretraining run's batches come from: shards or a stream, read ahead, and where they stand in a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.loader import SHARE_TOKENS, MixtureLoader
from data.prefetch import Prefetcher
from data.stream import StreamLoader, is_stream
from stages.base import ConfigError, Fault, StageContext
from stages.runtime import distributed, mixture_settings

POSITION = "data"
"""Where a checkpoint's state keeps the place of a stream."""


class TrainingData:
    """The training side of a run's data; ``batch`` is what the loop calls.

    Raises:
        ConfigError: for a mixture, a length or a packing that the data do not fit.
    """

    def __init__(self, context: StageContext) -> None:
        config, folder = context.config, context.parent_output("data")
        try:
            self.loader = _open(folder, context)
            self.plan = self.loader.plan(config.max_steps)
        except DataError as error:
            raise ConfigError([Fault(field or "data", message) for field, message in error.faults]) from error
        except ValueError as error:
            raise ConfigError(Fault("data", str(error))) from error
        self.info, self.max_steps = self.loader.info, config.max_steps
        self.stream = self.loader if isinstance(self.loader, StreamLoader) else None
        self.batch = Prefetcher(
            self.loader.batch,
            steps=config.prefetch_steps,
            last_step=config.max_steps,
            position=self.stream.position if self.stream else lambda: None,
        )

    @property
    def waited_s(self) -> float:
        """Seconds that steps waited for their batches, all together, on this rank."""
        return self.batch.waited_s

    def facts(self, plain: Mapping[str, Any]) -> Mapping[str, Any]:
        """``plain``, and a stream's place at the moment when a checkpoint asks for it; asking is collective."""
        return _LiveFacts(plain, self) if self.stream else plain

    def position(self) -> dict[str, Any]:
        """Where all lanes of the stream stand after the last batch that was handed out; collective."""
        assert self.stream is not None, "shards have no place but the step"
        mine = self.stream.position() if self.batch.position is None else self.batch.position
        return {lane: place for part in distributed.all_gather(mine) for lane, place in part.items()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds; shards follow the step alone."""
        if self.stream is not None:
            self.stream.restore(saved[POSITION])

    def ending(self) -> list[str]:
        """A line for each source of a stream: passes that are done, documents left out by rule; collective."""
        if self.stream is None:
            return []
        lanes = list(self.position().values())
        reports = distributed.all_gather(self.stream.report())
        lines = []
        for name in self.plan:
            done = [lane["sources"][name]["number"] for lane in lanes]
            rules = sum((Counter(report[name]) for report in reports), Counter[str]())
            lost = ", ".join(f"{rule} {count:,}" for rule, count in rules.most_common()) or "nothing"
            lines.append(f"source {name}: {min(done)} to {max(done)} passes done in its lanes, left out: {lost}")
        return lines

    def close(self) -> None:
        """End reading ahead, by thread and by process."""
        self.batch.close()
        if self.stream is not None:
            self.stream.close()

    def lines(self) -> Iterator[str]:
        """What the run will read, a line a source, and how exactly shares hold."""
        for name, figures in self.plan.items():
            if "epochs" in figures:
                read = f"{figures['epochs']:.2f} epochs"
                read += f", {figures['padding']:.2%} of its rows padding" if figures["padding"] else ""
            else:
                read = f"streamed, at most {figures['passes']:.0f} passes"
            yield (
                f"  source {name}: share {figures['share_realised']:.2%} (asked {figures['share_asked']:.2%}), "
                f"{figures['tokens']:,.0f} tokens, {read}"
            )
        for phase, shares in zip(self.loader.mixture.phases[1:], self.loader.phase_shares[1:], strict=True):
            asked = ", ".join(f"{name} {share:.2%}" for name, share in shares.items() if share)
            yield f"  from step {phase.from_step}: {asked}"
        error = self.loader.worst_share_error()
        yield f"  shares hold to {error:.3%} over any {SHARE_TOKENS:,} tokens of a phase"


class _LiveFacts(Mapping[str, Any]):
    """Facts of which one, the stream's place, is looked up when it is asked for."""

    def __init__(self, plain: Mapping[str, Any], data: TrainingData) -> None:
        self._plain, self._data = plain, data

    def __getitem__(self, name: str) -> Any:
        return self._data.position() if name == POSITION else self._plain[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._plain, POSITION])

    def __len__(self) -> int:
        return len(self._plain) + 1


def _open(folder: Path, context: StageContext) -> MixtureLoader | StreamLoader:
    config = context.config
    common: dict[str, Any] = {
        "seq_len": config.seq_len,
        "global_batch_size": config.global_batch_size,
        "seed": context.seed,
        "mixture": mixture_settings.mixture(config),
    }
    if not is_stream(folder):
        if config.data_workers:
            raise DataError([("data_workers", mixture_settings.SHARD_WORKERS.format(config.data_workers))])
        if config.passes:
            raise DataError([("passes", mixture_settings.SHARD_PASSES.format(", ".join(config.passes)))])
        return MixtureLoader(folder, max_epochs=config.max_epochs, packing=config.packing, **common)
    if config.packing != "cut":
        raise DataError([("packing", mixture_settings.STREAM_PACKING.format(config.packing))])
    lanes, ranks = StreamLoader.lanes_of(folder), distributed.world_size()
    if lanes % ranks:
        message = f"must be read by a number of ranks that divides the stream's {lanes} lanes; got {ranks}"
        raise DataError([("data", f"{message}; start another number, or set lanes in the stream stage")])
    # Every rank speaks for its own lanes.
    common |= {"stage": config.data, "cache": context.cache / "hub", "say": lambda line: print(line, flush=True)}
    common["passes"] = config.passes
    if not config.data_workers:
        return StreamLoader(folder, **common)
    from data.stream_workers import ParallelStream

    share = lanes // ranks
    own = range(share * distributed.rank(), share * (distributed.rank() + 1))
    ahead = config.prefetch_steps
    return ParallelStream(folder, lanes=own, workers=config.data_workers, steps_ahead=ahead, **common)
