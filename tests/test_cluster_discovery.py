"""Which processes a run has and which this one is, as launchers and people say it."""

import argparse

import pytest

from scaletrain.cluster import discovery
from scaletrain.cluster.discovery import metadata, tpu
from scaletrain.errors import ConfigError

NOBODY = {
    "coordinator": None,
    "num_processes": None,
    "process_id": None,
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "rack[07-09,12]n2,other",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
JOBSET = {
    "JOBSET_NAME": "run",
    "REPLICATED_JOB_NAME": "workers",
    "PODS_PER_JOB": "4",
    "JOB_COMPLETION_INDEX": "3",
    "NUM_JOBS": "2",
    "JOB_INDEX": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE_TPU = {
    "TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080",
}
TPU_VM = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "a:b:10.0.0.7,a:b:10.0.0.8,a:b:10.0.0.9",
    "tpu-env": "ZONE: 'here'\nMEGASCALE_NUM_SLICES: ''\n",
}


def discover(env, **flags):
    return discovery.discover(argparse.Namespace(**NOBODY | flags), env)


@pytest.fixture
def with_tpu(monkeypatch):
    """Makes this a TPU host; returns what sets the attributes of its metadata."""
    monkeypatch.setattr(tpu, "_has_tpu", lambda env: True)

    def with_attributes(attributes):
        monkeypatch.setattr(metadata, "attribute", attributes.get)

    with_attributes({})
    return with_attributes


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (SLURM, "processes: 8 by Slurm, this is 3, coordinator rack07n2:"),
        (JOBSET, "processes: 8 by JobSet, this is 7, coordinator run-workers-0-0.run:"),
        (OPEN_MPI, "processes: 4 by Open MPI, this is 2, coordinator 10.96.0.1:"),
        (OPEN_MPI | SLURM | JOBSET, "processes: 8 by Slurm,"),
        (OPEN_MPI | JOBSET, "processes: 8 by JobSet,"),
    ],
)
def test_launchers_are_known(env, words):
    membership = discover(env)
    assert str(membership).startswith(words)
    port = int(membership.coordinator.rpartition(":")[2])
    assert 1024 < port < 2**16
    # What a person says goes before what a launcher does.
    flags = {"coordinator": "h:1", "num_processes": 2, "process_id": 1}
    assert str(discover(env, **flags)) == (
        "processes: 2 by flags, this is 1, coordinator h:1"
    )
    assert discover(env, coordinator="[::1]:5").coordinator == "[::1]:5"


def test_tpus_are_known(with_tpu):
    assert str(discover(GKE_TPU | SLURM)) == (
        "processes: 6 by TPU metadata, this is 5, coordinator first.svc:8482"
    )
    assert discover({}) is None
    alone = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    assert discover(alone) is None
    with pytest.raises(ConfigError, match="TPU metadata: TPU_WORKER_ID=; not what"):
        discover({"TPU_WORKER_HOSTNAMES": "a,b"})
    with_tpu(TPU_VM)
    assert str(discover({})) == (
        "processes: 3 by TPU metadata, this is 2, coordinator 10.0.0.7:8482"
    )
    with_tpu(TPU_VM | {"worker-network-endpoints": "w0,w1,w2"})
    assert discover({}).coordinator == "w0:8482"


def test_a_single_process_is_alone():
    allocation = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    shell = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    shell |= {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"}
    for env in ({}, allocation, shell, {"JOB_COMPLETION_INDEX": "3"}):
        assert discover(env) is None
    assert discover({}, coordinator="h:1", num_processes=1, process_id=0) is None


@pytest.mark.parametrize(
    ("env", "flags", "words"),
    [
        ({}, {"num_processes": 2}, "only some are given; give all three"),
        ({}, {"coordinator": "h:1"}, "only some are given; give all three"),
        (SLURM, {"process_id": 2}, "only some are given; give all three"),
        (
            {},
            {"coordinator": "h", "num_processes": 2, "process_id": 2},
            "(?s)flags: process_id=2; not one of 2 processes.*coordinator=h; give HOST",
        ),
        (SLURM | {"SLURM_PROCID": "8"}, {}, "Slurm: process_id=8; not one of 8"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "x"}, {}, "TASKS_PER_NODE=x; not what"),
        ({"JOBSET_NAME": "run"}, {}, "JobSet: PODS_PER_JOB=; not what JobSet sets"),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""},
            {},
            "Open MPI: coordinator; not said where process 0 runs; give --coordinator",
        ),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"},
            {},
            "2 processes of this host cannot share 3 GPUs evenly",
        ),
    ],
)
def test_contradictions_are_told(env, flags, words):
    with pytest.raises(ConfigError, match=words):
        discover(env, **flags)


@pytest.mark.parametrize(
    ("env", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "4"}, None),  # each has its own
        ({"CUDA_VISIBLE_DEVICES": "4,5", "SLURM_GPUS_PER_TASK": "2"}, None),
        ({}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}, None),
    ],
)
def test_tasks_of_a_host_share_its_gpus(env, gpus):
    assert discover(SLURM | env).gpus == gpus
