"""iLLaDA-8B-Instruct aligned on kto-mix-14k with ELBO-KTO.

iLLaDA has been fine-tuned on demonstrations only; its authors name preference alignment as the next step. Everything
that is not stated here is as in kto_mix.py. Numbers marked [illada] are published with the model, [ours] are choices.
Not yet run at this size.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_BASE = Path(__file__).with_name("kto_mix.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(_BASE))["get_config"]()
    # [illada] Or the folder that it was downloaded to. Its mask token is 5, which its README alone says; -1 knows that.
    config.model.path = "GSAI-ML/iLLaDA-8B-Instruct"
    config.data.max_length = 4096  # [ours] LLaDA's, with which kto_mix.py's memory and speed are known
    return config
