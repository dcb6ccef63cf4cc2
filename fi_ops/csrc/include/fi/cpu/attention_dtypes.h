// The attention kernels of each dtype, behind fi::FI_ISA::attention, batch_attention and mla_paged_attention.
#pragma once

#include "fi/attention.h"
#include "fi/mla.h"

FI_DECLARE_KERNEL(void, attention_f32, (const fi::AttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, attention_bf16, (const fi::AttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, attention_f16, (const fi::AttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, batch_attention_f32, (const fi::BatchAttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, batch_attention_bf16, (const fi::BatchAttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, batch_attention_f16, (const fi::BatchAttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, mla_f32, (const fi::MlaParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, mla_bf16, (const fi::MlaParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, mla_f16, (const fi::MlaParams&, const fi::Parallel&))
