"""What PyTorch's own test-suite asks of an optimizer, and which test of ours proves that it holds or is refused here.

    python -m tests.contract.table

prints the table of the README's section "Adam's contract".
"""

from enum import Enum
from typing import NamedTuple

from gmn_optim.report import format_table


class Status(Enum):
    """Whether a promise is kept, or refused with an error that says why."""

    HOLDS = "holds"
    REFUSED = "refused"


class Row(NamedTuple):
    """One promise.

    Attributes:
        torch_test: Name of a test of ``TestOptimRenewed`` in PyTorch's ``test/test_optim.py``, or ``Class.test``.
        promise: What it asks for.
        proofs: Tests of ours, as ``file::function`` below the folder ``tests``.
        status: Whether the promise is kept here.
        why: The reason why it is refused; empty where it holds.
    """

    torch_test: str
    promise: str
    proofs: tuple[str, ...]
    status: Status = Status.HOLDS
    why: str = ""


def refused(torch_test: str, promise: str, why: str, *proofs: str) -> Row:
    """Return the row of a promise that is not kept."""
    return Row(torch_test, promise, proofs, Status.REFUSED, why)


def holds(torch_test: str, promise: str, *proofs: str) -> Row:
    """Return the row of a promise that is kept."""
    return Row(torch_test, promise, proofs)


_HERE = "contract/test_behaviours.py"
_CONTRACT, _ERRORS, _BAD = "test_optimizer_contract.py", "test_optimizer_errors.py", "test_optimizer_bad_input.py"
_STATE, _COPIES, _STEP = "test_optimizer_state.py", "test_optimizer_copies.py", "test_optimizer.py"
_ONE_WAY = "there is one implementation, and no flag to choose another"
_ONE_DEVICE = "one optimizer trains on one device"

ROWS: tuple[Row, ...] = (
    holds(
        "test_forloop_goes_right_direction",
        "twenty steps lower the loss, or raise it with `maximize`",
        f"{_HERE}::test_twenty_steps_go_in_the_right_direction",
        f"{_HERE}::test_twenty_scheduled_steps_go_in_the_right_direction",
    ),
    holds(
        "test_param_group_with_lrscheduler_goes_right_direction",
        "so they do with groups under schedulers",
        f"{_HERE}::test_groups_under_schedulers_go_in_the_right_direction",
    ),
    holds(
        "test_param_groups_weight_decay",
        "weight decay of a group is its own",
        f"{_HERE}::test_groups_with_weight_decay_go_in_the_right_direction",
        f"{_CONTRACT}::test_weight_decay_of_a_group_is_its_own",
    ),
    holds(
        "test_param_groups_lr",
        "a group with an lr of 1e-28 does not move",
        f"{_HERE}::test_a_group_with_a_tiny_lr_stays_while_the_others_go_in_the_right_direction",
        f"{_CONTRACT}::test_a_group_with_no_lr_does_not_move",
    ),
    holds("test_tensor_lr", "a tensor as lr equals a number", f"{_CONTRACT}::test_a_tensor_lr_equals_a_float_lr"),
    holds(
        "test_step_is_noop_when_params_have_no_grad",
        "without gradients a step does nothing",
        f"{_CONTRACT}::test_a_step_without_gradients_does_nothing",
        f"{_HERE}::test_parameters_that_need_no_gradient_are_left_alone",
    ),
    holds(
        "test_step_is_noop_for_zero_grads",
        "zero gradients move nothing",
        f"{_CONTRACT}::test_zero_gradients_move_nothing",
        f"{_HERE}::test_zero_gradients_of_loose_parameters_move_nothing",
    ),
    holds(
        "test_foreach_matches_forloop",
        "steps on many parameters at once equal steps one by one",
        f"{_HERE}::test_steps_equal_torchs_loop_through_frozen_layers_and_missing_gradients",
    ),
    refused(
        "test_fused_matches_forloop",
        "`fused=True` equals the loop",
        _ONE_WAY,
        f"{_HERE}::test_arguments_of_other_optimizers_are_unknown",
    ),
    holds(
        "test_fused_does_not_step_if_foundinf",
        "a step that a gradient scaler skips changes nothing",
        f"{_STEP}::test_a_step_skipped_by_a_grad_scaler_leaves_no_factors",
    ),
    holds(
        "test_fused_error_on_params_on_meta",
        "parameters without values are an error; with values they train",
        f"{_BAD}::test_a_model_made_without_values_trains_once_it_has_them",
    ),
    holds(
        "test_mixed_device_dtype",
        "parameters of several dtypes in one optimizer",
        f"{_BAD}::test_the_loss_falls_in_a_model_of_mixed_dtypes",
        f"{_BAD}::test_mixed_dtypes_are_stepped_as_by_adam",
    ),
    refused(
        "test_mixed_device_dtype",
        "parameters on several devices in one optimizer",
        _ONE_DEVICE,
        f"{_BAD}::test_gradients_on_two_devices_are_refused_and_change_nothing",
    ),
    refused(
        "test_forloop_goes_right_direction_multigpu",
        "a weight and its bias on two devices",
        _ONE_DEVICE,
        f"{_BAD}::test_gradients_on_two_devices_are_refused_and_change_nothing",
    ),
    holds(
        "test_set_default_dtype_works_with_foreach",
        "the default dtype is immaterial",
        f"{_HERE}::test_a_default_dtype_set_later_is_immaterial",
        f"{_STEP}::test_the_default_dtype_is_immaterial",
    ),
    refused(
        "test_rosenbrock_sparse",
        "sparse gradients",
        "the rule reads dense ones; use `sparse=False`",
        f"{_ERRORS}::test_sparse_gradients_are_refused_and_change_nothing",
    ),
    refused(
        "test_complex",
        "complex parameters",
        "the meta-learned rule is of real numbers",
        f"{_ERRORS}::test_parameters_of_odd_kinds_are_refused",
    ),
    refused(
        "test_complex_2d",
        "complex parameters equal pairs of real ones",
        "the meta-learned rule is of real numbers",
        f"{_ERRORS}::test_parameters_of_odd_kinds_are_refused",
    ),
    holds(
        "test_errors",
        "arguments and groups that make no sense are refused",
        f"{_ERRORS}::test_arguments_that_make_no_sense_are_refused",
        f"{_ERRORS}::test_groups_that_make_no_sense_are_refused",
        f"{_ERRORS}::test_a_parameter_twice_in_a_group_warns_and_is_stepped_once",
    ),
    holds("test_optimizer_can_be_printed", "`repr` shows every option", f"{_CONTRACT}::test_it_is_a_torch_optimizer"),
    holds(
        "test_state_dict_deterministic",
        "a loaded state continues alike, parameters named or not",
        f"{_HERE}::test_a_loaded_state_continues_to_equal_parameters_and_states",
    ),
    holds(
        "test_can_load_older_state_dict",
        "what an older state lacks is filled up",
        f"{_STATE}::test_a_state_of_an_older_version_is_filled_up",
    ),
    holds(
        "test_can_load_from_to_named_state_dict",
        "named and unnamed states are exchanged",
        f"{_STATE}::test_named_and_unnamed_states_are_exchanged",
    ),
    holds(
        "test_save_load_equality_with_weights_only",
        "a saved state loads unchanged with `weights_only=True`",
        f"{_STATE}::test_saving_and_loading_continues_bit_by_bit",
    ),
    holds(
        "test_load_nontensor_step",
        "a step saved as a number is read",
        f"{_STATE}::test_steps_saved_as_numbers_are_read",
    ),
    holds(
        "test_non_empty_state",
        "every stepped parameter has a state",
        f"{_HERE}::test_every_parameter_that_was_stepped_has_a_state",
    ),
    *(
        holds(
            name,
            "hooks see, fill and replace the state that is saved",
            f"{_HERE}::test_hooks_of_the_state_dict_may_leave_and_take_entries",
            f"{_STATE}::test_state_dict_hooks_fire",
        )
        for name in ("test_state_dict_pre_hook", "test_state_dict_post_hook", "test_state_dict_pre_post_hook")
    ),
    *(
        holds(
            name,
            "hooks see, change and replace the state that is loaded",
            f"{_HERE}::test_hooks_of_loading_run_in_order",
            f"{_STATE}::test_loading_hooks_may_replace_the_given_dict",
        )
        for name in (
            "test_load_state_dict_pre_hook_and_prepend",
            "test_load_state_dict_post_hook",
            "test_load_state_dict_pre_post_hook",
        )
    ),
    *(
        holds(name, promise, f"{_CONTRACT}::test_step_hooks_fire_in_order")
        for name, promise in (
            ("test_step_pre_hook", "a hook before each step, until it is removed"),
            ("test_step_post_hook", "a hook after each step, until it is removed"),
            ("test_step_all_hooks", "hooks of all optimizers enclose those of one"),
        )
    ),
    holds(
        "test_deepcopy_copies_all_public_attrs",
        "a deep copy has every public attribute",
        f"{_COPIES}::test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own",
    ),
    holds(
        "test_second_order_optims_return_consistent_types",
        "`step(closure)` returns what the closure returned",
        f"{_HERE}::test_step_returns_what_the_closure_returned",
    ),
    refused(
        "test_optim_infos_do_not_specify_global_cliquey_kwargs",
        "`foreach`, `fused` and `differentiable` exclude one another",
        _ONE_WAY,
        f"{_HERE}::test_arguments_of_other_optimizers_are_unknown",
        f"{_ERRORS}::test_groups_that_make_no_sense_are_refused",
    ),
    refused(
        "TestDifferentiableOptimizer.test_adam",
        "`differentiable=True` records steps for autograd",
        "`gmn_optim.metatrain` differentiates the rule itself",
        f"{_HERE}::test_arguments_of_other_optimizers_are_unknown",
    ),
)
"""Every test of the suite that runs on a CPU, or whose promise can be tried on one."""

ON_A_GPU = (
    "test_cpu_load_state_dict",
    "test_defaults_changed_to_foreach",
    "test_foreach_large_tensor",
    "test_fused_cpu_matches_cuda",
    "test_fused_large_tensor",
    "test_peak_memory_foreach",
    "test_state_dict_with_cuda_params",
)
"""The other tests of the suite: they need a GPU, or tens of gigabytes."""


def cells(row: Row) -> tuple[str, str, str]:
    """Return a row as the README shows it."""
    here = row.status.value if row.status is Status.HOLDS else f"{row.status.value}: {row.why}"
    return f"`{row.torch_test}`", row.promise, here


def render() -> str:
    """Return the README's table."""
    return format_table([("torch's test", "what it promises", "here"), *map(cells, ROWS)])


if __name__ == "__main__":
    print(render())
