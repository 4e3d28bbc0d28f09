"""docs/settings.md, and what --help says of the config: they name what there is."""

import dataclasses

import pytest

from elbo_kto_jax import cli
from elbo_kto_jax.runtime import settings
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.grid import SweepConfig
from launch import settings_page

PAGE = settings_page.FILE.read_text(encoding="utf-8")


def test_the_page_is_what_the_code_says():
    assert settings_page.generated(PAGE) == PAGE, "run python -m launch.settings_page"


def test_every_key_has_a_meaning():
    names = [key.name for key in settings.keys(SweepConfig)]
    groups = {field.name for field in dataclasses.fields(SweepConfig)}
    assert {name.partition(".")[0] for name in names} == groups
    assert "train.global_batch_size" in names
    assert [key.name for key in settings.keys(SweepConfig) if not key.meaning] == []
    assert set(settings.MOST_USED) <= set(names)


def test_the_files_of_every_command_are_listed():
    section = PAGE.partition("## Files that commands write")[2].partition("## Metrics")[0]
    assert [name for name in cli.COMMANDS if f"`{name}`" not in section] == []


@pytest.mark.parametrize("kind", [Config, SweepConfig])
def test_help_names_the_keys(kind):
    flags = cli.Flags("elbo_kto_jax.command", "Does something.")
    flags.add_config(kind=kind)
    said = " ".join(flags.format_help().split())
    assert " ".join(settings.in_short(kind).split()) in said
    assert "model: path, dtype, param_dtype" in said
    assert ("sweep: checkpoints, " in said) == (kind is SweepConfig)
    assert settings.PAGE in said
