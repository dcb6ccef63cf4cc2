// Packing of booleans into bits, eight a byte.
#pragma once

#include "fi/kernel.h"

namespace fi {

struct PackBitsParams {
  const uint8_t* input;  // single bytes, 0 or not
  uint8_t* output;
  const int64_t* input_indptr;   // [num_segments + 1], in elements
  const int64_t* output_indptr;  // [num_segments + 1], in bytes; a segment starts on a byte and its last byte
                                 // is padded with 0
  int64_t num_segments;
  bool little;  // element 0 is bit 0 of its byte; else bit 7
};

}  // namespace fi

FI_KERNEL(packbits, fi::PackBitsParams)
