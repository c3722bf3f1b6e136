"""``sdseg push`` against a stand-in for the hub: the card, what is sent, and refusals."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from sdseg_cli.cli import main
from sdseg_cli.commands.push import model_card
from sdseg_cli.core.recipe import load_recipe
from sdseg_cli.core.run_directory import RunDirectory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Knows the calls that make a repository and a commit; every file is sent in the commit itself."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path in ("/api/models/me/tiny", *(f"/api/models/me/tiny/revision/{r}" for r in ("main", COMMIT))):
            names = [{"rfilename": name} for name in self.server.files]
            about = {"id": "me/tiny", "modelId": "me/tiny", "sha": COMMIT, "private": self.server.is_private}
            return self._answer({**about, "siblings": names})
        if path in (f"/api/models/me/tiny/tree/{commit}" for commit in ("main", COMMIT)):
            return self._answer(
                [
                    {"type": "file", "path": name, "size": len(payload), "oid": "0"}
                    for name, payload in self.server.files.items()
                ]
            )
        name = path.partition(f"/me/tiny/resolve/{COMMIT}/")[2] or path.partition("/me/tiny/resolve/main/")[2]
        if name not in self.server.files:
            return self._answer({"error": "Repository not found"}, 404)
        payload = self.server.files[name]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(payload).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(payload)
        return None

    do_HEAD = do_GET

    def do_POST(self):
        encoded = self.headers.get("Transfer-Encoding") == "chunked"
        body = self._chunks() if encoded else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuse:
            return self._answer({"error": "no"}, self.server.refuse)
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self._answer({"url": f"http://{self.headers['Host']}/me/tiny"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._answer(
                {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            )
        if "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    value = item["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            return self._answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/tiny/commit/1",
                    "commitOid": "1",
                    "pullRequestUrl": "",
                }
            )
        return self._answer({"error": self.path}, 404)

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content, status=200):
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created, server.refuse, server.is_private = {}, None, 0, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    run = RunDirectory.create(tmp_path / "runs/tiny", load_recipe("demo"))
    dataset = {
        "path": str(tmp_path / "gone"),
        "name": "phantom",
        "fingerprint": "abc123",
        "splits": {"test": 4},
    }
    run.finish("finished", steps=900, dataset=dataset)
    (run.model / "unet").mkdir(parents=True)
    (run.model / "model_index.json").write_text("{}")
    (run.model / "unet/weights.bin").write_bytes(bytes(range(256)))
    return run


def push(run, *options, port=9, offline="0"):
    return sdseg("push", run.root, *options, port=port, offline=offline)


def sdseg(*args, port=9, offline="0"):
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HUB_OFFLINE": offline,
        "HF_TOKEN": "hf_stand_in",
    }
    return subprocess.run(
        [sys.executable, "-m", "sdseg_cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment, "NO_PROXY": "127.0.0.1"},
    )


def test_model_and_card_arrive_whole(run, hub):
    (run.evaluation / "test").mkdir(parents=True)
    score = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    classes = {"polyp": {"metrics": {"dice": score, "iou": score}}}
    summary = {"classes": classes, "convention": "standard"}
    (run.evaluation / "test/summary.json").write_text(json.dumps(summary))
    finished = push(run, "me/tiny", "--private", port=hub.server_port)
    assert finished.returncode == 0, finished.stderr
    assert hub.created.get("private") or hub.created.get("visibility") == "private"
    assert set(hub.files) == {"README.md", "model_index.json", "unet/weights.bin"}
    assert hub.files["unet/weights.bin"] == bytes(range(256))
    card = hub.files["README.md"].decode()
    assert card.startswith("---\n")
    assert "license: other" in card
    assert "| test | polyp | Dice | 0.5000 | 0.2500 to 0.7500 | 4 | standard |" in card


def test_the_card_holds_the_scores_of_this_model_on_its_own_data_alone(run):
    score = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    own = {"classes": {"polyp": {"metrics": {"dice": score, "iou": score}}}, "convention": "standard"}
    others = {
        "own": {"dataset": {"fingerprint": "abc123"}},
        "elsewhere": {"dataset": {"fingerprint": "f00"}},
        "small": {"sampling": {"decoder": "/d"}},
    }
    for name, facts in others.items():
        (run.evaluation / name).mkdir(parents=True)
        (run.evaluation / name / "summary.json").write_text(json.dumps({**own, **facts}))
    card = model_card(run, "me/tiny")
    assert "| own | polyp | Dice" in card
    assert "elsewhere" not in card
    assert "small" not in card


def test_the_card_tells_no_folder_of_this_machine(run):
    recipe = run.recipe_file.read_text()
    run.recipe_file.write_text(recipe.replace("dataset: data/phantom", "dataset: /home/alice/data/phantom"))
    card = model_card(run, "me/tiny")
    assert "alice" not in card
    assert "dataset: .../phantom" in card


@pytest.mark.faults
def test_a_model_that_refers_to_a_folder_is_not_sent(run, tmp_path):
    reference = {"autoencoder_reference": {"location": str(tmp_path / "kl-f8"), "sha256": "0"}}
    (run.model / "model_index.json").write_text(json.dumps(reference))
    finished = push(run, "me/tiny", "--dry-run")
    assert finished.returncode == 2
    assert "train.embed_autoencoder=true" in " ".join(finished.stderr.split())


@pytest.mark.faults
def test_private_does_not_send_to_a_repository_that_is_public(run, hub):
    hub.is_private = False
    finished = push(run, "me/tiny", "--private", port=hub.server_port)
    assert finished.returncode == 2
    assert "exists and is public" in finished.stderr
    assert hub.files == {}


def test_a_dry_run_prints_the_card_and_sends_nothing(run, hub):
    finished = push(run, "me/tiny", "--dry-run", port=hub.server_port)
    assert finished.returncode == 0, finished.stderr
    for text in (
        "Not evaluated.",
        "abc123",
        "Not a medical device",
        "unet/weights.bin",
        "licence of the data: unknown",
    ):
        assert text in finished.stdout
    assert hub.created is None
    assert not (run.model / "README.md").exists()


def test_what_was_pushed_is_loaded_by_its_name_and_predicts_the_same(
    hub, tiny_recipe, trained, tmp_path, monkeypatch
):
    run = trained(tiny_recipe(), tmp_path / "run").run
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    finished = push(run, "me/tiny", port=hub.server_port)
    assert finished.returncode == 0, finished.stderr
    Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as end:
        main(["predict", str(tmp_path / "a.png"), "--model", str(run.root), "--out", str(tmp_path / "own")])
    assert not end.value.code
    finished = sdseg(
        "predict", tmp_path / "a.png", "--model", "me/tiny", "--out", tmp_path / "hub", port=hub.server_port
    )
    assert finished.returncode == 0, finished.stderr
    own, hubs = (np.asarray(Image.open(tmp_path / name / "a.png")) for name in ("own", "hub"))
    assert own.shape == (48, 48)
    assert np.array_equal(own, hubs)


@pytest.mark.faults
@pytest.mark.parametrize(("status", "message"), [(401, "hf auth login"), (403, "may not write to me/tiny")])
def test_a_refusal_says_what_to_do(run, hub, status, message):
    hub.refuse = status
    finished = push(run, "me/tiny", port=hub.server_port)
    assert finished.returncode == 1
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.faults
def test_without_a_network_and_with_a_wrong_name_it_ends_with_a_message(run):
    offline = push(run, "me/tiny", offline="1")
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE" in offline.stderr
    assert push(run, "tiny").returncode == 2
