"""launch/gke_jobset.yaml and launch/Dockerfile: every field is one that exists, and they mean what their comments say.

The JobSet is held against the fields of jobset.x-k8s.io/v1alpha2, batch/v1 and v1 that it may use, written down here. (It was
also checked against JobSet's whole published schema, of 2026-08-18, which is too large to keep.) No cluster has run it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
JOBSET = ROOT / "launch" / "gke_jobset.yaml"
DOCKERFILE = ROOT / "launch" / "Dockerfile"

ANY = {str: str}   # labels, annotations, selectors: free names
# A dict lists the fields that exist; a tuple the values that are allowed; [x] a list of x; a type that type.
SCHEMA = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",), "kind": ("JobSet",),
    "metadata": {"name": str, "annotations": ANY, "labels": ANY},
    "spec": {
        "suspend": bool, "ttlSecondsAfterFinished": int, "successPolicy": {"operator": ("All", "Any")},
        "failurePolicy": {
            "maxRestarts": int, "restartStrategy": ("Recreate", "BlockingRecreate"),
            "rules": [{"name": str, "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                       "onJobFailureReasons": [("BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy",
                                                "FailedIndexes", "MaxFailedIndexesExceeded")],
                       "targetReplicatedJobs": [str]}]},
        "replicatedJobs": [{
            "name": str, "replicas": int,
            "template": {"spec": {
                "parallelism": int, "completions": int, "completionMode": ("Indexed",), "backoffLimit": int,
                "podFailurePolicy": {"rules": [{
                    "action": ("FailJob", "Ignore", "Count"),
                    "onExitCodes": {"containerName": str, "operator": ("In", "NotIn"), "values": [int]}}]},
                "template": {"metadata": {"labels": ANY, "annotations": ANY}, "spec": {
                    "restartPolicy": ("Never",), "terminationGracePeriodSeconds": int, "serviceAccountName": str,
                    "nodeSelector": ANY, "hostNetwork": bool, "dnsPolicy": ("ClusterFirstWithHostNet",),
                    "tolerations": [{"key": str, "operator": ("Exists", "Equal"), "value": str, "effect": str}],
                    "containers": [{
                        "name": str, "image": str, "command": [str], "args": [str], "env": [{"name": str, "value": str}],
                        "ports": [{"containerPort": int}], "securityContext": {"privileged": bool},
                        "resources": {"limits": {str: (int, str)}, "requests": {str: (int, str)}}}]}}}}}]},
}


def problems(value, schema, path="") -> list[str]:
    """What in `value` the schema does not allow."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path}: fields are needed, not {value!r}"]
        if str in schema:
            return [p for k, v in value.items() for p in problems(v, schema[str], f"{path}.{k}")]
        unknown = [f"{path}.{key}: no such field" for key in value if key not in schema]
        return unknown + [p for k, v in value.items() if k in schema for p in problems(v, schema[k], f"{path}.{k}")]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: a list is needed, not {value!r}"]
        return [p for i, v in enumerate(value) for p in problems(v, schema[0], f"{path}[{i}]")]
    if isinstance(schema, tuple):
        fits = any(type(value) is s if isinstance(s, type) else value == s for s in schema)
        return [] if fits else [f"{path}: {value!r} is none of {schema}"]
    return [] if type(value) is schema else [f"{path}: {value!r} is no {schema.__name__}"]


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load(JOBSET.read_text())


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_every_field_exists(jobset):
    assert problems(jobset, SCHEMA) == []
    # The check itself: a misspelt field, a wrong type, a wrong word.
    assert problems({"spec": {"failurePolicy": {"maxRestart": 3}}}, SCHEMA) == [".spec.failurePolicy.maxRestart: no such field"]
    assert problems({"spec": {"failurePolicy": {"maxRestarts": "3"}}}, SCHEMA)
    assert problems({"kind": "Job"}, SCHEMA) and problems({"spec": []}, SCHEMA)


@pytest.mark.parametrize(("code", "ends"), [(0, True), (2, True), (3, True), (1, False), (75, False), (130, False),
                                            (137, False)])
def test_exit_codes_restart_what_they_should(jobset, code, ends):
    """As the controllers read the manifest: a pod's exit code -> the Job's reason to fail -> what the JobSet does."""
    job = job_of(jobset)
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    reason = "" if code == 0 else "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule["onExitCodes"]
        assert codes["containerName"] in [container["name"] for container in job["template"]["spec"]["containers"]]
        if code and (code in codes["values"]) == (codes["operator"] == "In"):
            reason = {"FailJob": "PodFailurePolicy"}[rule["action"]]
            break
    policy = jobset["spec"]["failurePolicy"]
    matched = [rule["action"] for rule in policy["rules"] if reason in rule.get("onJobFailureReasons", [reason])]
    action = "" if not reason else matched[0] if matched else "RestartJobSet"   # JobSet's default
    assert (action in ("", "FailJobSet")) == ends
    assert policy["maxRestarts"] > 100


def test_hosts_and_chips_agree(jobset):
    job = job_of(jobset)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed"
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in jobset["metadata"]["annotations"]
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_arguments_are_those_of_the_command(jobset):
    """The example's arguments are parsed by neo.train's own parser; its config exists."""
    from neo.cli import parse
    from neo.train.__main__ import COMMAND
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    program, *arguments = container["args"]
    assert program == COMMAND.prog and "command" not in container   # the image's entry point is `python -m`
    parsed = parse(COMMAND, arguments)
    assert (ROOT / parsed.config).exists() and parsed.workdir.startswith("gs://")


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def test_dockerfile_is_sound():
    known = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "ENTRYPOINT", "CMD", "ARG", "LABEL"}
    found = instructions()
    assert {name for name, _ in found} <= known
    stages = [text.split(" AS ")[1] for name, text in found if name == "FROM"]
    assert stages == ["base", "tpu", "cuda"]
    for name, text in found:
        if name == "COPY":
            for source in text.split()[:-1]:
                assert (ROOT / source).exists(), source
    setup = (ROOT / "setup.py").read_text()
    installs = [text for name, text in found if name == "RUN" and "pip install" in text]
    assert len(installs) == 2
    for text in installs:
        assert "-c constraints.txt" in text
        for extra in re.search(r"\.\[([\w,]+)\]", text)[1].split(","):
            assert f'"{extra}": [' in setup, f"no extra {extra}"
    entry = next(text for name, text in found if name == "ENTRYPOINT")
    assert "tini" in entry and any(name == "RUN" and "tini" in text for name, text in found)


def test_image_leaves_out_what_commands_write():
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().split()
    assert {".git", "data", "runs", "plans"} <= set(ignored)
    for needed in ("neo", "configs", "setup.py", "README.md", "constraints.txt", "launch"):
        assert needed not in ignored


@pytest.mark.parametrize("place", ["launch/README.md", "docs/tpu_pod.md", "docs/gke.md", "docs/slurm.md"])
def test_pages_go_from_nothing_to_clean(place):
    """Each way tells prerequisites, start, logs, stop, resume and clean up, and names only files that exist."""
    text = (ROOT / place).read_text()
    if place.startswith("docs/"):
        for section in ("need", "Start", "Logs", "Stop", "Resume", "Clean"):
            assert re.search(rf"^## .*{section}", text, re.MULTILINE | re.IGNORECASE), f"no section on {section}"
        assert "step 10" in text
    for path in set(re.findall(r"\b(?:launch|configs|docs)/[\w./]+\w", text)):
        assert (ROOT / path).exists(), f"{place} names {path}"
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or ((ROOT / place).parent / target).exists(), f"{place} links to {target}"


@pytest.mark.parametrize("place", ["launch/README.md", "docs/tpu_pod.md", "docs/gke.md", "docs/slurm.md"])
def test_fields_named_in_pages_exist(place):
    from neo.config.render import field_lines
    known = {path for path, *_ in field_lines()}
    groups = {path.split(".")[0] for path in known}
    text = (ROOT / place).read_text()
    named = set(re.findall(r"--config\.([a-z_]+\.[a-z_.]+[a-z_])", text))
    for path in named:
        assert path in known or path.startswith("phases."), f"{place} names --config.{path}"
    assert not named or {path.split(".")[0] for path in named} <= groups
