// Chain speculative sampling.
#pragma once

#include "fi/sampling.h"

namespace fi {

struct SpeculativeParams {
  const float* draft_probs;     // [batch, num_speculative_tokens, vocab_size], through draft_strides
  const float* target_probs;    // [batch, num_speculative_tokens + 1, vocab_size], through target_strides
  const void* draft_token_ids;  // [batch, num_speculative_tokens], int64 where `wide`, else int32
  const float* uniform;         // [batch, num_speculative_tokens + 1], through uniform_strides
  void* output_token_ids;       // [batch, num_speculative_tokens + 1], packed, as draft_token_ids
  int32_t* accepted;            // [batch]
  int32_t* emitted;             // [batch]
  int64_t batch;
  int64_t num_speculative_tokens;
  int64_t vocab_size;
  int64_t draft_strides[2], target_strides[2], id_strides[2],
      uniform_strides[2];  // of the first two dimensions
  bool wide;

  FI_HD const float* draft_row(int64_t b, int64_t i) const {
    return draft_probs + b * draft_strides[0] + i * draft_strides[1];
  }
  FI_HD const float* target_row(int64_t b, int64_t i) const {
    return target_probs + b * target_strides[0] + i * target_strides[1];
  }
  FI_HD float uniform_at(int64_t b, int64_t i) const {
    return uniform[b * uniform_strides[0] + i * uniform_strides[1]];
  }
  FI_HD int64_t draft_id(int64_t b, int64_t i) const {
    const int64_t at = b * id_strides[0] + i * id_strides[1];
    return wide ? static_cast<const int64_t*>(draft_token_ids)[at]
                : static_cast<const int32_t*>(draft_token_ids)[at];
  }
  FI_HD void write_id(int64_t b, int64_t i, int64_t id) const {
    const int64_t at = b * (num_speculative_tokens + 1) + i;
    if (wide) {
      static_cast<int64_t*>(output_token_ids)[at] = id;
    } else {
      static_cast<int32_t*>(output_token_ids)[at] = static_cast<int32_t>(id);
    }
  }
  // Whether draft token i passes its test: products of floats are exact in double.
  FI_HD bool accepts(int64_t b, int64_t i) const {
    const int64_t id = draft_id(b, i);
    return double(uniform_at(b, i)) * double(draft_row(b, i)[id]) < double(target_row(b, i)[id]);
  }
};

}  // namespace fi

FI_KERNEL(chain_speculative_sample, fi::SpeculativeParams)
