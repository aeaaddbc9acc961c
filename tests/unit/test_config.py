import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from adasid import config
from adasid.config import secrets, yaml12
from adasid.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"


def test_base_yaml_shows_every_key_and_default():
    assert (CONF / "base.yaml").read_text() == config.render_base(), "run `make conf`"
    assert config.load(CONF / "base.yaml") == config.Config()


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path):
    assert config.load(path).name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tokenizer.codebok_size=3", ["unknown key 'tokenizer.codebok_size'", "'tokenizer.codebook_size'"]),
        ("sed=3", ["unknown key 'sed'", "'seed'"]),
        ("source.synthetic.item=3", ["'source.synthetic.items'"]),
        ("seed=many", ["seed is 'many'", "integer"]),
        ("seed=2.5", ["seed is 2.5"]),
        ("behavior.heads=3", ["behavior.width 64", "behavior.heads 3"]),
        ("features.ranking_holdout=[0.0, 0.1]", ["features.ranking_holdout is [0.0, 0.1]", "two shares above 0"]),
        ("features.head_share=0.9", ["features.head_share", "at most 1"]),
        ("behavior.max_length=90", ["behavior.max_length 90", "features.max_length 50"]),
        ("ray.workers=16", ["features.user_buckets is 8", "ray.workers is 16"]),
        ("behavior.source=column", ["behavior_width is 0"]),
        ("source.kind=arrays", ["source.synthetic is set but source.kind is 'arrays'", "remove the section"]),
        ("source={kind: arrays}", ["source.arrays", "missing"]),
        ("tokenizer.content_experts={}", ["content_experts is empty"]),
        ("tokenizer.router.gate=switch", ["router.gate is 'switch'", "straight_through: sum"]),
        ("tokenizer.content_experts={text: 0}", ["content_experts.text is 0"]),
        ("tokenizer.router.sparsity=1.0", ["tokenizer.router.sparsity is 1.0"]),
        ("name=../x", ["name is '../x'"]),
        ("tokenizer.training.warmup_epochs=200", ["warmup_epochs 200", "is not below"]),
        ("runs_dir=ftp://bucket/runs", ["runs_dir is", "folder"]),
        ("seed=99999999999", ["seed is 99999999999"]),
        ("source.synthetic.users=90000", ["interactions 400000 is less than 5 a user", "90000 users"]),
        ("novalue", ["dotted.key=value"]),
        ("seed=[1", ["not valid YAML"]),
        ("spark.conf.spark.x=1", ["spark.conf.spark is dict", "--set 'spark.conf={spark.x.y: value}'"]),
    ],
)
def test_bad_settings_are_named_with_the_fix(override, words):
    with pytest.raises(ConfigError) as error:
        config.load(CONF / "demo.yaml", [override])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "override",
    [
        "spark.conf.spark.hadoop.fs.s3a.secret.key=S3CRET",
        "spark.conf={spark.hadoop.fs.s3a.secret.key: [S3CRET]}",
        "tracking.uri=[http://user:S3CRET@host]",
        "tracking.timeout=http://user:S3CRET@host",
        "tracking.uri={http://user:S3CRET@host",
        "publish={S3CRET: [",
    ],
)
def test_an_error_shows_no_secret(override):
    with pytest.raises(ConfigError) as error:
        config.load(CONF / "demo.yaml", [override])
    assert "S3CRET" not in str(error.value) and override.partition("=")[0].split(".")[0] in str(error.value)


def test_a_section_that_has_no_effect_is_an_error(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"source": {"kind": "synthetic", "tables": {"items": "a", "interactions": "b"}}}))
    with pytest.raises(ConfigError, match=r"source\.tables is set but source.kind is 'synthetic'"):
        config.load(path)


@pytest.mark.parametrize("text", ["a: [", "- 1", "name: 3"])
def test_unreadable_files(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        config.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "absent.yaml")


def test_digest_changes_with_any_part():
    a = config.Config()
    assert config.digest(a) == config.digest(config.Config())
    assert config.digest(a.tokenizer, 1) != config.digest(a.tokenizer, 2)
    assert config.digest(a.tokenizer) != config.digest(a.tokenizer.model_copy(update={"codebook_size": 101}))


def test_a_section_given_in_part_keeps_the_tokenizers_own_defaults():
    ada = config.build({"tokenizer": {"name": "ada-sid", "router": {"hidden": 32}}}).tokenizer
    assert (ada.router.hidden, ada.router.sparsity, ada.router.item_weight) == (32, 0.4, 0.1)
    adasid = config.build(
        {"tokenizer": {"name": "adasid", "contrast": {"temperature": 0.1}, "repulsion": {"margin": 1.5}}}
    ).tokenizer
    assert (adasid.contrast.weight, adasid.contrast.progress, adasid.contrast.temperature) == (
        (0.0, 0.1),
        (0.1, 0.9),
        0.1,
    )
    assert (adasid.repulsion.kind, adasid.repulsion.margin) == ("adaptive", 1.5)
    other = config.build({"tokenizer": {"name": "adasid", "repulsion": {"kind": "hamr", "radius": 1}}}).tokenizer
    assert (other.repulsion.kind, other.repulsion.full_margin) == ("hamr", 0.8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokenizer": {"name": "rqvae"}}, ["tokenizer.name is 'rqvae'", "'rq-vae'"]),
        ({"tokenizer": {"name": "rq-vae", "levls": 3}}, ["unknown key 'tokenizer.levls'", "'tokenizer.levels'"]),
        (
            {"features": {"content": ["text"]}, "tokenizer": {"name": "opq", "content": ["visual"]}},
            ["tokenizer (opq) reads 'visual'", "features.content"],
        ),
        ({"tokenizer": {"name": "opq", "width": 100}}, ["tokenizer.width 100 is not a multiple of tokenizer.levels 6"]),
        ({"tokenizer": {"name": "opq", "engine": "faiss"}}, ["codebook_size 100 is not a power of two"]),
        (
            {"tokenizer": {"repulsion": {"kind": "adaptive", "margin": 0.5}}},
            ["repulsion.margin 0.5 must be above 1 - 0.18"],
        ),
        ({"tokenizer": {"contrast": {"progress": [0.5, 0.5]}}}, ["contrast.progress (0.5, 0.5) must rise"]),
        ({"tokenizer": {"name": "mm-rq-vae", "levels": {"text": 2}}}, ["lacks 'behavior'"]),
        (
            {"tokenizer": {"name": "rq-kmeans", "levels": {"text": 2}, "aligner": {}}},
            ["tokenizer.aligner", "give a number"],
        ),
        ({"compare": {"tokenizers": {"a": {"name": "rq-vae"}}, "more_seeds": {"b": [1]}}}, ["compare.more_seeds.b"]),
    ],
)
def test_what_a_tokenizer_section_may_not_say(settings, words):
    with pytest.raises(ConfigError) as error:
        config.build(settings)
    for word in words:
        assert word in str(error.value)


ONE = {"tokenizers": ["a"], "reference": "a"}


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"tokenizers": ["a"], "reference": "b"}, "evaluate.reference is 'b', which evaluate.tokenizers does not name"),
        ({"tokenizers": ["a", "a"], "reference": "a"}, "evaluate.tokenizers names 'a' twice"),
        ({"tokenizers": ["z"], "reference": "z"}, "evaluate names 'z', which is not a label of compare.tokenizers"),
        ({"controls": {"x": {"head": "parallel"}}}, "evaluate.controls.x.head is 'parallel'"),
        (
            {"retrievers": {"x": {"beam": 5}}},
            "evaluate.retrievers.x.beam is 5: input should be greater than or equal to 100",
        ),
        (
            {"retrievers": {"x": {"hed": "item"}}},
            "unknown key 'evaluate.retrievers.x.hed'; did you mean 'evaluate.retrievers.x.head'",
        ),
        (
            {"retrievers": {"x": {"max_length": 60}}},
            "evaluate.retrievers.x.max_length 60 is longer than features.max_length 50",
        ),
        ({"more_seeds": {"q": [1]}}, "evaluate.more_seeds.q: no tokenizer or control"),
        ({"models": {"q": {}}}, "evaluate.models.q: no tokenizer of evaluate"),
        ({**ONE, "models": {"a": {"x": [1]}}}, "evaluate.models.a.x: no retriever or ranker of evaluate"),
        ({**ONE, "models": {"a": {}}}, "evaluate.models.a: name at least one model, each with at least one seed"),
        (
            {**ONE, "models": {"a": {"x": []}}},
            "evaluate.models.a: name at least one model, each with at least one seed",
        ),
        (
            {**ONE, "models": {"a": {"x": [1]}}, "more_seeds": {"a": [1]}},
            "evaluate.models.a names its seeds, and so does evaluate.more_seeds",
        ),
        ({"retrievers": {"x": {}}, "rankers": {"x": {}}}, "evaluate.retrievers and evaluate.rankers both name 'x'"),
    ],
)
def test_what_cannot_be_evaluated_is_named(evaluate, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.build({"compare": {"tokenizers": {"a": {"name": "random"}}}, "evaluate": evaluate})


def test_cells_in_parallel_need_ray():
    with pytest.raises(ConfigError, match=re.escape("evaluate.parallel is 2 but ray.workers is 0")):
        config.build({"evaluate": {"parallel": 2}, "ray": {"workers": 0}})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 1e-3), ("1E5", 1e5), ("+.5", 0.5), ("1.", 1.0), ("-.inf", -math.inf), ("12e+1", 120.0)),
        *((word, word) for word in ("no", "on", "yes", "off", "No", "Y", "n", "1:30", "1_000", "0b1", "=", "a-b")),
        *((date, date) for date in ("2024-05-01", "2024-05-01T10:00:00", "2024-05-01 10:00:00")),
        *(("0o17", 15), ("0x1F", 31), ("017", 17), ("-3", -3), ("true", True)),
        *(("False", False), ("~", None), ("null", None), ("", None), ('"1e-3"', "1e-3"), ("[1, no]", [1, "no"])),
        *(("{a: 1e2, b: on}", {"a": 100.0, "b": "on"}), ("!!str 12", "12")),
    ],
)
def test_yaml_is_read_as_version_1_2(text, value):
    assert yaml12.read(text) == value and type(yaml12.read(text)) is type(value)
    assert yaml12.read(yaml12.write(value)) == value
    assert yaml.safe_load(yaml12.write(value)) == value, "readers of version 1.1 get the same"


@hypothesis_settings(deadline=None)  # a busy machine
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_what_is_written_is_read_back(value):
    assert yaml12.read(yaml12.write(value)) == value


def test_numbers_and_words_of_version_1_2_in_files_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    text = "behavior: {lr: 1e-3}\nname: no\nspark: {conf: {a.b: true, c.d: 4, e.f: 0.5, g.h: x}}\n"
    path.write_text(text + "features: {now: 2024-05-01}\n")
    cfg = config.load(path, ["retrieval.lr=2e-3", "tracking.experiment=off"])
    assert (cfg.behavior.lr, cfg.retrieval.lr, cfg.name, cfg.tracking.experiment) == (1e-3, 2e-3, "no", "off")
    assert cfg.spark.conf == {"a.b": "true", "c.d": "4", "e.f": "0.5", "g.h": "x"} and cfg.features.now == "2024-05-01"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nname: a\nseed: 2\n", "key 'seed' stands twice, in lines 1 and 3"),
        ("behavior:\n  lr: 0.1\n  width: 8\n  lr: 0.2\n", "key 'lr' stands twice, in lines 2 and 4"),
        ("behavior: {lr: 0.1,\n  lr: 0.2}\n", "key 'lr' stands twice, in lines 1 and 2"),
        ('seed: 1\n"seed": 1\n', "key 'seed' stands twice, in lines 1 and 2"),
        ("compare:\n  tokenizers:\n  - [{a: 1, a: 2}]\n", "key 'a' stands twice, in lines 3 and 3"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x\n", "key '<<' stands twice, in lines 3 and 4"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("seed: !!int x\n", "not valid YAML"),
    ],
)
def test_a_key_stands_once(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.load(path)
    assert words in str(error.value) and str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_key_stands_once_in_an_override():
    with pytest.raises(ConfigError, match=r"--set behavior: .*key 'lr' stands twice"):
        config.load(CONF / "demo.yaml", ["behavior={lr: 1e-3, lr: 2e-3}"])


def test_an_override_is_not_cut_at_a_comment():
    with pytest.raises(ConfigError, match="'#' after a blank begins a comment"):
        config.load(CONF / "demo.yaml", ["runs_dir=/data/My #1"])
    quoted = config.load(CONF / "demo.yaml", ['tracking.experiment="My #1"', "tracking.model=a#1"]).tracking
    assert (quoted.experiment, quoted.model) == ("My #1", "a#1")


def test_anchors_and_merges_work(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "behavior: &b {lr: 1e-2, width: 32}\nretrieval:\n  <<: *b\n  width: 16\nevaluate:\n  controls:\n"
        "    a: {<<: *b, width: 8}\n    b: {<<: [*b, {dropout: 0.1}]}\n    c: *b\n"
    )
    cfg = config.load(path)
    assert (cfg.behavior.width, cfg.retrieval.width, cfg.retrieval.lr) == (32, 16, 1e-2)
    assert [(c.lr, c.width) for c in cfg.evaluate.controls.values()] == [(1e-2, 8), (1e-2, 32), (1e-2, 32)]
    assert cfg.evaluate.controls["b"].dropout == 0.1


ODD = [*(f"a{character}b" for character in '#?*:^|<>[]{}\\"`\t'), "My Drive #1", "100%25", "a[v2]"]


@pytest.mark.parametrize("place", ODD)
def test_a_folder_that_spark_or_delta_would_misread_is_refused(place):
    with pytest.raises(ConfigError) as error:
        config.build({"runs_dir": f"/data/{place}/runs"})
    text = str(error.value)
    assert "in another way; choose a folder whose path has none of # %" in text and len(text.splitlines()) == 1


def test_where_a_relative_folder_leads_counts(tmp_path, monkeypatch):
    (tmp_path / "My #1").mkdir()
    monkeypatch.chdir(tmp_path / "My #1")
    with pytest.raises(ConfigError, match=r"My #1/runs.*read '#' in another way"):
        config.build({"runs_dir": "runs"})


@pytest.mark.parametrize("place", ["/data/My Drive/runs", "/data/café/runs", "/data/a-b_c.d+e/runs", "runs"])
def test_other_folders_are_taken(place):
    assert config.build({"runs_dir": place}).runs_dir == place


def test_the_name_of_a_config_file_is_free(tmp_path):
    path = tmp_path / "My config #1 100%25 [v2]: é.yaml"
    path.write_text("seed: 3\n")
    assert config.load(path).seed == 3


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("name: a  # café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(path)


def test_text_that_looks_like_a_number_asks_for_quotes():
    with pytest.raises(ConfigError, match=re.escape("name is 7: input should be a valid string (put it in quotes)")):
        config.load(CONF / "demo.yaml", ["name=007"])


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("spark.hadoop.fs.s3a.secret.key", True),
        ("spark.hadoop.fs.s3a.access.key", True),
        ("fs.azure.account.key.store.dfs.core.windows.net", True),
        ("MLFLOW_TRACKING_TOKEN", True),
        ("spark.ssl.keyPassword", True),
        ("tokenizers", False),
        ("codebook_size", False),
        ("spark.hadoop.fs.s3a.endpoint", False),
        ("key", False),
    ],
)
def test_keys_that_name_a_secret(key, secret):
    assert secrets.names_secret(key) == secret


def test_a_config_without_its_secrets_is_the_config_otherwise():
    cfg = config.build(
        {
            "features": {"content": ["text"]},
            "spark": {"conf": {"spark.hadoop.fs.s3a.secret.key": "s3cr3t", "spark.ui.port": "4050"}},
            "tracking": {"uri": "https://user:s3cr3t@mlflow.example/x"},
        }
    )
    hidden = secrets.masked_config(cfg)
    assert "s3cr3t" not in hidden.model_dump_json() and "s3cr3t" in cfg.model_dump_json()
    assert hidden.spark.conf == {"spark.hadoop.fs.s3a.secret.key": secrets.MASK, "spark.ui.port": "4050"}
    assert hidden.tracking.uri == "https://mlflow.example/x"
    plain = config.build({"features": {"content": ["text"]}})
    assert secrets.masked_config(plain) == plain
