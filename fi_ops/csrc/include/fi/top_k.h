// The largest values of rows, and log-probabilities of chosen and of the largest tokens.
//
// Order: NaN first, then larger first, lower id first among equals.
#pragma once

#include "fi/sampling.h"

namespace fi {

struct TopKParams {
  const void* input;  // [rows, vocab_size], of `dtype`
  void* values;       // [rows, k], packed, of `dtype`
  int64_t* indices;   // [rows, k], packed
  int64_t rows;
  int64_t vocab_size;
  int64_t row_stride;  // elements between rows of the input
  int64_t k;           // in [1, vocab_size]
  DType dtype;
  bool sorted;  // largest first, else by id
};

struct LogprobsParams {
  const void* logits;        // [rows, vocab_size], of `dtype`
  IntegerPerDraw token_ids;  // [rows]
  float* logprobs;           // [rows], of token_ids
  void* ranks;               // [rows], int32 or int64 as token_ids: places in the order, from 1
  float* top_logprobs;       // [rows, num_top], packed
  void* top_ids;             // [rows, num_top], packed, as ranks
  int64_t rows;
  int64_t vocab_size;
  int64_t row_stride;  // elements between rows of logits
  int64_t num_top;     // in [0, vocab_size]
  DType dtype;

  FI_HD void write_id(void* to, int64_t i, int64_t id) const {
    if (token_ids.wide) {
      static_cast<int64_t*>(to)[i] = id;
    } else {
      static_cast<int32_t*>(to)[i] = static_cast<int32_t>(id);
    }
  }
};

}  // namespace fi

FI_KERNEL(top_k, fi::TopKParams)
FI_KERNEL(gather_logprobs, fi::LogprobsParams)
