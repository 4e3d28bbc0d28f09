"""The tokenised data set in a few flat arrays: a pure function of the records, the tokenizer and the text settings."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import sys
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt32
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.data.chat import Encoded, encode_batch, writes_special_tokens
from elbo_kto_jax.data.counts import Counts
from elbo_kto_jax.data.pairs import whole_pairs
from elbo_kto_jax.data.reading import RecordFile, read_records
from elbo_kto_jax.data.records import Message, Record
from elbo_kto_jax.data.special import find_eot_id
from elbo_kto_jax.runtime.errors import UserError

_RARE = 0.05  # share of a label below which a warning says so: most batches of 8 have none then
_BATCH = 256  # records per call of the tokenizer: enough for its threads, small enough for a moving bar


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
      counts: what became of the records; not part of the digest.
    """

    tokens: Int32[np.ndarray, "total"]
    offsets: Int64[np.ndarray, "num_plus_one"]
    prompt_length: Int32[np.ndarray, "num"]
    completion_length: Int32[np.ndarray, "num"]
    is_desirable: Bool[np.ndarray, "num"]
    ids: list[str]
    id_words: UInt32[np.ndarray, "num 2"]
    report: str
    prompts: list[list[Message] | str] = dataclasses.field(default_factory=list)
    files: tuple[Path, ...] = ()
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
        digest.update("\n".join(self.ids).encode())
        return digest.hexdigest()


def load_examples(
    path: str | Path,
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
) -> Examples:
    """Reads, tokenises and subsamples a data set (docs/method.md 2 "n_D / n_U", docs/method.md 5).

    Rows without a token to score (an empty completion, or a prompt that fills max_length) are dropped first. Of the
    rest, round(fraction * count) rows of each label are kept, in their order; which ones depends on the seed and on
    their position among the rows of that label only, and a smaller fraction keeps a subset of a larger one.

    With `needs_pairs`, examples 2p and 2p + 1 are the chosen and the rejected half of pair p. Pairs of which one half
    would be dropped are dropped. The two fractions are equal then, and keep the same pairs.

    Args:
      path: see `read_records`.
      tokenizer: a fast tokenizer.
      max_length: tokens kept of each row.
      exact_window: see `data.chat`.
      append_eot: continue every completion with the end-of-turn token.
      desirable_fraction, undesirable_fraction: share of such rows to keep, 0 to 1.
      seed: of the subsets.
      needs_label: refuse records without a label; otherwise they count as desirable.
      skip_bad, limit: see `read_records`.
      progress: show a bar on stderr.
      needs_pairs: see above.
      flag: the command-line flag that gave `path`, for messages.
      prompts: of how many examples, the first ones, the prompts are kept.

    Raises:
      UserError: see `read_records` and `encode_batch`; or no row is left.
    """
    needs = ("prompt", "completion", "label") if needs_label else ("prompt", "completion")
    source = read_records(path, needs=needs, skip_bad=skip_bad, flag=flag, limit=limit)
    encoded = _encode(tokenizer, source.records, max_length, exact_window, append_eot, progress)
    rows = list(zip(source.records, encoded, strict=True))
    rows, notes = whole_pairs(rows, flag, path) if needs_pairs else (rows, [])
    rows = [row for row in rows if row[1].completion_length > 0]
    is_desirable = np.array([record.label is not False for record, _ in rows], np.bool_)
    kept = _kept(is_desirable, (desirable_fraction, undesirable_fraction), seed, needs_pairs)
    _check_any(kept, f"{flag}: no example is left of the {len(source.records)} records in {path}", max_length)
    rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
    notes += _special(tokenizer, source.records, exact_window)
    notes += _warnings(rows, is_desirable[kept]) if needs_label else []
    report = _report(source.records, source.skipped, encoded, is_desirable, kept, max_length, notes)
    packed = _pack(rows, is_desirable[kept], report, [record.prompt for record, _ in rows[:prompts]])
    return dataclasses.replace(packed, files=tuple(source.files), counts=_counts(source, len(kept), rows, max_length))


def _counts(source: RecordFile, scorable: int, rows: list[tuple[Record, Encoded]], max_length: int) -> Counts:
    """What became of the records, of which `scorable` have a token to score, and `rows` are used."""
    return Counts(
        records=len(source.records),
        skipped=len(source.skipped),
        dropped=len(source.records) - scorable,
        left_out=scorable - len(rows),
        cut=sum(row.text_length > max_length for _, row in rows),
        examples=len(rows),
    )


def _check_any(kept: Bool[np.ndarray, " n"], message: str, max_length: int) -> None:
    """Raises UserError where no row is kept; `message` says of what."""
    if not kept.any():
        raise UserError(
            f"{message}: {len(kept)} have a completion token within --config.data.max_length {max_length}, and the "
            "fractions of the two labels keep 0 of these"
        )


def _kept(
    is_desirable: Bool[np.ndarray, " n"], fractions: tuple[float, float], seed: int, needs_pairs: bool
) -> Bool[np.ndarray, " n"]:
    """Which rows the fractions of the desirable and of the undesirable ones keep."""
    kept = np.zeros(len(is_desirable), np.bool_)
    for label, fraction in zip((True, False), fractions, strict=True):
        positions = np.flatnonzero(is_desirable == label)
        kept[positions[_subset(len(positions), fraction, seed, label and not needs_pairs)]] = True
    return kept


def _special(tokenizer: PreTrainedTokenizerBase, records: list[Record], exact_window: bool) -> list[str]:
    """A note where records write special tokens out."""
    num_special = sum(writes_special_tokens(tokenizer, records))
    if num_special:
        reading = "text" if exact_window else "those tokens, as by the authors (config.data.packing=True: as text)"
        return [f"{num_special} records write special tokens out in their texts, which are read as {reading}"]
    return []


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    max_length: int,
    exact_window: bool,
    append_eot: bool,
    progress: bool,
) -> list[Encoded]:
    """The tokens of all records: one batch goes through the chat template while the one before is tokenised."""
    encode = functools.partial(
        encode_batch,
        tokenizer,
        max_length=max_length,
        exact_window=exact_window,
        append_eot=append_eot,
        eot_id=find_eot_id(tokenizer, "--config.data.append_eot") if append_eot else -1,
    )
    encoded: list[Encoded] = []
    with (
        tqdm(total=len(records), desc="tokenise", unit="record", disable=not progress, file=sys.stderr) as bar,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        batches = [records[start : start + _BATCH] for start in range(0, len(records), _BATCH)]
        futures = [pool.submit(encode, batch) for batch in batches]
        try:
            for future in futures:
                encoded += future.result()
                bar.update(len(encoded) - bar.n)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return encoded


def _subset(count: int, fraction: float, seed: int, label: bool) -> Int64[np.ndarray, "kept"]:
    """Which round(fraction * count) of `count` rows to keep.

    Ranked by raw Philox words: numpy promises those streams never to change, unlike `Generator.permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, label])).random_raw(count)
    return np.argsort(words, kind="stable")[: round(fraction * count)]


def _warnings(rows: list[tuple[Record, Encoded]], is_desirable: Bool[np.ndarray, "num"]) -> list[str]:
    """What is odd about the labels of the rows, in lines for the log."""
    found = []
    num_good, num_bad = int(np.sum(is_desirable)), int(np.sum(~is_desirable))
    (count, rare), (_, other) = sorted([(num_good, "desirable"), (num_bad, "undesirable")])
    if count == 0:
        found.append("WARNING: all examples have the same label, so there are no good and bad answers to tell apart")
    elif count < _RARE * len(rows):
        found.append(
            f"WARNING: only {count} of {len(rows)} examples {'is' if count == 1 else 'are'} {rare}; in every batch "
            f"without one, that label's reward and the margin are NaN, and little is learned from it: "
            f"collect more, or lower config.data.{other}_fraction"
        )
    texts = [(row.prompt_length, row.tokens.tobytes()) for _, row in rows]
    good = {text for text, label in zip(texts, is_desirable, strict=True) if label}
    both = good & {text for text, label in zip(texts, is_desirable, strict=True) if not label}
    if both:
        found.append(f"WARNING: {len(both)} texts are labelled both desirable and undesirable; all of them count")
    return found


def _pack(
    rows: list[tuple[Record, Encoded]],
    is_desirable: Bool[np.ndarray, "num"],
    report: str,
    prompts: list[list[Message] | str],
) -> Examples:
    ids = [record.id for record, _ in rows]
    hashes = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return Examples(
        tokens=np.concatenate([encoded.tokens for _, encoded in rows]),
        offsets=np.cumsum([0, *(len(encoded.tokens) for _, encoded in rows)], dtype=np.int64),
        prompt_length=np.array([encoded.prompt_length for _, encoded in rows], np.int32),
        completion_length=np.array([encoded.completion_length for _, encoded in rows], np.int32),
        is_desirable=is_desirable,
        ids=ids,
        id_words=np.frombuffer(hashes, "<u4").astype(np.uint32).reshape(-1, 2),
        report=report,
        prompts=prompts,
    )


def _report(
    records: list[Record],
    skipped: list[str],
    encoded: list[Encoded],
    is_desirable: Bool[np.ndarray, "scorable"],
    kept: Bool[np.ndarray, "scorable"],
    max_length: int,
    notes: list[str],
) -> str:
    """One line per thing that happened to the data, with counts."""
    dropped = collections.Counter(
        f"whose prompt fills max_length {max_length}" if row.prompt_length >= max_length else "without a completion"
        for row in encoded
        if row.completion_length == 0
    )
    num_cut = sum(row.completion_length > 0 and row.text_length > max_length for row in encoded)
    lines = [
        f"{len(records)} records read",
        *(f"{count} dropped {reason}" for reason, count in sorted(dropped.items())),
        f"{num_cut} completions cut at max_length {max_length}",
        f"{np.sum(kept & is_desirable)} of {np.sum(is_desirable)} desirable and "
        f"{np.sum(kept & ~is_desirable)} of {np.sum(~is_desirable)} undesirable examples kept",
        *notes,
    ]
    if skipped:
        lines += [f"{len(skipped)} bad records skipped:", *skipped]
    return "\n".join(lines)
