"""Ways to read tokens with a model, for tests to compare."""

import itertools

import torch


def relative_rms(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def prefill(model, pool, sequences, slots):
    """Read each sequence into its slot, all in one call; return the logits of all tokens [T, V]."""
    offsets = [0, *itertools.accumulate(len(ids) for ids in sequences)]
    packed = torch.cat([torch.as_tensor(ids) for ids in sequences])
    hidden = model.prefill(packed, offsets, torch.tensor(slots), pool, all_positions=True)
    return model.head(hidden)


def decode(model, pool, token_ids, slot):
    """Read one sequence token by token; return its logits [T, V]."""
    slots = torch.tensor([slot])
    steps = [model.decode(token, slots, pool) for token in torch.as_tensor(token_ids).split(1)]
    return model.head(torch.cat(steps))


def slot_tensors(pool, slot):
    """Everything that a slot holds."""
    return pool.wkv[:, slot], pool.shift_att[:, slot], pool.shift_ffn[:, slot]
