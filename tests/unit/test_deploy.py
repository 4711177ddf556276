"""What deploy/, examples/ and their page start, set and name is what there is."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from kinema.cli.app import app
from kinema.server.routes import probes
from kinema.settings_sources import load_settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((ROOT / "deploy/kubernetes/kustomization.yaml").read_text("utf-8"))
OBJECTS: list[dict[str, Any]] = [
    part
    for name in KUSTOMIZATION["resources"]
    for part in yaml.safe_load_all((ROOT / "deploy/kubernetes" / name).read_text(encoding="utf-8"))
]
DEPLOYMENTS = {part["metadata"]["name"]: part["spec"] for part in OBJECTS if part["kind"] == "Deployment"}
PODS = {name: spec["template"]["spec"] for name, spec in DEPLOYMENTS.items()}
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("deploy", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file()
} | {name: (ROOT / name).read_text(encoding="utf-8") for name in ("docs/cluster.md", "README.md")}


def container(pod: str) -> dict[str, Any]:
    (only,) = PODS[pod]["containers"]
    return only


def data_of(kind: str, name: str) -> dict[str, str]:
    found = next(part for part in OBJECTS if (part["kind"], part["metadata"]["name"]) == (kind, name))
    return found.get("data") or found["stringData"]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line after the word kinema, and where it stands."""
    for name, service in COMPOSE["services"].items():
        if "build" in service:
            yield f"compose {name}", service["command"]
    for name in PODS:
        yield f"kubernetes {name}", container(name)["args"]
    assert 'ENTRYPOINT ["kinema"]' in DOCKERFILE
    for line in re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE):
        yield "Dockerfile", json.loads(line)
    for name, text in TEXTS.items():
        whole = text.replace("\\\n", " ")
        for line in re.findall(
            r"^ *(?:start \S+ |\.venv/bin/)?kinema ((?:frontend|worker|serve).*)$", whole, re.MULTILINE
        ):
            yield name, shlex.split(re.sub(r'"?\$(\(\(.*?\)\)|\w+)"?', "1", line), comments=True)


COMMANDS = list(commands())


@pytest.mark.parametrize(("where", "arguments"), COMMANDS, ids=[f"{where}: {words[0]}" for where, words in COMMANDS])
def test_every_command_line_is_one_that_kinema_takes(where: str, arguments: list[str]) -> None:
    """Parsed as the command would, without running it."""
    words = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in arguments]
    kinema = typer.main.get_command(app)
    command = kinema.commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], words[1:])


def test_both_commands_stand_in_each_place() -> None:
    """Or the parsing above has missed them."""
    for where in ("compose", "kubernetes", "Dockerfile", "examples/launch/t2v.sh", "examples/launch/local-cluster.sh"):
        found = {words[0] for name, words in COMMANDS if name.startswith(where)}
        assert found == {"frontend", "worker"}, where


def test_every_variable_is_a_setting() -> None:
    """KINEMA_... in any of the files."""
    known = {"KINEMA_" + row.key.upper().replace(".", "_") for row in load_settings().rows}
    named = {name for text in TEXTS.values() for name in re.findall(r"\bKINEMA_[A-Z_]*[A-Z]\b", text)}
    # What Kubernetes would set by itself; the manifests say that it is not to.
    assert named - known == {"KINEMA_FRONTEND_PORT"}
    assert all(pod["enableServiceLinks"] is False for pod in PODS.values())


@pytest.mark.parametrize("pod", PODS)
def test_the_values_in_the_manifests_are_accepted(pod: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Dockerfile's and the manifests' environment together, as the process of that pod has it."""
    environment = dict(re.findall(r"(KINEMA_\w+)=(\S+)", DOCKERFILE))
    for source in container(pod)["envFrom"]:
        for kind, reference in source.items():
            environment |= data_of({"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], reference["name"])
    for name, value in environment.items():
        assert isinstance(value, str), f"{name}: Kubernetes takes nothing but strings"
        monkeypatch.setenv(name, value)
    settings = load_settings().settings
    assert settings.storage_url == "s3://bucket/videos"
    assert settings.transport.etcd_endpoints == environment["ETCD_ENDPOINTS"]
    # Only frontends speak to the database and know the keys.
    assert (settings.jobs.database_url is not None) == (pod == "kinema-frontend")


def test_processes_are_given_the_time_that_they_take_to_end() -> None:
    """A worker's drain, and a frontend's last answers after the pause that lets the service forget it."""
    drain_s = float(data_of("ConfigMap", "kinema")["KINEMA_CLUSTER_DRAIN_S"])
    assert PODS["kinema-worker"]["terminationGracePeriodSeconds"] >= drain_s + 30
    pause_s = container("kinema-frontend")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert PODS["kinema-frontend"]["terminationGracePeriodSeconds"] >= pause_s + 15
    minutes = re.fullmatch(r"(\d+)m", COMPOSE["services"]["worker"]["stop_grace_period"])
    assert minutes is not None
    assert int(minutes[1]) * 60 >= load_settings().settings.cluster.drain_s + 30


def test_probes_ask_for_what_is_answered() -> None:
    """The frontend's by its own routes; a worker's by Dynamo's health server, on a port that it can read."""
    paths = {getattr(route, "path", None) for route in probes.routes}
    frontend, worker = container("kinema-frontend"), container("kinema-worker")
    for probe in ("livenessProbe", "readinessProbe"):
        assert frontend[probe]["httpGet"]["path"] in paths
    ports = {port["name"]: port["containerPort"] for one in (frontend, worker) for port in one["ports"]}
    assert load_settings().settings.server.port == ports["http"]
    environment = {variable["name"]: variable["value"] for variable in worker["env"]}
    assert int(environment["DYN_SYSTEM_PORT"]) == ports["health"] < 2**15  # it reads 16 bits with a sign
    assert COMPOSE["services"]["frontend"]["ports"] == [f"127.0.0.1:{ports['http']}:{ports['http']}"]


def test_what_the_manifests_refer_to_is_there() -> None:
    """Files, images, objects and volumes by name."""
    beside = {path.name for path in (ROOT / "deploy/kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(KUSTOMIZATION["resources"]) == beside
    assert {container(name)["image"] for name in PODS} == {image["name"] for image in KUSTOMIZATION["images"]}
    for name, pod in PODS.items():
        assert DEPLOYMENTS[name]["selector"]["matchLabels"] == {"app": name}
        assert DEPLOYMENTS[name]["template"]["metadata"]["labels"] == {"app": name}
        mounted = {mount["name"] for mount in container(name)["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    (service,) = (part["spec"] for part in OBJECTS if part["kind"] == "Service")
    assert service["selector"]["app"] in PODS
    assert service["ports"][0]["targetPort"] in {port["name"] for port in container("kinema-frontend")["ports"]}


def test_the_images_are_made_of_what_there_is() -> None:
    """Stages that compose builds, files that are copied and let in, and extras of this package."""
    stages = re.findall(r"^FROM .* AS (\w+)$", DOCKERFILE, re.MULTILINE)
    for service in (COMPOSE["services"][name] for name in ("frontend", "worker")):
        assert service["build"]["target"] in stages
        assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    let_in = re.findall(r"^!(.*)$", TEXTS["deploy/Dockerfile.dockerignore"], re.MULTILINE)
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    assert sorted(copied) == sorted(let_in)
    assert all((ROOT / name).exists() for name in copied)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = {extra for found in re.findall(r"'\.\[(.*)\]'", DOCKERFILE) for extra in found.split(",")}
    assert wanted <= extras.keys()
    assert {"dynamo", "postgres", "wan"} <= wanted


def test_volumes_and_services_of_compose_are_declared() -> None:
    """Every name that a service uses, and the addresses that the two sides are given."""
    services = COMPOSE["services"]
    used = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert used == COMPOSE["volumes"].keys()
    for name in ("frontend", "worker"):
        environment = services[name]["environment"]
        assert re.fullmatch(r"http://(\w+):2379", environment["ETCD_ENDPOINTS"])[1] in services  # type: ignore[index]
    assert "@postgres/" in services["frontend"]["environment"]["KINEMA_JOBS_DATABASE_URL"]
    assert "KINEMA_JOBS_DATABASE_URL" not in services["worker"]["environment"]
