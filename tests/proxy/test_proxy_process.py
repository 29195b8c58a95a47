"""The proxy that tests start: it is where it says, and has failed when it has ended.

And the shipped configuration, as LiteLLM validates it.
"""

import subprocess
import sys
import urllib.request

import proxy_process
import pytest

# A worker that is alone says that it has started and then takes its port, as uvicorn does.
FAKE = f"""#!{sys.executable}
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
print("INFO:     Application startup complete.", flush=True)
others = None
if port:
    # Somebody was given it while LiteLLM was imported.
    import socket
    others = socket.create_server(("127.0.0.1", port))
try:
    server = http.server.HTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler)
except OSError as exc:
    sys.exit(f"ERROR:    {{exc}}")
url = f"http://127.0.0.1:{{server.server_port}}"
print(f"INFO:     Uvicorn running on {{url}} (Press CTRL+C to quit)", flush=True)
server.serve_forever()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a text in the place of the `litellm` script."""

    def write(text):
        path = tmp_path / "litellm"
        path.write_text(text)
        path.chmod(0o755)
        monkeypatch.setattr(proxy_process, "LITELLM", path)

    return write


def test_a_proxy_answers_where_it_says_whoever_takes_ports_while_it_starts(fake, tmp_path):
    fake(FAKE)
    proxy = proxy_process.Proxy(tmp_path / "config.yaml", {}, num_workers=1)
    try:
        with urllib.request.urlopen(proxy.url, timeout=10) as answer:
            assert answer.status == 200
    finally:
        proxy.stop()


def test_a_proxy_that_ends_has_not_started(fake, tmp_path):
    fake(f"#!{sys.executable}\nprint('INFO:     Application startup complete.')\n")
    with pytest.raises(pytest.fail.Exception, match="did not start:\nINFO: "):
        proxy_process.Proxy(tmp_path / "config.yaml", {}, num_workers=1)


@pytest.mark.slow
def test_shipped_configuration_validates_as_it_is():
    command = [str(proxy_process.LITELLM), "--validate_config"]
    config = str(proxy_process.ROOT / "proxy_config.yaml")
    result = subprocess.run([*command, "--config", config], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "config OK (7 models)" in result.stdout
