"""Every metric that a run logs: where TensorBoard shows it, its unit, and what it is."""

from typing import NamedTuple


class Metric(NamedTuple):
    """A key of a line of metrics.jsonl.

    Attributes:
      group: of TensorBoard's tags.
      unit: "1" for a bare number.
      meaning: in a few words.
      low: whether a low value is a good one.
    """

    group: str
    unit: str
    meaning: str
    low: bool = False


EVAL = "eval_"  # before a metric's name: the same on the held-out data

METRICS = {
    "loss": Metric("train", "of the objective; sft: nats per token", "mean over the batch", low=True),
    "grad_norm": Metric("train", "1", "norm of the gradient before clipping"),
    "learning_rate": Metric("train", "1", "that the step was taken with"),
    "weights_rms": Metric("train", "1", "root mean square of the weights that are trained"),
    "gradient_noise_scale": Metric("train", "examples", "batch size at which half of the gradient is noise"),
    "reward_desirable": Metric("rewards", "nats", "mean reward of the good completions of the batch"),
    "reward_undesirable": Metric("rewards", "nats", "mean reward of the bad ones"),
    "reward_margin": Metric("rewards", "nats", "the first minus the second"),
    "reference_point": Metric("rewards", "nats", "z0 of elbo_kto"),
    "saturated_fraction": Metric("rewards", "share of the batch", "examples whose sigmoid is flat"),
    "accuracy": Metric("rewards", "share of the pairs", "elbo_dpo: pairs whose chosen side has the larger reward"),
    "reward_variance": Metric("rewards", "nats²", "variance of a reward that comes from the masks"),
    "draws_needed": Metric("rewards", "draws", "K at which that is a tenth of the variance between examples"),
    "examples": Metric("data", "examples", "used since the run began; padding does not count"),
    "tokens": Metric("data", "tokens", "that went through the model since the run began, every draw counted"),
    "epoch": Metric("data", "passes", "over the examples since the run began"),
    "batch_examples": Metric("data", "examples", "of this step"),
    "records_dropped": Metric("data", "records", "of the training data that are not used, bad ones included"),
    "examples_cut": Metric("data", "examples", "of the training data that were longer than data.max_length"),
    "real_token_fraction": Metric("data", "share of the positions", "that hold text, not padding"),
    "seconds": Metric("throughput", "seconds", "since the run began, pauses between its starts left out"),
}
# What TensorBoard shows besides, since it can be computed from the totals above.
THROUGHPUT = {
    "tokens_per_second": Metric("throughput", "tokens per second", "since the step logged before, over all devices"),
    "examples_per_second": Metric("throughput", "examples per second", "the same"),
}


def is_better(name: str, value: float, than: float) -> bool:
    """Whether a value of a metric is better than another; where the table does not have it, a high value is."""
    known = METRICS.get(name.removeprefix(EVAL))
    return value < than if known is not None and known.low else value > than


def tag(name: str) -> str:
    """The tag of a metric in TensorBoard: its group, and its name without what the group says already."""
    if name.startswith(EVAL):
        return f"eval/{name.removeprefix(EVAL)}"
    found = {**METRICS, **THROUGHPUT}.get(name)
    group = found.group if found else "train"
    return f"{group}/{name.removeprefix('reward_')}"
