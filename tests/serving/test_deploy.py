"""What `deploy/` says parses and names things that there are; no container engine and no systemd run here."""

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from fusionroute.serving.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
OPTIONS = {"--host", "--port"}


def exported() -> set[str]:
    """Names of all figures, as Prometheus has them."""
    metrics = Metrics()
    metrics.tokens.labels("math")
    metrics.ended.labels("stop")
    return {line.split("{")[0].split()[0] for line in metrics.text().decode().splitlines() if not line.startswith("#")}


def test_every_figure_of_the_dashboard_is_exported() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    used = set(re.findall(r"fusionroute_\w+", json.dumps(dashboard["panels"])))
    assert used
    assert used <= exported()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_compose_file() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    server = compose["services"]["fusionroute"]
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).is_file(), mount
    # Nothing listens beyond this machine.
    assert all(port.startswith("127.0.0.1:") for s in compose["services"].values() for port in s.get("ports", []))
    scrape = yaml.safe_load(compose["configs"]["prometheus"]["content"])
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == ["fusionroute:8000"]


@pytest.mark.parametrize("name", ["provisioning.yaml", "datasource.yaml"])
def test_grafanas_files_parse(name: str) -> None:
    assert yaml.safe_load((DEPLOY / "grafana" / name).read_text())["apiVersion"] == 1


def test_the_dockerfile() -> None:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENV", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    assert {line[0] for line in lines} <= known
    for source in next(rest for word, rest in lines if word == "COPY").split()[:-1]:
        assert (DEPLOY.parent / source).exists(), source
    (entry,) = [json.loads(rest) for word, rest in lines if word == "ENTRYPOINT"]
    assert entry[:2] == ["fusionroute", "serve"]
    assert {word for word in entry if word.startswith("--")} <= OPTIONS
    assert [word for word, _ in lines].index("USER") < [word for word, _ in lines].index("ENTRYPOINT")


def test_the_unit() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "fusionroute.service")
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= OPTIONS
    assert int(unit["Service"]["TimeoutStopSec"]) > 33  # the server's own time to stop
