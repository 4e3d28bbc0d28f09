"""A few answers before and after training, for the report."""

import json
import logging
from pathlib import Path

from elbo_kto_jax.data.records import Message
from elbo_kto_jax.data.special import end_of_turn
from elbo_kto_jax.models import lora
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write
from elbo_kto_jax.sampling.generate import generate
from elbo_kto_jax.sampling.stops import to_text
from elbo_kto_jax.scoring.scorer import Weights
from elbo_kto_jax.training.setup import Setup
from elbo_kto_jax.training.tracking import Tracking

log = logging.getLogger(__name__)


class Samples:
    """The answers of a run, kept in a file so that a restart does not make them again."""

    def __init__(self, setup: Setup, file: Path, tracking: Tracking):
        """Reads the file, if it is there; `tracking` is told of new answers.

        Raises:
          UserError: it is damaged.
        """
        self._setup, self._file, self._tracking = setup, file, tracking
        self.found: list[dict] = []
        if file.is_file():
            try:
                self.found = [dict(sample) for sample in json.loads(file.read_bytes())]
            except (ValueError, TypeError):
                raise UserError(f"{file}: damaged; remove it (the report will lack the answers before)") from None

    def take(self, when: str, weights: Weights, step: int) -> None:
        """Answers the first prompts with the weights after `step`, unless it was done in an earlier start."""
        setup, count = self._setup, self._setup.config.train.samples
        if not count or (self.found and when in self.found[0]):
            return
        examples = (setup.eval_data or setup.data).examples
        chosen = range(min(count, len(examples)))
        prompts = [examples.tokens[examples.offsets[i] :][: examples.prompt_length[i]] for i in chosen]
        eot = end_of_turn(setup.tokenizer)
        log.info("sampling %d answers %s training", len(prompts), when)
        responses = generate(
            setup.model,
            lora.parameters(weights),
            prompts,
            setup.config.sampler,
            seed=setup.config.seed,
            prompt_ids=[examples.ids[i] for i in chosen],
            eot_id=eot,
            mesh=setup.mesh,
        )
        stops = [setup.model.config.eos_id] + ([] if eot is None else [eot])
        if not self.found:
            self.found = [{"prompt": prompt} for prompt in examples.prompts[: len(prompts)]]
        for sample, response in zip(self.found, responses.tokens, strict=True):
            sample[when] = to_text(response, setup.tokenizer, stops)
        self._write()
        self._tracking.samples(
            step, when, [sample | {"prompt": _written(sample.get("prompt", ""))} for sample in self.found]
        )

    def forget(self, when: str) -> None:
        """Drops answers that are to be made again: a run that was finished has become longer."""
        if self.found and when in self.found[0]:
            self.found = [{key: text for key, text in sample.items() if key != when} for sample in self.found]
            self._write()

    def _write(self) -> None:
        if processes.is_first():
            atomic_write(self._file, json.dumps(self.found, ensure_ascii=False, indent=1))


def _written(prompt: list[Message] | str) -> str:
    """A prompt as text for people."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}:\n{message['content']}" for message in prompt)
