"""Which certificates a client of an engine behind TLS trusts."""

import asyncio

import certifi
import httpx
import pytest

from mrss_provider.client import Client
from mrss_provider.errors import EngineUnavailableError
from mrss_provider.http1 import LeanTransport


def test_a_file_of_certificates_in_the_environment_is_the_one_that_counts(tmp_path, monkeypatch):
    one = tmp_path / "ca.pem"
    with open(certifi.where(), encoding="utf-8") as every:
        text = every.read()
    end = "-----END CERTIFICATE-----\n"
    one.write_text(text[: text.index(end)] + end, encoding="utf-8")
    assert len(LeanTransport()._tls().get_ca_certs()) > 1
    monkeypatch.setenv("SSL_CERT_FILE", str(one))
    assert len(LeanTransport()._tls().get_ca_certs()) == 1


@pytest.mark.parametrize("text", [None, "no certificate"])
def test_a_bad_file_of_certificates_is_named(tmp_path, monkeypatch, text):
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(EngineUnavailableError, match="bad SSL_CERT_FILE or SSL_CERT_DIR") as caught:
        asyncio.run(Client("https://127.0.0.1:9").models())
    assert isinstance(caught.value.__cause__, httpx.ConnectError)
