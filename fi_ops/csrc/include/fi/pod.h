// Prefill of one request with keys and values of its own, and decode of a batch over a paged cache, in one
// call.
#pragma once

#include "fi/batch_attention.h"

namespace fi {

// `prefill`: a batch of one, ragged. `decode`: one query a request. No plans.
struct PodParams {
  BatchAttentionParams prefill, decode;
};

}  // namespace fi

FI_KERNEL(pod_attention, fi::PodParams)
