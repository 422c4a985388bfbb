import numpy as np
import pytest
import torch

from msenc.models.alignment import (
    AlignmentSettings,
    EmbeddingTargets,
    Known,
    contrastive_loss,
    fit,
    make_loss,
    own_random_numbers,
    score,
    spread,
)
from msenc.models.connector import ConvConnector, Mlp, calibrate
from msenc.types import MsencError

WORDS = ((3, 7, 4), (3, 9, 4))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def utterances(number, seed=0, ids=WORDS):
    """Two kinds of clips, told apart by one dimension of their frames; each is known by its kind's words."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, len(ids), number)
    shift = np.eye(6)[kinds] * 3
    return [
        Known((rng.normal(size=(rng.integers(3, 9), 6)) + shift[n]).astype(np.float16), ids[kinds[n]])
        for n in range(number)
    ]


def table(seed=0):
    with own_random_numbers(seed):
        return 0.1 * torch.randn(20, 12)


def make(num_queries=3, make_one=ConvConnector):
    with own_random_numbers(1):
        connector = make_one(6, 12, num_queries=num_queries, hidden_dim=16, normalize=True)
    calibrate(connector, [torch.from_numpy(k.frames) for k in utterances(50)], table())
    return connector


def batches(known, size=16):
    return lambda step: [known[i] for i in np.random.default_rng(step).permutation(len(known))[:size]]


@pytest.mark.parametrize("objective", ["embeddings", "contrastive"])
def test_an_aligned_connector_names_utterances_that_it_has_not_seen(objective):
    settings = AlignmentSettings(objective=objective, steps=60, batch_size=16)
    connector, targets = make(), EmbeddingTargets(table(), 3)
    before = score(connector.eval(), utterances(80, seed=2), targets, objective)
    fit(connector, settings, batches(utterances(200)), make_loss(settings, targets, connector))
    after = score(connector, utterances(80, seed=2), targets, objective)
    assert before["accuracy"] < 0.9
    assert after["accuracy"] > 0.95
    assert after["chance"] < 0.65
    assert after["spread"] > 0.05


def test_what_labels_do_not_say_is_kept_beside_them():
    def apart_within_a_label(keep):
        settings = AlignmentSettings(steps=60, batch_size=16, keep=keep)
        connector, targets = make(), EmbeddingTargets(table(), 3)
        fit(connector, settings, batches(utterances(200)), make_loss(settings, targets, connector))
        unseen = utterances(80, seed=2)
        assert score(connector, unseen, targets, "embeddings")["accuracy"] > 0.95
        one = [k for k in unseen if k.ids == unseen[0].ids]
        return score(connector, one, targets, "embeddings")["spread"]

    assert apart_within_a_label(0.5) > 2 * apart_within_a_label(0.0)


def test_a_fit_that_goes_on_from_a_state_ends_as_the_unbroken_one():
    settings = AlignmentSettings(steps=12, batch_size=8)
    targets, known = EmbeddingTargets(table(), 3), utterances(60)
    whole, states = make(), {}
    loss = make_loss(settings, targets, whole)
    with own_random_numbers(5):
        fit(whole, settings, batches(known), loss, on_step=lambda n, _, take: states.setdefault(n, take()))
    broken = make()
    with own_random_numbers(77):  # whatever this process has drawn
        fit(broken, settings, batches(known), loss, state=states[7])
    assert states[7].step == 7
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, broken.state_dict()[name]), name


def test_targets_repeat_the_last_token_or_average_spans():
    targets = EmbeddingTargets(table(), 4)

    def unit(vectors):
        return vectors / vectors.square().mean(-1, keepdim=True).sqrt()

    torch.testing.assert_close(targets((5, 6)), unit(table()[[5, 6, 6, 6]]))
    long = targets((1, 2, 3, 4, 5, 6, 7, 8))
    torch.testing.assert_close(long, unit(table()[1:9].reshape(4, 2, 12).mean(1)))
    torch.testing.assert_close(targets.mean((5, 6)), table()[[5, 6]].mean(0))


def test_one_query_still_tells_labels_of_several_tokens_apart():
    targets = EmbeddingTargets(table(), 1)
    assert not torch.allclose(targets(WORDS[0]), targets(WORDS[1]), atol=0.1)


def test_a_contrast_is_lowest_where_each_is_nearest_to_its_own_words():
    words = torch.eye(4)
    own, others = words[:, None], words.roll(1, 0)[:, None]
    assert contrastive_loss(own, words, 0.1) < 0.01 < 1 < contrastive_loss(others, words, 0.1)


def test_labels_that_the_clips_do_not_show_are_not_named():
    """The score is of utterances that were not learned by heart."""
    rng = np.random.default_rng(9)
    settings, targets = AlignmentSettings(steps=60, batch_size=16), EmbeddingTargets(table(), 3)
    known = [Known(k.frames, WORDS[rng.integers(2)]) for k in utterances(300)]
    connector = make(make_one=Mlp)
    fit(connector, settings, batches(known[:200]), make_loss(settings, targets, connector))
    assert score(connector, known[200:], targets, "embeddings")["accuracy"] < 0.65


def test_spread_is_the_share_that_differs():
    common, own = torch.full((50, 2, 3), 3.0), torch.zeros(50, 2, 3)
    own[::2], own[1::2] = 1.0, -1.0
    assert spread(common + own) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "embedding"}, "align.objective: found 'embedding', expected one of"),
        ({"steps": 0}, "align.steps: found 0"),
        ({"lr": 0.0}, "align.lr: found 0.0"),
    ],
)
def test_settings_that_fit_nothing_are_refused(settings, said):
    with pytest.raises(MsencError, match=said):
        AlignmentSettings(**settings)


def test_a_connector_of_which_nothing_trains_is_refused():
    connector = make().requires_grad_(False)
    with pytest.raises(MsencError, match="the connector has no trainable parameters"):
        fit(connector, AlignmentSettings(steps=1), lambda step: [], lambda *_: torch.zeros(()))
