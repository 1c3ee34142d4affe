"""Shards on a server: the same images, order and labels as local shards, and faults of servers."""

import http.server
import re
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mimref.config.base import DataConfig
from mimref.data.decode import BadImage
from mimref.data.index import cache as index_cache
from mimref.data.index import remote
from mimref.data.loader import view_batches
from mimref.data.open import absolute_spec, open_source
from mimref.data.readers.wds import ShardSource
from mimref.data.views import CropGroup
from mimref.errors import DataError, Interrupted
from mimref.refinement.run import refine
from tests.tiny import Watcher, refine_config, saved_step, write_weights
from tests.wds_shards import labels_of, numbers, samples, write_shard


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves parts of files, as servers of large files do, and misbehaves as `faults` specifies."""

    faults: dict[str, int]
    asked: list[tuple[str, str]]

    def fails(self) -> bool:
        """Whether this request is answered with an error."""
        left = self.faults.get("errors", 0)
        self.faults["errors"] = max(0, left - 1)
        if left:
            self.send_error(503)
        return bool(left)

    def do_HEAD(self) -> None:
        self.asked.append((Path(self.path).name, "HEAD"))
        if not self.fails():
            super().do_HEAD()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        time.sleep(self.faults.get("seconds", 0))
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        self.asked.append((path.name, self.headers.get("Range") or ""))
        if self.fails():
            return
        if part and self.faults.get("no parts"):
            part = None
        if part is None or not path.is_file():
            super().do_GET()
            return
        first, last = int(part[1]), int(part[2])
        content = path.read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(content[first : last + 1])))
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def end_headers(self) -> None:
        if self.command == "HEAD":
            self.send_header("Accept-Ranges", "none" if self.faults.get("says no parts") else "bytes")
            self.send_header("ETag", str(self.faults.get("version", 0)))
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class ManyAtOnce(http.server.ThreadingHTTPServer):
    request_queue_size = 100


class Server:
    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []
        handler = type("Ours", (Handler,), {"faults": self.faults, "asked": self.asked})
        self.server = ManyAtOnce(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Four training shards of 13, 1, 8 and 11 labelled images, and four validation shards of 4 each."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    for number, count in enumerate((13, 1, 8, 11)):
        write_shard(tmp_path / "train" / f"{number:03}.tar", samples(100 * number, count, classes=3))
        write_shard(tmp_path / "val" / f"{number:03}.tar", samples(1000 + 10 * number, 4, classes=3))
    started = Server(tmp_path)
    yield started
    started.server.shutdown()
    started.server.server_close()


def opened(spec: str, split: Any = "train") -> ShardSource:
    source = open_source(DataConfig(spec=f"wds:{spec}"), split)
    assert isinstance(source, ShardSource)
    return source


def test_they_are_the_images_of_local_shards(server: Server, tmp_path: Path) -> None:
    for split, count in (("train", 33), ("val", 16)):
        there, here = opened(f"{server.url}/{{split}}/{{000..003}}.tar", split), opened(str(tmp_path), split)
        assert numbers(there) == numbers(here) and len(there) == count
        assert labels_of(there) == labels_of(here)
    assert opened(f"{server.url}/train/{{000..003}}.tar").path(13) == f"{server.url}/train/001.tar/00100.png"


def test_a_batch_is_asked_for_at_once_and_shards_are_read_through_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "SAVE_FROM_IMAGES", 1)
    spec = f"{server.url}/train/{{000..003}}.tar"
    source = opened(spec)
    assert {name for name, _ in server.asked} == {f"{number:03}.tar" for number in range(4)}
    server.asked.clear()
    again = opened(spec)
    # Each shard of the split gets two requests: whether it exists, and whether it has changed.
    assert sorted(server.asked) == sorted([(f"{number:03}.tar", "HEAD") for number in range(4)] * 2)
    assert again.fingerprint == source.fingerprint
    server.asked.clear()
    batches = view_batches(again, [CropGroup(1, 8, (0.9, 1.0))], batch_size=11, seed=0, epochs=range(1), workers=2)
    seen = [int(low) for batch in batches for low in batch.crops[0][:, 0, 0, 0, 0]]
    assert sorted(seen) == sorted(number % 256 for number in numbers(source))
    # One request per image, for its bytes alone.
    assert len(server.asked) >= 33 and all(re.fullmatch(r"bytes=\d+-\d+", part) for _, part in server.asked)
    # A shard that has changed is scanned again.
    server.faults["version"] = 1
    server.asked.clear()
    assert opened(spec).fingerprint != source.fingerprint and server.asked


def test_no_images_are_no_request(server: Server) -> None:
    source = opened(f"{server.url}/train/001.tar")
    server.asked.clear()
    source.fetch([])
    assert not server.asked


def test_a_server_that_fails_for_a_while_is_asked_again(server: Server) -> None:
    expected = opened(f"{server.url}/{{split}}/{{000..003}}.tar", "val")
    # At most two attempts at a file fail here, and fsspec sends two requests per attempt.
    for errors in (1, 4):
        server.faults["errors"] = errors
        source = opened(f"{server.url}/{{split}}/{{000..003}}.tar", "val")
        assert (source.fingerprint, len(source)) == (expected.fingerprint, 16)
    source = opened(f"{server.url}/train/000.tar")
    server.faults["errors"] = 2
    assert numbers(source) == list(range(13))
    server.faults["errors"] = 10**6
    with pytest.raises(DataError, match=r"train/000\.tar: cannot be read \(503"):
        source.read(3)


def test_a_shard_that_is_gone_is_a_bad_image(server: Server, tmp_path: Path) -> None:
    source = opened(f"{server.url}/train/{{000..001}}.tar")
    (tmp_path / "train" / "001.tar").unlink()
    assert source.read(0).shape == (3, 3, 4)
    with pytest.raises(BadImage, match="no such file"):
        source.read(13)


def test_what_cannot_be_opened_is_told(server: Server) -> None:
    for spec, message in (
        (f"{server.url}/train/{{000..004}}.tar", r"no such shard: .*/004\.tar"),
        (f"{server.url}/train", r"name the shards, such as .*/train/train-\{000\.\.127\}\.tar"),
        ("pipe:cat a.tar", "pipe can only be read in sequence; give their URLs"),
        ("nothing://a/b.tar", "nothing cannot be read .*Protocol not known"),
        ("http://127.0.0.1:9/a.tar", r"127\.0\.0\.1:9/a\.tar: cannot be read"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            opened(spec)
        assert "\n" not in str(caught.value)
    for fault in ("no parts", "says no parts"):
        server.faults |= {"no parts": 0, "says no parts": 0, fault: 1}
        with pytest.raises(DataError, match=r"train/000\.tar: .* parts of files"):
            opened(f"{server.url}/train/000.tar").read(0)
    server.faults |= {"says no parts": 0, "errors": 10**6}
    with pytest.raises(DataError, match=r"http[^\n]*000\.tar: cannot be read \(503[^\n]*$"):
        opened(f"{server.url}/train/000.tar")


def test_validation_may_have_fewer_shards(server: Server, tmp_path: Path) -> None:
    for number in (2, 3):
        (tmp_path / "val" / f"{number:03}.tar").unlink()
    for where in (server.url, str(tmp_path)):
        spec = f"{where}/{{split}}/{{000..003}}.tar"
        assert (len(opened(spec)), len(opened(spec, "val"))) == (33, 8)
    (tmp_path / "val" / "000.tar").unlink()
    with pytest.raises(DataError, match=r"no such shard: .*/val/000\.tar"):
        opened(f"{server.url}/{{split}}/{{000..003}}.tar", "val")
    (tmp_path / "train" / "003.tar").unlink()
    with pytest.raises(DataError, match=r"no such shard: .*/train/003\.tar"):
        opened(f"{server.url}/{{split}}/{{000..003}}.tar")


def test_an_interruption_does_not_wait_for_the_server(server: Server) -> None:
    server.faults["seconds"] = 30

    def interrupt(_number: int, _frame: object) -> None:
        raise Interrupted(signal.SIGALRM, "stopped")

    before = signal.signal(signal.SIGALRM, interrupt)
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(Interrupted):
            opened(f"{server.url}/train/{{000..003}}.tar")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 10


def test_what_changes_with_reading_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"name": "a", "size": 7, "time": 1, "mtime": 5, "ETag": "x"}

    class System:
        def info(self, path: str) -> dict[str, Any]:
            return told

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (System(), url))
    first = remote.file_state("sftp://a")
    told |= {"time": 2, "name": "b"}
    assert remote.file_state("sftp://a") == first and first[0] == 7
    told["mtime"] = 6
    assert remote.file_state("sftp://a") != first


def test_stars_where_the_file_system_lists_folders(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(3):
        shard = write_shard(tmp_path / f"{number}.tar", samples(10 * number, 4, classes=2))
        memory.pipe_file(f"/shelf/s-{number}.tar", shard.read_bytes())
    try:
        source = opened("memory://shelf/s-*.tar")
        assert numbers(source) == [10 * number + image for number in range(3) for image in range(4)]
    finally:
        memory.rm("/shelf", recursive=True)


def test_specs_with_urls_stay_as_they_are() -> None:
    assert absolute_spec("wds:s3://bucket/a-{000..009}.tar") == "wds:s3://bucket/a-{000..009}.tar"


def test_a_server_that_fails_ends_a_run_that_can_go_on(server: Server, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "base.safetensors")
    data = f"wds:{server.url}/train/{{000..003}}.tar"
    settings: dict[str, Any] = {"workers": 1, "stage": "heads", "heads_stage__epochs": 6, "data__spec": data}
    config = refine_config(weights, Path("elsewhere"), **settings)

    def fail(what: str, step: int) -> None:
        if (what, step) == ("step", 3):
            server.faults["errors"] = 10**6

    with pytest.raises(DataError, match=r"^http.*\.tar: cannot be read \(503[^\n]*$"):
        refine(config, tmp_path / "out", listener=Watcher(fail))
    assert saved_step(tmp_path / "out") >= 2
    server.faults["errors"] = 0
    refine(config, tmp_path / "out", resume=True)
    refine(config, tmp_path / "whole")
    found, expected = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("out", "whole"))
    assert found == expected
