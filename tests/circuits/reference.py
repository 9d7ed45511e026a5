"""A slow transformer written out reader by reader, to compare circuits with.

Each reader has an input tensor of its own, given by a function of (reader's name, what every writer before it wrote,
the sum of the output biases so far). Nothing here uses mi_pipe: weights are sliced from the state dict head by head.
"""

import torch
from torch.nn.functional import linear
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary


class Reference:
    def __init__(self, name, module):
        self.name, self.module = name, module
        self.state = dict(module.state_dict())
        native = name.startswith("native")
        config = module.cfg if native else module.config
        self.n_layers = config.n_layers if native else config.num_hidden_layers
        self.n_heads = config.n_heads if native else config.num_attention_heads
        self.n_kv = config.num_key_value_heads if name == "llama_gqa" else self.n_heads
        self.d_head = (config.d_model if native else config.hidden_size) // self.n_heads
        self.has_mlp = name != "native_attn_only"
        self.is_parallel = name == "neox"

    def block(self, layer):
        holder = {"gpt2": "transformer", "neox": "gpt_neox", "llama_gqa": "model"}.get(self.name)
        blocks = self.module.layers if holder is None else getattr(self.module, holder)
        return (blocks.h if self.name == "gpt2" else blocks.layers if holder else blocks)[layer]

    def norms(self, layer):
        block = self.block(layer)
        names = {
            "gpt2": ("ln_1", "ln_2"),
            "neox": ("input_layernorm", "post_attention_layernorm"),
            "llama_gqa": ("input_layernorm", "post_attention_layernorm"),
        }.get(self.name, ("ln1", "ln2"))
        return tuple(getattr(block, name, None) for name in names)

    def tail(self):
        return {
            "gpt2": lambda m: (m.transformer.ln_f, m.lm_head),
            "neox": lambda m: (m.gpt_neox.final_layer_norm, m.lm_head),
            "llama_gqa": lambda m: (m.model.norm, m.lm_head),
        }.get(self.name, lambda m: (m.ln_out, m.head))(self.module)

    def embed(self, tokens):
        positions = torch.arange(tokens.shape[1])
        if self.name == "gpt2":
            return self.module.transformer.wte(tokens) + self.module.transformer.wpe(positions)
        if self.name in ("neox", "llama_gqa"):
            return self.module.get_input_embeddings()(tokens)
        embedded = self.module.tok_embed(tokens)
        return embedded if self.module.pos is None else embedded + self.module.pos(positions)

    def qkv(self, layer, kind, head):
        """Return weight (d_head, d_model) and bias of one head's q, k or v."""
        attention, d = self.attention(layer), self.d_head
        if self.name == "gpt2":
            start = "qkv".index(kind) * self.n_heads * d + head * d
            return attention.c_attn.weight[:, start : start + d].T, attention.c_attn.bias[start : start + d]
        if self.name == "neox":
            start = head * 3 * d + "qkv".index(kind) * d
            both = attention.query_key_value
            return both.weight[start : start + d], both.bias[start : start + d]
        linear_map = getattr(attention, f"{kind}_proj" if self.name == "llama_gqa" else kind)
        rows = slice(head * d, (head + 1) * d)
        return linear_map.weight[rows], None if linear_map.bias is None else linear_map.bias[rows]

    def attention(self, layer):
        block = self.block(layer)
        return getattr(block, {"neox": "attention", "llama_gqa": "self_attn"}.get(self.name, "attn"))

    def out(self, layer, head):
        """Return W_O (d_model, d_head) of one head and the bias of the whole projection."""
        attention = self.attention(layer)
        output = getattr(attention, {"gpt2": "c_proj", "neox": "dense", "llama_gqa": "o_proj"}.get(self.name, "o"))
        columns = slice(head * self.d_head, (head + 1) * self.d_head)
        weight = output.weight[columns].T if self.name == "gpt2" else output.weight[:, columns]
        return weight, output.bias

    def rotate(self, q, k):
        positions = torch.arange(q.shape[1])[None]
        if self.name == "neox":
            cos, sin = self.module.gpt_neox.rotary_emb(q, positions)
            q, k = neox_rotary(q[:, None], k[:, None], cos, sin)
        elif self.name == "llama_gqa":
            cos, sin = self.module.model.rotary_emb(q, positions)
            q, k = llama_rotary(q[:, None], k[:, None], cos, sin)
        elif self.name == "native_attn_only":
            q, k = self.module.rotary.apply_rope(q[:, None], k[:, None])
        else:
            return q, k
        return q[:, 0], k[:, 0]

    def run(self, tokens, read):
        """Return the last position's logits and what each writer wrote, by name.

        `read(reader, written, constant)` gives the reader's input before its normalisation.
        """
        written = {"embed": self.embed(tokens)}
        constant = torch.zeros_like(written["embed"])
        shared = "h" if self.n_kv == self.n_heads else "kv"
        for layer in range(self.n_layers):
            norm1, norm2 = self.norms(layer)
            before, bias_before = dict(written), constant

            def project(kind, head, name, norm=norm1, layer=layer, before=before, bias=bias_before):
                weight, own_bias = self.qkv(layer, kind, head)
                return linear(norm(read(name, before, bias)), weight, own_bias)

            keys = [project("k", j, f"a{layer}.{shared}{j}.k") for j in range(self.n_kv)]
            values = [project("v", j, f"a{layer}.{shared}{j}.v") for j in range(self.n_kv)]
            for head in range(self.n_heads):
                group = head // (self.n_heads // self.n_kv)
                q, k = self.rotate(project("q", head, f"a{layer}.h{head}.q"), keys[group])
                scores = q @ k.mT / self.d_head**0.5
                causal = torch.ones_like(scores[0], dtype=torch.bool).tril()
                pattern = scores.masked_fill(~causal, -torch.inf).softmax(-1)
                weight, bias = self.out(layer, head)
                written[f"a{layer}.h{head}"] = (pattern @ values[group]) @ weight.T
            constant = constant if bias is None else constant + bias
            if self.has_mlp:
                seen = (before, bias_before) if self.is_parallel else (dict(written), constant)
                written[f"m{layer}"] = self.block(layer).mlp(norm2(read(f"m{layer}", *seen)))
        norm, head = self.tail()
        return head(norm(read("logits", written, constant)))[:, -1], written


def plain(_name, written, constant):
    return sum(written.values()) + constant


def brute_force_eap(reference, pairs):
    """Return the score of each edge by its definition, by autograd at every reader's own input: mean over pairs."""
    with torch.no_grad():
        _, corrupted = reference.run(pairs.corrupted, plain)
    inputs, sources = {}, {}

    def read(name, written, constant):
        sources[name] = list(written)
        inputs[name] = (sum(written.values()) + constant).clone().requires_grad_()
        return inputs[name]

    with torch.enable_grad():
        logits, clean = reference.run(pairs.clean, read)
        rows = torch.arange(len(pairs.clean))
        metric = logits[rows, pairs.answer] - logits[rows, pairs.wrong]
        gradients = dict(zip(inputs, torch.autograd.grad(metric.sum(), list(inputs.values())), strict=True))
    return {
        (source, reader): ((corrupted[source] - clean[source]) * gradients[reader]).sum().item() / len(pairs.clean)
        for reader, names in sources.items()
        for source in names
    }


@torch.no_grad()
def brute_force_circuit(reference, pairs, edges):
    """Return the metric of each pair with only `edges` clean: present input plus (corrupted - now) outside them."""
    _, corrupted = reference.run(pairs.corrupted, plain)

    def read(name, written, constant):
        value = sum(written.values()) + constant
        for source, now in written.items():
            if (source, name) not in edges:
                value = value + corrupted[source] - now
        return value

    logits, _ = reference.run(pairs.clean, read)
    rows = torch.arange(len(pairs.clean))
    return logits[rows, pairs.answer] - logits[rows, pairs.wrong]
