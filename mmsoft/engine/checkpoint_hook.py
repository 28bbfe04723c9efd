"""Checkpoints that a kill cannot spoil, in place of MMEngine's hook."""

import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import barrier, master_only
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import FlexibleRunner

_PARTIAL = ".partial"


class _RemovesLater:
    """A file backend that notes what to remove instead of removing it."""

    def __init__(self, backend: LocalBackend):
        self.backend = backend
        self.outdated: set[Path] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.outdated.add(Path(path))


@MMENGINE_HOOKS.register_module(name="CheckpointHook", force=True)
class CheckpointHook(_CheckpointHook):
    """MMEngine's hook, with the same options and files, for runs that may be killed at any moment.

    MMEngine 0.10.7 writes a checkpoint under its final name, removes the old one before the new one
    exists, and rewrites ``last_checkpoint`` in place. A kill, a crash or a full disk in between
    leaves a truncated file (open-mmlab/mmdetection issue 4835) and, with ``max_keep_ckpts=1``,
    nothing to resume from. Here a checkpoint gets its name when all of it is on the disk, only then
    does the old one go, and ``--resume`` takes the newest complete checkpoint whatever
    ``last_checkpoint`` says. Nor does resuming execute what a checkpoint holds.

    Registered under MMEngine's own name once the models of this package are imported, so that every
    config gets it. Runs with ``FlexibleRunner``, and checkpoints that do not go to a local folder,
    are left as they were.
    """

    file_backend: Any

    def before_run(self, runner: Any) -> None:
        """Before MMEngine looks for a checkpoint to resume from, name the newest complete one.

        Raises:
            ValueError: every checkpoint there is truncated.
        """
        if getattr(runner, "_resume", False) and runner._load_from is None:
            self._mend_last_checkpoint(runner)
            barrier()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Drop a config that the checkpoint holds, which MMEngine would execute on ``--resume``.

        Checkpoints of MMCV 1 have one under this name, and crafted ones may; MMEngine's do not, and
        it only compares numbers of GPUs in it.
        """
        meta = checkpoint.get("meta")
        if isinstance(meta, dict) and meta.pop("config", None) is not None:
            runner.logger.warning("the config in the checkpoint's meta was dropped, not executed")

    @master_only
    def _mend_last_checkpoint(self, runner: Any) -> None:
        work_dir, pointer = Path(runner.work_dir), Path(runner.work_dir, "last_checkpoint")
        name = pointer.read_text().strip() if pointer.exists() else ""
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
        # The end of a zip file is its table of contents: what was cut short has none.
        complete = [path for path in files if zipfile.is_zipfile(path)]
        if name and Path(name) in complete:
            complete = [path for path in complete if _written(path) > _written(pointer)]
        if complete:
            newest = max(complete, key=_written)
            _write_whole(pointer, str(newest))
            runner.logger.warning(
                f"{pointer} named {name or 'nothing'}; resuming from the newest complete "
                f"checkpoint, {newest}"
            )
        elif files and not (name and (zipfile.is_zipfile(name) or Path(name).is_dir())):
            raise ValueError(
                f"cannot resume: {', '.join(sorted(map(str, files)))} truncated, and no complete "
                "checkpoint beside; start without --resume, or with load_from=... to name one"
            )

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        with self._whole(runner):
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        with self._whole(runner):
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _whole(self, runner: Any) -> Iterator[None]:
        """Write under a temporary name first, and remove what is outdated last."""
        backend, save = self.file_backend, runner.save_checkpoint
        # FlexibleRunner's strategies write folders, every rank a part. A backend that is not
        # MMEngine's own is a remote one, or we are in here already.
        if type(backend) is not LocalBackend or isinstance(runner, FlexibleRunner):
            yield
            return
        later, saved = _RemovesLater(backend), set()

        def save_whole(out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
            path = Path(out_dir, filename)
            save(out_dir, filename + _PARTIAL, *args, **kwargs)
            _rename_whole(path)
            saved.add(path)

        runner.save_checkpoint, self.file_backend = save_whole, later
        try:
            yield
        finally:
            del runner.save_checkpoint
            self.file_backend = backend
        for path in later.outdated - saved:
            backend.remove(path)


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


@master_only
def _rename_whole(path: Path) -> None:
    """Give the file under the temporary name its own, once it is on the disk."""
    partial = path.with_name(path.name + _PARTIAL)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _write_whole(path: Path, text: str) -> None:
    path.with_name(path.name + _PARTIAL).write_text(text)
    _rename_whole(path)
