"""The tokenizer of a checkpoint, from its files alone: no network is needed, and no code of theirs is run."""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from elbo_kto_jax.checkpoints.assets import CONFIG_FILE
from elbo_kto_jax.data import foreign
from elbo_kto_jax.runtime.errors import UserError


def build_tokenizer(assets: Mapping[str, bytes], source: str) -> PreTrainedTokenizerFast:
    """The tokenizer in the files `assets` of the checkpoint `source`; needs no network and runs no code of theirs.

    Raises:
      UserError: the tokenizer's files are missing or damaged.
    """
    kind = PreTrainedTokenizerFast
    if "tokenizer.json" in assets:
        try:
            foreign.check_tokenizer_file(assets["tokenizer.json"])
        except foreign.ForeignError as error:
            raise UserError(f"{source}: unreadable tokenizer.json ({error}); copy it again") from error
    elif {"vocab.json", "merges.txt"} <= assets.keys():
        # Dream's tokenizer is Qwen's, and is published in these files only. It takes half a second to import.
        from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined]  # found at run time

        kind = Qwen2TokenizerFast
    else:
        raise UserError(f"{source}: no tokenizer.json; copy the tokenizer files of the published model into the folder")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in assets.items():
            # Without config.json, whose `auto_map` makes transformers ask whether it may run the model's own code.
            if name != CONFIG_FILE and not name.endswith(".py"):
                (Path(folder) / name).write_bytes(content)
        try:
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
        except BaseException as error:
            reason = foreign.failure(error)
            if not reason:
                raise
            raise UserError(f"{source}: unreadable tokenizer files ({reason}); copy them again") from error
    # Texts are cut by the settings of a run; what stands in the file may be no number.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer
