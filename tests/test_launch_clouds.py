"""The launch scripts for clouds, against stand-ins that write down every call."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
UV = """#!/usr/bin/env bash
[[ $1 != venv ]] || mkdir -p .venv/bin
cat >.venv/bin/scaletrain <<'END'
#!/usr/bin/env bash
echo "trains on $PWD"
printf '%s\\n' "$@" >"$STAND_IN/options"
exit "$(cat "$STAND_IN/run_code")"
END
chmod +x .venv/bin/scaletrain
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout of this tree, in a folder whose name needs quoting."""
    root = tmp_path_factory.mktemp("launch") / "check out's"
    for name in ("launch", "experiments"):
        shutil.copytree(ROOT / name, root / name)
    (root / ".venv").symlink_to(sys.prefix)
    (root / ".gitignore").write_text(".venv\n*.secret\n")
    (root / "a.secret").write_text("stays at home")
    subprocess.run(["git", "init", "--quiet", root], check=True)
    subprocess.run(["git", "-C", root, "add", "--all"], check=True)
    return root


@pytest.fixture
def desk(tmp_path):
    """A folder with stand-ins on its PATH, and their answers and calls beside it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    for name in ("gcloud", "kubectl"):
        (tmp_path / "bin" / name).symlink_to(ROOT / "tests" / "stand_in.sh")
    for name, text in (
        ("sleep", '#!/bin/sh\necho "sleep $1" >>"$STAND_IN/calls"\n'),
        ("uv", UV),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def launch(checkout, desk, script, *args, states=(), codes=(), **env):
    (desk / "states").write_text("".join(f"{state}\n" for state in states))
    (desk / "codes").write_text("".join(f"{code}\n" for code in codes))
    return subprocess.run(
        [checkout / "launch" / script, *args],
        cwd=checkout,
        env=os.environ
        | {"PATH": f"{desk / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(desk)}
        | {"PYTHONPATH": str(ROOT), "TMPDIR": str(desk)}
        | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def calls(desk):
    """Returns (verb, words after it) of every call, and of every sleep."""
    found = []
    for line in (desk / "calls").read_text().splitlines():
        words = line.split("\t")
        found.append(words[4:] if words[0] == "gcloud" else words)
    return found


TRAIN = (
    "--config=experiments/llama3_8b.py:",
    "--workdir=/shared/it's my run",
    "--config.data.path=gs://b/it's *.parquet",
)
TPU = ("--topology=v5p:4x4x4", "--zone=us-east5-a")
PLACE = ["--quiet", "--zone=us-east5-a"]
ALL = ["--node=all", "--worker=all", "--batch-size=all", *PLACE]
NAME = "scaletrain-it-s-my-run"


def test_a_preempted_slice_is_queued_for_again(checkout, desk):
    (desk / "run_code").write_text("0")
    setup = "echo 'mounted it' >\"$STAND_IN/mounted\""
    done = launch(
        checkout, desk, "tpu_vm.sh", *TPU, "--spot", "--delete", f"--setup={setup}",
        "--", *TRAIN,
        states="NONE WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDED NONE ACTIVE".split(),
        codes=[175, 255, "real"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = calls(desk)
    kinds = [words[0] for words in made]
    again = ["scp", "ssh", "ssh"]
    assert kinds == [
        "describe", "create", "describe", "sleep 30", "describe", *again,
        "sleep 10", "describe", "ssh",
        "sleep 20", "describe", "delete", "describe", "create", "describe", *again,
        "delete",
    ]  # fmt: skip
    assert made[1] == [
        "create", NAME, "--accelerator-type=v5p-128",
        "--runtime-version=v2-alpha-tpuv5", "--spot", f"--node-id={NAME}", *PLACE,
    ]  # fmt: skip
    assert made[0] == ["describe", NAME, "--format=value(state.state)", *PLACE]
    assert made[-1] == ["delete", NAME, "--force", *PLACE]
    scp, install, train = made[-4:-1]
    assert scp[2:] == [f"{NAME}:", *ALL]
    assert install[1] == train[1] == NAME
    assert install[3:] == train[3:] == ALL
    # What the last attempt ran, on a worker of its own: the very words, in a checkout
    # that holds what git does not ignore.
    assert (desk / "options").read_text().splitlines() == ["train", *TRAIN]
    assert (desk / "mounted").read_text() == "mounted it\n"
    (there,) = (desk / "home" / "scaletrain").glob("*/")
    assert f"trains on {there}" in done.stdout
    assert (there / "launch" / "tpu_vm.sh").exists()
    assert not (there / "a.secret").exists()


@pytest.mark.parametrize(
    ("run_code", "ends_with"), [("1", 1), ("2", 2), ("75", 75), ("137", 75)]
)
def test_the_runs_exit_code_is_the_launchers(checkout, desk, run_code, ends_with):
    (desk / "run_code").write_text(run_code)
    done = launch(
        checkout, desk, "tpu_vm.sh", *TPU, "--max_restarts=1", "--", *TRAIN,
        states=["ACTIVE"] * 3, codes=["real"] * 2,
    )  # fmt: skip
    assert done.returncode == ends_with, done.stderr
    kinds = [words[0] for words in calls(desk)]
    first = ["describe", "scp", "ssh", "ssh"]
    # A failure is looked into: it may have been the end of a preempted slice.
    then = {1: ["describe"], 2: [], 75: ["sleep 10", "describe", "ssh"]}
    assert kinds == first + then[ends_with]


def test_a_run_outlives_its_connection_and_is_joined(checkout, tmp_path):
    shutil.copytree(checkout / "launch", tmp_path / "launch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    fake = tmp_path / ".venv" / "bin" / "scaletrain"
    fake.write_text(
        "#!/bin/sh\necho started >>~/starts\n"
        "for _ in $(seq 400); do [ ! -e ~/go ] || break; sleep 0.05; done\n"
        "echo the end; exit 75\n"
    )
    fake.chmod(0o755)
    (tmp_path / "scaletrain").mkdir()

    def connect():
        return subprocess.Popen(
            [tmp_path / "launch" / "tpu_worker.sh", "train", "run", "--config=x"],
            env=os.environ | {"HOME": str(tmp_path)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    first = connect()
    deadline = time.monotonic() + 20
    while not (tmp_path / "starts").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=20)
    second = connect()
    assert "joining" in second.stderr.readline()
    (tmp_path / "go").touch()
    out, _ = second.communicate(timeout=20)
    assert second.returncode == 175
    assert "the end" in out
    assert (tmp_path / "starts").read_text() == "started\n"


def test_a_slice_that_cannot_be_had_ends_the_attempts(checkout, desk):
    done = launch(
        checkout, desk, "tpu_vm.sh", *TPU, "--max_restarts=1", "--", *TRAIN,
        states=["FAILED", "NONE", "FAILED"],
    )  # fmt: skip
    assert done.returncode == 75
    assert "given up" in done.stderr
    assert [words[0] for words in calls(desk)] == [
        "describe", "delete", "sleep 10", "describe", "create", "describe", "delete"
    ]  # fmt: skip


def test_a_dry_run_prints_what_a_run_calls(checkout, desk):
    more = ("--config.mesh.dcn.data=2", "--config.batch_size=512")
    done = launch(
        checkout, desk, "tpu_vm.sh", *TPU, "--num_slices=2", "--create=--network=n",
        "--delete", "--dry-run", "--", *TRAIN, *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (desk / "calls").exists()
    # As a shell reads them, the lines are the calls.
    subprocess.run(
        ["bash", "-c", done.stdout.replace("describe", "list")],
        env=os.environ
        | {"PATH": f"{desk / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(desk)},
        check=False,
    )
    made = calls(desk)
    assert [words[0] for words in made] == [
        "create", "list", "scp", "ssh", "ssh", "delete"
    ]  # fmt: skip
    assert made[0][4:6] == ["--network=n", "--node-count=2"]
    assert made[0][6] == f"--node-prefix={NAME}"
    words = subprocess.run(
        ["bash", "-c", made[4][2].replace("--command=", "printf '%s\\n' ", 1)],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert words[1:] == ["train", NAME, *TRAIN, *more]


def test_what_cannot_run_is_refused_before_it_is_ordered(checkout, desk, tmp_path):
    wide = ("--config.mesh.fsdp=-1", "--config.batch_size=512")
    (tmp_path / "away.py").write_text((ROOT / "experiments/llama3_8b.py").read_text())
    for args, words in (
        (("--topology=v5p:4x4x8", "--", *TRAIN), "128 devices, and the mesh has 64"),
        ((*TPU, "--num_slices=2", "--", *TRAIN, *wide), "axes of mesh.dcn multiply"),
        (("--topology=tpu7x:2x4x4", "--", *TRAIN), "not to be had as TPU VMs"),
        (("--topology=h100:64", "--", *TRAIN), "not a TPU slice"),
        ((*TPU, "--", *TRAIN[:1], "--workdir=runs/x"), "absolute path"),
        ((*TPU, "--", *TRAIN[:1], "--workdir=gs://b/x"), "--workdir=gs://b/x; a URL"),
        ((*TPU, "--", *TRAIN[:1], "--workdir=~/x"), "a home that goes with the mach"),
        (("--zone", "us-east5-a", *TPU, "--", *TRAIN), "--zone; no value; write"),
        ((*TPU, "--", *TRAIN, f"--config={tmp_path}/away.py"), "not a file of"),
        ((*TPU, "--bogus", "--", *TRAIN), "--bogus; unknown"),
        ((*TPU, "--", *TRAIN, "--config.bogus=1"), "no such setting"),
    ):  # fmt: skip
        done = launch(checkout, desk, "tpu_vm.sh", *args)
        assert done.returncode == 2, args
        assert words in done.stderr
    assert not (desk / "calls").exists()


def test_what_installs_scaletrain_installs_what_reads_data_from_gs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "gcs" in extras["optional-dependencies"]
    for name in ("tpu_worker.sh", "gke/Dockerfile", "sky.yaml"):
        text = (ROOT / "launch" / name).read_text()
        [installed] = re.findall(r"'\.\[(.*)\]'", text)
        assert "gcs" in installed.split(","), name


def test_a_jobset_has_the_slices_that_the_mesh_needs(checkout, desk):
    options = ("--topology=v5p:4x4x4", "--num_slices=2", "--image=i:1", "--claim=c")
    train = (*TRAIN, "--config.mesh.dcn.data=2", "--config.batch_size=512")
    words = (*options, "--spot", "--", *train, "--config.data.tokenizer=/a $(B) c")
    done = launch(checkout, desk, "gke/jobset.sh", *words)
    assert done.returncode == 0, done.stderr
    assert calls(desk) == [["kubectl", "apply", "--filename=-"]]
    found = json.loads((desk / "manifest").read_text())
    dry = launch(checkout, desk, "gke/jobset.sh", "--dry-run", *words)
    assert json.loads("".join(dry.stdout.splitlines(keepends=True)[1:-1])) == found
    assert len(calls(desk)) == 1
    assert found["metadata"]["name"] == NAME
    (slices,) = found["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (box,) = pod["containers"]
    assert (slices["replicas"], job["completions"], job["parallelism"]) == (2, 16, 16)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert box["resources"]["limits"] == {"google.com/tpu": 4}
    # As Kubernetes reads it, $$ is $.
    assert box["command"][2:] == [*train, "--config.data.tokenizer=/a $$(B) c"]
    env = {each["name"]: each.get("value") for each in box["env"]}
    assert (env["NUM_JOBS"], env["PODS_PER_JOB"]) == ("2", "16")
    # 1 and 2 end the run through both policies, all else starts it again.
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [1, 2]
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_a_jobset_that_cannot_run_is_refused(checkout, desk):
    image = ("--image=i", "--claim=c")
    llama = "--config=experiments/llama_1b.py"
    small = (*TRAIN[1:2], "--config.mesh.dcn.data=2", "--config.batch_size=256")
    for args, words in (
        (("--topology=v5p:4x4x8", *image, "--", *TRAIN), "the mesh has 64"),
        (
            ("--topology=v6e:2x4", "--num_slices=2", *image, "--", llama, *small),
            "GKE joins slices of several hosts",
        ),
        ((*TPU[:1], *image, "--mount=/a", "--", *TRAIN), "not under --mount=/a"),
        ((*TPU[:1], "--image=i", "--", *TRAIN), "--claim"),
    ):
        done = launch(checkout, desk, "gke/jobset.sh", *args)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
    assert not (desk / "calls").exists()


def test_slurm_starts_a_task_a_node(checkout, desk):
    """What the real one does is the subject of tests/slurm.sh."""
    env = {"SLURM_JOB_NUM_NODES": "8", "SLURM_GPUS_ON_NODE": "8"}
    there = {"SLURM_SUBMIT_DIR": str(checkout)}
    done = launch(checkout, desk, "slurm.sbatch", "--dry-run", *TRAIN, **env, **there)
    assert done.returncode == 0, done.stderr
    line, _, requeue = done.stdout.splitlines()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line}"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert words[:3] == ["srun", "--kill-on-bad-exit=0", "--cpu-bind=none"]
    assert words[3:] == [f"{checkout}/.venv/bin/scaletrain", "train", *TRAIN]
    assert requeue.split() == ["scontrol", "requeue", "JOB"]
    env["SLURM_GPUS_ON_NODE"] = "4"
    done = launch(checkout, desk, "slurm.sbatch", "--dry-run", *TRAIN, **env, **there)
    assert done.returncode == 2
    assert "32 devices, and the mesh has 64" in done.stderr
    env["SLURM_GPUS_ON_NODE"] = ""
    done = launch(checkout, desk, "slurm.sbatch", "--dry-run", *TRAIN, **env, **there)
    assert done.returncode == 2
    assert "start it with sbatch" in done.stderr


def test_sky_trains_on_every_node(checkout, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, text in (
        ("python", f'exec "{sys.executable}" "$@"'),
        ("scaletrain", "printf '%s\\n' \"$@\"; exit 75"),
    ):
        (tmp_path / ".venv" / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    (tmp_path / "experiments").symlink_to(checkout / "experiments")
    task = yaml.safe_load((checkout / "launch" / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    for nodes, code in ((8, 75), (4, 2)):
        done = subprocess.run(
            ["bash", "-c", task["run"]],
            cwd=tmp_path,
            env=os.environ
            | {"PYTHONPATH": str(ROOT)}
            | {"OPTIONS": shlex.join(TRAIN), "SKYPILOT_NUM_NODES": str(nodes)}
            | {"SKYPILOT_NODE_RANK": "3", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
            | {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        if code == 75:
            assert done.stdout.splitlines() == [
                "train", *TRAIN, "--coordinator=10.0.0.1:8482", "--num_processes=8",
                "--process_id=3",
            ]  # fmt: skip
