import torch

from gmn_optim.metatrain.checkpoint import load_checkpoint, save_checkpoint


def test_what_is_read_lies_in_memory_as_fresh_tensors_do(tmp_path):
    """Elsewhere a matrix product may round differently, and a run would not go on bit for bit."""
    tree = {"a": torch.ones(3), "b": torch.ones(5, 7), "c": torch.ones(())}
    save_checkpoint(tmp_path / "file.safetensors", tree, {})
    found, _ = load_checkpoint(tmp_path / "file.safetensors", tree, {})
    assert [value.data_ptr() % 64 for value in found.values()] == [torch.ones(9).data_ptr() % 64] * 3
