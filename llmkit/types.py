"""Types that all packages share."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

IGNORE_INDEX = -100  # a label that is not a target, torch's own default for cross-entropy


@dataclass(slots=True)
class Document:
    """A text and where it came from.

    id      unique and stable over runs: "<source name>/<path inside it>[:record]"
    text    what the model will read
    source  name of the source in the config
    meta    what its reader knows about it: "format", "encoding", "url"
    """

    id: str
    text: str
    source: str
    meta: dict = field(default_factory=dict)


@dataclass(slots=True)
class Batch:
    """A rank's share of a step, as numpy arrays of shape (B, T); the loop moves them to the device.

    labels             already aligned: labels[b, t] is the target of the logits at [b, t], or IGNORE_INDEX. It is the
                       token that follows input_ids[b, t]; for an encoder, the token that was masked there
    positions          position of each token in its document (packed rows only)
    segments           number of the document a token belongs to; attention never crosses it (packed rows only)
    decoder_input_ids  what a decoder reads, in labels' shape, if input_ids are for an encoder
    """

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None
    decoder_input_ids: np.ndarray | None = None

    @property
    def count(self) -> int:
        """The number of targets, by which the sum of losses is divided."""
        return int((self.labels != IGNORE_INDEX).sum())

    def split(self, micro_batch_size: int) -> Iterator["Batch"]:
        """Yield micro-batches of at most `micro_batch_size` rows, in order."""
        for start in range(0, len(self.input_ids), micro_batch_size):
            rows = slice(start, start + micro_batch_size)
            cut = {k: v[rows] for k, v in self.arrays().items()}
            yield replace(self, **cut)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that are present, by name: the keyword arguments of a model's forward."""
        names = ("input_ids", "labels", "positions", "segments", "decoder_input_ids")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
