// Bindings of latent attention over a paged cache.
#include "fi/mla.h"

#include "binding/batch_attention.h"

namespace fi::binding {
namespace {

struct MlaInputs {
  const Tensor &q_nope, &q_pe, &ckv_cache, &kpe_cache, &qo_indptr, &kv_indices, &kv_indptr, &kv_last_page_len;
  double scale;
  const MaybeTensor& kv_scale;
  bool causal;
};

void check_query(const char* op, const MlaInputs& in) {
  constexpr const char* layout = "[nnz_qo, num_heads, head_dim_kpe]";
  check_dtype(op, "q_nope", in.q_nope, floats);
  check_ndim(op, "q_nope", in.q_nope, 3, "[nnz_qo, num_heads, head_dim_ckv]");
  check_last_dim_contiguous(op, "q_nope", in.q_nope);
  check_same_device(op, "q_pe", in.q_pe, "q_nope", in.q_nope);
  check_same_dtype(op, "q_pe", in.q_pe, "q_nope", in.q_nope);
  check_ndim(op, "q_pe", in.q_pe, 3, layout);
  check_shape_but_last(op, "q_pe", in.q_pe, in.q_nope, in.q_pe.size(2), layout);
  check_last_dim_contiguous(op, "q_pe", in.q_pe);
}

void check_caches(const char* op, const MlaInputs& in) {
  constexpr const char* layout = "[num_pages, page_size, head_dim_ckv]";
  check_same_device(op, "ckv_cache", in.ckv_cache, "q_nope", in.q_nope);
  check_dtype(op, "ckv_cache", in.ckv_cache,
              std::array{in.q_nope.scalar_type(), ScalarType::Float8_e4m3fn, ScalarType::Float8_e5m2});
  check_ndim(op, "ckv_cache", in.ckv_cache, 3, layout);
  check_shape_but_last(op, "ckv_cache", in.ckv_cache, in.ckv_cache, in.q_nope.size(2), layout);
  check_last_dim_contiguous(op, "ckv_cache", in.ckv_cache);
  check_same_device(op, "kpe_cache", in.kpe_cache, "q_nope", in.q_nope);
  check_same_dtype(op, "kpe_cache", in.kpe_cache, "ckv_cache", in.ckv_cache);
  check_shape_but_last(op, "kpe_cache", in.kpe_cache, in.ckv_cache, in.q_pe.size(2),
                       "[num_pages, page_size, head_dim_kpe]");
  check_last_dim_contiguous(op, "kpe_cache", in.kpe_cache);
}

void check_inputs(const char* op, const MlaInputs& in) {
  check_no_grads(op, in.q_nope, in.q_pe, in.ckv_cache, in.kpe_cache, in.kv_scale);
  check_query(op, in);
  check_caches(op, in);
  check_same_device(op, "qo_indptr", in.qo_indptr, "q_nope", in.q_nope);
  check_lengths(op, in.qo_indptr, in.kv_indptr, in.kv_last_page_len, in.ckv_cache.size(1));
  check_indices(op, "kv_indices", in.kv_indices, "q_nope", in.q_nope);
  check_ndim(op, "kv_indices", in.kv_indices, 1, "[nnz_pages]");
  FI_CHECK(op, !std::isnan(in.scale),
           "scale must be a number, got nan; pass 1/sqrt of the head_dim before absorption");
  if (in.kv_scale) {
    check_same_device(op, "kv_scale", *in.kv_scale, "q_nope", in.q_nope);
    check_dtype(op, "kv_scale", *in.kv_scale, std::array{ScalarType::Float});
    check_shape(op, "kv_scale", *in.kv_scale, {1}, "[1]");
  }
}

MlaParams mla_params(const MlaInputs& in, const BatchOptions& options, const Tensor& output,
                     ScratchArena& arena) {
  const Tensor one_head = torch::stable::unsqueeze(in.ckv_cache, 2);
  MlaParams p{};
  p.batch = batch_params(in.q_nope, one_head, one_head, indices_of(in.qo_indptr), in.qo_indptr.size(0) - 1,
                         output, options, arena);
  set_pages(p.batch, one_head, one_head, in.kv_indices, in.kv_indptr, in.kv_last_page_len);
  p.head_dim_kpe = in.q_pe.size(2);
  p.q_pe = in.q_pe.const_data_ptr();
  p.q_pe_stride_n = in.q_pe.stride(0), p.q_pe_stride_h = in.q_pe.stride(1);
  p.kpe = in.kpe_cache.const_data_ptr();
  p.kpe_stride_page = in.kpe_cache.stride(0), p.kpe_stride_n = in.kpe_cache.stride(1);
  return p;
}

struct Outputs {
  Tensor output;
  MaybeTensor lse;
};

Outputs attend(const char* op, bool with_lse, const MlaInputs& in) {
  check_inputs(op, in);
  const Tensor& q_nope = in.q_nope;
  const MaybeTensor none;
  const BatchOptions options{none, none,      in.kv_scale, in.kv_scale, none, none,  none,
                             none, in.causal, -1,          in.scale,    0.0,  false, 0};
  ScratchArena arena(q_nope);
  Outputs outputs{empty({q_nope.size(0), q_nope.size(1), q_nope.size(2)}, q_nope.scalar_type(), q_nope), {}};
  MlaParams p = mla_params(in, options, outputs.output, arena);
  check_paged_values(op, options, p.batch, q_nope, in.qo_indptr, in.kv_indices, in.kv_indptr,
                     in.kv_last_page_len, "q_nope");
  if (with_lse) {
    outputs.lse = empty({q_nope.size(0), q_nope.size(1)}, ScalarType::Float, q_nope);
    p.batch.call.lse = static_cast<float*>(outputs.lse->mutable_data_ptr());
  }
  run(FI_KERNEL_OF(mla_paged_attention), q_nope, p);
  return outputs;
}

Tensor mla_paged_attention_op(const Tensor& q_nope, const Tensor& q_pe, const Tensor& ckv_cache,
                              const Tensor& kpe_cache, const Tensor& qo_indptr, const Tensor& kv_indices,
                              const Tensor& kv_indptr, const Tensor& kv_last_page_len, double scale,
                              const MaybeTensor& kv_scale, bool causal) {
  return attend("mla_paged_attention", false,
                {q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len,
                 scale, kv_scale, causal})
      .output;
}

std::tuple<Tensor, Tensor> mla_paged_attention_with_lse_op(const Tensor& q_nope, const Tensor& q_pe,
                                                           const Tensor& ckv_cache, const Tensor& kpe_cache,
                                                           const Tensor& qo_indptr, const Tensor& kv_indices,
                                                           const Tensor& kv_indptr,
                                                           const Tensor& kv_last_page_len, double scale,
                                                           const MaybeTensor& kv_scale, bool causal) {
  Outputs r = attend("mla_paged_attention_with_lse", true,
                     {q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len,
                      scale, kv_scale, causal});
  return {r.output, *r.lse};
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("mla_paged_attention", TORCH_BOX(&fi::binding::mla_paged_attention_op));
  m.impl("mla_paged_attention_with_lse", TORCH_BOX(&fi::binding::mla_paged_attention_with_lse_op));
}
