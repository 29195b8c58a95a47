"""The Grafana dashboard shows what `/metrics` tells."""

import json
import re
from pathlib import Path

from test_metrics import CHAT, Observed, client_of, samples

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/mrss.json"
NOT_SHOWN = {
    "mrss_build_info",
    "mrss_steps_total",
    "mrss_cache_entries",
    "mrss_cache_hit_tokens_total",
}
NAME = re.compile(r"\b(?:mrss|process)_[a-z_]+\b")


def test_every_number_of_the_dashboard_is_one_that_a_server_tells():
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    wanted = {name for query in queries for name in NAME.findall(query)}
    with client_of(Observed()) as client:
        client.post("/v1/chat/completions", json=CHAT)
        told = {name for name, *_ in samples(client)}
    assert wanted <= told
    parts = ("_sum", "_count", "_created")
    ours = {name for name in told if name.startswith("mrss_") and not name.endswith(parts)}
    assert ours - NOT_SHOWN == {name for name in wanted if name.startswith("mrss_")}


def test_panels_do_not_overlap_and_have_their_own_ids():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(cells) == len(panels)
