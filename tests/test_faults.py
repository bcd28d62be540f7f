"""Every fault that this package is to survive, and the tests that inject it."""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = [f"F{number}" for number in range(1, 47)]

# row: what is injected, tests as file and function without "test_"
FAULTS: dict[str, tuple[str, dict[str, str]]] = {
    # build and import
    "F1": (
        "a build is killed with SIGKILL",
        {
            "build": "after_a_killed_build_the_next_one_works_at_once",
            "cache": "the_lock_of_a_dead_process_is_free",
        },
    ),
    "F2": (
        "SIGTERM during a build",
        {
            "build": "a_stopped_build_leaves_nothing who_waits_can_be_stopped",
            "cli": "build_that_is_stopped_leaves_nothing",
            "compile": "commands_that_do_not_heed_it_are_killed",
        },
    ),
    "F3": (
        "four processes build at once",
        {"build": "four_processes_compile_once loaded_once_by_all_threads"},
    ),
    "F4": (
        "the compiler fails while others wait",
        {
            "build": "a_failure_is_reported_by_those_who_waited_and_tried_once "
            "the_first_error_and_the_log_are_named",
            "cache": "those_who_wait_hear_why_the_holder_gave_up",
        },
    ),
    "F5": (
        "no C++ compiler",
        {
            "build": "no_compiler no_ninja",
            "backend": "auto_says_why_it_takes_torch "
            "without_a_compiler_a_run_says_so_and_trains_in_plain_torch",
        },
    ),
    "F6": (
        "nvcc of another CUDA major than torch",
        {
            "build": "nvcc_of_another_cuda_is_refused_before_compiling",
            "doctor": "nvcc_is_held_against_torch",
        },
    ),
    "F7": (
        "torch upgraded in place",
        {
            "build": "an_upgraded_torch_gives_another_build "
            "a_library_that_does_not_load_is_an_error_with_a_remedy"
        },
    ),
    "F8": (
        "a library, or a torch, without code for this GPU",
        {
            "backend": "library_without_code_for_the_gpu",
            "step": "a_gpu_that_torch_has_no_code_for_is_one_line",
            "gpu_archs": "code_runs_on_later_gpus_of_its_major_number_and_ptx_on_all_later_ones",
            "doctor": "gpus_that_the_library_has_no_code_for_are_named",
        },
    ),
    "F9": (
        "a home or cache folder that is read-only",
        {
            "cache": "a_home_that_is_read_only_stops_no_training no_cache_at_all_is_an_error "
            "unwritable_cache_falls_back_with_a_warning "
            "no_place_for_temporary_files_is_an_error_too",
            "build": "a_cache_that_cannot_be_written_is_replaced",
        },
    ),
    "F10": (
        "packages that are missing or broken",
        {
            "broken_packages": "training_goes_on_with_what_is_there "
            "the_option_that_needs_it_says_what_to_do images_in_files_need_pillow "
            "missing_and_broken_are_told_apart",
            "cli": "training_goes_on_without_what_draws",
            "layout": "commands_work_without_an_optional_package "
            "importing_loads_only_what_it_needs",
            "loaders": "missing_torchvision_names_the_remedy",
            "dali_faults": "dali_missing_is_one_line dali_broken_is_one_line "
            "auto_goes_round_a_broken_dali",
            "loggers": "a_missing_package_is_told_before_anything_is_made "
            "a_broken_package_is_told_in_a_line",
            "export": "a_missing_package_is_named",
        },
    ),
    # ops
    "F11": (
        "NCHW, sliced, expanded and offset input",
        {
            "ops_arguments": "another_layout_is_an_error offset_into_memory "
            "gradients_of_any_layout",
            "conv_ops": "arguments_that_do_not_fit",
            "update_arguments": "memory_with_gaps_or_overlap gradients_of_another_layout",
            "simt": "tensors_off_16_bytes",
            "simt_conv": "tensors_off_16_bytes",
        },
    ),
    "F12": (
        "no images, windows too large, odd numbers of channels and pixels",
        {
            "ops": "values_and_gradients_are_the_oracles",
            "ops_arguments": "no_images no_channels impossible_pools",
            "opinfo": "batch_norm conv2d max_pool2d activations",
            "simt": "no_images",
            "simt_conv": "odd_shapes no_images",
        },
    ),
    "F13": (
        "more than 2^31 elements",
        {
            "ops": "more_values_than_32_bits_count",
            "simt": "more_than_2_31_elements statistics_of_more_than_2_31_elements "
            "pool_of_more_than_2_31_elements",
            "simt_conv": "more_than_2_31_elements data_gradient_of_more_than_2_31_elements "
            "weight_gradient_of_more_than_2_31_elements",
            "ops_cuda": "more_values_than_32_bits_count",
            "update_cuda": "more_values_than_32_bits_count",
        },
    ),
    "F14": (
        "NaN and inf in the input, ties in a pool",
        {
            "ops": "nan_and_infinity_as_torch pool_is_torchs_index_for_index",
            "reference": "nan_and_infinity_pass",
            "simt": "nan_inf_and_ties_win_as_in_torch nan_and_inf_pass_the_activations_as_in_torch",
            "simt_conv": "nan_inf_and_ties_win_as_in_torch",
        },
    ),
    "F15": (
        "one value a channel in training",
        {
            "ops_arguments": "one_value_a_channel_is_torchs_error",
            "reference": "one_value_a_channel_is_torchs_error",
            "layers": "one_value_a_channel_is_torchs_error",
        },
    ),
    "F16": (
        "planted: a backward or an update that is wrong by 1e-4",
        {
            "ops": "gradcheck_sees_an_error_of_1e_4",
            "conv_ops": "gradcheck_sees_an_error_of_1e_4",
            "update_ops": "a_step_that_is_wrong_by_1e_4_is_seen",
            "simt_conv_planted": "planted_errors_are_seen",
        },
    ),
    "F17": (
        "planted: a fake kernel with wrong strides",
        {
            "ops": "wrong_strides_in_tracing_are_seen",
            "conv_ops": "wrong_strides_in_tracing_are_seen",
        },
    ),
    "F18": (
        "repeats of a backward",
        {
            "ops": "repeats_are_bit_equal threads_do_not_change_bits",
            "conv_ops": "repeats_are_bit_equal",
            "update_ops": "repeats_are_bit_equal",
            "simt": "bits_do_not_depend_on_the_order_of_threads",
            "simt_conv": "bits_do_not_depend_on_the_order_of_threads",
            "conv_cuda": "repeats_are_bit_equal",
        },
    ),
    "F19": (
        "planted: an overrun in a kernel",
        {
            "cpu_sanitizers": "an_overrun_is_seen no_op_touches_what_is_not_its_own",
            "simt": "sanitizers_find_nothing_but_a_planted_overrun",
            "simt_update": "sanitizers_see_a_planted_overrun",
        },
    ),
    # checkpoint and resume
    "F20": (
        "kill -9 at any moment of a save, 50 times",
        {
            "disk_faults": "a_save_killed_at_any_moment_leaves_the_last_good_checkpoint",
            "checkpoint": "wherever_a_save_ends_a_whole_checkpoint_has_the_name",
            "cli": "a_run_ended_by_a_signal_is_resumed_bit_equal",
            "resume": "resuming_clears_what_a_kill_left",
        },
    ),
    "F21": (
        "a disk that is full or refuses",
        {
            "disk_faults": "a_full_disk_ends_the_run_with_its_checkpoint "
            "a_file_that_the_system_will_not_let_grow_ends_the_run_with_its_checkpoint",
            "space": "a_disk_that_is_too_small_is_refused_before_anything_is_made",
            "checkpoint": "a_failed_save_keeps_the_former_file_and_leaves_nothing_else",
            "whole_files": "a_full_disk_keeps_the_former_file",
            "saver": "a_disk_that_refuses_is_told",
            "store": "full_disk_is_one_error too_small_disk_names_bytes",
            "runner": "a_full_disk_ends_the_study_and_leaves_what_is_finished",
        },
    ),
    "F22": (
        "a truncated checkpoint",
        {
            "checkpoint": "an_older_checkpoint_is_offered",
            "resume": "a_damaged_checkpoint_is_passed_over_for_the_one_before",
        },
    ),
    "F23": (
        "a flipped bit",
        {
            "checkpoint": "a_flipped_bit_anywhere_is_refused_or_harmless "
            "a_bit_that_no_member_holds_is_seen_too an_older_checkpoint_is_offered"
        },
    ),
    "F24": (
        "a malicious pickle",
        {
            "checkpoint": "a_pickle_that_would_execute_is_refused",
            "cifar": "forged_pickles_execute_nothing",
        },
    ),
    "F25": (
        "another network, shape or classes",
        {
            "checkpoint": "weights_that_do_not_fit_are_listed_and_none_is_loaded",
            "resume": "resume_refuses_another_network",
            "run": "evaluation_on_other_data_needs_the_same_classes",
        },
    ),
    "F26": (
        "a stop after every step of two epochs",
        {
            "resume": "stopped_anywhere_and_resumed_is_bit_equal "
            "resume_from_a_periodic_checkpoint_is_bit_equal",
            "loaders": "resume_at_every_position",
            "dali": "resume_at_every_position",
            "cuda": "deterministic_and_resumed_runs_are_bit_equal",
        },
    ),
    "F27": (
        "other data, batch size or seed on resuming",
        {
            "resume": "resume_refuses_other_options_and_lists_them resume_refuses_other_data "
            "a_configuration_edited_by_hand_counts_as_a_change"
        },
    ),
    "F28": (
        "SIGTERM and Ctrl-C in every phase, once and twice",
        {
            "stopping": "while_preparing_nothing_is_left while_evaluating_the_epoch_is_saved "
            "while_saving_the_last_step_is_saved_too a_second_signal_waits_for_no_save "
            "a_second_signal_waits_for_no_clearing_up a_second_signal_waits_for_no_compiler "
            "a_signal_sent_to_the_process_and_its_group_is_one",
            "cli": "a_run_ended_by_a_signal_is_resumed_bit_equal "
            "build_that_is_stopped_leaves_nothing",
            "loaders": "signals_to_the_group_leave_workers_alone",
            "runner": "jobs_save_their_runs_when_the_study_is_stopped",
        },
    ),
    "F29": (
        "kill -9 of the main process",
        {
            "stopping": "after_the_main_process_is_killed_nobody_is_left",
            "runner": "jobs_save_their_runs_when_the_study_is_stopped",
        },
    ),
    # numbers
    "F30": (
        "inf or NaN in loss or gradients, fp16",
        {
            "guard": "an_overflow_in_fp16_is_skipped_and_the_next_step_counts "
            "figures_of_a_skipped_step_whose_loss_is_finite_count "
            "skipped_steps_are_counted_in_the_log_also_of_a_resumed_run "
            "counts_go_on_from_a_checkpoint the_guard_lies_inside_the_graph",
            "step": "fp16_overflow_skips_the_step_and_halves_the_scale",
        },
    ),
    "F31": (
        "inf or NaN in loss or gradients, bf16 and fp32",
        {
            "guard": "the_first_step_that_is_not_finite_and_all_after_it_leave_nothing "
            "a_run_that_diverges_names_step_and_place_and_keeps_its_checkpoint "
            "figures_of_the_good_steps_are_kept the_layer_is_named "
            "the_gradient_or_the_loss_is_named",
            "run": "a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint",
        },
    ),
    "F32": (
        "the loss scale collapses",
        {
            "guard": "a_collapsing_scale_ends_the_run_with_a_reason "
            "overflows_in_a_row_end_the_training_and_single_ones_do_not",
        },
    ),
    "F33": (
        "out of memory",
        {
            "memory": "a_process_without_memory_says_what_to_try "
            "the_checkpoint_is_kept_and_the_option_that_helps_named",
        },
    ),
    # data
    "F34": (
        "corrupt, empty, renamed and enormous image files",
        {
            "folder": "bad_files_are_named_and_counted undecodable",
            "decode": "renamed_kind_is_read_by_content",
            "left_out": "a_corrupt_folder_is_refused_by_name limit "
            "a_corrupt_folder_is_trained_on_without_the_bad",
            "data_command": "check_names_every_unreadable_file_and_ends_with_3",
        },
    ),
    "F35": (
        "a file cut, replaced or gone while it is read",
        {
            "folder": "file_cut_between_listing_and_reading "
            "file_gone_between_listing_and_reading contents_replaced_under_an_old_mtime_are_seen",
            "files": "a_file_that_changes_later_is_named",
            "file_loaders": "a_file_taken_away_is_named",
            "dali_faults": "a_file_that_changes_under_a_running_epoch_is_named "
            "a_store_that_is_cut_is_an_error_not_a_signal",
            "resident": "what_becomes_of_the_stores_file_disturbs_no_epoch",
        },
    ),
    "F36": (
        "a truncated or altered archive",
        {
            "cifar": "wrong_md5_names_both_hashes_and_reads_nothing truncated_archive "
            "nothing_is_extracted download_with_wrong_md5_is_not_kept",
            "tiny_imagenet": "wrong_md5_of_a_zip_that_is_there_reads_nothing "
            "download_that_is_cut_is_not_kept download_with_wrong_md5_is_not_kept",
            "tar": "cut_tar tar_cut_between_members",
            "zip": "cut_zip flipped_bit_in_a_member_is_named",
        },
    ),
    "F37": (
        "'..', absolute names, links and devices in an archive",
        {
            "tar": "dangerous_members_are_refused",
            "zip": "dangerous_members_are_refused",
        },
    ),
    "F38": (
        "decompression bombs",
        {
            "folder": "bad_files_are_named_and_counted",
            "large_images": "few_pixels_are_in_memory_at_once "
            "another_size_is_refused_before_all_are_decoded "
            "what_the_disk_cannot_hold_is_refused_at_the_first_images",
            "tar": "tar_that_grows_is_refused a_long_header_is_refused_before_it_is_read "
            "a_header_of_impossible_length_is_refused sparse_files_are_refused "
            "a_length_below_zero_is_refused headers_upon_headers_are_refused "
            "many_members_of_nothing_are_refused too_long_files_are_refused",
            "zip": "zip_that_grows_is_refused members_that_share_their_data_are_refused "
            "a_member_that_says_too_little_is_not_inflated_whole too_long_members_are_named "
            "member_that_holds_more_than_it_says_is_refused",
        },
    ),
    "F39": (
        "a loader's worker that hangs or is killed",
        {
            "loaders": "worker_in_trouble_is_an_error a_worker_killed_between_epochs_is_an_error",
            "file_loaders": "a_killed_worker_is_named",
        },
    ),
    "F40": (
        "folders that are missing, empty, of one class; labels and fractions out of range",
        {
            "cli": "an_error_is_one_line_with_its_exit_code",
            "folder": "bad_layouts",
            "store": "bad_contents_are_refused",
            "cifar": "label_out_of_range",
            "left_out": "nothing_left_is_an_error a_class_without_images_is_an_error",
            "split": "split_refuses",
        },
    ),
    "F41": (
        "sets that no batch divides, batches larger than the set",
        {
            "run": "every_test_image_is_counted_once_whatever_the_batch",
            "loaders": "each_sample_once_an_epoch",
            "dali": "each_sample_once_an_epoch",
            "metrics": "sums_over_uneven_batches_are_means_over_images",
        },
    ),
    "F42": (
        "--loader dali and --device cuda without them",
        {
            "cli": "a_missing_gpu_is_one_line",
            "step": "a_device_that_is_not_there_is_one_line",
            "dali": "dali_without_a_gpu_is_one_line",
            "dali_faults": "dali_missing_is_one_line",
            "choose": "dali_that_is_missing_is_said_before_anything_is_packed",
        },
    ),
    "F43": (
        "unknown options, networks and reports, values that mean nothing",
        {
            "cli": "an_error_is_one_line_with_its_exit_code a_bad_config_file_is_one_line",
            "config": "bad_values_are_one_line_that_names_the_flag",
            "archs": "unknown_name_gets_the_nearest",
            "reproduce": "mistakes_are_one_line",
            "sweep": "wrong_values_are_one_line mistakes_are_one_line",
        },
    ),
    # several processes
    "F44": (
        "a rank dies",
        {"ranks": "a_rank_that_is_killed_ends_the_others_and_is_named"},
    ),
    "F45": (
        "ranks with different options or data",
        {"ranks": "ranks_with_other_options_or_images_are_refused"},
    ),
    "F46": (
        "shards of different length",
        {
            "ranks": "four_processes_train_and_count_as_one "
            "the_weights_of_the_ranks_count_every_image_alike",
            "shards": "shards_are_the_whole",
        },
    ),
}

MEMORY = "the CPU's kernels count as far, but not those that are launched on a device"
# id: why a GPU is needed beside the row's other tests
NEEDS_GPU = {
    "tests/test_ops_cuda.py::test_more_values_than_32_bits_count": MEMORY,
    "tests/test_update_cuda.py::test_more_values_than_32_bits_count": MEMORY,
    "tests/test_conv_cuda.py::test_repeats_are_bit_equal": "blocks end in any order on a device",
    "tests/test_cuda.py::test_deterministic_and_resumed_runs_are_bit_equal": "cuDNN's algorithms",
}
# each has a test that plants the error and sees the suite's check fail
PLANTED = {
    "F16": "tests/test_ops.py::test_gradcheck_sees_an_error_of_1e_4",
    "F17": "tests/test_ops.py::test_wrong_strides_in_tracing_are_seen",
    "F19": "tests/test_cpu_sanitizers.py::test_an_overrun_is_seen",
}


def ids(tests):
    return [
        f"tests/test_{f}.py::test_{name}" for f, names in tests.items() for name in names.split()
    ]


@cache
def functions(file):
    """{name: whether it needs a GPU} of the test functions of a file."""
    path = TESTS.parent / file
    if not path.is_file():
        return {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    marks = [node.value for node in tree.body if is_pytestmark(node)]
    whole = any(needs_gpu(mark) for mark in marks)
    return {
        node.name: whole or any(needs_gpu(mark) for mark in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def is_pytestmark(node):
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "pytestmark"


def needs_gpu(mark):
    marks = mark.elts if isinstance(mark, ast.List | ast.Tuple) else [mark]
    return any(ast.unparse(one) == "pytest.mark.cuda" for one in marks)


def on_gpu(test):
    """Whether a test needs a GPU; None where there is no such test."""
    file, _, name = test.partition("::")
    return functions(file).get(name)


def faults_of(table):
    """What is wrong with a table of faults."""
    wrong = [f"{row}: no such row" for row in table if row not in ROWS]
    wrong += [f"{row}: missing" for row in ROWS if row not in table]
    for row, (text, tests) in table.items():
        found = ids(tests)
        wrong += [f"{row}: {test} does not exist" for test in found if on_gpu(test) is None]
        wrong += [f"{row}: {test} stands there twice" for test in found if found.count(test) > 1]
        if not text:
            wrong.append(f"{row}: nothing is injected")
        if not any(on_gpu(test) is False for test in found):
            wrong.append(f"{row}: no test without a GPU")
    return wrong


def test_every_fault_has_a_test():
    assert faults_of(FAULTS) == []


def test_tests_that_need_a_gpu_say_why():
    listed = {test for _, tests in FAULTS.values() for test in ids(tests)}
    assert {test for test in listed if on_gpu(test)} == NEEDS_GPU.keys()


def test_planted_errors_are_tests_of_the_tests():
    for row, test in PLANTED.items():
        assert test in ids(FAULTS[row][1])


@pytest.mark.parametrize(
    ("row", "entry", "wrong"),
    [
        ("F47", ("x", {"build": "no_compiler"}), ["F47: no such row"]),
        ("F5", ("x", {}), ["F5: no test without a GPU"]),
        ("F5", ("", {"build": "no_compiler"}), ["F5: nothing is injected"]),
        (
            "F5",
            ("x", {"build": "no_compiler gone"}),
            ["F5: tests/test_build.py::test_gone does not exist"],
        ),
        (
            "F5",
            ("x", {"gone": "x", "build": "no_compiler"}),
            ["F5: tests/test_gone.py::test_x does not exist"],
        ),
        ("F5", ("x", {"ops_cuda": "side_stream"}), ["F5: no test without a GPU"]),
        (
            "F5",
            ("x", {"build": "no_compiler no_compiler"}),
            ["F5: tests/test_build.py::test_no_compiler stands there twice"] * 2,
        ),
    ],
)
def test_a_table_that_is_wrong_is_seen(row, entry, wrong):
    assert faults_of(FAULTS | {row: entry}) == wrong


def test_a_row_that_is_missing_is_seen():
    table = {row: entry for row, entry in FAULTS.items() if row != "F21"}
    assert faults_of(table) == ["F21: missing"]
