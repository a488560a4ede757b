"""The deployment files against what reads them: dagster, dagster-k8s, Kubernetes' own models.

No cluster and no Helm is here: docs/scaling.md tells what of the chart was rendered by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import dagster as dg
import pytest
import yaml
from dagster._config import process_config
from dagster._core.instance.config import dagster_instance_config_schema
from dagster_k8s import K8sRunLauncher
from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import construct_dagster_k8s_job
from kubernetes import client

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
VALUES: dict[str, Any] = yaml.safe_load((FOLDER / "values.yaml").read_text(encoding="utf-8"))
DEPLOYMENT: dict[str, Any] = VALUES["dagster-user-deployments"]["deployments"][0]
MODELS = {"CronJob": "V1CronJob", "Secret": "V1Secret"}
MODELS["PersistentVolumeClaim"] = "V1PersistentVolumeClaim"


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", lambda found: f"_{found[1].lower()}", name)


def snaked(values: dict[str, Any]) -> dict[str, Any]:
    return {snake(name): value for name, value in values.items()}


def as_kubernetes_has_it(document: Any, model: str) -> Any:
    """What is left of a document once Kubernetes' client has read it: all that it knows."""
    api = cast("Any", client.ApiClient())
    read = api.deserialize(SimpleNamespace(data=json.dumps(document)), model)
    return api.sanitize_for_serialization(read)


def launcher_config() -> dict[str, Any]:
    """As the chart writes it into dagster.yaml."""
    values = snaked(VALUES["runLauncher"]["config"]["k8sRunLauncher"])
    values["run_k8s_config"] = snaked(values["run_k8s_config"])
    return {
        **values,
        "service_account_name": "dagster",
        "dagster_home": VALUES["global"]["dagsterHome"],
        "instance_config_map": "dagster-instance",
        "postgres_password_secret": VALUES["global"]["postgresqlSecretName"],
    }


@pytest.mark.parametrize("name", ["reap.yaml", "storage.yaml"])
def test_kubernetes_knows_every_field_of_the_manifests(name: str) -> None:
    documents = list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))
    assert documents
    for document in documents:
        assert as_kubernetes_has_it(document, MODELS[document["kind"]]) == document


def test_a_run_is_a_pod_without_rights_that_has_secrets_and_volumes(tmp_path: Path) -> None:
    checked = process_config(K8sRunLauncher.config_type(), launcher_config())
    assert checked.success, checked.errors
    config = tmp_path / "kubeconfig"
    config.write_text(json.dumps(KUBECONFIG), encoding="utf-8")
    settings = cast("dict[str, Any]", checked.value)
    settings |= {"load_incluster_config": False, "kubeconfig_file": str(config)}
    launcher = K8sRunLauncher(**settings)
    deployment = {
        "env": DEPLOYMENT["env"],
        "env_secrets": [it["name"] for it in DEPLOYMENT["envSecrets"]],
        "volumes": DEPLOYMENT["volumes"],
        "volume_mounts": DEPLOYMENT["volumeMounts"],
        "resources": DEPLOYMENT["resources"],
    }
    context = K8sContainerContext.create_for_run(
        dg.DagsterRun(job_name="orchestration_job"), launcher, include_run_tags=False
    ).merge(K8sContainerContext.create_from_config({"k8s": deployment}))
    image = f"{DEPLOYMENT['image']['repository']}:{DEPLOYMENT['image']['tag']}"
    job = construct_dagster_k8s_job(
        context.get_k8s_job_config(image, launcher),
        args=["dagster", "api", "execute_run"],
        job_name="dagster-run-1",
        user_defined_k8s_config=context.run_k8s_config,
    )
    document = cast("Any", client.ApiClient()).sanitize_for_serialization(job)
    assert as_kubernetes_has_it(document, "V1Job") == document
    pod = document["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["image"] == image
    assert container["resources"] == DEPLOYMENT["resources"]
    assert "resources" not in launcher_config(), "the code location's would replace them unseen"
    assert {"secretRef": {"name": "sandbox-pipeline"}} in container["envFrom"]
    assert {it["name"]: it.get("value") for it in container["env"]}["DAGSTER_HOME"]
    assert [it["mountPath"] for it in container["volumeMounts"] if it["name"] == "shared"] == [
        "/shared",
        "/opt/dagster/dagster_home/storage",
    ]
    assert container["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert pod["terminationGracePeriodSeconds"] == 120


def test_dagster_accepts_the_instance_that_the_values_describe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DAGSTER_PG_PASSWORD", "as the chart sets it")
    daemon = VALUES["dagsterDaemon"]
    monitoring, retries = snaked(daemon["runMonitoring"]), snaked(daemon["runRetries"])
    queue = snaked(daemon["runCoordinator"]["config"]["queuedRunCoordinator"])
    postgres = VALUES["postgresql"]
    database = {
        "username": postgres["postgresqlUsername"],
        "password": {"env": "DAGSTER_PG_PASSWORD"},
        "hostname": postgres["postgresqlHost"],
        "db_name": postgres["postgresqlDatabase"],
        "port": postgres["service"]["port"],
        "scheme": postgres["postgresqlScheme"],
    }
    instance = {
        "storage": {"postgres": {"postgres_db": database}},
        "run_launcher": {
            "module": "dagster_k8s",
            "class": "K8sRunLauncher",
            "config": launcher_config(),
        },
        "run_coordinator": {
            "module": "dagster._core.run_coordinator",
            "class": "QueuedRunCoordinator",
            "config": queue,
        },
        "run_monitoring": monitoring,
        "run_retries": retries,
        "retention": {
            kind: snaked(values)
            for kind, values in VALUES["retention"].items()
            if kind != "enabled"
        },
        "sensors": snaked(daemon["sensors"]),
        "python_logs": snaked(VALUES["pythonLogs"]),
        "telemetry": VALUES["telemetry"],
    }
    checked = process_config(dagster_instance_config_schema(), instance)
    assert checked.success, checked.errors


def test_the_same_names_are_used_throughout() -> None:
    secret, password, claim = yaml.safe_load_all(
        (FOLDER / "storage.yaml").read_text(encoding="utf-8")
    )
    [reap] = yaml.safe_load_all((FOLDER / "reap.yaml").read_text(encoding="utf-8"))
    container = reap["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    image = DEPLOYMENT["image"]
    assert container["image"] == f"{image['repository']}:{image['tag']}"
    assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    assert DEPLOYMENT["envSecrets"] == [{"name": secret["metadata"]["name"]}]
    assert password["metadata"]["name"] == VALUES["global"]["postgresqlSecretName"]
    assert (
        DEPLOYMENT["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    )
    keys = {name for name in secret["stringData"] if name.endswith(("KEY", "TOKEN"))}
    assert {secret["stringData"][name] for name in keys} == {""}, "no secret is in a file"


def test_the_image_copies_what_there_is_and_runs_as_nobody_special() -> None:
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
    assert "USER 10001" in lines
    assert DEPLOYMENT["securityContext"]["runAsUser"] == 10001


KUBECONFIG: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "none",
    "clusters": [{"name": "none", "cluster": {"server": "http://127.0.0.1:9"}}],
    "contexts": [{"name": "none", "context": {"cluster": "none", "user": "none"}}],
    "users": [{"name": "none", "user": {}}],
}
