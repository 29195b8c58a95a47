"""RWKV-6 and RWKV-7 written out for one sequence in fp64, from the papers' formulas: an oracle.

Slow and plain on purpose. Weights are a dict in the official names and layout; a state is one
`[shift_att [C], wkv [H, N, N], shift_ffn [C]]` a layer, as the `rwkv` package keeps it.
"""

import torch
from torch.nn import functional as F


class Reference:
    """Reads tokens one at a time; `time_offset` [L, C] scales wkv's output by 1 + offset."""

    def __init__(self, tensors, state=None, time_offset=None):
        self.tensors = {name: tensor.double().squeeze() for name, tensor in tensors.items()}
        self.num_layers = 1 + max(
            int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")
        )
        self.is_v7 = "blocks.0.att.r_k" in tensors
        per_head = "r_k" if self.is_v7 else "time_faaaa"
        self.heads, self.size = tensors[f"blocks.0.att.{per_head}"].shape
        c = self.heads * self.size
        zeros = torch.zeros(c, dtype=torch.float64)
        self.state = [
            [zeros, torch.zeros(self.heads, self.size, self.size, dtype=torch.float64), zeros]
            for _ in range(self.num_layers)
        ]
        if state is not None:
            for layer, wkv in zip(self.state, state, strict=True):
                layer[1] = wkv.double()
        self.offset = time_offset

    def read(self, token_ids):
        """Return the logits [T, V]."""
        return torch.stack([self._step(token) for token in token_ids])

    @property
    def wkv(self):
        return torch.stack([layer[1] for layer in self.state])

    def _norm(self, x, name):
        weight, bias = self.tensors[name + ".weight"], self.tensors[name + ".bias"]
        return F.layer_norm(x, x.shape, weight, bias)

    def _step(self, token):
        x = self._norm(self.tensors["emb.weight"][token], "blocks.0.ln0")
        self.v_first = None
        for i in range(self.num_layers):
            t = {
                name.removeprefix(f"blocks.{i}."): tensor
                for name, tensor in self.tensors.items()
                if name.startswith(f"blocks.{i}.")
            }
            x = x + (self._att7(i, t, x) if self.is_v7 else self._att6(i, t, x))
            x = x + (self._ffn7(i, t, x) if self.is_v7 else self._ffn6(i, t, x))
        return self.tensors["head.weight"] @ self._norm(x, "ln_out")

    def _shift(self, i, part, x, norm):
        h = self._norm(x, f"blocks.{i}.{norm}")
        before, self.state[i][part] = self.state[i][part], h
        return h, before - h

    def _head_norm(self, i, t, y):
        y = y.reshape(-1)
        if self.offset is not None:
            y = y * (1 + self.offset[i].double())
        weight, bias = t["att.ln_x.weight"], t["att.ln_x.bias"]
        return F.group_norm(y[None], self.heads, weight, bias, 64e-5)[0]

    def _att7(self, i, t, x):
        h, d = self._shift(i, 0, x, "ln1")
        xr, xw, xk, xv, xa, xg = (h + d * t["att.x_" + n] for n in "rwkvag")
        r, k, v = t["att.receptance.weight"] @ xr, t["att.key.weight"] @ xk, None
        v = t["att.value.weight"] @ xv
        decay = t["att.w0"] + torch.tanh(xw @ t["att.w1"]) @ t["att.w2"]
        w = torch.exp(-torch.exp(torch.tensor(-0.5).double()) * torch.sigmoid(decay))
        a = torch.sigmoid(t["att.a0"] + xa @ t["att.a1"] @ t["att.a2"])
        g = torch.sigmoid(xg @ t["att.g1"]) @ t["att.g2"]
        per_head = (self.heads, self.size)
        kk = F.normalize((k * t["att.k_k"]).view(per_head), dim=-1)
        k = k * (1 + (a - 1) * t["att.k_a"])
        if i == 0:
            self.v_first = v
        else:
            mix = torch.sigmoid(t["att.v0"] + xv @ t["att.v1"] @ t["att.v2"])
            v = v + (self.v_first - v) * mix
        r, w, k, v, a = (z.view(per_head) for z in (r, w, k, v, a))
        wkv = self.state[i][1]
        removed = torch.einsum("hvk,hk->hv", wkv, kk)
        wkv = wkv * w[:, None] - removed[..., None] * (kk * a)[:, None] + v[..., None] * k[:, None]
        self.state[i][1] = wkv
        y = self._head_norm(i, t, torch.einsum("hvk,hk->hv", wkv, r))
        y = y + ((r * k * t["att.r_k"].view(per_head)).sum(-1, keepdim=True) * v).view(-1)
        return t["att.output.weight"] @ (y * g)

    def _ffn7(self, i, t, x):
        h, d = self._shift(i, 2, x, "ln2")
        hidden = torch.relu(t["ffn.key.weight"] @ (h + d * t["ffn.x_k"])) ** 2
        return t["ffn.value.weight"] @ hidden

    def _att6(self, i, t, x):
        h, d = self._shift(i, 0, x, "ln1")
        codes = torch.tanh((h + d * t["att.time_maa_x"]) @ t["att.time_maa_w1"]).view(5, -1)
        moved = torch.einsum("md,mdc->mc", codes, t["att.time_maa_w2"])
        xw, xk, xv, xr, xg = (
            h + d * (t["att.time_maa_" + n] + m) for n, m in zip("wkvrg", moved, strict=True)
        )
        per_head = (self.heads, self.size)
        r, k, v = (
            (t[f"att.{n}.weight"] @ z).view(per_head)
            for n, z in (("receptance", xr), ("key", xk), ("value", xv))
        )
        g = F.silu(t["att.gate.weight"] @ xg)
        decay = (
            t["att.time_decay"] + torch.tanh(xw @ t["att.time_decay_w1"]) @ (t["att.time_decay_w2"])
        )
        w = torch.exp(-torch.exp(decay)).view(per_head)
        wkv, added = self.state[i][1], k[..., None] * v[:, None]
        bonus = t["att.time_faaaa"].view(per_head)[..., None]
        y = torch.einsum("hk,hkv->hv", r, wkv + bonus * added)
        self.state[i][1] = w[..., None] * wkv + added
        return t["att.output.weight"] @ (self._head_norm(i, t, y) * g)

    def _ffn6(self, i, t, x):
        h, d = self._shift(i, 2, x, "ln2")
        gate = torch.sigmoid(t["ffn.receptance.weight"] @ (h + d * t["ffn.time_maa_r"]))
        hidden = torch.relu(t["ffn.key.weight"] @ (h + d * t["ffn.time_maa_k"])) ** 2
        return gate * (t["ffn.value.weight"] @ hidden)
