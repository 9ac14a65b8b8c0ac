"""Methods with an encoder, from training to answers: what is read, how often, and what is said where it cannot be."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference import text_encoder
from deptjax.inference.predictor import Predictor, evaluate
from deptjax.inference.text_encoder import SavedEncoders, TextEncoder, encoder_of
from deptjax.methods import IDPG, LoPA
from deptjax.methods.base import EncoderChoice
from deptjax.models.layout import with_layout
from deptjax.models.pooling import pool
from deptjax.prompt import Prompt
from deptjax.quantization import quantize_tree
from deptjax.testing import save_hf_folder, tiny_bert, tiny_llama, tiny_t5
from deptjax.training.config import TrainConfig
from deptjax.training.population import train_population
from deptjax.training.run import train
from deptjax.training.tuning import Tuning
from tests.cases import backbone_of
from tests.reviews import review_rows, review_task

SMALL: dict[str, Any] = {"steps": 4, "batch_size": 4, "eval_every": 2, "buckets": 1, "log_every": 2, "progress": False}
TEXTS = [row["text"] for row in review_rows(6)]


def choice(**fields: Any) -> EncoderChoice:
    return EncoderChoice("backbone", None, False, 32, False)._replace(**fields)


@pytest.mark.parametrize(("family", "pooling"), [("llama", "last"), ("t5", "mean")])
def test_a_vector_is_that_of_the_frozen_model(family: str, pooling: str) -> None:
    """Of a causal model the last state, of T5 the mean of its encoder's; whatever the texts are padded to."""
    backbone = backbone_of(family)
    encoder = TextEncoder(backbone, choice())
    tokens = encoder.tokens(TEXTS)
    vectors = encoder.vectors(tokens)
    module = backbone.module()
    for ids, vector in zip(tokens, vectors, strict=True):
        embeds = module.apply({"params": backbone.params}, ids[None], method="embed")
        mask = jnp.ones((1, len(ids)), bool)
        states = module.apply({"params": backbone.params}, embeds, mask, method="encode")
        np.testing.assert_allclose(vector, pool(states, mask, pooling)[0], rtol=1e-4, atol=1e-5)


def test_a_text_is_encoded_once_and_alike_with_any_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    run = text_encoder._encode
    monkeypatch.setattr(text_encoder, "_encode", lambda *args: (ran.append(1), run(*args))[1])
    encoder = TextEncoder(backbone_of("llama"), choice())
    tokens = encoder.tokens(TEXTS)
    first = encoder.vectors(tokens)
    count = len(ran)
    np.testing.assert_array_equal(encoder.vectors(tokens[::-1]), first[::-1])
    assert len(ran) == count
    alone = TextEncoder(backbone_of("llama"), choice()).vectors(tokens[2:3])
    np.testing.assert_array_equal(alone[0], first[2])


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "tuned"])
def test_a_run_its_prompt_and_its_answers(tmp_path: pathlib.Path, family: str, trained: bool) -> None:
    """The dev score of the run is that of the saved prompt, and a batch of two tasks answers as each alone."""
    backbone = backbone_of(family)
    method = LoPA(prompt_length=3, rank=2, hidden=8, prompt_init="vocab", encoder_trainable=trained)
    run = train(backbone, method, review_task(), tmp_path / "run", **SMALL)
    saved = Prompt.load(tmp_path / "run" / "prompt")
    assert saved.method.encoder_width == backbone.width
    assert saved.encoder == {"name": "backbone", "fingerprint": backbone.fingerprint}
    width = backbone.width
    own = 3 * width + 2 * (width * 8 + 8) + 9 * 3 * 2 + 9 * width * 2
    read = {name: tree for name, tree in backbone.params.items() if name not in ("decoder", "logits_dense")}
    weights = sum(leaf.size for leaf in jax.tree.leaves(read))
    assert run.trainable_parameters == own + trained * weights
    assert ("encoder" in saved.trainable) == trained
    if trained:
        assert jax.tree.map(np.shape, saved.trainable["encoder"]) == jax.tree.map(np.shape, read)
    assert evaluate(backbone, saved, review_task(), split="dev") == pytest.approx(saved.metrics)

    other = dataclasses.replace(saved, trainable=jax.tree.map(lambda a: a + 0.05, saved.trainable))
    both = Predictor(backbone, {"one": saved, "two": other}, batch_size=4)
    mixed = both(TEXTS, ["one", "two"] * 3)
    for name, prompt in (("one", saved), ("two", other)):
        alone = Predictor(backbone, prompt, batch_size=4)(TEXTS)
        for place in range(["one", "two"].index(name), 6, 2):
            assert mixed[place].scores == pytest.approx(alone[place].scores, abs=1e-5)


def test_a_tuned_encoder_moves_and_a_frozen_one_does_not(tmp_path: pathlib.Path) -> None:
    backbone = backbone_of("llama")
    before = jax.tree.map(np.array, backbone.params)
    method = IDPG(prompt_length=2, hidden=4, factors=2, encoder_trainable=True)
    run = train(backbone, method, review_task(), tmp_path / "run", **SMALL)
    assert run.prompt is not None
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), run.prompt.trainable["encoder"], before)
    assert all(jax.tree.leaves(moved["layers_0"]))
    jax.tree.map(np.testing.assert_array_equal, backbone.params, before)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: pathlib.Path) -> None:
    method = IDPG(prompt_length=2, hidden=4, factors=2)
    settings = {**SMALL, "checkpoint_every": 2, "eval_every": 0}
    whole = train(backbone_of("llama"), method, review_task(), tmp_path, **settings)
    assert whole.prompt is not None
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "4")  # as if it had been killed behind its second step
    again = train(backbone_of("llama"), method, review_task(), tmp_path, **settings)
    assert again.prompt is not None
    assert again.seconds_per_step is not None
    jax.tree.map(np.testing.assert_array_equal, again.prompt.trainable, whole.prompt.trainable)


def test_an_encoder_of_its_own_has_its_own_tokens(tmp_path: pathlib.Path) -> None:
    """A T5 reads for a LLaMA: other widths, other tokens; its folder is named by the prompt, and must be there."""
    reader = tiny_t5()
    folder = tmp_path / "reader"
    save_hf_folder(reader, folder)
    method = LoPA(prompt_length=2, rank=1, hidden=4, encoder=str(folder), encoder_normalize=True, encoder_length=8)
    loaded = encoder_of(method, backbone_of("llama"))
    assert loaded is not None
    for text, ids in zip(TEXTS, loaded.tokens(TEXTS), strict=True):
        assert list(ids) == reader.tokenizer(text, truncation=True, max_length=8).input_ids
    np.testing.assert_allclose(np.linalg.norm(loaded.vectors(loaded.tokens(TEXTS)), axis=1), 1, rtol=1e-5)

    train(backbone_of("llama"), method, review_task(), tmp_path / "run", **SMALL)
    saved = tmp_path / "run" / "prompt"
    answers = Predictor(backbone_of("llama"), saved)(TEXTS)
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"there is no such file or folder.*cannot be used without it.*--encoder"
    ) as told:
        Predictor(backbone_of("llama"), saved)
    assert "\n" not in str(told.value)
    from deptjax.interop.load import load_backbone

    given = Predictor(backbone_of("llama"), saved, encoder=load_backbone(tmp_path / "moved"))(TEXTS)
    assert [a.scores for a in given] == [a.scores for a in answers]
    wrong = tiny_t5(seed=1)
    with pytest.raises(UserError, match=r"tuned with encoder .* is another: embedding is"):
        Predictor(backbone_of("llama"), saved, encoder=wrong)
    with pytest.raises(UserError, match="encoder_width is 23, and encoder 'tiny-llama' has 32"):
        Predictor(backbone_of("llama"), saved, encoder=tiny_llama(width=32))
    with pytest.raises(UserError, match="encoder is a str; give a Backbone, from load_backbone"):
        Predictor(backbone_of("llama"), saved, encoder=str(tmp_path / "moved"))  # type: ignore[arg-type]

    # What the embedding table does not tell: a layer that has been tuned, and other ids of the same tokens.
    layer = jax.tree.map(lambda a: a * 1.01, reader.params["encoder"]["layers_0"])
    tuned = {**reader.params, "encoder": {**reader.params["encoder"], "layers_0": layer}}
    with pytest.raises(UserError, match=r"is another: weights is .*, not "):
        Predictor(backbone_of("llama"), saved, encoder=dataclasses.replace(reader, params=tuned))
    unread = {"decoder": jax.tree.map(lambda a: a * 2, reader.params["decoder"])}
    Predictor(backbone_of("llama"), saved, encoder=dataclasses.replace(reader, params={**reader.params, **unread}))
    swapped = dataclasses.replace(reader, tokenizer=OtherIds(reader.tokenizer))
    with pytest.raises(UserError, match=r"is another: vocabulary is .*, not "):
        Predictor(backbone_of("llama"), saved, encoder=swapped)


def test_one_of_two_encoders_may_have_moved(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """The one that is given is for the prompt that was tuned with it; the other prompt's is where it was."""
    readers = {"stays": tiny_t5(), "moves": tiny_t5(seed=1)}
    prompts = {}
    for name, reader in readers.items():
        save_hf_folder(reader, tmp_path / name)
        method = LoPA(prompt_length=2, rank=1, hidden=4, encoder=str(tmp_path / name), encoder_normalize=False)
        train(backbone_of("llama"), method, review_task(), tmp_path / f"run-{name}", **SMALL)
        prompts[name] = tmp_path / f"run-{name}" / "prompt"
    wanted = Predictor(backbone_of("llama"), prompts)(TEXTS, ["stays", "moves"] * 3)
    (tmp_path / "moves").rename(tmp_path / "moved")
    with caplog.at_level("WARNING"):
        found = Predictor(backbone_of("llama"), prompts, encoder=readers["moves"])(TEXTS, ["stays", "moves"] * 3)
    assert [a.scores for a in found] == [pytest.approx(a.scores, abs=1e-6) for a in wanted]
    assert "is read from there, for the one that was given is another" in caplog.text


class OtherIds:
    """A tokenizer that says it has other ids."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def get_vocab(self) -> dict[str, int]:
        first, second, *rest = self._own.get_vocab().items()
        return dict([(first[0], second[1]), (second[0], first[1]), *rest])


def test_an_encoder_that_is_given_is_the_one_that_the_prompt_names(tmp_path: pathlib.Path) -> None:
    """Of another width than the backbone, which the method names; several members at once have it too."""
    backbone, reader, method = backbone_of("llama"), tiny_llama(width=32), LoPA(prompt_length=2, rank=1, hidden=4)
    run = train(backbone, method, review_task(), tmp_path / "run", encoder=reader, **SMALL)
    assert run.prompt is not None
    assert (run.prompt.method.encoder, run.prompt.method.encoder_width) == (reader.name, 32)
    scores = evaluate(backbone, run.prompt, review_task(), split="dev", encoder=reader)
    assert scores == pytest.approx(run.prompt.metrics)
    again = train(backbone, method, review_task(), tmp_path / "run", encoder=reader, **SMALL)
    assert again.prompt is not None
    assert again.prompt.run_id == run.prompt.run_id
    both = train_population(
        backbone, method, review_task(), tmp_path / "both", [{"seed": 0}], encoder=reader, **{**SMALL, "eval_every": 0}
    )
    saved = Prompt.load(tmp_path / "both" / "members" / both.members[0].name / "prompt")
    assert saved.method == run.prompt.method


def test_only_what_is_longer_than_the_limit_is_cut_and_told(caplog: pytest.LogCaptureFixture) -> None:
    reader = tiny_t5()
    text = "the film is good"
    exact = reader.tokenizer(text).input_ids
    encoder = TextEncoder(reader, choice(name="reader", max_length=len(exact)))
    with caplog.at_level("WARNING"):
        assert list(encoder.tokens([text])[0]) == exact
        assert not caplog.records
        whole, cut = encoder.tokens([text, f"{text} and sad"])
    assert list(whole) == exact
    assert list(cut) == reader.tokenizer(f"{text} and sad", truncation=True, max_length=len(exact)).input_ids
    assert [r.message for r in caplog.records] == [
        f"encoder 'reader': texts of more than {len(exact)} tokens, encoder_length, are cut"
    ]
    with pytest.raises(UserError, match="'bert': encoder_length is 2, and its tokenizer puts 2 tokens of its own"):
        TextEncoder(tiny_bert(), choice(name="bert", max_length=2))


def test_threads_that_share_a_tokenizer_get_their_own_lengths() -> None:
    """One cuts and the other does not, and the tokenizer keeps what it was told last."""
    backbone, text = backbone_of("llama"), "the film is good " * 100
    cutting = TextEncoder(backbone, choice(max_length=6))
    whole = TextEncoder(backbone, choice(max_length=1000))
    found: dict[str, set[int]] = {"cut": set(), "whole": set()}

    def read(name: str, encoder: TextEncoder) -> None:
        for _ in range(100):
            found[name] |= {len(row) for row in encoder.tokens([text] * 4)}

    threads = [threading.Thread(target=read, args=each) for each in (("cut", cutting), ("whole", whole)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["cut"] == {6}
    assert len(found["whole"]) == 1
    assert found["whole"] != {6}


def test_what_is_kept_is_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of("llama")
    encoder = TextEncoder(backbone, choice())
    rows = encoder.tokens(TEXTS)
    one = rows[0].nbytes + 4 * backbone.width
    monkeypatch.setattr(text_encoder, "KEPT_BYTES", one + rows[-1].nbytes + 4 * backbone.width)
    wanted = encoder.vectors(rows)
    assert encoder._kept_bytes == sum(len(key) + vector.nbytes for key, vector in encoder._kept.items())
    assert 0 < encoder._kept_bytes <= text_encoder.KEPT_BYTES
    assert rows[-1].tobytes() in encoder._kept
    assert rows[0].tobytes() not in encoder._kept
    assert all(vector.base is None for vector in encoder._kept.values())  # none keeps its whole call's alive
    np.testing.assert_array_equal(encoder.vectors(rows), wanted)


def test_mistakes_are_told_before_anything_is_trained(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"lopa: encoder: '\./gone': there is no such file or folder"):
        train(backbone_of("llama"), LoPA(encoder="./gone"), review_task(), tmp_path / "run", **SMALL)
    with pytest.raises(UserError, match="encoder_pooling 'pooled' needs a checkpoint with a pooling layer"):
        train(backbone_of("llama"), LoPA(encoder_pooling="pooled"), review_task(), tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_members_of_a_population_learn_what_they_learn_alone(tmp_path: pathlib.Path) -> None:
    """Without dropout, whose draws depend on who else is there; and the two members' rates differ."""
    method = LoPA(prompt_length=2, rank=1, hidden=4, encoding_dropout=0.0)
    members, settings = [{"low_rank_lr": 1e-4}, {"low_rank_lr": 1e-2}], {**SMALL, "eval_every": 0}
    both = train_population(backbone_of("llama"), method, review_task(), tmp_path / "both", members, **settings)
    kept = [Prompt.load(tmp_path / "both" / "members" / member.name / "prompt") for member in both.members]
    for own, prompt in zip(members, kept, strict=True):
        alone = train(
            backbone_of("llama"), method, review_task(), tmp_path / f"{own['low_rank_lr']}", **settings, **own
        )
        assert alone.prompt is not None
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            prompt.trainable,
            alone.prompt.trainable,
        )


def test_the_backbone_is_its_own_encoder_without_a_copy() -> None:
    backbone = backbone_of("llama")
    encoder = encoder_of(LoPA(), backbone)
    assert encoder is not None
    assert encoder.backbone.params is backbone.params


def test_an_encoder_reads_a_masked_models_text_without_its_mask(tmp_path: pathlib.Path) -> None:
    backbone = backbone_of("bert")
    save_hf_folder(tiny_t5(), tmp_path / "reader")
    method = LoPA(prompt_length=2, rank=1, hidden=4, encoder=str(tmp_path / "reader"))
    task = review_task(input="text : {text} it was {mask} .", verbalizers={"negative": "bad", "positive": "good"})
    seen: list[str] = []
    read = TextEncoder.tokens

    def noted(self: TextEncoder, texts: Any) -> Any:
        seen.extend(texts)
        return read(self, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "tokens", noted)
        train(backbone, method, task, tmp_path / "run", **SMALL)
        scores = evaluate(backbone, tmp_path / "run" / "prompt", task, split="dev")
    assert scores == pytest.approx(Prompt.load(tmp_path / "run" / "prompt").metrics)
    assert seen
    assert not any(backbone.tokenizer.mask_token in text for text in seen)


def test_what_cannot_be_used_is_told(tmp_path: pathlib.Path) -> None:
    backbone = backbone_of("llama")
    small = LoPA(prompt_length=2, rank=1, hidden=4, encoder_trainable=True)
    with pytest.raises(UserError, match="encoder_trainable tunes every weight of the encoder, which quantised ones"):
        train(backbone.quantized("int8"), small, review_task(), tmp_path / "run", **SMALL)
    run = train(backbone, small, review_task(), tmp_path / "tuned", **SMALL)
    assert run.prompt is not None
    with pytest.raises(UserError, match="encoder is a str; give a Backbone, from load_backbone"):
        Predictor(backbone, run.prompt, encoder="tiny-llama")  # type: ignore[arg-type]
    bare = dataclasses.replace(run.prompt, trainable={"input": run.prompt.trainable["input"]})
    with pytest.raises(UserError, match="the encoder's weights are not among its tensors"):
        Predictor(backbone, bare)
    frozen = dataclasses.replace(small, encoder_trainable=False)
    start = str(tmp_path / "tuned" / "prompt")
    with pytest.raises(UserError, match="was tuned together with its encoder; start from it with encoder_trainable"):
        train(backbone, frozen, review_task(), tmp_path / "next", start_from=start, **SMALL)
    assert not (tmp_path / "next").exists()


def test_a_tuned_encoder_is_used_in_the_other_layout_of_layers(tmp_path: pathlib.Path) -> None:
    method = LoPA(prompt_length=2, rank=1, hidden=4, encoder_trainable=True)
    run = train(backbone_of("llama"), method, review_task(), tmp_path / "run", **SMALL)
    assert run.prompt is not None
    loop = backbone_of("llama")
    config = dataclasses.replace(loop.config, scan_layers=True)
    scan = dataclasses.replace(loop, config=config, params=with_layout(loop.params, scan_layers=True))
    one, other = (Predictor(backbone, run.prompt)(TEXTS[:2]) for backbone in (loop, scan))
    assert [a.scores for a in other] == [pytest.approx(a.scores, abs=1e-5) for a in one]

    quantised = dataclasses.replace(loop, config=dataclasses.replace(loop.config, quantize="int8"))
    quantised = dataclasses.replace(quantised, params=quantize_tree(loop.params, "int8"))
    saved = SavedEncoders(quantised).of(run.prompt)
    assert saved is not None
    tokens = saved.tokens(TEXTS[:2])
    np.testing.assert_array_equal(saved.vectors(tokens), SavedEncoders(loop).of(run.prompt).vectors(tokens))  # type: ignore[union-attr]

    config = TrainConfig(start_from=str(run.workdir / "prompt"))
    started, _, _ = Tuning.prepare(scan, method, review_task(), config).start()
    wanted = with_layout(run.prompt.trainable["encoder"], scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, started["encoder"], wanted)
    small = jax.tree.map(lambda leaf: leaf[:1], run.prompt.trainable["encoder"])
    wrong = dataclasses.replace(run.prompt, trainable={**run.prompt.trainable, "encoder": small})
    wrong.save(tmp_path / "wrong")
    config = TrainConfig(start_from=str(tmp_path / "wrong"))
    with pytest.raises(UserError, match=r"wrong: its tuned encoder's weights are not those of 'tiny-llama'"):
        Tuning.prepare(scan, method, review_task(), config).start()


def test_a_run_starts_from_one_with_a_frozen_encoder(tmp_path: pathlib.Path) -> None:
    backbone, frozen = backbone_of("llama"), LoPA(prompt_length=2, rank=1, hidden=4)
    train(backbone, frozen, review_task(), tmp_path / "frozen", **SMALL)
    tuned = dataclasses.replace(frozen, encoder_trainable=True)
    start, rates = str(tmp_path / "frozen" / "prompt"), {"prompt_lr": 1e-12, "low_rank_lr": 1e-12}
    settings = {**SMALL, "steps": 1, "eval_every": 0, **rates}
    run = train(backbone, tuned, review_task(), tmp_path / "tuned", start_from=start, **settings)
    assert run.prompt is not None
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        run.prompt.trainable["input"],
        Prompt.load(start).trainable["input"],
    )
    with pytest.raises(UserError, match=r"is another: .*; take that encoder, or another prompt to start from"):
        train(backbone, frozen, review_task(), tmp_path / "other", encoder=tiny_t5(), start_from=start, **SMALL)
