"""Checkpoints that a kill cannot corrupt, in place of MMEngine's hook."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.runner import FlexibleRunner

from mmsoft.checkpoint import read_checkpoint
from mmsoft.fileio import write_whole
from mmsoft.registry import HOOKS

_NO_STEPS = "does not say after how many iterations and epochs it was saved"


class _DeferredRemoval:
    """A file backend that records what to remove instead of removing it.

    Nothing outside the folder of the checkpoints is recorded: the paths come from the checkpoint
    that a run was resumed from, which may be crafted, or belong to a copy of another run.
    """

    def __init__(self, backend: LocalBackend, folder: str):
        self.backend = backend
        self.folder = Path(folder)
        self.outdated: set[Path] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def isdir(self, path: str) -> bool:
        return False  # MMEngine would remove the folder; checkpoints here are files

    def isfile(self, path: str) -> bool:
        return Path(path).parent == self.folder and self.backend.isfile(path)

    def remove(self, path: str) -> None:
        self.outdated.add(Path(path))


@HOOKS.register_module()
class CheckpointHook(_CheckpointHook):
    """MMEngine's hook, with the same options and files, for runs that may be killed at any moment.

    MMEngine 0.10.7 writes a checkpoint under its final name, removes the old one before the new one
    exists, and rewrites ``last_checkpoint`` in place. A kill, a crash or a full disk in between
    leaves a truncated file (open-mmlab/mmdetection issue 4835) and, with ``max_keep_ckpts=1``,
    nothing to resume from. Here a checkpoint gets its name when all of it is on the disk, then
    ``last_checkpoint`` names it, and only then does the old one go.

    ``--resume`` takes the checkpoint that ``last_checkpoint`` names. Where it names none, or one
    that is missing, truncated or refused, the checkpoint of the most iterations is taken, and of
    these the one of the most epochs, as recorded in the files: names and times change when a run is
    copied or restored. Of copies of the same state the last path is taken. Resuming executes no
    code from a checkpoint.

    Enabled by its name, as in our configs::

        default_hooks = dict(checkpoint=dict(type='mmsoft.CheckpointHook'))

    Runs with ``FlexibleRunner``, and checkpoints outside a local folder, are not affected.
    """

    file_backend: Any

    def before_run(self, runner: Any) -> None:
        """Before MMEngine looks for a checkpoint to resume from, see that a complete one is named.

        Raises:
            ValueError: there are checkpoints, but none is complete. Raised in every process.
        """
        automatic = runner._resume and runner._load_from is None
        if not automatic or isinstance(runner, FlexibleRunner):
            return
        problem = [self._repair_last_checkpoint(runner) if is_main_process() else ""]
        broadcast_object_list(problem)
        if problem[0]:
            raise ValueError(problem[0])

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Check the checkpoint's meta and drop a config there, which MMEngine executes to resume.

        Checkpoints of MMCV 1 have one under this name, and crafted ones may; MMEngine's do not, and
        it only compares numbers of GPUs in it.

        Raises:
            ValueError: it does not say how to resume from it: iterations and epochs done and, where
                it has them, the seed and the numbers of the checkpoints to keep must be integers.
        """
        meta = checkpoint.get("meta")
        if isinstance(meta, dict) and meta.pop("config", None) is not None:
            runner.logger.warning("the config in the checkpoint's meta was dropped, not executed")
        if not runner._resume:
            return
        if _steps(checkpoint) is None:
            raise ValueError(f"cannot resume: the checkpoint {_NO_STEPS}")
        hub = checkpoint.get("message_hub")
        info = hub.get("runtime_info") if isinstance(hub, dict) else None
        kept = info.get("keep_ckpt_ids", []) if isinstance(info, dict) else []
        if type(checkpoint["meta"].get("seed", 0)) not in (int, NoneType):
            raise ValueError("cannot resume: the seed in the checkpoint is not an integer")
        if type(kept) is not list or any(type(number) is not int for number in kept):
            raise ValueError("cannot resume: keep_ckpt_ids in the checkpoint are not integers")

    def _repair_last_checkpoint(self, runner: Any) -> str:
        """Let ``last_checkpoint`` name a complete checkpoint; returns why that cannot be done."""
        work_dir, pointer = Path(runner.work_dir), Path(runner.work_dir, "last_checkpoint")
        name = pointer.read_text(errors="replace").strip() if pointer.exists() else ""
        if "://" in name:  # remote storage
            return ""
        problems: dict[Path, str] = {}
        if name and _read_steps(Path(name), problems):
            return ""
        folders = {work_dir, Path(name).parent} if name else {work_dir}
        if self.out_dir is not None and Path(self.out_dir) != work_dir:
            folders.add(Path(self.out_dir, work_dir.name))  # as before_train will have it
        pattern = re.escape(self.filename_tmpl).replace(r"\{\}", r"\d+")
        files = [
            path
            for folder in folders
            if folder.is_dir()
            for path in folder.iterdir()
            if re.fullmatch(pattern, path.name) and path.is_file()
        ]
        complete = [(*steps, str(path)) for path in files if (steps := _read_steps(path, problems))]
        reasons = "; ".join(problems[path] for path in sorted(problems))
        if complete:
            iterations, epochs, path = max(complete)
            with write_whole(pointer) as partial:
                partial.write_text(path)
            runner.logger.warning(
                f"{pointer} names {name or 'nothing'}; resuming from the complete checkpoint of "
                f"the most iterations, {path} (iteration {iterations}, epoch {epochs})"
                + (f". Skipped: {reasons}" if reasons else "")
            )
            return ""
        if problems:
            return (
                f"cannot resume: {reasons}. There is no other complete checkpoint; start without "
                "--resume, or with load_from=... to name one"
            )
        return ""

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        with self._atomic_saves(runner):
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        with self._atomic_saves(runner):
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _atomic_saves(self, runner: Any) -> Iterator[None]:
        """Write under a temporary name first, and remove outdated checkpoints last."""
        backend, save = self.file_backend, runner.save_checkpoint
        # FlexibleRunner's strategies write folders, every rank a part. Another
        # backend is a remote one, or the call is nested.
        if type(backend) is not LocalBackend or isinstance(runner, FlexibleRunner):
            yield
            return
        later, saved = _DeferredRemoval(backend, self.out_dir), set()

        def save_atomically(out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
            path = Path(out_dir, filename)
            if is_main_process():
                with write_whole(path) as partial:
                    save(out_dir, partial.name, *args, **kwargs)
            else:  # which writes nothing, but gathers its part of the state
                save(out_dir, filename, *args, **kwargs)
            saved.add(path)

        runner.save_checkpoint, self.file_backend = save_atomically, later
        try:
            yield
        finally:
            del runner.save_checkpoint
            self.file_backend = backend
        for path in later.outdated - saved:
            backend.remove(path)


def _steps(checkpoint: Any) -> tuple[int, int] | None:
    """Iterations and epochs that a checkpoint was saved after."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        iterations, epochs = meta.get("iter"), meta.get("epoch")
        if type(iterations) is int and type(epochs) is int:
            return iterations, epochs
    return None


def _read_steps(path: Path, problems: dict[Path, str]) -> tuple[int, int] | None:
    """The same of a file; if it is not complete, None, and the reason under ``problems``."""
    try:
        steps = _steps(read_checkpoint(path, lazily=True))
    except (OSError, ValueError) as error:
        problems[path] = str(error)
        return None
    if steps is None:
        problems[path] = f"{path} {_NO_STEPS}"
    return steps
