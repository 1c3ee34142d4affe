"""A run's output folder: who may write into it, and its saved states.

A folder is finished if it holds results.json, and unfinished if it holds config.toml, state/ or a log without results.
The newest two states are kept, because a file can be damaged after it was written. In a process group rank 0 writes for
all. States of sharded runs are an exception: each is a folder into which every rank writes its part, in the background.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mimref.config.base import dump_config
from mimref.config.load import flatten, load_config
from mimref.config.run import TrainingConfig
from mimref.data.open import absolute_spec
from mimref.distributed.collectives import barrier, gather_lists, max_over_ranks
from mimref.distributed.group import own_rank, restarted, this_launch
from mimref.encoders.checkpoints import Checkpoint
from mimref.encoders.published import PACKAGED
from mimref.errors import CheckpointError, ConfigError, DataError, OutputError
from mimref.files import check_writable, remove_halves, replace_folder, write_bytes
from mimref.locks import folder_lock
from mimref.progress import Listener
from mimref.training.checkpoint import read_state, write_state

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# results.json is removed first: without it, the remains of a replaced run cannot pass for a finished run.
_OUR_FILES = (
    "results.json",
    "results.csv",
    "encoder.safetensors",
    "split[0-9]*.safetensors",
    "config.toml",
    "metrics.jsonl",
    "heads.pt",
    "exhibits.json",
    "report.html",
    "curve.png",
)
_EVALUATION = "evaluate.*"
# Settings that do not affect training.
_MAY_CHANGE = (
    "preset",
    "strict",
    "device",
    "workers",
    "micro_batch",
    "activation_checkpointing",
    "shard",
    "compile",
    "heads_stage.knn_every_epochs",
    "monitor.*",
    _EVALUATION,
    "data.max_bad",
    "data.download",
)
C = TypeVar("C", bound=TrainingConfig)


@dataclass(frozen=True)
class Origin:
    """Where a run's settings come from; written at its start, in case it is killed before it saves a state."""

    preset: str | None
    derived: list[dict[str, Any]]
    """Settings that a recipe has derived or adapted."""
    weights: str | None = None
    """Fingerprint of the weights that the run starts from; None if they are random, or in folders of older versions."""


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a training run."""

    path: Path

    @property
    def finished(self) -> bool:
        """Whether a run has written its results here."""
        return os.path.isfile(self.path / "results.json")

    @property
    def unfinished(self) -> bool:
        """Whether a run was started here but has not finished."""
        names = ("config.toml", "state", "metrics.jsonl")
        return not self.finished and any(os.path.exists(self.path / name) for name in names)

    def continues_launch(self) -> bool:
        """Return whether torchrun has restarted this process on a run that the same launch started or resumed here.

        Rank 0 decides for all.
        """
        found = False
        if own_rank() == 0:
            with suppress(OSError, ValueError, TypeError):
                found = restarted(*json.loads((self.path / "state" / "launch.json").read_text()))
        return bool(max_over_ranks(int(found)))

    def _states(self) -> list[Path]:
        """Return the saved states, newest first: files, or folders for sharded states."""
        found = (self.path / "state").glob("step*")
        return sorted((each for each in found if each.suffix == ".pt" or each.is_dir()), reverse=True)

    def holds_result(self, *, resume: bool, force: bool) -> bool:
        """Return whether the run to resume has finished here; if not, `check` the folder. Rank 0 decides for all."""
        found = False
        # Other ranks must not look before rank 0 has checked, nor after it has begun to write.
        if own_rank() == 0:
            found = resume and not force and self.finished
            if not found:
                self.check(resume=resume, force=force)
        return bool(max_over_ranks(int(found)))

    def check(self, *, resume: bool, force: bool) -> None:
        """Raise OutputError if a run must not start or resume here. Writes nothing."""
        if resume and force:
            raise OutputError("--resume continues a run and --force replaces it: choose one")
        check_writable(self.path)
        if resume and not self.unfinished and not self.finished:
            raise OutputError(
                f"{self.path}: holds no run to resume; name its folder with --out, or omit --resume to start one"
            )
        if resume and not self.finished and not os.path.isfile(self.path / "config.toml"):
            raise OutputError(
                f"{self.path}: holds no settings to resume (config.toml is missing); choose another --out, or --force "
                "instead of --resume to start over"
            )
        if resume or force:
            return
        if self.finished:
            raise OutputError(f"{self.path}: holds a finished run; choose another --out, or --force to replace it")
        if self.unfinished:
            raise OutputError(f"{self.path}: holds an unfinished run; --resume continues it, --force replaces it")
        for name in _OUR_FILES:
            for file in self.path.glob(name):
                wrong = f"already holds {file.name}; choose another --out, or --force to replace it"
                raise OutputError(f"{self.path}: {wrong}")

    @contextmanager
    def locked(self, *, resume: bool, force: bool) -> Iterator[None]:
        """Keep other runs out of the folder, from the first check to the last file.

        Raises OutputError if another run is using it, or has used it since `check` and left files behind.
        """
        if own_rank() > 0:
            yield
            return
        with folder_lock(self.path):
            self.check(resume=resume, force=force)
            if resume and self.finished:
                raise OutputError(
                    f"{self.path}: another process has just finished this run; --resume prints its results"
                )
            yield

    def origin(self) -> Origin | None:
        """Return what the run to resume recorded at its start; None if missing (as in older versions) or damaged."""
        with suppress(OSError, ValueError, TypeError):
            return Origin(**json.loads((self.path / "state" / "origin.json").read_text()))
        return None

    def prepare(
        self,
        config: TrainingConfig,
        derived: Sequence[dict[str, Any]] = (),
        checkpoint: Checkpoint | None = None,
        *,
        resume: bool,
        force: bool,
    ) -> None:
        """Prepare the folder; write config.toml and the origin of its settings.

        checkpoint: the weights that the run starts from, if any. For a resumed run, settings and weights are first
        compared with the old ones. force: remove an earlier run's own files and nothing else. Raises OutputError if the
        folder cannot be written, ConfigError if a setting that affects training has changed, CheckpointError if the
        weights have.
        """
        if own_rank() == 0:
            text = dump_config(config).encode()
            if resume and (self.path / "config.toml").is_file():
                self._compare(config, checkpoint)
            self._make_ready(force)
            # First: without it, nothing else in the folder can be resumed.
            write_bytes(self.path / "config.toml", text)
            origin = Origin(config.preset, [*derived], None if checkpoint is None else checkpoint.fingerprint)
            write_bytes(self.path / "state" / "origin.json", json.dumps(asdict(origin)).encode())
            if launch := this_launch():
                write_bytes(self.path / "state" / "launch.json", json.dumps(launch).encode())
        barrier()

    def _make_ready(self, force: bool) -> None:
        state = self.path / "state"
        try:
            if force:
                for name in _OUR_FILES:
                    for file in self.path.glob(name):
                        file.unlink(missing_ok=True)
                if state.is_dir():
                    shutil.rmtree(state)
            self.path.mkdir(parents=True, exist_ok=True)
            # Remove files that a killed run has left half-written.
            for name in _OUR_FILES:
                remove_halves(self.path, name)
            remove_halves(state, "step*")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from error

    def _compare(self, config: TrainingConfig, checkpoint: Checkpoint | None) -> None:
        wrong, origin = f"cannot resume {self.path}", self.origin()
        check_same(load_config(type(config), str(self.path / "config.toml")), config, wrong)
        if checkpoint and origin and origin.weights not in (None, checkpoint.fingerprint):
            raise CheckpointError(
                f"{wrong}: {checkpoint.path} holds other weights than at its start; restore them, or start over in "
                "another --out"
            )

    def save_state(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save the training state atomically, and keep the previous one as a fallback.

        Only rank 0 calls `state` and writes. Needs disk space for two states, and for three while one is written.
        Raises OutputError if the state cannot be written; the earlier ones are then untouched.
        """
        if own_rank() == 0:
            saved = state()
            newest = self.path / "state" / f"step{saved['step']:010}.pt"
            write_state(newest, saved)
            self._keep_two(newest)
        # torchrun stops all ranks when one has exited, so none may exit before the state is on disk.
        barrier()

    def publish(self, temporary: Path, step: int) -> None:
        """Rename a complete folder to the state of a step, and keep the previous state. Raises OutputError."""
        newest = self.path / "state" / f"step{step:010}"
        try:
            replace_folder(temporary, newest)
        except OSError as error:
            raise OutputError(f"cannot write {newest}: {error.strerror}") from error
        self._keep_two(newest)

    def _keep_two(self, newest: Path) -> None:
        """Remove all states except the one just saved and the one before it."""
        others = [file for file in self._states() if file != newest]
        # Later ones are damaged: the run would have resumed from them.
        fallback = next((file for file in others if file < newest), None)
        for file in others:
            if file != fallback:
                with suppress(OSError):  # it only takes up space
                    if file.is_dir():
                        # Rename it first to a name that no state has: a killed process may leave half of it.
                        shutil.rmtree(file.rename(file.with_name(f".{file.name}.old.tmp")))
                    else:
                        file.unlink()

    def load_state(self, listener: Listener | None = None, mesh: "DeviceMesh | None" = None) -> dict[str, Any] | None:
        """Return the newest intact state, or None if the run has saved none; call this on all ranks.

        listener: warned if a newer state is damaged. mesh: mesh of a sharded run's ranks, which then get their own
        parts of tensors that were saved sharded; all other tensors are complete, and on the CPU. Raises OutputError if
        all states are damaged or one cannot be read, DataError if ranks see different states.
        """
        files = self._states()
        newest = set(gather_lists([files[0].name if files else ""]))
        if len(newest) > 1 and any(name and not name.endswith(".pt") for name in newest):  # all ranks read a folder
            listed = ", ".join(sorted(name or "none" for name in newest))
            raise DataError(
                f"the processes see different saved states: {listed}; --out must be the same for all of them"
            )
        for file in files:
            if (state := _read(file, mesh)) is not None:
                if listener and file != files[0]:
                    listener.warn(f"{files[0]}: damaged state; continuing from the one before, of step {state['step']}")
                return state
        if not files:
            return None
        also = ", and so is the one before" if len(files) > 1 else ""
        raise OutputError(f"{files[0]}: damaged state{also}; --force instead of --resume starts over")

    def drop_state(self) -> None:
        """Remove the states of a finished run."""
        shutil.rmtree(self.path / "state", ignore_errors=True)


def _read(file: Path, mesh: "DeviceMesh | None") -> dict[str, Any] | None:
    if file.suffix == ".pt":
        return read_state(file)
    from mimref.training.shards import read_shards  # imports much that other runs do not need

    return read_shards(file, mesh)


def check_same(then: C, now: C, wrong: str, *, evaluated: bool = False) -> None:
    """Raise ConfigError if two settings differ in what is trained or, with `evaluated`, in how it is evaluated.

    wrong: what cannot be done then; the message begins with it.
    """
    before, after = (flatten(each.model_dump()) for each in (then, now))
    may_change = [free for free in _MAY_CHANGE if not (evaluated and free == _EVALUATION)]
    for key in before:
        if before[key] != after[key] and not any(fnmatchcase(key, free) for free in may_change):
            raise ConfigError(
                f"{wrong} with another {key}: it was {shown(before[key])} and is now {shown(after[key])}; restore "
                "it, or start over in another --out"
            )


def with_absolute_paths(config: C) -> C:
    """Return the settings with absolute paths, so that config.toml means the same wherever it is read."""
    data = config.data
    spec = None if data.spec is None else absolute_spec(data.spec)
    updates: dict[str, Any] = {
        "data": data.model_copy(update={"spec": spec, "root": data.root and absolute_path(data.root)})
    }
    if weights := config.encoder.weights:
        updates["encoder"] = config.encoder.model_copy(update={"weights": absolute_path(weights)})
    for name in config.path_settings:
        if value := getattr(config, name):
            updates[name] = list(map(absolute_path, value)) if isinstance(value, list) else absolute_path(value)
    return config.model_copy(update=updates)


def absolute_path(name: str) -> str:
    """Return the absolute path of an existing file or folder; leave names of published and packaged weights."""
    if name in PACKAGED:
        return name
    path = os.path.abspath(os.path.expanduser(name))
    return path if os.path.exists(path) else name


def shown(value: object) -> str:
    """Return the value of a setting for a message."""
    return "unset" if value is None else repr(value)
