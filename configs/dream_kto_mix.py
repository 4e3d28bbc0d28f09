"""Dream-v0-Instruct-7B aligned on kto-mix-14k with ELBO-KTO.

Everything that is not stated here is as in kto_mix.py. Dream-Coder-7B and DiffuCoder-7B are the same network: give
their id as --config.model.path. Numbers marked [dream] are published with the model, [ours] are choices. Not yet run at
this size.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_BASE = Path(__file__).with_name("kto_mix.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(_BASE))["get_config"]()
    config.model.path = "Dream-org/Dream-v0-Instruct-7B"  # [dream]
    config.data.max_length = 4096  # [ours] kto_mix.py's; the model was trained with more
    return config
