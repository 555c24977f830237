"""Training batches from a pure stream: nothing staged on disk, shares exact by rows, a place that resumes exactly.

A step's rows are divided into lanes. Row n of the run belongs to the source that the mixture's schedule gives it
(``data.mix``) and is the next row of that source in its lane (``data.stream_reader``). A rank reads the lanes of its
rows alone, and what it read is told by lane, so that another number of ranks goes on where these stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.clean_decontaminate import ContaminationIndex
from data.encoding import Encoder
from data.errors import DataError
from data.heldout import HeldoutSet
from data.heldout_split import HeldoutIndex
from data.loader import SHARE_TOKENS, Batch, asked_shares, check_rows, check_sizes, make_batch, no_row
from data.mix import hash64
from data.mixture import Mixture, cell_of
from data.shards import read_info
from data.source_config import FilesSource
from data.sources import source_revision
from data.stream_config import StreamSettings
from data.stream_reader import Document, SourceLane, is_held_out

STREAM_FILE, CONTAMINATION_FILE = "stream.json", "contamination.npz"
"""Settings and seed; the runs of words of evaluation sets, where there are any."""


def is_stream(tokens_dir: Path | str) -> bool:
    """Whether a tokens artifact is a frozen held-out set with a stream to train on, rather than shards."""
    return (Path(tokens_dir) / STREAM_FILE).is_file()


class StreamLoader:
    """The stream of a tokens artifact, read forwards.

    Args:
        tokens_dir: output folder of the ``stream`` stage.
        seq_len: T, tokens a row.
        global_batch_size: rows an optimizer step, over all ranks and micro-steps.
        seed: of the order.
        mixture: what shares are asked for, step by step; without weights there must be one source.
        passes: how often sources may be read, over what the stream was frozen with; no row before an end depends on it.
        stage: name of the stage that froze the stream, by which its fields are told.
        cache: folder for what the hub's client keeps.
        say: receives a line when a pass of a source ends.

    Raises:
        ValueError: naming the field that does not fit; a ``DataError`` for the mixture and the sources.
    """

    def __init__(
        self,
        tokens_dir: Path | str,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        mixture: Mixture | None = None,
        passes: Mapping[str, int] | None = None,
        stage: str = "stream",
        cache: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        check_sizes(seq_len, global_batch_size)
        self.info, self.seq_len, self.global_batch_size = read_info(tokens_dir), seq_len, global_batch_size
        facts = json.loads((self.info.directory / STREAM_FILE).read_text(encoding="utf-8"))
        self.settings, self.mixture = StreamSettings.model_validate(facts["settings"]), mixture or Mixture()
        self._seed, self._stage, self._cache, self._say = seed, stage, cache, say
        self._check(facts, passes or {})
        self._passes = self.settings.passes | dict(passes or {})
        one_each = {source.name: 1 for source in self.settings.sources}
        self.phase_shares = self.mixture.shares(self.info.sources, one_each, seq_len * global_batch_size)
        self._names = [name for name in one_each if any(phase[name] for phase in self.phase_shares)]
        self._schedule = self.mixture.schedule(self.phase_shares, dict.fromkeys(self._names, 1.0), global_batch_size)
        tokenizer = self.info.directory / "tokenizer"
        self._encoder = Encoder(tokenizer, seed=facts["seed"], chat_share=self.settings.chat_share)
        texts = (text.decode() for text in HeldoutSet(self.info.directory).texts())
        self._heldout = HeldoutIndex(self.settings.ngram, texts)
        items = self.info.directory / CONTAMINATION_FILE
        self._contamination = ContaminationIndex.load(items) if items.is_file() else None
        self._rows_a_lane = global_batch_size // self.settings.lanes
        self._lanes: dict[int, _Lane] = {}
        self._restored: Mapping[str, Any] = {}

    @staticmethod
    def lanes_of(tokens_dir: Path | str) -> int:
        """The number of lanes of a tokens artifact's stream."""
        facts = json.loads((Path(tokens_dir) / STREAM_FILE).read_text(encoding="utf-8"))
        return int(facts["settings"]["lanes"])

    def batch(self, step: int, rows: slice) -> Batch:
        """Rows ``rows`` of step ``step``, the next ones of their lanes.

        Raises:
            ValueError: if ``rows`` leaves the global batch, or was read before, or something before it was not.
            DataError: if a source has ended and the settings say that the run ends with it.
        """
        return make_batch(self._ids(step, rows), self.info.eos_id, None)

    def lane_ids(self, step: int, lane: int) -> np.ndarray:
        """(rows a lane, T) ids of the rows of ``lane`` in ``step``, as narrow as the vocabulary allows."""
        first = lane * self._rows_a_lane
        return self._ids(step, slice(first, first + self._rows_a_lane)).astype(self.info.dtype)

    def close(self) -> None:
        """Nothing is held open; ``data.stream_workers`` has processes to end."""

    def plan(self, max_steps: int) -> dict[str, dict[str, float]]:
        """What ``max_steps`` steps ask of each source: shares, tokens, and the passes that it may make.

        Raises:
            DataError: if a source with a weight would not be read at all.
        """
        asked = asked_shares(self.mixture, self.phase_shares, max_steps)
        counts = self._schedule.counts(max_steps * self.global_batch_size).tolist()
        total = max(1, sum(counts))
        cells = {source["name"]: cell_of(source, self.mixture.by) for source in self.info.sources}
        unread = zip(self._names, counts, strict=True)
        faults = [no_row(cells[name], asked[name], max_steps) for name, count in unread if asked[name] and not count]
        if faults and max_steps:
            raise DataError(faults)
        return {
            name: {
                "share_asked": asked[name],
                "share_realised": count / total,
                "tokens": float(count * self.seq_len),
                "passes": float(self._passes.get(name, 1)),
            }
            for name, count in zip(self._names, counts, strict=True)
        }

    def worst_share_error(self, tokens: int = SHARE_TOKENS) -> float:
        """Largest distance of any source's share of rows from the one asked, over any ``tokens`` in a row."""
        return self._schedule.worst_error(max(1, tokens // self.seq_len))

    def position(self) -> dict[str, Any]:
        """Where every lane stands that was read here; plain JSON data."""
        # A run that goes on and reads nothing stands where it stood.
        return {str(number): lane.position() for number, lane in self._lanes.items()} or dict(self._restored)

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go on from the positions of all lanes, whoever read them."""
        self._restored, self._lanes = position, {}

    def report(self) -> dict[str, dict[str, int]]:
        """Documents left out so far, by source and rule, of the lanes read here."""
        found: dict[str, Counter[str]] = {name: Counter() for name in self._names}
        for lane in self._lanes.values():
            for name, source in lane.sources.items():
                found[name].update(source.dropped)
        return {name: dict(counts) for name, counts in found.items()}

    def _check(self, facts: Mapping[str, Any], passes: Mapping[str, int]) -> None:
        mixture = self.mixture
        capped = mixture.cap_epochs is not None
        faults = list(self.settings.unfit(self.global_batch_size, mixture.weights is not None, capped, passes))
        changed = [
            source.name
            for source in self.settings.sources
            # A hub's data set is pinned by its revision.
            if isinstance(source, FilesSource) and source_revision(source) != facts["revisions"][source.name]
        ]
        if changed:
            message = f"must read the files that the stream was frozen with; those of {', '.join(changed)} changed"
            faults.append(("data", f"{message}; restore them or run the stage {self._stage} again"))
        if faults:
            raise DataError(faults)

    def _ids(self, step: int, rows: slice) -> np.ndarray:
        """(R, T) int64 ids of the next rows of their lanes."""
        first, last = check_rows(step, rows, self.global_batch_size)
        numbers = step * self.global_batch_size + np.arange(first, last, dtype=np.int64)
        owners, _ = self._schedule.locate(numbers)
        found = [self._read(number, owner) for number, owner in zip(numbers.tolist(), owners.tolist(), strict=True)]
        return np.stack(found)

    def _read(self, number: int, owner: int) -> np.ndarray:
        within = number % self.global_batch_size
        index = within // self._rows_a_lane
        step, turn = number // self.global_batch_size, within % self._rows_a_lane
        lane = self._lanes.get(index) or self._open_lane(index)
        if step * self._rows_a_lane + turn != lane.rows:
            raise ValueError(
                f"rows must be read in order: lane {index} stands at row {lane.rows}; got step {step}, row {within}"
            )
        lane.rows += 1
        row = lane.sources[self._names[owner]].row(self.seq_len)
        return row if row is not None else self._instead(lane, number, owner)

    def _instead(self, lane: _Lane, number: int, owner: int) -> np.ndarray:
        """A row of another source for one that has ended, drawn by the shares of those that have not."""
        step = number // self.global_batch_size
        name = self._names[owner]
        if self.settings.on_end == "fail":
            raise DataError([(f"passes.{name}", self._ended(lane, name, step))])
        phase = max(i for i, phase in enumerate(self.mixture.phases) if phase.from_step <= step)
        shares = self.phase_shares[phase]
        while live := [one for one in self._names if shares[one] and not lane.sources[one].place.ended]:
            weights = np.cumsum([shares[one] for one in live])
            draw = hash64("instead", self._seed, number, len(live)) / 2**64 * weights[-1]
            chosen = live[int(np.searchsorted(weights, draw, side="right").clip(max=len(live) - 1))]
            if (row := lane.sources[chosen].row(self.seq_len)) is not None:
                return row
        message = (
            f"must be at most {step}: every source with a share has ended there in {self._place_of(lane)}; set it to "
            f"{step}; more {self._stage}.passes or text would be another stream, on which the run begins anew"
        )
        raise DataError([("max_steps", message)])

    def _ended(self, lane: _Lane, name: str, step: int) -> str:
        return (
            f"must be more than {self._passes.get(name, 1)}: source {name} ended at step {step} in "
            f"{self._place_of(lane)}; raise it, and the run goes on from its newest checkpoint, or lower max_steps to "
            f"{step}; {self._stage}.on_end: drop, or more text, would be another stream, on which it begins anew"
        )

    def _place_of(self, lane: _Lane) -> str:
        """A lane for a person; with one of them there is nothing to tell apart."""
        last = self.settings.lanes - 1
        return f"lane {lane.number} (of 0 to {last}, each with its own part)" if last else "the stream's one lane"

    def _open_lane(self, index: int) -> _Lane:
        sources = {source.name: self._source_lane(source, index) for source in self.settings.sources}
        lane = _Lane(index, {name: sources[name] for name in self._names})
        if str(index) in self._restored:
            lane.restore(self._restored[str(index)])
        self._lanes[index] = lane
        return lane

    def _source_lane(self, source: Any, index: int) -> SourceLane:
        settings = self.settings
        return SourceLane(
            source,
            lane=index,
            lanes=settings.lanes,
            encoder=self._encoder,
            window=settings.shuffle_documents,
            passes=self._passes.get(source.name, 1),
            key=self._seed,
            left_out=self._left_out,
            cache=self._cache,
            say=self._say,
        )

    def _left_out(self, document: Document) -> str:
        if is_held_out(document, self.settings.heldout_share):
            return "held_out"
        if self._contamination and (found := self._contamination.find(str(document["text"]))):
            return f"contaminated_{found[0]}"
        return "overlaps_held_out" if self._heldout.overlaps(str(document["text"])) else ""


class _Lane:
    """The sources of one lane, and how many rows it has given."""

    def __init__(self, number: int, sources: dict[str, SourceLane]) -> None:
        self.number, self.rows, self.sources = number, 0, sources

    def position(self) -> dict[str, Any]:
        return {"rows": self.rows, "sources": {name: source.position() for name, source in self.sources.items()}}

    def restore(self, position: Mapping[str, Any]) -> None:
        self.rows = position["rows"]
        for name, source in self.sources.items():
            source.restore(position["sources"][name])
