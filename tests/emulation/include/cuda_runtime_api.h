// The emulator's stand-in for the CUDA runtime's host API: see ../README.md.
#pragma once

#include "emulation/types.h"
