"""Align masked diffusion language models from thumbs-up / thumbs-down feedback (ELBO-KTO, arXiv 2510.23658)."""

import os

__version__ = "0.1.0"

# transformers is here for its tokenizers: it need not tell every user of every command that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
