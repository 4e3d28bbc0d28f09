"""python -m launch.data_at_size --workdir=DIR [--records=10000,100000,1000000]: what it takes to prepare many records.

Makes files of records of about 1 KB, the same ones everywhere, and a tokenizer of 8,000 tokens for them. Then each file
is prepared as `train` does it, and once more, when it finds what it prepared before; each time in a process of its own,
so that its memory is that of this work alone. What was made is removed from DIR afterwards, unless --keep.

    WORKDIR/table.md     the table: seconds (the wall clock), seconds of processors, memory at most

The seconds are worth looking at on a machine that does nothing else; those of processors change less. Memory is read
from /proc, so this runs on Linux.
"""

import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints import tiny
from elbo_kto_jax.checkpoints.assets import read_assets
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data.examples import load_examples
from elbo_kto_jax.data.prepared import Cache
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json

_FORMS = ("jsonl", "parquet")
_PROMPT, _COMPLETION = 400, 500  # characters; with the names of the fields, a line has about 1 KB
_WORDS, _VOCABULARY = 5000, 8000
_AT_ONCE = 1000  # records


def main(argv: list[str]) -> dict:
    flags = cli.Flags("launch.data_at_size", "Measure what it takes to prepare many records.")
    flags.add_argument("--workdir", required=True, help="folder for the records and what is made of them")
    flags.add_argument("--records", type=str, default="10000,100000,1000000", help="how many (default: %(default)s)")
    flags.add_argument("--forms", type=str, default=",".join(_FORMS), help="of the files (default: %(default)s)")
    flags.add_argument("--processes", type=int, default=0, help="that prepare; 0: one for each core")
    flags.add_argument("--keep", action="store_true", help="leave the records and what is prepared in --workdir")
    flags.add_argument("--measure", default="", help="the file of records to prepare in this process; for this command")
    options = flags.parse_flags(argv)
    folder = paths.here(options.workdir, "--workdir")
    if options.measure:
        return _prepare(folder, Path(options.measure), options.processes)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder / "tokenizer")
    rows = []
    for count, form in itertools.product(map(int, options.records.split(",")), options.forms.split(",")):
        file = folder / f"{count}.{form}"
        _write_records(file, count)
        for when in ("first", "again"):
            rows.append({"records": count, "form": form, "start": when, **_measured(folder, file, options.processes)})
            cli.log.info("%s", to_json(rows[-1]))
        if not options.keep:
            file.unlink()
            shutil.rmtree(folder / "cache", ignore_errors=True)
    atomic_write(folder / "table.md", _table(rows))
    return {"table": str(folder / "table.md"), "rows": rows}


def _measured(folder: Path, file: Path, processes: int) -> dict[str, Any]:
    """What a process took that prepares the records of a file."""
    command = [sys.executable, "-m", "launch.data_at_size", f"--workdir={folder}", f"--measure={file}"]
    with subprocess.Popen([*command, f"--processes={processes}"], stdout=subprocess.PIPE) as running:
        if running.stdout is None:
            raise RuntimeError("started without a pipe")
        said = running.stdout.read().splitlines()
        _, status, used = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise UserError(f"{file}: could not be prepared; the lines above say why")
    found = json.loads(said[-1])
    return {**found, "cpu_seconds": round(used.ru_utime + used.ru_stime - found.pop("cpu_before"), 1)}


def _prepare(folder: Path, file: Path, processes: int) -> dict[str, Any]:
    tokenizer = build_tokenizer(read_assets(folder / "tokenizer"), "tokenizer")
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    peaks = {"mib": 0.0, "mib_of_a_worker": 0.0}
    threading.Thread(target=_watch, args=(peaks,), daemon=True).start()
    examples = load_examples(
        file,
        tokenizer,
        max_length=4096,
        exact_window=True,
        append_eot=False,
        desirable_fraction=1.0,
        undesirable_fraction=1.0,
        seed=0,
        needs_label=True,
        skip_bad=False,
        progress=False,
        cache=Cache(folder / "cache", is_shared=True),
        processes=processes,
    )
    seconds = time.monotonic() - began
    return {
        "seconds": round(seconds, 1),
        **{name: round(mib) for name, mib in {**peaks, "mib": _peak_mib("self")}.items()},
        "tokens": int(examples.offsets[-1]),
        "digest": examples.digest(),
        "cpu_before": before.ru_utime + before.ru_stime,
    }


def _watch(peaks: dict[str, float]) -> None:
    """Keeps the largest memory of a process that this one has started."""
    while True:
        time.sleep(0.5)
        with contextlib.suppress(OSError):  # it has ended
            for file in Path("/proc/self/task").glob("*/children"):
                found = [_peak_mib(pid) for pid in file.read_text(encoding="ascii").split()]
                peaks["mib_of_a_worker"] = max([peaks["mib_of_a_worker"], *found])


def _peak_mib(pid: str) -> float:
    """The most memory that a process has had at once; `getrusage` begins with that of the program before it."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| records of 1 KB | form | start | seconds | of processors | MiB | MiB of a worker |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row[name] for name in ("form", "start", "seconds", "cpu_seconds", "mib", "mib_of_a_worker")]
        lines.append(f"| {row['records']:,} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _words() -> np.ndarray:
    """Invented words of one to four syllables."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]
    return np.array(["".join(rng.choice(syllables, size=rng.integers(1, 5))) for _ in range(_WORDS)])


def _texts(words: np.ndarray, count: int, characters: int, rng: np.random.Generator) -> list[str]:
    """Texts in which a few words are frequent and most are rare, as in a language."""
    chosen = rng.zipf(1.3, size=(count, characters // 4)) % len(words)
    return [" ".join(words[row])[:characters] for row in chosen]


def _records(count: int) -> Iterator[dict[str, Any]]:
    words = _words()
    for start in range(0, count, _AT_ONCE):
        rng = np.random.default_rng([1, start])
        prompts, completions = (_texts(words, _AT_ONCE, length, rng) for length in (_PROMPT, _COMPLETION))
        for i in range(min(_AT_ONCE, count - start)):
            yield {
                "prompt": [{"role": "user", "content": prompts[i]}],
                "completion": [{"role": "assistant", "content": completions[i]}],
                "label": (start + i) % 2 == 1,
            }


def _write_records(file: Path, count: int) -> None:
    import pyarrow
    import pyarrow.parquet

    if file.suffix == ".jsonl":
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in _records(count))
        return
    writer = None
    records = _records(count)
    while part := list(itertools.islice(records, 10 * _AT_ONCE)):
        table = pyarrow.Table.from_pylist(part)
        writer = writer or pyarrow.parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer with a token for the frequent words, and the quickstart's template."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(_words(), 2000, 1000, np.random.default_rng(9)), trainer)
    special = (tiny.BOS, tiny.EOS, tiny.MASK, tiny.START_HEADER, tiny.END_HEADER, tiny.EOT)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tiny.BOS,
        eos_token=tiny.EOS,
        pad_token=tiny.EOS,
        chat_template=tiny.CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


if __name__ == "__main__":
    cli.run(main)
