"""Commands that start runs: the quickstart and planning on paper."""
