"""The golden folder as the project's own objects; the fixture `golden` of conftest.py is one of these."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.load import load_config, load_model
from elbo_kto_jax.data.packing import Layout, Segment, pack
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.objectives.protocol import Feedback
from elbo_kto_jax.training.step import Batch

LAYOUTS = {"padded": False, "unpadded": True}  # the goldens' two modes -> Layout.packed


def golden_file(folder: Path, name: str) -> Path:
    """A file of a golden folder; a test that asks for one that is not there is skipped."""
    if not (folder / name).is_file():
        pytest.skip(f"these goldens have no {name}")
    return folder / name


class Values(dict):
    """Golden values by key; a test that asks for one that this folder does not hold is skipped."""

    def __missing__(self, key: str):
        pytest.skip(f"these goldens have no {key}")


@dataclasses.dataclass(frozen=True)
class Golden:
    """Arrays and descriptions of goldens.npz and goldens.json, and the models beside them."""

    folder: Path

    @cached_property
    def arrays(self) -> Mapping[str, np.ndarray]:
        with np.load(self.folder / "goldens.npz") as arrays:
            return Values(arrays)

    @cached_property
    def described(self) -> dict:
        return Values(json.loads((self.folder / "goldens.json").read_text()))

    @cached_property
    def config(self) -> ModelConfig:
        config = load_config(self.folder / "policy")[0]
        return dataclasses.replace(config, mask_token_id=self.described.get("mask_token_id", config.mask_token_id))

    @cached_property
    def policy(self) -> dict:
        return load_model(self.folder / "policy").params

    @cached_property
    def reference(self) -> dict:
        return load_model(self.folder / "reference").params

    def elbo(self, mode: str, name: str) -> np.ndarray:
        """The mean over the draws of the estimates of the model called `name`, "theta" or "ref"."""
        return self.arrays[f"{mode}.B_{name}_draws"].mean(axis=1)

    @property
    def flags(self) -> dict[str, int]:
        """Config keys with which a command uses the models: who says which token is the mask."""
        return {"model.mask_token_id": self.config.mask_token_id}

    @property
    def max_length(self) -> int:
        return self.arrays["input_ids"].shape[1]

    def tree(self, file: str) -> dict:
        """A file of tensors under their published names as a parameter tree, without the code of checkpoints."""
        tensors = load_file(golden_file(self.folder, file))
        leaves = {}
        for path, leaf in registry.parameters(self.config).items():
            parts = [tensors[name].T if leaf.transposed else tensors[name] for name in leaf.tensors]
            leaves[path] = np.stack(parts) if leaf.stacked else parts[0]
        return names.unflatten(leaves)

    def batch(
        self, records: Sequence[int], masks: np.ndarray, counts: np.ndarray, mode: str, *, rows: int, size: int
    ) -> Batch:
        """The draws `masks` [n, k, s], which hide `counts` [n, k] tokens, of n `records`, laid out as in `mode`.

        `rows` is that of the layout, and `size` the number of examples to which the batch is padded.
        """
        arrays, draws = self.arrays, masks.shape[1]
        segments = []
        for b, record in enumerate(records):
            start, length = int(arrays["prompt_length"][record]), int(arrays["completion_length"][record])
            tokens = arrays["input_ids"][record][: arrays["true_length"][record]]
            for k in range(draws):
                hidden = masks[b, k, start : start + length]
                segments.append(Segment(tokens, start, hidden, length / int(counts[b, k]), b * draws + k))
        feedback = Feedback(np.zeros(size, bool), np.arange(size) < len(records), np.zeros(size, np.int32))
        feedback.is_desirable[: len(records)] = arrays["label"][records]
        feedback.completion_length[: len(records)] = arrays["completion_length"][records]
        layout = Layout(rows, self.max_length, self.config.mask_token_id, self.config.pad_token_id, LAYOUTS[mode])
        return Batch(feedback, pack(segments, layout), sum(len(segment.tokens) for segment in segments))
