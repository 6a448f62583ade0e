"""Fixed tasks under names, constructed when they are asked for."""

from collections.abc import Callable, Mapping

from gmn_optim.tasks.base import AbstractTask, tasks
from gmn_optim.tasks.data_folder import Folder

Builder = Callable[[Folder], AbstractTask]


def register_tasks(builders: Mapping[str, Builder]) -> None:
    """Enter builders, which take the data folder, among :data:`gmn_optim.tasks.tasks`.

    Raises:
        InvalidArgumentError: a name is taken.
    """
    for name, build in builders.items():
        tasks.register(name)(_named(name, build))


def _named(name: str, build: Builder) -> Callable[..., AbstractTask]:
    """Return a function that builds a task and gives it its name."""

    def construct(data_folder: Folder = None) -> AbstractTask:
        task = build(data_folder)
        task.name = name
        return task

    return construct
