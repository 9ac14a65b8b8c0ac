"""Sources with a mask and labels of one token: templates, special tokens, spaces, and cuts that keep the mask."""

from __future__ import annotations

from typing import Any

import pytest

from deptjax.data.forms import form_of
from deptjax.data.preprocess import Preprocessor
from deptjax.data.tasks import Task
from deptjax.data.templates import Row, Template
from deptjax.errors import UserError
from deptjax.testing import tiny_bert, tiny_gpt2, tiny_masked_tokenizer, tiny_t5

LONG = "the plot was not very good and the ending is bad " * 3
PAIR = "{a} ? {mask} , {b}"


def roberta_tokenizer() -> Any:
    """Returns a byte-level tokenizer whose mask takes the space in front of it, as RoBERTa's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyzIt.?,", "Ġ"]
    merges = []
    for word in ("good", "bad"):
        for start in ("Ġ", ""):
            letters_of = [*start, *word]
            merges += [("".join(letters_of[:at]), letters_of[at]) for at in range(1, len(letters_of))]
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters, *("".join(merge) for merge in merges)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    mask = AddedToken("<mask>", lstrip=True, special=True)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", mask_token=mask, **names)


def made(
    template: str = "{text} . {mask}", tokenizer: Any = None, labels: Any = ("good", "bad"), **options: Any
) -> Preprocessor:
    task = Task(name="t", source=None, input=template, labels=labels, verbalizers=options.pop("verbalizers", {}))
    options = {"max_length": 64, **options}
    return Preprocessor(tokenizer or tiny_masked_tokenizer(), task, form="masked", **options)


def row(**values: str) -> Row:
    return Row({"label": "good", **values}, "a.csv, line 7")


def test_a_source_stands_between_the_special_tokens_with_the_mask_in_its_place() -> None:
    preprocessor = made()
    example = preprocessor.encode(row(text="the film was fine"))
    tokens = preprocessor.tokenizer.convert_ids_to_tokens(example.source)
    assert tokens == ["<s>", "the", "film", "was", "fine", ".", "<mask>", "</s>"]
    assert preprocessor.tokenizer.convert_ids_to_tokens(example.target) == ["good"]
    assert (example.label, preprocessor.longest_target(), preprocessor.labels_are_tokens()) == (0, 1, True)
    assert preprocessor.label_tokens().tolist() == [int(example.target[0]), *preprocessor.encode(
        Row({"text": "x", "label": "bad"})).target]  # fmt: skip
    assert preprocessor.encode_text(preprocessor.task.source_text("the film was fine")).tolist() == [*example.source]


@pytest.mark.parametrize(
    ("template", "token"), [("{text}. It {mask} .", "Ġgood"), ("{mask} {text}", "good"), ("{text}({mask})", "good")]
)
def test_a_label_has_the_space_that_the_template_has_in_front_of_the_mask(template: str, token: str) -> None:
    preprocessor = made(template, roberta_tokenizer())
    example = preprocessor.encode(row(text="a"))
    assert preprocessor.tokenizer.convert_ids_to_tokens(example.target) == [token]
    source = preprocessor.tokenizer.convert_ids_to_tokens(example.source)
    assert (source[0], source[-1], source.count("<mask>")) == ("<s>", "</s>", 1)
    assert "Ġ" not in source[source.index("<mask>") - 1]  # the mask takes it


@pytest.mark.parametrize(
    ("template", "values", "kept"),
    [
        (
            "{text} : it was {mask} .",
            {"text": LONG},
            (["<s>", "the", "plot"], [":", "it", "was", "<mask>", ".", "</s>"]),
        ),
        (PAIR, {"a": "the plot", "b": LONG}, (["<s>", "the", "plot", "?", "<mask>", ",", "the"], ["</s>"])),
        (
            PAIR,
            {"a": LONG, "b": LONG},
            (["<s>", "the", "plot", "was", "?"], ["<mask>", ",", "the", "plot", "was", "</s>"]),
        ),
        (PAIR, {"a": LONG, "b": "no"}, (["<s>", "the", "plot"], ["?", "<mask>", ",", "no", "</s>"])),
        (
            "{a} : {b} {mask}",
            {"a": LONG, "b": "no good"},
            (["<s>", "the"], ["very", ":", "no", "good", "<mask>", "</s>"]),
        ),
        (
            "{mask} {a} : {b} yes",
            {"a": LONG, "b": LONG},
            (["<s>", "<mask>", "the"], [":", "the", "plot", "was", "yes", "</s>"]),
        ),
        ("{mask} : {text}", {"text": LONG}, (["<s>", "<mask>", ":", "the"], ["</s>"])),
    ],
)
def test_a_cut_keeps_the_mask_and_the_fixed_text_around_it(
    template: str, values: dict[str, str], kept: tuple[list[str], list[str]]
) -> None:
    preprocessor = made(template, max_length=11)
    tokens = preprocessor.tokenizer.convert_ids_to_tokens(preprocessor.encode(row(**values)).source)
    first, last = kept
    assert len(tokens) == 11
    assert (tokens[: len(first)], tokens[-len(last) :]) == kept
    assert preprocessor.cut_count == 1
    with pytest.raises(UserError, match=r"line 7: the source is \d+ tokens, more than max_length=11"):
        made(template, max_length=11, on_too_long="error").encode(row(**values))


def test_of_a_text_that_no_template_gave_what_is_around_the_mask_is_kept() -> None:
    preprocessor = made(PAIR, max_length=9)
    tokens = preprocessor.tokenizer.convert_ids_to_tokens(preprocessor.encode_text(f"good <mask> {LONG}"))
    assert tokens[:3] == ["<s>", "good", "<mask>"]
    assert (tokens[3:5], tokens[-1], len(tokens)) == (["the", "plot"], "</s>", 9)


@pytest.mark.parametrize("text", ["a film or", "film: yes", "yes"])
def test_a_template_did_not_give_every_text(text: str) -> None:
    assert Template("{a} or {b}: yes").split(text) is None


def test_a_length_without_room_for_the_mask_is_told() -> None:
    with pytest.raises(UserError, match=r"line 7: max_length=3 leaves no room for text beside the template's"):
        made(max_length=3).encode(row(text=LONG))
    with pytest.raises(UserError, match=r"no room for text beside the template's ' \? <mask> , '; raise it"):
        made(PAIR, max_length=4).encode(row(a=LONG, b=LONG))


def test_a_mask_of_the_text_itself_is_refused() -> None:
    with pytest.raises(UserError, match="line 7: the text holds the mask token <mask>, whose place the template gives"):
        made().encode(row(text="the film was <mask>"))


@pytest.mark.parametrize(
    ("template", "options", "match"),
    [
        ("{text}", {}, r"task 't': the input template '\{text\}' has \{mask\} nowhere"),
        ("{text} {mask} {mask}", {}, r"has \{mask\} 2 times; a masked model fills one place"),
        ("{text} {mask}", {"labels": ()}, "task 't' has no labels, and a masked model fills one place"),
        ("{text} {mask}", {"labels": None}, "task 't' has no labels"),
        (
            "{text} {mask}",
            {"labels": ("good", "very bad")},
            r"label 'very bad' is 2 tokens \(very bad\), not one; a mask",
        ),
        ("{text} {mask}", {"verbalizers": {"bad": "not good"}}, "label 'bad' is 2 tokens"),
        ("{mask}", {}, "names no column"),
    ],
)
def test_what_cannot_be_filled_is_one_line(template: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        made(template, **options).encode(row(text="a"))
    assert "\n" not in str(caught.value)


def test_a_mask_has_no_place_on_another_backbone_nor_in_a_target() -> None:
    task = Task(name="t", source=None, input="{text} {mask}", labels=("good", "bad"))
    for backbone in (tiny_gpt2(), tiny_t5()):
        with pytest.raises(UserError, match=r"task 't': the input template .* has \{mask\}, which a masked backbone"):
            Preprocessor(backbone.tokenizer, task, form=form_of(backbone.config), max_length=8)
    assert form_of(tiny_bert().config) == "masked"
    with pytest.raises(UserError, match=r"task 't': \{mask\} has its place in the input template"):
        Task(name="t", source=None, input="{text}", target="{label} {mask}")
    tokenizer = tiny_masked_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        made(tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"form='mask' must be one of causal, .*Did you mean 'masked'"):
        Preprocessor(tokenizer, task, form="mask", max_length=8)


def test_continuations_are_what_may_stand_at_the_mask() -> None:
    preprocessor = made()
    text = preprocessor.task.source_text("the film")
    ids = preprocessor.tokenizer.convert_tokens_to_ids(["fine", "dull"])
    assert preprocessor.continuation_ids(text, ["fine", "dull"]) == [[ids[0]], [ids[1]]]
    with pytest.raises(UserError, match="'very bad' is 2 tokens, and a masked model fills in one"):
        preprocessor.continuation_ids(text, ["very bad"])


def test_the_template_of_a_mask() -> None:
    template = Template("{{x}} {a} is {mask} ({b}) {{end}}")
    assert (template.columns, template.masks, template.suffix) == (("a", "b"), 1, ") {end}")
    assert template.around_mask == (" is ", " (")
    assert template.render(Row({"a": "1", "b": "2"})) == "{x} 1 is {mask} (2) {end}"
    filled = Template(template.with_mask("[MASK]"))
    assert (filled.masks, filled.render(Row({"a": "1", "b": "2"}))) == (0, "{x} 1 is [MASK] (2) {end}")
    assert Template("{a} was {mask} .").suffix == " was {mask} ."
    assert Template("{a}").suffix == ""
