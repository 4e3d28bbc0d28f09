"""The tokenised data set in a few flat arrays: a pure function of the records, the tokenizer and the text settings."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt32
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.data.convert import Text
from elbo_kto_jax.data.counts import Counts
from elbo_kto_jax.data.gather import column, flat, prompts_of
from elbo_kto_jax.data.ids import Ids
from elbo_kto_jax.data.prepare import Request, prepare
from elbo_kto_jax.data.prepared import Cache, Digests
from elbo_kto_jax.data.records import Message
from elbo_kto_jax.data.select import Rule, Selection, label_warnings, select
from elbo_kto_jax.data.special import find_eot_id


@dataclasses.dataclass(frozen=True)
class Examples:
    """`num` tokenised examples; example i has tokens[offsets[i] : offsets[i + 1]], prompt then completion.

    Attributes:
      tokens: all examples one after the other, not padded.
      offsets: where each example starts, and the total at the end.
      prompt_length: tokens of each prompt, at least 0.
      completion_length: tokens of each completion window, at least 1; with the prompt this is the whole example.
      is_desirable: the label; True where a record has none.
      ids: the records' ids.
      id_words: two words of the BLAKE2b hash of each id, which the mask sampler folds into its key.
      report: what was read, left out and why, in lines for the log; not part of the digest.
      prompts: the prompts of the first examples, as their records have them, for people; not part of the digest.
      files: where they were read; not part of the digest.
      digests: of those files whose digests are known; not part of the digest.
      revisions: of data sets of the Hub, see `sources.Source`; not part of the digest.
      sizes: of the data sets of which these examples are a mixture, how many are of each, one after the other.
      counts: what became of the records; not part of the digest.
    """

    tokens: Int32[np.ndarray, "total"]
    offsets: Int64[np.ndarray, "num_plus_one"]
    prompt_length: Int32[np.ndarray, "num"]
    completion_length: Int32[np.ndarray, "num"]
    is_desirable: Bool[np.ndarray, "num"]
    ids: Sequence[str]
    id_words: UInt32[np.ndarray, "num 2"]
    report: str
    prompts: list[list[Message] | str] = dataclasses.field(default_factory=list)
    files: tuple[Path, ...] = ()
    digests: Digests = dataclasses.field(default_factory=dict)
    revisions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    counts: Counts = dataclasses.field(default_factory=Counts)

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """A hash (hex) of everything that a training run sees of these examples."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (
            self.tokens,
            self.offsets,
            self.prompt_length,
            self.completion_length,
            self.is_desirable,
            self.id_words,
        ):
            digest.update(f"{array.dtype} {array.shape};".encode())
            digest.update(np.ascontiguousarray(array).data)
        digest.update(self.joined_ids())
        return digest.hexdigest()

    def joined_ids(self) -> memoryview:
        """The bytes of all ids with line breaks between them."""
        ids = self.ids if isinstance(self.ids, Ids) else Ids.of(self.ids)
        return ids.text.data[:-1]


def load_examples(
    path: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    exact_window: bool,
    append_eot: bool,
    desirable_fraction: float,
    undesirable_fraction: float,
    seed: int,
    needs_label: bool,
    skip_bad: bool,
    progress: bool,
    needs_pairs: bool = False,
    flag: str = "--config.data.train",
    prompts: int = 0,
    limit: int = 0,
    weights: Sequence[float] = (),
    cache: Cache | None = None,
    revisions: Mapping[str, str] = MappingProxyType({}),
    processes: int = 0,
) -> Examples:
    """Reads, tokenises and subsamples data sets (docs/method.md 2 "n_D / n_U", docs/method.md 5).

    Rows without a token to score (an empty completion, or a prompt that fills max_length) are dropped first. Of the
    rest, round(fraction * count) rows of each label are kept, in their order; which ones depends on the seed and on
    their position among the rows of that label only, and a smaller fraction keeps a subset of a larger one. Of several
    data sets this is done to each, and their examples follow each other.

    With `needs_pairs`, examples 2p and 2p + 1 are the chosen and the rejected half of pair p, of which none would be
    dropped. The two fractions are equal then, and keep the same pairs.

    Args:
      path: a data set, see `read_records`, or several.
      max_length: tokens kept of each row.
      exact_window, append_eot: see `encode_batch`.
      desirable_fraction, undesirable_fraction: share of such rows to keep, 0 to 1.
      seed: of the subsets.
      needs_label: refuse records without a label; otherwise they count as desirable.
      skip_bad, limit, flag: see `read_records`.
      progress: show a bar on stderr.
      prompts: of how many examples, the first ones, the prompts are kept.
      weights: in what proportions an epoch has the data sets, for warnings; (): as they are.
      cache, revisions, processes: see `prepare.Request`.

    Raises:
      UserError: see `read_records` and `encode_batch`; or no row is left.
    """
    needs = ("prompt", "completion", "label") if needs_label else ("prompt", "completion")
    eot_id = find_eot_id(tokenizer, "--config.data.append_eot") if append_eot else -1
    text = Text(needs, max_length, exact_window, append_eot, eot_id)
    rule = Rule(max_length, exact_window, desirable_fraction, undesirable_fraction, seed, needs_pairs)
    paths = [str(path)] if isinstance(path, (str, Path)) else list(path)
    parts = []
    for one in paths:
        request = Request(one, text, skip_bad, flag, limit, progress, cache, revisions, processes)
        parts.append(select(prepare(request, tokenizer), rule, flag, one))
    found = _pack(parts, None if cache is None else cache.usable_folder())
    report = _report(paths, parts, weights, _label_warnings(parts, found, weights) if needs_label else [])
    return dataclasses.replace(found, report=report, prompts=prompts_of(parts[0].found, parts[0].indices[:prompts]))


def _pack(parts: Sequence[Selection], folder: Path | None) -> Examples:
    """The examples of data sets, one after the other; an array that is too large for memory is a file in `folder`."""
    lengths, prompt_length = column(parts, "length"), column(parts, "prompt_length")
    return Examples(
        tokens=flat(parts, "tokens", "length", folder),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        prompt_length=prompt_length,
        completion_length=lengths - prompt_length,
        is_desirable=column(parts, "label") != 0,
        ids=Ids(flat(parts, "ids", "id_length", folder), np.cumsum(column(parts, "id_length"), dtype=np.int64)),
        id_words=column(parts, "words").view(np.uint32).reshape(-1, 2),
        report="",
        files=tuple(file for part in parts for file in part.found.files),
        digests={file: digest for part in parts for file, digest in part.found.digests.items()},
        revisions={name: commit for part in parts for name, commit in part.found.revisions.items()},
        sizes=tuple(len(part.indices) for part in parts),
        counts=Counts.sum(part.counts for part in parts),
    )


def _label_warnings(parts: Sequence[Selection], packed: Examples, weights: Sequence[float]) -> list[str]:
    sizes = np.array(packed.sizes)
    often = np.ones(len(sizes)) if not weights else np.array(weights) / np.sum(weights) * np.sum(sizes) / sizes
    return label_warnings(packed.is_desirable, column(parts, "text"), np.repeat(often, sizes))


def _report(paths: Sequence[str], parts: Sequence[Selection], weights: Sequence[float], warnings: Sequence[str]) -> str:
    """One line per thing that happened to the data, with counts."""
    if len(parts) == 1:
        return "\n".join([*parts[0].lines, *warnings, *parts[0].skipped()])
    lines = []
    shares = np.array(weights or [len(part.indices) for part in parts], np.float64)
    for path, part, share in zip(paths, parts, shares / shares.sum(), strict=True):
        lines += [f"{path}: {100 * share:.4g}% of every epoch", *part.lines, *part.skipped()]
    return "\n".join([*lines, *warnings])
