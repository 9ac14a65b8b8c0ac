"""Tokenizers rebuilt from GGUF metadata give the ids of the tokenizers that the metadata describe."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from deptjax.errors import UserError
from deptjax.interop.tokenizers import PRE_TOKENIZERS, chosen_tokenizer, load_tokenizer, tokenizer_from_gguf
from deptjax.testing import tiny_tokenizer

CORPUS = [
    "The film was not bad, and the ending was good. It's 12345 seconds long; we've seen 7 films.",
    "naïve café über straße\n\nnew  paragraph\twith tabs  and   spaces",
    "the actor and the plot and the scene, the story of the ending 2024",
]
TEXTS = [
    *CORPUS,
    "don't  stop 12345 naïve\n\nA",
    "  leading and trailing  ",
    "emoji 🙂 and 漢字",
    "I'LL SEE",
    "x=1;\r\ny = 22 ",
    "",
]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(pre: str) -> tuple[Any, dict[str, Any]]:
    """Returns a byte-level BPE trained on the corpus, and the metadata that describe it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    first = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(llama3), behavior="isolated")],
    }.get(pre, [])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in CONTROL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    return tokenizer, metadata


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_ids(pre: str) -> None:
    original, metadata = byte_level(pre)
    rebuilt = tokenizer_from_gguf(metadata)
    assert len(original.encode(CORPUS[0]).ids) < len(CORPUS[0])  # something was merged
    for text in TEXTS:
        ids = rebuilt(text).input_ids
        assert ids == original.encode(text).ids
        assert rebuilt.decode(ids) == text
    assert rebuilt(f"{CONTROL[1]}the film{CONTROL[2]}").input_ids[0] == 1
    assert rebuilt.decode(rebuilt(f"{CONTROL[1]}the{CONTROL[2]}").input_ids, skip_special_tokens=True) == "the"
    assert (rebuilt.bos_token_id, rebuilt.eos_token_id, rebuilt.pad_token_id, rebuilt.unk_token_id) == (1, 2, 2, 0)
    assert rebuilt.chat_template == metadata["tokenizer.chat_template"]
    assert len(rebuilt) == len(metadata["tokenizer.ggml.tokens"])


def test_begin_and_end_are_added_when_the_file_says_so() -> None:
    _, metadata = byte_level("gpt-2")
    plain = tokenizer_from_gguf(metadata)("the plot").input_ids
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert tokenizer_from_gguf(metadata)("the plot").input_ids == [1, *plain, 2]


def sentencepiece() -> tuple[Any, dict[str, Any]]:
    """Returns a sentencepiece BPE with byte fallback, and the metadata that describe it."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    stream = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_writer=stream,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        character_coverage=0.98,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    original = SentencePieceProcessor(model_proto=stream.getvalue())
    count = original.vocab_size()
    kinds = [
        2 if original.is_unknown(i) else 3 if original.is_control(i) else 6 if original.is_byte(i) else 1
        for i in range(count)
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [original.get_score(i) for i in range(count)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return original, metadata


def test_sentencepiece_ids() -> None:
    original, metadata = sentencepiece()
    rebuilt = tokenizer_from_gguf(metadata)
    assert any(metadata["tokenizer.ggml.token_type"][i] == 6 for i in original.encode("🙂"))
    for text in [text for text in TEXTS if text]:
        ids = rebuilt(text).input_ids
        assert ids == [1, *original.encode(text)]
        assert rebuilt.decode(ids, skip_special_tokens=True) == text
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert tokenizer_from_gguf(metadata)("the film").input_ids == original.encode("the film")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre"),
        ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.bos_token_id": 10_000}, "tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
    ],
)
def test_other_tokenizers_are_refused_by_name(fields: dict[str, Any], field: str) -> None:
    _, metadata = byte_level("gpt-2")
    with pytest.raises(UserError, match=rf"m\.gguf: '{field}'") as caught:
        tokenizer_from_gguf({**metadata, **fields}, "m.gguf")
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_tokenizer_file(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("this film is good").input_ids == tiny_tokenizer()("this film is good").input_ids
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_bytes_need_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert load_tokenizer(tmp_path)("ab").input_ids == [ord("a") + 3, ord("b") + 3, 1]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer can be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")


def sentencepiece_model(folder: Path, kind: str) -> Path:
    """Trains a sentencepiece model on the corpus, with T5's special tokens, and returns its file."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(folder / kind),
        model_type=kind,
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / f"{kind}.model"


def test_a_chosen_tokenizer_is_a_folder_a_file_or_one_that_is_loaded(tmp_path: Path) -> None:
    loaded = tiny_tokenizer(("film", "good"))
    assert chosen_tokenizer(loaded) is loaded
    loaded.save_pretrained(tmp_path / "folder")
    alone = tmp_path / "alone" / "tokenizer.json"
    alone.parent.mkdir()
    alone.write_bytes((tmp_path / "folder" / "tokenizer.json").read_bytes())
    for place in (tmp_path / "folder", str(tmp_path / "folder" / "tokenizer.json"), alone):
        tokenizer = chosen_tokenizer(place)
        assert tokenizer("good film").input_ids == [4, 3]
        assert len(tokenizer) == 5
    # The file alone does not say which token ends a text; the usual one is taken where it is there.
    named = json.loads(alone.read_text())
    named["added_tokens"] = [{**named["added_tokens"][0], "id": 1, "content": "</s>"}, *named["added_tokens"][1:]]
    alone.write_text(json.dumps(named))
    assert chosen_tokenizer(alone).eos_token_id == 1


def test_a_sentencepiece_file_is_t5s_tokenizer(tmp_path: Path) -> None:
    import sentencepiece

    file = sentencepiece_model(tmp_path, "unigram")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = chosen_tokenizer(file)
    for text in CORPUS[::2]:
        assert tokenizer(text).input_ids == [*pieces.encode(text), 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 160)
    with pytest.raises(UserError, match="not a unigram model, as T5's are"):
        chosen_tokenizer(sentencepiece_model(tmp_path, "bpe"))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.model", b"\xff\xff", r"x\.model: not a sentencepiece model"),
        ("tokenizer.json", b"{}", r"tokenizer\.json: not a tokenizer\.json"),
        ("tokenizer.json", b'{"added_tokens": []}', "no tokenizer can be read from this file"),
        ("words.txt", b"a b", r"expected a tokenizer's folder, tokenizer\.json"),
    ],
)
def test_a_chosen_file_that_is_no_tokenizer_is_one_line(name: str, content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        chosen_tokenizer(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("./absent", "there is no such file or folder"),
        ("absent.model", "there is no such file or folder"),
        (Path("absent"), "there is no such file or folder"),
        ("", "there is no such file or folder"),
        ("packaged:t6", "unknown packaged tokenizer 't6'; there are: t5, mt5"),
        ("nobody/no-such-model-3.2", "the model hub is not reachable"),
    ],
)
def test_a_chosen_name_that_leads_nowhere_is_one_line(name: str | Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        chosen_tokenizer(name)
    assert "\n" not in str(caught.value)
