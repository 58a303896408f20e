"""Language modelling: pretraining and supervised fine-tuning differ only in which tokens are labels."""

from torch import Tensor, nn


def lm(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of next-token losses (nats) over the batch's targets; `train` divides by the step's target count."""
    return model(**batch, reduction="sum"), {}
