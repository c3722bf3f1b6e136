"""Two "nodes" on the loopback do what one machine does; the SLURM scripts of the docs start them."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.recipe import recipe_to_yaml
from sdseg_cli.core.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "docs" / "slurm").glob("*.sbatch"))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# Those of SLURM's options that the scripts use, and what their values look like.
DIRECTIVES = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d\d:\d\d:\d\d",
    "signal": r"[A-Z]+@\d+",
    "array": r"\d+-\d+",
    "output": r"[\w%.-]+",
}
SRUN = """#!/bin/bash
# Stands in for srun: as many tasks as there are nodes, at once, each with its own number.
while [[ "$1" == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do
  SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" > "task-$node.log" 2>&1 & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit $?; done
"""
SCONTROL = """#!/bin/bash
[[ "$1 $2" == "show hostnames" && "$3" == "node[1-2]" ]] || exit 9
echo 127.0.0.1
echo 127.0.0.2
"""


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **more}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def weights(run: Path) -> dict[str, str]:
    checkpoint = RunDirectory.open(run).latest_checkpoint()
    assert checkpoint is not None
    files = sorted(path for path in checkpoint.iterdir() if path.suffix == ".safetensors")
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def programs(folder: Path) -> Path:
    """A folder for PATH with srun, scontrol, torchrun and sdseg."""
    folder.mkdir()
    torchrun = f'#!/bin/bash\nexec {" ".join(TORCHRUN)} "$@"\n'
    sdseg = f'#!/bin/bash\nexec {sys.executable} -m sdseg_cli "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": torchrun, "sdseg": sdseg}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


# The scripts


def test_there_are_scripts_for_training_and_prediction():
    assert [path.stem for path in SCRIPTS] == ["predict", "train"]
    guide = (ROOT / "docs" / "multi-gpu.md").read_text(encoding="utf-8")
    assert all(f"slurm/{path.name}" in guide for path in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_sound_bash_and_its_directives_are_slurms(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    code = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH")]
    # SLURM stops reading at the first command, and says nothing of those below.
    assert directives == [line for line in lines[:code] if line.startswith("#SBATCH")]
    assert len(directives) > 3
    for line in directives:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)=(\S+)", line)
        assert match, line
        assert re.fullmatch(DIRECTIVES[match[1]], match[2]), line


def test_the_array_of_workers_predicts_every_case_once(tiny_recipe, trained, tmp_path):
    trained(tiny_recipe(), tmp_path / "run")
    (tmp_path / "scans").mkdir()
    for index in range(5):
        picture = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "scans" / f"{index}.png")
    path = f"{programs(tmp_path / 'bin')}:{os.environ['PATH']}"
    for number in (1, 2):
        own = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2", "PATH": path}
        finished = subprocess.run(
            [
                *("bash", ROOT / "docs" / "slurm" / "predict.sbatch", "scans", "--out", "masks"),
                *("--model", "run", "--device", "cpu"),
            ],
            cwd=tmp_path,
            env=environment(**own),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert finished.returncode == 0, finished.stderr
    with (tmp_path / "masks" / "summary.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(row["file"] for row in rows) == [f"{index}.png" for index in range(5)]
    assert {row["status"] for row in rows} == {"done"}


@pytest.mark.parametrize(
    ("array", "given", "asked"),
    [
        ("1 1 4", ["scans"], ["scans", "--skip-existing", "--shard", "1/4"]),
        ("0 0 4", ["a b"], ["a b", "--skip-existing", "--shard", "1/4"]),  # an array that begins with 0
        ("9 7 3", ["s", "--overwrite"], ["s", "--overwrite", "--shard", "3/3"]),
        ("2 1 2", ["s", "--skip-existing"], ["s", "--skip-existing", "--shard", "2/2"]),
    ],
)
def test_a_task_of_an_array_has_its_shard_and_keeps_what_was_asked(array, given, asked, tmp_path):
    (tmp_path / "sdseg").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "sdseg").chmod(0o755)
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
    own = dict(zip(names, array.split(), strict=True))
    finished = subprocess.run(
        ["bash", ROOT / "docs" / "slurm" / "predict.sbatch", *given],
        env=environment(**own, PATH=f"{tmp_path}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
    )
    assert finished.stdout.splitlines() == ["predict", *asked]


def test_a_training_that_slurm_ends_has_the_time_to_save(tmp_path):
    """torchrun waits 30 s for its processes by default; SLURM's kill comes later than that."""
    script = (ROOT / "docs" / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    (seconds,) = re.findall(r"--signal=TERM@(\d+)", script)
    (waits,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", script)
    assert 120 <= int(waits) < int(seconds)
    (tmp_path / "worker.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(3)\n"
        "    pathlib.Path('saved').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    for waits, is_saved in (("1", False), ("20", True)):  # the variable is one that torchrun knows
        with subprocess.Popen(
            [*TORCHRUN, "--standalone", "--nproc_per_node", "1", "worker.py"],
            cwd=tmp_path,
            env=environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT=waits),
            stderr=subprocess.DEVNULL,
        ) as agent:
            while not (tmp_path / "ready").exists():
                assert agent.poll() is None
                time.sleep(0.05)
            agent.terminate()
            agent.wait(40)
        (tmp_path / "ready").unlink()
        assert (tmp_path / "saved").exists() == is_saved


# Two nodes


@pytest.fixture(scope="module")
def launched(tiny_recipe, tmp_path_factory) -> SimpleNamespace:
    """One training on one node with two processes, on two nodes, and by the SLURM script."""
    folder = tmp_path_factory.mktemp("nodes")
    recipe = tiny_recipe({"train.steps": 4})
    (folder / "tiny.yaml").write_text(recipe_to_yaml(recipe))

    def command(out: str) -> list[str]:
        return ["-m", "sdseg_cli", "train", "--recipe", "tiny.yaml", "--out", out, "--device", "cpu"]

    one = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *command("one")],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert one.returncode == 0, one.stderr[-3000:]

    port = str(free_port())
    nodes = []
    for rank in range(2):
        place = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1"]
        with (folder / f"node-{rank}.log").open("w") as log:
            nodes.append(
                subprocess.Popen(
                    [*TORCHRUN, *place, "--master-port", port, "--nproc_per_node", "1", *command("two")],
                    cwd=folder,
                    env=environment(),
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        codes = [node.wait(300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    said = [(folder / f"node-{rank}.log").read_text() for rank in range(2)]
    assert codes == [0, 0], said

    own = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_PER_NODE": "1",
        "MASTER_PORT": str(free_port()),
        "PATH": f"{programs(folder / 'bin')}:{os.environ['PATH']}",
    }
    arguments = ["--recipe", "tiny.yaml", "--out", "slurm", "--device", "cpu"]
    slurm = subprocess.run(
        ["bash", ROOT / "docs" / "slurm" / "train.sbatch", *arguments],
        cwd=folder,
        env=environment(**own),
        capture_output=True,
        text=True,
        timeout=300,
    )
    tasks = [path.read_text()[-2000:] for path in sorted(folder.glob("task-*.log"))]
    assert slurm.returncode == 0, (slurm.stderr, tasks)
    return SimpleNamespace(folder=folder, said=said)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "slurm"])
def test_two_nodes_train_the_weights_of_one_node_with_two_processes(name, launched):
    for run in ("one", name):
        assert RunDirectory.open(launched.folder / run).read_run_json()["processes"] == 2
    assert weights(launched.folder / name) == weights(launched.folder / "one")


@pytest.mark.slow
def test_only_the_first_node_speaks_and_writes(launched):
    assert "validation Dice" in launched.said[0]
    assert "validation Dice" not in launched.said[1]
    assert sorted(path.name for path in launched.folder.iterdir() if path.is_dir()) == [
        "bin",
        "one",
        "slurm",
        "two",
    ]
