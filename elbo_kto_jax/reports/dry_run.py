"""What `train --dry-run` says on the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from elbo_kto_jax.runtime import terminal

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_PARTS = ("parameters", "optimizer", "gradients", "residuals", "base", "reference", "working")


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary of planning/dry_run.py in lines."""
    rows = [
        ("data", _records(summary)),
        ("", _tokens(summary)),
        ("steps", _steps(summary)),
        ("", _step(summary)),
        ("memory", _memory(summary["memory"], summary)),
        ("", _parts(summary["memory"])),
        ("checkpoint", f"{_size(summary['checkpoint_bytes'])} each, of training"),
        ("time", _time(summary)),
        ("workdir", _workdir(summary)),
        *_config(summary["config"]),
    ]
    return terminal.table(("dry run", "no weights were opened, and nothing was written"), rows)


def _records(summary: Mapping[str, Any]) -> str:
    found = f"{_count(summary['examples'], 'example')} of {_count(summary['records'], 'record')}"
    if summary["pairs"] is not None:
        found += f", {summary['pairs']:,} pairs"
    if summary["desirable"] is not None:
        found += f": {summary['desirable']:,} desirable, {summary['undesirable']:,} undesirable"
    counts, words = summary["data"], {"skipped": "bad records skipped", "dropped": "dropped", "left_out": "left out"}
    lost = [f"{counts[key]:,} {what}" for key, what in words.items() if counts[key]]
    held_out = f"{summary['eval_data']['examples']:,} held out" if "eval_data" in summary else ""
    return "; ".join(filter(None, [found, ", ".join(lost), held_out]))


def _tokens(summary: Mapping[str, Any]) -> str:
    mean = summary["tokens"] / summary["examples"]
    longest = f"{summary['tokens']:,} tokens, {mean:,.0f} an example, {summary['longest']:,} in the longest"
    return f"{longest}; {summary['cut']:,} cut at {summary['config']['data']['max_length']:,}"


def _steps(summary: Mapping[str, Any]) -> str:
    train, draws = summary["config"]["train"], summary["config"]["estimator"]["draws"]
    found = f"{summary['steps']:,} of {train['global_batch_size']:,} examples, {_count(draws, 'draw')} of each"
    if summary["evaluations"]:
        found += f"; {summary['evaluations']:,} evaluations on held-out data"
    if train["patience"]:
        found += f"; ends after {_count(train['patience'], 'evaluation')} without a better {train['keep_best']}"
    return f"{found}; {summary['epochs']:.3g} epochs of {_count(summary['steps_per_epoch'], 'step')}"


def _step(summary: Mapping[str, Any]) -> str:
    of = "" if summary["steps_packed"] == summary["steps"] else f", in the first {summary['steps_packed']:,}"
    return (
        f"a step: {summary['tokens_per_step']:,.0f} tokens in {summary['micro_batches_per_step']:.3g} "
        f"micro-batches of {_count(summary['rows'], 'row')}; {summary['real_token_fraction']:.1%} of the positions "
        f"hold text{of}"
    )


def _memory(memory: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    devices, verdict = summary["devices"], "fits" if memory["fits"] else "does not fit"
    found = (
        f"{_size(memory['bytes_per_device'])} a device, by estimate, within a sixth: {verdict} the "
        f"{_size(memory['device_has'])} of each device here ({devices['number']} x {devices['kind']})"
    )
    if memory["host_bytes"]:
        found += f"; {_size(memory['host_bytes'])} of the host's {_size(memory['host_has'])}"
    return f"{found}; residuals: {summary['residuals']}"


def _parts(memory: Mapping[str, Any]) -> str:
    return ", ".join(f"{part} {_size(memory[part])}" for part in _PARTS if memory[part])


def _time(summary: Mapping[str, Any]) -> str:
    if summary["seconds"] is None:
        return summary["seconds_from"]
    hours, minutes = divmod(round(summary["seconds"] / 60), 60)
    return f"about {hours:,} h {minutes} min; {summary['seconds_from']}"


def _workdir(summary: Mapping[str, Any]) -> str:
    if summary["replaces_a_run"]:
        return f"{summary['workdir']}: --overwrite would delete the run in it"
    done = summary["steps_done"]
    if summary["stopped_early"]:
        return f"{summary['workdir']}: stopped early at step {done:,}; a larger train.patience goes on"
    begins = f"would go on from step {done:,} of {summary['steps']:,}" if done else "would begin at step 0"
    return f"{summary['workdir']}: {begins}"


def _config(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A line for each group of keys; the keys of the config that are in none come first."""
    groups = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    alone = {key: value for key, value in config.items() if key not in groups}
    for name, group in {"": alone, **groups}.items():
        yield f"config.{name}".rstrip("."), ", ".join(f"{key}={value!r}" for key, value in group.items())


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(number: float) -> str:
    """Bytes in words."""
    unit, name = next(((unit, name) for unit, name in _UNITS if number >= unit), _UNITS[-1])
    return f"{number / unit:.3g} {name}" if number < 999.5 * unit else f"{number / unit:,.0f} {name}"
