"""The checkpoints of a training run: saving a step in the background, and going on from one.

A step is a checkpoint like any other (folders.py), with the optimizer's state and the progress beside the parameters,
so that it is a complete model, too. What is restored is checked against what was saved, part by part, and against what
the run expects.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from elbo_kto_jax.checkpoints.arrays import TreeSave, by_path, check_arrays, restore_tree, save_args
from elbo_kto_jax.checkpoints.digest import params_digest
from elbo_kto_jax.checkpoints.finite import check_finite
from elbo_kto_jax.checkpoints.folders import absolute, is_complete, remove_incomplete, remove_step
from elbo_kto_jax.checkpoints.manifest import (
    REMEDY,
    Adaptation,
    AssetsSave,
    StoredTree,
    other_base,
    read_manifest,
    stored_assets,
    unsaid_mask,
)
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.runtime import paths, processes
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import from_json, writing


class TrainingState(NamedTuple):
    """What a step of training saves: parameters, optimizer state, and where training stands (JSON)."""

    params: Any
    opt_state: Any
    progress: dict


class TrainingCheckpoints:
    """The checkpoints/ folder of a training run: one checkpoint per saved step, written in the background."""

    def __init__(
        self,
        directory: str | os.PathLike,
        adaptation: Adaptation | None = None,
        model: ModelConfig | None = None,
    ):
        """Opens or creates the folder, and removes what an interrupted save left there.

        Args:
          directory: the folder, usually WORKDIR/checkpoints.
          adaptation: what `params` belong to if they are adapters.
          model: whose special tokens the run uses; None: those of config.json.
        """
        self._adaptation, self._model = adaptation, model
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True, save_root_metadata=False, enable_async_checkpointing=True
        )
        folder = absolute(directory)
        with writing(directory):
            if paths.is_remote(folder):
                processes.first(lambda: remove_incomplete(folder))
            self._manager = ocp.CheckpointManager(folder, options=options)

    def save(self, step: int, state: TrainingState, assets: Mapping[str, bytes]) -> None:
        """Starts to save a step; returns when the arrays may be donated or changed, before they are on disk.

        Args:
          step: name of the checkpoint; must be new.
          state: what to save; `progress` must be JSON.
          assets: config.json and tokenizer files of the model, so that the step is a complete model.
        """
        trees = {"params": state.params, "opt_state": state.opt_state}
        stored = {item: StoredTree.of(by_path(tree), params_digest(tree)) for item, tree in trees.items()}
        items = {
            "assets": AssetsSave(
                assets,
                lambda: stored,
                self._adaptation,
                state.progress,
                None if self._model is None else unsaid_mask(self._model, assets),
            ),
            "progress": ocp.args.JsonSave(state.progress),
        }
        items |= {item: TreeSave(tree, save_args=jax.tree.map(save_args, tree)) for item, tree in trees.items()}
        with writing(self._manager.directory / str(step)):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, abstract: TrainingState) -> TrainingState:
        """Reads a step back.

        Args:
          step: one of the saved steps.
          abstract: trees of jax.ShapeDtypeStruct with shardings for `params` and `opt_state`; `progress` is not used.

        Raises:
          UserError: a part of the step is missing or damaged, or does not have the expected form.
        """
        folder = self._manager.directory / str(step)
        progress_file = folder / "progress" / "metadata"
        try:
            progress = dict(from_json(progress_file.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{progress_file}: missing or damaged; {REMEDY}") from error
        manifest, trees = read_manifest(folder), {}
        ours, theirs = self._adaptation, manifest.lora
        if ours is not None and theirs is not None and ours.base_digest != theirs.base_digest:
            raise other_base(folder, theirs, ours.base_path, ours.base_digest)
        if ours is not None and theirs is not None and (ours.rank, ours.alpha) != (theirs.rank, theirs.alpha):
            raise UserError(
                f"{folder}: its adapters have rank {theirs.rank} and alpha {theirs.alpha:g}, the config asks for "
                f"rank {ours.rank} and alpha {ours.alpha:g}; choose another --workdir"
            )
        if manifest.progress not in (None, progress):
            raise UserError(f"{progress_file}: damaged: it is not what was saved; {REMEDY}")
        if not isinstance(progress, dict) or progress.get("step", step) != step:
            raise UserError(f"{folder}: not step {step} but a copy of another: {progress_file} says so; remove it")
        stored_assets(folder, manifest)
        for item in ("params", "opt_state"):
            if item not in manifest.trees:
                raise UserError(f"{folder}: a model without {item}, not a step of training; {REMEDY}")
            tree, stored = getattr(abstract, item), manifest.trees[item]
            check_arrays(folder / item, stored, {path: leaf.shape for path, leaf in by_path(tree).items()})
            trees[item] = restore_tree(folder / item, stored, tree)
        for path, leaf in by_path(trees["params"]).items():
            check_finite(leaf, [f"{folder}: array {'/'.join(path)}"])
        return TrainingState(**trees, progress=progress)

    def restore_latest(self, abstract: TrainingState) -> TrainingState:
        """Reads the latest step back, as `restore` does.

        Raises:
          UserError: it cannot be used; the newest step that can is named.
        """
        latest, *earlier = sorted(self._manager.all_steps(), reverse=True)
        try:
            return self.restore(latest, abstract)
        except UserError as error:
            damaged = [latest]
            for step in earlier:
                try:
                    self.restore(step, abstract)
                except UserError:
                    damaged.append(step)
                    continue
                folders = ", ".join(str(self._manager.directory / str(step)) for step in damaged)
                offer = (
                    f"The newest step that is whole is {step}: remove {folders}, and the same command goes on from it"
                )
                raise UserError(f"{error}\n{offer}") from error
            raise UserError(
                f"{error}\nNo earlier step is whole either; remove {self._manager.directory} to start again"
            ) from error

    def keep_latest(self, count: int, besides: int) -> None:
        """Waits for the saves that were started, and removes all steps but the latest `count` and the step `besides`.

        What another command reads stays until the next time. A count of 0 keeps all.
        """
        self.wait()

        def remove() -> None:
            steps = sorted(int(step.name) for step in self._manager.directory.iterdir() if step.name.isdecimal())
            for step in steps[:-count]:
                if step != besides:
                    remove_step(self._manager.directory, step)

        if count:
            processes.first(remove)

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step is there, complete."""
        folder = self._manager.directory / str(step)
        return folder.is_dir() and is_complete(folder)

    def latest_step(self) -> int | None:
        """The last step whose checkpoint is complete; None if there is none."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Blocks until every save that was started is on disk; raises what went wrong in one."""
        with writing(self._manager.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does and releases the background threads."""
        with writing(self._manager.directory):
            self._manager.close()
