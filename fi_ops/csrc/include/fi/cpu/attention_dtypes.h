// The attention kernels of each dtype, behind fi::FI_ISA::attention and batch_attention.
#pragma once

#include "fi/attention.h"
#include "fi/batch_attention.h"

FI_DECLARE_KERNEL(void, attention_f32, (const fi::AttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, attention_bf16, (const fi::AttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, attention_f16, (const fi::AttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, batch_attention_f32, (const fi::BatchAttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, batch_attention_bf16, (const fi::BatchAttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, batch_attention_f16, (const fi::BatchAttentionParams&, const fi::Parallel&))
