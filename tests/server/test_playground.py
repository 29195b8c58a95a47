"""The playground's files: whole, safe and for everybody; its modules against ours. No browser."""

import ast
import json
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml
from fakes import FakeBackend, serving
from starlette.testclient import TestClient

from mrss_provider.config import ServerConfig
from mrss_provider.errors import ConfigError
from mrss_provider.mixture import GATES, MERGES, make_method, parse_mixture
from mrss_provider.openai_schema import methods_object, parse_chat_request
from mrss_provider.server.app import create_app
from mrss_provider.server.auth import KeyRing
from mrss_provider.server.hosts import playground_url
from mrss_provider.server.playground import assets
from mrss_provider.server.run import listen_on

FOLDER = Path(__file__).parents[2] / "mrss_provider" / "playground"
MODULES = sorted(FOLDER.glob("*.js"))
NODE = shutil.which("node")
KEY = "user-0123456789abcdef"
# The only addresses that may stand in the files: a name, and what is never asked.
NOT_ASKED = {"http://www.w3.org/2000/svg"}
MAKES_HTML = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser"
    r"|srcdoc|setHTML|\beval\b|new Function|javascript:"
)


def client_of(keys=None, backend=None) -> TestClient:
    config = ServerConfig()
    app = create_app(backend or FakeBackend(), config, keys=KeyRing.of(config, keys or {}))
    return TestClient(app, base_url="http://127.0.0.1:9000")


def test_every_file_is_served_with_its_type_and_the_policy():
    types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
    types[".svg"] = "image/svg+xml"
    with client_of() as client:
        for file in FOLDER.iterdir():
            path = "/" if file.name == "index.html" else f"/playground/{file.name}"
            got = client.get(path)
            assert (got.status_code, got.content) == (200, file.read_bytes())
            assert got.headers["content-type"].partition(";")[0] == types[file.suffix]
            policy = got.headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self';" in policy
            assert "unsafe" not in policy
            assert "require-trusted-types-for 'script'" in policy
            assert "frame-ancestors 'none'" in policy
            assert got.headers["x-content-type-options"] == "nosniff"
            head = client.head(path)
            assert (head.status_code, head.content) == (200, b"")
            again = client.get(path, headers={"if-none-match": got.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    assert len(assets()) == len(list(FOLDER.iterdir()))


def test_other_paths_and_methods_are_refused():
    with client_of() as client:
        for path in ("/playground/", "/playground/x.js", "/playground/%2e%2e%2fconfig.py"):
            assert client.get(path).status_code == 404, path
        for path in ("/", "/playground/app.js"):
            assert client.post(path, json={}).status_code == 405


def test_the_files_need_no_key_and_open_nothing_else():
    with client_of({"MRSS_API_KEY": KEY}) as client:
        for path in assets():
            assert client.get(path).status_code == 200
            assert client.post(path, json={}).status_code == 401
        for path in ("/v1/models", "/v1/mrss/methods", "/playground/none.js", "/playground"):
            assert client.get(path).status_code == 401
        assert client.get("/v1/mrss/methods", headers=bearer(KEY)).status_code == 200


def test_a_page_under_another_name_gets_nothing():
    with client_of() as client:
        assert client.get("/", headers={"host": "evil.example"}).status_code == 403


def bearer(key) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_file_that_one_names_is_there_and_none_is_left_over():
    named, waiting = set(), ["index.html"]
    while waiting:
        name = waiting.pop()
        named.add(name)
        text = (FOLDER / name).read_text(encoding="utf-8")
        found = re.findall(r'(?:href|src)="playground/([^"]+)"', text)
        found += re.findall(r'from "\./([^"]+)"', text)
        waiting += [other for other in found if other not in named]
    assert named == {file.name for file in FOLDER.iterdir()}


def test_nothing_comes_from_elsewhere_and_no_text_becomes_html():
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w[^\s\"'`)]*", text)) <= NOT_ASKED, file
        assert not MAKES_HTML.search(text), file
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=)", page)


def test_the_key_is_kept_for_the_tab_only():
    kept = {file.name for file in MODULES if "sessionStorage" in file.read_text(encoding="utf-8")}
    assert kept == {"api.js"}
    assert "localStorage" not in (FOLDER / "api.js").read_text(encoding="utf-8")


def test_the_methods_are_those_that_names_take():
    with client_of() as client:
        got = client.get("/v1/mrss/methods").json()
    assert got == methods_object(())
    assert [entry["name"] for entry in got["merges"]] == list(MERGES)
    assert [entry["name"] for entry in got["gates"]] == list(GATES)
    for kind, entries in (("merge", got["merges"]), ("gate", got["gates"])):
        for entry in entries:
            given = {p["name"]: p["default"] for p in entry["parameters"]}
            if None not in given.values():
                assert make_method(kind, entry["name"], given).text == entry["name"]


@pytest.mark.parametrize(
    ("config", "url"),
    [
        ({}, "http://127.0.0.1:9000/"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:9000/"),
        ({"host": "::1", "port": 8}, "http://[::1]:8/"),
        ({"socket": Path("/s")}, None),
        ({"socket": Path("/s"), "loopback_port": 7}, "http://127.0.0.1:7/"),
    ],
)
def test_the_link_is_one_that_a_browser_takes(config, url):
    assert playground_url(ServerConfig(**config)) == url


def test_a_port_beside_no_socket_is_refused():
    with pytest.raises(ConfigError, match="loopback_port is for a server on a Unix socket"):
        ServerConfig(loopback_port=9)


def test_the_port_beside_a_socket_is_guarded_as_any_and_the_socket_is_not(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServerConfig(socket=tmp_path / "s", loopback_port=port)
    unix = httpx.HTTPTransport(uds=str(config.socket))
    rebound = {"host": "evil.example"}
    with serving(FakeBackend(), config), httpx.Client(transport=unix) as client:
        address = f"http://127.0.0.1:{port}/"
        assert client.get("http://any/version").json()["playground"] == address
        assert client.get("http://any/", headers=rebound).status_code == 200
        assert httpx.get(address, trust_env=False).status_code == 200
        assert httpx.get(address, headers=rebound, trust_env=False).status_code == 403


def test_a_port_that_is_taken_leaves_no_socket_behind(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServerConfig(socket=tmp_path / "s", loopback_port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"cannot listen on http://127\.0\.0\.1"):
            listen_on(config)
    assert not config.socket.exists()


PLAIN = {"name": "delta", "parameters": {}}
NOVELTY = {"name": "novelty", "parameters": {}}
SHARED = {"max_tokens": 50, "seed": 7, "trace": True, "blind": False, "prompt": "Hello!"}


def setup_of(weights, merge=PLAIN, gate=NOVELTY, cut=None, **fields):
    terms = [{"name": name, "weight": weight} for name, weight in weights.items()]
    pane = {"terms": terms, "merge": merge, "gate": gate, "cut": cut}
    return {"panes": [pane, pane], "temperature": None, "top_p": None, **SHARED, **fields}


def method(name, **parameters):
    return {"name": name, "parameters": parameters}


SETUPS = [
    setup_of({"tone": 0.35, "knowledge": 0.7}),
    setup_of({"tone": 1, "knowledge": 0}, temperature=0.5, top_p=0.9, hasKey=True),
    setup_of(
        {"base": 0.3, "a.b-c": 0.95}, method("power", exponent=-2), method("fixed"), trace=False
    ),
    setup_of(
        {"base": 1, "tone": -0.55}, method("contrast"), method("posterior", own=True), cut=0.2
    ),
    setup_of({"a": 1, "b": 1}, gate=method("schedule", points="a=1@0,0@32", over="turns")),
    setup_of({"a": 1, "b": 1}, gate=method("schedule", points="a=1@0,0@32+b=1@3"), cut=0),
    setup_of({"a": 1, "b": 1}, method("linear"), method("learned", file="mine")),
    setup_of({"a": 1, "b": 1}, method("linear"), method("novelty", tau=0.001, exponent=2)),
    # The cut was set under another rule.
    setup_of({"a": 1, "b": 1}, method("linear"), cut=0.2),
]
NO_SETUPS = [
    None,
    [],
    {**SETUPS[0], "panes": SETUPS[0]["panes"][:1]},
    {**SETUPS[0], "panes": SETUPS[0]["panes"] * 3},
    {**SETUPS[0], "seed": "1"},
    setup_of({"a": "x"}),
    setup_of({"a": 1, "b": 1}, gate={"name": "novelty", "parameters": {"tau": {}}}),
]
EVENTS = 'data: {"text": "5 €"}\r\n\r\ndata: {"text": "\\n"}\n\ndata: [DONE]\n\n'.encode()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Return what the modules made of the cases, and where they are copied to."""
    if NODE is None:
        pytest.skip("node is not installed: the playground's modules are not run")
    folder = tmp_path_factory.mktemp("playground")
    (folder / "package.json").write_text('{"type": "module"}')
    for file in MODULES:
        shutil.copy(file, folder)
    subprocess.run([NODE, "--check", folder / "app.js"], check=True, capture_output=True)
    cases = {
        "methods": methods_object(["mine"]),
        "setups": [*SETUPS, *NO_SETUPS],
        # Cut everywhere, in the middle of a character too, and before its end.
        "streams": [[list(EVENTS)], [[byte] for byte in EVENTS], [list(EVENTS[:-14])]],
    }
    script = Path(__file__).with_name("playground_cases.mjs")
    done = subprocess.run(
        [NODE, script, folder], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_name_is_the_canonical_one_and_a_body_means_the_same(ran):
    for case, written in zip(SETUPS, ran["written"], strict=False):
        parsed = parse_mixture(written["name"])
        assert parsed.canonical() == written["name"]
        pane = case["panes"][0]
        assert written["merge"] == pane["merge"]
        assert written["gate"] == pane["gate"]
        request = parse_chat_request(written["body"]).request
        # What the body says apart is what the name says in one.
        asked = parse_mixture(request.model).with_weights(request.mixture.weights)
        merge, gate = request.mixture.merge, request.mixture.gate
        assert f"{asked.canonical()}{tail(merge)}{tail(gate)}" in spellings(written["name"])
        cut = pane["cut"] if pane["merge"]["name"] in ("delta", "contrast") else None
        assert request.mixture.cut == (cut if merge else None)
        assert written["spec"].get("cut") == cut
        assert ("extra_body" in written["yaml"]) == bool(merge and cut is not None)
        assert (request.mixture.trace, request.sampling.logprobs) == (case["trace"],) * 2
        sampling = (request.sampling.temperature, request.sampling.top_p, request.sampling.seed)
        assert sampling == (case["temperature"], case["top_p"], case["seed"])


def tail(text):
    return "" if text is None else f"~{text}"


def spellings(name):
    """Return a canonical name as it is, and with the defaults that it leaves out."""
    parsed = parse_mixture(name)
    terms = name.partition("~")[0]
    merge = parsed.merge.text if parsed.merge else "delta"
    gate = parsed.gate.text if parsed.gate else "novelty"
    return {name, f"{terms}~{merge}~{gate}"}


def test_what_is_copied_says_what_the_page_asks(ran):
    for case, written in zip(SETUPS, ran["written"], strict=False):
        has_key = case.get("hasKey", False)
        words = shlex.split(written["curl"])
        assert json.loads(words[-1]) == written["plain"]
        assert ("Authorization: Bearer $MRSS_API_KEY" in words) == has_key
        (call,) = [
            node
            for node in ast.walk(ast.parse(written["python"]))
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "create"
        ]
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        ours = given.pop("extra_body")
        assert {**given, **ours} == written["plain"]
        config = yaml.safe_load(written["yaml"])
        params = config["model_list"][0]["litellm_params"]
        assert params["model"] == f"mrss/{written['name']}"
        assert ("api_key" in params) == has_key


def test_a_set_up_from_outside_is_read_whole_or_not_at_all(ran):
    good, bad = ran["written"][: len(SETUPS)], ran["written"][len(SETUPS) :]
    assert bad == [None] * len(NO_SETUPS)
    for case, written in zip(SETUPS, good, strict=True):
        wanted = {key: value for key, value in case.items() if key != "hasKey"}
        assert written["read"] == written["shared"] == wanted


def test_a_stream_is_read_however_it_is_cut(ran):
    whole, bytewise, broken = ran["streams"]
    assert whole == bytewise == [{"text": "5 €"}, {"text": "\n"}]
    assert broken == [*whole, "the answer broke off"]
