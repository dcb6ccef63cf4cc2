// POD-attention on the CPU: each of the two keeps all threads busy.
#include "fi/pod.h"

namespace fi::FI_ISA {

void pod_attention(const PodParams& p, const Parallel& parallel) {
  batch_attention(p.prefill, parallel);
  batch_attention(p.decode, parallel);
}

}  // namespace fi::FI_ISA
