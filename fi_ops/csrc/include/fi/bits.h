// Packing of booleans into bits, eight a byte.
#pragma once

#include "fi/indices.h"
#include "fi/kernel.h"

namespace fi {

// Segments [input_indptr[s], input_indptr[s + 1]) of the input, each from byte output_indptr[s] on, its last
// byte padded with 0. Without indptrs the input is one segment.
struct PackBitsParams {
  const uint8_t* input;  // [num_elements], single bytes, 0 or not
  uint8_t* output;       // [num_bytes]
  int64_t num_elements, num_bytes;
  Indices input_indptr, output_indptr;  // [num_segments + 1]
  int64_t num_segments;
  bool little;  // element 0 is bit 0 of its byte; else bit 7
};

}  // namespace fi

FI_KERNEL(packbits, fi::PackBitsParams)
