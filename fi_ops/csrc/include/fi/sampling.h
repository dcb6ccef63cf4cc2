// Rows of logits or probabilities under filters: sampling from them, and writing out what is left of them.
#pragma once

#include "fi/kernel.h"
#include "fi/scalar.h"

namespace fi {

// One draw: which row it is from, its filters, its random number.
struct SamplingDraw {
  int64_t row;
  int64_t top_k;      // <= 0 or >= vocab_size: no filter
  double top_p;       // >= 1: no filter; 0: argmax
  double min_p;       // 0: no filter
  float temperature;  // 0: argmax; 1 for probabilities
  float uniform;      // in [0, 1)
};

// A number for each draw: [batch] float32 through a stride, or one for all.
struct NumberPerDraw {
  const float* data = nullptr;  // null: `value` for all
  int64_t stride = 0;
  double value = 0;

  FI_HD double at(int64_t i) const { return data == nullptr ? value : double(data[i * stride]); }
};

// An integer for each draw: [batch] int32 or int64 through a stride, or one for all.
struct IntegerPerDraw {
  const void* data = nullptr;  // null: `value` for all
  bool wide = false;           // int64, else int32
  int64_t stride = 0;
  int64_t value = 0;

  FI_HD int64_t at(int64_t i) const {
    if (data == nullptr) return value;
    return wide ? static_cast<const int64_t*>(data)[i * stride]
                : static_cast<const int32_t*>(data)[i * stride];
  }
};

// Rows and what of them is kept.
struct FilterParams {
  const void*
      input;  // rows x vocab_size, of `dtype`: logits, or non-negative weights (`from_probs`, float32)
  IntegerPerDraw indices;  // the row of each draw; no data: draw i is from row i
  IntegerPerDraw top_k;
  NumberPerDraw top_p, min_p, temperature;
  NumberPerDraw uniform;  // no data where nothing is drawn
  int64_t batch;
  int64_t rows;
  int64_t vocab_size;
  int64_t row_stride;  // elements between rows of the input
  DType dtype;
  bool from_probs;
  bool top_k_first;  // top-p's mass is without what top-k removed
  bool min_p_first;  // top-p's mass is without what min-p removed
  bool exact_ties;   // top-k keeps exactly k, lowest ids first; else all that equal the k-th

  FI_HD SamplingDraw draw(int64_t i) const {
    return {indices.data == nullptr ? i : indices.at(i),
            top_k.at(i),
            top_p.at(i),
            min_p.at(i),
            static_cast<float>(temperature.at(i)),
            static_cast<float>(uniform.at(i))};
  }
};

struct SamplingParams : FilterParams {
  void* samples;  // [batch], int32 or int64 by `sample_dtype`
  bool* valid;    // [batch]
  DType sample_dtype;

  FI_HD void write(int64_t i, int64_t id, bool is_valid) const {
    valid[i] = is_valid;
    if (sample_dtype == DType::i64) {
      static_cast<int64_t*>(samples)[i] = id;
    } else {
      static_cast<int32_t*>(samples)[i] = static_cast<int32_t>(id);
    }
  }
};

struct RenormParams : FilterParams {
  void*
      output;  // [batch, vocab_size], packed: float32 probabilities, or (top_k_mask_logits) logits of `dtype`
};

}  // namespace fi

FI_KERNEL(top_k_top_p_sample, fi::SamplingParams)
FI_KERNEL(renorm_probs, fi::RenormParams)
FI_KERNEL(top_k_mask_logits, fi::RenormParams)
