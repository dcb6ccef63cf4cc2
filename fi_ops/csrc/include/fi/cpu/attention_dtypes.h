// The attention kernel of each dtype, behind fi::FI_ISA::attention.
#pragma once

#include "fi/attention.h"

FI_DECLARE_KERNEL(void, attention_f32, (const fi::AttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, attention_bf16, (const fi::AttentionParams&, const fi::Parallel&))
FI_DECLARE_KERNEL(void, attention_f16, (const fi::AttentionParams&, const fi::Parallel&))
