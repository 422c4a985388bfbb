import json

import pytest
import torch
from safetensors.torch import save_file

from msenc.models.connector import (
    ConvConnector,
    LayerMixture,
    Mlp,
    QFormer,
    Standardize,
    calibrate,
    layer_weights,
    load_blip2,
    span_weights,
    tie,
    whiten,
)
from msenc.types import MsencError

SMALL = {"num_queries": 3, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "encoder_dim": 12}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def qformer(**kwargs):
    return QFormer(5, 8, **{**SMALL, **kwargs})


def mlp(**kwargs):
    return Mlp(5, 8, **{"num_queries": 3, "hidden_dim": 16, **kwargs})


def conv(**kwargs):
    return ConvConnector(5, 8, **{"num_queries": 3, "hidden_dim": 16, "normalize": False, **kwargs})


CONNECTORS = {
    "conv": conv,
    "conv, normalized": lambda: conv(normalize=True),
    "conv, spans": lambda: conv(pooling="spans"),
    "qformer": qformer,
    "mlp": mlp,
    "qformer, normalized": lambda: qformer(normalize=True),
    "mlp, normalized": lambda: mlp(normalize=True),
}


@pytest.fixture(params=sorted(CONNECTORS))
def connector(request):
    return CONNECTORS[request.param]().eval()


def rows(lengths, width=5):
    return [torch.randn(length, width) for length in lengths]


def padded(utterances, value=0.0, extra=0):
    longest = max(len(u) for u in utterances) + extra
    features = torch.full((len(utterances), longest, utterances[0].shape[1]), value)
    mask = torch.zeros(len(utterances), longest, dtype=torch.bool)
    for i, utterance in enumerate(utterances):
        features[i, : len(utterance)] = utterance
        mask[i, : len(utterance)] = True
    return features, mask


@pytest.mark.parametrize("garbage", [0.0, 1e4, float("nan")])
def test_neither_padding_nor_company_changes_an_utterance(connector, garbage):
    utterances = rows([7, 1, 4, 2])
    together = connector(*padded(utterances, garbage, extra=3))
    assert together.shape == (4, 3, 8)
    for i, utterance in enumerate(utterances):
        alone = connector(*padded([utterance]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-6, rtol=1e-5)


def test_real_frames_do_change_an_utterance(connector):
    features, mask = padded(rows([6]))
    other = features.clone()
    other[0, -1] += 1
    assert (connector(features, mask) - connector(other, mask)).abs().max() > 1e-3


def test_a_fully_masked_row_is_finite_and_independent_of_its_padding(connector):
    features, mask = padded(rows([4, 4]))
    mask[1] = False
    one = connector(features, mask)
    features[1] = 100.0
    assert torch.isfinite(one).all()
    torch.testing.assert_close(connector(features, mask), one, rtol=0, atol=0)
    one.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in connector.parameters() if p.grad is not None)


def test_gradients_reach_every_parameter(connector):
    connector.train()
    output = connector(*padded(rows([6, 3, 5])))
    (output * torch.randn_like(output)).sum().backward()
    without = [n for n, p in connector.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    # What all keys share does not move a softmax: key biases have no gradient, by arithmetic.
    assert [n for n in without if not n.endswith("attention.key.bias")] == []


def test_two_classes_of_sequences_are_learned(connector):
    connector.train()
    for module in connector.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    labels = torch.arange(16) % 2
    # The classes differ in which of two frames comes, not in the number of frames.
    utterances = [torch.randn(3 + i % 4, 5) * 0.1 + torch.eye(5)[label] for i, label in enumerate(labels)]
    features, mask = padded(utterances, value=3.0)
    head = torch.nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*connector.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(head(connector(features, mask).mean(1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.4
    assert losses[-1] < 0.05


@pytest.mark.parametrize("hidden_dim", [16, 64, 256])
def test_a_new_qformer_hears_its_input_at_any_width(hidden_dim):
    connector = qformer(hidden_dim=hidden_dim, encoder_dim=hidden_dim).eval()
    # Utterances that differ in their mean, as moods do.
    features = torch.randn(64, 20, 5) + torch.randn(64, 1, 5)
    output = connector(features, torch.ones(64, 20, dtype=torch.bool))
    assert output.std(0).mean() > 0.1 * output.std()


# ------------------------------------------------------------------------------------------ normalized ends


@pytest.mark.parametrize("make", [qformer, mlp, conv])
def test_a_calibrated_connector_meets_features_and_embeddings_on_their_scale(make):
    connector = make(normalize=True)
    offset, spread = torch.tensor([300.0, -5.0, 0.0, 7.0, 1.0]), torch.tensor([4.0, 0.1, 1.0, 30.0, 0.0])
    utterances = [u * spread + offset for u in rows([6, 900, 2, 1000])]
    embeddings = 0.03 * torch.randn(50, 8)
    calibrate(connector, utterances, embeddings)
    frames = connector.in_norm(torch.cat(utterances))
    torch.testing.assert_close(frames.mean(0), torch.zeros(5), rtol=0, atol=1e-3)
    torch.testing.assert_close(frames.std(0), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), rtol=1e-2, atol=1e-3)
    output = connector.eval()(*padded(utterances))
    rms = embeddings.square().mean().sqrt()
    torch.testing.assert_close(output.square().mean(-1).sqrt(), rms.expand(4, 3), rtol=1e-2, atol=0)


def test_a_whitened_map_hears_faint_directions_better():
    frames = torch.randn(2000, 3) @ torch.diag(torch.tensor([5.0, 10.0, 1.0])) @ torch.linalg.qr(torch.randn(3, 3))[0]
    linear = torch.nn.Linear(3, 64)
    before, bias = linear(frames), linear.bias.clone()
    whiten(linear, [frames[:500], frames[500:]])
    covariance = frames.T @ frames / len(frames)
    power, directions = torch.linalg.eigh(covariance)
    heard = (directions.T @ linear.weight.T).square().sum(1) * power  # power of each direction in the output
    assert power.max() / power.min() > 80
    assert heard.max() / heard.min() < 50
    assert heard[2] / heard[1] < 2 < power[2] / power[1]
    power_after, power_before = ((output - bias).square().mean() for output in (linear(frames), before))
    torch.testing.assert_close(power_after, power_before, rtol=1e-4, atol=0)
    assert torch.equal(linear.bias, bias)


def test_utterances_of_half_precision_are_measured_exactly():
    norm = Standardize(1)
    norm.fit([torch.full((40_000, 1), 1000.0, dtype=torch.float16), torch.full((40_000, 1), 1002.0).half()])
    assert norm.shift.item() == pytest.approx(1001.0)
    assert norm.scale.item() == pytest.approx(1.0)


@pytest.mark.parametrize("make", [qformer, mlp, conv])
def test_a_connector_without_normalized_ends_is_left_as_it_is(make):
    connector = make()
    before = {name: tensor.clone() for name, tensor in connector.state_dict().items()}
    calibrate(connector, rows([4]), torch.ones(3, 8))
    assert not any("norm" in name.split(".")[0] for name in before)
    for name, tensor in connector.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_ends_are_saved_with_the_weights():
    fitted, fresh = qformer(normalize=True).eval(), qformer(normalize=True).eval()
    calibrate(fitted, rows([40]), torch.full((3, 8), 0.1))
    fresh.load_state_dict({name: p for name, p in fitted.named_parameters() if p.requires_grad}, strict=False)
    features, mask = padded(rows([6, 3]))
    torch.testing.assert_close(fresh(features, mask), fitted(features, mask))


@pytest.mark.parametrize("make", [qformer, mlp, conv])
def test_a_frozen_llm_is_told_apart_what_differs_little(make):
    """Two kinds of utterances differ by a hundredth of what they share; the LLM's next token has to follow the kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=12, initializer_range=0.3, **sizes)).requires_grad_(False)
    kinds = torch.arange(64) % 2
    common, difference = torch.nn.functional.normalize(torch.randn(2, 5), dim=1)
    features = 100 * common + 0.5 * torch.randn(64, 7, 5) + (kinds[:, None, None] - 0.5) * difference
    mask = torch.ones(64, 7, dtype=torch.bool)
    connector = make(normalize=True)
    calibrate(connector, features, llm.get_input_embeddings().weight)

    def loss():
        asked = llm.get_input_embeddings()(torch.full((64, 1), 2))
        logits = llm(inputs_embeds=torch.cat([connector(features, mask), asked], 1)).logits[:, -1, 4:6]
        return torch.nn.functional.cross_entropy(logits, kinds)

    optimizer = torch.optim.AdamW(connector.parameters(), lr=5e-3)
    untrained = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert untrained > 0.6
    assert loss().item() < 0.3
    assert all(p.grad is None for p in llm.parameters())


# ------------------------------------------------------------------------------------------ convolutions


@pytest.mark.parametrize("pooling", ["attention", "spans"])
def test_convolutions_hear_the_order_of_frames_that_a_set_does_not_hold(pooling):
    """Rising and falling sequences of the same frames are told apart after a few steps; a Q-Former's are equal."""
    frames = torch.randn(7, 5)
    features, mask = padded([frames, frames.flip(0)])
    set_of_frames = qformer().eval()(features, mask)
    torch.testing.assert_close(set_of_frames[0], set_of_frames[1], rtol=1e-4, atol=1e-5)
    output = conv(pooling=pooling).eval()(features, mask)
    assert (output[0] - output[1]).abs().max() > 0.1 * output.abs().max()


def test_a_calibrated_convolution_says_little_that_all_utterances_share():
    """Frames with a large common part: of a new connector's output, what differs between utterances is the most."""
    utterances = [20 + u + 2 * torch.randn(1, 5) for u in rows([6, 9, 12, 7] * 8)]
    connector = conv(normalize=True)
    calibrate(connector, utterances, torch.randn(50, 8))
    output = connector.eval()(*padded(utterances))
    assert (output - output.mean(0)).square().mean() > 0.5 * output.square().mean()


@pytest.mark.parametrize(("settings", "said"), [({"pooling": "mean"}, "pooling: found 'mean'"), ({"kernel": 4}, "odd")])
def test_settings_that_no_convolution_has_are_refused(settings, said):
    with pytest.raises(MsencError, match=said):
        conv(**settings)


# ------------------------------------------------------------------------------------------ Q-Former


def test_queries_of_a_new_qformer_differ():
    output = qformer().eval()(*padded(rows([6])))
    assert (output[0, 0] - output[0, 1]).abs().max() > 1e-3


def test_half_precision_features_connect(connector):
    features, mask = padded(rows([6, 3]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(connector(features, mask).float()).all()


def test_mlp_averages_equal_spans_of_the_real_frames():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    weights = span_weights(mask, 3)
    half, third = 0.5, 1 / 3
    expected = torch.tensor(
        [
            [[half, half, 0, 0, 0, 0, 0], [0, 0, half, half, 0, 0, 0], [0, 0, 0, 0, half, half, 0]],
            [[1, 0, 0, 0, 0, 0, 0], [half, half, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]],
            [[0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]],
        ]
    )
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(span_weights(mask[:1], 1)[0, 0, :6], torch.full((6,), third / 2))


def test_spans_of_a_long_clip_are_right_whatever_the_default_type():
    mask = torch.ones(1, 1500, dtype=torch.bool)
    expected = span_weights(mask, 4)
    assert expected[0, 3, 1124:1126].tolist() == pytest.approx([0.0, 1 / 375])
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for precision=bf16-true
    try:
        torch.testing.assert_close(span_weights(mask, 4), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_mlp_repeats_the_frames_of_a_short_utterance():
    one = torch.ones(1, 1, dtype=torch.bool)
    assert span_weights(one, 4).flatten().tolist() == pytest.approx([1.0] * 4)


def test_a_frozen_core_keeps_still_and_in_eval():
    connector = qformer(freeze_core=True, dropout=0.5).train()
    assert not connector.core.training
    assert not any(module.training for module in connector.core.modules())
    trainable = {n for n, p in connector.named_parameters() if p.requires_grad}
    assert trainable == {"in_proj.weight", "out_proj.weight"}


def test_tied_connectors_share_one_core_and_keep_their_maps():
    connectors = {"audio": qformer(), "video": QFormer(9, 8, **SMALL)}
    tie(connectors)
    assert connectors["video"].core is connectors["audio"].core
    assert connectors["video"].in_proj.weight.shape != connectors["audio"].in_proj.weight.shape
    both = torch.nn.ModuleDict(connectors)
    core = sum(p.numel() for p in connectors["audio"].core.parameters())
    maps = sum(p.numel() for c in connectors.values() for m in (c.in_proj, c.out_proj) for p in m.parameters())
    assert sum(p.numel() for p in both.parameters()) == core + maps


def test_separate_connectors_share_nothing():
    one, other = qformer(), qformer()
    assert not {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}


def test_unequal_or_missing_cores_are_not_tied():
    with pytest.raises(MsencError, match=r"audio and video differ in num_layers 2 and 3"):
        tie({"audio": qformer(), "video": qformer(num_layers=3)})
    with pytest.raises(MsencError, match=r"video's is a Mlp, which has no Q-Former"):
        tie({"audio": qformer(), "video": Mlp(5, 8)})


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(MsencError, match="hidden_dim 16 is not divisible by num_heads 3"):
        qformer(num_heads=3)


def blip2_folder(path, core, change=None, sharded=True, num_heads=2, weights="model.safetensors"):
    """A stand-in for a BLIP-2 checkpoint: its Q-Former over two files, its LLM in a third that is no weights."""
    tensors = {name: tensor.clone() for name, tensor in core.state_dict().items()}
    tensors["qformer.encoder.layer.0.intermediate.dense.weight"] = torch.zeros(4, 4)  # text's feed-forward
    if change:
        change(tensors)
    path.mkdir()
    kind = weights.rpartition(".")[2]
    save = save_file if kind == "safetensors" else torch.save
    (path / "config.json").write_text(json.dumps({"qformer_config": {"num_attention_heads": num_heads}}))
    if not sharded:
        save({**tensors, "language_model.big": torch.zeros(9)}, path / weights)
        return path
    names = sorted(tensors)
    files = {f"a.{kind}": names[::2], f"b.{kind}": names[1::2]}
    for file, part in files.items():
        save({**{n: tensors[n] for n in part}, f"vision_model.{file}": torch.zeros(9)}, path / file)
    (path / f"c.{kind}").write_bytes(b"not to be opened")
    weight_map = {name: file for file, part in files.items() for name in part}
    weight_map |= {"language_model.big": f"c.{kind}", "vision_model.x": f"a.{kind}"}
    (path / f"{weights}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_qformer_starts_from_a_blip2_checkpoint(tmp_path, sharded, weights):
    source = qformer().core
    folder = blip2_folder(tmp_path / "blip2", source, sharded=sharded, weights=weights)
    connector = qformer(init=str(folder))
    for name, tensor in source.state_dict().items():
        assert torch.equal(connector.core.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in connector.parameters())


def test_safetensors_go_before_bin(tmp_path):
    source = qformer().core
    folder = blip2_folder(tmp_path / "blip2", source)
    (folder / "pytorch_model.bin").write_bytes(b"not to be opened")
    assert torch.equal(qformer(init=str(folder)).core.query_tokens, source.query_tokens)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_only_the_needed_files_of_a_hub_checkpoint_are_fetched(tmp_path, monkeypatch, weights):
    from huggingface_hub.errors import EntryNotFoundError

    hub = blip2_folder(tmp_path / "hub", qformer().core, weights=weights)
    fetched = []

    def download(repo, file, revision):
        assert (repo, revision) == ("Salesforce/blip2", None)
        if not (hub / file).is_file():
            raise EntryNotFoundError(f"no {file}")
        fetched.append(file)
        return str(hub / file)

    monkeypatch.setattr("msenc.models.connector.hf_hub_download", download)
    qformer(init="Salesforce/blip2")
    kind = weights.rpartition(".")[2]
    assert sorted(fetched) == [f"a.{kind}", f"b.{kind}", "config.json", f"{weights}.index.json"]


def test_only_qformer_tensors_are_read(tmp_path, monkeypatch):
    import safetensors

    read = []

    class Recorded:
        def __init__(self, file, **kwargs):
            self.file = safetensors_open(file, **kwargs)

        def __enter__(self):
            self.tensors = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.tensors.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.tensors.get_tensor(name)

    safetensors_open = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Recorded)
    source = qformer().core
    load_blip2(qformer().core, str(blip2_folder(tmp_path / "blip2", source)))
    assert sorted(read) == sorted(source.state_dict())


def rename(tensors):
    tensors["qformer.encoder.layer.9.surprise"] = tensors.pop("qformer.layernorm.bias")


def widen(tensors):
    tensors["query_tokens"] = torch.zeros(1, 32, 16)


@pytest.mark.parametrize(
    ("change", "num_heads", "message"),
    [
        (rename, 2, r"1 tensors missing there: qformer\.layernorm\.bias"),
        (rename, 2, r"1 tensors unknown here: qformer\.encoder\.layer\.9\.surprise"),
        (widen, 2, r"1 tensors of another shape: query_tokens \(1, 32, 16\) for \(1, 3, 16\)"),
        (None, 4, r"num_heads 4 there, 2 here"),
    ],
)
def test_a_qformer_of_another_shape_is_refused_by_tensor(tmp_path, change, num_heads, message):
    folder = blip2_folder(tmp_path / "blip2", qformer().core, change=change, num_heads=num_heads)
    with pytest.raises(MsencError, match=message):
        qformer(init=str(folder))


def test_a_checkpoint_that_is_none_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MsencError, match=r"QFormer: cannot load .*empty"):
        qformer(init=str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(MsencError, match=r"found: none of model\.safetensors, pytorch_model\.bin, nor an index"):
        qformer(init=str(tmp_path / "empty"))
    for kind, weights in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        folder = blip2_folder(tmp_path / kind, qformer().core, weights=weights)
        (folder / f"b.{kind}").write_bytes(b"cut short")
        with pytest.raises(MsencError, match=rf"QFormer: cannot load .*{kind}"):
            qformer(init=str(folder))
    (folder / "b.bin").unlink()
    with pytest.raises(MsencError, match=r"QFormer: cannot load[\s\S]*found: no b\.bin in the folder"):
        qformer(init=str(folder))
    with pytest.raises(MsencError, match=r"as a folder \(there is none of this name\)"):
        qformer(init=str(tmp_path / "absent"))


# Layers of an encoder


def mixing(name, layers=(2, 4, -1)):
    connector = CONNECTORS[name]()
    connector.take_layers(layers)
    return connector


@pytest.mark.parametrize("name", sorted(CONNECTORS))
def test_with_all_weight_on_one_layer_a_connector_reads_that_one(name):
    one, mixed = CONNECTORS[name]().eval(), mixing(name).eval()
    layers = [rows([6, 3]) for _ in range(3)]  # of each, two utterances
    joined = [torch.cat(of, dim=1) for of in zip(*layers, strict=True)]
    state = {k: v for k, v in mixed.state_dict().items() if not k.startswith(("mixture", "in_norm"))}
    one.load_state_dict(state, strict=False)
    with torch.no_grad():
        mixed.mixture.logits.copy_(torch.tensor([-1e4, 0.0, -1e4]))
    is_standardized = name in ("conv, normalized", "qformer, normalized", "mlp, normalized")
    if is_standardized:
        mixed.in_norm.fit(joined)
        one.in_norm.fit(layers[1])
    own = [u if is_standardized else torch.nn.functional.layer_norm(u, (5,)) for u in layers[1]]
    torch.testing.assert_close(mixed(*padded(joined)), one(*padded(own)), atol=1e-5, rtol=1e-5)
    assert layer_weights({"audio": mixed, "video": one}) == {"audio": {2: 0.0, 4: 1.0, -1: 0.0}}


@pytest.mark.parametrize("name", sorted(CONNECTORS))
def test_layers_begin_with_equal_weights_and_all_of_them_learn(name):
    connector = mixing(name)
    calibrate(connector, rows([9, 8, 7, 30], width=15), torch.randn(20, 8))
    assert layer_weights({"audio": connector}) == {"audio": pytest.approx({2: 1 / 3, 4: 1 / 3, -1: 1 / 3})}
    connector(*padded(rows([7, 2], width=15))).square().sum().backward()
    assert (connector.mixture.logits.grad.abs() > 1e-9).all()


def test_a_mixture_finds_the_layer_that_tells():
    torch.manual_seed(1)
    connector = mixing("conv, normalized")
    told = torch.tensor([1.0 if n % 2 else -1.0 for n in range(32)])

    def draw():
        utterances = rows([6] * 32, width=15)
        for utterance, value in zip(utterances, told, strict=True):
            utterance[:, 7] += value  # in the second of three layers
        return utterances

    calibrate(connector, draw(), torch.randn(20, 8))
    optimizer = torch.optim.AdamW(connector.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (connector(*padded(draw())).mean((1, 2)) - told).square().mean().backward()
        optimizer.step()
    weights = layer_weights({"audio": connector})["audio"]
    assert weights[4] > 2 * max(weights[2], weights[-1])


def test_a_connector_of_one_output_has_no_mixture(connector):
    assert not any("mixture" in name for name in connector.state_dict())
    assert layer_weights({"audio": connector}) == {}


def test_layers_of_any_scale_are_mixed_alike():
    mixture = LayerMixture([0, 1], normalize=True)
    layers = torch.randn(3, 4), torch.randn(3, 4)
    near = mixture(torch.cat([layers[0], layers[1]], 1))
    torch.testing.assert_close(mixture(torch.cat([1000 * layers[0], layers[1]], 1)), near, atol=1e-3, rtol=0)
