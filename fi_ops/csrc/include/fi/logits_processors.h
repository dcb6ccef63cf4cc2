// Bias, penalties for seen tokens and an allowed-token mask, applied to logits in one pass.
#pragma once

#include "fi/sampling.h"

namespace fi {

struct LogitsProcessorsParams {
  const void* logits;            // [batch, vocab_size], of `dtype`
  const int32_t* output_counts;  // [batch, vocab_size]; null: none generated
  const bool* prompt_mask;       // [batch, vocab_size]; null: no prompt
  const float* logit_bias;       // [vocab_size] or [batch, vocab_size]; null: none
  const uint32_t* bitmask;       // [batch, ceil(vocab_size / 32)], bit 1: allowed; null: all are
  void* output;                  // [batch, vocab_size], packed, of `dtype`
  NumberPerDraw repetition_penalty, presence_penalty, frequency_penalty;
  int64_t batch;
  int64_t vocab_size;
  int64_t logits_stride, counts_stride, prompt_stride, bias_stride, bitmask_stride;  // elements between rows
  DType dtype;
};

}  // namespace fi

FI_KERNEL(apply_logits_processors, fi::LogitsProcessorsParams)
