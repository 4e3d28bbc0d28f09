"""Downloads, archives, code and markup that come from elsewhere: what is fetched, what is refused, what is escaped."""

import base64
import html.parser
import json
import random
import re
import tarfile
from pathlib import Path

import pytest

from elbo_kto_jax.checkpoints.assets import ASSETS
from elbo_kto_jax.checkpoints.folders import locate
from elbo_kto_jax.checkpoints.load import load_config, load_model
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data.forms import FORMS
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.reports.training import write_training_report
from elbo_kto_jax.reports.winrate import write_winrate_report
from elbo_kto_jax.runtime.errors import UserError
from tests import runs
from tests.published import write_published
from tests.robustness.commands import PROJECT_ROOT
from tests.share import share

CODE = [
    file for name in ("elbo_kto_jax", "conversion", "launch", "configs") for file in (PROJECT_ROOT / name).rglob("*.py")
]


@pytest.mark.parametrize(
    "pattern",
    [
        r"\bpickle\b",
        r"\bmarshal\b",
        r"\bshelve\b",
        r"\bjoblib\b",
        r"\bdill\b",
        r"allow_pickle\s*=\s*True",
        r"torch\.load",
        r"yaml\.(unsafe_)?load",
        r"trust_remote_code\s*=\s*True",
        r"\beval\(",
        r"shell\s*=\s*True",
        r"extractall|unpack_archive",
    ],
)
def test_no_code_reads_what_can_run(pattern):
    """Every run of tests/robustness/kill_driver.py watches the interpreter for pickles as well."""
    assert len(CODE) > 40
    found = [
        f"{file}:{n}"
        for file in CODE
        for n, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found


# ---- the hub ----


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose every model and data set is in tmp_path/snapshots/COMMIT, and what it was asked for."""
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(tmp_path / "snapshots" / "0123abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    ("name", "revision"), [("org/name", None), ("org/name@0123abc", "0123abc"), ("o/n@v1.0", "v1.0")]
)
def test_models_are_fetched_by_revision_and_as_safetensors_only(hub, tmp_path, caplog, name, revision):
    write_published(tmp_path / "snapshots" / "0123abc")
    caplog.set_level("INFO")
    load_model(name)
    (asked, options), *_ = hub
    assert (asked, options["revision"]) == (name.split("@")[0], revision)
    patterns = options["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not [p for p in patterns if p.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".zip", "*"))]
    assert "revision 0123abc" in caplog.text


def test_data_sets_are_fetched_by_revision_and_as_records_only(hub, tmp_path):
    runs.write_jsonl(tmp_path / "snapshots" / "0123abc" / "train.jsonl", runs.records(2))
    assert len(read_records("org/data@0123abc").records) == 2
    assert len(read_records("org/data@0123abc:train").records) == 2
    for name, options in hub:
        assert (name, options["revision"]) == ("org/data", "0123abc")
        assert {pattern.removeprefix("*") for pattern in options["allow_patterns"]} == set(FORMS)


@pytest.mark.parametrize(
    "name", ["../a/b", "a/../b", "/a/b", "a/b/c", "https://example.org/a", "a/b@../c", "a/b@", "a/b c"]
)
def test_names_that_are_no_hub_ids_are_not_asked_for(hub, name):
    with pytest.raises(UserError):
        locate(name, "--checkpoint", weights=True)
    with pytest.raises(UserError):
        read_records(name)
    assert hub == []


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "bin", "pkl"])
def test_archives_and_pickles_are_refused(tmp_path, suffix):
    inner, archive = runs.write_jsonl(tmp_path / "data.jsonl", runs.records(2)), tmp_path / f"archive.{suffix}"
    with tarfile.open(archive, "w") as tar:
        tar.add(inner, "../../data.jsonl")
    with pytest.raises(UserError, match=r"expected a file that ends in \.jsonl or \.parquet"):
        read_records(archive)
    with pytest.raises(UserError, match="a file; expected the folder"):
        load_config(archive)
    folder = tmp_path / "model"
    write_published(folder, shards=1)
    (folder / "model.safetensors").unlink()
    archive.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only PyTorch \.bin weights"):
        load_model(folder)


def test_code_that_comes_with_a_model_does_not_run(tiny_checkpoint, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "it ran"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("modeling_llada", "configuration_llada", "tokenization_llada"):
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'w').write('')")
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {key: ["tokenization_llada.Tokenizer", None]}
        (folder / name).write_text(json.dumps(content))
    _, assets = load_config(folder)
    assert build_tokenizer(assets, str(folder))("a")["input_ids"]
    load_model(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{% if %}",
    ],
)
def test_a_hostile_chat_template_is_refused(tiny_checkpoint, tmp_path, template):
    _, assets = load_config(tiny_checkpoint)
    assets = {name: content for name, content in assets.items() if name != "chat_template.jinja"}
    tokenizer = build_tokenizer(assets, "there")
    tokenizer.chat_template = template
    from elbo_kto_jax.data.chat import encode_prompt

    with pytest.raises(UserError, match="chat template refuses it"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a"}])


# ---- reports ----

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</td></table><iframe src=//evil>",
    "<a href='javascript:alert(1)'>x</a>",
    "--><!--",
    "]]>",
    "&lt;script&gt;",
    "\u202e\ud800\x00\x1b[31m",
    "</style><style>*{display:none}",
    "</title><base href=//evil>",
)


class Page(html.parser.HTMLParser):
    """Which elements and attributes a page has, and its text."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {(key, value or "") for key, value in attrs}

    def handle_data(self, data):
        self.text.append(data)


def assert_nothing_loads(page: Page) -> None:
    assert not page.tags & {"script", "iframe", "img", "image", "base", "object", "embed", "form", "link"}
    assert not [key for key, _ in page.attributes if key.startswith("on") or key in ("src", "srcdoc", "action")]


def assert_harmless(path: Path, texts) -> None:
    page = Page(path.read_text())
    assert_nothing_loads(page)
    kind = "data:image/svg+xml;base64,"  # a chart, to be saved as a file
    for address in [value for key, value in page.attributes if key == "href"]:
        assert address.startswith(kind)
        drawing = Page(base64.b64decode(address.removeprefix(kind), validate=True).decode())
        assert_nothing_loads(drawing)
        assert "a" not in drawing.tags
    shown = "".join(page.text)
    assert all(text in shown for text in texts if text.isprintable())


def test_reports_escape_every_text(tmp_path):
    rng = random.Random(0)
    for _ in range(share(5, 200)):
        some = lambda: "".join(rng.sample(HOSTILE, 2))  # noqa: E731
        texts = [some() for _ in range(9)]
        write_training_report(
            tmp_path / "training.html",
            title=texts[0],
            config={"model": {"path": texts[1]}, texts[2]: texts[3]},
            metrics=[{"step": 1, "loss": 0.5, texts[4]: 1.0}, {"step": 2, "loss": float("nan"), texts[4]: "x"}],
            samples=[{"prompt": texts[5], "before": texts[6], "after": texts[7]}],
            summary={"checkpoint": texts[8], "loss": 0.5},
        )
        assert_harmless(tmp_path / "training.html", texts)
        write_winrate_report(
            tmp_path / "winrate.html",
            title=texts[0],
            summary={"adjusted_win_rate": 0.5, "ci95": [0.4, 0.6], "wins": 1, "ties": 0, "losses": 1, "comparisons": 2},
            examples=[{"id": texts[1], "prompt": texts[2], "answer_a": texts[3], "answer_b": texts[4], "verdict": "A"}],
            names=(texts[5], texts[6]),
        )
        assert_harmless(tmp_path / "winrate.html", [texts[i] for i in (0, 2, 3, 4)])


def test_published_patterns_are_the_only_ones():
    assert not [name for name in ASSETS if not name.endswith((".json", ".jinja", ".txt", ".model", ".py"))]
