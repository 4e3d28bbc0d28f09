"""docs/extending.md: its example of an objective works as it is printed."""

import re
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax import objectives
from elbo_kto_jax.objectives import protocol
from elbo_kto_jax.objectives.protocol import Feedback, ValueFunction
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError
from tests.conftest import PROJECT_ROOT


@pytest.fixture
def names(monkeypatch):
    """What the page's example defines; the objective is known only within the test."""
    monkeypatch.setattr(protocol, "_KNOWN", dict(protocol._KNOWN))
    page = (PROJECT_ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    example, by_hand, members, *_ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    found = {"objectives": objectives, "Feedback": Feedback}
    exec(example + "\n" + textwrap.indent(members, "    ") + "\n\n" + by_hand, found)
    return found


def test_the_objective_and_its_test(names):
    names["test_by_hand"]()
    options = config.Objective("squared_margin", 0.4, 1.0, 1.0, "zero", 0.0)
    objective = objectives.build(options)
    assert isinstance(objective, ValueFunction)
    reward = np.array([3.0, -1.0, 0.5, 1.0])
    at = jnp.arange(4)
    given = Feedback(at % 2 == 0, at < 4, at + 1)
    outcome = objective(jnp.asarray(reward, jnp.float32)[:, None], jnp.zeros((4, 1)), given)
    margin = 0.4 * (reward[::2] - reward[1::2])[:, None]
    np.testing.assert_allclose(
        objective.value(margin, np.asarray(given.is_desirable), 0).mean(), outcome.loss, rtol=1e-6
    )
    slope = objective.value(margin, np.asarray(given.is_desirable), 1)[:, 0] * 0.4 / 2
    np.testing.assert_allclose(outcome.elbo_cotangent, np.stack([slope, -slope], axis=1).ravel(), rtol=1e-6)


def test_it_refuses_a_beta_of_zero(names):
    with pytest.raises(UserError, match="above 0"):
        objectives.build(config.Objective("squared_margin", 0.0, 1.0, 1.0, "zero", 0.0))
