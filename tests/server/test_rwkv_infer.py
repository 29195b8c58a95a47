"""RWKV-Infer's routes with the bodies that its users send, and the mistakes that it made."""

import pytest
from admin_client import serving_engine, write_folders
from test_admin import answer_of, expect_error, ids_of

from mrss_provider.server import rwkv_infer

SUCCESS = {"status": "success"}
STATE = {
    "state_filename": "more/a.pth",
    "state_viewname": "State Test",
    "default_temperature": "1.0",
    "default_top_p": "0.3",
}
MRSS = {
    "state_viewname": "MRSS Test",
    "state_filenames": ["states/more/a.pth", "states/more/b.pth", "states/more/c.pth"],
    "contain_originalstate": "True",
    "state_gatingweight": ["0.01", "0.3", "0.4", "0.03"],
    "default_temperature": "1.0",
    "default_top_p": "0.8",
}
MODEL = {
    "model_filename": "models/second/model.safetensors",
    "model_viewname": "RWKV x060 1B6 Base",
    "model_strategy": "",
    "default_temperature": "1.0",
    "default_top_p": "0.3",
    "endtoken": "\\n\\n",
}


@pytest.fixture
def config(tmp_path):
    return write_folders(tmp_path)


@pytest.fixture
def client(config):
    with serving_engine(config) as client:
        yield client


def post(client, path, body=None) -> None:
    response = client.post(path, json=body) if body is not None else client.post(path)
    assert (response.status_code, response.json()) == (200, SUCCESS), response.text


def names_of(client) -> list[str]:
    listed = client.get("/models").json()
    assert all(item["object"] == "models" for item in listed)
    return [item["id"] for item in listed]


def test_a_day_with_rwkv_infer(client):
    post(client, "/loadmodel", MODEL)
    post(client, "/removestatemodel", {"dummy": "dummy"})
    assert names_of(client) == ["RWKV x060 1B6 Base"]
    post(client, "/loadstatemodel", STATE)
    post(client, "/mrss_loadstatemodel", MRSS)
    assert "RWKV x060 1B6 Base State Test" in names_of(client)
    assert "RWKV x060 1B6 Base MRSS Test" in names_of(client)
    for path in ("/chat/completions", "/v1/chat/completions", "/completions", "/v1/completions"):
        body = {
            "model": "RWKV x060 1B6 Base MRSS Test",
            "messages": [{"role": "user", "content": "Hello"}],
            "mrss_gatingweight": ["1", "0", "0", "1"],
            "params": {"max_tokens": 4, "temperature": 0.5},
            "max_tokens": 8,
        }
        answer = client.post(path, json=body).json()
        assert answer["object"] == "chat.completion"
        assert answer["usage"]["completion_tokens"] <= 8
    post(
        client,
        "/mrss_set_gatingweight",
        {"state_viewname": "RWKV x060 1B6 Base MRSS Test", "state_gatingweight": ["0", "1"]},
    )
    assert answer_of(client, "MRSS Test")["mrss"]["mixture"].startswith("b")
    post(client, "/removemodel")
    expect_error(client.get("/models"), 503, "no model is loaded")
    post(client, "/loadmodel", MODEL)
    # The states of the model before are gone; those that the folder holds are there.
    assert names_of(client) == [
        "RWKV x060 1B6 Base",
        "RWKV x060 1B6 Base knowledge",
        "RWKV x060 1B6 Base tone",
        "RWKV x060 1B6 Base story",
    ]


def test_what_it_loads_computes_as_there_whatever_url_asks(client):
    post(client, "/mrss_loadstatemodel", MRSS)
    named = answer_of(client, "mrss/MRSS-Test")
    assert named["mrss"] == {"mixture": "a:0.025+b:0.75+base:0.075+c~geometric~fixed", "rows": 4}
    typed = answer_of(
        client,
        named["mrss"]["mixture"],
        temperature=1.0,
        top_p=0.8,
        mrss={"sampling_order": "rwkv"},
    )
    assert typed["choices"] == named["choices"]
    # A request's own values come first.
    other = answer_of(client, "MRSS Test", temperature=0)
    assert other["choices"] == answer_of(client, typed["mrss"]["mixture"], temperature=0)["choices"]


@pytest.mark.parametrize("truth", ["True", "true", "1", 1, True])
@pytest.mark.parametrize("falsehood", ["False", "false", "0", 0, False])
def test_truth_may_be_spelled(client, truth, falsehood):
    weights = {"state_gatingweight": [1]}
    post(
        client,
        "/mrss_loadstatemodel",
        {**MRSS, **weights, "contain_originalstate": truth, "state_viewname": "t"},
    )
    post(
        client,
        "/mrss_loadstatemodel",
        {**MRSS, **weights, "contain_originalstate": falsehood, "state_viewname": "f"},
    )
    spelled = {name: client.get(f"/v1/mixtures/{name}").json()["terms"] for name in "tf"}
    assert spelled == {"t": "a+b:0+c:0+base:0", "f": "a+b:0+c:0"}


def test_numbers_may_be_texts_or_numbers(client):
    post(
        client,
        "/mrss_loadstatemodel",
        {
            **MRSS,
            "state_viewname": "n",
            "state_gatingweight": [1, "0.5", 2.0, "1e-1"],
            "default_temperature": 0.5,
            "default_top_p": 1,
        },
    )
    mixture = client.get("/v1/mixtures/n").json()
    assert mixture["terms"] == "a+b:0.5+c:2+base:0.1"
    assert (mixture["temperature"], mixture["top_p"]) == (0.5, 1.0)
    assert mixture["served"] == {"reinject": "never"}


def test_a_model_that_is_not_there_is_told_by_the_field_that_was_sent(client):
    response = client.post("/loadmodel", json={**MODEL, "model_filename": "none.pth"})
    assert response.json()["error"]["param"] == "model_filename"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/mrss_loadstatemodel", {**MRSS, "state_gatingweight": [1] * 5}, 400, "at most one a row"),
        ("/mrss_loadstatemodel", {**MRSS, "state_gatingweight": [0, "0"]}, 400, "above 0"),
        ("/mrss_loadstatemodel", {**MRSS, "state_gatingweight": ["x"]}, 400, "finite number"),
        ("/mrss_loadstatemodel", {**MRSS, "state_gatingweight": ["nan"]}, 400, "finite number"),
        ("/mrss_loadstatemodel", {**MRSS, "contain_originalstate": "maybe"}, 400, "true or false"),
        ("/mrss_loadstatemodel", {**MRSS, "state_filenames": []}, 400, "max_states"),
        ("/mrss_loadstatemodel", {**MRSS, "state_filenames": ["../x.pth"] * 3}, 400, "inside"),
        ("/loadstatemodel", {**STATE, "state_filename": "/etc/passwd"}, 400, "inside"),
        ("/loadstatemodel", {**STATE, "state_filename": "none.pth"}, 404, "none.pth"),
        ("/loadstatemodel", {**STATE, "state_viewname": ""}, 400, "state_viewname"),
        ("/loadstatemodel", {**STATE, "default_top_p": "2"}, 400, "top_p"),
        ("/loadstatemodel", {"state_viewname": "x"}, 400, "state_filename is missing"),
        ("/loadstatemodel", {**STATE, "state_viewname": "story"}, 409, "mixture"),
        ("/loadstatemodel", {**STATE, "state_file": "x"}, 400, "did you mean"),
        ("/mrss_set_gatingweight", {"state_viewname": "none"}, 404, "none"),
        ("/loadmodel", {**MODEL, "model_strategy": "nf4"}, 400, "quantize"),
        ("/loadmodel", {**MODEL, "model_strategy": "int8pack"}, 400, "int8"),
        ("/loadmodel", {**MODEL, "adapter_filename": "x.pth"}, 400, "adapter"),
        ("/loadmodel", {**MODEL, "model_filename": "../../x.pth"}, 400, "inside"),
        ("/loadmodel", {**MODEL, "model_filename": "models/none.pth"}, 404, "none.pth"),
        ("/loadmodel", {**MODEL, "endtoken": "\\q"}, 400, "endtoken"),
        ("/loadmodel", {**MODEL, "template": "none"}, 400, "template"),
    ],
)
def test_mistakes_are_told_and_change_nothing(client, path, body, status, words):
    before = names_of(client)
    expect_error(client.post(path, json=body), status, words)
    assert names_of(client) == before
    assert ids_of(client)[0] == "base"
    assert client.get("/ready").status_code == 200


def test_a_strategy_is_a_dtype_or_a_quantisation(client, monkeypatch):
    orders = []

    async def keep(admin, lifecycle, order):
        orders.append(order)

    monkeypatch.setattr(rwkv_infer, "load_model", keep)
    for strategy in ("", "int8", "int4", "fp8", "fp16"):
        post(client, "/loadmodel", MODEL | {"model_strategy": strategy})
    said = [(order.dtype, order.quantize) for order in orders]
    assert said == [
        (None, None),
        *((None, kind) for kind in ("int8", "int4", "fp8")),
        ("fp16", "none"),
    ]


def test_a_body_must_be_json(client):
    response = client.post("/loadstatemodel", content=b"{", headers={"content-type": "text/plain"})
    expect_error(response, 400, "content-type")


def test_the_published_kill_switch_is_not_there(client):
    assert client.post("/fjdkgmzak9sd/sksf_appkill", json={}).status_code == 404


def test_a_stream_ends_as_openai_says(client):
    body = {"model": "tone", "prompt": "Hello", "max_tokens": 2, "stream": True}
    assert client.post("/completions", json=body).text.endswith("data: [DONE]\n\n")


def test_health_is_told_in_its_words(client):
    assert client.get("/healthcheck").json() == {"message": "ok", "status_code": 200}
