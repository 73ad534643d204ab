"""Dashboard, alerts and runbook speak of metrics that are exported, and of each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fscached import config
from fscached.control import metrics
from fscached.source import Giver
from tests.control.conftest import StandInService

DOCS = Path(__file__).parent.parent / "docs"
DASHBOARD = json.loads((DOCS / "grafana/fscached.json").read_text())
RULES = yaml.safe_load((DOCS / "prometheus/alerts.yaml").read_text())["groups"][0]["rules"]
RUNBOOK = (DOCS / "runbook.md").read_text()
OTHERS = {"node_textfile_mtime_seconds"}
"""Of node_exporter, which the runbook has read the daemon's."""
METRIC = re.compile(r"\b(?:fscached|node)_\w+")


def exported() -> str:
    status = StandInService().status()
    status.given.update({giver.value: 1 for giver in Giver})
    return metrics.prometheus(status).decode()


NAMES = set(re.findall(r"^(fscached_\w+)", exported(), re.MULTILINE)) | OTHERS
QUERIES = [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())
] + [variable["query"] for variable in DASHBOARD["templating"]["list"]]


def metrics_in(query: str) -> set[str]:
    return set(METRIC.findall(re.sub(r'"[^"]*"', "", query)))


def test_the_dashboard_is_what_its_script_prints() -> None:
    """One is made from the other."""
    script = Path(__file__).parent.parent / "scripts" / "dashboard"
    printed = subprocess.run([sys.executable, script], capture_output=True, check=True).stdout
    assert json.loads(printed) == DASHBOARD


@pytest.mark.parametrize("query", QUERIES)
def test_every_metric_of_the_dashboard_is_exported(query: str) -> None:
    """Renaming one breaks this before it breaks somebody's wall."""
    assert metrics_in(query) <= NAMES
    assert metrics_in(query) or query == "prometheus"


def test_panels_do_not_overlap() -> None:
    """Each has its own place on the grid."""
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_is_of_an_exported_metric_and_has_an_entry(rule) -> None:
    """Whoever is woken finds out what to do."""
    assert metrics_in(rule["expr"]) and metrics_in(rule["expr"]) <= NAMES
    assert f"\n## {rule['alert']}\n" in RUNBOOK
    assert rule["labels"]["severity"] in {"critical", "warning"} and rule["annotations"]["summary"]


def test_the_runbook_has_no_entry_for_nobody() -> None:
    """An alert that is gone takes its entry along."""
    assert re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE) == [rule["alert"] for rule in RULES]


def test_what_the_runbook_names_is_there() -> None:
    """Its metrics, its settings, its links to itself."""
    assert metrics_in(RUNBOOK) <= NAMES | {"node_exporter"}
    for table, key in re.findall(r"`(cache|fetch|source|log|prefetch)\.(\w+)`", RUNBOOK):
        assert key in config.TABLES[table].__struct_fields__, f"{table}.{key}"
    headings = {name.lower() for name in re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK)) <= headings


def test_every_exported_metric_says_what_it_is() -> None:
    """In Prometheus' own form, once; histograms and summaries for all of their parts."""
    text = exported()
    families = set(re.findall(r"^# TYPE (\w+) (?:histogram|summary)$", text, re.MULTILINE))
    for name in NAMES - OTHERS:
        family = re.sub(r"_(bucket|sum|count)\Z", "", name)
        said = family if family in families else name
        assert text.count(f"# HELP {said} ") == text.count(f"# TYPE {said} ") == 1
