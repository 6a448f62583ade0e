"""Checkpoints: one safetensors file with a tree of tensors, and the facts beside it in its header."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree

from gmn_optim.errors import CheckpointError


def save_checkpoint(path: Path, tree: Any, facts: dict[str, Any]) -> None:
    """Write a tree of tensors and JSON facts; the old file stays whole until the new one is."""
    leaves = {name: leaf.detach().clone().contiguous() for name, leaf in _named_leaves(tree).items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(leaves, unfinished, metadata={"facts": json.dumps(facts)})
    os.replace(unfinished, path)


def load_checkpoint(path: Path, like: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the tree, shaped like ``like``, and the facts of a checkpoint.

    Raises:
        CheckpointError: the file is damaged, was made with other settings, or holds other tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            # a mapped tensor may lie across cache lines, where matrix products round differently
            found = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error}); remove it to start anew") from error
    _require_same_settings(path, facts.get("settings", {}), settings)
    expected = _named_leaves(like)
    faults = [name for name in expected if name not in found or found[name].shape != expected[name].shape]
    if faults:
        raise CheckpointError(f"checkpoint {path} lacks, or has other shapes of, {faults[:5]}; remove it to start anew")
    leaves = [found[name].to(expected[name].dtype) for name in expected]
    return _pytree.tree_unflatten(leaves, _pytree.tree_structure(like)), facts


def _require_same_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise if a run would go on with settings other than its own."""
    own, new = _leaves_of(found), _leaves_of(json.loads(json.dumps(wanted)))
    differing = sorted(key for key in {**own, **new} if own.get(key) != new.get(key))
    if differing:
        shown = "; ".join(f"{key}: {own.get(key)} in the checkpoint, {new.get(key)} now" for key in differing)
        raise CheckpointError(f"checkpoint {path} was made with other settings ({shown}); use them or another folder")


def _leaves_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings as one mapping, the names of levels joined by dots."""
    leaves: dict[str, Any] = {}
    for key, value in settings.items():
        nested = _leaves_of(value) if isinstance(value, dict) else {}
        leaves |= {f"{key}.{name}": each for name, each in nested.items()} or {key: value}
    return leaves


def _named_leaves(tree: Any) -> dict[str, Tensor]:
    """Return the tensors of a tree under the names of their places."""
    paths, _ = _pytree.tree_flatten_with_path(tree)
    return {_pytree.keystr(path): torch.as_tensor(leaf) for path, leaf in paths}
