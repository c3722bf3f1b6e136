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
    """Knows the calls that make a repository and a commit.

    Weights go the way of large files, as on the hub: asked for in a batch, put where the answer says,
    verified, and only named in the commit; whoever fetches one is sent on to where it lies. The rest is in
    the commit itself.
    """

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/cdn/"):
            return self._send(self.server.objects[path.rpartition("/")[2]])
        if path in ("/api/models/me/tiny", *(f"/api/models/me/tiny/revision/{r}" for r in ("main", COMMIT))):
            names = [{"rfilename": name} for name in self.server.files]
            about = {"id": "me/tiny", "modelId": "me/tiny", "sha": COMMIT, "private": self.server.is_private}
            return self._answer({**about, "siblings": names})
        if path in (f"/api/models/me/tiny/tree/{commit}" for commit in ("main", COMMIT)):
            return self._answer(
                [
                    {"type": "file", "path": name, "size": len(payload), "oid": "0", **self._large(payload)}
                    for name, payload in self.server.files.items()
                ]
            )
        name = path.partition(f"/me/tiny/resolve/{COMMIT}/")[2] or path.partition("/me/tiny/resolve/main/")[2]
        if name not in self.server.files:
            return self._answer({"error": "Repository not found"}, 404)
        payload = self.server.files[name]
        oid = hashlib.sha256(payload).hexdigest()
        if oid not in self.server.objects:
            return self._send(payload, {"ETag": f'"{oid}"', "X-Repo-Commit": COMMIT})
        place = f"http://localhost:{self.server.server_port}/cdn/{oid}"  # another host, as with the hub
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(payload))}
        return self._send(b"", {"Location": place, "X-Repo-Commit": COMMIT, **linked}, status=302)

    do_HEAD = do_GET

    def do_PUT(self):
        oid = self.path.rpartition("/")[2]
        length = self.headers.get("Content-Length")
        body = self._chunks() if length is None else self.rfile.read(int(length))
        self.server.calls.append("put")
        if self.server.is_lossy:
            body = body[:-1]
        self.server.objects[oid] = body
        return self._send(b"")

    def _lfs(self, content):
        """The batch of what is to be put, and the verification of what was."""
        if self.path.endswith("/verify"):
            self.server.calls.append("verify")
            body = self.server.objects.get(content["oid"], b"")
            whole = hashlib.sha256(body).hexdigest() == content["oid"] and len(body) == content["size"]
            return self._answer({}) if whole else self._answer({"error": "not what was promised"}, 422)
        self.server.calls.append("batch")
        assert content["operation"] == "upload"
        assert content["hash_algo"] == "sha256"
        host = f"http://{self.headers['Host']}"
        objects = []
        for item in content["objects"]:
            oid = item["oid"]
            actions = {
                "upload": {"href": f"{host}/store/{oid}"},
                "verify": {"href": f"{host}/me/tiny.git/info/lfs/objects/verify"},
            }
            objects.append({**item, **({} if oid in self.server.objects else {"actions": actions})})
        return self._answer({"transfer": "basic", "objects": objects})

    def _large(self, payload):
        oid = hashlib.sha256(payload).hexdigest()
        pointer = {"oid": oid, "size": len(payload), "pointerSize": 130}
        return {"lfs": pointer} if oid in self.server.objects else {}

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
            modes = {name: "lfs" if name.endswith((".safetensors", ".bin")) else "regular" for name in names}
            return self._answer(
                {"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]}
            )
        if "/info/lfs/objects/" in self.path:
            return self._lfs(json.loads(body))
        if "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.objects[value["oid"]]
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
        return self._send(json.dumps(content).encode(), {"Content-Type": "application/json"}, status)

    def _send(self, payload, headers=None, status=200):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(payload))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created, server.refuse, server.is_private = {}, None, 0, True
    server.objects, server.calls, server.is_lossy = {}, [], False
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
        "HF_HUB_DISABLE_XET": "1",  # the stand-in has no Xet storage, so large files go by LFS
    }
    return subprocess.run(
        [sys.executable, "-m", "sdseg_cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment, "NO_PROXY": "127.0.0.1,localhost"},
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
    assert hub.calls == ["batch", "put", "verify"]
    assert [*hub.objects.values()] == [bytes(range(256))]
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
    run = trained(tiny_recipe({"sampling.num_samples": 2}), tmp_path / "run").run
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    finished = push(run, "me/tiny", port=hub.server_port)
    assert finished.returncode == 0, finished.stderr
    weights = {name for name in hub.files if name.endswith(".safetensors")}
    assert len(weights) == len(hub.objects) == 3
    assert all(hub.objects[hashlib.sha256(hub.files[name]).hexdigest()] for name in weights)
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
    assert json.loads((tmp_path / "hub/prediction.json").read_text())["num_samples"] == 2  # as its run said


@pytest.mark.faults
def test_weights_that_did_not_arrive_whole_are_in_no_commit(run, hub):
    hub.is_lossy = True
    finished = push(run, "me/tiny", port=hub.server_port)
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert "me/tiny" in finished.stderr
    assert hub.files == {}


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
