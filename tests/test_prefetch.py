"""The files that prefetch.py fetches are enough for a run without a network."""
from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_data import flickr8k_folder, mirror  # noqa: F401, mirror is a fixture

from pruning import prefetch, test_single_rate
from pruning.data import DATASETS, Dataset, Sample, Source, coco
from pruning.models import pipelines
from pruning.records.record import read_record

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """A model hub that serves the bundled model as someone/shapes."""

    folder = pipelines.MODELS["shapes-unet"].folder

    def answer(self):
        """Send the headers and return the body."""
        path = self.path.partition("?")[0]
        body, headers = None, {}
        files = {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith("/api/models/someone/shapes/tree/"):
            body = json.dumps([{"type": "file", "path": name, "size": file.stat().st_size, "oid": COMMIT}
                               for name, file in files.items()]).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith("/api/models/someone/shapes"):
            body = json.dumps({"id": "someone/shapes", "modelId": "someone/shapes", "sha": COMMIT, "tags": [],
                               "private": False, "downloads": 0, "likes": 0, "pipeline_tag": "text-to-image",
                               "siblings": [{"rfilename": name} for name in files]}).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith("/someone/shapes/resolve/"):
            file = self.folder / path.split("/", 5)[5]
            if file.is_file():
                body = file.read_bytes()
                headers.update({"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'})
        self.send_response(200 if body is not None else 404)
        for name, value in {**headers, "Content-Length": str(len(body or b""))}.items():
            self.send_header(name, value)
        self.end_headers()
        return body or b""

    def do_HEAD(self):
        """Send the headers."""
        self.answer()

    def do_GET(self):
        """Send the headers and the body."""
        body = self.answer()
        self.wfile.write(body)

    def log_message(self, *_):
        """Print no log."""


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(code, environment):
    """Run Python code in the repository root with exactly this environment, and return its stdout."""
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=str(ROOT), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_fetched_files_are_enough_for_a_run_that_may_open_no_socket(tmp_path, mirror, hub):  # noqa: F811
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment.update(HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1")
    flags = ["--model", "someone/shapes", "--dataset", "coco", "--num_images", "2", "--metric_backbones", "bundled"]
    said = run("from pruning import prefetch\nfrom pruning.data import coco\n"
               f"coco.ARCHIVE_HASH = {coco.ARCHIVE_HASH!r}\nprefetch.main({flags!r})", environment)
    assert "coco, 4 images: 4 files" in said  # two samples, and two other samples
    assert "model someone/shapes: " in said
    assert said.count("sha256") == 5
    exported = dict(line[len("export "):].split("=", 1) for line in said.splitlines() if line.startswith("export "))
    assert exported["HF_HUB_OFFLINE"] == "1"

    del environment["HF_ENDPOINT"], environment["PRUNING_COCO_URL"]
    offline = run(
        "import socket, sys\n"
        "def refuse(*_, **__):\n    raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from pruning import pruning_analysis\n"
        f"pruning_analysis.main({[*flags, '--steps', '2', '--rates', '0.5', '--results_dir', str(tmp_path / 'r')]!r})",
        {**environment, **exported})
    assert "How far?" in offline
    record = read_record(tmp_path / "r/someone--shapes/coco/magnitude.json")
    assert len(record.points[0].per_image["clip_score"]) == 2


def test_the_bundled_model_needs_nothing_fetched(capsys):
    prefetch.main(["--dataset", "shapes"])
    said = capsys.readouterr().out
    assert "shapes, 32 images: no images to fetch" in said
    assert "model shapes-unet: " in said


def test_a_run_needs_nothing_but_the_data_folder(tmp_path):
    folder = flickr8k_folder(tmp_path / "flickr8k")  # a data set that cannot be fetched
    test_single_rate.main([
        "--dataset", "flickr8k", "--data_dir", str(folder), "--model", "shapes-unet", "--metric_backbones", "bundled",
        "--rate", "0.5", "--num_images", "2", "--steps", "1", "--metrics", "fid", "--results_dir", str(tmp_path)])
    record = read_record(tmp_path / "shapes-unet" / "flickr8k" / "magnitude.json")
    assert record.notes.reference_images == 2


def test_the_images_of_a_new_data_set_are_listed_with_its_reference_images(tmp_path, monkeypatch, capsys):
    def read(data_dir):
        files = [data_dir / f"{n}.png" for n in range(7)]
        samples = [Sample(file.name, f"number {n}", file.read_bytes, file=file) for n, file in enumerate(files)]
        return Source(samples[:4], reference=lambda: samples[4:])

    for n in range(7):
        (tmp_path / f"{n}.png").write_bytes(bytes(1000))
    monkeypatch.setitem(DATASETS, "numbers", Dataset("numbers", "shapes-unet", "bundled", read))
    prefetch.main(["--dataset", "numbers", "--data_dir", str(tmp_path), "--num_images", "4"])
    files = [tmp_path / f"{n}.png" for n in range(7)]
    assert f"numbers, 7 images: 7 files, 0.0 MB, sha256 {prefetch.digest(files)}" in capsys.readouterr().out


def test_the_digest_changes_with_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    before = prefetch.digest([tmp_path / "a"])
    assert before == prefetch.digest([tmp_path / "a"])
    (tmp_path / "a").write_bytes(b"two")
    assert before != prefetch.digest([tmp_path / "a"])
