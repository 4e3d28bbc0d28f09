"""The command `generate`, on the policy of the golden folder."""

import dataclasses
import json

import numpy as np
import pytest

from elbo_kto_jax import generate
from elbo_kto_jax.checkpoints.load import load_config
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data.chat import encode_prompt
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.data.special import find_eot_id
from elbo_kto_jax.runtime import recipes
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.sampling import responses
from elbo_kto_jax.sampling.generate import Responses
from elbo_kto_jax.sampling.respond import Answers
from elbo_kto_jax.sampling.stops import to_text
from tests.conftest import PROJECT_ROOT
from tests.golden import Golden

GEN_LENGTH = 4
MESSAGES = [{"role": "user", "content": "Name a colour."}]
RECORDS = [
    {"id": "a", "prompt": MESSAGES},
    {"id": 7, "prompt": "Once upon a time"},
    {"prompt": MESSAGES, "label": True},
]


@pytest.fixture
def golden(golden_dir):
    """One architecture is enough here."""
    return Golden(golden_dir)


@pytest.fixture
def tokenizer(golden):
    return build_tokenizer(load_config(golden.folder / "policy")[1], "policy")


@pytest.fixture
def command(golden, tmp_path):
    """Runs the command, on records where some are given; returns (summary, output lines)."""

    def run(*flags, records=None):
        out = tmp_path / "out.jsonl"
        argv = [f"--config={PROJECT_ROOT / 'configs' / 'tiny.py'}", f"--checkpoint={golden.folder / 'policy'}"]
        argv += [f"--config.{key}={value}" for key, value in golden.flags.items()]
        argv += [f"--config.sampler.{key}={GEN_LENGTH}" for key in ("gen_length", "steps", "block_length")]
        argv += ["--config.sampler.temperature=0", "--config.sampler.remasking=low_confidence"]
        if records is not None:
            prompts = tmp_path / "prompts.jsonl"
            prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
            argv += [f"--prompts={prompts}"]
        summary = generate.main([*argv, f"--out={out}", *flags])
        return summary, [json.loads(line) for line in out.read_text().splitlines()]

    return run


def test_answers_every_record_in_order(command, tokenizer):
    summary, lines = command(records=RECORDS)
    stop_ids = [tokenizer.eos_token_id, find_eot_id(tokenizer, "tokenizer")]
    assert [line["id"] for line in lines[:2]] == ["a", "7"]
    for record, line in zip(RECORDS, lines, strict=True):
        assert line["prompt"] == record["prompt"]
        assert line["prompt_ids"] == encode_prompt(tokenizer, record["prompt"])
        assert len(line["response_ids"]) == GEN_LENGTH
        assert line["response"] == to_text(np.array(line["response_ids"], np.int32), tokenizer, stop_ids)
    assert lines[0]["response_ids"] == lines[2]["response_ids"]  # temperature 0: the same prompt, the same answer
    assert summary["prompts"] == len(RECORDS)
    assert summary["forward_passes"] == GEN_LENGTH
    assert summary["forward_tokens"] % GEN_LENGTH == 0
    assert summary["forward_tokens"] >= GEN_LENGTH * sum(len(line["prompt_ids"]) + GEN_LENGTH for line in lines)
    assert summary["tokens_per_second"] > 0


def test_prompts_of_flags_are_user_messages_and_their_answers_are_printed(command, tokenizer, capsys):
    summary, lines = command("--prompt=Name a colour.", "--prompt=Name a colour.")
    assert [line["prompt_ids"] for line in lines] == [encode_prompt(tokenizer, MESSAGES)] * 2
    assert len({line["id"] for line in lines}) == 2
    assert capsys.readouterr().out == "\n\n".join(line["response"] for line in lines) + "\n"
    assert summary["prompts"] == 2


def test_masked_spans_of_completions_are_filled(command, tokenizer):
    mask = tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    records = [
        {"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "a<|mdm_mask|> b"}]},
        {"prompt": "Once", "completion": "<|mdm_mask|><|mdm_mask|>"},
    ]
    _, lines = command("--infill", records=records)
    for record, line in zip(records, lines, strict=True):
        completion = record["completion"]
        template = encode_prompt(tokenizer, completion if isinstance(completion, str) else completion[0]["content"])
        assert mask in template
        for before, after in zip(template, line["response_ids"], strict=False):
            assert after == before if before != mask else True
        assert line["response_ids"][len(template) :] == [tokenizer.eos_token_id] * (GEN_LENGTH - len(template))


def test_page_of_the_denoising(command, tokenizer, tmp_path):
    page = tmp_path / "page.html"
    summary, lines = command(f"--html={page}", records=RECORDS)
    text = page.read_text()
    assert summary["html"] == str(page)
    assert "Name a colour." in text
    assert text.count("<article") == len(RECORDS)
    shown = [len(to_ids) for to_ids in (line["response_ids"] for line in lines)]
    assert text.count('class="token l') <= sum(shown) + 5  # 5 are the legend's
    with pytest.raises(UserError, match=r"--html=.*--overwrite"):
        command(f"--html={page}", f"--out={tmp_path / 'other.jsonl'}", records=RECORDS)


def test_an_existing_file_is_replaced_only_on_demand(command, tmp_path):
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        command(records=RECORDS)
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    _, lines = command("--overwrite", records=RECORDS)
    assert len(lines) == len(RECORDS)


@pytest.fixture
def stopped(command, monkeypatch, tmp_path):
    """Runs the command, which is stopped while it answers the third of four records; two more flags than it has."""
    asked = []

    def run(*flags):
        respond = responses.respond

        def stop(checkpoint, records, *arguments, **options):
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(records[0].id)
            return respond(checkpoint, records, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(responses, "respond", stop)
            with pytest.raises(Interrupted, match="2 of 4 responses are kept; the same command goes on"):
                command(*LOT, *flags, records=FOUR)
        return asked

    return run


FOUR = [*RECORDS, {"id": "long", "prompt": "Once upon a time there was a prompt"}]
LOT = ["--config.sampler.batch_size=1", "--config.sampler.temperature=1"]


def test_a_stopped_command_goes_on_and_writes_the_same(command, stopped, monkeypatch, tmp_path):
    pages = [tmp_path / "whole.html", tmp_path / "resumed.html"]
    summary, _ = command(*LOT, f"--html={pages[0]}", records=FOUR)
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    asked = stopped()
    assert not (tmp_path / "out.jsonl").exists()
    respond = responses.respond
    monkeypatch.setattr(responses, "respond", lambda c, r, *a, **o: asked.append(r[0].id) or respond(c, r, *a, **o))
    again, _ = command(*LOT, f"--html={pages[1]}", records=FOUR)
    assert len(asked) == len(set(asked)) == 4  # none is answered twice
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    for name in ("prompts", "forward_passes", "forward_tokens"):
        assert again[name] == summary[name]
    articles = [page.read_text().partition("<article")[2] for page in pages]
    assert articles[0] == articles[1] != ""
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "out.jsonl", "prompts.jsonl", "resumed.html", "whole.html",
    ]  # fmt: skip


def test_a_stopped_command_with_other_settings_is_refused(command, stopped, tmp_path):
    stopped()
    other = [*LOT, "--config.sampler.temperature=0"]
    with pytest.raises(UserError, match=r"unfinished has.*config\.sampler\.temperature: 1\.0 -> 0\.0.*\n.*--overwrite"):
        command(*other, records=FOUR)
    with pytest.raises(UserError, match=r"unfinished has.*another prompts"):
        command(*LOT, records=FOUR[::-1])
    assert len(command(*other, "--overwrite", records=FOUR)[1]) == 4
    assert not (tmp_path / "out.jsonl.unfinished").exists()


def test_a_folder_of_somebody_else_is_in_the_way(command, tmp_path):
    (tmp_path / "out.jsonl.unfinished").mkdir()
    (tmp_path / "out.jsonl.unfinished" / "mine").write_text("precious")
    with pytest.raises(UserError, match=r"out\.jsonl\.unfinished is in the way.*remove it"):
        command("--overwrite", records=RECORDS)
    assert (tmp_path / "out.jsonl.unfinished" / "mine").read_text() == "precious"


def test_lots_are_whole_batches():
    records = [Record(str(length), "x" * length, None, None, "") for length in (1, 5, 3, 2, 4)]
    sampler = Config.from_mapping(recipes.load("tiny").to_dict()).sampler
    for early_stop, lots in ((False, [[1, 4], [2, 3, 0]]), (True, [[1, 4, 2, 3, 0]])):
        options = dataclasses.replace(sampler, batch_size=2, early_stop=early_stop)
        assert responses._lots(records, options) == lots


@pytest.mark.parametrize(
    ("flags", "records", "message"),
    [
        (
            [f"--config.sampler.{key}=100000" for key in ("gen_length", "block_length")],
            RECORDS,
            "config.sampler.gen_length: 100000, but the model takes",
        ),
        (["--config.sampler.threshold=0.9", "--config.sampler.remasking=random"], RECORDS, "config.sampler.threshold"),
        (["--infill"], RECORDS, "jsonl:1.*`completion`"),
        (["--infill"], [{"prompt": "a", "completion": "no mask"}], r"jsonl:1.*`completion`.*<\|mdm_mask\|>.*none"),
        (["--infill"], [{"prompt": "a", "completion": "<|mdm_mask|>" * 5}], "5 tokens, but config.sampler.gen_length"),
        (["--infill", "--prompt=a"], None, "--infill: needs --prompts"),
        ([], [{"id": "a"}], "jsonl:1.*`prompt`"),
        (["--prompt="], None, "--prompt: empty"),
        ([], None, "--prompts --prompt"),
        (["--out="], RECORDS, "--out: missing"),
    ],
)
def test_wrong_input_is_named(command, tmp_path, flags, records, message):
    with pytest.raises(UserError, match=message):
        command(*flags, records=records)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("text", ["Well done 👍 爱", "a👍🏽b\n", "é" * 3, "plain", ""])
def test_the_texts_of_tokens_are_whole_characters(tokenizer, text):
    tokens = encode_prompt(tokenizer, text) if text else []
    texts = responses.token_texts(tokens, tokenizer.decode)
    assert len(texts) == len(tokens)
    assert "".join(one or "" for one in texts) == text
    assert all("\ufffd" not in (one or "") for one in texts)
    assert not texts or texts[0] is not None


def test_tokens_that_make_no_character_stand_alone(tokenizer):
    part, *rest = encode_prompt(tokenizer, "👍")
    assert rest
    texts = responses.token_texts([part, *encode_prompt(tokenizer, "a👍"), part], tokenizer.decode)
    assert texts == ["\ufffd", "a", "👍", *[None] * len(rest), "\ufffd"]


def test_the_page_shows_messages_and_whole_characters(command, tokenizer, tmp_path):
    system = [{"role": "system", "content": "Be <brief>."}, *MESSAGES]
    page, completion = tmp_path / "page.html", "👍<|mdm_mask|>"
    flags = [f"--config.sampler.{key}=8" for key in ("gen_length", "steps", "block_length")]
    command(f"--html={page}", "--infill", *flags, records=[{"prompt": system, "completion": completion}])
    text = page.read_text(encoding="utf-8")
    assert '<div class="role">system</div><div class="text" dir="auto">Be &lt;brief&gt;.</div>' in text
    assert '<div class="role">user</div>' in text
    assert "👍" in text


def test_help_says_how_a_mask_token_is_written():
    assert "<|mdm_mask|> for LLaDA" in " ".join(generate._parser().format_help().split())


def test_two_outputs_are_two_files(command, tmp_path):
    with pytest.raises(UserError, match=r"--html=.*the file of --out, too"):
        command(f"--html={tmp_path}/./out.jsonl", records=RECORDS)


def test_what_a_model_writes_is_printed_without_its_control_characters(command, monkeypatch, capsys):
    monkeypatch.setattr(responses, "respond", lambda *_, **__: FAKE)
    _, lines = command("--prompt=a")
    assert lines[0]["response"] == "\x1b[2Jhi"
    assert capsys.readouterr().out == "\\x1b[2Jhi\n"


FAKE = Answers(
    [np.zeros(1, np.int32)],
    Responses(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), 1, 1),
    ["\x1b[2Jhi"],
    1.0,
)
