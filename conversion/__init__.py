"""Commands that convert checkpoints between the published form and ours, on the CPU."""
