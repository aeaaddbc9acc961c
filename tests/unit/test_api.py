"""Test the public Python API: fit, encode, save, load and evaluate on planted data, and what it refuses."""

import math
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import adasid
from adasid import config
from adasid.api.items import Items
from adasid.distributed import Workers, settle
from adasid.errors import ConfigError, InputError
from adasid.metrics.longtail import spearman
from adasid.metrics.richness import RichnessScale, fit_scale
from adasid.tables import BEHAVIOR, PAD
from adasid.tokenizers import artifact
from adasid.tokenizers.encode import encode_rows
from adasid.training.tokenizer import TokenizerTraining
from tests.planted import catalogue, shard

TRAINING = {"epochs": 4, "batch": 128, "log_epochs": 2}
MIXTURE = {"codebook_size": 8, "latent_width": 16, "hidden": [32, 24], "projector_width": 16, "training": TRAINING}
RESIDUAL = {"codebook_size": 8, "latent_width": 8, "hidden": [32, 24], "training": TRAINING}
FITS = {
    "adc-sid": MIXTURE,
    "ada-sid": {**MIXTURE, "threshold": 0.2},
    "rq-vae": RESIDUAL,
    "quasid": RESIDUAL,
    "rq-kmeans": {"codebook_size": 8, "levels": {"text": 2, "behavior": 1}},
    "opq": {"codebook_size": 8, "levels": 2, "width": 8},
    "item-id": {"codebook_size": 8},
    "random": {"codebook_size": 8},
}
ROWS = np.arange(400)[:, None]
CODES = np.array([[0, 0], [0, 0], [1, 0], [PAD, 1]])


def matrix(table, name):
    width = len(next(row for row in table[name].to_pylist() if row))
    return np.array([row or [np.nan] * width for row in table[name].to_pylist()], np.float32)


@pytest.fixture(scope="module")
def table():
    return catalogue(items=400)[0]


@pytest.fixture(scope="module")
def data(table):
    return {name: matrix(table, name) for name in ("text", "visual", BEHAVIOR)}


@pytest.fixture(scope="module")
def pairs():
    cluster = catalogue(items=400)[1]
    rng = np.random.default_rng(0)
    return np.array([(i, rng.choice(np.flatnonzero(cluster == cluster[i]))) for i in range(400) for _ in range(3)])


def fitted(name, data, pairs, **changed):
    given = {"pairs": pairs} if name == "quasid" else {}
    counts = np.maximum(0, 200 - np.arange(400))  # as in the table
    given = {"richness": np.linspace(1, 0, 400), "counts": counts, "progress": False, **given}
    return adasid.fit(name, data, **{**given, **FITS[name], **changed})


def rows_of(table):
    return table.append_column("sampled", pa.array(np.zeros(len(table), bool))).combine_chunks().to_batches()[0]


@pytest.mark.parametrize("name", FITS)
def test_codes_equal_those_of_the_spark_task(name, table, data, pairs):
    tokenizer = fitted(name, data, pairs)
    ours = tokenizer.encode(data, richness=table["richness"].to_numpy())
    theirs = encode_rows(tokenizer.tokenizer, rows_of(table))
    for column in ("codes", "weights", "active", "tokens"):
        values = np.array(theirs.column(column).to_pylist(), getattr(ours, column).dtype)
        assert np.array_equal(getattr(ours, column), values), column
    assert len(ours) == 400 and ours.codes.dtype == np.int32 and ours.weights.dtype == np.float32


def test_the_example_of_the_documentation(table, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, behavior = data["text"], torch.from_numpy(data[BEHAVIOR] * np.linspace(9, 1, 400, dtype=np.float32)[:, None])
    counts = table["interactions"].to_numpy()
    tokenizer = adasid.fit("adc-sid", {"text": text, "behavior": behavior}, counts=counts, seed=17, **MIXTURE)
    sids = tokenizer.encode({"text": text, "behavior": behavior})
    tokenizer.save("my-tokenizer")
    again = adasid.load("my-tokenizer")
    assert again.digest == tokenizer.digest and again.manifest == tokenizer.manifest
    other = again.encode({"text": text, "behavior": behavior})
    for column in ("codes", "weights", "active", "tokens"):
        assert np.array_equal(getattr(sids, column), getattr(other, column))
    metrics = adasid.evaluate_codes(sids, {"text": text, "behavior": behavior})
    assert metrics.items == 400 and 0 < metrics.readout["text"] < 1
    assert again.manifest.richness["source"] == "norm" and "adc-sid" in repr(again)
    assert tokenizer.settings.training.epochs == 4 and tokenizer.widths == {"text": 24, "behavior": 12}


@pytest.mark.parametrize("name", ["adc-sid", "quasid", "rq-kmeans"])
def test_weights_equal_those_of_the_pipelines_worker(name, table, data, pairs, tmp_path):
    settings = fitted(name, data, pairs).settings
    settle(1)
    torch.manual_seed(17)
    shard_ = shard(table, settings.inputs)
    if settings.pairs:
        from adasid.data.shards import Pairs, Shard

        read = lambda columns: table.select(columns).to_batches(max_chunksize=97)  # noqa: E731
        shard_ = Shard(read, settings.inputs, pairs=Pairs(*pairs.T))
        torch.manual_seed(17)
    loop = TokenizerTraining(artifact.build(settings, shard_.widths), settings, shard_, tmp_path, 17, Workers(), "v0")
    loop.run()
    manifest = artifact.write(tmp_path / "m", loop.tokenizer, settings, {})
    assert fitted(name, data, pairs).digest == manifest.digest
    assert fitted(name, data, pairs, seed=18).digest != manifest.digest


def test_one_item_many_items_and_none_give_the_same(data, pairs):
    tokenizer = fitted("adc-sid", data, pairs)
    richness = np.linspace(1, 0, 400)
    whole = tokenizer.encode(data, richness=richness)
    parts = tokenizer.encode(data, richness=richness, batch_size=7)
    assert np.array_equal(whole.codes, parts.codes)
    assert np.allclose(whole.weights, parts.weights, atol=1e-6)
    for row in (0, 13, 399):
        one = tokenizer.encode({m: x[row : row + 1] for m, x in data.items()}, richness=richness[row : row + 1])
        assert np.array_equal(one.codes[0], whole.codes[row])
    none = tokenizer.encode({m: x[:0] for m, x in data.items()}, richness=[])
    assert none.codes.shape == none.tokens.shape == (0, whole.codes.shape[1])


def test_tables_frames_and_tensors_are_read_alike(table, data, pairs):
    tokenizer = fitted("adc-sid", data, pairs)
    expected = tokenizer.encode(data, richness=table["richness"].to_numpy())
    fixed = pa.table({m: pa.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1]) for m, x in data.items()})
    fixed = fixed.append_column("richness", table["richness"])
    frame = table.to_pandas()
    frame["note"] = [object()] * len(frame)
    for form in (table, table.to_batches()[0], fixed, frame, pd.DataFrame(frame)):
        result = tokenizer.encode(form)
        assert np.array_equal(result.codes, expected.codes) and np.array_equal(result.weights, expected.weights)
    assert list(tokenizer.encode(frame).item_ids[:2]) == ["i00000", "i00001"] and expected.item_ids is None
    richness = table["richness"].to_numpy()
    tensors = {m: torch.from_numpy(x).double().requires_grad_() for m, x in data.items()}
    lists = {m: [None if np.isnan(row[0]) else row.tolist() for row in x] for m, x in data.items()}
    for form in (tensors, lists, {m: frame[m] for m in data}, {m: table[m] for m in data}):
        assert np.array_equal(tokenizer.encode(form, richness=richness).codes, expected.codes)
    for form in (table, frame):
        assert adasid.fit("adc-sid", form, progress=False, **MIXTURE).digest == tokenizer.digest


def test_pairs_are_rows_also_of_a_table_in_another_order(table, pairs):
    """The first row of a pair is trained with the second, whatever ``item_index`` the rows have."""
    plain, order = table.drop_columns(["item_index"]), np.random.default_rng(1).permutation(len(table))
    index = pa.array(1000 + np.arange(len(table)))
    moved = plain.append_column("item_index", index).take(order)  # the same items under other row numbers
    given = {"pairs": pairs, "progress": False, "richness": np.zeros(len(table)), **RESIDUAL}
    one = adasid.fit("quasid", plain.append_column("item_index", index), **given)
    other = adasid.fit("quasid", moved, **{**given, "pairs": np.argsort(order)[pairs]})
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (pa.list_view(pa.float32()), [[1.0, 2.0], [3.0, 4.0], None]),
        (pa.large_list_view(pa.float64()), [[1.0, 2.0], [3.0, 4.0], None]),
        (pa.list_(pa.decimal128(5, 2)), [[Decimal(1), Decimal(2)], [Decimal(3), Decimal(4)], None]),
        (pa.fixed_shape_tensor(pa.float32(), [2]), [[1.0, 2.0], [3.0, 4.0], None]),
    ],
)
def test_a_modality_is_read_in_whatever_form_arrow_has_it(kind, rows):
    lists = pa.array(rows, getattr(kind, "storage_type", kind))
    column = pa.ExtensionArray.from_storage(kind, lists) if hasattr(kind, "storage_type") else lists
    items = Items.of(pa.table({"text": column, "visual": pa.array([[1.0]] * 3), "tags": pa.array([["a"]] * 3)}), "fit")
    batch = items.batch(0, 3, items.widths(items.columns, "fit"))
    assert set(items.columns) == {"text", "visual"} and batch.present["text"].tolist() == [True, True, False]
    assert batch.vectors["text"].tolist() == [[1, 2], [3, 4], [0, 0]]


def test_what_is_no_vector_of_numbers_is_named_and_not_left_out():
    vectors = pa.array([[1.0]] * 2)
    with pytest.raises(InputError, match=r"fit: text has vectors that are written as text \(\[0.1, 0.2\]"):
        Items.of(pd.DataFrame({"visual": [[1.0]] * 2, "text": ["[0.1, 0.2]"] * 2}), "fit")
    assert set(Items.of(pd.DataFrame({"visual": [[1.0]] * 2, "title": ["[2 Pack] x"] * 2}), "fit").columns) == {
        "visual"
    }
    with pytest.raises(InputError, match="fit: text is a column of list<item: list<item: double>>"):
        Items.of(pa.table({"visual": vectors, "text": pa.array([[[1.0]], None])}), "fit")
    with pytest.raises(InputError, match="fit: item_id of row 1 is null"):
        Items.of(pa.table({"visual": vectors, "item_id": pa.array([2**60 + 1, None])}), "fit")
    hidden = np.ma.masked_array(np.ones((2, 2)), mask=[[False, False], [True, True]])
    assert Items.of({"text": hidden}, "fit").batch(0, 2, {"text": 2}).present["text"].tolist() == [True, False]


def test_controls_say_that_they_follow_item_index(data, table):
    tokenizer = fitted("random", data, None)
    with pytest.warns(UserWarning, match="codes of 'random' follow item_index, and the data have no such column"):
        rows = tokenizer.encode({name: values[10:20] for name, values in data.items()})
    indexed = tokenizer.encode(table.slice(10, 10))
    assert not np.array_equal(rows.codes, indexed.codes)
    assert np.array_equal(indexed.codes, tokenizer.encode(table).codes[10:20])


def test_a_row_of_nan_or_zeros_says_that_the_item_lacks_the_modality(data, pairs):
    tokenizer = fitted("adc-sid", data, pairs)
    row = {m: np.repeat(x[:1], 3, axis=0) for m, x in data.items()}
    row["visual"][1] = np.nan
    row["visual"][2] = 0
    result = tokenizer.encode(row, richness=np.ones(3))
    slot = [slot.kind for slot in result.slots].index("visual")
    assert (result.codes[:, slot] == PAD).tolist() == [False, True, True]
    assert result.tokens[1, slot] == f"<{result.slots[slot].name}_pad>" and result.weights[1, slot] == 0
    assert np.array_equal(result.codes[1], result.codes[2])


def test_richness_is_the_scaled_norm_and_follows_counts_where_the_norm_does_not():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 1000, 5000)
    norms = np.log1p(counts + rng.random(5000) * 50).astype(np.float32)
    scale = fit_scale(norms, counts)
    assert scale.source == "norm" and scale.spearman == pytest.approx(spearman(norms, counts.astype(float)), abs=1e-6)
    assert (scale.low, scale.high) == pytest.approx(np.percentile(norms, [0.5, 99.5]), rel=1e-6)
    present = np.arange(5000) != 7
    richness = scale.richness(norms, present)
    assert richness[7] == 0 and richness.min() == 0 and richness.max() == 1 and richness.dtype == np.float32
    other = fit_scale(-norms + norms.max(), counts)
    assert other.source == "count" and other.spearman < -0.9
    assert (other.low, other.high) == (math.log1p(counts.min()), math.log1p(counts.max()))
    assert fit_scale(-norms + norms.max(), None).source == "norm", "without counts there is no check"
    flat = fit_scale(np.ones(9, np.float32), np.arange(9))
    assert flat.source == "count" and flat.spearman == 0
    assert (fit_scale(np.ones(9, np.float32), None).richness(np.ones(9), np.ones(9, bool)) == 0.5).all()
    ties = np.where(counts < 800, 1.0, norms).astype(np.float32)  # items below a threshold share a vector
    known = fit_scale(ties, counts).spearman
    assert known == pytest.approx(spearman(ties.astype(float), counts.astype(float)))
    order = rng.permutation(5000)
    assert fit_scale(ties[order], counts[order]).spearman == known, "the order of rows is no evidence"
    with pytest.raises(InputError, match="inf; bring vectors of finite norm"):
        fit_scale(np.array([1, np.inf], np.float32), None)


def test_where_richness_follows_counts_encode_asks_for_them(table, data):
    counts = table["interactions"].to_numpy()
    with pytest.warns(UserWarning, match=r"Spearman\(norm of behaviour, count\) is -0\.\d+, below 0.2"):
        tokenizer = adasid.fit("adc-sid", data, counts=counts, progress=False, **MIXTURE)
    scale = RichnessScale(**tokenizer.manifest.richness)
    given = tokenizer.encode(data, counts=torch.from_numpy(counts.copy()))
    explicit = tokenizer.encode(data, richness=scale.richness(counts, ~np.isnan(data[BEHAVIOR]).any(1)))
    assert np.array_equal(given.weights, explicit.weights)
    with pytest.warns(UserWarning, match="pass counts="):
        without = tokenizer.encode(data)
    assert np.array_equal(without.codes, given.codes) and not np.array_equal(without.weights, given.weights)


def test_the_library_is_quiet_where_asked_and_leaves_torch_as_it_was(data, capfd):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    adasid.fit("rq-vae", data, progress=False, **RESIDUAL)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.rand(2), expected) and not torch.are_deterministic_algorithms_enabled()
    adasid.fit("rq-vae", data, **RESIDUAL)
    assert "rq-vae: epoch 4/4  loss" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("adcsid", {}, r"no tokenizer 'adcsid'; did you mean 'adc-sid'\? The names are adc-sid, "),
        ("adc-sid", {"codebok_size": 3}, "'adc-sid' has no setting 'codebok_size'; did you mean 'codebook_size'?"),
        ("adc-sid", {"sed": 3}, "did you mean 'seed'"),
        ("adc-sid", {"epochs": 3}, "did you mean training={'epochs': ...}"),
        ("adc-sid", {"training": {"epoch": 3}}, "unknown key 'training.epoch'; did you mean 'training.epochs'"),
        ("adc-sid", {"codebook_size": 1}, "codebook_size is 1: input should be greater than or equal to 2"),
        ("adc-sid", {"content_experts": {"audio": 1}}, "reads 'audio' but the content of the data is"),
        ("rq-vae", {"pairs": [[0, 1]]}, "does not learn from pairs with these settings; leave pairs out"),
        ("adc-sid", {"seed": -1}, "seed is -1"),
        ("adc-sid", {"threads": 0}, "threads is 0"),
        ("adc-sid", {"device": "gpu"}, "device is 'gpu'; it must be one that torch knows"),
        ("adc-sid", {"device": "cuda:99"}, "device is 'cuda:99', but torch sees"),
        ("adc-sid", {"name": "x"}, "'adc-sid' has no setting 'name'"),
    ],
)
def test_wrong_names_and_settings_are_refused_with_the_nearest_one(name, settings, words, data):
    with pytest.raises(ConfigError) as caught:
        adasid.fit(name, data, progress=False, **settings)
    assert words.replace("\\", "") in str(caught.value) and "\n" not in str(caught.value)


def test_settings_may_be_numpy_numbers_and_parts_of_a_section(data):
    tokenizer = adasid.fit("rq-kmeans", data, progress=False, codebook_size=np.int64(5), levels=2, rounds=np.int32(3))
    expected = config.RqKmeansSettings(codebook_size=5, levels=2, rounds=3, content=("text", "visual"))
    assert tokenizer.settings == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({BEHAVIOR: None}, "'adc-sid' reads 'behavior', which the data do not have (they have: text, visual)"),
        ({"text": np.ones(5)}, "text is float64 of shape (5,), not a matrix of one row for each item; of one item"),
        ({"text": np.ones((5, 4))}, "the modalities differ in rows (text has 5, visual has 400"),
        ({"text": np.full((400, 4), np.nan)}, "no item has the modality 'text'"),
        ({"text": [["a"]] * 400}, "text is "),
        ({"text": [[1.0], [1.0, 2.0]] * 200}, "text of row 1 has width 2, not 1"),
        ({"text": np.where(ROWS == 9, [np.nan, 1], 1.0)}, "text of row 9 has a value that is not finite"),
        ({"text": np.where(ROWS == 9, 1e300, np.ones((400, 2)))}, "text of row 9 has a value that is not finite"),
    ],
)
def test_data_that_cannot_be_read_are_refused(change, words, data):
    changed = {name: values for name, values in {**data, **change}.items() if values is not None}
    with pytest.raises(InputError) as caught:
        adasid.fit("adc-sid", changed, progress=False, **MIXTURE)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: adasid.fit("quasid", d), "learns from co-engaged pairs, and pairs is None; pass pairs="),
        (lambda d: adasid.fit("quasid", d, pairs=[[0, 400]]), "pairs names rows 0 to 400, but there are 400 items"),
        (lambda d: adasid.fit("quasid", d, pairs=[0.5]), "pairs is float64 of shape (1,)"),
        (lambda d: adasid.fit("adc-sid", d["text"]), "the data are of type ndarray; pass a dict"),
        (lambda d: adasid.fit("adc-sid", {}), "the data have no modality"),
        (lambda d: adasid.fit("adc-sid", d, counts=[1, 2]), "counts is int64 of shape (2,); pass one number for each"),
        (lambda d: adasid.fit("adc-sid", d, counts=np.full(400, -1)), "counts of row 0 is -1"),
        (lambda d: adasid.fit("adc-sid", d, counts=np.full(400, 0.5)), "counts of row 0 is 0.5; it must be"),
        (lambda d: adasid.fit("adc-sid", d, richness=np.full(400, 2)), "richness of row 0 is 2"),
        (lambda d: adasid.fit("adc-sid", {m: x[:0] for m, x in d.items()}), "the data have no rows"),
        (lambda d: adasid.load("nowhere"), "nowhere is not a folder; give the folder of a saved tokenizer"),
        (lambda d: adasid.evaluate_codes([0, 1]), "codes are int64 of shape (2,); pass integers [n, L]"),
        (lambda d: adasid.evaluate_codes([[-2]]), "codes run from -2 to 0"),
        (lambda d: adasid.evaluate_codes([[3]], codebook_size=3), "codes run from 0 to 3"),
        (lambda d: adasid.evaluate_codes(CODES, d), "vectors have 400 rows, codes have 4"),
        (lambda d: adasid.evaluate_codes(ROWS, d, sample=0), "sample is 0 and queries"),
        (lambda d: adasid.evaluate_codes(ROWS * 5000, d), "the regression of 3 modalities on 1 slots of 1995001 codes"),
    ],
)
def test_errors_name_the_thing_the_value_and_the_fix(call, words, data):
    with pytest.raises(InputError) as caught:
        call(data)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_encoding_refuses_other_widths_and_missing_modalities(data, pairs, tmp_path):
    tokenizer = fitted("rq-vae", data, pairs)
    with pytest.raises(InputError, match="text of row 0 has width 3, not 24; bring vectors of the embedding"):
        tokenizer.encode({**data, "text": np.ones((400, 3))})
    with pytest.raises(InputError, match="tokenizer 'rq-vae' reads 'visual', which the data do not have"):
        tokenizer.encode({"text": data["text"]})
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        tokenizer.save(tmp_path / "file" / "model")


def test_what_is_absent_is_named_by_the_package_that_brings_it(tmp_path):
    (tmp_path / "lake").mkdir()
    code = (
        "import sys; sys.modules['deltalake'] = sys.modules['mlflow'] = sys.modules['mlflow.artifacts'] = None\n"
        "import adasid\n"
        f"for source in ({str(tmp_path)!r}, 'models:/adasid-demo@champion'):\n"
        "    try: adasid.load(source)\n"
        "    except adasid.errors.InputError as error: print(error)\n"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "the package deltalake is missing; run `pip install deltalake`" in lines[0]
    assert "the package mlflow is missing; run `pip install mlflow`" in lines[1]


def test_code_metrics_by_hand():
    result = adasid.evaluate_codes(CODES, codebook_size=2)
    assert (result.items, result.distinct, result.largest_group) == (4, 3, 2)
    assert (result.collision_items, result.collision_distinct) == (0.5, 0.25)
    assert result.utilisation == (1.0, 1.0) and result.pad == (0.25, 0.0) and result.top1 == (2 / 3, 0.75)
    assert result.entropy[1] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert result.perplexity[0] == pytest.approx(math.exp(result.entropy[0]))
    assert result.readout == {} and result.shared_cosine is None and result.duplicates_kept is None
    vectors = np.array([[1, 0], [1, 0.01], [0, 1], [1, 0]])
    result = adasid.evaluate_codes(torch.from_numpy(CODES), vectors)
    assert result.shared_cosine == pytest.approx(1, abs=1e-3) and result.duplicates_kept == pytest.approx(1 / 3)


def test_codes_that_follow_the_topic_read_its_vectors_out(data):
    cluster = catalogue(items=400)[1]
    good = adasid.evaluate_codes(cluster[:, None], data)
    bad = adasid.evaluate_codes(np.random.default_rng(0).permutation(cluster)[:, None], data, sample=200)
    assert good.readout["text"] < 0.2 and bad.readout["text"] > 0.9
    assert adasid.evaluate_codes(cluster[:, None], data["text"]).readout["vectors"] == good.readout["text"]
