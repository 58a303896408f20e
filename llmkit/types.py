"""Define the types and constants that all packages share."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import numpy as np

IGNORE_INDEX = -100  # label of a position that is not a target; torch's default for cross-entropy


@dataclass(slots=True)
class Document:
    """A text and its origin.

    id      unique, and the same in every build: "<source name>/<path inside it>[:record]"
    text    what the model will read
    source  name of the source in the config
    meta    facts from the reader: "format", "encoding", "url"
    size    bytes of the file that held it, unpacked
    """

    id: str
    text: str
    source: str
    meta: dict = field(default_factory=dict)
    size: int = 0


@dataclass(slots=True)
class Batch:
    """One rank's share of a training step, as numpy arrays of shape (B, T). The training loop moves them to the device.

    Arrays are made contiguous, such as inputs and labels that are views of one array: torch pins and copies only
    contiguous memory to a GPU in one piece.

    labels             already aligned: labels[b, t] is the target of the logits at [b, t], or IGNORE_INDEX. It is the
                       token that follows input_ids[b, t]; for an encoder, the token that was masked there
    positions          position of each token in its document (packed rows only)
    segments           number of the document a token belongs to; attention never crosses it (packed rows only)
    decoder_input_ids  the decoder's input in the shape of labels (encoder-decoders only; input_ids go to the encoder)
    branches           0 for a prompt and 1, 2, ... for answers that continue it without seeing each other
    answers            the number in its row of the answer that a target belongs to, -1 elsewhere
    reference          (B, A) log-probability of each answer under another model, NaN where it is not known
    records            (B,) objects: the records that prompts are from, for rewards
    advantages         (B, A) how much better an answer is than others to its prompt
    old                (B, T) log-probabilities of the targets under the model that wrote them
    baseline           (B,) what rewards are compared with
    counts             (B,) what each row adds to the count of targets, if it is another number

    For a head for labels, rows are padded on the right, and labels are (B,), of several labels (B, L), of tags (B, T);
    numbers are floats, and NaN where there is no target.

    lengths            (B,), tokens of each row without its padding
    token_type_ids     1 for the tokens of a second text
    """

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None
    decoder_input_ids: np.ndarray | None = None
    lengths: np.ndarray | None = None
    token_type_ids: np.ndarray | None = None
    branches: np.ndarray | None = None
    answers: np.ndarray | None = None
    reference: np.ndarray | None = None
    records: np.ndarray | None = None
    advantages: np.ndarray | None = None
    old: np.ndarray | None = None
    baseline: np.ndarray | None = None
    counts: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, array in self.arrays().items():
            setattr(self, name, np.ascontiguousarray(array))

    @property
    def count(self) -> int:
        """Return the number of targets. The loop divides the sum of losses by it."""
        return int(self.is_target.sum() if self.counts is None else self.counts.sum())

    @property
    def is_target(self) -> np.ndarray:
        """Return where there is a target, in the shape of the labels."""
        return ~np.isnan(self.labels) if self.labels.dtype.kind == "f" else self.labels != IGNORE_INDEX

    def split(self, micro_batch_size: int) -> Iterator["Batch"]:
        """Yield micro-batches of at most `micro_batch_size` rows, in order."""
        for start in range(0, len(self.input_ids), micro_batch_size):
            rows = slice(start, start + micro_batch_size)
            cut = {k: v[rows] for k, v in self.arrays().items()}
            yield replace(self, **cut)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that are present, by name: the keyword arguments of a model's forward, and of losses."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}
