"""launch/sampler_table.py: what a row of the table counts, and how the table is written."""

from elbo_kto_jax.checkpoints import tiny
from elbo_kto_jax.data import capitals
from elbo_kto_jax.data.chat import encode_prompt
from elbo_kto_jax.sampling.schedule import BUCKET
from launch import sampler_table
from tests.runs import read_jsonl, write_jsonl


def test_a_row_of_the_table(tiny_checkpoint, tmp_path, monkeypatch):
    prompts = [{"prompt": capitals.question(word), "answer": "."} for word in "abcdefghi"]  # one is left out
    subject = sampler_table.Subject(
        "random", str(tiny_checkpoint), str(write_jsonl(tmp_path / "p.jsonl", prompts)), 16, 8
    )
    names = ["one token a step", "two tokens a step", "dual reuse"]
    monkeypatch.setattr(sampler_table, "SETTINGS", {name: sampler_table.SETTINGS[name] for name in names})
    whole, half, dual = sampler_table.measure(subject, limit=8)  # a row per device
    assert [row["setting"] for row in (whole, half, dual)] == names
    assert whole["forward_tokens_per_token"] == BUCKET  # each of 16 tokens takes a pass over a row
    assert half["forward_tokens_per_token"] == BUCKET / 2
    assert dual["forward_tokens_per_token"] == (2 * BUCKET + 14 * 8) / 16
    assert whole["tokens_per_second"] > 0
    header, line, *cells = sampler_table._cells([whole, half, dual])
    assert len(header) == len(line) == len(cells[0])
    assert [cell[4] for cell in cells] == ["1.0x", "2.0x", "4.3x"]


def test_the_task_of_the_bigger_model_fills_its_responses(tmp_path, monkeypatch):
    monkeypatch.setattr(sampler_table, "DEMONSTRATIONS", 3)
    monkeypatch.setattr(sampler_table, "HELD_OUT", 2)
    sampler_table._write_data(tmp_path)
    prompts, demonstrations = read_jsonl(tmp_path / "prompts.jsonl"), read_jsonl(tmp_path / "demonstrations.jsonl")
    assert (len(prompts), len(demonstrations)) == (2, 3)
    assert not {str(row["prompt"]) for row in prompts} & {str(row["prompt"]) for row in demonstrations}
    tokenizer = tiny.tiny_tokenizer()
    for row in prompts:
        assert row["answer"].lower() == row["prompt"][0]["content"].split()[-1]
        asked, answered = encode_prompt(tokenizer, row["prompt"]), encode_prompt(tokenizer, row["answer"])
        assert len(answered) == sampler_table.LENGTH
        # Two examples, with the end of the turn, to a packed row.
        assert 2 * (len(asked) + sampler_table.LENGTH + 1) == sampler_table.TRAINING["data.max_length"]
