"""Code written for FlashInfer ports by changing the import: its wrappers, methods, arguments and defaults, in its order."""

from __future__ import annotations

import inspect

import pytest
import torch

import fi_ops

# FlashInfer 0.6, by class and method: positional arguments, then, after |, those by name alone. A default follows =; none is None.
_PREFILL_PLAN = (
    "custom_mask packed_custom_mask causal=False pos_encoding_mode='NONE' use_fp16_qk_reduction=False {scales} "
    "q_data_type='float16' kv_data_type o_data_type non_blocking=True prefix_len_ptr token_pos_in_items_ptr "
    "token_pos_in_items_len=0 max_item_len_ptr"
)
_FORWARD = "pos_encoding_mode='NONE' use_fp16_qk_reduction=False"
_SCALES = "logits_soft_cap sm_scale rope_scale rope_theta"
_DECODE_FORWARD = f"q! paged_kv_cache! pos_encoding_mode='NONE' q_scale k_scale v_scale window_left=-1 {_SCALES}"
_PAGED_FORWARD = f"q! paged_kv_cache! causal=False {_FORWARD} k_scale v_scale window_left=-1 {_SCALES}"
_RAGGED_FORWARD = f"q! k! v! causal=False {_FORWARD} window_left=-1 {_SCALES}"
_RUN = "return_lse=False enable_pdl"
_HEADS = "num_qo_heads! num_kv_heads!"
_PAGED_INIT = (
    "float_workspace_buffer! kv_layout='NHD' use_cuda_graph=False qo_indptr_buf paged_kv_indptr_buf paged_kv_indices_buf "
    "paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf backend='auto'"
)
_RESET = "float_workspace_buffer! int_workspace_buffer!"
_TABLE = "indptr! indices! last_page_len!"
_POD_PLAN = (
    "pos_encoding_mode='NONE' window_left=-1 q_data_type='float16' kv_data_type data_type sm_scale rope_scale rope_theta "
    "non_blocking=True"
)

SIGNATURES = {
    "BatchDecodeWithPagedKVCacheWrapper": {
        "__init__": "float_workspace_buffer! kv_layout='NHD' use_cuda_graph=False use_tensor_cores=False paged_kv_indptr_buffer "
        "paged_kv_indices_buffer paged_kv_last_page_len_buffer backend='auto' jit_args",
        "plan": f"{_TABLE} {_HEADS} head_dim! page_size! pos_encoding_mode='NONE' window_left=-1 logits_soft_cap "
        "q_data_type='float16' kv_data_type o_data_type data_type sm_scale rope_scale rope_theta non_blocking=True block_tables "
        "seq_lens fixed_split_size disable_split_kv=False q_len_per_req=1",
        "run": f"q! paged_kv_cache! | q_scale k_scale v_scale out lse {_RUN} window_left sinks q_len_per_req "
        "skip_softmax_threshold_scale_factor kv_cache_sf",
        "forward": _DECODE_FORWARD, "forward_return_lse": _DECODE_FORWARD, "reset_workspace_buffer": _RESET, "end_forward": "",
    },
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": {
        "__init__": "workspace_buffer! indptr_buffer! indices_buffer! last_page_len_buffer! kv_layout='NHD' use_tensor_cores=False",
    },
    "BatchPrefillWithPagedKVCacheWrapper": {
        "__init__": f"{_PAGED_INIT} jit_args jit_kwargs",
        "plan": f"qo_indptr! paged_kv_indptr! paged_kv_indices! paged_kv_last_page_len! {_HEADS} head_dim_qk! page_size! "
        + "head_dim_vo "
        + _PREFILL_PLAN.format(scales="sm_scale window_left=-1 logits_soft_cap rope_scale rope_theta")
        + " seq_lens seq_lens_q block_tables max_token_per_sequence max_sequence_kv fixed_split_size disable_split_kv=False",
        "run": f"q! paged_kv_cache! | q_scale k_scale v_scale out lse {_RUN} window_left sinks",
        "forward": _PAGED_FORWARD, "forward_return_lse": _PAGED_FORWARD, "reset_workspace_buffer": _RESET, "end_forward": "",
    },
    "BatchPrefillWithRaggedKVCacheWrapper": {
        "__init__": "float_workspace_buffer! kv_layout='NHD' use_cuda_graph=False qo_indptr_buf kv_indptr_buf custom_mask_buf "
        "mask_indptr_buf backend='auto' jit_args jit_kwargs",
        "plan": f"qo_indptr! kv_indptr! {_HEADS} head_dim_qk! head_dim_vo "
        + _PREFILL_PLAN.format(scales="window_left=-1 logits_soft_cap sm_scale rope_scale rope_theta")
        + " fixed_split_size disable_split_kv=False",
        "run": f"q! k! v! | q_scale k_scale v_scale o_scale out lse {_RUN}",
        "forward": _RAGGED_FORWARD, "forward_return_lse": _RAGGED_FORWARD, "reset_workspace_buffer": _RESET, "end_forward": "",
    },
    "MultiLevelCascadeAttentionWrapper": {
        "__init__": "num_levels! float_workspace_buffer! kv_layout='NHD' use_cuda_graph=False qo_indptr_buf_arr "
        "paged_kv_indptr_buf_arr paged_kv_indices_buf_arr paged_kv_last_page_len_buf_arr",
        "plan": f"qo_indptr_arr! paged_kv_indptr_arr! paged_kv_indices_arr! paged_kv_last_page_len! {_HEADS} head_dim! page_size! "
        f"causal=False {_FORWARD} sm_scale window_left=-1 logits_soft_cap rope_scale rope_theta q_data_type='float16' kv_data_type",
        "run": "q! paged_kv_cache!", "forward": "q! paged_kv_cache!",
        "reset_workspace_buffer": "float_workspace_buffer! int_workspace_buffers!",
    },
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper": {
        "__init__": "float_workspace_buffer! kv_layout='NHD'",
        "begin_forward": f"unique_kv_indptr! unique_kv_indices! unique_kv_last_page_len! {_HEADS} head_dim! page_size! "
        "data_type='float16'",
        "forward": "q! k_shared! v_shared! unique_kv_cache!", "reset_workspace_buffer": _RESET,
    },
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper": {
        "__init__": "float_workspace_buffer! kv_layout='NHD'",
        "begin_forward": f"qo_indptr! paged_kv_indptr! paged_kv_indices! paged_kv_last_page_len! {_HEADS} head_dim! page_size!",
        "forward": "q! k_shared! v_shared! unique_kv_cache! causal=False use_fp16_qk_reduction=False sm_scale "
        "rope_scale rope_theta",
        "reset_workspace_buffer": _RESET,
    },
    "BlockSparseAttentionWrapper": {
        "__init__": "float_workspace_buffer! backend='auto'",
        "plan": f"indptr! indices! M! N! R! C! {_HEADS} head_dim! mask packed_mask causal=False {_FORWARD} logits_soft_cap "
        "sm_scale rope_scale rope_theta q_data_type='float16' kv_data_type o_data_type='float16' non_blocking=True",
        "run": f"q! k! v! scale_q scale_k scale_v out lse {_RUN}",
        "forward": f"q! k! v! scale_q scale_k scale_v {_FORWARD} {_SCALES}", "reset_workspace_buffer": _RESET, "end_forward": "",
    },
    "VariableBlockSparseAttentionWrapper": {
        "__init__": "float_workspace_buffer! backend='auto'",
        "plan": f"block_mask_map! block_row_sz! block_col_sz! {_HEADS} head_dim! causal=False {_FORWARD} logits_soft_cap sm_scale "
        "rope_scale rope_theta non_blocking=True q_data_type='float16' kv_data_type",
        "run": f"q! k! v! out lse {_RUN}", "forward": f"q! k! v! {_FORWARD} {_SCALES}", "reset_workspace_buffer": _RESET,
    },
    "PODWithPagedKVCacheWrapper": {
        "__init__": "float_workspace_buffer! kv_layout='NHD' use_cuda_graph=False paged_kv_indptr_buffer paged_kv_indices_buffer "
        "paged_kv_last_page_len_buffer jit_args",
        "plan": f"{_TABLE} {_HEADS} head_dim! page_size! {_POD_PLAN}",
        "run": "q_p! k_p! v_p! q_d! paged_kv_cache_d! custom_mask_p packed_custom_mask_p causal_p=False kv_layout_p='NHD' "
        "pos_encoding_mode_p='NONE' sm_scale_p window_left_p=-1 rope_scale_p rope_theta_p return_lse_p=False custom_mask_d "
        "packed_custom_mask_d causal_d=False kv_layout_d='NHD' pos_encoding_mode_d='NONE' sm_scale_d window_left_d=-1 rope_scale_d "
        "rope_theta_d q_scale k_scale v_scale return_lse_d=False use_fp16_qk_reduction=False enable_pdl",
        "reset_workspace_buffer": _RESET, "end_forward": "",
    },
    "BatchPODWithPagedKVCacheWrapper": {
        "__init__": "float_workspace_buffer! kv_layout='NHD'",
        "plan": "qo_indptr_p! kv_indptr_p! kv_indices_p! last_page_len_p! qo_indptr_d! kv_indptr_d! kv_indices_d! last_page_len_d! "
        f"{_HEADS} head_dim! page_size! {_POD_PLAN}",
        "run": "q_p! paged_kv_cache_p! q_d! paged_kv_cache_d! custom_mask_p packed_custom_mask_p causal_p=False q_scale k_scale "
        "v_scale return_lse=False use_fp16_qk_reduction=False enable_pdl",
        "end_forward": "",
    },
    "BatchAttention": {
        "__init__": "kv_layout='NHD' device='cuda'",
        "plan": f"qo_indptr! kv_indptr! kv_indices! kv_len_arr! {_HEADS} head_dim_qk! head_dim_vo! page_size! causal=False "
        "sm_scale logits_soft_cap q_data_type=torch.bfloat16 kv_data_type=torch.bfloat16 use_profiler=False",
        "run": "q! kv_cache! out lse k_scale v_scale logits_soft_cap=0.0 profiler_buffer kv_cache_sf",
    },
    "BatchMLAPagedAttentionWrapper": {
        "__init__": "float_workspace_buffer! use_cuda_graph=False qo_indptr kv_indptr kv_indices kv_len_arr backend='auto'",
        "plan": "qo_indptr! kv_indptr! kv_indices! kv_len_arr! num_heads! head_dim_ckv! head_dim_kpe! page_size! causal! "
        "sm_scale! q_data_type! kv_data_type! use_profiler=False",
        "run": "q_nope! q_pe! ckv_cache! kpe_cache! out lse return_lse=False profiler_buffer kv_len page_table "
        "return_lse_base_on_e=False",
    },
    "BatchAttentionWithAttentionSinkWrapper": {
        "__init__": f"{_PAGED_INIT} {_FORWARD} q_data_type=torch.bfloat16 kv_data_type=torch.bfloat16 head_dim_qk=128 "
        "head_dim_vo=128 window_left=-1",
    },
}  # fmt: skip
FUNCTIONS = (
    "merge_state merge_state_in_place merge_states single_decode_with_kv_cache single_prefill_with_kv_cache "
    "single_prefill_with_kv_cache_return_lse append_paged_kv_cache append_paged_mla_kv_cache get_batch_indices_positions "
    "get_seq_lens packbits segment_packbits"
)


def parsed(signature: str):
    """`[(name, default or inspect's empty)]`, positional and by name."""
    parts = signature.partition("|")[::2]

    def read(argument):
        if argument.endswith("!"):
            return argument[:-1], inspect.Parameter.empty
        name, _, default = argument.partition("=")
        return name, eval(default) if default else None

    return tuple([read(argument) for argument in part.split()] for part in parts)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    """FlashInfer's arguments come first, in its order; more may follow, with defaults."""
    wrapper = getattr(fi_ops, name)
    for method, signature in SIGNATURES[name].items():
        found = list(inspect.signature(getattr(wrapper, method)).parameters.values())[1:]
        positional = [(p.name, p.default) for p in found if p.kind == p.POSITIONAL_OR_KEYWORD]
        by_name = {p.name: p.default for p in found if p.kind == p.KEYWORD_ONLY}
        wanted, wanted_by_name = parsed(signature)
        assert positional[: len(wanted)] == wanted, (name, method)
        assert all(default is not inspect.Parameter.empty for _, default in positional[len(wanted) :]), (name, method)
        assert {key: by_name.get(key, "missing") for key, _ in wanted_by_name} == dict(wanted_by_name), (name, method)


def test_aliases_and_properties():
    for name in SIGNATURES:
        wrapper = getattr(fi_ops, name)
        if name not in ("BatchAttention", "BatchMLAPagedAttentionWrapper") and "SharedPrefix" not in name:
            assert wrapper.begin_forward is wrapper.plan, name
            assert isinstance(inspect.getattr_static(wrapper, "is_cuda_graph_enabled"), property), name
    for name in (
        "BatchDecodeWithPagedKVCacheWrapper",
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper",
    ):
        assert callable(getattr(fi_ops, name).run_return_lse) and callable(getattr(fi_ops, name).workspace_size)
    assert all(callable(getattr(fi_ops, name)) for name in FUNCTIONS.split())


def test_modules():
    """`flashinfer.decode.X` ports, too."""
    modules = {"decode": 2, "prefill": 2, "cascade": 3, "sparse": 2, "pod": 2, "attention": 2, "mla": 1}
    found = {
        m: sum(name in vars(getattr(fi_ops, m)) and name in getattr(fi_ops, m).__all__ for name in SIGNATURES)
        for m in modules
    }
    assert found == modules and sum(found.values()) == len(SIGNATURES)


def test_a_program_of_flashinfer_s_documentation():
    """Decode over pages, as FlashInfer's own example has it, with only the import and the device changed."""
    flashinfer, device = fi_ops, "cpu"
    num_layers, num_qo_heads, num_kv_heads, head_dim, max_num_pages, page_size = 3, 64, 8, 128, 128, 16
    workspace_buffer = torch.zeros(128 * 1024, dtype=torch.uint8, device=device)
    decode_wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace_buffer, "NHD")
    batch_size = 7
    kv_page_indices = torch.arange(max_num_pages).int().to(device)
    kv_page_indptr = torch.tensor([0, 17, 29, 44, 48, 66, 100, 128], dtype=torch.int32, device=device)
    kv_last_page_len = torch.tensor([1, 7, 14, 4, 3, 1, 16], dtype=torch.int32, device=device)
    kv_cache_at_layer = [
        torch.randn(max_num_pages, 2, page_size, num_kv_heads, head_dim).half().to(device) for _ in range(num_layers)
    ]
    decode_wrapper.plan(
        kv_page_indptr, kv_page_indices, kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        pos_encoding_mode="NONE", data_type=torch.float16,
    )  # fmt: skip
    for i in range(num_layers):
        q = torch.randn(batch_size, num_qo_heads, head_dim).half().to(device)
        o = decode_wrapper.run(q, kv_cache_at_layer[i])
        assert o.shape == (batch_size, num_qo_heads, head_dim)
        pages = kv_cache_at_layer[i][29:44]
        k, v = (pages[:, n].flatten(0, 1)[: 14 * page_size + 14] for n in range(2))
        assert torch.allclose(o[2], flashinfer.single_decode_with_kv_cache(q[2], k, v), atol=2e-3)
