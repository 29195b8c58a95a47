"""Checkpoints in every layout that is read, and one sentence for those that are not."""

import hashlib
import json
import os
import pickle
import re

import pytest
import torch
from reading import prefill, relative_rms
from safetensors.torch import save_file
from tiny_model import TINY, Shape, checkpoint, tuned_state, write_checkpoint, write_model_folder

from mrss_provider.errors import ModelFileError
from mrss_provider.model import load_model
from mrss_provider.model.weights import load_weights

# Ranks that differ from each other and from the width, so that a missed transpose shows.
SHAPE = Shape(3, 128, 300, 64, 320, (16, 24, 8, 40))

FLA_MODULES = {
    "ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att.ln_x": "attn.g_norm",
    "att.receptance": "attn.r_proj", "att.key": "attn.k_proj", "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
}  # fmt: skip
FLA_TOP = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}


def to_fla(tensors, *, old_mixes=False):
    """Rename an official RWKV-7 as fla's converter does."""
    out = {}
    for name, tensor in tensors.items():
        if not name.startswith("blocks."):
            module, kind = name.rsplit(".", 1)
            out[f"{FLA_TOP[module]}.{kind}"] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        module, _, kind = rest.rpartition(".")
        lora = re.fullmatch(r"att\.([wavg])([012])", rest)
        if lora:
            part = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[lora[2]]
            new = f"attn.{lora[1]}_lora.lora.{part}"
            tensor = tensor.flatten() if lora[2] == "0" else tensor.mT
        elif module in FLA_MODULES:
            new = f"{FLA_MODULES[module]}.{kind}"
        elif rest.startswith("att.x_"):
            new = "attn." + rest[4:]
        else:
            new, tensor = rest.replace("att.", "attn."), tensor.squeeze()
        out[f"model.layers.{layer}.{new}"] = tensor.contiguous()
    if old_mixes:
        for i in range(SHAPE.num_layers):
            prefix = f"model.layers.{i}.attn.x_"
            rows = [out.pop(prefix + mixed).flatten() for mixed in "rwkvag"]
            out[prefix + "x"] = torch.stack(rows)
    return out


def to_native(tensors):
    """Rename as transformers' own layout: `model.` in front, `head` without, vectors as [C]."""
    return {
        name if name.startswith("head") else "model." + name: tensor.squeeze().contiguous()
        for name, tensor in tensors.items()
    }


def assert_same_model(path, version=7):
    """Compare with the official layout's tensors, all of them."""
    official = checkpoint(version, SHAPE)
    got = load_weights(path).tensors
    assert got.keys() == official.keys()
    for name, tensor in official.items():
        is_in_out = re.search(r"att\.([wavg][12]|time_maa_w[12]|time_decay_w[12])$", name)
        wanted = tensor.mT if is_in_out else tensor.flatten() if tensor.ndim == 3 else tensor
        assert torch.equal(got[name], wanted), name


@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_names_are_read(version, suffix, tmp_path):
    path = write_checkpoint(tmp_path / f"m{suffix}", version, SHAPE)
    assert_same_model(path, version)
    weights = load_weights(path)
    assert weights.version == version
    assert (weights.num_layers, weights.hidden_size, weights.vocab_size) == (3, 128, 300)
    assert (weights.num_heads, weights.head_size, weights.ffn_size) == (2, 64, 320)


def test_a_pth_from_before_zip_files_is_read(tmp_path):
    path = tmp_path / "m.pth"
    torch.save(checkpoint(7, SHAPE), path, _use_new_zipfile_serialization=False)
    assert_same_model(path)


@pytest.mark.parametrize("version", [7, 6])
def test_transformers_native_names_are_read(version, tmp_path):
    save_file(to_native(checkpoint(version, SHAPE)), tmp_path / "m.safetensors")
    assert_same_model(tmp_path / "m.safetensors", version)


@pytest.mark.parametrize("old_mixes", [False, True], ids=["x_r", "x_x"])
def test_fla_names_are_read(tmp_path, old_mixes):
    save_file(to_fla(checkpoint(7, SHAPE), old_mixes=old_mixes), tmp_path / "m.safetensors")
    assert_same_model(tmp_path / "m.safetensors")


def test_fla_without_a_pre_norm_has_no_ln0(tmp_path, token_ids):
    tensors = checkpoint(7, SHAPE)
    norm = [tensors.pop(f"blocks.0.ln0.{kind}") for kind in ("weight", "bias")]
    save_file(to_fla(tensors), tmp_path / "m.safetensors")
    without = load_model(tmp_path / "m.safetensors", device="cpu", dtype="fp32", threads=1)
    # The same as normalising the embedding beforehand and giving it to a model without the norm.
    embedding = torch.nn.functional.layer_norm(checkpoint(7, SHAPE)["emb.weight"], (128,), *norm)
    save_file(to_fla(tensors | {"emb.weight": embedding}), tmp_path / "n.safetensors")
    normed = load_model(tmp_path / "n.safetensors", device="cpu", dtype="fp32", threads=1)
    official = load_model(
        write_checkpoint(tmp_path / "o.pth", 7, SHAPE), device="cpu", dtype="fp32", threads=1
    )
    ids = token_ids[:10] % SHAPE.vocab_size
    wanted = prefill(official, official.new_pool(1), [ids], [0])
    assert relative_rms(prefill(normed, normed.new_pool(1), [ids], [0]), wanted) < 1e-5
    assert relative_rms(prefill(without, without.new_pool(1), [ids], [0]), wanted) > 1e-2


def test_compiled_models_prefix_is_taken_off(tmp_path):
    tensors = {"_orig_mod." + name: t for name, t in checkpoint(7, SHAPE).items()}
    torch.save(tensors, tmp_path / "m.pth")
    assert_same_model(tmp_path / "m.pth")


def test_layer_0_may_have_a_value_lora_that_nothing_reads(tmp_path):
    tensors = checkpoint(7, SHAPE)
    for n in "012":
        tensors[f"blocks.0.att.v{n}"] = tensors[f"blocks.1.att.v{n}"] * torch.nan
    torch.save(tensors, tmp_path / "m.pth")
    assert_same_model(tmp_path / "m.pth")


def test_shards_are_read_through_their_index(tmp_path):
    names = list(tensors := checkpoint(7, SHAPE))
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(part, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_model(index)
    assert_same_model(tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"names the shard part-1.safetensors, which is not"):
        load_weights(tmp_path)


def test_a_folder_means_the_checkpoint_in_it(tmp_path):
    folder = write_model_folder(tmp_path / "tiny-0.1", 7, SHAPE)
    assert_same_model(folder)
    assert load_weights(folder).name == "tiny-0.1"
    alone = tmp_path / "other"
    alone.mkdir()
    write_checkpoint(alone / "rwkv.pth", 7, SHAPE)
    assert_same_model(alone)
    write_checkpoint(alone / "more.pth", 7, SHAPE)
    with pytest.raises(ModelFileError, match=r"several checkpoints \(more.pth, rwkv.pth\)"):
        load_weights(alone)


def test_the_fingerprint_is_the_hash_of_layer_0s_key_weight_as_stored(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = checkpoint(7, SHAPE, dtype=dtype)
        torch.save(tensors, tmp_path / "m.pth")
        save_file(to_fla(tensors), tmp_path / "m.safetensors")
        data = bytes(tensors["blocks.0.att.key.weight"].untyped_storage())
        wanted = hashlib.sha256(data).hexdigest()
        assert load_weights(tmp_path / "m.pth").fingerprint == wanted
        assert load_weights(tmp_path / "m.safetensors").fingerprint == wanted


def test_the_content_tells_any_number_and_not_the_layout(tmp_path):
    tensors = checkpoint(7, SHAPE, dtype=torch.bfloat16)
    torch.save(tensors, tmp_path / "m.pth")
    save_file(to_fla(tensors), tmp_path / "m.safetensors")
    content = load_weights(tmp_path / "m.pth").content
    assert load_weights(tmp_path / "m.safetensors").content == content
    told = {content}
    # A row of the embedding that is not looked at, a rank of a LoRA, a norm, and a state.
    changes = {"emb.weight": 7, "blocks.1.att.w2": 3, "ln_out.bias": 0}
    for name, at in changes.items():
        changed = tensors | {name: tensors[name].clone()}
        changed[name].view(-1, changed[name].shape[-1])[at, -1] += 1
        torch.save(changed, tmp_path / "m.pth")
        told.add(load_weights(tmp_path / "m.pth").content)
    torch.save(tensors | tuned_state(SHAPE), tmp_path / "m.pth")
    told.add(load_weights(tmp_path / "m.pth").content)
    assert len(told) == 5


def test_a_loaded_model_does_not_need_its_file(tmp_path, token_ids):
    path = write_checkpoint(tmp_path / "m.pth", 7, TINY)
    for packed in (True, False):
        model = load_model(path, device="cpu", dtype="fp32", threads=1, packed=packed)
        wanted = prefill(model, model.new_pool(1), [token_ids], [0])
        data = path.read_bytes()
        with path.open("r+b") as file:
            file.write(os.urandom(len(data)))
        assert torch.equal(prefill(model, model.new_pool(1), [token_ids], [0]), wanted)
        path.write_bytes(data)


class RunsCode:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def write_bytes(data):
    return lambda path: path.write_bytes(data)


def save(value, **options):
    return lambda path: torch.save(value, path, **options)


def truncate(path):
    write_checkpoint(path, 7, TINY)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_FILES = [
    ("m.pth", truncate, "is truncated: its end is missing; get it again"),
    ("m.safetensors", truncate, "is truncated or not a safetensors file"),
    ("m.pth", write_bytes(b""), "is not a checkpoint; give a .pth or .safetensors checkpoint"),
    ("m.safetensors", write_bytes(b""), "is truncated or not a safetensors file"),
    ("m.pth", write_bytes(b"hello " * 99), "is not a checkpoint; give"),
    ("m.pth", write_bytes(pickle.dumps({"a": 1})), "is not a checkpoint; give"),
    ("m.gguf", write_bytes(b"GGUF" + bytes(99)), "is not a checkpoint, it is a GGUF file"),
    ("m.pth", write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
    ("m.pth", save([torch.zeros(2)]), "holds a list; needed is a dictionary of named tensors"),
    ("m.pth", save({"state_dict": {}}), "holds a dict under 'state_dict'; needed is a flat"),
    ("m.pth", save({}), "is not an RWKV model: it holds 0 tensors"),
    ("m.index.json", write_bytes(b"{}"), "is not a safetensors index: it needs a `weight_map`"),
    ("m.index.json", write_bytes(b"[1]"), "is not a safetensors index: it needs a `weight_map`"),
    (
        "m.pth",
        save(torch.nn.Linear(2, 2)),
        r"wants to run Python code \(torch.nn.modules.linear.Linear\), which is refused",
    ),
]


@pytest.mark.parametrize(("name", "write", "message"), BAD_FILES)
def test_a_file_that_is_no_checkpoint_gives_one_sentence(name, write, message, tmp_path):
    path = tmp_path / name
    write(path)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pth_is_refused_and_not_run(tmp_path, is_zip):
    made = tmp_path / "made"
    value = {"emb.weight": torch.zeros(2), "x": RunsCode(made)}
    torch.save(value, tmp_path / "m.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ModelFileError, match=r"wants to run Python code \(posix.mkdir\)"):
        load_weights(tmp_path / "m.pth")
    assert not made.exists()


def test_a_missing_path_and_an_empty_folder_say_so(tmp_path):
    with pytest.raises(ModelFileError, match=r"none.pth does not exist; give a .pth or"):
        load_weights(tmp_path / "none.pth")
    with pytest.raises(ModelFileError, match=r"holds no .safetensors and no .pth file"):
        load_weights(tmp_path)


def layer_names(*names):
    return {f"blocks.0.{name}": torch.zeros(4, 4) for name in names}


OTHER_MODELS = [
    (layer_names("att.time_mix_k", "att.time_decay"), "is an RWKV-4; needed are RWKV-6"),
    (
        layer_names("att.time_mix_k", "att.time_decay", "att.ln_x.weight"),
        r"is an RWKV-5 \(x05x\); needed are RWKV-6",
    ),
    (
        checkpoint(7, SHAPE) | layer_names("ffn.s_emb.weight"),
        r"is an RWKV-7a \(x070a, with deep embeddings\)",
    ),
    (
        checkpoint(7, SHAPE) | layer_names("ffn.s_emb.weight", "qkv.q.weight"),
        r"is an RWKV-7b \(x070b, with deep-embedding attention\)",
    ),
    (tuned_state(SHAPE), "is a tuned state, not a model"),
    (
        {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)},
        r"is not an RWKV model: it holds 1 tensors \(layers.0.self_attn.q_proj.weight, ...\)",
    ),
    (
        {"model.layers.0.attn.r_proj.weight": torch.zeros(4, 4)},
        "has fla's layout but is no RWKV-7",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), OTHER_MODELS)
def test_another_architecture_is_named(tensors, message, tmp_path):
    torch.save(tensors, tmp_path / "m.pth")
    with pytest.raises(ModelFileError, match=message):
        load_weights(tmp_path / "m.pth")


def changed(**changes):
    """The official tensors with some removed (None) or replaced; `__` stands for a dot."""
    tensors = checkpoint(7, SHAPE)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


DAMAGED = [
    (
        changed(blocks__1__att__w1=None),
        "lacks blocks.1.att.w1, which an RWKV-7 of 3 layers needs",
    ),
    (
        changed(blocks__1__att__w1=None, head__weight=None),
        "lacks blocks.1.att.w1 and 1 more, which an RWKV-7 of 3 layers needs",
    ),
    (changed(blocks__0__ln0__bias=None), "lacks blocks.0.ln0.bias"),
    (
        changed(blocks__2__ffn__extra=torch.zeros(3)),
        "holds blocks.2.ffn.extra, which an RWKV-7 of 3 layers does not have",
    ),
    (
        changed(blocks__extra=torch.zeros(3)),
        "holds blocks.extra, which an RWKV-7 of 3 layers does not have",
    ),
    (
        changed(blocks__999999999999__att__w1=torch.zeros(3)),
        "holds blocks.999999999999.att.w1, which an RWKV-7 of 3 layers does not have",
    ),
    (
        changed(head__weight=torch.zeros(300, 128).to_sparse()),
        "holds no plain values under 'head.weight'; needed are dense tensors",
    ),
    (
        changed(head__weight=torch.zeros(300, 128, device="meta")),
        "holds no plain values under 'head.weight'; needed are dense tensors",
    ),
    (
        changed(blocks__1__ffn__key__weight=torch.zeros(321, 128)),
        r"blocks.1.ffn.key.weight has shape \[321, 128\], needed is \[320, 128\]",
    ),
    (
        changed(blocks__1__att__w2=torch.zeros(17, 128)),
        r"blocks.1.att.w2 has shape \[17, 128\], needed is \[16, 128\]",
    ),
    (
        changed(head__weight=torch.zeros(301, 128)),
        r"head.weight has shape \[301, 128\], needed is \[300, 128\]",
    ),
    (
        changed(**{f"blocks__{i}__att__r_k": torch.zeros(3, 64) for i in range(3)}),
        "3 heads of 64 do not make the width 128",
    ),
    (
        changed(head__weight=torch.zeros(300, 128, dtype=torch.int8)),
        "head.weight has dtype torch.int8; needed are fp32, bf16 or fp16 weights",
    ),
    (
        changed(blocks__1__att__time_state=torch.zeros(2, 64, 64)),
        "holds a time_state for 1 of its 3 layers; needed is one for each, or none",
    ),
    (
        changed(**{f"blocks__{i}__att__time_state": torch.zeros(2, 64, 32) for i in range(3)}),
        r"blocks.0.att.time_state has shape \[2, 64, 32\], needed is \[2, 64, 64\]",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), DAMAGED)
def test_missing_unknown_and_misshapen_tensors_are_named(tensors, message, tmp_path):
    torch.save(tensors, tmp_path / "m.pth")
    with pytest.raises(ModelFileError, match=message) as caught:
        load_weights(tmp_path / "m.pth")
    assert "m.pth" in str(caught.value)
