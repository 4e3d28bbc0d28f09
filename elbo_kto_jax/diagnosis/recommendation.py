"""Which scheme with how many draws a diagnosis recommends."""

import numpy as np

from elbo_kto_jax.diagnosis.analyse import Analysis
from elbo_kto_jax.diagnosis.bootstrap import Figure
from elbo_kto_jax.diagnosis.measure import Setting
from elbo_kto_jax.diffusion.masks import SCHEMES


def recommendation(analysis: Analysis) -> dict:
    """The fewest draws whose mask noise is at most the squared length of an example's own gradient, with the scheme
    that has the least noise there; or the most draws measured."""
    draws = sorted({s.draws for s in analysis.settings})
    # All settings estimate the same signal; those with the most draws best.
    most = [s for s in analysis.settings if s.draws == draws[-1] and SCHEMES[s.scheme].finite_variance]
    signal = np.mean([analysis.gradient_moments(s)[1].sum(axis=1) for s in most], axis=0)
    noise = {s: analysis.gradient_variance[s].sum(axis=1) for s in analysis.settings}
    if not np.mean(signal) > 0:
        return {
            "scheme": None,
            "draws": None,
            "text": "No recommendation: the gradient is 0, or lost in the noise of these draws; raise --records.",
        }
    for k in draws:
        best = min((s for s in analysis.settings if s.draws == k), key=lambda s: np.mean(noise[s]))
        if np.mean(noise[best]) <= np.mean(signal):
            break
    enough = bool(np.mean(noise[best]) <= np.mean(signal))
    share = analysis.bootstrap.ratio(noise[best], signal)
    alike = [
        s.scheme
        for s in analysis.settings
        if s.draws == best.draws and s != best and analysis.bootstrap.ratio(noise[s], noise[best])["low"] <= 1
    ]
    uniform = [k for k in draws if np.mean(noise[Setting("uniform", k)]) <= np.mean(noise[best])]
    return {
        "scheme": best.scheme,
        "draws": best.draws,
        "noise_over_signal": share,
        "uniform_draws": uniform[0] if uniform else None,
        "alike": alike,
        "text": _words(best, share, enough, uniform, alike, draws[-1]),
    }


def _words(best: Setting, share: Figure, enough: bool, uniform: list[int], alike: list[str], most: int) -> str:
    """The recommendation as a sentence.

    `uniform` are the draws with which that scheme has as little noise, of at most `most`; `alike` the schemes that the
    records do not tell apart from the best; `enough`: the noise is at most the signal.
    """
    text = [
        f"Use estimator.scheme={best.scheme} with estimator.draws={best.draws}: the masks' share of the gradient's "
        f"noise is then {share['value']:.2g} [{share['low']:.2g}, {share['high']:.2g}] times the squared length of "
        "an example's own gradient",
        "beyond that, more examples help more than more draws"
        if enough
        else f"even {best.draws} draws leave more noise than signal: raise train.global_batch_size too",
        f"uniform needs {uniform[0]} draws for as little noise"
        if uniform
        else f"uniform has more noise even with {most} draws",
    ]
    if alike:
        text.append(f"not told apart from it by these records: {', '.join(alike)}")
    return "; ".join(text) + "."
