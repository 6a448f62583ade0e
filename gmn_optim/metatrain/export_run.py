"""Exporting a meta-training run of either kind: weights and their card in a folder."""

from pathlib import Path

from gmn_optim.errors import InvalidArgumentError
from gmn_optim.metatrain.family_export import describe_family_run
from gmn_optim.metatrain.runs import read_run
from gmn_optim.metatrain.task_export import describe_task_run
from gmn_optim.version import __version__
from gmn_optim.weights import Weights, require_file_name, save_weights


def export_run(
    folder: str | Path,
    name: str,
    out: str | Path,
    *,
    description: str = "",
    aliases: tuple[str, ...] = (),
    limits: tuple[str, ...] = (),
    commit: str = "",
    step: int | None = None,
    share: float = 1.0,
    every: int = 20,
    progress: bool = False,
) -> Weights:
    """Choose a run's best checkpoint on validation data and write weights and card.

    Weights of a run on a task are measured on the test set; those of a run over a family carry their figures on the
    validation tasks, which ``gmn-optim validate`` measures before.

    Args:
        folder: Of the run.
        name: Of the weights.
        out: Where both files go.
        description: One sentence.
        aliases: Further names.
        limits: Known limits.
        commit: Revision that the run was made with.
        step: Outer step; None for the best on validation data.
        share: Of the learned term, of a run over a family: one that was validated.
        every: Inner steps between two measurements on a task.
        progress: Whether to show bars.

    Raises:
        CheckpointError: the folder holds no run, or one over a family that was not validated.
        InvalidArgumentError: the name is no file name, the outer step was not evaluated, or a share was asked for of a
            run on one task.

    Example:
        >>> export_run("no/such/folder", "mine", ".")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        gmn_optim.errors.CheckpointError: no/such/folder/checkpoint.safetensors is no readable checkpoint ...
    """
    require_file_name(name)
    about = {"name": name, "description": description, "aliases": aliases, "limits": limits}
    about |= {"commit": commit, "package_version": __version__}
    if "family" in read_run(Path(folder))["settings"]:
        found = describe_family_run(Path(folder), about, step, share)
    elif share != 1.0:
        raise InvalidArgumentError(
            f"share is {share}, and {folder} is a run on one task: its rule is used whole; omit it"
        )
    else:
        found = describe_task_run(Path(folder), about, step, every=every, progress=progress)
    return save_weights(found.rule, found.card, out)
