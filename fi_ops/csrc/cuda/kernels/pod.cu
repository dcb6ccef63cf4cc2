// POD-attention: prefill and decode, one after the other.
#include "fi/pod.h"

namespace fi::cuda {

void pod_attention(const PodParams& p, const Gpu& gpu) {
  batch_attention(p.prefill, gpu);
  batch_attention(p.decode, gpu);
}

}  // namespace fi::cuda
