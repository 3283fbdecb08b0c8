"""GKE's manifests against the schemas of JobSet and Kubernetes.

    make manifests CRD=jobset.x-k8s.io_jobsets.yaml PYTHON=PYTHON-WITH-THE-PACKAGES

The packages are kubernetes-validate, jsonschema and pyyaml; the CRD lies in JobSet's
repository, under charts/jobset/crds.
"""

import json
import pathlib
import subprocess
import sys

import jsonschema
import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).parent.parent
CASES = (
    ("--topology=v5p:4x4x4",),
    ("--topology=v5p:4x4x4", "--num_slices=2", "--spot"),
    ("--topology=v6e:2x4",),
    ("--topology=tpu7x:2x2x2", "--spot", "--name=a-name"),
)


def manifest(*options: str) -> dict:
    """Returns what a dry run would hand to kubectl."""
    slices = max([int(o[13:]) for o in options if o.startswith("--num_slices")] or [1])
    train = ["--config=experiments/families.py:llama3-8b", "--workdir=/shared/it's $x"]
    train += [f"--config.mesh.dcn.data={slices}", "--config.batch_size=1024"]
    done = subprocess.run(
        [ROOT / "launch/gke/jobset.sh", *options, "--image=registry/image:tag",
         "--claim=claim", "--dry-run", "--", *train],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads("".join(done.stdout.splitlines(keepends=True)[1:-1]))


def main() -> None:
    """Validates every case; a wrong key shows that the validation can fail."""
    crd = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for options in CASES:
        found = manifest(*options)
        jsonschema.validate(found, closed(schema))
        job = found["spec"]["replicatedJobs"][0]["template"]
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        kubernetes_validate.validate(whole | job, "1.34", strict=True)
        print("valid:", *options)
    found["spec"]["failurePolicy"]["maxRestart"] = 1
    try:
        jsonschema.validate(found, closed(schema))
    except jsonschema.ValidationError as err:
        print("a wrong key is found:", err.message)
    else:
        sys.exit("a wrong key is not found")


def closed(schema: dict) -> dict:
    """Returns a CRD's schema as an API server takes it: no keys but those it names."""
    found = {k: v for k, v in schema.items() if k != "x-kubernetes-validations"}
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    if "properties" in schema:
        found["properties"] = {k: closed(v) for k, v in schema["properties"].items()}
        found["additionalProperties"] = False
    if isinstance(schema.get("items"), dict):
        found["items"] = closed(schema["items"])
    return found


if __name__ == "__main__":
    main()
