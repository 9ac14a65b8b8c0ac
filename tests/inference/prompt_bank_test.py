"""`PromptBank`: prompts of several sizes in one stack, each row with its own, and what that costs."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.prompt_bank import PromptBank
from deptjax.inference.rows import Rows, start_rows
from deptjax.inference.text_encoder import encoder_of
from deptjax.methods import DePT, LoPA, LoRA, PromptTuning
from deptjax.methods.base import Method, Texts
from deptjax.prompt import Prompt
from deptjax.testing import tiny_llama, tiny_t5
from tests.cases import backbone_of, case_of, make_case, padded, rows_of
from tests.reviews import review_prompt

LENGTHS, NAMES = (7, 3, 5, 1), ("small", "large", "large", "small")
SIZES: dict[str, tuple[Method, Method]] = {
    "dept": (
        DePT(prompt_length=2, rank=4, max_length=9, prompt_init="vocab"),
        DePT(prompt_length=5, rank=3, max_length=13, prompt_init="vocab", scaling="none"),
    ),
    "prompt_tuning": (PromptTuning(3, "vocab"), PromptTuning(7, "random")),
    "lora": (LoRA(rank=2, alpha=3.0), LoRA(rank=3)),
}
WORDS = {"negative": "bad", "positive": "good"}
CASES = [(f, k, s) for f in ("llama", "t5") for k in SIZES for s in (False, True)]
CASES += [("gpt2", "dept", False), ("gpt2", "prompt_tuning", True)]
start = jax.jit(start_rows, static_argnums=(0, 5))


def prompt_of(family: str, method: Method, scan: bool = False) -> Prompt:
    return make_case(backbone_of(family, scan), method).prompt()


def logits_of(bank: PromptBank, names: tuple[str, ...], length: int = 8) -> np.ndarray:
    source, mask = padded(rows_of(LENGTHS), length)
    return np.asarray(start(bank.model, bank.frozen, bank.rows(names), source, mask, 3)[0])


def alone(family: str, prompt: Prompt, scan: bool = False) -> np.ndarray:
    case = make_case(backbone_of(family, scan), prompt.method)
    rows = Rows.shared(case.model, jax.tree.map(jnp.asarray, prompt.trainable), case.frozen)
    source, mask = padded(rows_of(LENGTHS), 8)
    return np.asarray(start(case.model, case.frozen, rows, source, mask, 3)[0])


@pytest.mark.parametrize(("family", "kind", "scan"), CASES)
def test_each_row_is_what_it_is_with_its_own_prompt_alone(family: str, kind: str, scan: bool) -> None:
    prompts = dict(zip(("small", "large"), (prompt_of(family, m, scan) for m in SIZES[kind]), strict=True))
    bank = PromptBank(backbone_of(family, scan), prompts)
    got = logits_of(bank, NAMES)
    own = {name: alone(family, prompt, scan) for name, prompt in prompts.items()}
    for row, name in enumerate(NAMES):
        np.testing.assert_allclose(got[row], own[name][row], rtol=1e-5, atol=1e-5 * np.abs(own[name]).max())
    assert not np.allclose(own["small"], own["large"], atol=1e-2)


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in ("llama", "t5") for k in SIZES])
def test_bits_do_not_depend_on_the_other_rows(family: str, kind: str) -> None:
    prompts = dict(zip(("small", "large"), (prompt_of(family, m) for m in SIZES[kind]), strict=True))
    bank = PromptBank(backbone_of(family), prompts)
    mixed = logits_of(bank, NAMES)
    for name in prompts:
        single = logits_of(bank, (name,) * 4)
        for row in range(4):
            if NAMES[row] == name:
                np.testing.assert_array_equal(single[row], mixed[row])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_larger_prompt_makes_the_bank_larger(family: str) -> None:
    small, large = (prompt_of(family, method) for method in SIZES["dept"])
    bank = PromptBank(backbone_of(family), {"small": small})
    before = logits_of(bank, ("small",) * 4)
    bank.add("large", large)
    assert (bank.model.method.prompt_length, bank.model.method.rank, bank.model.method.max_length) == (5, 4, 13)
    after = logits_of(bank, NAMES)
    np.testing.assert_allclose(after[[0, 3]], before[[0, 3]], rtol=1e-5, atol=1e-5 * np.abs(before).max())
    wanted = alone(family, large)
    np.testing.assert_allclose(after[[1, 2]], wanted[[1, 2]], rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", ["lopa", "idpg", "attempt"])
def test_a_prompt_that_depends_on_the_text_is_made_of_each_rows(family: str, method: str) -> None:
    """Read by the prompt's own encoder, and as a `Predictor` has it."""
    case = case_of(family, method)
    task = {"input": "{text} {mask}", "verbalizers": WORDS} if case.backbone.config.is_masked else {}
    one = review_prompt(case, **task)
    two = dataclasses.replace(one, trainable=jax.tree.map(lambda leaf: -2 * leaf, one.trainable))
    bank = PromptBank(case.backbone, {"one": one, "two": two})
    texts, names = ["good film", "it was a very dull story", "bright"], ["two", "one", "two"]
    rows = bank.rows(names, texts)
    assert (rows.encoding is None) == (method == "attempt")  # which reads the text's embeddings
    reader = encoder_of(case.model.method, case.backbone)
    if reader is not None:
        np.testing.assert_array_equal(rows.encoding, reader.vectors(reader.tokens(texts)))
        assert bank.rows(names).encoding is None
        with pytest.raises(UserError, match="2 texts are given for 3 rows; give one for each"):
            bank.rows(names, texts[:2])
    prompts = bank_prompts(bank, rows, texts)
    assert prompts.shape[0] == 3
    for row, (name, text) in enumerate(zip(names, texts, strict=True)):
        alone = PromptBank(case.backbone, {name: {"one": one, "two": two}[name]})
        np.testing.assert_allclose(
            bank_prompts(alone, alone.rows([name], [text]), [text])[0], prompts[row], rtol=1e-5, atol=1e-5
        )


def bank_prompts(bank: PromptBank, rows: Rows, texts: list[str]) -> np.ndarray:
    """Returns the prompt in front of each text, (B, M, D)."""
    made = []
    for i, text in enumerate(texts):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], rows.trainable)
        ids = jnp.asarray(bank._backbone.tokenizer(text)["input_ids"])
        embeds = bank._backbone.embedding[ids][None]
        said = Texts.whole(embeds, None if rows.encoding is None else rows.encoding[i : i + 1])
        prompt, _ = bank.model.method.sites().input.apply({"params": own["input"]}, embeds, said, method="streams")
        made.append(prompt[0])
    return np.stack(made)


def test_an_encoder_that_is_gone_is_told_when_a_text_comes() -> None:
    case = make_case(backbone_of("llama"), LoPA(prompt_length=3, rank=2, hidden=4, encoder="./gone", encoder_width=24))
    prompt = dataclasses.replace(case.prompt(), encoder={"name": "./gone", "fingerprint": {}})
    bank = PromptBank(backbone_of("llama"), {"mine": prompt})
    assert bank.rows(["mine"]).encoding is None
    with pytest.raises(UserError, match=r"^task 'mine': .*gone.*: give the encoder that it was tuned with as encoder="):
        bank.rows(["mine"], ["good film"])


def test_tasks_come_and_go_without_compiling_anew() -> None:
    small, large = (prompt_of("llama", method) for method in SIZES["dept"])
    bank = PromptBank(backbone_of("llama"), {"small": small}, room=large.method, capacity=2)
    logits_of(bank, ("small",) * 4)
    compiled = start._cache_size()
    wanted = logits_of(bank, ("small",) * 4)
    for number in range(7):  # beyond the capacity of two
        bank.add(f"n{number}", large if number % 2 else small)
    np.testing.assert_array_equal(logits_of(bank, ("small", "n0", "n2", "n6")), wanted)
    bank.remove("small")
    bank.remove("n2")
    bank.add("n0", large)  # replaced
    bank.add("again", small)
    assert (len(bank), "small" in bank, "again" in bank) == (7, False, True)
    got = logits_of(bank, ("again", "n0", "n1", "again"))
    np.testing.assert_array_equal(got[[0, 3]], wanted[[0, 3]])
    np.testing.assert_array_equal(got[1], logits_of(bank, ("n1",) * 4)[1])
    assert start._cache_size() == compiled
    with pytest.raises(UserError, match="no prompt is loaded for task 'smal'; there are: "):
        bank.rows(["smal"])


def test_the_prompts_keys_and_values_are_made_when_it_is_added_and_no_offset_touches_them() -> None:
    """On a causal backbone. A and B change what the texts are, and nothing of what the prompt is to them."""
    prompt = prompt_of("llama", SIZES["dept"][1])
    without = {"input": {**prompt.trainable["input"], "lora_b": np.zeros_like(prompt.trainable["input"]["lora_b"])}}
    bank = PromptBank(backbone_of("llama"), {"dept": prompt, "flat": dataclasses.replace(prompt, trainable=without)})
    dept, flat = bank.rows(["dept"]), bank.rows(["flat"])
    for a, b in zip(jax.tree.leaves(dept.front), jax.tree.leaves(flat.front), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(logits_of(bank, ("dept",) * 4), logits_of(bank, ("flat",) * 4), atol=1e-2)
    # They are those of the prompt in front of any text: the first M positions of a plain run over prompt and text.
    module, frozen = backbone_of("llama").module(), backbone_of("llama").params
    text = jax.random.normal(jax.random.key(0), (1, 4, 24))
    whole = jnp.concatenate([jnp.asarray(prompt.trainable["input"]["prompt"])[None], text], axis=1)
    mask = jnp.ones(whole.shape[:2], bool)
    _, cache = module.apply({"params": frozen}, whole, mask, None, 1, method="start")
    for layer, kv in zip(cache.layers, dept.front.layers, strict=True):
        for made, plain in zip(kv, layer.source, strict=True):
            np.testing.assert_allclose(made[0], plain[0, :, :5], rtol=1e-5, atol=1e-5)


def test_decoding_reads_them_and_does_not_make_them_again() -> None:
    """The compiled start of a batch multiplies no weight with M more positions than the texts have."""
    backbone = backbone_of("llama")
    bank = PromptBank(backbone, {"x": prompt_of("llama", PromptTuning(40, "vocab"))})
    source, mask = padded(rows_of(LENGTHS), 8)

    def flops(rows: Rows) -> float:
        return start.lower(bank.model, bank.frozen, rows, source, mask, 3).compile().cost_analysis()["flops"]

    rows = bank.rows(["x"] * 4)
    with_front, made_anew = flops(rows), flops(Rows(rows.trainable, None, apart=True))
    assert made_anew > 3 * with_front


def test_a_thousand_prompts_of_t5_base_take_less_than_400_mb() -> None:
    backbone = tiny_t5(width=768)
    method = DePT(prompt_length=40, rank=45, max_length=256)
    random = np.random.default_rng(0)
    shapes = {"prompt": (40, 768), "lora_a": (256, 45), "lora_b": (45, 768)}

    def prompt() -> Prompt:
        tree = {"input": {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}}
        return Prompt(method, tree, backbone.name, backbone.fingerprint, {"name": "x"})

    bank = PromptBank(backbone, room=method, capacity=1000)
    for number in range(1000):
        bank.add(f"task{number}", prompt())
    assert (len(bank), bank.capacity) == (1000, 1000)
    assert 307e6 < bank.nbytes < 400e6
    rows = bank.rows([f"task{number}" for number in (0, 999)])
    assert rows.trainable["input"]["prompt"].shape == (2, 40, 768)


def test_what_cannot_be_stacked_is_refused(tmp_path: pathlib.Path) -> None:
    backbone = backbone_of("llama")
    dept = prompt_of("llama", SIZES["dept"][0])
    bank = PromptBank(backbone, {"dept": dept})
    with pytest.raises(UserError, match="prompts of dept and of lora cannot be stacked; put them into two banks"):
        bank.add("lora", prompt_of("llama", LoRA(rank=2)))
    with pytest.raises(UserError, match=r"prompts of targets .* and of targets query\$ cannot be stacked"):
        PromptBank(backbone, {"a": prompt_of("llama", LoRA()), "b": prompt_of("llama", LoRA(targets="query$"))})
    with pytest.raises(UserError, match="prompt 'x' was tuned on 'tiny-llama', not on 'tiny-llama': embedding"):
        PromptBank(tiny_llama(seed=3), {"x": dept})
    with pytest.raises(UserError, match="missing: there is no such file or folder"):
        bank.add("missing", tmp_path / "missing")
    with pytest.raises(UserError, match="needs a prompt, or room="):
        PromptBank(backbone)
    assert bank.names == ["dept"]


@pytest.mark.parametrize("order", [("off", "on"), ("on", "off")])
def test_a_scale_of_zero_stays_zero_and_turns_no_other_off(order: tuple[str, str]) -> None:
    """A scale that differs goes into the factor it multiplies, and nothing can be divided by zero."""
    prompts = {"off": prompt_of("llama", LoRA(rank=3, alpha=0.0)), "on": prompt_of("llama", LoRA(rank=3))}
    bank = PromptBank(backbone_of("llama"), {order[0]: prompts[order[0]]})
    bank.add(order[1], prompts[order[1]])
    got = logits_of(bank, ("off", "on", "off", "on"))
    for row, name in enumerate(("off", "on", "off", "on")):
        own = alone("llama", prompts[name])
        np.testing.assert_allclose(got[row], own[row], rtol=1e-5, atol=1e-5 * np.abs(own).max())
    assert not np.allclose(alone("llama", prompts["on"]), alone("llama", prompts["off"]), atol=1e-2)
