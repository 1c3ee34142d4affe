"""When the training loop saves: after epochs and by the clock, but never for more than a small share of the time."""

from types import SimpleNamespace

import pytest

from mimref.progress import Silent
from mimref.training import job as loop
from mimref.training.job import Job, train
from mimref.training.signals import StopSignal


class Clocked(Job[float]):
    """A job of five updates per epoch; every batch is the number of seconds that its update takes."""

    label = "clocked"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, epochs: int, save_s: float) -> None:
        self.steps_per_epoch, self.total, self.save_s = 5, 5 * epochs, save_s
        self.now, self.saves, self.ended = 1000.0, list[int](), list[int]()
        monkeypatch.setattr(loop, "SAVE_COST", 20.0)
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: self.now))

    def update(self, batch: float) -> None:
        self.now += batch

    def end_epoch(self, epoch: int) -> None:
        self.ended.append(epoch)

    def save(self) -> None:
        self.saves.append(self.step)
        self.now += self.save_s


def test_cheap_saves_follow_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Clocked(monkeypatch, epochs=4, save_s=0.2)
    train(job, [1.0] * 20, Silent())
    assert job.saves == [5, 10, 15, 20] and job.ended == [1, 2, 3, 4]


def test_dear_saves_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Clocked(monkeypatch, epochs=101, save_s=1.0)  # an epoch takes 5 s
    train(job, [1.0] * 505, Silent())
    # After a save, 20 s have to pass: four epochs.
    assert job.saves == [*range(5, 505, 20), 505] and job.ended == [*range(1, 102)]


def test_dear_saves_of_jobs_with_short_epochs_wait_for_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Clocked(monkeypatch, epochs=300, save_s=1.0)
    job.saves_every_epoch = False
    train(job, [1.0] * 1500, Silent())
    assert job.saves == [600, 1200, 1500]


def test_all_ranks_save_when_one_of_them_must(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Clocked(monkeypatch, epochs=4, save_s=100.0)
    monkeypatch.setattr(loop, "max_over_ranks", lambda own: max(own, int(job.step == 12 and 12 not in job.saves)))
    train(job, [1.0] * 20, Silent(), stop=StopSignal())
    assert job.saves == [5, 12, 20]
