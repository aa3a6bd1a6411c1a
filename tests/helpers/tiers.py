"""Which tests are too slow for every day: by file, a pattern of their names. They get the marker `gate`, some `slow`.

`pytest` leaves them out, `.ci/run` and `pytest -m gate` run them. Before they were set apart `pytest` took 477 s with two
workers (docs/tests.md has the slowest and their seconds); what stays proves each operation and backend, the drop-in,
its weights, reasons and outputs, the commands and the swap.
"""

import re

GATE = {
    # Triton's interpreter on whole models, on the largest tiles and on candidates; defaults on smaller shapes stay
    "models/test_siglip.py": r"full_depth\[(triton|torch|cpu-avx2)|on_triton|real_width\[(triton|cpu-avx2)|deep_model\[triton"
    r"|on_the_cpu\[(?!base-patch16-224|base-patch32|so400m-patch14-384)",
    "models/test_hidden_states.py": r"triton",
    "kernels/test_attention.py": r"triton-(so400m-384|so400m-448|giant)",
    "kernels/test_attention_segments.py": r"fp32-triton-a-long-one|every_default_tile|triton-hundreds|the_longest|32_bits",
    "kernels/test_attention_pool.py": r"triton-(So400m-384|B16-224)",
    "kernels/test_configs.py": r"",
    "cli/test_commands.py": r"stopped\[.*interrupted",
    "cli/test_embed_runs.py": r"TestFaults",
    "feed/test_processes.py": r"TestDeaths",
    "cli/test_naflex.py": r"is_right\[triton",
    "models/test_qwen3_vl.py": r"fp32-(videos|equal)-triton|stock_is_traced|by_inductor|one_graph\[Qwen3_5",
    "models/test_gridded.py": r"triton|captured|registered|one_graph|accuracy\[(fp|bf)16-(long|images)"
    r"|(Reasons|Edits|Parts)::.*(cosmos3|video_llama|paddleocr|ernie|hy_v4)",
    # of towers that are alike one stays, of those on the interpreter Phi-4's; two weights edited in each are in test_swap.py
    "models/test_padded.py": r"edits_are_seen|compiled|large_grid|test_positions|batch_invariant|in_parts"
    r"|test_as_stock\[(?!Phi4.*-(torch-(one|mixed)|triton-one)-alike|Idefics3.*-cpu-mixed)|test_accuracy\[(fp32|.*avx2|.*triton)"
    r"|(tuple|hidden_states|nan|test_reasons|gradients|test_reads)\[(?!Phi4|Idefics3)",
    "models/test_fixed.py": r"edits_are_seen|compiled|triton|avx2|batch_invariant",
    "models/test_minicpm.py": r"edits_are_seen|triton|avx2|where_it_merges|batch_invariant",
    "models/test_idefics.py": r"(compiled_is_stocks|large_grid_in_bf16|exported)\[(?!Idefics3)|triton",
    "models/test_siglip2.py": r"test_accuracy\[.*triton|triton-63 to 65|stock_is_traced",
    "kernels/test_patch_embed.py": r"triton-(giant|base-patch32)",
    "test_ops.py": r"fp32_dot_precision",
    "models/test_batch_invariance.py": r"test_(?!bytes)\w*\[triton",
    "backends/test_invariant.py": r"test_rows\[.*sm_(80|100)|test_rows\[fp32.*(attention|pool)|autocast|machine_code\[(?!sm_90-ahead)",
    # other processes: compilers, torchrun, Ray, an interpreter for each recipe or command
    "bench/test_static.py": r"",
    "bench/test_predict.py": r"test_command",
    "running/test_graphs.py": r"batch_invariant_in_a_larger_graph\[triton",
    "bench/test_rehearsal.py": r"",
    "bench/test_feed.py": r"",
    "models/test_distributed.py": r"",
    "integrations/test_ray.py": r"",
    "integrations/test_sentence_transformers.py": r"",
    "test_recipes.py": r"--ray|test_runs\[(?!From image files|In a model)",
    "tuning/test_packed_cases.py": r"of_a_forward\[(paddle|video|cosmos|hunyuan|hy_v4)",
    "tuning/test_race.py": r"two_processes|pixels_of_another",
    "tuning/test_tune.py": r"end_to_end|compile_ahead|two_at_once|hang|interrupted_by",
    # models that are built, saved and loaded again
    "models/test_support_matrix.py": r"test_as_committed\[(?!siglip\])",
    "models/test_swap.py": r"from_many_threads|TestRegister::test_(loaded|nothing_is_left)\w*\[(?!siglip)",
    # torch.compile's own time
    "running/test_traced.py": r"weights_changed_by_the_graph|frozen|triton|inference_mode|reduce-overhead",
    "running/test_packed_graphs.py": r"naflex_calls|qwen3_vl_calls|outputs_survive|sizes_that_are_new|released|weight_edits|batch_invariant",
    "running/test_plans.py": r"threads|so_many|other_configurations|vendors_routes\[names[123]|dtype1-[25]"
    r"|hidden_states\[(True|asked2)|in_turns|test_autocast",
    "running/test_packed_plans.py": r"others_between|so_many|used_last|dtype1|^test_qwen3_vl|test_naflex|nothing_is_kept|cannot_be_planned|side_of_squares|odd_address"
    r"|fewer|descriptors|elsewhere|gridded\[|Before::test_edits",
    "running/test_uint8.py": r"test_compiled\[(?!cpu\])",
}

# Too slow for the gate as well: real sizes and candidates in Triton's interpreter, which ttsem runs in bf16 in the gate.
SLOW = {
    "tuning/test_tune.py": r"end_to_end\[any size",
    "models/test_siglip.py": r"full_depth\[triton|on_triton\[(large|so400m)|real_width\[triton",
    "models/test_qwen3_vl.py": r"long-triton|fp32-uneven-triton|fp16-\w*-triton",
    "models/test_idefics.py": r"triton-(?!16-24)|(Idefics2|SmolVLM)\w*-triton",
    "models/test_padded.py": r"triton-(mixed|in one row|one-others)|(Idefics\d|SmolVLM)\w*-triton|test_accuracy\[.*triton"
    r"|edits_are_seen\[(?!Phi4)|(large_grid|compiled)\[(?!Idefics3)",
    "models/test_fixed.py": r"(janus|granite_docling)-triton|triton-3|test_accuracy\[.*triton|compiled\[(?!granite)",
    "models/test_minicpm.py": r"triton-(?!mixed-16x)|test_accuracy\[.*triton",
    "kernels/test_configs.py": r"\[fp(32|16)",
    "kernels/test_attention_segments.py": r"fp(32|16)-triton-4096|the_longest\[torch",
    "kernels/test_layernorm_linear.py": r"fp(32|16)-triton-(so400m|giant|large)|fp32-triton-base"
    r"|fp16-triton-base-(fc1-plain|qkv-gelu)",  # which no model has
    "kernels/test_linear_residual.py": r"fp(32|16)-triton-(so400m|giant|large)|fp32-triton-base|fp16-triton-base-fc2-no",
}


def tier_of(nodeid: str) -> str | None:
    """The marker of the test; `nodeid` as pytest has it: tests/FOLDER/FILE.py::NAME."""
    path, _, name = nodeid.partition("::")
    for tier, patterns in (("slow", SLOW), ("gate", GATE)):
        pattern = patterns.get(path.removeprefix("tests/"))
        if pattern is not None and re.search(pattern, name):
            return tier
    return None
