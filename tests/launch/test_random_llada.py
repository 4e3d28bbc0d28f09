"""launch/random_llada.py: a folder that the project loads, the same for the same seed."""

from elbo_kto_jax.checkpoints import random_folder
from elbo_kto_jax.checkpoints.huggingface import open_folder
from launch import random_llada


def test_folder(tiny_checkpoint, tmp_path, monkeypatch):
    small = {"d_model": 32, "head_dim": 8, "n_layers": 3, "mlp_hidden_size": 48, "embedding_size": 128}
    monkeypatch.setattr(random_folder, "_SMALL", random_folder._SMALL | small)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        flags = [
            f"--tokenizer={tiny_checkpoint}",
            f"--out={folder}",
            f"--seed={seed}",
            "--shard-size=20KB",
            "--layers=2",
        ]
        summary = random_llada.main(flags)
        assert summary["tensors"] == 2 * 9 + 3
    opened = open_folder(folders[0])
    assert (opened.config.d_model, opened.config.n_layers) == (32, 2)
    contents = [{file.name: file.read_bytes() for file in folder.glob("*.safetensors")} for folder in folders]
    assert len(contents[0]) > 1
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
