"""Token ids of sources and targets, for a causal tokenizer and for one like T5's."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from deptjax.data.preprocess import Preprocessor
from deptjax.data.tasks import Task
from deptjax.data.templates import Row
from deptjax.errors import UserError

LONG = "the quick brown fox jumps over the lazy dog " * 3


def task(labels=("yes", "no"), input="{text}\nType:", **fields):
    return Task(name="t", source=None, input=input, labels=labels, **fields)


def row(text="is it", label="yes"):
    return Row({"text": text, "label": label}, "a.csv, line 7")


def make(tokenizer, causal, labels=("yes", "no"), max_length=64, **options):
    given = task(labels, **{k: options.pop(k) for k in ("input", "verbalizers") if k in options})
    form = "causal" if causal else "encoder_decoder"
    return Preprocessor(tokenizer, given, form=form, max_length=max_length, **options)


def test_causal_label(causal_tokenizer):
    made = make(causal_tokenizer, True)
    example = made.encode(row(label="no"))
    assert causal_tokenizer.decode(example.source) == "is it\nType:"
    assert causal_tokenizer.decode(example.target) == " no"
    assert example.target.tolist() == [made.label_tokens()[1]]
    assert example.label == 1
    assert example.source.dtype == example.target.dtype == made.label_tokens().dtype == np.int32
    # As generated text is: the source's ids and the target's are those of the whole text.
    whole = causal_tokenizer("is it\nType: no")["input_ids"]
    assert [*example.source, *example.target] == whole


def test_no_space_behind_white_space(causal_tokenizer):
    made = make(causal_tokenizer, True, input="{text}\nType: ", labels=())
    example = made.encode(row(label="maybe"))
    assert causal_tokenizer.decode(example.target) == "maybe<end>"
    labels = make(causal_tokenizer, True, input="{text}\nType:\n")
    assert causal_tokenizer.decode(labels.encode(row()).target) == "yes<end>"


def test_a_source_without_suffix_loses_white_space_at_its_end(causal_tokenizer):
    made = make(causal_tokenizer, True, input="{text}")
    plain, spaced = made.encode_all([row("is it"), row("is it \n")])
    assert plain.source.tolist() == spaced.source.tolist()
    assert plain.target.tolist() == spaced.target.tolist() == made.label_tokens()[:1].tolist()


def test_a_target_that_would_merge_with_the_source_stands_alone(causal_tokenizer):
    # "Type: " and "yes" together have the token " yes", which takes the source's last space with it.
    made = make(causal_tokenizer, True, input="{text}\nType: ", labels=())
    example = made.encode(row(label="yes"))
    assert causal_tokenizer.decode(example.source) == "is it\nType: "
    assert causal_tokenizer.decode(example.target) == "yes<end>"


def test_causal_labels_of_several_tokens_all_end(causal_tokenizer):
    made = make(causal_tokenizer, True, labels=("yes", "yesno"))
    assert not made.labels_are_tokens()
    targets = [made.encode(row(label=label)).target for label in ("yes", "yesno")]
    assert [causal_tokenizer.decode(target) for target in targets] == [" yes<end>", " yesno<end>"]
    ids, mask = made.label_sequences()
    assert ids.shape == mask.shape == (2, 4)
    assert mask.sum(axis=1).tolist() == [2, 4]
    assert [ids[i][mask[i]].tolist() for i in range(2)] == [target.tolist() for target in targets]
    with pytest.raises(UserError, match=r"label 'yesno' is 3 tokens \(Ġyes n o\).*verbalizers"):
        made.label_tokens()


def test_verbalizers_are_what_is_produced(causal_tokenizer):
    made = make(causal_tokenizer, True, labels=("1", "0"), verbalizers={"1": "yes", "0": "no"})
    assert made.labels_are_tokens()
    assert causal_tokenizer.decode(made.encode(row(label="0")).target) == " no"


def test_t5_source_and_target_end(t5_tokenizer):
    made = make(t5_tokenizer, False)
    example = made.encode(row(label="no"))
    assert t5_tokenizer.decode(example.source).endswith("</s>")
    assert (example.source == 1).sum() == 1
    assert t5_tokenizer.convert_ids_to_tokens(example.target) == ["▁no", "</s>"]
    assert t5_tokenizer.convert_ids_to_tokens(made.label_tokens()) == ["▁yes", "▁no"]
    ids, mask = made.label_sequences()
    assert mask.all()
    assert ids[1].tolist() == example.target.tolist()


def test_t5_labels_of_several_pieces(t5_tokenizer):
    made = make(t5_tokenizer, False, labels=("yes", "ab"))
    with pytest.raises(UserError, match=r"label 'ab' is 3 tokens \(▁ a b\)"):
        made.label_tokens()
    assert make(t5_tokenizer, False, labels=()).encode(row(label="ab")).label == -1


def test_labels_that_share_a_token(t5_tokenizer):
    backend = tokenizers.Tokenizer.from_str(t5_tokenizer.backend_tokenizer.to_str())
    backend.normalizer = tokenizers.normalizers.Lowercase()
    made = make(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), False, labels=("yes", "YES"))
    assert not made.labels_are_tokens()
    with pytest.raises(UserError, match=r"labels 'yes' and 'YES' are the same token \(▁yes\)"):
        made.label_tokens()


@pytest.mark.parametrize("causal", [True, False])
def test_cutting_keeps_the_suffix_and_the_target(causal, causal_tokenizer, t5_tokenizer, caplog):
    tokenizer = causal_tokenizer if causal else t5_tokenizer
    made = make(tokenizer, causal, max_length=24)
    short, long = make(tokenizer, causal).encode(row()), row(LONG, "no")
    with caplog.at_level(logging.WARNING):
        examples = made.encode_all([row(), long, long])
        made.encode_all([long])
    assert examples[0].source.tolist() == short.source.tolist()
    cut = tokenizer.decode(examples[1].source)
    assert cut.replace("</s>", "").strip().lower().endswith("type:" if causal else ":")
    assert cut.startswith("the quick")
    assert 20 < len(examples[1].source) <= 24
    if not causal:
        assert examples[1].source[-1] == 1
    assert examples[1].target.tolist() == make(tokenizer, causal, max_length=999).encode(long).target.tolist()
    assert made.cut_count == 3
    assert [record.getMessage() for record in caplog.records] == [
        "task 't': 2 of 3 rows hold more than max_length=24 tokens and were cut"
    ]
    # What is served is cut as what was trained on.
    assert made.encode_text(made.task.source_text(LONG)).tolist() == examples[1].source.tolist()


def test_the_longest_cut_that_fits_is_taken(causal_tokenizer):
    # One token a letter here, so the cut is exact: 24 tokens, of which "\nType:" takes 6.
    made = make(causal_tokenizer, True, max_length=24)
    assert causal_tokenizer.decode(made.encode_text(LONG + "\nType:")) == LONG[:18] + "\nType:"


def test_t5_without_suffix_is_cut_by_tokens(t5_tokenizer):
    made = make(t5_tokenizer, False, input="text: {text}", max_length=11)
    full = t5_tokenizer("text: " + LONG)["input_ids"]
    assert made.encode(row(LONG)).source.tolist() == [*full[:10], 1]


def test_too_long_can_be_an_error(causal_tokenizer):
    made = make(causal_tokenizer, True, max_length=24, on_too_long="error")
    with pytest.raises(UserError, match=r"a\.csv, line 7: the source is \d+ tokens, more than max_length=24"):
        made.encode(row(LONG))
    assert made.cut_count == 0
    free = make(causal_tokenizer, True, labels=(), max_target_length=4, on_too_long="error")
    with pytest.raises(UserError, match=r"line 7: the target is 8 tokens, more than max_target_length=4"):
        free.encode(row(label="answer"))


def test_free_text_targets_are_cut_before_their_end_token(causal_tokenizer):
    made = make(causal_tokenizer, True, labels=(), max_target_length=4)
    assert causal_tokenizer.decode(made.encode(row(label="answer")).target) == " an<end>"
    assert made.cut_count == 1


def test_no_room_for_the_suffix(causal_tokenizer):
    with pytest.raises(UserError, match=r"max_length=6 leaves no room"):
        make(causal_tokenizer, True, max_length=6).encode(row(LONG))


def test_batched_and_single_encoding_agree(causal_tokenizer, t5_tokenizer):
    for tokenizer, causal in ((causal_tokenizer, True), (t5_tokenizer, False)):
        made = make(tokenizer, causal, max_length=20, labels=())
        rows = [row("word " * n, f"answer {n}") for n in range(1, 9)]
        for example, each in zip(made.encode_all(rows), rows, strict=True):
            single = made.encode(each)
            assert example.source.tolist() == single.source.tolist()
            assert example.target.tolist() == single.target.tolist()


def test_settings_out_of_range(causal_tokenizer):
    for options in ({"max_length": 0}, {"on_too_long": "drop"}, {"max_target_length": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            make(causal_tokenizer, True, **options)
    with pytest.raises(UserError, match="has no labels"):
        make(causal_tokenizer, True, labels=()).label_tokens()
