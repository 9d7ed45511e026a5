"""Path patching against plain hooks, one sender and one forward pass at a time; all in float64."""

from contextlib import ExitStack

import pytest
import torch

from mi_pipe.attribution.atp import PairTokens
from mi_pipe.attribution.path_nodes import Receiver, Sender, every_sender
from mi_pipe.attribution.path_patching import PathPatcher
from mi_pipe.core.errors import ConfigError
from tests.attribution import plain
from tests.circuits import tiny

RECEIVERS = {
    "queries": ["a1.h0.q", "a1.h3.q"],
    "keys and values": ["a1.kv1.k", "a1.kv0.v"],
    "an MLP": ["m1"],
    "all kinds": ["a1.h2.q", "a1.kv1.v", "m1", "m0"],
    "logits": ["logits"],
}


def metric_by_rows(pairs):
    return lambda logits, rows: (
        logits.gather(1, pairs.answer[rows, None])[:, 0] - logits.gather(1, pairs.wrong[rows, None]).squeeze(1)
    )


def watch(name, model, tokens, pairs, places):
    seen = {}
    hooks = [(where, lambda v, key=key: seen.__setitem__(key, v.clone())) for key, where in places.items()]
    metric = plain.run(model, tokens, pairs, hooks)
    return seen, metric


@torch.no_grad()
def brute_force(name, model, pairs, sender, receivers, frozen):
    """Denoising of one path by its definition: hooks on projections, z and MLPs."""
    layers = range(model.info.n_layers)
    outs = {("z", i): plain.place(name, model, "z", i, slice(None)) for i in layers}
    if not model.info.attn_only:
        outs |= {("mlp", i): plain.place(name, model, "mlp_out", i) for i in layers}
    outs |= {("embed", 0): plain.place(name, model, "embed", 0)}
    base, _ = watch(name, model, pairs.corrupted, pairs, outs)
    donor, _ = watch(name, model, pairs.clean, pairs, outs)
    targets = {}
    for receiver in receivers:
        if receiver.kind != "logits":
            kind = "mlp_out" if receiver.kind == "mlp" else receiver.kind
            index = None if receiver.kind == "mlp" else receiver.head
            targets[receiver] = plain.place(name, model, kind, receiver.layer, index)
    received = {}
    hooks = [(w, lambda v, r=r: received.__setitem__(r, v.clone())) for r, w in targets.items()]
    d = model.info.d_head
    for (kind, layer), where in outs.items():
        is_sender = layer == sender.layer and kind == {"head": "z"}.get(sender.kind, sender.kind)
        if kind == "z" or (kind == "mlp" and frozen):
            held = base[kind, layer].clone()
            if is_sender:
                columns = slice(sender.head * d, (sender.head + 1) * d) if kind == "z" else slice(None)
                held[..., columns] = donor[kind, layer][..., columns]
            hooks.append((where, lambda v, held=held: held))
        elif is_sender:
            hooks.append((where, lambda v, key=(kind, layer): donor[key]))
    direct = plain.run(model, pairs.corrupted, pairs, hooks)
    if not targets:
        return direct

    def put(receiver, where):
        def edit(value):
            value = value.clone()
            where.part(value).copy_(where.part(received[receiver]))
            return value

        return edit

    return plain.run(model, pairs.corrupted, pairs, [(w, put(r, w)) for r, w in targets.items()])


@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
@pytest.mark.parametrize("which", RECEIVERS)
@pytest.mark.parametrize("name", [*plain.NAMES, "native_attn_only"])
def test_paths_are_those_of_plain_hooks(name, which, mlps):
    model, pairs = tiny.model(name), tiny.pairs()
    receivers = [Receiver.named(receiver) for receiver in RECEIVERS[which]]
    senders = [Sender("embed"), *every_sender(model.info)]
    if model.info.attn_only:
        receivers = [receiver for receiver in receivers if receiver.kind != "mlp"] or [Receiver("logits")]
    patcher = PathPatcher(model, PairTokens(pairs.corrupted, pairs.clean), metric_by_rows(pairs), mlps)
    found = patcher.patched(senders, receivers, batch_rows=7)
    assert found.mlps == mlps
    for i, sender in enumerate(senders):
        expected = brute_force(name, model, pairs, sender, receivers, mlps == "frozen")
        assert torch.allclose(found.patched[:, i], expected, atol=1e-5 if name == "llama_gqa" else 1e-9), sender.name
    assert (found.patched - found.base[:, None]).abs().max() > 0.01


@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
@pytest.mark.parametrize("name", [*tiny.HF_CONFIGS, "native", "native_attn_only"])
def test_restarted_passes_give_what_whole_ones_do(name, mlps):
    model, pairs = tiny.model(name), tiny.pairs()
    tokens, senders = PairTokens(pairs.corrupted, pairs.clean), [Sender("embed"), *every_sender(model.info)]
    shared = model.info.n_kv_heads - 1
    for receivers in (
        [Receiver("logits")],
        [Receiver("q", 1, 3), Receiver("v", 0, shared)],
        [Receiver("k", 1, shared)],
    ):
        fast, slow = (
            PathPatcher(model, tokens, metric_by_rows(pairs), mlps, restarts).patched(senders, receivers, batch_rows=5)
            for restarts in (True, False)
        )
        assert (fast.restarted, slow.restarted) == (True, False)
        assert fast.largest_error < 1e-6
        # Norms of transformers compute in float32, whatever the model's dtype.
        assert torch.allclose(fast.patched, slow.patched, atol=2e-5)


@pytest.mark.parametrize("name", tiny.ODD_CONFIGS)
def test_an_mlp_of_an_odd_block_receives_and_sends(name):
    model, pairs = tiny.model(name), tiny.pairs()
    tokens = PairTokens(pairs.corrupted, pairs.clean)
    found = PathPatcher(model, tokens, metric_by_rows(pairs)).patched([Sender("embed")], [Receiver("mlp", 0)])
    block = model.blocks[0]
    mlp, seen = (block.fc2 if name == "opt" else block.mlp), []
    handle = mlp.register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    with torch.no_grad(), ExitStack() as stack:
        # All attention held at the corrupted run's, the embeddings are the clean run's: what the first MLP makes of it.
        z, embeddings = [], []
        hooks = {"blocks.0.attn.hook_z": lambda v: z.append(v.clone())}
        with model.edited(hooks):
            model.logits(pairs.corrupted)
        with model.edited({"blocks.0.hook_resid_pre": lambda v: embeddings.append(v.clone())}):
            model.logits(pairs.clean)
        held = {"blocks.0.hook_resid_pre": lambda _: embeddings[0], "blocks.0.attn.hook_z": lambda _: z[0]}
        with model.edited(held):
            model.logits(pairs.corrupted)
        handle.remove()
        put = mlp.register_forward_hook(lambda _m, _a, _output: seen[-1].clone())
        stack.callback(put.remove)
        expected = plain.metric_of(pairs)(model.logits(pairs.corrupted)[:, -1])
    assert torch.allclose(found.patched[:, 0], expected, atol=1e-6)
    assert not torch.allclose(found.patched[:, 0], found.base, atol=1e-3)


def test_a_model_whose_blocks_talk_past_each_other_is_run_whole():
    model, pairs, seen = tiny.model("llama_gqa"), tiny.pairs(), {}
    tokens, senders = PairTokens(pairs.corrupted, pairs.clean), every_sender(model.info)
    handles = [
        model.module.register_forward_pre_hook(lambda _m, args: seen.update(tokens=args[0])),
        model.blocks[1].register_forward_hook(lambda _m, _a, output: output + 0.01 * seen["tokens"][..., None]),
    ]
    try:
        found, whole = (
            PathPatcher(model, tokens, metric_by_rows(pairs), restarts=restarts).patched(senders, [Receiver("logits")])
            for restarts in (True, False)
        )
    finally:
        for handle in handles:
            handle.remove()
    assert not found.restarted
    assert torch.equal(found.patched, whole.patched)


def test_later_senders_do_not_reach_earlier_receivers():
    model, pairs = tiny.model("llama_gqa"), tiny.pairs()
    patcher = PathPatcher(model, PairTokens(pairs.clean, pairs.corrupted), metric_by_rows(pairs))
    found = patcher.patched([Sender("head", 1, 2), Sender("mlp", 1)], [Receiver("q", 1, 0), Receiver("k", 1, 1)])
    assert torch.allclose(found.patched, found.base[:, None].expand(-1, 2), atol=1e-5)


def test_from_the_embeddings_through_everything_to_the_logits_of_a_model_without_heads_values_is_the_donor_run():
    model, pairs = tiny.model("native"), tiny.pairs()
    patcher = PathPatcher(model, PairTokens(pairs.corrupted, pairs.clean), metric_by_rows(pairs), "frozen")
    senders = [Sender("embed"), *every_sender(model.info)]
    direct = patcher.patched(senders, [Receiver("logits")])
    # All MLPs frozen and the last norm alone between: a direct effect moves only what reaches the last position.
    assert torch.allclose(direct.patched[:, 0], direct.base, atol=1e-12), "clean and corrupted end with one token"


@pytest.mark.parametrize(
    ("senders", "receivers", "message"),
    [
        (["a0.h1"], ["logits", "a1.h0.q"], "receive alone"),
        (["a9.h1"], ["logits"], "layers 0 to 1"),
        (["a0.h7"], ["logits"], "4 such heads"),
        (["a0.h1"], ["a1.kv3.k"], "2 such heads"),
        (["h1"], ["logits"], "no sender"),
        (["m0"], ["a1.h0"], "no receiver"),
        ([], ["logits"], "at least one"),
    ],
)
def test_paths_that_do_not_exist_are_refused(senders, receivers, message):
    model, pairs = tiny.model("llama_gqa"), tiny.pairs()
    patcher = PathPatcher(model, PairTokens(pairs.clean, pairs.corrupted), metric_by_rows(pairs))
    with pytest.raises(ConfigError, match=message):
        patcher.patched([Sender.named(s) for s in senders], [Receiver.named(r) for r in receivers])
