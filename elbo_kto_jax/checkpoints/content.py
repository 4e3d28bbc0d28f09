"""What a folder of a checkpoint holds, as one digest: names and times of files tell nothing."""

import hashlib
from pathlib import Path

from etils import epath
from tqdm import tqdm

from elbo_kto_jax.checkpoints.folders import files_in
from elbo_kto_jax.runtime import paths


def content_of(folder: epath.Path) -> str:
    """32 hexadecimal digits of all files below `folder`, hidden ones (a download's notes) aside."""
    files = {str(file.relative_to(folder)): file for file in files_in(folder)}
    total = hashlib.blake2b(digest_size=16)
    shown = sorted(name for name in files if not any(part.startswith(".") for part in Path(name).parts))
    for name in tqdm(shown, desc="checking files", unit="file", disable=None, leave=False):
        part = hashlib.blake2b(digest_size=16)
        with paths.at(files[name]).open("rb") as file:
            while block := file.read(2**22):
                part.update(block)
        total.update(f"{name}\0{part.hexdigest()}\n".encode(errors="surrogateescape"))
    return total.hexdigest()
