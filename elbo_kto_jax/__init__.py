"""Align masked diffusion language models from thumbs-up / thumbs-down feedback (ELBO-KTO, arXiv 2510.23658)."""

__version__ = "0.1.0"
